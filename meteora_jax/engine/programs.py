"""Which programs requests can meet, whenever each of them comes and ends, and the arguments that run one for nobody.

What a dispatch holds depends on when adapters arrive and responses end, so no run of the requests meets all programs.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from meteora_jax.engine.batch import Dispatch, JoinedRouters, round_up
from meteora_jax.engine.request import BoundRow, Request
from meteora_jax.engine.sampling import SamplingRows
from meteora_jax.engine.step import PromptTokens, StepRows
from pallas_kernels.paged_attention import EMPTY, QUERY_BLOCK

ALIGNED = 8


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The numbers of rows, of prompt tokens and of table columns that an engine's programs have, each ascending;
    reading: those of rows that programs with prompt tokens have."""

    rows: Sequence[int]
    prompts: Sequence[int]
    tables: Sequence[int]
    reading: Sequence[int]

    @classmethod
    def of(cls, rows: Sequence[int], prompts: Sequence[int], tables: Sequence[int]) -> Sizes:
        """Those of an engine. XLA for GPUs pads products whose rows are no multiple of 8, so that one request alone
        would have a layer's inputs and results copied: programs with prompt tokens have such numbers of rows."""
        return cls(rows, prompts, tables, tuple(sorted({-(-n // ALIGNED) * ALIGNED for n in rows})))


@dataclasses.dataclass(frozen=True)
class Program:
    """One of them: `steps` decoding steps, or one step with prompt tokens (0: without)."""

    rows: int
    prompt: int
    table: int
    steps: int


def programs(requests: Sequence[Request], sizes: Sizes, block_size: int, steps: int) -> Iterator[Program]:
    """Those that requests submitted together can meet. steps: of a long dispatch, `Limits.steps`."""
    blocks = [(len(r.prompt) + 1, len(r.prompt) + r.max_new_tokens - 1) for r in requests]
    fewest = round_up(min(-(-min(first, most) // block_size) for first, most in blocks), sizes.tables)
    widest = round_up(max(-(-most // block_size) for _, most in blocks), sizes.tables)
    tables = [n for n in sizes.tables if fewest <= n <= widest]
    prompts = sorted((-(-len(r.prompt) // QUERY_BLOCK) * QUERY_BLOCK for r in requests), reverse=True)
    several = max(r.max_new_tokens for r in requests) - 1 > steps // 2
    for rows in up_to(len(requests), sizes.rows):
        for count, table in itertools.product((1, steps) if several else (1,), tables):
            yield Program(rows, 0, table, count)
    for rows in up_to(len(requests), sizes.reading):
        most = round_up(min(sum(prompts[:rows]), sizes.prompts[-1]), sizes.prompts)
        for prompt, table in itertools.product((n for n in sizes.prompts if n <= most), tables):
            yield Program(rows, prompt, table, 1)


def up_to(count: int, sizes: Sequence[int]) -> list[int]:
    """The sizes that serve so many requests or fewer."""
    return [n for i, n in enumerate(sizes) if i == 0 or sizes[i - 1] < count]


def idle(
    program: Program, request: Request, none: int, vocabulary: int, kinds: Sequence[BoundRow], routers: JoinedRouters
) -> Dispatch:
    """A dispatch of rows that are none, which changes nothing.

    Args:
        request: one as the program serves. none: the row that stands for no row. kinds, routers: of `dispatch_of`.
    """
    count, width = program.rows, program.prompt
    nothing = np.zeros((count,), np.int32)
    sampling = SamplingRows.of([request.sampling] * count, vocabulary)
    tables = np.zeros((count, program.table), np.int32)
    rows = StepRows(np.full((count,), none, np.int32), np.zeros((count,), bool), tables, nothing, sampling)
    prompt = None
    if width:
        runs, empty = np.zeros((width // QUERY_BLOCK,), np.int32), np.full((width,), EMPTY, np.int32)
        ends = np.full((count,), -1, np.int32)
        prompt = PromptTokens(np.zeros((width,), np.int32), empty, runs, ends, nothing, nothing)
    return Dispatch(rows, prompt, routers.of((), count, kinds), program.steps, (), ())
