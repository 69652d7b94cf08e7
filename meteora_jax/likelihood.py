"""How likely given tokens are: log probabilities of texts that nobody writes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from meteora_jax.api import Meteora
from meteora_jax.execution import jit
from meteora_jax.padding import bucket, pad_prompts
from meteora_jax.routing import BoundRouter, RouterArgument
from meteora_jax.sharding import Params
from pallas_kernels.paged_attention import EMPTY

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
    columns = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :]
    hidden = model(tokens, jnp.where(columns < lengths[:, None], columns, EMPTY), router).hidden
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


def scores(
    model: Meteora, rows: Sequence[Sequence[int]], at: np.ndarray, targets: np.ndarray, router: RouterArgument,
    likely: int = 1,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
    """`score` of a model's token lists, on the host; router: one that reads no text any more."""

    def run(tokens: Any, lengths: Any, at: Any, targets: Any, bound: BoundRouter | None) -> tuple[jax.Array, ...]:
        tokens, lengths, at, targets = (jnp.asarray(x) for x in (tokens, lengths, at, targets))
        return score(model.graph, model.weights, tokens, lengths, at, targets, bound, likely=likely)

    logprobs, indices, values = model.over_rows(router, rows, (*pad_prompts(rows), at, targets), run)
    return np.asarray(logprobs), np.asarray(indices), np.asarray(values)


def prompt_logprobs(
    model: Meteora, token_ids: Sequence[int], router: RouterArgument, likely: int
) -> list[tuple[float, list[tuple[int, float]]]]:
    """Of every token but the first: its log probability after those before it, and the `likely` likeliest tokens there
    with theirs.

    Args:
        router: one that reads no text any more.
    """
    if len(token_ids) < 2:
        return []
    row, goals = list(token_ids[:-1]), list(token_ids[1:])
    width = bucket(len(goals))
    at, targets = np.zeros((1, width), np.int32), np.zeros((1, width), np.int32)
    at[0, : len(goals)], targets[0, : len(goals)] = np.arange(len(goals)), goals
    one: Any = [router]
    logprobs, indices, values = scores(model, [row], at, targets, one, likely)
    best = [list(zip(i.tolist(), v.tolist(), strict=True)) for i, v in zip(indices[0], values[0], strict=True)]
    return list(zip(logprobs[0, : len(goals)].tolist(), best[: len(goals)], strict=True))
