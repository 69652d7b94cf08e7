"""Which programs run requests that are submitted together: few, as their caller waits for the compiler as well.

A program serves one number of rows, of prompt tokens and of table columns, and one set of router kinds. While many
requests begin and end, an engine that always takes the smallest sizes that fit would compile most sizes that there are,
for every set of kinds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from meteora_jax.engine.programs import Sizes
from meteora_jax.engine.request import BoundRow, Request
from pallas_kernels.paged_attention import QUERY_BLOCK

FEWER_ROWS = 16  # sizes that are used differ by this factor: a step of 8 rows takes about as long as one of 64
FEWER_TOKENS = 4  # likewise; less, as prompt tokens that are padding cost what real ones do


class Job:
    """The requests that were submitted since the engine last had nothing to do, as far as programs depend on them.

    any_table: whether attention reads no more of a table than a row has filled, so that one width serves all.
    """

    def __init__(self, any_table: bool):
        self.any_table = any_table
        self.clear()

    def clear(self) -> None:
        """Forgets the requests."""
        self.kinds: dict[Any, BoundRow] = {}
        self.requests: list[Request] = []
        self.changed = False  # since its programs were last asked for
        self._tokens = self._longest = 0

    def add(self, request: Request) -> None:
        """Counts a request."""
        if request.router is not None:
            self.kinds[request.router.kind] = request.router
        self.requests.append(request)
        self.changed = True
        self._tokens += -(-len(request.prompt) // QUERY_BLOCK) * QUERY_BLOCK
        self._longest = max(self._longest, len(request.prompt) + request.max_new_tokens)

    def alike(self) -> bool:
        """Whether all requests take the same programs but for their lengths."""
        ways = {(r.sampling.temperature > 0, r.logprobs, r.trace, r.guide is None) for r in self.requests}
        return len(ways) == 1 and next(iter(ways))[-1]

    def sizes(self, every: Sizes, block_size: int) -> Sizes:
        """Those of the engine's that its steps use. One with prompt tokens has few rows at the beginning alone, and
        takes about as long with all of them."""
        rows = thinned(every.rows, len(self.requests), FEWER_ROWS)
        reading = [n for n in every.reading if n >= len(self.requests)] or every.reading[-1:]
        return Sizes(rows, self.prompts(every.prompts), self.tables(every.tables, block_size), reading)

    def prompts(self, sizes: Sequence[int]) -> tuple[int, ...]:
        """Those of its numbers of prompt tokens: three, or fewer, up to the one that holds all."""
        found = thinned(sizes, self._tokens, FEWER_TOKENS)
        top = next((n for n in found if n >= self._tokens), found[-1])
        return tuple(n for n in found if n * FEWER_TOKENS**2 >= top)

    def tables(self, sizes: Sequence[int], block_size: int) -> tuple[int, ...]:
        """Those of its numbers of table columns: with `any_table` none that the longest request would outgrow."""
        wanted = -(-self._longest // block_size)
        return tuple(n for n in sizes if n >= wanted) or (sizes[-1],) if self.any_table else tuple(sizes)


def thinned(sizes: Sequence[int], wanted: int, factor: int) -> tuple[int, ...]:
    """Ascending sizes without most of those below the first that holds `wanted`: of two that stay there, one is at
    least `factor` times the other. The larger ones stay."""
    top = next((n for n in sizes if n >= wanted), sizes[-1])
    kept = [top]
    for n in reversed(sizes):
        if n * factor <= kept[-1]:
            kept.append(n)
    return (*reversed(kept), *(n for n in sizes if n > top))
