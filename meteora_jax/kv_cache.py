"""The cache of keys and values that decoding reads."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from meteora_jax.config import LlamaConfig
from meteora_jax.gate_config import HEAD, GateForm
from meteora_jax.sharding import constrain

EMPTY = -1  # position of a slot that holds no token


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of every layer, in slots shared by the batch.

    keys, values: [L, B, S, K, H]. positions: int32 [B, S], the position that a slot's token has in its
    own sequence, EMPTY for none. length: int32 [], slots written so far. sums: `routing.memory.GateMemory`'s, of gates
    that read their sequence's mean. stream: keys and values [L, B, S, 1, E] of the gates' own stream, or of its own
    layers and heads, and behind these what its beginning has read and what its end says.

    Prompts of different length are padded on the right and every later token takes the next slot in all
    rows at once: one slice is written, never a scatter, and padding is told apart by its EMPTY position.
    """

    keys: Any
    values: Any
    positions: Any
    length: Any
    sums: Any = None
    stream: Any = None

    @classmethod
    def create(cls, config: LlamaConfig, batch: int, slots: int, dtype: Any) -> KVCache:
        """An empty cache of `slots` slots a row."""
        shape = (config.num_layers, batch, slots, config.num_kv_heads, config.head_dim)
        positions = jnp.full((batch, slots), EMPTY, jnp.int32)
        empty = lambda: constrain(jnp.zeros(shape, dtype), None, "batch", None, "heads", None)  # noqa: E731
        return cls(empty(), empty(), constrain(positions, "batch", None), jnp.zeros((), jnp.int32))

    def with_stream(self, form: GateForm) -> KVCache:
        """With an empty cache for the stream of such gates, which shares slots, positions and length."""
        heads = form.stream // HEAD if form.is_ahead else 1
        shape = (
            form.kept if form.is_ahead else self.keys.shape[0],
            *self.keys.shape[1:3],
            heads,
            form.stream // heads,
        )
        zeros = constrain(jnp.zeros(shape, self.keys.dtype), None, "batch", None, None, None)
        return dataclasses.replace(self, stream=KVCache(zeros, zeros, None, None))

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

    def look_back(self, layer: jax.Array, k: jax.Array, v: jax.Array) -> tuple[KVCache, jax.Array, jax.Array]:
        """Writes one layer's keys and values [B, T, heads, E] of the gates' stream; all of them, [B, S, heads, E]."""
        own = dataclasses.replace(self.stream, length=self.length).write(layer, k, v)
        return dataclasses.replace(self, stream=dataclasses.replace(own, length=None)), *own.layer(layer)
