"""Gate logits to top-k to weights, in plain jnp: XLA fuses it with its neighbours on every platform.

    s, idx = top_k(g, C);  w = softmax(s / temperature)      MeteoRA (arXiv 2405.13053), section 3

Logits may have a column more than there are adapters: the null choice, an adapter whose dW is zero. It competes in the
top-k and takes its softmax weight, so that an adapter chosen beside it acts with the rest; it leaves as NO_ADAPTER.

NVIDIA GPUs choose inside the launch that needs the choice, by `triton_kernels.softmax_of_largest`, which must agree
with this file.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

NO_ADAPTER = -1  # nothing acts, whatever the weight


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TopK:
    """How gates choose. counts: int32 [B], adapters that a row takes, at most `k`; 0: gates do not route it.
    temperatures: float32 [B], of the softmax over the chosen logits."""

    counts: Any
    temperatures: Any
    k: int = dataclasses.field(metadata={"static": True})

    def spread(self, tokens: int) -> TopK:
        """The same for [B * tokens] rows, `tokens` of them after each other for each of these."""
        shape = (*self.counts.shape, tokens)
        counts, temperatures = (
            jnp.broadcast_to(z[..., None], shape).reshape(-1) for z in (self.counts, self.temperatures)
        )
        return TopK(counts, temperatures, self.k)


def top_k(logits: Float[Array, "*L A"], k: int) -> tuple[Float[Array, "*L k"], Int32[Array, "*L k"]]:
    """The k largest of the last axis and their indices, largest first; ties go to the lowest index.

    k rounds of max: with a handful of choices among tens of adapters this beats a sort, and unlike `lax.top_k` it stays
    elementwise enough for XLA to fuse with its neighbours.
    """
    columns = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    values, indices = [], []
    for _ in range(k):
        index = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        values.append(jnp.max(logits, axis=-1))
        indices.append(index)
        logits = jnp.where(columns == index[..., None], -jnp.inf, logits)
    return jnp.stack(values, -1), jnp.stack(indices, -1)


def topk_gating(
    logits: Float[Array, "*L P G"], rule: TopK, allowed: Bool[Array, "B A"] | None = None, adapters: int | None = None
) -> tuple[Int32[Array, "*L P C"], Float[Array, "*L P C"]]:
    """(indices, weights) of every token at every projection; C is the rule's k.

    Args:
        logits: the gates'. The rule's rows B are the first axis of L; the other axes share a row's rule.
        allowed: the adapters that a row may choose, beside the null choice; None: all.
        adapters: columns from there on are null choices; None: every column is an adapter's.

    Returns:
        indices NO_ADAPTER with weight 0 beyond a row's count; the other weights of a token sum to 1, that of a null
        choice, NO_ADAPTER too, among them.
    """

    def along_rows(z: jax.Array) -> jax.Array:
        return z.reshape(z.shape[0], *(1,) * (logits.ndim - 1))

    adapters = logits.shape[-1] if adapters is None else adapters
    if allowed is not None:
        allowed = jnp.pad(allowed, ((0, 0), (0, logits.shape[-1] - allowed.shape[-1])), constant_values=True)
        logits = jnp.where(allowed.reshape(len(allowed), *(1,) * (logits.ndim - 2), -1), logits, -jnp.inf)
    values, indices = top_k(logits, rule.k)
    places = jnp.arange(rule.k, dtype=jnp.int32).reshape(*(1,) * (logits.ndim - 1), -1)
    taken = places < along_rows(rule.counts)
    # the largest is subtracted first: what is not taken may be -inf
    values = jnp.where(taken, values - values[..., :1], 0.0) / along_rows(rule.temperatures)
    weights = jnp.where(taken, jnp.exp(values), 0.0)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    return jnp.where(taken & (indices < adapters), indices, NO_ADAPTER), weights / jnp.where(total > 0, total, 1.0)
