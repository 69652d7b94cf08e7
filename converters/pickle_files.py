"""Files that `torch.save` wrote (`.bin`, `.pth`), read without torch and without executing their pickles.

Format: a zip archive, nothing compressed: `<name>/data.pkl` describes the tensors, `<name>/data/<key>` hold their
values (torch.serialization). The description is a pickle, a program that can call anything; here a machine of its own
runs only the few instructions that a dict of tensors needs, and the three functions that those call are recognised by
name and replaced. It imports nothing, so there is nothing it could execute.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import math
import pickletools
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from converters.tensor_files import SourceTensor, read_bytes, read_rows
from meteora_jax.config import InputError

_STORAGES = {
    "torch FloatStorage": np.dtype(np.float32),
    "torch HalfStorage": np.dtype(np.float16),
    "torch BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "torch DoubleStorage": np.dtype(np.float64),
    "torch LongStorage": np.dtype(np.int64),
    "torch IntStorage": np.dtype(np.int32),
    "torch ShortStorage": np.dtype(np.int16),
    "torch CharStorage": np.dtype(np.int8),
    "torch ByteStorage": np.dtype(np.uint8),
    "torch BoolStorage": np.dtype(np.bool_),
}
_DICT = "collections OrderedDict"
_TENSOR, _PARAMETER = "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter"
_MAX_PICKLE = 100_000_000
_MAX_AXES = 8


@dataclasses.dataclass(frozen=True)
class _Global:
    """A name that the pickle asks for: recognised, never imported."""

    name: str


@dataclasses.dataclass(frozen=True)
class _Storage:
    """A run of values in the archive, as the pickle names it."""

    dtype: np.dtype
    key: str
    count: int


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """A view of a storage, in values."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Refused(Exception):
    """What the pickle asks for and does not get."""


_MARK = object()


