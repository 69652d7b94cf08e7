"""What a task says of itself: `TASKS/<task>/task.json`, whose keys are metric, labels and max_new_tokens."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

from meteora_jax.config import InputError, read_json

FILE = "task.json"


@dataclass(frozen=True)
class TaskSettings:
    """A task's metric, by its name; the labels that its responses are, if they are labels; the longest answer."""

    metric: str | None = None
    labels: tuple[str, ...] = ()
    max_new_tokens: int | None = None


def read_settings(tasks_dir: Path, task: str) -> TaskSettings:
    """The settings of a task; a task without the file has none.

    Raises:
        InputError: all that is wrong with the file.
    """
    path = tasks_dir / task / FILE
    if not path.exists():
        return TaskSettings()
    found = read_json(path)
    if not isinstance(found, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(found).__name__}")
    known = [field.name for field in fields(TaskSettings)]
    problems = [f"{path}: {key}: expected one of {', '.join(known)}, found another key" for key in found.keys() - known]
    metric, labels, tokens = (found.get(key) for key in known)
    if not isinstance(metric, str | None):
        problems.append(f"{path}: metric: expected a metric's name, found {metric!r:.60}")
    if labels is not None and (
        not isinstance(labels, list) or not labels or not all(isinstance(x, str) and x.strip() for x in labels)
    ):
        problems.append(f"{path}: labels: expected a list of texts, found {labels!r:.60}")
    elif labels and len({label.strip().lower() for label in labels}) < len(labels):
        problems.append(f"{path}: labels: expected each once, whatever its case, found {labels!r:.60}")
    if tokens is not None and (not isinstance(tokens, int) or isinstance(tokens, bool) or tokens < 1):
        problems.append(f"{path}: max_new_tokens: expected a whole number from 1 on, found {tokens!r:.60}")
    if problems:
        raise InputError(sorted(problems))
    return TaskSettings(metric, tuple(labels or ()), tokens)
