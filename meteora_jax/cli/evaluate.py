"""`meteora evaluate`: systems on tasks, a record a problem, a table and pictures."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.markdown import Markdown

from meteora_jax.cli.report import console, default_dtype, progress_bar, status, write_json
from meteora_jax.config import InputError


@dataclass(frozen=True)
class Evaluate:
    """Score systems on tasks; a run that was killed goes on where it was."""

    base: Path
    """BASE folder."""
    tasks: Path
    """TASKS folder: TASKS/<task>/<split>.jsonl."""
    out: Path
    """Folder of the run: records.jsonl, table.md, table.json, bars.png, radar.png."""
    bank: Path | None = None
    """BANK folder."""
    gates: Path | None = None
    """GATES folder."""
    systems: str = "base,oracle,gates-top1,gates-top2"
    """Separated by commas: base, oracle (the adapter named like the task), gates-topK, or an adapter's name."""
    only: str | None = None
    """Tasks, separated by commas; by default one for every adapter of the bank."""
    split: Literal["train", "test", "holdout"] = "test"
    """Holdout is scored once, for a release."""
    limit: int | None = None
    """At most so many problems a task, chosen by their hash."""
    max_new_tokens: int = 64
    """Longest answer."""
    batch_size: int = 16
    """Problems a batch."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Of weights and activations: bfloat16 on an accelerator, float32 on a CPU unless given."""
    json: Path | None = None
    """Write the table here too."""


def system_router(name: str, model: Any) -> Callable[[str], Any]:
    """A system's name -> the router of a problem, from its task.

    Raises:
        InputError: no such system for this model.
    """
    from meteora_jax.routing.fixed import Fixed
    from meteora_jax.routing.gates import Gates

    if name == "base":
        return lambda task: None
    if name == "oracle":
        return lambda task: Fixed(task)
    if top := re.fullmatch(r"gates-top(\d+)", name):
        if model.gates is None:
            raise InputError(f"--systems: {name}: expected --gates, found none")
        gates = Gates(int(top[1]), model.gates.temperature)
        return lambda task: gates
    if name in model.adapter_names:
        return lambda task: Fixed(name)
    known = ", ".join(("base", "oracle", "gates-topK", *model.adapter_names))
    raise InputError(f"--systems: expected some of {known}, found {name!r}")


def answering(model: Any, router: Callable[[str], Any], max_new_tokens: int) -> Callable[[Sequence[Any]], list[dict]]:
    """A system as the runner calls it."""
    from meteora_jax.viz import adapter_share

    def answer(problems: Sequence[Any]) -> list[dict[str, Any]]:
        routers = [router(p.task) for p in problems]
        completions = model.generate([p.prompt for p in problems], routers, max_new_tokens=max_new_tokens)
        said = []
        for c in completions:
            record: dict[str, Any] = {"answer": c.text, "tokens": len(c.token_ids), "finish_reason": c.finish_reason}
            if c.routing is not None:
                shares = np.sum(adapter_share(c.routing), axis=0)
                shares /= max(float(shares.sum()), 1e-9)  # the last token may have no routing
                shown = zip(c.routing.adapter_names, shares.tolist(), strict=True)
                record["routing"] = {n: round(s, 4) for n, s in shown if s >= 5e-5}
            said.append(record)
        return said

    return answer


def fingerprint(folder: Path | None) -> str | None:
    """SHA-256 of a folder's weights: a run resumed with others would mix two models' answers."""
    from converters.folders import sha256
    from meteora_jax.checkpoint import WEIGHTS

    return None if folder is None else sha256(folder / WEIGHTS)


def evaluate(command: Evaluate) -> None:
    """Runs `meteora evaluate`."""
    from meteora_jax.evaluation import charts, runner
    from meteora_jax.model import load

    dtype = default_dtype(command.dtype)
    with status.status("loading"):
        model = load(command.base, command.bank, command.gates, dtype=dtype)
    systems = [s for s in command.systems.split(",") if s]
    tasks = [t for t in command.only.split(",") if t] if command.only else list(model.adapter_names)
    if not systems or not tasks:
        raise InputError("--systems, --only: expected at least one system and one task, found none")
    if "oracle" in systems and (alone := [t for t in tasks if t not in model.adapter_names]):
        raise InputError(f"--systems: oracle: expected an adapter for every task, found none for {', '.join(alone)}")
    answers = {s: answering(model, system_router(s, model), command.max_new_tokens) for s in systems}
    problems = runner.load_problems(command.tasks, tasks, command.split, command.limit)
    settings = {
        "base": fingerprint(command.base), "bank": fingerprint(command.bank), "gates": fingerprint(command.gates),
        "split": command.split, "max_new_tokens": command.max_new_tokens, "dtype": dtype,
    }  # fmt: skip
    records = runner.Records(command.out, settings)
    with progress_bar("evaluate") as progress:
        runner.run(problems, answers, records, command.batch_size, progress)
    table = runner.tabulate(problems, systems, records)
    text = runner.markdown(table, systems)
    (command.out / "table.md").write_text(text, encoding="utf-8")
    write_json(command.out / "table.json", table)
    write_json(command.json, table)
    charts.write_bars(table, systems, command.out / "bars.png")
    charts.write_radar(table, systems, command.out / "radar.png")
    console.print(Markdown(text))
