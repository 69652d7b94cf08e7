"""Attention over blocks on a CPU: of a table no more is read than is filled, some blocks at a time (the online softmax
of Milakov and Gimelshein, arXiv 1805.02867), so that a program's time does not depend on how wide its tables are.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.routed_lora.reference import einsum_float32

if TYPE_CHECKING:
    from pallas_kernels.paged_attention.api import StepTokens

SLOTS = 128  # that are read at a time: their scores stay in the cores' caches
TOGETHER = 8  # sequences that decode, or runs of prompts, as far as the longest of them


def attend(
    q: Float[Array, "B T N H"],
    pages: Float[Array, "X Bs K2 H"],
    tables: Int32[Array, "B W"],
    positions: Int32[Array, "B T"],
    window: int | None,
) -> Float[Array, "B T NH"]:
    """T tokens of each of B sequences at these positions (negative: none) over the blocks in their tables."""
    count, length, heads, width = q.shape
    size, kv = pages.shape[1], pages.shape[2] // 2
    columns = min(tables.shape[1], max(SLOTS // size, 1))
    tables = jnp.pad(tables, ((0, 0), (0, -tables.shape[1] % columns)))  # beyond the last position: not seen
    grouped = q.reshape(count, length, kv, heads // kv, width)
    read = columns * size
    last = jnp.max(positions)
    first = jnp.where(positions < 0, last, positions).min() + 1 - window if window is not None else 0

    def step(i: jax.Array, carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        highest, total, mixed = carry
        blocks = jax.lax.dynamic_slice_in_dim(tables, i * columns, columns, axis=1)
        held = pages[blocks].reshape(count, read, 2 * kv, width)
        slots = i * read + jnp.arange(read, dtype=jnp.int32)[None, None]
        seen = slots <= positions[..., None]
        if window is not None:
            seen &= slots > positions[..., None] - window
        seen = seen[:, :, None, None]
        scores = einsum_float32(q.dtype, "btkgh,bskh->btkgs", grouped, held[:, :, 0::2]) * width**-0.5
        scores = jnp.where(seen, scores, jnp.finfo(jnp.float32).min)
        higher = jnp.maximum(highest, scores.max(-1))
        weights = jnp.where(seen, jnp.exp(scores - higher[..., None]), 0.0)
        kept = jnp.exp(highest - higher)
        # behind a sequence's end stands what others wrote there, and zero times their infinity is no number
        own = (slots[0] <= positions.max(-1, keepdims=True))[..., None, None]
        values = jnp.where(own, held[:, :, 1::2], 0)
        more = einsum_float32(q.dtype, "btkgs,bskh->btkgh", weights.astype(pages.dtype), values)
        return higher, total * kept + weights.sum(-1), mixed * kept[..., None] + more

    start = (
        jnp.full(grouped.shape[:-1], jnp.finfo(jnp.float32).min),
        jnp.zeros(grouped.shape[:-1], jnp.float32),
        jnp.zeros(grouped.shape, jnp.float32),
    )
    _, total, mixed = jax.lax.fori_loop(jnp.maximum(first, 0) // read, last // read + 1, step, start)
    found = mixed / jnp.where(total == 0, 1.0, total)[..., None]
    return found.astype(q.dtype).reshape(count, length, heads * width)


def paged_attention(
    q: Float[Array, "M N H"],
    pages: Float[Array, "X Bs K2 H"],
    tokens: StepTokens,
    first_block: jax.Array | int,
    window: int | None,
) -> Float[Array, "M NH"]:
    """As `api.paged_attention` says."""
    rows, runs, heads = tokens.decoding, len(tokens.runs), q.shape[1:]
    tables = tokens.tables + first_block

    def mapped(first: int, last: int, tables: jax.Array) -> jax.Array:
        """The tokens from first to last, as many of each table's sequence."""
        together = math.gcd(len(tables), TOGETHER)
        parts, length = len(tables) // together, (last - first) // len(tables)
        given = (
            q[first:last].reshape(parts, together, length, *heads),
            tables.reshape(parts, together, -1),
            tokens.positions[first:last].reshape(parts, together, length),
        )
        found = jax.lax.map(lambda some: attend(some[0], pages, some[1], some[2], window), given)
        return found.reshape(last - first, math.prod(heads))

    decoded = mapped(0, rows, tables)
    return jnp.concatenate([decoded, mapped(rows, len(q), tables[tokens.runs])]) if runs else decoded
