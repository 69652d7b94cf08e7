"""Attention of a step of the engine: some sequences decode one token, others read a part of their prompt.

Keys and values of all layers lie in one pool of blocks, `pages` [X, Bs, 2 K, H]: X blocks of Bs slots; of every slot
the key and the value of each head side by side (k0 v0 k1 v1 ...), as JAX's own `ragged_paged_attention` for TPUs has
them. A sequence's table names its blocks in order, so position p is slot p % Bs of its block p // Bs. A layer has the
same blocks as the first, a fixed number of them further on: `first_block`.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.paged_attention import filled_cpu, ragged_tpu, reference

EMPTY = -1  # position of a token that is none
QUERY_BLOCK = 16  # prompt tokens come in runs of so many, each run of one sequence
Implementation = Literal["reference", "cpu", "triton", "tpu"]


def choose(
    platform: str, kernels: bool, heads: int, kv: int, head_dim: int, dtype: jnp.dtype, window: int | None
) -> Implementation:
    """The implementation for so many heads of queries, of keys and values, on "cpu", "gpu" or "tpu"; kernels: whether
    it may be one, which a mesh's partitioner cannot split."""
    if platform == "tpu" and kernels and ragged_tpu.refusal(heads, kv, head_dim, dtype) is None:
        return "tpu"
    if platform == "cpu" and kernels:
        return "cpu"
    fits = 16 <= head_dim <= 256 and head_dim & (head_dim - 1) == 0
    return "triton" if platform == "gpu" and kernels and fits and window is None else "reference"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepTokens:
    """Where the M tokens of a step stand: first one for each of R sequences, then runs of prompt tokens.

    positions int32 [M], each token's place in its own sequence, EMPTY for none. Those of a run are consecutive, with
    EMPTY only at its end. tables int32 [R, W]: the blocks of each sequence; what stands behind its last one is not read
    but names a block. runs int32 [(M - R) / QUERY_BLOCK]: the sequence that each run belongs to. prompts int32 [R]: how
    many tokens each sequence's prompt has, which attention does not ask.
    """

    positions: Any
    tables: Any
    runs: Any
    prompts: Any

    def lengths(self) -> jax.Array:
        """int32 [M]: how many tokens a sequence has where a token is read: its whole prompt, or up to the token."""
        return jnp.maximum(self.prompts[self.rows()], self.positions + 1)

    @property
    def decoding(self) -> int:
        """R: how many tokens stand before the runs."""
        return self.tables.shape[0]

    def rows(self) -> jax.Array:
        """int32 [M]: each token's sequence."""
        own = jnp.arange(self.decoding, dtype=jnp.int32)
        return jnp.concatenate([own, jnp.repeat(self.runs, QUERY_BLOCK)])

    def slots(self, block_size: int, back: int = 0) -> jax.Array:
        """int32 [M]: block * Bs + slot in the first layer of the token so many before each, EMPTY for none."""
        at = jnp.maximum(self.positions - back, 0)
        block = self.tables[self.rows(), at // block_size]
        return jnp.where(self.positions < back, EMPTY, block * block_size + at % block_size)


def paged_attention(
    q: Float[Array, "M N H"],
    pages: Float[Array, "X Bs K2 H"],
    tokens: StepTokens,
    first_block: jax.Array | int = 0,
    *,
    window: int | None = None,
    implementation: Implementation = "reference",
) -> Float[Array, "M NH"]:
    """softmax(q k / sqrt(H)) v of every token over the tokens of its own sequence up to itself, which are in `pages`.

    Args:
        first_block: int32 [], what is added to the blocks in the tables.
        window: a token sees this many tokens, itself included; None: all.

    Returns:
        In q's dtype; scores and softmax are float32. 0 for a token that is none.

    Raises:
        NotImplementedError: an implementation that does not serve these heads or a window.
    """
    if implementation == "triton":
        from pallas_kernels.paged_attention import triton_gpu

        return triton_gpu.paged_attention(q, pages, tokens, first_block, window)
    if implementation == "tpu":
        return ragged_tpu.paged_attention(q, pages, tokens, first_block, window, QUERY_BLOCK)
    if implementation == "cpu":
        return filled_cpu.paged_attention(q, pages, tokens, first_block, window)
    return reference.paged_attention(q, pages, tokens, first_block, window)


def write_pages(
    pages: Float[Array, "X Bs K2 H"],
    keys: Float[Array, "M K H"],
    values: Float[Array, "M K H"],
    slots: Int32[Array, " M"],
    first_block: jax.Array | int = 0,
) -> Float[Array, "X Bs K2 H"]:
    """`pages` with each token's key and value in its slot (`StepTokens.slots`); a token without one writes nothing."""
    blocks, size, heads, width = pages.shape
    both = jnp.stack([keys, values], axis=2).reshape(-1, heads, width).astype(pages.dtype)
    if len(slots) == 1:  # XLA makes something else of a scatter of one row, which copies all pages
        both, slots = jnp.pad(both, ((0, 1), (0, 0), (0, 0))), jnp.pad(slots, (0, 1), constant_values=EMPTY)
    beyond = blocks * size + jnp.arange(len(slots), dtype=jnp.int32)  # dropped, and each another, as scatter is told
    at = jnp.where(slots == EMPTY, beyond, slots + first_block * size)
    flat = pages.reshape(-1, heads, width).at[at].set(both, mode="drop", unique_indices=True)
    return flat.reshape(pages.shape)
