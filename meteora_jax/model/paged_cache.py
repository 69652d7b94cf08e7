"""The cache of keys and values that decoding reads: one pool of blocks for all sequences."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from meteora_jax.sharding import constrain
from pallas_kernels.paged_attention import StepTokens, paged_attention, write_pages
from pallas_kernels.paged_attention.api import Implementation


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PagedCache:
    """Keys and values of every layer, in blocks that sequences are given as they grow.

    pages: [L * blocks, Bs, 2 K, H], the layers' blocks one after the other; see `pallas_kernels.paged_attention`.
    blocks: how many each layer has; a sequence has the same ones in all layers.
    """

    pages: Any
    blocks: int = dataclasses.field(metadata={"static": True})

    @classmethod
    def create(
        cls, layers: int, blocks: int, block_size: int, kv_heads: int, head_dim: int, dtype: Any, split: bool = True
    ) -> PagedCache:
        """An empty cache of `blocks` blocks of `block_size` slots. split: a mesh splits the heads."""
        pages = jnp.zeros((layers * blocks, block_size, 2 * kv_heads, head_dim), dtype)
        return cls(constrain(pages, None, None, "heads" if split else None, None), blocks)

    @property
    def block_size(self) -> int:
        """Bs."""
        return self.pages.shape[1]

    def write(self, layer: jax.Array | int, k: jax.Array, v: jax.Array, slots: jax.Array) -> PagedCache:
        """With the keys and values [M, K, H] of one layer in their slots int32 [M] (`StepTokens.slots`)."""
        return dataclasses.replace(self, pages=write_pages(self.pages, k, v, slots, layer * self.blocks))

    def attend(
        self,
        layer: jax.Array | int,
        q: jax.Array,
        tokens: StepTokens,
        window: int | None,
        implementation: Implementation,
    ) -> jax.Array:
        """q [M, N, H] over what one layer has of each token's own sequence, [M, N H]."""
        first = layer * self.blocks
        return paged_attention(q, self.pages, tokens, first, window=window, implementation=implementation)
