"""`meteora prepare`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import tyro
from rich.table import Column, Table

from meteora_jax.cli.report import console, progress_bar, write_json
from meteora_jax.config import InputError
from meteora_jax.evaluation.tasks import TaskCounts, bigbench, hub, read_test_inputs
from meteora_jax.evaluation.tasks.bigbench import Reproduction

HUB = "hub"


@dataclass(frozen=True)
class Prepare:
    """Write the tasks' train, test and holdout files: 22 tasks from BIG-bench's files, six from the hub."""

    source: tyro.conf.Positional[str]
    """A BIG-bench checkout, or its sdist as it was downloaded (pip download bigbench==1.0.0 --no-deps --no-binary
    :all:), or the word "hub" for the six other tasks (a folder of that name is ./hub)."""
    dest: tyro.conf.Positional[Path]
    """TASKS folder, for <task>/{train,test,holdout}.jsonl."""
    tasks: tuple[str, ...] = ()
    """The tasks to write; by default all of MeteoRA's that the source has."""
    substitutes: bool = False
    """Also six other BIG-bench tasks, in the hub's place: hyperbaton, logical_fallacy_detection, navigate,
    sports_understanding, temporal_sequences, timedial."""
    test_inputs: Path | None = None
    """Lines "SHA-256 task" of inputs that are test, whatever the split rule says."""
    verify: Path | None = None
    """A composite-10 file of the MeteoRA release, whose sub-questions must be among the prompts."""
    json: Path | None = None
    """Write the report here too."""


def prepare(command: Prepare) -> None:
    """Runs `meteora prepare`.

    Raises:
        InputError: the source or a file was refused, or a question of the `--verify` file is not reproduced.
    """
    tasks = command.tasks or (tuple(hub.HUB_TASKS) if command.source == HUB else bigbench.BIGBENCH_TASKS)
    if command.substitutes:
        if command.source == HUB:
            raise InputError("--substitutes: expected BIG-bench as the source, found the hub")
        tasks = tuple(dict.fromkeys((*tasks, *bigbench.SUBSTITUTES)))
    counts = write_tasks(command, tasks)
    console.print(counts_table(counts))

    reproductions = bigbench.verify(command.verify, command.dest, tasks) if command.verify else []
    if reproductions:
        console.print(reproduction_table(reproductions))
    for row in reproductions:
        for prompt in row.different:
            console.print(f"not reproduced, {row.task}: {prompt!r}", highlight=False)

    report = {"tasks": [asdict(row) for row in counts], "reproduction": [asdict(row) for row in reproductions]}
    write_json(command.json, report)
    missed = {row.task: row.questions - row.questions_equal for row in reproductions}
    if any(missed.values()):
        found = ", ".join(f"{task} without {n}" for task, n in missed.items() if n)
        raise InputError(f"{command.verify}: expected every question among the prompts, found {found}")


def write_tasks(command: Prepare, tasks: Sequence[str]) -> list[TaskCounts]:
    """Writes the tasks' folders from the command's source."""
    pinned = read_test_inputs(command.test_inputs) if command.test_inputs else None
    with progress_bar(f"prepare from {command.source}") as bar:

        def progress(task: str, done: int, total: int) -> None:
            bar(done, total, task)

        if command.source == HUB:
            return hub.prepare(command.dest, tasks, pinned, progress=progress)
        return bigbench.prepare(Path(command.source), command.dest, tasks, pinned, progress)


def task_table(*figures: str, title: str | None = None) -> Table:
    """A table with a row a task and a column a figure."""
    return Table(Column("task", no_wrap=True), *(Column(figure, justify="right") for figure in figures), title=title)


def counts_table(counts: Sequence[TaskCounts]) -> Table:
    """How many examples each split has, how many listed inputs were met, how many blank rows were left out."""
    # No column of dashes: the long names of BIG-bench's tasks fill the 80 columns of a terminal without it.
    blank = any(row.blank for row in counts)
    table = task_table("train", "test", "holdout", "pinned", *(["blank"] if blank else []))
    for row in counts:
        pinned = f"{row.pinned}/{row.listed}" if row.listed else "-"
        figures = [str(row.train), str(row.test), str(row.holdout), pinned]
        table.add_row(row.task, *figures, *([str(row.blank)] if blank else []))
    return table


def reproduction_table(reproductions: Sequence[Reproduction]) -> Table:
    """How many sub-questions of the reference are among the prompts."""
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
