"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import json
import os
import re
import shlex
import shutil
import sys
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from meteora_jax.config import InputError


@contextlib.contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
    """A block that writes to `path`: what the system refuses (a full disk, say) becomes an InputError that names it."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as e:
        raise InputError(f"{path}: cannot be written ({e.strerror or e})") from None


@contextlib.contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A path to write to: what is there takes the place of `path`, whole, when the block ends without an exception.

    A link stays and what it points to is replaced; permissions stay. A device or a pipe, which nothing can take the
    place of, gets the bytes, as do /dev/stdout and other streams.

    Raises:
        InputError: it cannot be written, or is a folder.
    """
    given = Path(path)
    with writing(given):
        if given.is_dir():
            raise InputError(f"{given}: expected a file, found a folder")
        if _is_stream(given):
            with tempfile.TemporaryDirectory() as folder:
                yield Path(folder) / "written"
                with (Path(folder) / "written").open("rb") as source, open(_opened(given), "wb") as to:
                    shutil.copyfileobj(source, to)
            return
        dest = Path(os.path.realpath(given))
        # a name of its own: on a shared disk every process of a job may write this file at once
        partial = dest.with_name(f".{dest.name}.{uuid.uuid4().hex}.partial")
        try:
            yield partial
            if dest.exists():
                shutil.copymode(dest, partial)
            os.replace(partial, dest)
        finally:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)


def _is_stream(path: Path) -> bool:
    """Whether a path is what bytes are sent to. /dev/stdout is so even where the shell sends it to a regular file."""
    return _descriptor(path) is not None or (path.exists() and not path.is_file())


def _descriptor(path: Path) -> int | None:
    """The open file of this process that /dev/stdout, /dev/fd/N, or a link to one of them is."""
    at = path
    for _ in range(40):  # links to links, of which the system follows no more either
        at = Path(os.path.realpath(at.parent)) / at.name
        if found := re.fullmatch(rf"(?:/dev|/proc/{os.getpid()})/fd/(\d+)", str(at)):
            return int(found[1])
        if not at.is_symlink():
            return None
        at = at.parent / os.readlink(at)
    return None


def _opened(stream: Path) -> int:
    """A stream, open for writing. One of this process' own goes on where it is: opened anew, a regular file behind it
    would be written from its beginning or its end, and what is said afterwards over that."""
    number = _descriptor(stream)
    if number is None:
        return os.open(stream, os.O_WRONLY)
    for said in (sys.stdout, sys.stderr):
        if said is not None:  # as where the shell has closed it
            said.flush()
    return os.dup(number)


def refuse_unwritable(option: str, path: str | os.PathLike[str], *, folder: bool = False) -> None:
    """Refuses what could not be written when the work is done. Ask before any work.

    Raises:
        InputError: a line that begins with `option`: a file is in the place of a folder or a folder in that of a file.
    """
    path = Path(path)
    if not folder:
        if path.is_dir():
            raise InputError(f"{option}: expected a file, found the folder {path}")
        if _is_stream(path):
            return
        if path.is_symlink():
            path = Path(os.path.realpath(path))
    for above in (path, *path.parents) if folder else path.parents:
        if above.exists():
            if not above.is_dir():
                raise InputError(f"{option}: expected a folder, found the file {above}")
            if not os.access(above, os.W_OK | os.X_OK):
                raise InputError(f"{option}: expected a folder that can be written to, found {above}")
            return


def write_json(path: str | os.PathLike[str], value: Any, indent: int = 1) -> None:
    """Writes readable JSON, whole or not at all. Raises InputError as `whole_file`."""
    with whole_file(path) as partial:
        partial.write_bytes(json_bytes(value, indent))


