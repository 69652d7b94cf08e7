"""The next token of every row, each by its own temperature, top-k, top-p and seed."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from meteora_jax.engine.request import Sampling

SMALLEST, LARGEST = 1e-30, 1e30  # of temperatures and top_p: float32 makes others, or what they divide, 0 or infinite


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplingRows:
    """`Sampling` of rows as arrays [B]: other values compile nothing.

    temperature float32, 0: greedy. top_k int32 and top_p float32, of which no row has any where they are None; a row
    without has the whole vocabulary and 1. seed, index int32.
    """

    temperature: Any
    seed: Any
    index: Any
    top_k: Any = None
    top_p: Any = None

    @classmethod
    def of(cls, rows: Sequence[Sampling], vocabulary: int) -> SamplingRows | None:
        """None where every row is greedy."""
        if all(s.temperature == 0 for s in rows):
            return None
        top_k = top_p = None
        if any(s.top_k is not None or s.top_p is not None for s in rows):
            top_k = np.asarray([vocabulary if s.top_k is None else s.top_k for s in rows], np.int32)
            top_p = np.asarray([1.0 if s.top_p is None else max(s.top_p, SMALLEST) for s in rows], np.float32)
        held = [s.temperature and min(max(s.temperature, SMALLEST), LARGEST) for s in rows]
        temperature = np.asarray(held, np.float32)
        seed, index = (np.asarray([getattr(s, name) for s in rows], np.int32) for name in ("seed", "index"))
        return cls(temperature, seed, index, top_k, top_p)


def only(logits: jax.Array, allowed: jax.Array) -> jax.Array:
    """Logits float32 [B, V], -inf where the bit of a token in allowed uint32 [B, ceil(V / 32)] is 0."""
    bits = allowed[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)[None, None, :] & jnp.uint32(1)
    return jnp.where(bits.reshape(len(logits), -1)[:, : logits.shape[1]] != 0, logits, -jnp.inf)


def sample(logits: jax.Array, drawn: jax.Array, how: SamplingRows | None) -> jax.Array:
    """Next tokens int32 [B] from logits float32 [B, V]; drawn int32 [B]: tokens that each row has drawn before.

    Temperature first, then top-k, then top-p (the smallest set whose probability reaches p). A row draws with a key of
    its seed, its count and its index, so its tokens do not depend on who is beside it.
    """
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    if how is None:
        return greedy
    logits = logits / jnp.where(how.temperature == 0, 1.0, how.temperature)[:, None]
    if how.top_k is not None:
        ranked = -jnp.sort(-logits, axis=-1)
        kept = jnp.arange(ranked.shape[1])[None, :] < how.top_k[:, None]
        probabilities = jax.nn.softmax(jnp.where(kept, ranked, -jnp.inf), axis=-1)
        below = jnp.cumsum(probabilities, axis=-1) - probabilities < how.top_p[:, None]
        kept &= below | (how.top_p >= 1.0)[:, None]  # a rounded sum reaches 1 before its end
        lowest = jnp.min(jnp.where(kept, ranked, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < lowest, -jnp.inf, logits)

    def draw(seed: jax.Array, drawn: jax.Array, index: jax.Array, logits: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), drawn), index)
        return jax.random.categorical(key, logits)

    drawn_tokens = jax.vmap(draw)(how.seed, drawn, how.index, logits).astype(jnp.int32)
    return jnp.where(how.temperature == 0, greedy, drawn_tokens)
