"""What every command shares: the console, progress bars, and `--json`."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

T = TypeVar("T")
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


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What every command that converts files into a folder takes, and how it runs and reports."""

    overwrite: bool = False
    """Replace DEST if it exists, once the new one is complete."""
    json: Path | None = None
    """Write the report here too."""

    def run(self, what: str, convert: Callable[..., T]) -> T:
        """Calls a converter, which takes `overwrite` and `progress`, under a bar named `what`."""
        with progress_bar(what) as bar:
            return convert(overwrite=self.overwrite, progress=lambda note, done, total: bar(done, total, note))

    def tell(self, lines: str | list[str], report: Any) -> None:
        """Prints whole lines, however long, and writes the report to `json`."""
        for line in [lines] if isinstance(lines, str) else lines:
            console.print(line, highlight=False, markup=False, soft_wrap=True)
        write_json(self.json, report)


def default_dtype(dtype: str | None) -> str:
    """bfloat16 on an accelerator, float32 on a CPU, which has no fast bfloat16, unless the caller says."""
    import jax

    return dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
