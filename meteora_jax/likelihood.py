"""How likely given tokens are: log probabilities of texts that nobody writes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from meteora_jax.api import Meteora
from meteora_jax.model.likelihood import score
from meteora_jax.padding import bucket, pad_prompts
from meteora_jax.routing import RouterArgument


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
    tokens, lengths = pad_prompts([row])
    width = bucket(len(goals))
    at, targets = np.zeros((1, width), np.int32), np.zeros((1, width), np.int32)
    at[0, : len(goals)], targets[0, : len(goals)] = np.arange(len(goals)), goals
    given: list[Any] = [jnp.asarray(x) for x in (tokens, lengths, at, targets)]
    bound = model.bind([router], 1, [row])  # pyright: ignore[reportArgumentType]
    logprobs, indices, values = map(np.asarray, score(model.graph, model.weights, *given, bound, likely=likely))
    best = [list(zip(i.tolist(), v.tolist(), strict=True)) for i, v in zip(indices[0], values[0], strict=True)]
    return list(zip(logprobs[0, : len(goals)].tolist(), best[: len(goals)], strict=True))
