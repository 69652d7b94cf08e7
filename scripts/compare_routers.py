"""Bare base, oracle, three compositions of retrieval, gates, gates within retrieval: one table, IID and OOD.

    meteora index build runs/demo/index --tasks runs/tasks --only ADAPTER ADAPTER ...
    python scripts/compare_routers.py runs/demo runs/demo/index runs/tasks --limit 3 --json runs/demo/routers.json

OOD: the problem's own adapter is masked, as if the bank had none for its task.
"""

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

import meteora_jax as mj
from meteora_jax.evaluation.metrics import accuracy
from meteora_jax.evaluation.tasks import load_split


@dataclass(frozen=True)
class Compare:
    demo: tyro.conf.Positional[Path]
    """Folder with base, bank and gates."""
    index: tyro.conf.Positional[Path]
    """INDEX folder of the bank's adapters."""
    tasks: tyro.conf.Positional[Path]
    """TASKS folder; the first problems of each adapter's test split are asked."""
    limit: int = 3
    """Problems a task."""
    k: int = 3
    """Adapters retrieved."""
    max_new_tokens: int = 32
    """At most this many tokens an answer."""
    batch_size: int = 12
    """Problems a batch."""
    dtype: str = "float32"
    """Of weights and activations."""
    json: Path | None = None
    """Write table and answers here."""


def systems(model: mj.Meteora, index: mj.Index, k: int) -> dict[str, Callable[[str], Any]]:
    """{name: task -> router}."""
    gates = model.gates
    assert gates is not None
    found: dict[str, Any] = {
        "selection": mj.Retrieval(index, k, "selection"),
        "mixture": mj.Retrieval(index, k, "mixture"),
        "fusion": mj.Retrieval(index, k, "fusion"),
        "gates within": mj.GatesWithin(index, k, gates.top_k, gates.temperature),
    }
    table: dict[str, Callable[[str], Any]] = {
        "bare": lambda task: None,
        "oracle": mj.Fixed,
        "gates": lambda task: mj.Gates(gates.top_k, gates.temperature),
    }
    everything = set(model.adapter_names)
    for name, router in found.items():
        table[name] = lambda task, router=router: router
        table[f"{name}, OOD"] = lambda task, router=router: dataclasses.replace(router, exclude=(task,))
    others = lambda task: tuple(sorted(everything - {task}))  # noqa: E731
    table["gates, OOD"] = lambda task: mj.Gates(gates.top_k, gates.temperature, others(task))
    return table


def main(command: Compare) -> None:
    model = mj.load(command.demo / "base", command.demo / "bank", command.demo / "gates", dtype=command.dtype)
    index = mj.Index.load(command.index)
    problems = [(task, row) for task in model.adapter_names for row in load_split(command.tasks, task, "test")]
    seen = dict.fromkeys(model.adapter_names, 0)
    asked = []
    for task, row in problems:
        seen[task] += 1
        if seen[task] <= command.limit:
            asked.append((task, row.prompt, row.response))
    asked.sort(key=lambda p: len(p[1]))
    best = index.query([prompt for _, prompt, _ in asked], k=1).names
    right = sum(names[0] == task for names, (task, _, _) in zip(best, asked, strict=True))
    print(f"{len(asked)} problems; own adapter retrieved first: {100 * right / len(asked):.1f} %")
    table, answers = {}, []
    for name, router in systems(model, index, command.k).items():
        hits = 0
        for start in range(0, len(asked), command.batch_size):
            part = asked[start : start + command.batch_size]
            done = model.generate(
                [prompt for _, prompt, _ in part],
                [router(task) for task, _, _ in part],
                max_new_tokens=command.max_new_tokens,
            )
            for (task, _, response), c in zip(part, done, strict=True):
                hit = accuracy(task, c.text, response)
                hits += hit
                answers.append({"system": name, "task": task, "answer": c.text, "expected": response, "right": hit})
        table[name] = round(100 * hits / len(asked), 1)
        print(f"{name:20} {table[name]:5.1f}", flush=True)
    if command.json is not None:
        command.json.write_text(json.dumps({"accuracy": table, "answers": answers}, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Compare))
