"""Who holds which block of the paged cache: a count of holders for each, and the blocks that nobody holds."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence


class BlockPool:
    """Blocks 0 to `count` - 1. A block is held by the sequences whose tables name it.

    One that nobody holds any more is free, or idle where its content may be asked for again (`keep` says so of a
    block); idle ones are given away when no free one is left, the least recently released first, and `forget` is told.
    """

    def __init__(
        self, count: int, keep: Callable[[int], bool] | None = None, forget: Callable[[int], None] | None = None
    ):
        self.count = count
        self.holders = [0] * count
        self._free = list(range(count - 1, -1, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._keep, self._forget = keep, forget

    @property
    def available(self) -> int:
        """How many blocks `take` can give."""
        return len(self._free) + len(self._idle)

    @property
    def idle(self) -> int:
        """How many of these still have a content that may be asked for."""
        return len(self._idle)

    def take(self, count: int) -> list[int]:
        """So many blocks, held once each.

        Raises:
            ValueError: more than are available.
        """
        if count > self.available:
            raise ValueError(f"blocks: expected at most {self.available}, found {count}")
        taken = []
        for _ in range(count):
            if self._free:
                block = self._free.pop()
            else:
                block, _ = self._idle.popitem(last=False)
                if self._forget is not None:
                    self._forget(block)
            self.holders[block] = 1
            taken.append(block)
        return taken

    def share(self, block: int) -> None:
        """One more holder of a block that is held or idle."""
        if self.holders[block] == 0:
            del self._idle[block]
        self.holders[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """One holder less of each. A sequence's last block becomes idle first: what follows a prefix goes before it.

        Raises:
            ValueError: a block that nobody holds.
        """
        for block in reversed(blocks):
            if self.holders[block] < 1:
                raise ValueError(f"blocks: expected one that is held, found {block}")
            self.holders[block] -= 1
            if self.holders[block] == 0:
                if self._keep is not None and self._keep(block):
                    self._idle[block] = None
                else:
                    self._free.append(block)

    def check(self) -> None:
        """Raises ValueError where a block is in two places or in none."""
        held = {b for b, n in enumerate(self.holders) if n > 0}
        places = [*self._free, *self._idle, *held]
        if sorted(places) != list(range(self.count)):
            raise ValueError(f"blocks: expected each of {self.count} in one place, found {len(places)} places")
