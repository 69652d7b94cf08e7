"""What is asked: single tasks' problems, composite ones, and LoraRetriever's queries, all as `Problem`s."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from meteora_jax.config import InputError, read_json
from meteora_jax.evaluation.composite import read_composites
from meteora_jax.evaluation.metrics import METRICS
from meteora_jax.evaluation.tasks import load_split
from meteora_jax.text import check_text

LORARETRIEVER_METRICS = ("em", "bleu", "rouge")


@dataclass(frozen=True)
class Problem:
    """One problem of the table's row `task`; `id` is its row, split and line (from 0) in its file.

    A composite problem also has its sub-questions' `tasks` and right `answers`; a query of LoraRetriever's
    has the `metric` that its file names, and the `cluster` of tasks to which its own belongs.
    """

    id: str
    task: str
    prompt: str
    response: str
    tasks: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()
    metric: str | None = None
    cluster: str = ""

    @property
    def own_tasks(self) -> tuple[str, ...]:
        """The tasks that it asks of: several in a composite problem."""
        return self.tasks or (self.task,)

    @property
    def parts(self) -> int:
        """The number of answers: n of a composite-n problem, else 1."""
        return len(self.tasks) or 1

    @property
    def stop(self) -> tuple[str, ...]:
        """Strings that end a response: an answer n + 1 that nobody asked for."""
        return (f"\n{self.parts + 1}.",) if self.tasks else ()


def load_problems(tasks_dir: Path, tasks: Sequence[str], split: str, limit: int | None) -> list[Problem]:
    """Every task's problems in file order; with `limit`, so many a task, chosen by their hash, not by place.

    Raises:
        InputError: a task without metrics, a file that is missing, empty or malformed.
    """
    problems = []
    if unknown := [t for t in tasks if t not in METRICS]:
        raise InputError(f"tasks: expected tasks with metrics, found {', '.join(unknown)}")
    for task in tasks:
        examples = load_split(tasks_dir, task, split)
        if not examples:
            raise InputError(f"{tasks_dir / task / f'{split}.jsonl'}: expected problems, found none")
        own = [Problem(f"{task}/{split}/{i}", task, e.prompt, e.response) for i, e in enumerate(examples)]
        problems += _limited(own, limit)
    return problems


def load_composites(path: Path, row: str, limit: int | None) -> list[Problem]:
    """The composite problems of a file, for the table's row of that name; see `read_composites`."""
    return _limited(
        [
            Problem(f"{row}/{path.stem}/{i}", row, c.prompt, c.response, c.tasks, c.answers)
            for i, c in enumerate(read_composites(path))
        ],
        limit,
    )


def load_queries(path: Path, limit: int | None) -> list[Problem]:
    """LoraRetriever's queries, a JSON list of {"inputs", "targets", "task", "metric"}, by task; `limit` is a task's.

    "domain", where an entry has one, is the cluster of its task.

    Raises:
        InputError: an entry lacks a text, names another metric than em, bleu and rouge, or two of one task differ.
    """
    queries = read_json(path)
    if not isinstance(queries, list) or not queries:
        raise InputError(f"{path}: expected a list of queries, found {type(queries).__name__}")
    rows: dict[str, list[Problem]] = {}
    for i, query in enumerate(queries):
        found = [query.get(k) if isinstance(query, dict) else None for k in ("task", "inputs", "targets", "metric")]
        if not all(isinstance(text, str) for text in found):
            raise InputError(f"{path}: {i}: expected texts task, inputs, targets and metric, found {str(query)[:60]!r}")
        for key in ("task", "inputs", "targets", "domain"):
            check_text(str(query.get(key, "")), f"{path}: {i}: {key}")
        task, prompt, response, metric = map(str, found)
        row = rows.setdefault(task, [])
        expected = [row[0].metric] if row else LORARETRIEVER_METRICS
        if metric not in expected:
            raise InputError(f"{path}: {i}: metric: expected {' or '.join(map(str, expected))}, found {metric!r}")
        cluster = str(query.get("domain", ""))
        row.append(Problem(f"{task}/{path.stem}/{i}", task, prompt, response, metric=metric, cluster=cluster))
    return [p for row in rows.values() for p in _limited(row, limit)]


def _limited(problems: Sequence[Problem], limit: int | None) -> list[Problem]:
    return [problems[i] for i in choose([p.prompt for p in problems], limit)]


def choose(texts: Sequence[str], limit: int | None) -> list[int]:
    """The places of at most `limit` texts, those of the smallest hashes: a larger limit keeps a smaller one's."""
    order = sorted(range(len(texts)), key=lambda i: hashlib.sha256(texts[i].encode()).digest())
    return sorted(order[:limit])
