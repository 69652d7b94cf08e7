"""From a plan to the arrays of a dispatch: rows, tables, prompt tokens and routers, in few shapes."""

from __future__ import annotations

import dataclasses
import hashlib
import operator
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from meteora_jax.engine.request import BoundRow, Progress, Trace
from meteora_jax.engine.sampling import SamplingRows
from meteora_jax.engine.scheduler import Chunk, Plan
from meteora_jax.engine.step import PromptTokens, StepRows
from meteora_jax.routing import BoundRouter
from meteora_jax.routing.mixed import Mixed
from meteora_jax.sharding import place_whole
from pallas_kernels.paged_attention import EMPTY, QUERY_BLOCK

ROWS = (1, 8, 32, 64, 128, 256, 512, 1024)  # of a program; a dispatch takes the first that holds its rows


def row_sizes(most: int) -> tuple[int, ...]:
    """The numbers of rows that programs have in an engine of at most so many."""
    return (*(n for n in ROWS if n < most), most)


def round_up(count: int, sizes: Sequence[int]) -> int:
    """The first of the sizes that holds `count`."""
    return next(n for n in sizes if n >= count)


def prompt_sizes(most: int) -> tuple[int, ...]:
    """The numbers of prompt tokens that programs have: four runs, twice as many each time, and `most`."""
    sizes, size = [], 4 * QUERY_BLOCK
    while 4 * size <= 3 * most:
        sizes.append(size)
        size *= 2
    return (*sizes, -(-most // QUERY_BLOCK) * QUERY_BLOCK)


def bind_row(bound: BoundRouter | None) -> BoundRow | None:
    """A router bound to two rows, the second of which routes to nothing, as a request keeps it."""
    if bound is None:
        return None
    leaves, structure = jax.tree.flatten(bound)
    arrays = tuple(np.asarray(z) for z in leaves)
    kind = structure, tuple((z.shape[1:], z.dtype.str) for z in arrays)
    digest = hashlib.blake2b(repr(kind).encode(), digest_size=16)
    for z in arrays:
        digest.update(z[:1].tobytes())
    return BoundRow(arrays, structure, kind, digest.digest())


def join_routers(rows: Sequence[BoundRow | None], count: int, beside: Iterable[BoundRow] = ()) -> BoundRouter | None:
    """One router for `count` rows, the first of which have these; None where none has any. beside: rows whose kinds are
    there whether a row has them or not: the kinds that there are belong to a program."""
    present = {row.kind: row for row in (*beside, *rows) if row is not None}
    kinds = sorted(present.values(), key=lambda row: repr(row.kind))
    if not kinds:
        return None
    bound = []
    for example in kinds:
        own = [row is not None and row.kind == example.kind for row in rows] + [False] * (count - len(rows))
        leaves = []
        for i, leaf in enumerate(example.leaves):
            stacked = np.repeat(leaf[1:], count, axis=0)
            for b, mine in enumerate(own):
                row = rows[b] if mine else None
                if row is not None:
                    stacked[b] = row.leaves[i][0]
            leaves.append(stacked)
        bound.append(jax.tree.unflatten(example.structure, leaves))
    if len(bound) == 1:
        return bound[0]
    places = {row.kind: i for i, row in enumerate(kinds)}
    which = [-1 if row is None else places[row.kind] for row in rows] + [-1] * (count - len(rows))
    return Mixed(np.asarray(which, np.int32), tuple(bound))


class JoinedRouters:
    """`join_routers`, which is not done again for the rows that it was last done for."""

    def __init__(self, mesh: Mesh | None = None):
        """mesh: on which the engine's arrays lie."""
        self._mesh = mesh
        self._last: tuple[Any, BoundRouter | None] | None = None

    def of(self, rows: Sequence[BoundRow | None], count: int, beside: Iterable[BoundRow]) -> BoundRouter | None:
        """The arguments of `join_routers`; its arrays are on the devices."""
        asked = tuple(rows), count, tuple(beside)
        if self._last is not None:
            before = self._last[0]
            same = before[1] == count and len(before[0]) == len(asked[0]) and len(before[2]) == len(asked[2])
            if same and all(map(operator.is_, before[0] + before[2], asked[0] + asked[2])):
                return self._last[1]
        router = join_routers(*asked)
        router = jax.tree.map(jnp.asarray, router) if self._mesh is None else place_whole(router, self._mesh)
        self._last = asked, router
        return router


def allowed_tokens(owners: Sequence[Progress], count: int, vocabulary: int) -> np.ndarray | None:
    """`StepRows.allowed` of `count` rows, the first of which are these; None where none has a guide. Of a prompt whose
    end is not read in this step nothing is drawn, and its mask means nothing."""
    if all(p.request.guide is None for p in owners):
        return None
    allowed = np.full((count, -(-vocabulary // 32)), 0xFFFFFFFF, np.uint32)
    for b, p in enumerate(owners):
        if p.request.guide is not None:
            allowed[b] = p.request.guide.allow(p.tokens)
    return allowed


@dataclasses.dataclass(frozen=True)
class Dispatch:
    """The arguments of `run_steps` behind the state, and whose rows they are.

    owners: of each row used, its request. drawing: which of these may draw a token, with what it had drawn before.
    chunks: the plan's, each with the place of its first token among the step's.
    """

    rows: StepRows
    prompt: PromptTokens | None
    router: BoundRouter | None
    steps: int
    owners: tuple[Progress, ...]
    chunks: tuple[tuple[Chunk, int], ...]


def dispatch_of(
    plan: Plan, row_sizes: Sequence[int], prompt_sizes: Sequence[int], table_sizes: Sequence[int], vocabulary: int,
    beside: Iterable[BoundRow] = (), routers: JoinedRouters | None = None,
) -> Dispatch:  # fmt: skip
    """The arrays of a plan, padded to the next of the sizes; tables have as many columns as the longest needs. beside:
    of `join_routers`. routers: what joins them."""
    owners = (*plan.decoding, *(chunk.progress for chunk in plan.chunks))
    count = round_up(len(owners), row_sizes)
    tables = np.zeros((count, round_up(max(len(p.blocks) for p in owners), table_sizes)), np.int32)
    order = np.full((count,), row_sizes[-1], np.int32)
    decodes, prompts = np.zeros((count,), bool), np.zeros((count,), np.int32)
    for b, p in enumerate(owners):
        assert p.row is not None
        tables[b, : len(p.blocks)] = p.blocks
        order[b], decodes[b], prompts[b] = p.row, b < len(plan.decoding), len(p.request.prompt)
    sampling = SamplingRows.of([p.request.sampling for p in owners], vocabulary)
    if sampling is not None:  # rows that are none repeat the last
        sampling = jax.tree.map(lambda z: np.pad(z, (0, count - len(owners)), mode="edge"), sampling)
    router = (routers or JoinedRouters()).of([p.router for p in owners], count, beside)
    rows = StepRows(order, decodes, tables, prompts, sampling, allowed_tokens(owners, count, vocabulary))
    if not plan.chunks:
        return Dispatch(rows, None, router, plan.steps, owners, ())
    width = sum(-(-(c.stop - c.start) // QUERY_BLOCK) for c in plan.chunks) * QUERY_BLOCK
    width = round_up(width, prompt_sizes)
    tokens, positions = np.zeros((width,), np.int32), np.full((width,), EMPTY, np.int32)
    runs = np.zeros((width // QUERY_BLOCK,), np.int32)
    last = np.full((count,), -1, np.int32)
    drawn, left = np.zeros((count,), np.int32), np.zeros((count,), np.int32)
    at, chunks = 0, []
    for b, chunk in enumerate(plan.chunks, len(plan.decoding)):
        p, read = chunk.progress, chunk.stop - chunk.start
        tokens[at : at + read] = p.todo[chunk.start : chunk.stop]
        positions[at : at + read] = np.arange(chunk.start, chunk.stop)
        padded = -(-read // QUERY_BLOCK) * QUERY_BLOCK
        runs[at // QUERY_BLOCK : (at + padded) // QUERY_BLOCK] = b
        if chunk.last:
            last[b] = count + at + read - 1
            drawn[b] = len(p.todo) - len(p.request.prompt)
            left[b] = p.request.max_new_tokens - drawn[b]
        chunks.append((chunk, count + at))
        at += padded
    prompt = PromptTokens(tokens, positions, runs, last, drawn, left)
    return Dispatch(rows, prompt, router, 1, owners, tuple(chunks))


def traced(work: Dispatch) -> Trace:
    """What of a dispatch its owners want traced. A response that is read again after a preemption is among prompts."""
    asked = [p.request.trace for p in work.owners]
    again = any(chunk.progress.request.trace and chunk.progress.tokens for chunk, _ in work.chunks)
    return True if again or any(t is True for t in asked) else "response" if any(asked) else False
