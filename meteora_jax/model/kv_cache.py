"""The cache of keys and values that decoding reads."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from meteora_jax.config import LlamaConfig
from meteora_jax.sharding import constrain
from pallas_kernels.paged_attention import EMPTY


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of every layer, in slots shared by the batch.

    keys, values: [L, B, S, K, H]. positions: int32 [B, S], the position that a slot's token has in its
    own sequence, EMPTY for none. length: int32 [], slots written so far.

    Prompts of different length are padded on the right and every later token takes the next slot in all
    rows at once: one slice is written, never a scatter, and padding is told apart by its EMPTY position.
    """

    keys: Any
    values: Any
    positions: Any
    length: Any

    @classmethod
    def create(cls, config: LlamaConfig, batch: int, slots: int, dtype: Any) -> KVCache:
        """An empty cache of `slots` slots a row."""
        shape = (config.num_layers, batch, slots, config.num_kv_heads, config.head_dim)
        positions = jnp.full((batch, slots), EMPTY, jnp.int32)
        keys, values = (constrain(jnp.zeros(shape, dtype), None, "batch", None, "heads", None) for _ in "kv")
        return cls(keys, values, constrain(positions, "batch", None), jnp.zeros((), jnp.int32))

    @classmethod
    def zeros(cls, shape: tuple[int, ...], like: KVCache) -> KVCache:
        """Zeros [L, B, S, K, H] in the slots that `like` has, at its positions."""
        zeros = constrain(jnp.zeros(shape, like.keys.dtype), None, "batch", None, None, None)
        return cls(zeros, zeros, like.positions, like.length)

    def claim(self, positions: jax.Array) -> KVCache:
        """Enters the positions int32 [B, T] of the tokens about to be written; `length` stays until `advance`."""
        updated = jax.lax.dynamic_update_slice(self.positions, positions, (jnp.zeros((), jnp.int32), self.length))
        return dataclasses.replace(self, positions=updated)

    def write(self, layer: jax.Array, k: jax.Array, v: jax.Array) -> KVCache:
        """Writes one layer's new keys and values [B, T, K, H] into the claimed slots."""
        zero = jnp.zeros((), jnp.int32)
        at = (layer, zero, self.length, zero, zero)
        return dataclasses.replace(
            self,
            keys=jax.lax.dynamic_update_slice(self.keys, k[None], at),
            values=jax.lax.dynamic_update_slice(self.values, v[None], at),
        )

    def layer(self, layer: jax.Array) -> tuple[jax.Array, jax.Array]:
        """One layer's keys and values, [B, S, K, H] each."""
        take = jax.lax.dynamic_index_in_dim
        return take(self.keys, layer, keepdims=False), take(self.values, layer, keepdims=False)

    def advance(self, tokens: int) -> KVCache:
        """Counts `tokens` slots as written."""
        return dataclasses.replace(self, length=self.length + tokens)
