"""Measure what a base's rounding changes: how likely the tasks' right answers are, each by its own adapter.

    meteora quantize runs/demo/base runs/rounding/int8 --weights int8            # and fp8, int4
    python scripts/paper/rounding.py runs/demo/base runs/rounding/int8 runs/rounding/fp8 runs/rounding/int4 \\
        --bank runs/demo/bank --tasks runs/tasks --json runs/rounding/measured.json

The first base is what the others are compared with. Answers are read, not written: of each of their tokens the log
probability, and whether the likeliest token is the first base's.
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
    return found


def judged(model: mj.Meteora, asked: list[tuple[str, list[int], int]]) -> tuple[np.ndarray, np.ndarray]:
    """Log probability and likeliest token of every token of the responses."""
    logprobs, likeliest = [], []
    for task, ids, start in asked:
        logits = np.asarray(model.logits([ids], router=mj.Fixed(task)), np.float64)[0, start - 1 : len(ids) - 1]
        total = np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1)) + logits.max(1)
        logprobs.append(logits[np.arange(len(logits)), ids[start:]] - total)
        likeliest.append(logits.argmax(1))
    return np.concatenate(logprobs), np.concatenate(likeliest)


def main(asked: Arguments) -> None:
    """Measures, prints and writes."""
    rows: list[dict[str, Any]] = []
    read: list[tuple[str, list[int], int]] = []
    first: np.ndarray | None = None
    for base in asked.bases:
        model = mj.load(base, bank=asked.bank)
        read = read or problems(model, asked)
        logprobs, likeliest = judged(model, read)
        first = likeliest if first is None else first
        same = float(np.mean(likeliest == first))
        rows.append({"base": str(base), "logprob": float(logprobs.mean()), "same_likeliest": same})
    table = Table("base", "mean log probability", "same likeliest token, %")
    for row in rows:
        table.add_row(row["base"], f"{row['logprob']:.4f}", f"{100 * row['same_likeliest']:.1f}")
    console = Console()
    console.print(table)
    console.print(f"{len(read)} problems, {0 if first is None else len(first)} tokens of responses")
    if asked.json:
        write_json(asked.json, {"problems": len(read), "rows": rows})


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
