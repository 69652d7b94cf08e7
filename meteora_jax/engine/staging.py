"""One adapter on the host as a slot holds it: memory that is filled, handed to the device, and filled again.

New memory costs more than what is written into it: the system clears each page when it is first touched. So a thread
keeps its buffers. On one device they are one array a type, whose parts a program takes apart: a copy is a transfer or
two, whatever the number of the model's arrays. On a mesh, which cuts each array its own way, every array is one.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding

Path = tuple[str, ...]
# what goes into a slot, on the devices: by the buffer's name
Staged = Mapping[str, Any]
ALIGNED = 128  # bytes: no part begins within another's cache line


@dataclasses.dataclass(frozen=True)
class Part:
    """Where a leaf's value of one slot lies: shape and type, in which buffer, from which of its elements on."""

    shape: tuple[int, ...]
    dtype: np.dtype
    buffer: str
    start: int

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    def of(self, buffer: Any) -> Any:
        """The value in its buffer, host's (a view) or device's."""
        if buffer.ndim > 1:
            return buffer
        return buffer[self.start : self.start + self.size].reshape(self.shape)


class Layout:
    """How the leaves of a slot lie in buffers."""

    def __init__(
        self, leaves: Mapping[Path, tuple[tuple[int, ...], np.dtype]], where: Mapping[Path, Sharding] | None = None
    ):
        """leaves: each one's shape and type in a slot. where: they go on a mesh; None: all to the default device."""
        self.parts: dict[Path, Part] = {}
        self._sizes: dict[str, tuple[tuple[int, ...], np.dtype]] = {}
        for path, (shape, dtype) in sorted(leaves.items()):
            name, start = "/".join(path), 0
            if where is None:
                name = str(dtype)
                (start,) = self._sizes.get(name, ((0,), dtype))[0]
                step = ALIGNED // dtype.itemsize
                self._sizes[name] = (start + -(-math.prod(shape) // step) * step,), dtype
            else:
                self._sizes[name] = shape, dtype
            self.parts[path] = Part(shape, dtype, name, start)
        one = SingleDeviceSharding(jax.devices()[0])
        self._where = dict.fromkeys(self._sizes, one) if where is None else {"/".join(p): s for p, s in where.items()}

    @property
    def key(self) -> tuple[tuple[Path, Part], ...]:
        """The same for equal layouts; hashable."""
        return tuple(self.parts.items())

    def buffers(self) -> Buffers:
        """Memory for one slot."""
        return Buffers(self)

    def memory(self) -> dict[str, np.ndarray]:
        """Each buffer's, with anything in it."""
        return {name: empty(shape, dtype) for name, (shape, dtype) in self._sizes.items()}

    def send(self, arrays: Mapping[str, np.ndarray]) -> Staged:
        """Buffers on their way to the devices."""
        return put(arrays, self._where)

    def shared(self) -> bool:
        """Whether the devices' arrays may be the host's memory itself: a CPU's."""
        return any(device.platform == "cpu" for where in self._where.values() for device in where.device_set)


class Buffers:
    """Host memory for one slot; of one thread. views: of each leaf its part of what is sent next."""

    def __init__(self, layout: Layout):
        self._layout = layout
        self._renew()

    def send(self) -> Staged:
        """What lies in `views`, on the devices, which have read it when this returns; `views` may be filled again."""
        staged = self._layout.send(self._arrays)
        jax.block_until_ready(staged)
        if self._layout.shared():
            self._renew()
        return staged

    def _renew(self) -> None:
        self._arrays = self._layout.memory()
        self.views = {path: part.of(self._arrays[part.buffer]) for path, part in self._layout.parts.items()}


def put(arrays: Mapping[str, np.ndarray], where: Mapping[str, Sharding]) -> dict[str, Any]:
    """Host arrays on their devices, in one call; these may still be reading them."""
    return jax.device_put(dict(arrays), {name: where[name] for name in arrays})


def empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """As numpy's; it begins where a CPU's devices use it as it lies."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + ALIGNED, np.uint8)
    start = -memory.ctypes.data % ALIGNED
    return memory[start : start + size].view(dtype).reshape(shape)


def fill(into: np.ndarray, value: np.ndarray | None, fill_value: int = 0) -> None:
    """A value in the first places of each axis, cast, and `fill_value` in all others; None: there alone."""
    if value is None or value.shape != into.shape:
        into.fill(fill_value)
    if value is not None:
        np.copyto(into[tuple(map(slice, value.shape))], value, casting="unsafe")
