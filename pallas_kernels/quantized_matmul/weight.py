"""A matrix in 8 or 4 bits, and what its numbers mean.

    8 bit    W[i, o] = scale[o] * values[i, o]                                   int8, or fp8 (e4m3)
    4 bit    W[i, o] = scale[i // S, o] * (q[i, o] - zero[i // S, o])            q in 0..15, S inputs a group

Two q's share a byte: that of an even input is the lower half.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedWeight:
    """values int8 or float8_e4m3fn [I, O] with scale float32 [O] and no zero; or uint8 [I / 2, O] with scale float32
    [G, O] and zero uint8 [G, O]. turned: values lie as [O, I], 8 bit alone."""

    values: Any
    scale: Any
    zero: Any = None
    turned: bool = dataclasses.field(default=False, metadata={"static": True})

    @property
    def shape(self) -> tuple[int, int]:
        """(I, O)."""
        first, second = self.values.shape
        if self.turned:
            return second, first
        return first * (1 if self.zero is None else 2), second
