"""Metrics by their names, for tasks of one's own: exact, contains, choice, number, bleu, rouge, rougeL, regex:PATTERN,
python:MODULE.FUNCTION. Case and outer whitespace never matter, except to a pattern and a function.

What nobody names: a task of MeteoRA's has its own metric; one whose task.json has labels is a choice; short responses
are compared exactly and long ones by ROUGE-L.
"""

from __future__ import annotations

import functools
import importlib
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from meteora_jax.config import InputError
from meteora_jax.evaluation import metrics
from meteora_jax.evaluation.metrics import METRICS, Metric, final_number, meteora_metric, plain
from meteora_jax.evaluation.tasks import load_split
from meteora_jax.evaluation.tasks.settings import FILE, TaskSettings, read_settings
from meteora_jax.examples import Example

NAMES = "exact, contains, choice, number, bleu, rouge, rougeL, regex:PATTERN or python:MODULE.FUNCTION"
SHORT, MOST = 40, 0.9  # responses are short if so large a share of them has at most so many characters
TRIED = 10  # responses that a python function is tried on before anything runs

Right = Callable[[str, str], bool | float]


def metric_for(tasks_dir: Path, task: str, examples: Sequence[Example], named: str | None = None) -> Metric:
    """What scores `examples` of a task: the metric that was `named`, its task.json's, MeteoRA's of that task, or what
    fits the responses of its test split: composites and other splits of a task are scored as that is.

    Raises:
        InputError: there is no such metric, or it does not fit the responses; all that is wrong, one line each.
    """
    settings = read_settings(tasks_dir, task)
    file = tasks_dir / task / FILE
    where = f"--metric {task}={named}" if named is not None else f"{file}: metric"
    name = named if named is not None else settings.metric
    labels = settings.labels or (_responses(tasks_dir, task, examples) if name == "choice" else ())
    if name is not None:
        metric = named_metric(name, labels, where)
    elif settings.labels:
        metric = named_metric("choice", labels, where, f"as {FILE} has labels")
    elif task in METRICS:
        return meteora_metric(task)
    else:
        tested = (tasks_dir / task / "test.jsonl").is_file()
        usual = (load_split(tasks_dir, task, "test") if tested else []) or examples
        short = sum(len(plain(e.response)) <= SHORT for e in usual) >= MOST * len(usual)
        which = "most responses have" if short else "many responses have more than"
        because = f"as {which} {'at most ' if short else ''}{SHORT} characters"
        metric = named_metric("exact" if short else "rougeL", labels, where, because)
    problems = label_problems(tasks_dir, task, settings, examples) + unfit(metric, examples, where)
    if problems:
        raise InputError(problems)
    return metric


def named_metric(name: str, labels: Sequence[str], where: str, because: str = "") -> Metric:
    """The metric of that name; `where` begins the line of a refusal."""
    kind, colon, rest = name.partition(":")
    if kind in ("bleu", "rouge", "rougeL") and not colon:
        return Metric((kind,), None, name, because)
    simple: Mapping[str, Right] = {
        "exact": _exact, "contains": _contains, "number": _number, "choice": functools.partial(_choice, labels),
    }  # fmt: skip
    if kind in simple and not colon:
        right = simple[kind]
    elif kind == "regex" and rest:
        right = functools.partial(_found, _pattern(rest, where))
    elif kind == "python" and rest:
        right = functools.partial(_called, _function(rest, where), name)
    else:
        raise InputError(f"{where}: expected {NAMES}, found {name!r}")
    return Metric(("accuracy",), right, name, because)


def unfit(metric: Metric, examples: Sequence[Example], where: str) -> list[str]:
    """Why a metric cannot score answers to these examples."""
    problems = []
    if metric.name == "number":
        for e in examples:
            if final_number(plain(e.response)) is None:
                problems.append(f"{e.where}: response: expected a number for {where}, found {e.response!r:.60}")
    if metric.name.startswith("regex:"):
        pattern = re.compile(metric.name.partition(":")[2])
        for e in examples:
            if e.response.strip() and _first(pattern, e.response) == "":
                found = f"none in {e.response!r:.60}, where it matches no text"
                problems.append(f"{e.where}: response: expected text that the pattern finds for {where}, found {found}")
    if metric.name.startswith("python:") and metric.right is not None:
        for e in examples[:TRIED]:
            for answer in (e.response, ""):
                try:
                    metric.right(answer, e.response)
                except InputError as error:
                    return [f"{where}: {problem}" for problem in error.problems]
    return problems


