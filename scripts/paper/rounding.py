"""Measure what a base's rounding changes: how likely the tasks' right answers are, each by its own adapter.

    meteora quantize runs/demo/base runs/rounding/int8 --weights int8            # and fp8, int4
    python scripts/paper/rounding.py runs/demo/base runs/rounding/int8 runs/rounding/fp8 runs/rounding/int4 \\
        --bank runs/demo/bank --tasks runs/tasks --json runs/rounding/measured.json

The first base is what the others are compared with. Answers are read, not written: of each of their tokens the log
probability, and whether the likeliest token is the first base's. An answer is right where each of its tokens, and its
end, is the likeliest: greedy decoding would write just that.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

import meteora_jax as mj
from meteora_jax.evaluation.problems import choose
from meteora_jax.evaluation.tasks import load_split
from meteora_jax.io.files import write_json

TOGETHER = 8  # rows of a batch


@dataclass(frozen=True)
class Arguments:
    bases: tyro.conf.Positional[tuple[Path, ...]]
    """BASE folders, the one to compare with first."""
    bank: Path
    """BANK folder, its adapters named like the tasks."""
    tasks: Path
    """TASKS folder; its test problems are read."""
    limit: int = 5
    """Problems of a task."""
    longest: int = 256
    """Problems whose prompt and response have more tokens are left out."""
    json: Path | None = None
    """Write the figures here too."""


def problems(model: mj.Meteora, asked: Arguments) -> list[tuple[str, list[int], int]]:
    """(task, token ids of prompt and response, where the response begins) of each problem."""
    found = []
    for task in model.adapter_names:
        examples = load_split(asked.tasks, task, "test")
        for example in (examples[i] for i in choose([e.prompt for e in examples], asked.limit)):
            start = len(model.encode(example.prompt))
            ids = model.encode(example.prompt + example.response)
            if start < len(ids) <= asked.longest:
                found.append((task, ids, start))
    return sorted(found, key=lambda problem: len(problem[1]))  # rows of a batch are alike in length


def judged(model: mj.Meteora, asked: list[tuple[str, list[int], int]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Log probability and likeliest token of every token of the responses; whether each response is the greedy one."""
    logprobs, likeliest, right = [], [], []
    for at in range(0, len(asked), TOGETHER):
        some = asked[at : at + TOGETHER]
        whole = model.logits([ids for _, ids, _ in some], router=[mj.Fixed(task) for task, _, _ in some])
        for (_, ids, start), row in zip(some, whole, strict=True):
            logits = np.asarray(row[start - 1 : len(ids)], np.float64)
            best, logits = logits.argmax(1), logits[:-1]
            total = np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1)) + logits.max(1)
            logprobs.append(logits[np.arange(len(logits)), ids[start:]] - total)
            likeliest.append(best[:-1])
            right.append(best[:-1].tolist() == ids[start:] and int(best[-1]) in model.config.eos_token_ids)
    return np.concatenate(logprobs), np.concatenate(likeliest), np.asarray(right)


def main(asked: Arguments) -> None:
    """Measures, prints and writes."""
    rows: list[dict[str, Any]] = []
    read: list[tuple[str, list[int], int]] = []
    first: np.ndarray | None = None
    console = Console()
    for base in asked.bases:
        model = mj.load(base, bank=asked.bank)
        read = read or problems(model, asked)
        logprobs, likeliest, right = judged(model, read)
        first = likeliest if first is None else first
        same = float(np.mean(likeliest == first))
        logprob = float(logprobs.mean())
        rows.append({"base": str(base), "logprob": logprob, "same_likeliest": same, "right": int(right.sum())})
        console.print(f"{base}: {logprob:.4f}, {100 * same:.1f} %, {right.sum()} of {len(right)} answers right")
    table = Table("base", "mean log probability", "same likeliest token, %", "answers right, %")
    for row in rows:
        share = f"{100 * row['right'] / len(read):.1f}"
        table.add_row(row["base"], f"{row['logprob']:.4f}", f"{100 * row['same_likeliest']:.1f}", share)
    console.print(table)
    console.print(f"{len(read)} problems, {0 if first is None else len(first)} tokens of responses")
    if asked.json:
        write_json(asked.json, {"problems": len(read), "rows": rows})


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
