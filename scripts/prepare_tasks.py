"""Write the BIG-bench tasks' train, test and holdout files.

    pip download bigbench==1.0.0 --no-deps --no-binary :all:
    python scripts/prepare_tasks.py bigbench-1.0.0.tar.gz runs/tasks

Status 1 when the source was refused, or when a question of the `--verify` file is not reproduced.
"""

import dataclasses
import json as json_format
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from meteora_jax.config import InputError
from meteora_jax.evaluation.tasks.bigbench import (
    BIGBENCH_TASKS,
    Reproduction,
    TaskCounts,
    prepare,
    read_test_inputs,
    verify,
)


@dataclass(frozen=True)
class Arguments:
    bigbench: tyro.conf.Positional[Path]
    """A BIG-bench checkout, or the sdist bigbench-1.0.0.tar.gz as it was downloaded."""
    dest: tyro.conf.Positional[Path]
    """Folder for <task>/{train,test,holdout}.jsonl."""
    tasks: tuple[str, ...] = BIGBENCH_TASKS
    """The tasks to write."""
    test_inputs: Path | None = None
    """Lines "SHA-256 task" of inputs that are test, whatever the split rule says."""
    verify: Path | None = None
    """A composite-10 file of the MeteoRA release, whose sub-questions must be among the prompts."""
    json: Path | None = None
    """Write there what was printed."""


def task_table(*figures: str, title: str | None = None) -> Table:
    return Table(Column("task", no_wrap=True), *(Column(figure, justify="right") for figure in figures), title=title)


def counts_table(counts: list[TaskCounts]) -> Table:
    table = task_table("train", "test", "holdout", "pinned")
    for row in counts:
        pinned = f"{row.pinned}/{row.listed}" if row.listed else "-"
        table.add_row(row.task, str(row.train), str(row.test), str(row.holdout), pinned)
    return table


def reproduction_table(reproductions: list[Reproduction]) -> Table:
    title = "Sub-questions of the reference: equal to a prompt"
    table = task_table("questions", "in test", "answers", "examples", title=title)
    for row in reproductions:
        table.add_row(
            row.task,
            f"{row.questions_equal}/{row.questions}",
            str(row.questions_in_test),
            str(row.answers_equal),
            f"{row.examples_equal}/{row.examples}",
        )
    return table


def main(arguments: Arguments, console: Console) -> int:
    pinned = read_test_inputs(arguments.test_inputs) if arguments.test_inputs else None
    with console.status(f"reading {arguments.bigbench}"):
        counts = prepare(arguments.bigbench, arguments.dest, arguments.tasks, pinned)
    console.print(counts_table(counts))

    reproductions = verify(arguments.verify, arguments.dest, arguments.tasks) if arguments.verify else []
    if reproductions:
        console.print(reproduction_table(reproductions))
    for row in reproductions:
        for prompt in row.different:
            console.print(f"not reproduced, {row.task}: {escape(repr(prompt))}")

    if arguments.json:
        report = {"tasks": counts, "reproduction": reproductions}
        text = json_format.dumps(report, default=dataclasses.asdict, indent=2, ensure_ascii=False)
        arguments.json.write_text(text + "\n", encoding="utf-8")
    return int(any(row.questions_equal < row.questions for row in reproductions))


if __name__ == "__main__":
    try:
        sys.exit(main(tyro.cli(Arguments, description=__doc__), Console()))
    except (InputError, OSError) as error:
        sys.exit(f"error: {error}")