class _Machine:
    """Runs a pickle that describes a dict of tensors, and nothing else."""

    def __init__(self, data: bytes):
        self.data = data
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        for opcode, argument, _ in pickletools.genops(io.BytesIO(self.data)):
            if opcode.name == "STOP":
                if len(self.stack) != 1:
                    raise _Refused(f"one value at the end, found {len(self.stack)}")
                return self.stack[0]
            action = getattr(self, f"on_{opcode.name.lower()}", None)
            if action is not None:
                action(argument)
            elif opcode.name in _CONSTANTS:
                self.stack.append(_CONSTANTS[opcode.name])
            elif opcode.name in _LITERALS:
                self.stack.append(argument)
            elif opcode.name not in ("PROTO", "FRAME"):
                raise _Refused(f"a dict of tensors, found the instruction {opcode.name}")
        raise _Refused("an end, found none")

    def pop(self) -> Any:
        value = self.stack.pop()
        if value is _MARK:
            raise _Refused("a value, found a mark")
        return value

    def pop_to_mark(self) -> list[Any]:
        at = max((i for i, v in enumerate(self.stack) if v is _MARK), default=None)
        if at is None:
            raise _Refused("a mark, found none")
        values = self.stack[at + 1 :]
        del self.stack[at:]
        return values

    def on_mark(self, _: Any) -> None:
        self.stack.append(_MARK)

    def on_empty_dict(self, _: Any) -> None:
        self.stack.append({})

    def on_empty_list(self, _: Any) -> None:
        self.stack.append([])

    def on_tuple(self, _: Any) -> None:
        self.stack.append(tuple(self.pop_to_mark()))

    def on_tuple1(self, _: Any) -> None:
        self.stack.append((self.pop(),))

    def on_tuple2(self, _: Any) -> None:
        self.stack[-2:] = [tuple(self.stack[-2:])]

    def on_tuple3(self, _: Any) -> None:
        self.stack[-3:] = [tuple(self.stack[-3:])]

    def on_binput(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    on_long_binput = on_binput

    def on_memoize(self, _: Any) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def on_binget(self, index: int) -> None:
        self.stack.append(self.memo[index])

    on_long_binget = on_binget

    def on_append(self, _: Any) -> None:
        value = self.pop()
        self.target(list).append(value)

    def on_appends(self, _: Any) -> None:
        values = self.pop_to_mark()
        self.target(list).extend(values)

    def on_setitem(self, _: Any) -> None:
        value, key = self.pop(), self.pop()
        self.set(self.target(dict), key, value)

    def on_setitems(self, _: Any) -> None:
        values = self.pop_to_mark()
        if len(values) % 2:
            raise _Refused("keys with values, found a key without one")
        for key, value in zip(values[::2], values[1::2], strict=True):
            self.set(self.target(dict), key, value)

    def target(self, kind: type) -> Any:
        if type(self.stack[-1]) is not kind:
            raise _Refused(f"a {kind.__name__} to fill, found {type(self.stack[-1]).__name__}")
        return self.stack[-1]

    def set(self, target: dict[Any, Any], key: Any, value: Any) -> None:
        if not isinstance(key, str | int):
            raise _Refused(f"a string as key, found {type(key).__name__}")
        if key in target:
            raise _Refused(f"{key!r:.200} once, found it twice")
        target[key] = value

    def on_global(self, name: str) -> None:
        self.stack.append(_Global(name))

    def on_stack_global(self, _: Any) -> None:
        name, module = self.pop(), self.pop()
        self.stack.append(_Global(f"{module} {name}"))

    def on_binpersid(self, _: Any) -> None:
        match self.pop():
            case ("storage", _Global(name), str(key), str(), int(count)) if name in _STORAGES and count >= 0:
                self.stack.append(_Storage(_STORAGES[name], key, count))
            case other:
                raise _Refused(f"a storage of {', '.join(n.split()[1] for n in _STORAGES)}, found {_name(other)}")

    def on_reduce(self, _: Any) -> None:
        arguments, function = self.pop(), self.pop()
        match function, arguments:
            case _Global(name), () if name == _DICT:
                self.stack.append({})
            case _Global(name), (_Tensor() as tensor, bool(), dict()) if name == _PARAMETER:
                self.stack.append(tensor)
            case _Global(name), (_Storage() as storage, int(offset), tuple(shape), tuple(strides), bool(), *_) if (
                name == _TENSOR
            ):
                self.stack.append(_Tensor(storage, offset, _sizes(shape), _sizes(strides)))
            case _:
                raise _Refused(f"a dict of tensors, found a call of {_name(function)}")

    def on_build(self, _: Any) -> None:
        state = self.pop()
        # A module's state dict carries `_metadata`: versions of its layers, without effect on the values.
        if type(self.stack[-1]) is not dict or type(state) is not dict or set(state) != {"_metadata"}:
            raise _Refused(f"a dict of tensors, found the state of {_name(self.stack[-1])}")


_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_LITERALS = (
    "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8",
)  # fmt: skip


def _name(value: Any) -> str:
    return value.name.replace(" ", ".") if isinstance(value, _Global) else type(value).__name__


def _sizes(values: tuple[Any, ...]) -> tuple[int, ...]:
    if len(values) > _MAX_AXES or any(type(v) is not int or v < 0 for v in values):
        raise _Refused("sizes of a tensor, found something else")
    return values


def read_pickle(path: Path, file: str | None = None) -> list[SourceTensor]:
    """The tensors of a file that `torch.save` wrote from a dict of tensors, in its order; nothing is executed.

    Args:
        path: the file.
        file: how messages name it; its bare name unless given.

    Raises:
        InputError: missing, truncated, compressed, of torch's old formats, not a plain dict of tensors, or tensors
            that do not fit their values; all that is wrong with the tensors at once.
    """
    file = file or path.name
    try:
        if path.is_fifo():  # its reader would wait for ever
            raise InputError(f"{file}: expected a file, found a pipe")
        with zipfile.ZipFile(path) as archive:
            raw, data = _open_archive(archive, path, file)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # backslashes in a name that will be refused
            state = _Machine(raw).run()
    except FileNotFoundError:
        raise InputError(f"{file}: expected a file, found none") from None
    except OSError as e:
        raise InputError(f"{file}: cannot be read ({e.strerror or e})") from None
    except zipfile.BadZipFile as e:
        raise InputError(f"{file}: expected a zip archive as torch.save writes it, found another file ({e})") from None
    except _Refused as e:
        raise InputError(f"{file}: data.pkl: expected {e}") from None
    except (ValueError, LookupError, TypeError, RuntimeError, EOFError) as e:
        raise InputError(f"{file}: data.pkl: expected a sound pickle, found a broken one ({e})") from None
    if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
        raise InputError(f"{file}: data.pkl: expected a dict of tensors by name, found {type(state).__name__}")
    problems: list[str] = []
    tensors: list[SourceTensor] = []
    for key, value in state.items():
        if not isinstance(value, _Tensor):
            problems.append(f"{file}: {key}: expected a tensor, found {_name(value)}")
            continue
        try:
            tensors.append(_open_tensor(path, file, key, value, data))
        except InputError as e:
            problems += e.problems
    if problems:
        raise InputError(problems)
    return tensors


def _open_archive(archive: zipfile.ZipFile, path: Path, file: str) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """(the pickle, {storage key: (offset in the file, bytes)})."""
    infos = archive.infolist()
    roots = [info.filename.removesuffix("data.pkl") for info in infos if info.filename.count("/") == 1]
    root = next((r for r in roots if r.endswith("/")), None)
    if root is None:
        raise InputError(f"{file}: expected a data.pkl inside, found none (a file of torch before 1.6? save it anew)")
    size = path.stat().st_size
    members: dict[str, zipfile.ZipInfo] = {}
    for info in infos:
        if info.filename in members:
            raise InputError(f"{file}: {info.filename}: expected once in the archive, found twice")
        if not info.filename.startswith(root):
            raise InputError(f"{file}: {info.filename}: expected every part of the archive in {root}, found another")
        stored = info.compress_type == zipfile.ZIP_STORED and info.compress_size == info.file_size <= size
        if not stored or info.volume:
            raise InputError(f"{file}: {info.filename}: expected a whole, uncompressed part, found another")
        members[info.filename] = info
    if members[f"{root}data.pkl"].file_size > _MAX_PICKLE:
        raise InputError(f"{file}: data.pkl: expected at most {_MAX_PICKLE} bytes, found more")
    byteorder = members.get(f"{root}byteorder")
    if byteorder is not None and archive.read(byteorder) != b"little":
        raise InputError(f"{file}: byteorder: expected b'little', found {archive.read(byteorder)!r:.40}")
    data = {}
    for name, info in members.items():
        if name.startswith(f"{root}data/"):
            header = read_bytes(path, info.header_offset, 30)
            if header[:4].tobytes() != b"PK\3\4":
                raise InputError(f"{file}: {name}: expected a zip entry at {info.header_offset}, found none")
            lengths = header[26:30].view("<u2").astype(int)
            start = info.header_offset + 30 + int(lengths.sum())
            if start + info.file_size > size:
                raise InputError(f"{file}: {name}: expected {info.file_size} bytes at {start}, found {size - start}")
            data[name.removeprefix(f"{root}data/")] = (start, info.file_size)
    return archive.read(members[f"{root}data.pkl"]), data


def _open_tensor(path: Path, file: str, key: str, tensor: _Tensor, data: Mapping[str, tuple[int, int]]) -> SourceTensor:
    storage, shape, dtype = tensor.storage, tensor.shape, tensor.storage.dtype
    if storage.key not in data:
        raise InputError(f"{file}: {key}: expected values at data/{storage.key}, found none")
    start, size = data[storage.key]
    contiguous = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
    moved = [axis for axis, (n, stride) in enumerate(zip(shape, tensor.strides, strict=False)) if n > 1]
    if len(tensor.strides) != len(shape) or any(tensor.strides[axis] != contiguous[axis] for axis in moved):
        found = f"strides {tensor.strides} of shape {shape}"
        raise InputError(f"{file}: {key}: expected values that lie in order, found {found}: save a contiguous tensor")
    if tensor.offset < 0 or (tensor.offset + math.prod(shape)) * dtype.itemsize > size:
        raise InputError(f"{file}: {key}: expected {dtype} {shape} at {tensor.offset}, found {size} bytes (truncated?)")
    first_byte = start + tensor.offset * dtype.itemsize
    rows = functools.partial(read_rows, path, first_byte, dtype, shape[1:])
    return SourceTensor(file, key, dtype, shape, rows, first_byte)
