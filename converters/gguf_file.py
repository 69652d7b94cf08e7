"""Reading `.gguf` files: metadata, and tensors dequantised row block by row block.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2 and 3, little-endian). The header is
parsed here, each length checked against the file's size, because `gguf.GGUFReader` trusts the lengths it finds (a
corrupt one exhausts memory) and keeps one array per token; block layouts and dequantising are `gguf`'s.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import mmap
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from converters.tensor_files import SourceTensor, read_bytes
from meteora_jax.config import InputError

_FLOATS = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
_SCALARS = {
    0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8",
}  # fmt: skip
_STRING, _ARRAY = 8, 9
_DEFAULT_ALIGNMENT = 32


@dataclasses.dataclass(frozen=True)
class GgufFile:
    """A GGUF file's contents: metadata values as Python ints, floats, bools, strings and lists of them."""

    path: Path
    metadata: dict[str, Any]
    tensors: list[SourceTensor]


@dataclasses.dataclass(frozen=True)
class _TensorInfo:
    key: str
    shape: tuple[int, ...]  # rows first, unlike the file's own order
    type_id: int
    offset: int


def read_gguf(path: Path) -> GgufFile:
    """Parses the header of a GGUF file and checks it against the file's size.

    Raises:
        InputError: not GGUF, truncated, corrupt, tensor types that are not supported (all of them, by name), or the
            `gguf` package is absent.
    """
    metadata, infos, data_start, size = _read_header(path)
    problems: list[str] = []
    tensors: list[SourceTensor] = []
    seen: set[str] = set()
    for info in infos:
        if info.key in seen:
            problems.append(f"{path.name}: {info.key}: expected once, found twice")
        seen.add(info.key)
        try:
            tensors.append(_open_tensor(path, info, data_start, size))
        except InputError as e:
            problems += e.problems
    if problems:
        raise InputError(problems)
    return GgufFile(path, metadata, tensors)


def _open_tensor(path: Path, info: _TensorInfo, data_start: int, file_size: int) -> SourceTensor:
    try:
        import gguf
    except ModuleNotFoundError:
        raise InputError(
            f"{path.name}: expected the package gguf to read it, found none: install extra `convert`"
        ) from None
    names = {int(t): t.name for t in gguf.GGMLQuantizationType}
    kind = names.get(info.type_id, str(info.type_id))
    if kind not in readable_types():
        raise InputError(f"{path.name}: {info.key}: expected type {', '.join(readable_types())}, found {kind}")
    qtype = gguf.GGMLQuantizationType[kind]
    block, block_bytes = gguf.GGML_QUANT_SIZES[qtype]
    if info.shape[-1] % block:
        raise InputError(f"{path.name}: {info.key}: expected rows of whole {block}-value blocks, found {info.shape}")
    start = data_start + info.offset
    end = start + math.prod(info.shape) // block * block_bytes
    if end > file_size:
        raise InputError(
            f"{path.name}: {info.key}: expected data up to byte {end}, found {file_size} bytes (truncated?)"
        )
    float_type = _FLOATS.get(kind)
    rows = functools.partial(_read_rows, path, start, end, info.shape[1:], qtype, float_type)
    return SourceTensor(path.name, info.key, float_type or np.dtype(np.float32), info.shape, rows, stored=kind)


def _read_rows(
    path: Path, start: int, end: int, row_shape: tuple[int, ...], qtype: Any, float_type: np.dtype | None,
    first: int, last: int,
) -> np.ndarray:  # fmt: skip
    """`SourceTensor.rows` of the bytes from `start` to `end`: of `float_type` as they are, or else dequantised."""
    import gguf

    if not row_shape:  # one-dimensional: a "row" is a value, and a block of values cannot be split
        data = read_bytes(path, start, end - start)
        values = data.view(float_type) if float_type else gguf.dequantize(data, qtype)
        return values[first:last]
    block, block_bytes = gguf.GGML_QUANT_SIZES[qtype]
    row_bytes = math.prod(row_shape) * block_bytes // block
    data = read_bytes(path, start + first * row_bytes, (last - first) * row_bytes)
    if float_type is not None:
        return data.view(float_type).reshape(last - first, *row_shape)
    with np.errstate(invalid="ignore", over="ignore"):  # values that are not finite are refused by name later
        return gguf.dequantize(data.reshape(last - first, -1), qtype).reshape(last - first, *row_shape)


