"""The specification: every sequence's keys and values read out of their blocks, and plain attention over them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.routed_lora.reference import einsum_float32

if TYPE_CHECKING:
    from pallas_kernels.paged_attention.api import StepTokens

GATHERED = 1 << 28  # bytes of keys and values that are read out of their blocks at a time


def attend(q: jax.Array, keys: jax.Array, values: jax.Array, positions: jax.Array, window: int | None) -> jax.Array:
    """q [T, N, H] at positions int32 [T] (negative: none) over keys and values [S, K, H] at 0, 1, .. -> [T, N H]."""
    count, heads, width = q.shape
    slots = jnp.arange(keys.shape[0], dtype=jnp.int32)[None, :]
    seen = slots <= positions[:, None]
    if window is not None:
        seen &= slots > positions[:, None] - window
    grouped = q.reshape(count, keys.shape[1], -1, width)
    scores = einsum_float32(q.dtype, "tkgh,skh->tkgs", grouped, keys) * width**-0.5
    scores = jnp.where(seen[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jnp.where(seen[:, None, None], jax.nn.softmax(scores, axis=-1), 0.0).astype(values.dtype)
    # behind the sequence's end stands what others wrote there, and zero times their infinity is no number
    values = jnp.where((slots[0] <= positions.max())[:, None, None], values, 0)
    return jnp.einsum("tkgs,skh->tkgh", weights, values).reshape(count, heads * width)


def paged_attention(
    q: Float[Array, "M N H"],
    pages: Float[Array, "X Bs K2 H"],
    tokens: StepTokens,
    first_block: jax.Array | int,
    window: int | None,
) -> Float[Array, "M NH"]:
    """As `api.paged_attention` says."""
    rows, width = tokens.decoding, q.shape[-1]

    def sequence(table: jax.Array) -> tuple[jax.Array, jax.Array]:
        held = pages[table + first_block].reshape(-1, *pages.shape[2:])
        return held[:, 0::2], held[:, 1::2]

    def one(given: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        q, table, position = given
        return attend(q, *sequence(table), position, window)

    given = q[:rows, None], tokens.tables, tokens.positions[:rows, None]
    bytes_of_row = tokens.tables.shape[1] * math.prod(pages.shape[1:]) * pages.dtype.itemsize
    together = 1 << max(GATHERED // bytes_of_row, 1).bit_length() - 1
    decoded = jax.vmap(one)(given) if rows <= together else jax.lax.map(one, given, batch_size=together)
    parts = [decoded.reshape(rows, -1)]
    if len(tokens.runs):
        size = (len(q) - rows) // len(tokens.runs)
        runs = q[rows:].reshape(-1, size, *q.shape[1:]), tokens.positions[rows:].reshape(-1, size)
        read = jax.lax.map(one, (runs[0], tokens.tables[tokens.runs], runs[1]))  # a run's scores at a time
        parts.append(read.reshape(-1, q.shape[1] * width))
    return jnp.concatenate(parts)
