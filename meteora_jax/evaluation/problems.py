"""What is asked: single tasks' problems, composite ones, and LoraRetriever's queries, all as `Problem`s."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from meteora_jax.config import InputError, read_json
from meteora_jax.evaluation.composite import read_composites
from meteora_jax.evaluation.metrics import Metric, meteora_metric
from meteora_jax.evaluation.named_metrics import metric_for
from meteora_jax.evaluation.tasks import load_splits
from meteora_jax.evaluation.tasks.settings import read_settings
from meteora_jax.evaluation.wordings import Wording, read_answers, stops
from meteora_jax.examples import ANSWERS, Example
from meteora_jax.prompts import Message, last_text
from meteora_jax.text import check_text

LORARETRIEVER_METRICS = ("em", "bleu", "rouge")


@dataclass(frozen=True)
class Problem:
    """One problem of the table's row `task`; `id` is its row, split and line (from 0) in its file.

    A composite problem also has its sub-questions' `tasks` and right `answers`; a query of LoraRetriever's
    has the `metric` that its file names, and the `cluster` of tasks to which its own belongs. `messages` are the prompt
    where it is a conversation; `prompt` is what the user says in it then. `metrics` score the answers, one a part;
    MeteoRA's own if there are none. `max_new_tokens` is the task's own longest response, if it has one.
    A turn of a conversation `asks` of one task, while `task` is the row of all turns; `turn` counts from 1. A composite
    that is not `numbered` asks in one sentence: each answer is looked for in all that was said; one that is may have
    another `wording` than MeteoRA's.
    `earlier` are the turns before one, in order, where what a system said to them takes the place of the right answers
    that `messages` have: such a turn is asked after them.
    """

    id: str
    task: str
    prompt: str
    response: str
    tasks: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()
    metric: str | None = None
    cluster: str = ""
    messages: tuple[Message, ...] = field(default=(), hash=False)
    metrics: tuple[Metric, ...] = ()
    max_new_tokens: int | None = None
    asks: str = ""
    turn: int = 0
    numbered: bool = True
    wording: Wording = "numbered"
    earlier: tuple[Problem, ...] = field(default=(), hash=False, repr=False)

    def after(self, answers: Sequence[str]) -> Problem:
        """The turn as a system is asked that gave these answers to the `earlier` ones."""
        messages = list(self.messages)
        for turn, answer in zip(self.earlier, answers, strict=True):
            messages[len(turn.messages)] = {"role": ANSWERS, "content": answer}  # behind the turn's own question
        return replace(self, messages=tuple(messages))

    @property
    def asked(self) -> str | list[Message]:
        """The prompt as a model takes it: text or messages."""
        return list(self.messages) or self.prompt

    @property
    def request(self) -> str:
        """What a retrieval reads of it: the text, or what the user says last."""
        return last_text(self.prompt, self.messages)

    @property
    def scored_by(self) -> tuple[Metric, ...]:
        """What scores the answers, one a part."""
        return self.metrics or tuple(map(meteora_metric, self.own_tasks))

    def new_tokens(self, default: int) -> int:
        """Tokens that a response may have, where an answer has `default` unless its task says otherwise."""
        return self.parts * default if self.max_new_tokens is None else self.max_new_tokens

    @property
    def own_tasks(self) -> tuple[str, ...]:
        """The tasks that it asks of: several in a composite problem."""
        return self.tasks or (self.asks or self.task,)

    @property
    def parts(self) -> int:
        """The number of answers: n of a composite-n problem, else 1."""
        return len(self.tasks) or 1

    @property
    def stop(self) -> tuple[str, ...]:
        """Strings that end a response: an answer n + 1 that nobody asked for."""
        return stops(self.parts, self.wording) if self.tasks and self.numbered else ()

    def answers_in(self, text: str) -> list[str]:
        """What was said to each part of a composite problem."""
        return read_answers(text, self.parts, self.wording) if self.numbered else [text] * self.parts


def with_earlier(problems: Sequence[Problem]) -> list[Problem]:
    """The problems, and before each the earlier turns that it needs and that are not among them."""
    return list({p.id: p for last in problems for p in (*last.earlier, last)}.values())


def load_problems(
    tasks_dir: Path, tasks: Sequence[str], split: str, limit: int | None, named: Mapping[str, str] | None = None
) -> list[Problem]:
    """Every task's problems in file order; with `limit`, so many a task, chosen by their hash, not by place.

    `named` are metrics by task, where others are wanted than `metric_for` chooses.

    Raises:
        InputError: a file that is missing, empty or malformed, a metric that is none or does not fit; all of them.
    """
    wrong: list[str] = []
    problems: list[Problem] = []
    for task, examples in load_splits(tasks_dir, tasks, split).items():
        try:
            settings = read_settings(tasks_dir, task)
            metric = metric_for(tasks_dir, task, examples, (named or {}).get(task))
        except InputError as error:
            wrong += error.problems
            continue
        own = [
            Problem(
                f"{task}/{split}/{i}", task, e.prompt, e.response, messages=e.messages, metrics=(metric,),
                max_new_tokens=settings.max_new_tokens,
            )
            for i, e in enumerate(examples)
        ]  # fmt: skip
        problems += limited(own, limit)
    if wrong:
        raise InputError(wrong)
    return problems


def load_composites(
    path: Path,
    row: str,
    limit: int | None,
    tasks_dir: Path,
    named: Mapping[str, str] | None = None,
    new_tokens: int | None = None,
) -> list[Problem]:
    """The composite problems of a file, for the table's row of that name; see `read_composites`.

    Their sub-questions are scored as `load_problems` scores their tasks. `new_tokens` has an answer to a task that does
    not say how many it takes.
    """
    composites = read_composites(path)
    tasks = composites[0].tasks
    wrong: list[str] = []
    metrics: list[Metric] = []
    for task, answers in zip(tasks, zip(*(c.answers for c in composites), strict=True), strict=True):
        examples = [Example("", answer, where=f"{path}:{i}") for i, answer in enumerate(answers, start=1)]
        try:
            metrics.append(metric_for(tasks_dir, task, examples, (named or {}).get(task)))
        except InputError as error:
            wrong += error.problems
    if wrong:
        raise InputError(wrong)
    tokens = None if new_tokens is None else longest_response(tasks_dir, tasks, new_tokens)
    own = [
        Problem(
            f"{row}/{path.stem}/{i}", row, c.prompt, c.response, c.tasks, c.answers, metrics=tuple(metrics),
            max_new_tokens=tokens, wording=c.wording,
        )
        for i, c in enumerate(composites)
    ]  # fmt: skip
    return limited(own, limit)


def longest_response(tasks_dir: Path, tasks: Sequence[str], new_tokens: int) -> int:
    """Tokens of a response to a question of each task, where an answer has `new_tokens` unless its task says so."""
    return sum(read_settings(tasks_dir, task).max_new_tokens or new_tokens for task in tasks)


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
        if not query["task"]:  # "" is the row of all tasks' mean
            raise InputError(f"{path}: {i}: task: expected a name, found none")
        cluster = "" if query.get("domain") is None else query["domain"]
        if not isinstance(cluster, str):
            raise InputError(f"{path}: {i}: domain: expected a text, found {cluster!r:.60}")
        for key in ("task", "inputs", "targets", "domain"):
            check_text(query.get(key) or "", f"{path}: {i}: {key}")
        task, prompt, response, metric = map(str, found)
        row = rows.setdefault(task, [])
        expected = [row[0].metric] if row else LORARETRIEVER_METRICS
        if metric not in expected:
            raise InputError(f"{path}: {i}: metric: expected {' or '.join(map(str, expected))}, found {metric!r}")
        row.append(Problem(f"{task}/{path.stem}/{i}", task, prompt, response, metric=metric, cluster=cluster))
    return [p for row in rows.values() for p in limited(row, limit)]


def limited(problems: Sequence[Problem], limit: int | None) -> list[Problem]:
    """At most `limit` problems of a row, chosen by the hashes of their prompts."""
    return [problems[i] for i in choose([p.prompt for p in problems], limit)]


def choose(texts: Sequence[str], limit: int | None) -> list[int]:
    """The places of at most `limit` texts, those of the smallest hashes: a larger limit keeps a smaller one's."""
    order = sorted(range(len(texts)), key=lambda i: hashlib.sha256(texts[i].encode()).digest())
    return sorted(order[:limit])
