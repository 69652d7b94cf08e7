"""Which adapter lies in which slot: pins, and who gets the next one. Knows of no device and of no weights.

An owner (a request) holds all its adapters at once or none. An adapter that somebody holds is pinned; of the others
the least recently used gives its slot away. Requests that come in the order of a queue are served in it: the first one
that finds too few slots has slots kept for it, those that fewest hold. Nobody takes a kept slot, or begins to use the
adapter in it, so it comes free once its holders have ended; the rest goes on meanwhile. Who holds never waits for a
slot, and one owner at a time has slots kept, so nobody waits for somebody who waits for him.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence


class SlotTable:
    """Slots 0 to `count` - 1, and the adapters in them, named by numbers that are never used twice."""

    def __init__(self, count: int):
        self.count = count
        self.adapters: list[int | None] = [None] * count
        self.pins = [0] * count
        self.evictions = 0
        self._where: dict[int, int] = {}
        self._recent: OrderedDict[int, None] = OrderedDict.fromkeys(range(count))  # least recently used first
        self._held: dict[Hashable, tuple[int, ...]] = {}
        self._first: Hashable = None  # whom slots are kept for, which ones, and what it is going to put there
        self._kept: set[int] = set()
        self._coming: set[int] = set()

    def slot(self, adapter: int) -> int | None:
        """Where an adapter lies; None: nowhere."""
        return self._where.get(adapter)

    def holds(self, owner: Hashable) -> bool:
        """Whether an owner's adapters all have slots."""
        return owner in self._held

    def take(self, owner: Hashable, adapters: Sequence[int], drain: bool = True) -> list[tuple[int, int]] | None:
        """Pins all the adapters for an owner; None, and nothing is held, where too few slots can be had.

        Args:
            adapters: distinct, at most `count`. drain: whether slots may be kept for the owner; only the first of a
                queue that did not get its own may ask so, and it must ask again or `release`.

        Returns:
            (adapter, slot) of those that were nowhere: the slot is theirs, its content must be written.

        Raises:
            ValueError: more adapters than slots.
        """
        if len(adapters) > self.count:
            raise ValueError(f"adapters: expected at most {self.count} (the slots), found {len(adapters)}")
        if owner in self._held:
            return []
        first = owner == self._first and self._first is not None
        kept, coming = (set(), set()) if first else (self._kept, self._coming)
        if any(a in coming or self._where.get(a) in kept for a in adapters):
            return None
        own = {self._where[a] for a in adapters if a in self._where}
        missing = [a for a in adapters if a not in self._where]
        free = [s for s in self._recent if self.pins[s] == 0 and s not in kept and s not in own]
        if len(missing) > len(free):
            if drain and (first or self._first is None):
                self._keep(owner, missing, free, own)
            return None
        if first:
            self._first, self._kept, self._coming = None, set(), set()
        placed = list(zip(missing, self._choose(free, len(missing)), strict=True))
        for adapter, slot in placed:
            self._empty(slot)
            self.adapters[slot], self._where[adapter] = adapter, slot
        self._held[owner] = tuple(adapters)
        for adapter in adapters:
            self.pins[self._where[adapter]] += 1
            self._recent.move_to_end(self._where[adapter])
        return placed

    def release(self, owner: Hashable) -> None:
        """What an owner holds, or has kept for it, is others' again; an owner of nothing changes nothing."""
        if owner == self._first and self._first is not None:
            self._first, self._kept, self._coming = None, set(), set()
        for adapter in self._held.pop(owner, ()):
            slot = self._where[adapter]
            self.pins[slot] -= 1
            self._recent.move_to_end(slot)

    def forget(self, adapter: int) -> None:
        """Empties an adapter's slot, if it has one.

        Raises:
            ValueError: somebody holds it.
        """
        slot = self._where.get(adapter)
        if slot is None:
            return
        if self.pins[slot]:
            raise ValueError(f"adapter {adapter}: expected one that nobody holds, found {self.pins[slot]} holders")
        del self._where[adapter]
        self.adapters[slot] = None
        self._recent.move_to_end(slot, last=False)

    def check(self) -> None:
        """Raises ValueError where the table contradicts itself."""
        found = {a: s for s, a in enumerate(self.adapters) if a is not None}
        pins = [0] * self.count
        for held in self._held.values():
            for adapter in held:
                pins[self._where[adapter]] += 1
        if found != self._where or pins != self.pins or sorted(self._recent) != list(range(self.count)):
            raise ValueError(f"slots: expected {self._where} pinned {pins}, found {found} pinned {self.pins}")

    def _choose(self, free: Sequence[int], count: int) -> list[int]:
        """Empty slots first, then the least recently used."""
        return sorted(free, key=lambda s: self.adapters[s] is not None)[:count]

    def _empty(self, slot: int) -> None:
        old = self.adapters[slot]
        if old is not None:
            del self._where[old]
            self.evictions += 1

    def _keep(self, owner: Hashable, missing: Sequence[int], free: Sequence[int], own: set[int]) -> None:
        """Keeps what is free now and, of the others, what was kept before; then those that fewest hold."""
        busy = [s for s in self._recent if s not in own and s not in free]
        busy.sort(key=lambda s: (s not in self._kept, self.pins[s]))
        self._first, self._coming = owner, set(missing)
        self._kept = {*free, *busy[: len(missing) - len(free)]}
