"""One pass of prompts through the base, for routers that choose by what every adapter would make of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from meteora_jax.execution import jit
from meteora_jax.model.rope import sequence_positions
from meteora_jax.padding import bucket, pad_batch, rows_within
from meteora_jax.routing import RouterArgument, Score
from meteora_jax.routing.logo import Probe, asking, observe_scores
from meteora_jax.sharding import Params, fetch, place_rows, use_mesh

ROWS, TOKENS = 8, 8192  # of a pass, at most: prompts, and tokens with their padding


def probed(
    router: RouterArgument, prompts: Sequence[Sequence[int]], names: tuple[str, ...], graph: nnx.GraphDef,
    weights: Callable[[], Params], mesh: Mesh | None,
) -> RouterArgument:  # fmt: skip
    """A caller's `router=` with what one pass chose in the place of every router that asks for it.

    Args:
        prompts: token ids of each row. names: the model's adapters; without any, routers stay as they are.
        weights: with what a score is made of (`fill_spectra`); asked for where a router needs it.
    """
    wanting = asking(router, len(prompts))
    groups: dict[tuple[Score, int], list[int]] = {}
    for b, own in enumerate(wanting):
        if own is not None and names and len(wanting) == len(prompts):
            groups.setdefault((own.probes, bucket(len(prompts[b]))), []).append(b)
    if not groups:
        return router
    rows: list[Any] = list(router) if isinstance(router, list | tuple) else [router] * len(prompts)
    for (score, _), places in groups.items():
        together = rows_within(TOKENS, len(prompts[places[0]]), ROWS)
        for start in range(0, len(places), together):
            some = places[start : start + together]
            scores = _scores(score, [prompts[b] for b in some], graph, weights(), mesh)
            for b, own_scores in zip(some, scores, strict=True):
                own = wanting[b]
                assert own is not None
                rows[b] = own.after_pass(own_scores, names)
    return rows


def _scores(
    score: Score, prompts: Sequence[Sequence[int]], graph: nnx.GraphDef, weights: Params, mesh: Mesh | None
) -> np.ndarray:
    """float32 [B, L, P, A] at each prompt's last token."""
    last = jnp.asarray([len(prompt) - 1 for prompt in prompts], jnp.int32)
    tokens, lengths, probe = pad_batch(prompts, Probe(score, last), mesh)
    with use_mesh(mesh):
        scores = _pass(graph, weights, *place_rows((tokens, lengths), mesh), probe)
    return np.moveaxis(fetch(scores), 0, 1)[: len(prompts)]


@jit(static_argnames=("graph",))
def _pass(graph: nnx.GraphDef, weights: Params, tokens: jax.Array, lengths: jax.Array, probe: Probe) -> jax.Array:
    model = nnx.merge(graph, weights)
    return model(tokens, sequence_positions(tokens, lengths), probe, observe=observe_scores).observed
