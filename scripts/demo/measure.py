"""Accuracy of base, oracle adapters and gates on more test problems than the demo has.

    python scripts/demo/measure.py --base runs/base --bank runs/bank --gates runs/gates --tasks runs/tasks

The problems are drawn by seed from each task's test split, whatever their length.
"""

import random
from dataclasses import dataclass
from pathlib import Path

import tyro

from meteora_jax.cli.demo import evaluate, print_accuracy
from meteora_jax.cli.report import default_dtype, write_json
from meteora_jax.evaluation.tasks import load_split
from meteora_jax.model import load


@dataclass(frozen=True)
class Arguments:
    base: Path
    bank: Path
    gates: Path
    tasks: Path
    each: int = 100
    """Problems a task."""
    batch_size: int = 50
    max_new_tokens: int = 64
    seed: int = 0
    json: Path | None = None
    """Write accuracies and every answer here."""


def main(arguments: Arguments) -> None:
    model = load(arguments.base, arguments.bank, arguments.gates, dtype=default_dtype(None))
    tests = []
    for task in model.adapter_names:
        examples = load_split(arguments.tasks, task, "test")
        for e in random.Random(arguments.seed).sample(examples, min(arguments.each, len(examples))):
            tests.append({"task": task, "prompt": e.prompt, "response": e.response})
    summary = evaluate(model, tests, arguments.max_new_tokens, arguments.batch_size)
    print_accuracy(summary)
    write_json(arguments.json, summary)


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
