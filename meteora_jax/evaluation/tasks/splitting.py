"""A task's lines divided into train, test and holdout by the split rule (`split_of`), every line as it is."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from meteora_jax.config import InputError, read_lines
from meteora_jax.evaluation.tasks import SPLITS, TaskCounts, split_of
from meteora_jax.evaluation.tasks.checking import name_problems
from meteora_jax.examples import parse_example, parse_record
from meteora_jax.io.files import whole_folder
from meteora_jax.text import check_text

Lines = dict[str, list[bytes]]  # of each split


def split_tasks(tasks_dir: Path, sources: Mapping[str, Path], field: str | None = None) -> list[TaskCounts]:
    """Write `tasks_dir/<task>/{train,test,holdout}.jsonl` from a file of lines each; nothing unless all can be written.

    field: the key of a line that holds the example's own input; its prompt, or what the user says in its messages,
    unless given. The same input is always in the same split. A task that has one of the files already is refused.

    Raises:
        InputError: all that is wrong: a file, a line, a task that is there, or too few lines for train and test.
    """
    problems, divided = [], {}
    others = [*sources, *(path.name for path in tasks_dir.glob("*") if path.is_dir())]
    for task, source in sources.items():
        problems += _destination_problems(tasks_dir, task) + name_problems(tasks_dir, task, others)
        try:
            divided[task] = divide(source, field)
        except InputError as error:
            problems += error.problems
    if problems:
        raise InputError(problems)
    counts = []
    for task, lines in divided.items():
        with whole_folder(tasks_dir / task) as folder:
            if (tasks_dir / task).is_dir():  # with a task.json, perhaps, or the source itself
                try:
                    shutil.copytree(tasks_dir / task, folder, symlinks=True, dirs_exist_ok=True)
                except shutil.Error as e:
                    raise InputError([f"{path}: cannot be copied ({why})" for path, _, why in e.args[0]]) from None
            for split, own in lines.items():
                (folder / f"{split}.jsonl").write_bytes(b"".join(line + b"\n" for line in own))
        sizes = {split: len(own) for split, own in lines.items()}
        counts.append(TaskCounts(task, **sizes, pinned=0, listed=0))
    return counts


def divide(source: Path, field: str | None = None) -> Lines:
    """A file's lines by their splits; see `split_tasks`."""
    lines: Lines = {split: [] for split in SPLITS}
    problems = []
    for where, line in read_lines(source):
        try:
            lines[split_of(_own_input(line, where, field))].append(line)
        except InputError as error:
            problems += error.problems
    if problems:
        raise InputError(problems)
    if not lines["train"] or not lines["test"]:
        found = ", ".join(f"{len(own)} of {split}" for split, own in lines.items())
        raise InputError(f"{source}: expected lines that the split rule puts into train and test, found {found}")
    return lines


def _own_input(line: bytes, where: str, field: str | None) -> str:
    example = parse_example(line, where)
    if field is None:
        return example.prompt
    found = parse_record(line, where).get(field)
    if not isinstance(found, str):
        raise InputError(f"{where}: {field}: expected a text, the example's own input, found {found!r:.60}")
    check_text(found, f"{where}: {field}")
    return found


def _destination_problems(tasks_dir: Path, task: str) -> list[str]:
    if Path(task).name != task or task.startswith("."):
        return [f"{task}: expected a task's name, found a path or a hidden one"]
    folder = tasks_dir / task
    there = [f"{split}.jsonl" for split in SPLITS if os.path.lexists(folder / f"{split}.jsonl")]
    if there:
        return [
            f"{folder}: expected no train, test or holdout yet, found {', '.join(there)}, which are left as they are"
        ]
    return [f"{folder}: expected a folder or nothing, found a file"] if folder.exists() and not folder.is_dir() else []
