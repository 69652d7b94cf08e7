"""What is wrong with a folder of tasks, all together: files, lines, task.json, names, and with a base the prompts."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from meteora_jax.config import InputError, read_lines
from meteora_jax.evaluation.metrics import Metric
from meteora_jax.evaluation.named_metrics import label_problems, metric_for
from meteora_jax.evaluation.systems import of_a_family
from meteora_jax.evaluation.tasks.settings import TaskSettings, read_settings
from meteora_jax.examples import Example, parse_example, parse_record, prompt_ids, prompt_text
from meteora_jax.prompts import is_messages

NEW_TOKENS = 64  # that `meteora evaluate` leaves for an answer unless told
SEPARATORS = ",+="  # between names in options and composites
CHECKED = ("train", "test")  # holdout is looked at once, for a release


@dataclass
class CheckedTask:
    """What was found of a task: examples by split, the metric, what is wrong, what is worth knowing.

    shown: an example as a model reads and writes it, and longest the longest sequence's tokens, where there is a base.
    """

    task: str
    examples: dict[str, list[Example]] = field(default_factory=dict)
    metric: Metric | None = None
    problems: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    shown: tuple[str, str] | None = None
    longest: int | None = None


@dataclass(frozen=True)
class Measure:
    """What renders and measures examples: a base's tokenizer, the token that ends a response, the tokens of its
    context, which None leaves open."""

    tokenizer: Any
    end: int
    context: int | None


def check_tasks(tasks_dir: Path, measure: Measure | None = None) -> list[CheckedTask]:
    """Every task below a folder, in the order of names; what `meteora compose` wrote is none. With a base's measure
    every example is rendered and measured.

    Raises:
        InputError: there is no task.
    """
    folders = sorted(path for path in tasks_dir.glob("*") if path.is_dir() and not path.name.startswith("."))
    names = [path.name for path in folders if not _is_composite(path)]
    if not names:
        raise InputError(f"{tasks_dir}: expected a folder of TASK/train.jsonl and TASK/test.jsonl, found no task")
    return [_check(tasks_dir, name, names, measure) for name in names]


def name_problems(tasks_dir: Path, task: str, others: Sequence[str]) -> list[str]:
    """Why a task cannot have this name beside the others."""
    where, problems = tasks_dir / task, []
    if found := [mark for mark in SEPARATORS if mark in task]:
        problems.append(f"{where}: expected a name without {' '.join(SEPARATORS)}, found {' '.join(found)}")
    if task == "all" or of_a_family(task):
        problems.append(f"{where}: expected a name of its own, found one that --systems or --only gives a meaning")
    if same := [other for other in others if other != task and _folded(other) == _folded(task)]:
        problems.append(f"{where}: expected a name that differs from others by more than case, found {', '.join(same)}")
    return problems


def _folded(name: str) -> str:
    return unicodedata.normalize("NFKC", name).casefold()


def _is_composite(folder: Path) -> bool:
    """Whether a folder holds composite problems: a line of theirs names its tasks."""
    path = folder / "test.jsonl"
    if not folder.name.startswith("composite_") or not path.is_file():
        return False
    try:
        return "tasks" in parse_record(read_lines(path)[0][1], "")
    except (InputError, IndexError):
        return False


def _check(tasks_dir: Path, task: str, names: Sequence[str], measure: Measure | None) -> CheckedTask:
    found = CheckedTask(task, problems=name_problems(tasks_dir, task, names))
    settings = TaskSettings()
    try:
        settings = read_settings(tasks_dir, task)
    except InputError as error:
        found.problems += error.problems
    for split in CHECKED:
        _read(tasks_dir, split, found)
    if not found.problems:
        test, train = found.examples["test"], found.examples.get("train", [])
        try:
            found.metric = metric_for(tasks_dir, task, test)
        except InputError as error:
            found.problems += error.problems
        known = set(found.problems)  # a label that no response is was said already
        found.problems += [p for p in label_problems(tasks_dir, task, settings, train) if p not in known]
    _remark(found)
    if measure is not None:
        _render(found, settings, measure)
    return found


def _read(tasks_dir: Path, split: str, found: CheckedTask) -> None:
    """Reads a split's lines, the good ones among the bad."""
    path = tasks_dir / found.task / f"{split}.jsonl"
    if not path.is_file():
        if split == "test":
            found.problems.append(f"{path}: expected test examples, found no file (meteora tasks split makes one)")
        else:
            found.remarks.append(f"{path}: none, so it can be evaluated but not trained on")
        return
    examples = found.examples[split] = []
    try:
        lines = read_lines(path)
    except InputError as error:
        found.problems += error.problems
        return
    if not lines:
        found.problems.append(f"{path}: expected {split} examples, found none")
    for where, line in lines:
        try:
            examples.append(parse_example(line, where))
        except InputError as error:
            found.problems += error.problems


