"""A matrix in 8 or 4 bits, and what its numbers mean.

    8 bit    W[i, o] = scale[o] * values[i, o]                                   int8, or fp8 (e4m3)
    4 bit    W[i, o] = scale[i // S, o] * (q[i, o] - zero[i // S, o])            q in 0..15, S inputs a group

Two q's share a byte: that of an even input is the lower half. `turned`, as GPUs read it, a byte's halves are inputs j
and j + S / 2 of a group, so that a product takes each half with inputs that lie side by side.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedWeight:
    """values int8 or float8_e4m3fn [I, O] with scale float32 [O] and no zero; or uint8 [I / 2, O] with scale float32
    [G, O] and zero uint8 [G, O]. turned: values lie as [O, I], or [O, I / 2]; the others as they were. All may be
    stacked over layers."""

    values: Any
    scale: Any
    zero: Any = None
    turned: bool = dataclasses.field(default=False, metadata={"static": True})

    @property
    def shape(self) -> tuple[int, int]:
        """(I, O)."""
        width, total = self.values.shape[:-3:-1] if self.turned else self.values.shape[-2:]
        return width * (1 if self.zero is None else 2), total

    @property
    def group(self) -> int:
        """S; 0 in 8 bit."""
        return 0 if self.zero is None else self.shape[0] // self.scale.shape[-2]


def turn(values: jax.Array, group: int) -> jax.Array:
    """Values [I, O] or [I / 2, O] as `turned` ones. group: of `QuantizedWeight`."""
    if group:
        q = jnp.stack((values & 15, values >> 4), axis=1).reshape(-1, 2, group // 2, values.shape[-1])
        values = (q[:, 0] | (q[:, 1] << 4)).reshape(values.shape)
    return values.T


def turn_back(values: jax.Array, group: int) -> jax.Array:
    """What `turn` made those of."""
    values = values.T
    if group:
        halves = values.reshape(-1, group // 2, values.shape[-1])
        q = jnp.concatenate((halves & 15, halves >> 4), axis=1).reshape(-1, 2, values.shape[-1])
        values = q[:, 0] | (q[:, 1] << 4)
    return values
