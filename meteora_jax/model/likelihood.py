"""Log probabilities of given tokens, without the logits of all positions at once."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from meteora_jax.execution import jit
from meteora_jax.model.rope import sequence_positions
from meteora_jax.routing import BoundRouter
from meteora_jax.sharding import Params

CHUNK = 8  # positions whose logits exist at once; `bucket` gives multiples of it


@jit(static_argnames=("graph", "likely"))
def score(
    graph: nnx.GraphDef,
    weights: Params,
    tokens: jax.Array,
    lengths: jax.Array,
    at: jax.Array,
    targets: jax.Array,
    router: BoundRouter | None,
    likely: int = 1,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Log probabilities float32 [B, W] of the `targets` [B, W] after the positions `at` [B, W], and the `likely`
    likeliest tokens there, int32 and float32 [B, W, likely]. tokens int32 [B, T], padded on the right; lengths [B]."""
    model = nnx.merge(graph, weights)
    hidden = model(tokens, sequence_positions(tokens, lengths), router).hidden
    hidden = jnp.take_along_axis(hidden, at[:, :, None], axis=1)

    def part(chunk: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        h, target = chunk
        logits = model.logits(h, router)
        chosen = jnp.take_along_axis(logits, target[:, :, None], axis=2)[:, :, 0]
        total = jax.nn.logsumexp(logits, axis=2)
        values, indices = jax.lax.top_k(logits, likely)
        return chosen - total, indices.astype(jnp.int32), values - total[:, :, None]

    def split(x: jax.Array) -> jax.Array:  # [B, W, ..] -> [W / chunk, B, chunk, ..]
        return jnp.moveaxis(x.reshape(x.shape[0], -1, CHUNK, *x.shape[2:]), 1, 0)

    def join(x: jax.Array) -> jax.Array:
        x = jnp.moveaxis(x, 0, 1)
        return x.reshape(x.shape[0], -1, *x.shape[3:])

    logprobs, indices, values = jax.lax.map(part, (split(hidden), split(targets)))
    return join(logprobs), join(indices), join(values)