def _remark(found: CheckedTask) -> None:
    """Notes what trains or judges less than it seems."""
    train = {example.key for example in found.examples.get("train", [])}
    for split, examples in found.examples.items():
        where = f"{found.task}, {split}"
        asked = ["".join([e.prompt, *(message["content"] for message in e.messages)]) for e in examples]
        for what, texts in (("prompts", asked), ("responses", [e.response for e in examples])):
            if empty := sum(not text.strip() for text in texts):
                found.remarks.append(f"{where}: {empty:,} of {len(examples):,} {what} are empty")
        if split == "test" and (seen := sum(example.key in train for example in examples)):
            found.remarks.append(f"{where}: {seen:,} of {len(examples):,} prompts are in train as well")
    kinds = {is_messages(example.asked) for examples in found.examples.values() for example in examples}
    if len(kinds) > 1:
        found.remarks.append(f"{found.task}: some examples are text and some conversations")


def _render(found: CheckedTask, settings: TaskSettings, measure: Measure) -> None:
    """Renders and measures the examples, and keeps one to show."""
    tokenizer, context = measure.tokenizer, math.inf if measure.context is None else measure.context
    room = context - (settings.max_new_tokens or NEW_TOKENS)
    lengths = []
    for split, examples in found.examples.items():
        good = []
        for example in examples:
            try:
                prompt_text(example, tokenizer)
                good.append(example)
            except InputError as error:
                found.problems += error.problems
        prompts = prompt_ids(good, tokenizer)
        texts = [example.response for example in good]
        responses = tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
        sizes = [len(p) + len(r) + 1 for p, r in zip(prompts, responses, strict=True)]
        if split == "test":
            found.problems += [
                f"{example.where}: expected a prompt of at most {room:,} tokens, which leave room for an answer, found "
                f"{len(ids):,}"
                for example, ids in zip(good, prompts, strict=True)
                if len(ids) > room
            ]
            found.problems += [
                f"{example.where}: expected a prompt of at least one token, found none"
                for example, ids in zip(good, prompts, strict=True)
                if not ids
            ]
        elif long := sum(size > context for size in sizes):
            found.remarks.append(
                f"{found.task}, {split}: {long:,} of {len(sizes):,} sequences exceed the base's context"
            )
        lengths += sizes
        if good:
            found.shown = tokenizer.decode(prompts[0]), tokenizer.decode([*responses[0], measure.end])
    found.longest = max(lengths, default=None)


def sample(found: CheckedTask) -> tuple[str, str] | None:
    """An example as a model reads it and as it should go on: rendered where there was a base, else as it is."""
    if found.shown is not None:
        return found.shown
    examples = [example for split in reversed(CHECKED) for example in found.examples.get(split, [])]
    if not examples:
        return None
    asked = examples[0].asked
    text = asked if isinstance(asked, str) else "\n".join(f"{m['role']}: {m['content']}" for m in asked)
    return text, examples[0].response
