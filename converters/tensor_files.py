"""safetensors files, read row block by row block and written slice by slice, so that memory stays bounded.

Format: https://github.com/huggingface/safetensors#format (8-byte little-endian header length, JSON header,
data without holes). Reading is positional rather than memory-mapped: mapped pages of a 16 GB source would count
as this process's memory for as long as they are mapped.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np

from meteora_jax.config import InputError
from meteora_jax.quantization import WeightFormat

DTYPES: dict[str, np.dtype] = {
    name: np.dtype(kind)
    for name, kind in {
        "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
        "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2,
        "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8,
        "U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8, "BOOL": np.bool_,
    }.items()
}  # fmt: skip
FLOATS = ("F32", "F16", "BF16")  # what a base or an adapter may be stored in
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MAX_HEADER = 100_000_000  # the reference implementation's own limit
_BLOCK_BYTES = 16 << 20


@dataclasses.dataclass(frozen=True)
class PackedMatrix:
    """A matrix [I, O] that a file holds as this project's quantised bases may.

    kind: int8, fp8 or int4. group: inputs that share a scale; 0 in 8 bit, where an output column has its own.
    read: -> values, scale float32 and zero: int8, or fp8's bits uint8 [I, O], scale [O] and no zero; or uint8 [I, O] of
    0..15, scale [I / group, O] and zero uint8 [I / group, O].
    """

    kind: WeightFormat
    group: int
    read: Callable[[], tuple[np.ndarray, np.ndarray, np.ndarray | None]]


@dataclasses.dataclass(frozen=True)
class SourceTensor:
    """One tensor of a file that is being converted; none of it is in memory before it is read."""

    file: str  # as error messages name it
    key: str
    dtype: np.dtype  # of what `rows` returns
    shape: tuple[int, ...]
    rows: Callable[[int, int], np.ndarray]  # (start, stop) along the first axis -> [stop - start, ...]
    start: int | None = None  # offset of its values in the file, if they lie there as they are
    stored: str | None = None  # the file's own name of the type it holds them in; None: dtype's
    packed: PackedMatrix | None = None  # what it holds, where this project's bases may hold the same

    @property
    def where(self) -> str:
        """The start of every message about this tensor."""
        return f"{self.file}: {self.key}"

    def read(self) -> np.ndarray:
        return self.rows(0, self.shape[0]) if self.shape else self.rows(0, 1).reshape(())

    def blocks(self) -> Iterator[tuple[slice, np.ndarray]]:
        """(rows, values) of consecutive row blocks of about 16 MiB."""
        row_bytes = math.prod(self.shape[1:]) * self.dtype.itemsize
        step = max(1, _BLOCK_BYTES // max(1, row_bytes))
        for start in range(0, self.shape[0], step):
            stop = min(start + step, self.shape[0])
            yield slice(start, stop), self.rows(start, stop)


def dtype_name(dtype: np.dtype) -> str:
    """The format's own name of a type: F32, BF16, ..."""
    return _NAMES[dtype]


def read_bytes(path: Path, offset: int, count: int) -> np.ndarray:
    """`count` bytes of a file as uint8. Raises InputError where the file is shorter or cannot be read."""
    try:
        data = np.fromfile(path, dtype=np.uint8, count=count, offset=offset)
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({e.strerror or e})") from None
    if data.size != count:
        raise InputError(f"{path}: expected {count} bytes at offset {offset}, found {data.size} (truncated?)")
    return data


def read_safetensors(path: Path, file: str | None = None) -> list[SourceTensor]:
    """The tensors of a safetensors file, in file order, after its header was checked in full.

    Args:
        path: the file.
        file: how messages name it; its bare name unless given.

    Raises:
        InputError: missing, truncated, or a header that is corrupt, oversized or does not fit the file.
    """
    file = file or path.name
    header, data_start, data_size = _read_header(path, file)
    problems: list[str] = []
    spans: list[tuple[int, int, SourceTensor]] = []
    for key, entry in header.items():
        if key == "__metadata__":
            continue
        try:
            spans.append(_read_entry(path, file, data_start, key, entry))
        except InputError as e:
            problems += e.problems
    if problems:
        raise InputError(problems)
    spans.sort(key=lambda span: span[:2])
    end = 0
    for start, stop, tensor in spans:
        if start != end:
            problems.append(f"{tensor.where}: data_offsets: expected data from {end}, found {start}")
        end = stop
    if end != data_size:
        problems.append(f"{file}: expected {end} bytes of tensor data, found {data_size} (truncated?)")
    if problems:
        raise InputError(problems)
    return [tensor for _, _, tensor in spans]


