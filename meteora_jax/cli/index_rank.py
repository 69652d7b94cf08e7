"""`meteora index rank`: which adapters serve each task of an index best."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from meteora_jax.cli.report import console, progress_bar, status, write_json
from meteora_jax.config import InputError


@dataclass(frozen=True)
class IndexRank:
    """Rank a bank's adapters for every task of an index, by their loss on the task's examples (LORAUTER).

    INDEX gets ranking.json, which `mj.TaskRetrieval` and evaluate's task-retrieval read. The index's names are tasks,
    whatever adapters there are. The same command goes on where it was stopped.
    """

    index: tyro.conf.Positional[Path]
    """INDEX folder."""
    base: Path
    """BASE folder."""
    bank: Path
    """BANK folder."""
    tasks: Path
    """TASKS folder: examples of TASKS/<name>/train.jsonl, best some that no adapter was trained on."""
    limit: int = 20
    """Examples a task, evenly spread over its file."""
    json: Path | None = None
    """Write the losses here too."""


def index_rank(command: IndexRank) -> None:
    """Runs `meteora index rank`."""
    from meteora_jax.cli.comparison import fingerprint
    from meteora_jax.evaluation.ranking import digest, rank_adapters
    from meteora_jax.evaluation.tasks import load_splits
    from meteora_jax.loading import load
    from meteora_jax.retriever.index import Index
    from meteora_jax.retriever.ranking import ranked, read_part, write_part, write_ranking

    if command.limit < 1:
        raise InputError(f"--limit: expected 1 or more, found {command.limit}")
    names = Index.load(command.index).names
    tasks = {}
    for name, examples in load_splits(command.tasks, names, "train").items():
        count = min(command.limit, len(examples))
        tasks[name] = [examples[i * len(examples) // count] for i in range(count)]
    model = load(command.base, command.bank)
    of = {"base": fingerprint(command.base), "bank": fingerprint(command.bank), "tasks": digest(tasks)}
    losses = read_part(command.index, of)
    if losses:
        status.print(f"{len(losses)} of {len(tasks)} tasks were ranked before", highlight=False)
    with progress_bar("index rank") as bar:

        def done(task: str, count: int, total: int) -> None:
            write_part(command.index, losses, of)
            bar(count, total, task)

        rank_adapters(model, tasks, done, losses)
    write_ranking(command.index, losses)
    for task, adapters in ranked(losses).items():
        best = ", ".join(f"{name} {losses[task][name]:.3f}" for name in adapters[:3])
        console.print(f"{task}: {best}", highlight=False, soft_wrap=True)
    write_json(command.json, losses)
