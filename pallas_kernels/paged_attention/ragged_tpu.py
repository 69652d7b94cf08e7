"""TPUs: attention over blocks by JAX's own kernel, `jax.experimental.pallas.ops.tpu.ragged_paged_attention`.

It reads blocks where they lie, and the cache has the layout that it needs. A sequence of it is a decoding row, or all
runs of one row's prompt; its queries are the last of the tokens that it is told there are. So a run's padding counts as
tokens behind the prompt, and what those read means nothing.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

if TYPE_CHECKING:
    from pallas_kernels.paged_attention.api import StepTokens

LANES = 128  # of a register: what a head's width is a multiple of
BLOCKS = 1 << 20  # bytes of keys and values that are read at a time; the kernel's own table asks for the device
QUERIES = 32  # tokens of a program
TABLES = 1 << 18  # entries of all sequences' tables, which lie in scalar memory


def refusal(heads: int, kv: int, width: int, dtype: jnp.dtype) -> str | None:
    """Why the kernel does not serve such heads; None where it does."""
    packing = 4 // dtype.itemsize  # values of a register's lane
    if dtype.itemsize not in (2, 4) or width % LANES:
        return f"expected heads of a multiple of {LANES} in float32 or bfloat16, found {width} in {dtype.name}"
    tiled, rest = divmod(2 * kv, packing)
    if rest or (tiled not in (1, 2, 4) and tiled % 8):
        return f"expected 1, 2, 4 or a multiple of 8 heads of keys and values in a tile, found {kv}"
    return None if heads % kv == 0 else f"expected a multiple of {kv} heads, found {heads}"


def sequences(tokens: StepTokens, block: int) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """A step as the kernel has it: kv_lens int32 [S], page_indices int32 [S, W + 1], cu_q_lens int32 [S + 1], num_seqs
    int32 [1]; S the rows that decode and as many prompts as there may be. block: QUERY_BLOCK."""
    rows, runs = tokens.decoding, tokens.runs
    lengths = jnp.maximum(tokens.positions[:rows], 0) + 1
    counts = jnp.ones((rows,), jnp.int32)
    tables = jnp.pad(tokens.tables, ((0, 0), (0, 1)))  # padding may reach a block further
    number = jnp.asarray([rows], jnp.int32)
    if len(runs):
        most = min(rows, len(runs))
        first = tokens.positions[rows::block]  # of each run; those of no prompt come last
        real = first >= 0
        begins = real & jnp.concatenate([jnp.ones((1,), bool), runs[1:] != runs[:-1]])
        prompt = jnp.where(real, jnp.cumsum(begins.astype(jnp.int32)) - 1, most)  # which one a run belongs to
        begin = jnp.where(begins, prompt, most)

        def of_prompt(values: jax.Array, at: jax.Array) -> jax.Array:
            return jnp.zeros((most,), jnp.int32).at[at].add(values.astype(jnp.int32), mode="drop")

        read = of_prompt(jnp.full(runs.shape, block), prompt)
        lengths = jnp.concatenate([lengths, of_prompt(first, begin) + read])
        counts = jnp.concatenate([counts, read])
        tables = jnp.concatenate([tables, tables[of_prompt(runs, begin)]])
        number += jnp.sum(begins.astype(jnp.int32))
    starts = jnp.concatenate([jnp.zeros((1,), jnp.int32), jnp.cumsum(counts).astype(jnp.int32)])
    return lengths, tables, starts, number


def paged_attention(
    q: Float[Array, "M N H"],
    pages: Float[Array, "X Bs K2 H"],
    tokens: StepTokens,
    first_block: jax.Array | int,
    window: int | None,
    block: int,
) -> Float[Array, "M NH"]:
    """As `api.paged_attention` says; block: QUERY_BLOCK."""
    from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention

    rows, heads, width = q.shape
    why = refusal(heads, pages.shape[2] // 2, width, pages.dtype)
    if why is not None:
        raise NotImplementedError(f"paged_attention on TPUs: {why}")
    lengths, tables, starts, number = sequences(tokens, block)
    if tables.size > TABLES:
        raise NotImplementedError(f"paged_attention on TPUs: expected at most {TABLES} blocks, found {tables.size}")
    together = max(1, min(tables.shape[1], BLOCKS // (pages.dtype.itemsize * math.prod(pages.shape[1:]))))
    y = ragged_paged_attention(
        q, pages, lengths, tables + first_block, starts, number, sm_scale=width**-0.5, sliding_window=window,
        num_kv_pages_per_block=together, num_queries_per_block=min(QUERIES, rows),
    )  # fmt: skip
    return jnp.where((tokens.positions >= 0)[:, None], y.reshape(rows, -1), 0)
