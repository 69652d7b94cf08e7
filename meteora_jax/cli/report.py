"""What every command shares: the console, progress bars, and `--json`."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from rich.box import SIMPLE
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from meteora_jax.config import InputError
from meteora_jax.execution import default_dtype as default_dtype  # for every command
from meteora_jax.io import files
from meteora_jax.io.tensors import WEIGHTS

T = TypeVar("T")
LINE_EVERY = 60.0  # seconds between lines of progress where there is no terminal


class _Console(Console):
    """A console whose reader may go, as in `meteora ... | head`: that is for `main` to end with."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


# What is printed are prompts, names and paths: "[/INST]" and ":x:" in them mean nothing to the console.
console = _Console(markup=False, emoji=False)
status = _Console(stderr=True, markup=False, emoji=False)  # progress and remarks stay out of what a pipe reads
STDOUT = Path("-")  # as a `--json` file


def write_json(path: Path | None, value: Any) -> None:
    """Writes what a command reported to its `--json` file, whole or not at all; "-" is standard output."""
    if path is None:
        return
    if path == STDOUT:
        whole = (sys.stdout.encoding or "").lower().startswith("utf")  # elsewhere by JSON's own escapes
        print(files.json_bytes(value).decode() if whole else json.dumps(value, indent=1), end="" if whole else "\n")
        return
    (path.resolve() if path.is_symlink() else path).parent.mkdir(parents=True, exist_ok=True)
    files.write_json(path, value)


@contextmanager
def json_alone(command: Any, whole: Path | None) -> Iterator[None]:
    """While a command runs: with `--json -` standard output is the JSON's alone, and all else is on standard error.

    whole: the folder that the command writes as a whole, if it does.

    Raises:
        InputError: the `--json` file could not be written when the work is done, is what the command reads or writes
            besides, or lies in a folder whose files are replaced together.
    """
    path: Path | None = getattr(command, "json", None)
    if path is None or path == STDOUT:
        if path is not None and sys.stdout is None:
            raise InputError("--json: expected a standard output, found it closed")
        console.stderr = path is not None
        try:
            yield
        finally:
            console.stderr = False
        return
    files.refuse_unwritable("--json", path)
    real = Path(os.path.realpath(path))
    for field in dataclasses.fields(command):
        other = getattr(command, field.name)
        if field.name != "json" and isinstance(other, Path) and Path(os.path.realpath(other)) == real:
            name = field.name.replace("_", "-")
            raise InputError(f"--json: expected a file of its own, found {path}, which is this command's {name}")
    found = [name for name in ("bank.json", "gates.json") if (real.parent / name).is_file()]  # a report's name, perhaps
    if whole is None and found and (real.parent / WEIGHTS).is_file():
        whole = path.parent  # of other files there the next change says that it would delete them
    if whole is not None and Path(os.path.realpath(whole)) in real.parents:
        raise InputError(f"--json: expected a file outside of {whole}, which is written as a whole, found {path}")
    yield


def check_counts(**counts: int | None) -> None:
    """Refuses options, by name, that are not 1 or more; None is not given.

    Raises:
        InputError: a line for the first of them.
    """
    for name, value in counts.items():
        if value is not None and value < 1:
            raise InputError(f"--{name.replace('_', '-')}: expected 1 or more, found {value}")


def print_tables(text: str, to: Console = console) -> None:
    """Prints Markdown's tables and the lines between them: as they are where there is no terminal, else as columns.

    A header wraps behind its hyphens, and then anywhere: it is never cut.
    """
    if not to.is_terminal:
        to.print(text, highlight=False, markup=False, soft_wrap=True)
        return
    for is_table, group in itertools.groupby(text.splitlines(), lambda line: line.startswith("|")):
        lines = list(group)
        if not is_table:
            to.print("\n".join(lines), highlight=False, markup=False)
            continue
        cells = (re.split(r"(?<!\\)\|", line.removeprefix("|").removesuffix("|")) for line in lines)
        header, _, *rows = ([cell.strip().replace("\\|", "|") for cell in row] for row in cells)
        table = Table(box=SIMPLE, padding=0, pad_edge=False)
        for i, name in enumerate(header):
            side = "left" if i == 0 else "right"
            table.add_column(Text(name.replace("-", "-\n")), overflow="fold", justify=side, vertical="bottom")
        for row in rows:
            table.add_row(*map(Text, row))
        to.print(table)


@contextmanager
def progress_bar(what: str, shown: bool = True) -> Iterator[Callable[..., None]]:
    """A bar with time left on stderr; call it with (done, total, optional note).

    Where stderr is no terminal: a line a minute at most, and one at the end. Nothing where it is not `shown`, as in
    every process but the first.
    """
    if not shown:
        yield _unshown
        return
    if not status.is_terminal:
        lines = ProgressLines(what)
        try:
            yield lines.update
        finally:
            lines.end()
        return
    columns = (
        TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TimeRemainingColumn(), TextColumn("{task.fields[note]}", markup=False),
    )  # fmt: skip
    with Progress(*columns, console=status) as bar:
        task = bar.add_task(what, total=None, note="")

        def update(done: int, total: int, note: str = "") -> None:
            bar.update(task, completed=done, total=total, note=note)

        yield update


def _unshown(done: int, total: int, note: str = "") -> None:
    """Progress that nobody is to see."""


class ProgressLines:
    """Progress for a log: `train gates: 120/1000, 3 min left, note`, every `LINE_EVERY` seconds at most."""

    def __init__(self, what: str, now: Callable[[], float] = time.monotonic):
        self._what, self._now = what, now
        self._said_at = now()
        self._began: tuple[float, int] | None = None  # when the first report came, and how much was done then
        self._unsaid = ""

    def update(self, done: int, total: int, note: str = "") -> None:
        """Notes how far it has come, and says so if it is time."""
        now = self._now()
        self._began = self._began or (now, done)
        since, before = self._began
        left = (now - since) / (done - before) * (total - done) if before < done < total else None
        parts = [f"{done}/{total}", _time_left(left), note]
        self._unsaid = f"{self._what}: {', '.join(part for part in parts if part)}"
        if now - self._said_at >= LINE_EVERY:
            self._say(now)

    def end(self) -> None:
        """Says the last report, if that was not said yet."""
        if self._unsaid:
            self._say(self._now())

    def _say(self, now: float) -> None:
        status.print(self._unsaid, highlight=False, soft_wrap=True)
        self._said_at, self._unsaid = now, ""


def _time_left(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return f"{seconds / 3600:.1f} h left" if seconds >= 5400 else f"{max(1, round(seconds / 60))} min left"


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
            console.print(line, highlight=False, soft_wrap=True)
        write_json(self.json, report)
