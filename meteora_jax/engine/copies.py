"""Adapters on their way from disk into slots: read, checked, padded and sent to the device by threads, and written
between two steps."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait

from meteora_jax.config import InputError
from meteora_jax.engine.slot_weights import SlotWeights
from meteora_jax.engine.slots import SlotTable
from meteora_jax.engine.staging import Staged

READERS = 4  # threads that read adapters, and so many are on their way at once: each thread has memory for one

# of an adapter's number, and whether routers by score will read it: what goes into its slots
Stage = Callable[[int, bool], list[Staged]]


@dataclasses.dataclass(frozen=True)
class Coming:
    """An adapter on its way: to which slots, and whether with what routers by score read."""

    slots: tuple[int, ...]
    scored: bool
    staged: Future[list[Staged]]


class Copies:
    """Of a pool's adapters by number; all but `wait` under the pool's lock.

    there: whose weights are in their slots. scored: of which also what routers by score read is. failed: why others
    could not be read. spectra: whether that is copied too, from the first of these routers on.
    """

    def __init__(self, weights: SlotWeights, table: SlotTable, stage: Stage):
        self.there: set[int] = set()
        self.scored: set[int] = set()
        self.failed: dict[int, InputError] = {}
        self.spectra = False
        self._weights, self._table, self._stage = weights, table, stage
        self._coming: dict[int, Coming] = {}
        self._readers = ThreadPoolExecutor(READERS, "adapters")

    def __len__(self) -> int:
        return len(self._coming)

    def start(self, placed: Sequence[tuple[int, tuple[int, ...]]]) -> int:
        """Begins to copy adapters into the slots that they were given; how many others that were there lost theirs."""
        gone = [n for n in self.there if self._table.slots(n) is None]
        for n in gone:
            self.forget(n)
        for n, slots in placed:
            self._coming[n] = Coming(slots, self.spectra, self._readers.submit(self._stage, n, self.spectra))
        return len(gone)

    @property
    def repeated(self) -> bool:
        """Whether what is there already comes once more."""
        return not self.there.isdisjoint(self._coming)

    def score(self) -> None:
        """From now on copies are with what routers by score read; those that are there come once more."""
        if not self.spectra:
            self.spectra = True
            self.start([(n, slots) for n in {*self.there, *self._coming} if (slots := self._table.slots(n))])

    def advance(self, known: Callable[[int], bool]) -> int:
        """Writes what has arrived into its slots; how many. known: whether anybody can ask for an adapter still."""
        written = 0
        for n, coming in list(self._coming.items()):
            if not coming.staged.done():
                continue
            del self._coming[n]
            try:
                staged = coming.staged.result()
            except Exception as e:  # of a reader: that adapter's requests are refused, and nobody else's
                if known(n):
                    found = f"adapter: expected one that can be copied, found {type(e).__name__}: {e}"
                    self.failed[n] = e if isinstance(e, InputError) else InputError(found)
                continue
            if self._table.slots(n) == coming.slots:
                for part, slot in zip(staged, coming.slots, strict=True):
                    self._weights.write(part, slot)
                self.there.add(n)
                if coming.scored:
                    self.scored.add(n)
                written += 1
        return written

    def forget(self, number: int) -> None:
        """An adapter that has no slot any more."""
        self.there.discard(number)
        self.scored.discard(number)
        self.failed.pop(number, None)

    def first(self) -> Future[list[Staged]] | None:
        """One that is on its way."""
        return next((coming.staged for coming in self._coming.values()), None)


def wait_for(coming: Future[list[Staged]] | None) -> float:
    """Until it has arrived; seconds. None: somebody else holds the slots, and is given a moment."""
    start = time.perf_counter()
    if coming is None:
        time.sleep(1e-3)
    else:
        wait([coming])
    return time.perf_counter() - start
