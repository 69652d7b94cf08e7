"""Whole sequences through a model at once; with adapter slots in parts, each of rows whose adapters fit together."""

from __future__ import annotations

import contextlib
import dataclasses
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from meteora_jax.engine.adapter_pool import AdapterPool
from meteora_jax.engine.batch import join_routers
from meteora_jax.engine.request import WantedAdapters
from meteora_jax.execution import jit
from meteora_jax.model.rope import sequence_positions
from meteora_jax.routing import BoundRouter
from meteora_jax.sharding import Params

Run = Callable[..., Any]  # of arrays with a row a sequence, and their router: a pytree of the same rows


@jit(static_argnames=("graph",))
def all_logits(
    graph: nnx.GraphDef, weights: Params, tokens: jax.Array, lengths: jax.Array, router: BoundRouter | None
) -> jax.Array:
    """float32 [B, T, V] after every one of the tokens int32 [B, T], padded on the right; lengths int32 [B]."""
    model = nnx.merge(graph, weights)
    return model.logits(model(tokens, sequence_positions(tokens, lengths), router).hidden, router)


def parts_of(wanted: Sequence[WantedAdapters | None], pool: AdapterPool) -> list[list[int]]:
    """The rows that run together: each joins the first part whose adapters leave slots for its own."""
    parts: list[tuple[set[int], list[int]]] = []
    for row, asked in enumerate(wanted):
        own = set() if asked is None else set(asked.versions)
        for used, rows in parts:
            if sum(pool.versions[n].slots for n in used | own) <= pool.table.count:
                used |= own
                rows.append(row)
                break
        else:
            parts.append((own, [row]))
    return [rows for _, rows in parts]


def in_parts(pool: AdapterPool, wanted: Sequence[WantedAdapters | None], arrays: Sequence[np.ndarray], run: Run) -> Any:
    """What `run` gives of all rows, each part given to the device once its adapters lie in slots.

    A part is padded with rows of zeros to few sizes, as each is a program.

    Args:
        wanted: of each row what it asks of the pool; None: nothing. arrays: [B, ...], of the rows.

    Raises:
        InputError: an adapter cannot be read, or was unloaded since the row was asked for.
    """
    found: list[Any] = []
    with contextlib.ExitStack() as held:
        with pool.lock:
            for asked in filter(None, wanted):
                pool.enlist(asked)
                held.callback(pool.dismiss, None, asked)
            parts = parts_of(wanted, pool)
        for rows in parts:
            count = len(wanted) if len(parts) == 1 else min(1 << (len(rows) - 1).bit_length(), len(wanted))
            given = [np.pad(z[rows], [(0, count - len(rows))] + [(0, 0)] * (z.ndim - 1)) for z in arrays]
            out = _ready(pool, [wanted[row] for row in rows], count, given, run)
            found.append(jax.tree.map(operator.itemgetter(slice(len(rows))), out))
    if len(parts) == 1:
        return found[0]
    order = np.argsort(np.concatenate(parts))
    return jax.tree.map(lambda *z: jnp.concatenate(z)[order], *found)


def _ready(
    pool: AdapterPool, wanted: Sequence[WantedAdapters | None], count: int, given: Sequence[np.ndarray], run: Run
) -> Any:
    """`run` of one part, once its adapters lie in slots; the devices work in order, so others may have these then."""
    asked = [w for w in wanted if w is not None]
    if not asked:
        with pool.lock:
            return run(*given, None)
    numbers = tuple(sorted({n for w in asked for n in w.versions}))
    together = dataclasses.replace(asked[0], versions=numbers, scored=any(w.scored for w in asked))
    owner = object()
    try:
        while True:
            with pool.lock:
                pool.advance()
                if pool.reserve(owner, together, drain=True) == "ready":
                    router = join_routers([None if w is None else pool.place(w) for w in wanted], count)
                    return run(*given, router)
            pool.wait()
    finally:
        with pool.lock:
            pool.table.release(owner)
