"""`meteora tasks check | split`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.table import Column, Table
from rich.text import Text

from meteora_jax.cli.prepare import task_table
from meteora_jax.cli.report import console, status, write_json
from meteora_jax.config import InputError

MOST_SHOWN = 600  # characters of an example's prompt on the terminal


@dataclass(frozen=True)
class TasksCheck:
    """Say all that is wrong with a folder of tasks, and show an example of each as a model reads and writes it."""

    tasks: tyro.conf.Positional[Path]
    """TASKS folder: TASKS/<task>/{train,test}.jsonl, and a task.json where a task has a metric of its own."""
    base: Path | None = None
    """BASE folder: its chat template renders the examples, and they are measured against its context."""
    json: Path | None = None
    """Write the report here too."""


@dataclass(frozen=True)
class TasksSplit:
    """Divide tasks' lines into train, test and holdout, by the hash of each example's own input.

    Lines stay as they are, and no file that is there is written over: a task that has one of the three is refused.
    """

    tasks: tyro.conf.Positional[Path]
    """TASKS folder, for <task>/{train,test,holdout}.jsonl."""
    files: tyro.conf.Positional[tuple[str, ...]]
    """NAME=FILE, one a task: JSON lines of prompt and response, or of messages."""
    input: str | None = None
    """The key of a line that holds its own input, where that is not the prompt or what the user says: examples of one
    input are in one split."""
    json: Path | None = None
    """Write the counts here too."""


@dataclass(frozen=True)
class TasksCommand:
    """Check tasks of your own, or divide their lines into train, test and holdout."""

    what: Annotated[TasksCheck, tyro.conf.subcommand("check")] | Annotated[TasksSplit, tyro.conf.subcommand("split")]


def tasks_check(command: TasksCheck) -> None:
    """Runs `meteora tasks check`.

    Raises:
        InputError: something is wrong; every fault has a line on stderr before.
    """
    from meteora_jax.evaluation.tasks.checking import CheckedTask, Measure, check_tasks, sample

    measure = None
    if command.base is not None:
        from meteora_jax.cli.compose import read_base
        from meteora_jax.evaluation.composite import longest_prompt
        from meteora_jax.examples import end_token

        tokenizer, _, config = read_base(command.base)
        measure = Measure(tokenizer, end_token(command.base, config, tokenizer), longest_prompt(config, 0))
    with status.status("checking"):
        found = check_tasks(command.tasks, measure)

    def size(task: CheckedTask, split: str) -> str:
        return f"{len(task.examples[split]):,}" if split in task.examples else "-"

    columns = [Column(name, justify="right") for name in ("train", "test", *(["longest"] if measure else []))]
    table = Table(Column("task", no_wrap=True), *columns, "scored by")
    for task in found:
        metric = task.metric
        scored = "-" if metric is None else metric.name or "MeteoRA's metric"
        longest = [f"{task.longest:,}" if task.longest else "-"] if measure else []
        because = f", {metric.because}" if metric is not None and metric.because else ""
        table.add_row(Text(task.task), size(task, "train"), size(task, "test"), *longest, Text(scored + because))
    console.print(table)
    for task in found:
        if (shown := sample(task)) is not None:
            asked, answer = shown
            console.rule(Text(f"{task.task}: what the model reads"), align="left")
            console.print(_shortened(asked), highlight=False, soft_wrap=True)
            console.rule(Text(f"{task.task}: what it should write"), align="left")
            console.print(_shortened(answer), highlight=False, soft_wrap=True)
    for task in found:
        for remark in task.remarks:
            status.print(f"note: {remark}", highlight=False, soft_wrap=True)
    problems = [problem for task in found for problem in task.problems]
    write_json(command.json, {"tasks": [_record(task, sample(task)) for task in found], "problems": problems})
    if len(problems) == 1:
        raise InputError(problems)
    for problem in problems:
        status.print(f"wrong: {' '.join(problem.split())}", highlight=False, soft_wrap=True)
    if problems:
        raise InputError(f"{command.tasks}: expected nothing wrong, found the {len(problems)} faults above")


def _record(task: Any, shown: tuple[str, str] | None) -> dict[str, Any]:
    metric = None if task.metric is None else {"name": task.metric.name, "because": task.metric.because}
    sizes = {split: len(examples) for split, examples in task.examples.items()}
    example = None if shown is None else {"prompt": shown[0], "response": shown[1]}
    return {
        "task": task.task, **sizes, "metric": metric, "longest": task.longest, "example": example,
        "remarks": task.remarks, "problems": task.problems,
    }  # fmt: skip


def _shortened(text: str) -> str:
    if len(text) <= MOST_SHOWN:
        return text
    half = MOST_SHOWN // 2
    return f"{text[:half]} [... {len(text) - 2 * half:,} characters ...] {text[-half:]}"


def tasks_split(command: TasksSplit) -> None:
    """Runs `meteora tasks split`."""
    from meteora_jax.evaluation.tasks.splitting import split_tasks

    pairs = [(pair, *pair.partition("=")[::2]) for pair in command.files]
    wrong = [f"files: expected NAME=FILE, found {pair!r}" for pair, name, file in pairs if not (name and file)]
    names = [name for _, name, _ in pairs]
    wrong += [f"files: {name}: expected once, found twice" for name in dict.fromkeys(names) if names.count(name) > 1]
    if not pairs:
        wrong.append("files: expected NAME=FILE, found none")
    if wrong:
        raise InputError(wrong)
    counts = split_tasks(command.tasks, {name: Path(file) for _, name, file in pairs}, command.input)
    table = task_table("train", "test", "holdout")
    for row in counts:
        table.add_row(row.task, f"{row.train:,}", f"{row.test:,}", f"{row.holdout:,}")
    console.print(table)
    write_json(command.json, [{"task": c.task, "train": c.train, "test": c.test, "holdout": c.holdout} for c in counts])
