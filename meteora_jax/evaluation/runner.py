"""Evaluation of systems on problems: all at once, recorded as they end, resumable after a kill.

OUT/run.json says what is being run, OUT/records.jsonl holds a line a problem and system, appended as answers
end; whatever stands there is not done again.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from meteora_jax.config import InputError, read_json
from meteora_jax.evaluation.problems import Problem
from meteora_jax.evaluation.table import score_row
from meteora_jax.io.files import write_json, writing
from meteora_jax.prompts import Message

RUN, RECORDS = "run.json", "records.jsonl"

KEPT = 16  # answers that are written at a time: so many can be lost with the process

# (system, problem) pairs -> (place, at least {"answer": text}) of each as it ends; what else is there is recorded too
Answer = Callable[[Sequence[tuple[str, Problem]]], Iterable[tuple[int, dict[str, Any]]]]


class Records:
    """The append-only file of a run: what is done, and the place for more."""

    def __init__(self, out: Path, settings: Mapping[str, Any]):
        """Opens or resumes a run; the entries of a setting that is a mapping may become more, from none on.

        Raises:
            InputError: `out` holds a run of other settings.
        """
        out.mkdir(parents=True, exist_ok=True)
        self.path = out / RECORDS
        settings = _settings(out / RUN, settings)
        write_json(out / RUN, settings)
        self.done: dict[tuple[str, str], dict[str, Any]] = {}
        if self.path.exists():
            self._read()

    def _read(self) -> None:
        """Reads what is whole; a kill can leave half a line at the end, which is cut off."""
        data, whole = self.path.read_bytes(), 0
        for line in data.splitlines(keepends=True):
            try:
                record = json.loads(line)
                texts = [record[key] for key in ("system", "id", "prompt", "response", "answer")]
                if not all(isinstance(text, str) for text in texts):
                    raise TypeError
            except (ValueError, KeyError, TypeError):
                if whole + len(line) < len(data):
                    raise InputError(f"{self.path}: expected a record a line, found {line[:60]!r}") from None
                break
            if not line.endswith(b"\n"):
                break
            self.done[record["system"], record["id"]] = record
            whole += len(line)
        if whole < len(data):
            os.truncate(self.path, whole)

    @property
    def answers(self) -> dict[tuple[str, str], str]:
        """What was said, by system and problem id."""
        return {key: record["answer"] for key, record in self.done.items()}

    def add(self, records: Sequence[dict[str, Any]]) -> None:
        """Appends records and waits until they are on disk."""
        with writing(self.path), open(self.path, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(r, ensure_ascii=False) + "\n" for r in records)
            file.flush()
            os.fsync(file.fileno())
        self.done |= {(r["system"], r["id"]): r for r in records}


def _settings(file: Path, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """The settings to write: those wanted, and what an earlier part of the run had beside them."""
    found = read_json(file) if file.exists() else {}
    if not isinstance(found, dict):
        raise InputError(f"{file}: expected a run's settings, found {type(found).__name__}")
    merged, wrong = dict(wanted), []
    for key in found:
        old, new = found[key], wanted.get(key)
        if isinstance(old, dict) and isinstance(new, Mapping):
            merged[key] = {**old, **new}
            wrong += [(f"{key}: {k}", new[k], old[k]) for k in old if k in new and old[k] != new[k]]
        elif old != new:
            wrong.append((key, new, old))
    if found:
        more = {key: value for key, value in wanted.items() if key not in found and not isinstance(value, Mapping)}
        wrong += [(key, value, None) for key, value in more.items() if value]
    if wrong:
        raise InputError([f"{file}: {key}: expected {new!r} to resume, found {old!r}" for key, new, old in wrong])
    return merged


def run(
    problems: Sequence[Problem],
    systems: Mapping[str, Answer],
    records: Records | None,
    progress: Callable[[int, int, str], None],
    skipped: Collection[tuple[str, str]] = (),
    agree: Callable[[list[Any]], list[Any]] = list,
) -> None:
    """Answers every problem by every system, except those that `records` already has.

    A system is asked all that is left at once, and so are systems that have one `Answer`; answers are recorded as they
    end, KEPT at a time. Problems with `earlier` turns follow in rounds, those with one first, each with what its own
    system said to them. Over several hosts each calls this with the same problems and systems; the first host has the
    records, the others None.

    Args:
        problems: with all their earlier ones (`with_earlier`). progress: called with (done, all, system).
        skipped: (system, row) not to be asked.
        agree: which problems are to be answered, and what was said to earlier ones -> what the first host says of it.

    Raises:
        InputError: a record's problem is no longer the task file's.
    """
    asked = {s: [p for p in problems if (s, p.task) not in skipped] for s in systems}
    done = records.done if records else {}
    for system, p in ((s, p) for s, own in asked.items() for p in own if (s, p.id) in done):
        kept = done[system, p.id]
        same = (kept["prompt"], kept["response"], kept.get("messages", [])) == (p.prompt, p.response, list(p.messages))
        if records and not same:
            where = f"{records.path}: {system}, {p.id}"
            raise InputError(f"{where}: expected the problem of the task's file, found another one")
    every = [(system, p) for system, own in asked.items() for p in own]
    wanted = agree([(system, p.id) not in done for system, p in every])
    count = len(every) - sum(wanted)
    pairs = [pair for pair, want in zip(every, wanted, strict=True) if want]
    for answer, turn in itertools.product(dict.fromkeys(systems.values()), sorted({len(p.earlier) for _, p in pairs})):
        left = [(s, p) for s, p in pairs if systems[s] is answer and len(p.earlier) == turn]
        if not left:
            continue
        # the longest first: none is waited for at the end
        left.sort(key=lambda pair: (len(pair[1].prompt), pair[1].id), reverse=True)
        asking = left
        if turn:
            said_before = agree([[done[s, e.id]["answer"] for e in p.earlier] for s, p in left] if records else [])
            asking = [(s, p.after(answers)) for (s, p), answers in zip(left, said_before, strict=True)]
        ended: list[dict[str, Any]] = []
        for place, said in answer(asking):
            count += 1
            system, problem = left[place]
            if records:
                ended.append(_record(system, problem, said, asking[place][1].messages))
                if len(ended) == KEPT:
                    records.add(ended)
                    ended = []
            progress(count, len(every), system)
        if records and ended:
            records.add(ended)


def _record(system: str, problem: Problem, said: Mapping[str, Any], asked: Sequence[Message]) -> dict[str, Any]:
    """A line of the file: the problem, what was `asked` if answers of the system's own stood in it, what was said, a
    composite's answers one by one, and the scores, none where a user's metric refuses the answer: what was said is
    kept, and the table says what is wrong."""
    known: dict[str, Any] = {"system": system, "id": problem.id, "task": problem.task}
    known |= {"prompt": problem.prompt, "response": problem.response}
    if problem.messages:
        known["messages"] = problem.messages
    if problem.asks:
        known |= {"asks": problem.asks, "turn": problem.turn}
    if problem.earlier:
        known["asked"] = asked
    known |= said
    if names := [metric.name for metric in problem.metrics if metric.name]:
        known["metric"] = ", ".join(names)
    if problem.tasks:
        known |= {"tasks": problem.tasks, "answers": problem.answers_in(said["answer"])}
    try:
        scores = score_row([problem], [said["answer"]])
    except InputError:
        return {**known, "scores": {}}
    del scores["problems"]
    return {**known, "scores": scores}