@functools.cache
def readable_types() -> tuple[str, ...]:
    """The tensor types, by name, whose values the `gguf` package gives: floats, and what it dequantises."""
    import gguf

    def known(kind: gguf.GGMLQuantizationType) -> bool:
        block, size = gguf.GGML_QUANT_SIZES[kind]
        try:
            with np.errstate(all="ignore"):
                return gguf.dequantize(np.zeros((1, size), np.uint8), kind).shape == (1, block)
        except NotImplementedError:
            return False

    return tuple(dict.fromkeys([*_FLOATS, *(k.name for k in gguf.GGMLQuantizationType if known(k))]))


def _read_header(path: Path) -> tuple[dict[str, Any], list[_TensorInfo], int, int]:
    """(metadata, tensor infos, offset of the data, size of the file)."""
    try:
        if path.is_fifo():  # its reader would wait for ever
            raise InputError(f"{path.name}: expected a file, found a pipe")
        with open(path, "rb") as f:
            size = path.stat().st_size
            if size < 24:
                raise InputError(f"{path.name}: expected a GGUF header, found {size} bytes (truncated?)")
            with mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as data:
                header = _Header(data, size, path.name)
                return (*header.read(), size)
    except OSError as e:
        raise InputError(f"{path.name}: cannot be read ({e.strerror})") from None


class _Header:
    """A cursor over the header that never reads or allocates beyond the file."""

    def __init__(self, data: mmap.mmap, size: int, file: str):
        self.data, self.size, self.file, self.at = data, size, file, 0

    def take(self, count: int) -> bytes:
        if count > self.size - self.at:
            raise InputError(f"{self.file}: header: expected {count} bytes at {self.at}, found {self.size - self.at}")
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, layout: str) -> Any:
        return struct.unpack(layout, self.take(struct.calcsize(layout)))[0]

    def string(self) -> str:
        raw = self.take(self.number("<Q"))
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as e:
            raise InputError(f"{self.file}: header: expected UTF-8 before byte {self.at}, found others ({e})") from None

    def value(self, key: str, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind in _SCALARS:
            return self.scalars(kind, 1)[0]
        if kind != _ARRAY:
            raise InputError(f"{self.file}: {key}: expected a metadata type of 0 to 12, found {kind}")
        kind, count = self.number("<I"), self.number("<Q")
        if kind in _SCALARS:
            return self.scalars(kind, count)
        if kind != _STRING:
            raise InputError(f"{self.file}: {key}: expected an array of scalars or strings, found type {kind}")
        if count > (self.size - self.at) // 8:
            raise InputError(f"{self.file}: {key}: expected an array within the file, found {count} strings")
        return [self.string() for _ in range(count)]

    def scalars(self, kind: int, count: int) -> list[Any]:
        dtype = np.dtype(_SCALARS[kind])
        values = np.frombuffer(self.take(count * dtype.itemsize), dtype)
        if dtype == np.float32:
            # The shortest decimal that is this float32: 1e-05 rather than 9.999999747378752e-06.
            return [float(str(v)) for v in values]
        return values.tolist()

    def read(self) -> tuple[dict[str, Any], list[_TensorInfo], int]:
        magic, version = self.take(4), self.number("<I")
        if magic != b"GGUF":
            raise InputError(f"{self.file}: expected the magic b'GGUF', found {magic!r}")
        if version not in (2, 3):
            raise InputError(f"{self.file}: expected GGUF version 2 or 3, little-endian, found {version}")
        tensor_count, key_count = self.number("<Q"), self.number("<Q")
        metadata: dict[str, Any] = {}
        for _ in range(key_count):
            key = self.string()
            if key in metadata:
                raise InputError(f"{self.file}: {key}: expected once, found twice")
            metadata[key] = self.value(key, self.number("<I"))
        infos = [self.tensor_info() for _ in range(tensor_count)]
        alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise InputError(f"{self.file}: general.alignment: expected a power of two, found {alignment!r}")
        return metadata, infos, self.at + -self.at % alignment

    def tensor_info(self) -> _TensorInfo:
        key, axes = self.string(), self.number("<I")
        if not 1 <= axes <= 4:
            raise InputError(f"{self.file}: {key}: expected 1 to 4 axes, found {axes}")
        shape = tuple(self.number("<Q") for _ in range(axes))[::-1]
        return _TensorInfo(key, shape, self.number("<I"), self.number("<Q"))
