"""Which adapters serve a task best, by the task's own examples: what a retrieval of tasks composes (LORAUTER, Dhasade
et al., arXiv 2601.21795). `INDEX/ranking.json` stands beside the index whose names are the tasks.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from meteora_jax.config import InputError, read_json
from meteora_jax.io.files import write_json

FILE = "ranking.json"
_PART = ".ranking.partial"  # of a ranking that is not done
Losses = Mapping[str, Mapping[str, float]]
Ranking = Mapping[str, tuple[str, ...]]  # of each task the adapters, best first


def write_ranking(folder: str | os.PathLike[str], losses: Losses) -> None:
    """Writes {task: {adapter: loss of the next token on the task's examples}} beside an index."""
    write_json(Path(folder) / FILE, {"format": "meteora-ranking-1", "losses": losses})
    (Path(folder) / _PART).unlink(missing_ok=True)


def write_part(folder: str | os.PathLike[str], losses: Losses, of: Mapping[str, Any]) -> None:
    """Writes the losses of the tasks that are done, so that the same ranking, `of` the same, goes on from there."""
    write_json(Path(folder) / _PART, {"of": of, "losses": losses})


def read_part(folder: str | os.PathLike[str], of: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """What a ranking `of` the same that was stopped has found; nothing where there is none."""
    with contextlib.suppress(InputError):
        raw = read_json(Path(folder) / _PART)
        if isinstance(raw, dict) and raw.get("of") == of and all(map(_is_sound, raw["losses"].values())):
            return raw["losses"]
    return {}


def ranked(losses: Losses) -> Ranking:
    """The adapters of each task, that of the lowest loss first."""
    return {task: tuple(sorted(own, key=lambda name: (own[name], name))) for task, own in losses.items()}


def read_ranking(folder: str | os.PathLike[str]) -> Ranking | None:
    """The ranking beside an index; None where there is none. Raises InputError: a malformed one."""
    path = Path(folder) / FILE
    if not path.exists():
        return None
    raw = read_json(path)
    losses = raw.get("losses") if isinstance(raw, dict) and raw.get("format") == "meteora-ranking-1" else None
    if not isinstance(losses, dict) or not losses or not all(map(_is_sound, losses.values())):
        raise InputError(f"{path}: expected losses {{task: {{adapter: number}}}}, found something else")
    return ranked(losses)


def _is_sound(own: Any) -> bool:
    return isinstance(own, dict) and bool(own) and all(isinstance(x, float) and math.isfinite(x) for x in own.values())
