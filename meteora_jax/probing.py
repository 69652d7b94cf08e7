"""Passes of prompts through the base, for routers that choose by what every adapter would make of a prompt.

A pass has one of few shapes, as each is a program: a compiler takes longer than the padding of many prompts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from meteora_jax.execution import jit, platform
from meteora_jax.model.rope import sequence_positions
from meteora_jax.padding import fill_rows
from meteora_jax.routing import RouterArgument, Score
from meteora_jax.routing.logo import Probe, asking, observe_scores
from meteora_jax.sharding import Params, fetch, place_rows, use_mesh

ROWS, TOKENS = 32, 2048  # of a pass, at most: prompts, and tokens with their padding, unless one prompt has more
SHORTEST = 64  # tokens of a row; the next lengths are 128, 256, ..


@dataclasses.dataclass(frozen=True)
class Pass:
    """Prompts that go through the base together. places: theirs in a list. rows, length: of the padded tokens."""

    places: tuple[int, ...]
    rows: int
    length: int


def passes(lengths: Sequence[int]) -> Iterator[Pass]:
    """All prompts of these lengths, the longest first. Shorter ones fill the rows that a length leaves, so that the
    last pass alone has fewer rows than others of its length: 1, 4 or 16."""
    order = sorted(range(len(lengths)), key=lambda place: -lengths[place])
    while order:
        length = SHORTEST
        while length < lengths[order[0]]:
            length *= 2
        rows, most = 1, max(1, min(ROWS, TOKENS // length))
        while rows < min(len(order), most):
            rows = min(4 * rows, most)
        yield Pass(tuple(order[:rows]), rows, length)
        order = order[rows:]


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
    places: dict[Score, dict[tuple[int, ...], list[int]]] = {}  # by score and prompt: equal prompts take one row
    for b, own in enumerate(wanting):
        if own is not None and names and len(wanting) == len(prompts):
            places.setdefault(own.probes, {}).setdefault(tuple(prompts[b]), []).append(b)
    if not places:
        return router
    rows: list[Any] = list(router) if isinstance(router, list | tuple) else [router] * len(prompts)
    for score, by_prompt in places.items():
        for prompt, scores in zip(by_prompt, _scores(score, list(by_prompt), graph, weights(), mesh), strict=True):
            for b in by_prompt[prompt]:
                own = wanting[b]
                assert own is not None
                rows[b] = own.after_pass(scores, names)
    return rows


def _scores(
    score: Score, prompts: Sequence[Sequence[int]], graph: nnx.GraphDef, weights: Params, mesh: Mesh | None
) -> list[np.ndarray]:
    """Of each prompt float32 [L, P, A] at its last token."""
    planned = list(passes([len(prompt) for prompt in prompts]))

    def call(function: Callable[..., Any], one: Pass) -> Any:
        tokens, lengths = np.zeros((one.rows, one.length), np.int32), np.zeros((one.rows,), np.int32)
        for b, place in enumerate(one.places):
            tokens[b, : len(prompts[place])], lengths[b] = prompts[place], len(prompts[place])
        probe = Probe(score, jnp.asarray(np.maximum(lengths - 1, 0)))
        batch, probe = fill_rows((tokens, lengths), probe, mesh)
        with use_mesh(mesh):
            return function(graph, weights, *place_rows(batch, mesh), probe)

    shapes = {(one.rows, one.length): one for one in planned}
    # on a CPU the compiler's cores are the model's, and hosts compile in one order
    if platform() != "cpu" and len(shapes) > 1 and (mesh is None or not mesh.is_multi_process):
        with ThreadPoolExecutor(len(shapes)) as threads:
            list(threads.map(lambda one: call(_pass.lower, one).compile(), shapes.values()))
    begun = [call(_pass, one) for one in planned]  # the device works on some while others are prepared
    found: dict[int, np.ndarray] = {}
    for one, scores in zip(planned, begun, strict=True):
        found |= zip(one.places, np.moveaxis(fetch(scores), 1, 0), strict=False)  # rows behind them are padding
    return [found[place] for place in range(len(prompts))]


@jit(static_argnames=("graph",))
def _pass(graph: nnx.GraphDef, weights: Params, tokens: jax.Array, lengths: jax.Array, probe: Probe) -> jax.Array:
    model = nnx.merge(graph, weights)
    return model(tokens, sequence_positions(tokens, lengths), probe, observe=observe_scores).observed
