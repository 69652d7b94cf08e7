"""Destination folders that appear whole or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from meteora_jax.config import InputError
from meteora_jax.io.files import put_in_place, refuse_mount

_JOURNAL = "journal"


class Journal:
    """How far a long write has come, kept in the hidden folder so that the same conversion, killed, goes on from there.

    The first line names the conversion; the last whole one says how many tensors were on disk when it was written.
    """

    def __init__(self, folder: Path):
        self._path = folder / _JOURNAL

    @property
    def conversion(self) -> str:
        """What is being written; empty where there is no journal."""
        return self._lines()[0] if self._path.is_file() else ""

    @property
    def done(self) -> int:
        return int(self._last.partition(" ")[0] or 0)

    @property
    def said(self) -> str:
        """What was noted beside `done`."""
        return self._last.partition(" ")[2]

    @property
    def _last(self) -> str:
        return self._lines()[-2] if len(self._lines()) > 2 else ""

    def _lines(self) -> list[str]:
        return self._path.read_text(encoding="utf-8", errors="replace").split("\n")

    def begin(self, conversion: str) -> None:
        self._path.write_text(f"{conversion}\n", encoding="utf-8")

    def note(self, done: int, said: str = "") -> None:
        """said: what else must be known to go on; one line."""
        with open(self._path, "a", encoding="utf-8") as f:
            f.write(f"{done} {said}\n" if said else f"{done}\n")
            f.flush()
            os.fsync(f.fileno())

    def end(self) -> None:
        self._path.unlink()


@contextlib.contextmanager
def new_folder(
    dest: str | os.PathLike[str], overwrite: bool, sources: Iterable[Path], conversion: str = ""
) -> Iterator[Path]:
    """A hidden sibling folder to write into; it becomes `dest` when the block ends without an exception.

    After any failure `dest` is what it was before and nothing new is left next to it; what a killed process left
    behind is removed by the next import to the same place, or gone on with if that is the same `conversion`.

    Args:
        dest: the folder to create, missing parents too.
        overwrite: replace a `dest` that holds something; otherwise that is refused.
        sources: what is being read; `dest` must not hold any of it.
        conversion: one line that names this very conversion, for those that keep a `Journal`.

    Raises:
        InputError: `dest` is a file, holds something, holds a source, cannot be written, or is being written.
    """
    dest = Path(os.path.realpath(dest))
    _check_destination(dest, overwrite, sources)
    created = [p for p in (dest.parent, *dest.parent.parents) if not p.exists()]
    partial = dest.parent / f".{dest.name}.partial"
    try:
        dest.parent.mkdir(parents=True, exist_ok=True)
        with _claimed(partial, dest, conversion):
            yield partial
            if conversion:
                Journal(partial).end()
            _sync(partial)
            put_in_place(partial, dest)
    except BaseException as e:
        for parent in created:
            with contextlib.suppress(OSError):
                parent.rmdir()
        if isinstance(e, OSError):
            raise InputError(f"{e.filename or dest}: cannot be read or written ({e.strerror or e})") from e
        raise


def _check_destination(dest: Path, overwrite: bool, sources: Iterable[Path]) -> None:
    for source in sources:
        if Path(os.path.realpath(source)).is_relative_to(dest):
            raise InputError(f"{dest}: expected a destination apart from its source, found {source} inside it")
    if not dest.exists():
        return
    if not dest.is_dir():
        raise InputError(f"{dest}: expected a folder or nothing, found a file")
    refuse_mount(dest)
    if any(dest.iterdir()) and not overwrite:
        expected = "no folder or an empty one"
        raise InputError(f"{dest}: expected {expected}, found one that holds files (overwrite replaces it)")


@contextlib.contextmanager
def _claimed(partial: Path, dest: Path, conversion: str) -> Iterator[None]:
    """Makes the hidden folder, locked by this process and empty or as the same conversion left it.

    It is removed after a failure, but kept when the user interrupts a conversion that can go on.
    """
    partial.mkdir(exist_ok=True)
    fd = os.open(partial, os.O_RDONLY)
    try:
        _lock(fd, partial, dest)
        try:
            journal = Journal(partial)
            if not conversion or journal.conversion != conversion:
                for leftover in partial.iterdir():
                    shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
                if conversion:
                    journal.begin(conversion)
            yield
        except BaseException as e:
            if not conversion or isinstance(e, Exception):
                shutil.rmtree(partial, ignore_errors=True)
            raise
    finally:
        os.close(fd)


def _lock(fd: int, partial: Path, dest: Path) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # The lock may be on a folder that its writer has just renamed to `dest`.
        free = os.path.samestat(os.fstat(fd), os.stat(partial))
    except (BlockingIOError, FileNotFoundError):
        free = False
    if not free:
        raise InputError(f"{dest}: expected one import at a time, found another that is writing it")


def _sync(folder: Path) -> None:
    for path in (*folder.iterdir(), folder):
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def write_json(path: Path, value: object) -> None:
    """Writes readable JSON, two spaces deep."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes. Raises InputError where it cannot be read."""
    try:
        with open(path, "rb") as f:
            return hashlib.file_digest(f, "sha256").hexdigest()
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({e.strerror})") from None
