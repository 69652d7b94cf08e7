"""A matrix in 8 or 4 bits, and what its numbers mean.

    8 bit    W[i, o] = scale[o] * values[i, o]                                   int8, or fp8 (e4m3)
    4 bit    W[i, o] = scale[i // S, o] * (q[i, o] - zero[i // S, o])            q in 0..15, S inputs a group

Two q's share a byte: that of an even input is the lower half. GPUs read `words` of four bytes, n = 4 values or 8
halves, the lowest first: in each block of B inputs the values of word j are inputs j, j + B / n, j + 2 B / n and so on,
so that a product takes those at one place in their words with inputs that lie side by side.
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
    [G, O] and zero uint8 [G, O]. turned: values lie as [O, I], or [O, I / 2]; the others as they were. words: inputs of
    a turned matrix lie as words, and zero as `turn_zero` has it. All may be stacked over layers."""

    values: Any
    scale: Any
    zero: Any = None
    turned: bool = dataclasses.field(default=False, metadata={"static": True})
    words: bool = dataclasses.field(default=False, metadata={"static": True})

    @property
    def shape(self) -> tuple[int, int]:
        """(I, O)."""
        width, total = self.values.shape[:-3:-1] if self.turned else self.values.shape[-2:]
        return width * (1 if self.zero is None else 2), total

    @property
    def group(self) -> int:
        """S; 0 in 8 bit."""
        return 0 if self.zero is None else self.shape[0] // self.scale.shape[-2]


def word_block(width: int, group: int) -> int:
    """B of so many inputs in groups of `group` (0: 8 bit): at least 16 to a place in the words, at most four groups.

    0 where there is none; then words are not made.
    """
    blocks = [b for b in (256, 128, 64) if width % b == 0]
    if group:
        blocks = [b for b in blocks if b > 64 and (group % b == 0 or (b % group == 0 and b <= 4 * group))]
    return blocks[0] if blocks else 0


def in_words(x: jax.Array, group: int, back: bool = False) -> jax.Array:
    """x [.., I], its inputs in the order of the words; back: the other way round."""
    places, block = 8 if group else 4, word_block(x.shape[-1], group)
    if not block:
        return x
    sides = (block // places, places) if back else (places, block // places)
    return jnp.swapaxes(x.reshape(*x.shape[:-1], -1, *sides), -1, -2).reshape(x.shape)


def halves(values: jax.Array) -> jax.Array:
    """Bytes [.., I / 2] -> their halves [.., I], the lower first."""
    return jnp.stack((values & 15, values >> 4), axis=-1).reshape(*values.shape[:-1], -1)


def bytes_of(q: jax.Array) -> jax.Array:
    """What `halves` made those of."""
    return q[..., ::2] | (q[..., 1::2] << 4)


def turn(values: jax.Array, group: int) -> jax.Array:
    """Values [I, O] or [I / 2, O] in words [O, I] or [O, I / 2]. group: of `QuantizedWeight`."""
    return bytes_of(in_words(halves(values.T), group)) if group else in_words(values.T, 0)


def turn_zero(zero: jax.Array, width: int) -> jax.Array:
    """Zeros [G, O] beside words: [O, 4 I / B], the bytes of a word for each block those of its groups, as far as it has
    any. width: I."""
    group = width // zero.shape[0]
    block = word_block(width, group)
    each = jnp.repeat(zero.T, max(1, group // block), axis=1).reshape(zero.shape[1], width // block, -1)
    return jnp.pad(each, ((0, 0), (0, 0), (0, 4 - each.shape[2]))).reshape(zero.shape[1], -1)


def turn_zero_back(zero: jax.Array, groups: int, width: int) -> jax.Array:
    """What `turn_zero` made those of."""
    block = word_block(width, width // groups)
    each = zero.reshape(len(zero), width // block, 4)[:, :, : max(1, block * groups // width)].reshape(len(zero), -1)
    return each[:, :: each.shape[1] // groups].T


def turn_back(values: jax.Array, group: int) -> jax.Array:
    """What `turn` made those of."""
    if group:
        return bytes_of(in_words(halves(values), group, back=True)).T
    return in_words(values, 0, back=True).T
