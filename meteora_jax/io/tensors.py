"""The weight file of a data folder: `weights.safetensors`, whose tensors are exactly those that the folder's JSON
description implies; anything else is refused, all problems at once.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from meteora_jax.config import InputError
from meteora_jax.io.files import refuse_foreign, whole_folder, write_json

WEIGHTS = "weights.safetensors"
FLOATS = {  # as the format calls them
    "F64": np.dtype("<f8"), "F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype(ml_dtypes.bfloat16)
}  # fmt: skip


def open_tensors(
    path: Path, shapes: Mapping[str, tuple[int, ...]], types: Mapping[str, str] = MappingProxyType({})
) -> Any:
    """A weight file that holds exactly the tensors `shapes` names, none of them read yet.

    types: {path: type as the format calls it} of tensors that are not to be cast.

    Raises:
        InputError: the file is missing or damaged, or a tensor is missing, unknown or of another shape or type.
    """
    if not path.is_file():
        raise InputError(f"{path}: expected a file, found none")
    try:
        file = safe_open(path, "np")
    except SafetensorError as e:
        raise InputError(f"{path}: expected a complete safetensors file, found a damaged one ({e})") from None
    found = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 (not a dict)
    problems = [f"{path}: {k}: expected no such tensor, found {found[k]}" for k in sorted(found.keys() - shapes)]
    for key, shape in shapes.items():
        if found.get(key) != shape:
            problems.append(f"{path}: {key}: expected shape {shape}, found {found.get(key, 'no such tensor')}")
        elif key in types and (kind := file.get_slice(key).get_dtype()) != types[key]:
            problems.append(f"{path}: {key}: expected type {types[key]}, found {kind}")
    if problems:
        raise InputError(problems)
    return file


def map_tensors(path: Path) -> dict[str, np.ndarray]:
    """All tensors of a weight file that `open_tensors` found in order, none of them read: views of the mapped file.

    Raises:
        InputError: a tensor of another type than floating point.
    """
    whole = np.memmap(path, np.uint8, "r").view(np.ndarray)
    start = 8 + int(whole[:8].view("<u8")[0])
    found = {}
    for key, held in json.loads(whole[8:start].tobytes()).items():
        if key == "__metadata__":
            continue
        if held["dtype"] not in FLOATS:
            raise InputError(f"{path}: {key}: expected type {', '.join(FLOATS)}, found {held['dtype']}")
        first, end = held["data_offsets"]
        found[key] = whole[start + first : start + end].view(FLOATS[held["dtype"]]).reshape(held["shape"])
    return found


def mapping_of(values: np.ndarray) -> mmap.mmap:
    """The mapped file that a tensor of `map_tensors`, or a part of one, is a view of."""
    mapped: Any = values
    while isinstance(mapped, np.ndarray):
        mapped = mapped.base
    return mapped


def read_ahead(values: np.ndarray) -> None:
    """Begins to read a mapped tensor's part from the disk, where the system can: all pieces along the first axis, which
    lie apart in the file. Else each piece is waited for before the next is asked for, and what the system reads beyond
    its end belongs to other parts."""
    if not (hasattr(mmap, "MADV_WILLNEED") and values.size):
        return
    file = mapping_of(values)
    start = np.frombuffer(file, np.uint8).__array_interface__["data"][0]
    for piece in values if values.ndim > 2 else (values,):
        first = piece.__array_interface__["data"][0] - start
        page = first % mmap.PAGESIZE
        file.madvise(mmap.MADV_WILLNEED, first - page, piece.nbytes + page)


def all_finite(values: np.ndarray) -> bool:
    """Whether all values are finite numbers. Bits grow with the number: the largest of those without a sign and the
    largest with one tell, and no memory is needed, which costs more than looking."""
    size = values.dtype.itemsize
    beyond = int(np.asarray(np.inf, values.dtype).view(f"u{size}"))
    most, least = (int(values.view(f"{kind}{size}").max(initial=0)) for kind in "iu")
    return most < beyond and least < beyond + (1 << 8 * size - 1)


def read_tensors(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Reads exactly the tensors `shapes` names. Raises InputError as `open_tensors`."""
    file = open_tensors(path, shapes)
    return {key: file.get_tensor(key) for key in shapes}


class StoredArray:
    """Tensors of a file side by side along their last axis, cast; indexing reads the part that is asked for, no more.

    So a base of any size goes to its devices with one leaf on the host at a time, and where a mesh splits it with one
    device's part of a leaf; a host never reads what none of its own devices holds.
    """

    def __init__(self, file: Any, keys: Sequence[str], dtype: DTypeLike, shards: int = 1):
        self._source = file, keys, dtype
        parts = [file.get_slice(key) for key in keys]
        widths = [part.get_shape()[-1] // shards for part in parts]
        # (tensor, its first column here, how many): as they follow each other in `shard_order`
        self._pieces = [(p, i * w, w) for i in range(shards) for p, w in zip(parts, widths, strict=True)]
        self.shape = (*parts[0].get_shape()[:-1], shards * sum(widths))
        self.dtype = np.dtype(dtype)
        # values of 8 bit floating point are stored as their bits
        self._held = np.dtype(np.uint8) if parts[0].get_dtype() == "U8" and self.dtype.itemsize == 1 else self.dtype

    def in_shards(self, shards: int) -> StoredArray:
        """The same with its columns in so many parts, each with its share of every tensor."""
        return StoredArray(*self._source, shards)

    def __getitem__(self, part: tuple[slice, ...]) -> np.ndarray:
        *rest, columns = (range(size)[s] for size, s in zip(self.shape, part, strict=True))
        out = np.empty((*map(len, rest), len(columns)), self._held)
        where = tuple(slice(r.start, r.stop) for r in rest)
        start = 0
        for stored, offset, width in self._pieces:
            first, last = max(columns.start, start), min(columns.stop, start + width)
            if first < last and out.size:
                out[..., first - columns.start : last - columns.start] = stored[
                    (*where, slice(offset + first - start, offset + last - start))
                ]
            start += width
        return out.view(self.dtype)

    def first(self, count: int) -> np.ndarray:
        """The first `count` values in row-major order, [count]; all where there are fewer."""
        taken, part = 1, []
        for size in reversed(self.shape):
            part.append(slice(min(size, -(-count // taken))))
            taken *= part[-1].stop
        return self[tuple(reversed(part))].reshape(-1)[:count]

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> np.ndarray:
        whole = self[(slice(None),) * len(self.shape)]
        return whole if dtype is None else whole.astype(dtype, copy=False)


def write_folder(folder: Path, name: str, description: Any, tensors: dict[str, np.ndarray]) -> None:
    """Writes `weights.safetensors` and the description `name`, whole or not at all; an existing folder is replaced
    only once the new one is complete.

    Raises:
        InputError: the existing one has no such description, or holds other files.
    """
    refuse_foreign(folder, name, WEIGHTS)
    with whole_folder(folder) as partial:
        save_file(tensors, partial / WEIGHTS)
        (partial / WEIGHTS).chmod(0o644)  # safetensors keeps others from reading
        write_json(partial / name, description)