def label_problems(tasks_dir: Path, task: str, settings: TaskSettings, examples: Sequence[Example]) -> list[str]:
    """Labels of a task.json that no response of train, test or `examples` is, and responses that are no label."""
    if not settings.labels:
        return []
    labels, where = {plain(label) for label in settings.labels}, tasks_dir / task / FILE
    known = {plain(response) for response in _responses(tasks_dir, task, examples)}
    problems = [
        f"{where}: labels: expected responses of {task}, found {label!r}, which none is"
        for label in settings.labels
        if plain(label) not in known
    ]
    return problems + [
        f"{e.where}: response: expected one of {FILE}'s labels, found {e.response!r:.60}"
        for e in examples
        if plain(e.response) not in labels
    ]


def _responses(tasks_dir: Path, task: str, examples: Sequence[Example]) -> tuple[str, ...]:
    """The different responses of `examples` and of the task's train and test examples."""
    splits = [split for split in ("train", "test") if (tasks_dir / task / f"{split}.jsonl").is_file()]
    loaded = [example for split in splits for example in load_split(tasks_dir, task, split)]
    return tuple(dict.fromkeys(plain(example.response) for example in [*examples, *loaded]))


# One answer


def _exact(answer: str, target: str) -> bool:
    return plain(answer) == plain(target)


def _contains(answer: str, target: str) -> bool:
    return metrics.contains(plain(answer), plain(target))


def _number(answer: str, target: str) -> bool:
    return metrics.same_final_number(plain(answer), plain(target))


def _choice(labels: Sequence[str], answer: str, target: str) -> bool:
    chosen = first_label(labels, answer)
    return chosen is not None and chosen == plain(target)


def first_label(labels: Sequence[str], answer: str) -> str | None:
    """The label that an answer says first, as whole words, the longest of those that begin there; None if it says none.
    A label of no text is what an answer of no text says.

    >>> first_label(["yes", "no", "not sure"], "Not sure, maybe yes.")
    'not sure'
    """
    text, found = plain(answer), []
    for label in map(plain, labels):
        if match := whole_words(label).search(text) if label else re.fullmatch("", text):
            found.append((match.start(), -len(label), label))
    return min(found)[2] if found else None


@functools.lru_cache(maxsize=10_000)  # labels may be all of a task's responses
def whole_words(text: str) -> re.Pattern[str]:
    """Where a text stands as words or numbers of its own: not inside others, as d in "I'd", 1 in "-1", 2 in "2.5"."""
    before = r"(?<!\w)(?<!\w['’])"
    if text[:1].isdigit():
        before += r"(?<!\d[.,])(?<!(?<![\w.)])[-−])"
    after = r"(?!\w)" + (r"(?![.,]\d)" if text[-1:].isdigit() else "")
    return re.compile(before + re.escape(text) + after)


def _found(pattern: re.Pattern[str], answer: str, target: str) -> bool:
    """Whether the pattern finds in the answer what it finds in the target; a target without it is meant whole."""
    said, wanted = _first(pattern, answer), _first(pattern, target)
    return said is not None and plain(said) == plain(target if wanted is None else wanted)


def _first(pattern: re.Pattern[str], text: str) -> str | None:
    """The first match's first group, or all of it where there is no group."""
    match = pattern.search(text)
    if match is None:
        return None
    return match[1] if pattern.groups and match[1] is not None else match[0]


def _called(function: Callable[[str, str], object], name: str, answer: str, target: str) -> float:
    try:
        found = function(answer, target)
    except Exception as e:  # a user's function may raise anything
        said = f"its refusal ({type(e).__name__}: {e})"
    else:
        if isinstance(found, int | float | np.bool_ | np.number) and 0 <= found <= 1:
            return float(found)
        said = f"{found!r:.60}"
    raise InputError(f"{name}: expected a number from 0 to 1 for the answer {answer!r:.60}, found {said}")


def _pattern(text: str, where: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as e:
        raise InputError(f"{where}: expected a regular expression, found one that does not compile ({e})") from None


def _function(path: str, where: str) -> Callable[[str, str], object]:
    """A function by its module's name, looked for in the working folder, too."""
    module, dot, name = path.rpartition(".")
    if not dot:
        raise InputError(f"{where}: expected python:MODULE.FUNCTION, found {path!r}")
    folder = os.getcwd()
    sys.path.insert(0, folder)
    try:
        found = getattr(importlib.import_module(module), name, None)
    except Exception as e:  # a user's module may raise anything
        raise InputError(f"{where}: expected a module {module}, found none that imports ({e})") from None
    finally:
        sys.path.remove(folder)
    if not callable(found):
        raise InputError(f"{where}: expected a function {name} in {module}, found {found!r:.60}")
    return found
