"""`meteora compose`: composite problems, written below TASKS for `meteora evaluate --composite`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from rich.text import Text

from meteora_jax.cli.report import check_counts, console, status, write_json
from meteora_jax.config import InputError, LlamaConfig, read_json
from meteora_jax.evaluation.composite import (
    COMPOSITES,
    COUNT,
    SEED,
    SHOTS,
    generate_composites,
    longest_prompt,
    read_composites,
    tasks_of,
)
from meteora_jax.evaluation.problems import longest_response
from meteora_jax.evaluation.wordings import Wording
from meteora_jax.io import hf_config
from meteora_jax.text import load_tokenizer


@dataclass(frozen=True)
class Compose:
    """Write composite problems: a question of each of n tasks, from their test split, in one prompt.

    They go to TASKS/composite_N.../test.jsonl, whose folder's name says what is not as usual; `meteora evaluate
    --composite` takes that name. A file that holds these very problems is left as it is, another one refused.
    """

    tasks: tyro.conf.Positional[Path]
    """TASKS folder: TASKS/<task>/<split>.jsonl."""
    composites: tyro.conf.Positional[tuple[str, ...]] = tuple(map(str, COMPOSITES))
    """3, 5, 10 for MeteoRA's, or tasks joined by +."""
    shots: int = SHOTS
    """Worked examples in a prompt, drawn from train; 0 is zero-shot."""
    seed: int = SEED
    """Of what is drawn."""
    count: int = COUNT
    """Problems of each composite."""
    base: Path | None = None
    """BASE folder: prompts leave room for the response in its context, any length without; its chat template makes the
    prompts of tasks that are conversations."""
    max_new_tokens: int = 64
    """Longest answer to a question, as evaluate's: a response to n questions has room for n times as many tokens."""
    wording: Wording = "numbered"
    """numbered: MeteoRA's layout; others that ask the same: lettered answers, or reversed ones, last question first."""
    out: Path | None = None
    """A .jsonl file to write instead, of one composite."""
    json: Path | None = None
    """Write what was drawn here too."""


def compose(command: Compose) -> None:
    """Runs `meteora compose`."""
    check_counts(count=command.count, max_new_tokens=command.max_new_tokens)
    named = {what: tasks_of(what) for what in command.composites}
    if wrong := [what for what, tasks in named.items() if len(tasks) < 2]:
        sizes = ", ".join(map(str, COMPOSITES))
        raise InputError(f"composites: expected {sizes} or tasks joined by +, found {wrong[0]!r}")
    if command.out is not None and len(named) != 1:
        raise InputError(f"--out: expected one composite, found {len(named)}: {', '.join(named)}")
    tokenizer, count, config = (None, None, None) if command.base is None else read_base(command.base)
    records = []
    for what, tasks in named.items():
        limit = (
            None
            if config is None
            else longest_prompt(config, longest_response(command.tasks, tasks, command.max_new_tokens))
        )
        with status.status(Text(f"drawing {what}")):
            path = generate_composites(
                command.tasks, tasks, seed=command.seed, count=command.count, shots=command.shots, dest=command.out,
                max_tokens=limit, count_tokens=None if limit is None else count,
                tokenizer=tokenizer, wording=command.wording,
            )  # fmt: skip
            prompts = [problem.prompt for problem in read_composites(path)]
        longest = None if count is None else max(map(count, prompts))
        records.append({"file": str(path), "tasks": tasks, "problems": len(prompts), "longest_prompt": longest})
        size = "" if longest is None else f", the longest prompt of {longest} tokens"
        console.print(f"{path}: {len(prompts)} problems of {len(tasks)} tasks{size}", highlight=False, soft_wrap=True)
    write_json(command.json, records)


def read_base(base: Path) -> tuple[Any, Callable[[str], int], LlamaConfig]:
    """A base's tokenizer, the length of a text in its tokens, and its configuration."""
    config = hf_config.from_hf(read_json(base / "config.json"), str(base / "config.json"))
    tokenizer = load_tokenizer(base)

    def count(text: str) -> int:
        return len(tokenizer(text)["input_ids"])

    return tokenizer, count, config