def _read_header(path: Path, file: str) -> tuple[dict[str, Any], int, int]:
    """(header, offset of the data, bytes of data)."""
    try:
        if path.is_fifo():  # its reader would wait for ever
            raise InputError(f"{file}: expected a file, found a pipe")
        size = path.stat().st_size
        with open(path, "rb") as f:
            start = f.read(8)
            if len(start) < 8:
                raise InputError(f"{file}: expected a safetensors header, found {len(start)} bytes (truncated?)")
            length = int.from_bytes(start, "little")
            if length > min(_MAX_HEADER, size - 8):
                raise InputError(
                    f"{file}: header: expected at most {min(_MAX_HEADER, size - 8)} bytes, found a length of {length}"
                )
            raw = f.read(length)
    except FileNotFoundError:
        raise InputError(f"{file}: expected a file, found none") from None
    except OSError as e:
        raise InputError(f"{file}: cannot be read ({e.strerror})") from None
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique_keys)
    except (UnicodeDecodeError, ValueError, RecursionError) as e:
        raise InputError(f"{file}: header: expected JSON, found something else ({e})") from None
    if not isinstance(header, dict):
        raise InputError(f"{file}: header: expected an object, found {type(header).__name__}")
    return header, 8 + length, size - 8 - length


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"key {key!r} appears twice")
        result[key] = value
    return result


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _read_entry(path: Path, file: str, data_start: int, key: str, entry: Any) -> tuple[int, int, SourceTensor]:
    """(start, stop, tensor) of one header entry; start and stop count from the data's start."""
    if not isinstance(entry, dict):
        raise InputError(f"{file}: {key}: expected an object, found {type(entry).__name__}")
    name = entry.get("dtype")
    dtype = DTYPES.get(name) if isinstance(name, str) else None
    if dtype is None:
        raise InputError(f"{file}: {key}: dtype: expected one of {', '.join(DTYPES)}, found {name!r:.200}")
    shape, offsets = entry.get("shape"), entry.get("data_offsets")
    if not isinstance(shape, list) or not all(map(_is_count, shape)):
        raise InputError(f"{file}: {key}: shape: expected a list of sizes, found {shape!r}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
        raise InputError(f"{file}: {key}: data_offsets: expected two offsets, found {offsets!r}")
    start, stop = offsets
    expected = math.prod(shape) * dtype.itemsize
    if stop - start != expected:
        raise InputError(
            f"{file}: {key}: data_offsets: expected {expected} bytes for {name} {tuple(shape)}, found {stop - start}"
        )

    # no nested function: tests' type checker would decorate it anew for every tensor of every file
    rows = functools.partial(read_rows, path, data_start + start, dtype, tuple(shape[1:]))
    return start, stop, SourceTensor(file, key, dtype, tuple(shape), rows, data_start + start)


def read_rows(path: Path, start: int, dtype: np.dtype, row_shape: tuple[int, ...], first: int, last: int) -> np.ndarray:
    """`SourceTensor.rows` of values that lie in a file as they are, from `start` on."""
    row_bytes = math.prod(row_shape) * dtype.itemsize
    data = read_bytes(path, start + first * row_bytes, (last - first) * row_bytes)
    return data.view(dtype).reshape(last - first, *row_shape)


class TensorReader:
    """One of the project's own weight files, mapped tensor by tensor and slice by slice.

    types: {key: type} of tensors that are not of `FLOATS`.

    Raises:
        InputError: damaged, or not exactly the tensors of `shapes`; all problems at once.
    """

    def __init__(
        self, path: Path, shapes: Mapping[str, tuple[int, ...]], types: Mapping[str, str] = MappingProxyType({})
    ):
        self._path = path
        self._name = str(path)  # numpy resolves a Path anew for each mapping, which takes as long as the mapping
        self._tensors = {t.key: t for t in read_safetensors(path, str(path))}
        problems = [
            f"{path}: {key}: expected no such tensor, found {tensor.shape}"
            for key, tensor in self._tensors.items()
            if key not in shapes
        ]
        for key, shape in shapes.items():
            found = self._tensors[key].shape if key in self._tensors else "no such tensor"
            if found != shape:
                problems.append(f"{path}: {key}: expected shape {shape}, found {found}")
            elif (kind := dtype_name(self._tensors[key].dtype)) not in (expected := types.get(key, FLOATS)):
                names = expected if isinstance(expected, str) else ", ".join(expected)
                problems.append(f"{path}: {key}: expected type {names}, found {kind}")
        if problems:
            raise InputError(problems)

    @property
    def path(self) -> Path:
        """The file."""
        return self._path

    @property
    def keys(self) -> tuple[str, ...]:
        return tuple(self._tensors)

    def dtype(self, key: str) -> np.dtype:
        return self._tensors[key].dtype

    def slice(self, key: str, *index: int) -> np.ndarray:
        """Read-only view of one tensor, or of its part at `index` along the leading axes; unmapped when dropped."""
        tensor = self._tensors[key]
        assert tensor.start is not None, "a safetensors file holds its values as they are"
        offset, part = _part(key, tensor.shape, index)
        start = tensor.start + offset * tensor.dtype.itemsize
        return np.memmap(self._name, dtype=tensor.dtype, mode="r", offset=start, shape=part)


def _part(key: str, shape: tuple[int, ...], index: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
    """(offset in values, shape) of a tensor's part at `index` along its leading axes."""
    offset = 0
    for axis, i in enumerate(index):
        if not 0 <= i < shape[axis]:
            raise IndexError(f"{key}: index {index} is outside {shape}")
        offset += i * math.prod(shape[axis + 1 :])
    return offset, shape[len(index) :] or (1,)


class TensorWriter:
    """A safetensors file at its full size, zero-filled, whose tensors are then filled slice by slice.

    Args:
        path: the file to create; one that this very header begins and that has its full size is kept (`found`).
        specs: {key: (dtype, shape)}.

    Raises:
        InputError: the file cannot be created at that size.
    """

    def __init__(self, path: Path, specs: Mapping[str, tuple[np.dtype, tuple[int, ...]]]):
        self._path = path
        self._name = str(path)  # as in `TensorReader`
        self._specs = {key: (np.dtype(dtype), shape) for key, (dtype, shape) in specs.items()}
        # "pt" is what transformers and peft expect of every file that they are to load.
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        # Widest types first: every tensor then starts at a multiple of its item size.
        for key, (dtype, shape) in sorted(self._specs.items(), key=lambda item: (-item[1][0].itemsize, item[0])):
            size = math.prod(shape) * dtype.itemsize
            header[key] = {"dtype": dtype_name(dtype), "shape": list(shape), "data_offsets": [end, end + size]}
            end += size
        text = json.dumps(header, separators=(",", ":")).encode("utf-8")
        text += b" " * (-len(text) % 8)
        self._starts = {
            key: 8 + len(text) + entry["data_offsets"][0] for key, entry in header.items() if key in self._specs
        }
        text = len(text).to_bytes(8, "little") + text
        size = len(text) + end
        try:
            whole = path.exists() and path.stat().st_size == size
            self.found = whole and read_bytes(path, 0, len(text)).tobytes() == text
            if not self.found:
                with open(path, "wb") as f:
                    f.write(text)
                    f.flush()
                    _reserve(f.fileno(), size)
        except OSError as e:
            raise InputError(f"{path}: cannot be written at {size} bytes ({e.strerror})") from None

    def slice(self, key: str, *index: int) -> np.ndarray:
        """Writable view of one tensor, or of its part at `index` along the leading axes; unmapped when dropped."""
        dtype, shape = self._specs[key]
        offset, part = _part(key, shape, index)
        start = self._starts[key] + offset * dtype.itemsize
        return np.memmap(self._name, dtype=dtype, mode="r+", offset=start, shape=part)

    def sync(self) -> None:
        """Returns once all that was written so far is on disk."""
        fd = os.open(self._path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def _reserve(fd: int, size: int) -> None:
    """Grows the file to `size` zero bytes, on disk where the system can promise that."""
    # Without the promise a full disk would kill the process (SIGBUS) at some later write through the mapping.
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(fd, 0, size)
    else:
        os.ftruncate(fd, size)
