"""What every command shares: the console, progress bars, and `--json`."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

console = Console()
status = Console(stderr=True)  # progress and remarks stay out of what a pipe reads


def write_json(path: Path | None, value: Any) -> None:
    """Writes what a command reported to its `--json` file, whole or not at all."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


@contextmanager
def progress_bar(what: str) -> Iterator[Callable[..., None]]:
    """A bar with time left on stderr; call it with (done, total, optional note)."""
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TimeRemainingColumn(), TextColumn("{task.fields[note]}"),
    )  # fmt: skip
    with Progress(*columns, console=status) as bar:
        task = bar.add_task(what, total=None, note="")

        def update(done: int, total: int, note: str = "") -> None:
            bar.update(task, completed=done, total=total, note=note)

        yield update


def default_dtype(dtype: str | None) -> str:
    """bfloat16 on an accelerator, float32 on a CPU, which has no fast bfloat16, unless the caller says."""
    import jax

    return dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
