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
from typing import Any

from meteora_jax.config import InputError


@contextlib.contextmanager
def new_folder(dest: str | os.PathLike[str], overwrite: bool, sources: Iterable[Path]) -> Iterator[Path]:
    """A hidden sibling folder to write into; it becomes `dest` when the block ends without an exception.

    After any failure `dest` is what it was before and nothing new is left beside it; what a killed process left
    behind is removed by the next import to the same place.

    Args:
        dest: the folder to make; missing parents are made.
        overwrite: replace a `dest` that holds something; otherwise that is refused.
        sources: what is being read; `dest` must not hold any of it.

    Raises:
        InputError: `dest` is a file, holds something, holds a source, cannot be written, or is being written.
    """
    dest = Path(os.path.realpath(dest))
    _check_destination(dest, overwrite, sources)
    made = [p for p in (dest.parent, *dest.parent.parents) if not p.exists()]
    partial = dest.parent / f".{dest.name}.partial"
    try:
        dest.parent.mkdir(parents=True, exist_ok=True)
        with _claimed(partial, dest):
            yield partial
            _sync(partial)
            _replace(partial, dest)
    except BaseException as e:
        for parent in made:
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
    if any(dest.iterdir()) and not overwrite:
        raise InputError(f"{dest}: expected no folder or an empty one, found one that holds files (overwrite=True)")


@contextlib.contextmanager
def _claimed(partial: Path, dest: Path) -> Iterator[None]:
    """Makes the hidden folder, empty and locked by this process, and removes it after a failure."""
    partial.mkdir(exist_ok=True)
    fd = os.open(partial, os.O_RDONLY)
    try:
        _lock(fd, partial, dest)
        try:
            for leftover in partial.iterdir():
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
            yield
        except BaseException:
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


def _replace(partial: Path, dest: Path) -> None:
    """Renames `partial` to `dest`; an old `dest` is deleted only once the new one is in its place."""
    if not dest.exists() or not any(dest.iterdir()):
        os.rename(partial, dest)
    else:
        old = dest.parent / f".{dest.name}.replaced"
        shutil.rmtree(old, ignore_errors=True)
        os.rename(dest, old)
        try:
            os.rename(partial, dest)
        except BaseException:
            os.rename(old, dest)
            raise
        shutil.rmtree(old)
    parent = os.open(dest.parent, os.O_RDONLY)
    try:
        os.fsync(parent)
    finally:
        os.close(parent)


def write_json(path: Path, value: Any) -> None:
    """Writes readable JSON, two spaces deep."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes. Raises InputError where it cannot be read."""
    try:
        with open(path, "rb") as f:
            return hashlib.file_digest(f, "sha256").hexdigest()
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({e.strerror})") from None
