"""Evaluation of systems on problems: batched by length, recorded one by one, resumable after a kill.

OUT/run.json says what is being run, OUT/records.jsonl holds a line a problem and system, appended as batches
end; whatever stands there is not done again.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from meteora_jax.config import InputError, read_json
from meteora_jax.evaluation.metrics import METRICS, score
from meteora_jax.evaluation.tasks import load_split

RUN, RECORDS = "run.json", "records.jsonl"

# problems -> for each at least {"answer": text}; what else is there is recorded too
Answer = Callable[[Sequence["Problem"]], list[dict[str, Any]]]


@dataclass(frozen=True)
class Problem:
    """One problem; `id` is its task, split and line (from 0) in the task's file."""

    id: str
    task: str
    prompt: str
    response: str


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
        order = sorted(range(len(examples)), key=lambda i: hashlib.sha256(examples[i].prompt.encode()).digest())
        for i in sorted(order[:limit]):
            problems.append(Problem(f"{task}/{split}/{i}", task, examples[i].prompt, examples[i].response))
    return problems


class Records:
    """The append-only file of a run: what is done, and the place for more."""

    def __init__(self, out: Path, settings: Mapping[str, Any]):
        """Opens or resumes a run.

        Raises:
            InputError: `out` holds a run of other settings.
        """
        out.mkdir(parents=True, exist_ok=True)
        self.path = out / RECORDS
        if (out / RUN).exists():
            found = read_json(out / RUN)
            wrong = [k for k in {**settings, **found} if found.get(k) != settings.get(k)]
            if wrong:
                raise InputError(
                    [f"{out / RUN}: {k}: expected {settings.get(k)!r} to resume, found {found.get(k)!r}" for k in wrong]
                )
        else:
            partial = out / f".{RUN}"
            partial.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
            os.replace(partial, out / RUN)
        self.done: dict[tuple[str, str], dict[str, Any]] = {}
        if self.path.exists():
            self._read()

    def _read(self) -> None:
        """Reads what is whole; a kill can leave half a line at the end, which is cut off."""
        data, whole = self.path.read_bytes(), 0
        for line in data.splitlines(keepends=True):
            try:
                record = json.loads(line)
                key = record["system"], record["id"]
            except (ValueError, KeyError, TypeError):
                if whole + len(line) < len(data):
                    raise InputError(f"{self.path}: expected a record a line, found {line[:60]!r}") from None
                break
            if not line.endswith(b"\n"):
                break
            self.done[key] = record
            whole += len(line)
        if whole < len(data):
            os.truncate(self.path, whole)

    def add(self, records: Sequence[dict[str, Any]]) -> None:
        """Appends records and waits until they are on disk."""
        with open(self.path, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(r, ensure_ascii=False) + "\n" for r in records)
            file.flush()
            os.fsync(file.fileno())
        self.done |= {(r["system"], r["id"]): r for r in records}


def run(
    problems: Sequence[Problem],
    systems: Mapping[str, Answer],
    records: Records,
    batch_size: int,
    progress: Callable[[int, int, str], None],
) -> None:
    """Answers every problem by every system, except those that `records` already has.

    Problems of like length share a batch; `progress` is called with (done, all, system). A record whose problem
    is no longer the task file's is an InputError.
    """
    for p, s in ((p, s) for p in problems for s in systems if (s, p.id) in records.done):
        kept = records.done[s, p.id]
        if (kept["prompt"], kept["response"]) != (p.prompt, p.response):
            raise InputError(f"{records.path}: {s}, {p.id}: expected the problem of the task's file, found another one")
    total = len(problems) * len(systems)
    count = sum((s, p.id) in records.done for s in systems for p in problems)
    ordered = sorted(problems, key=lambda p: (len(p.prompt), p.id))
    for system, answer in systems.items():
        left = [p for p in ordered if (system, p.id) not in records.done]
        for start in range(0, len(left), batch_size):
            part = left[start : start + batch_size]
            answered = zip(part, answer(part), strict=True)
            records.add([{"system": system, **asdict(p), **said} for p, said in answered])
            count += len(part)
            progress(count, total, system)


def tabulate(problems: Sequence[Problem], systems: Sequence[str], records: Records) -> dict[str, Any]:
    """{"tasks": {task: {system: {metric: value}}}, "mean accuracy": {system: over the tasks that have one}}."""
    tasks: dict[str, list[Problem]] = {}
    for p in problems:
        tasks.setdefault(p.task, []).append(p)
    table: dict[str, dict[str, dict[str, float]]] = {}
    for task, own in tasks.items():
        targets = [p.response for p in own]
        answers = {s: [records.done[s, p.id]["answer"] for p in own] for s in systems}
        table[task] = {s: {**score(task, answers[s], targets), "problems": len(own)} for s in systems}
    shares = {s: [row[s]["accuracy"] for row in table.values() if "accuracy" in row[s]] for s in systems}
    return {"tasks": table, "mean accuracy": {s: sum(v) / len(v) for s, v in shares.items() if v}}


def markdown(table: Mapping[str, Any], systems: Sequence[str]) -> str:
    """The table with each task's first metric, in percent where it is a share."""

    def cell(values: Mapping[str, float]) -> str:
        name, value = next(iter(values.items()))
        return f"{100 * value:.1f}" if name == "accuracy" else f"{value:.1f} {name}"

    lines = ["| task | problems | " + " | ".join(systems) + " |", "| --- " * (len(systems) + 2) + "|"]
    for task, row in table["tasks"].items():
        count = row[systems[0]]["problems"]
        lines.append(f"| {task} | {count} | " + " | ".join(cell(row[s]) for s in systems) + " |")
    if means := table["mean accuracy"]:
        lines.append("| mean accuracy | | " + " | ".join(f"{100 * means[s]:.1f}" for s in systems) + " |")
    return "\n".join(lines) + "\n"
