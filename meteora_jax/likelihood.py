"""How likely given tokens are: log probabilities of texts that nobody writes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from meteora_jax.api import Meteora
from meteora_jax.model.likelihood import score
from meteora_jax.padding import bucket, pad_prompts
from meteora_jax.routing import BoundRouter, RouterArgument


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
