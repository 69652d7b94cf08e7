"""The programs of requests that are submitted together: few, where a caller waits for all of them.

A program belongs to numbers of rows, prompt tokens and table columns and to the kinds of router among its rows. As
many requests begin and drain, an engine would compile one for most sizes that there are, and for every set of kinds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from meteora_jax.engine.request import BoundRow, Request
from pallas_kernels.paged_attention import QUERY_BLOCK

FEWER_ROWS = 16  # times: a step of few rows takes about as long as one of some more
FEWER_TOKENS = 4  # times: what a smaller program would have read in one step takes several


class Job:
    """What has been submitted since an engine had nothing to do.

    any_table: whether longer tables cost attention nothing.
    """

    def __init__(self, any_table: bool):
        self.any_table = any_table
        self.clear()

    def clear(self) -> None:
        """Of nothing."""
        self.kinds: dict[Any, BoundRow] = {}
        self._requests = self._tokens = self._longest = 0

    def add(self, request: Request) -> None:
        """With one request more."""
        if request.router is not None:
            self.kinds[request.router.kind] = request.router
        self._requests += 1
        self._tokens += -(-len(request.prompt) // QUERY_BLOCK) * QUERY_BLOCK
        self._longest = max(self._longest, len(request.prompt) + request.max_new_tokens)

    def rows(self, sizes: Sequence[int]) -> tuple[int, ...]:
        """Of the numbers of rows that programs may have those to be used."""
        return thinned(sizes, self._requests, FEWER_ROWS)

    def prompts(self, sizes: Sequence[int]) -> tuple[int, ...]:
        """Of the numbers of prompt tokens."""
        return thinned(sizes, self._tokens, FEWER_TOKENS)

    def tables(self, sizes: Sequence[int], block_size: int) -> tuple[int, ...]:
        """Of the numbers of a table's columns."""
        wanted = -(-self._longest // block_size)
        return thinned(sizes, wanted, sizes[-1] + 1) if self.any_table else tuple(sizes)


def thinned(sizes: Sequence[int], wanted: int, factor: int) -> tuple[int, ...]:
    """Ascending sizes without most of those below the first that holds `wanted`: of two that stay there, one is at
    least `factor` times the other. The larger ones stay."""
    top = next((n for n in sizes if n >= wanted), sizes[-1])
    kept = [top]
    for n in reversed(sizes):
        if n * factor <= kept[-1]:
            kept.append(n)
    return (*reversed(kept), *(n for n in sizes if n > top))