def json_bytes(value: Any, indent: int = 1) -> bytes:
    """Readable JSON as UTF-8. What has none, of a path that is no UTF-8, is written as JSON's own escape."""
    return (json.dumps(value, indent=indent, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")


def train_alone(folder: str | os.PathLike[str]) -> IO[str]:
    """A folder's lock, this process' until it is closed or the process ends. Two runs that write checkpoints to one
    folder take each other's halves away, which shows many steps later.

    A process may take it again; whichever of its files is closed first lets go of it.

    Raises:
        InputError: another process has it.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    held = (folder / ".lock").open("a")
    try:
        fcntl.lockf(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as e:
        held.close()
        raise InputError(f"{folder}: expected no other process to train here, found one at work") from e
    except OSError:  # a file system that knows no locks
        pass
    return held


def refuse_foreign(folder: str | os.PathLike[str], description: str, *others: str) -> None:
    """Refuses to replace a folder that somebody may miss: one without its `description`, or with files that are none
    of its own, which are `others`. Ask before any work.

    Raises:
        InputError: so it is, or a file is there.
    """
    folder = Path(folder)
    if not folder.exists():
        return
    if not folder.is_dir():
        raise InputError(f"{folder}: expected a folder or nothing, found a file")
    refuse_mount(folder)
    found = sorted(p.name for p in folder.iterdir() if not (p.name.startswith(".") and p.suffix == ".partial"))
    if found and description not in found:
        raise InputError(f"{folder}: expected {description} in what is replaced, found {found[0]} and no {description}")
    if foreign := [name for name in found if name not in (description, *others)]:
        own = ", ".join((description, *others))
        raise InputError(f"{folder}: expected nothing but {own} in what is replaced, found {foreign[0]}")


def refuse_mount(folder: str | os.PathLike[str]) -> None:
    """Refuses a folder that no other can take the place of. Raises InputError."""
    if os.path.ismount(folder):
        raise InputError(f"{folder}: expected a folder that can be replaced, found a mount point: name one inside it")


@contextlib.contextmanager
def change_alone(folder: str | os.PathLike[str]) -> Iterator[None]:
    """A folder that is read, changed and written anew, this process' until the block ends: of two that do so at once
    one's change would be lost.

    Raises:
        InputError: another process has it, or there is none.
    """
    folder = Path(folder)
    try:
        held = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as e:
        raise InputError(f"{folder}: cannot be read ({e.strerror})") from None
    try:
        free = True
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The lock may be on a folder whose place a new one has just taken.
            free = os.path.samestat(os.fstat(held), os.stat(folder))
        except BlockingIOError:
            free = False
        except OSError:  # a file system that knows no locks
            pass
        if not free:
            raise InputError(f"{folder}: expected one change at a time, found another process that is changing it")
        yield
    finally:
        os.close(held)


def refuse_unimported_base(path: str | os.PathLike[str]) -> None:
    """Refuses, in place of a BASE folder, what `meteora import base` makes one of: a .gguf file, a folder of them, or a
    model of Hugging Face or Meta. Whatever else may be wrong with a folder is left to its reader.

    Raises:
        InputError: a line that has the command.
    """
    path = Path(path)
    if (path / "weights.safetensors").exists():
        return
    source, found = path, ""
    if path.suffix.lower() == ".gguf" and path.is_file():
        found = "a .gguf file"
    elif (path / "config.json").is_file():
        with contextlib.suppress(OSError, ValueError, RecursionError):
            config = json.loads((path / "config.json").read_text(encoding="utf-8"))
            if isinstance(config, dict) and "model_type" in config and "meteora" not in config:
                found = "a Hugging Face model"
    elif (path / "params.json").is_file():
        found = "a model in Meta's own format"
    elif files := sorted(path.glob("*.gguf")):
        source, found = files[0], f"{files[0].name}"
    if found:
        command = f"meteora import base {shlex.quote(str(source))} BASE"
        raise InputError(f"{path}: expected a BASE folder, found {found}: make one with `{command}`")


def refuse_unimported_bank(folder: str | os.PathLike[str]) -> None:
    """Refuses, in place of a BANK folder, a PEFT folder or one that holds some, of which `meteora import adapters`
    makes one. Raises InputError: a line that has the command."""
    folder = Path(folder)
    if (folder / "bank.json").exists():
        return
    if (folder / "adapter_config.json").is_file():
        found, adapters = "a PEFT adapter", [folder]
    else:
        adapters = sorted(file.parent for file in folder.glob("*/adapter_config.json"))
        found = "a folder of PEFT adapters"
    if adapters:
        pairs = [shlex.quote(f"{path.resolve().name}={path}") for path in adapters[:8]]
        command = f"meteora import adapters BANK {' '.join(pairs)}{' ...' * (len(adapters) > 8)} --base BASE"
        raise InputError(f"{folder}: expected a BANK folder, found {found}: make one with `{command}`")


@contextlib.contextmanager
def whole_folder(dest: str | os.PathLike[str]) -> Iterator[Path]:
    """A hidden folder beside `dest` to write into; it takes its place, and that of what was there, when the block ends
    without an exception.

    What a killed process of this host left beside `dest` is removed first. What another host may be writing stays:
    on a shared disk a lock of its process may not be seen from here.
    """
    dest = Path(os.path.realpath(dest))
    dest.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(dest)
    partial, held = _hidden_folder(dest)
    try:
        yield partial
        os.chmod(partial, 0o755)
        put_in_place(partial, dest)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        os.close(held)


def _mark() -> str:
    """The end of the name of a hidden folder that a process of this host has locked."""
    return f".{hashlib.sha256(os.uname().nodename.encode()).hexdigest()[:8]}.partial"


def _hidden_folder(dest: Path) -> tuple[Path, int]:
    """A new folder beside `dest`, and what holds its lock until that is closed or the process ends.

    It has this host's mark only once it is locked, so that nobody takes it for a leftover. Where folders cannot be
    locked it has none and stays if the process is killed.
    """
    new = Path(tempfile.mkdtemp(prefix=f".{dest.name}.", dir=dest.parent))
    held = os.open(new, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return new, held
    return new.rename(f"{new}{_mark()}"), held


def _remove_leftovers(dest: Path) -> None:
    """Removes the hidden folders of `dest` that have this host's mark and that no process holds."""
    name = re.compile(rf"{re.escape(f'.{dest.name}.')}[a-z0-9_]{{8}}{re.escape(_mark())}")
    siblings: list[Path] = []
    with contextlib.suppress(PermissionError):  # a folder may be written to and not be listed
        siblings += [path for path in dest.parent.iterdir() if name.fullmatch(path.name)]
    for found in siblings:
        with contextlib.suppress(OSError):  # gone by now, locked by its writer, or not ours to remove
            held = os.open(found, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # The lock may be on a folder that its writer has just renamed to `dest`.
                if os.path.samestat(os.fstat(held), os.lstat(found)):
                    shutil.rmtree(found, ignore_errors=True)
            finally:
                os.close(held)


def put_in_place(new: Path, dest: Path) -> None:
    """Renames the folder `new` to `dest`; an old one there is deleted only once the new one is in its place.

    Where the system can swap two folders in one call (Linux) there is no moment without one of them at `dest`;
    elsewhere a process that is killed between two renames leaves the old one in a hidden folder beside it.
    """
    if not dest.exists() or not any(dest.iterdir()):
        os.rename(new, dest)
    else:
        old = new  # gets the hidden name, which the next writer of the same place clears if this one is killed
        held = os.open(dest, os.O_RDONLY)  # locked, so that nobody begins to write into what is being deleted
        with contextlib.suppress(OSError):
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            if not _swap(new, dest):
                old = Path(tempfile.mkdtemp(prefix=f".{dest.name}.", dir=dest.parent)) / "old"
                try:
                    os.rename(dest, old)
                    try:
                        os.rename(new, dest)
                    except BaseException:
                        os.rename(old, dest)
                        raise
                except BaseException:
                    old.parent.rmdir()
                    raise
                old = old.parent
            shutil.rmtree(old)
        finally:
            os.close(held)
    parent = os.open(dest.parent, os.O_RDONLY)
    try:
        os.fsync(parent)
    finally:
        os.close(parent)


_EXCHANGE, _FROM_HERE = 2, -100  # RENAME_EXCHANGE of linux/fs.h, AT_FDCWD of fcntl.h


def _swap(one: Path, other: Path) -> bool:
    """Gives two folders each other's name in one step; False, and nothing done, where the system cannot."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:  # another system than Linux
        return False
    return rename(_FROM_HERE, os.fsencode(one), _FROM_HERE, os.fsencode(other), ctypes.c_uint(_EXCHANGE)) == 0
