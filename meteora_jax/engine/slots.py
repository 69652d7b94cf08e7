"""Which adapter lies in which slot: pins, and who gets the next one. Knows of no device and of no weights.

An owner (a request) holds all its adapters at once or none. An adapter that somebody holds is pinned; of the others
the least recently used gives its slot away. Requests that come in the order of a queue are served in it: the first one
that finds too few slots has slots kept for it, those that fewest hold. Nobody takes a kept slot, or begins to use the
adapter in it, so it comes free once its holders have ended; nobody takes the slots of what it needs and finds there
either. The rest goes on meanwhile. Who holds never waits for a
slot, and one owner at a time has slots kept, so nobody waits for somebody who waits for him.

A large adapter takes several slots, wherever they are; it has all of them or none.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence


class SlotTable:
    """Slots 0 to `count` - 1, and the adapters in them, named by numbers that are never used twice."""

    def __init__(self, count: int, size: Callable[[int], int] | None = None):
        """size: how many slots an adapter takes; None: one each."""
        self.count, self._size = count, size or _one
        self.adapters: list[int | None] = [None] * count
        self.pins = [0] * count
        self.evictions = 0
        self._where: dict[int, tuple[int, ...]] = {}
        self._recent: OrderedDict[int, None] = OrderedDict.fromkeys(range(count))  # least recently used first
        self._held: dict[Hashable, tuple[int, ...]] = {}
        self._first: Hashable = None  # whom slots are kept for, which ones, what it will put there, and what it has
        self._kept: set[int] = set()
        self._coming: set[int] = set()
        self._there: set[int] = set()

    def slots(self, adapter: int) -> tuple[int, ...] | None:
        """Where an adapter lies; None: nowhere."""
        return self._where.get(adapter)

    def holds(self, owner: Hashable) -> bool:
        """Whether an owner's adapters all have slots."""
        return owner in self._held

    def take(
        self, owner: Hashable, adapters: Sequence[int], drain: bool = True
    ) -> list[tuple[int, tuple[int, ...]]] | None:
        """Pins all the adapters for an owner; None, and nothing is held, where too few slots can be had.

        Args:
            adapters: distinct, of at most `count` slots. drain: whether slots may be kept for the owner; only the first
                of a queue that did not get its own may ask so, and it must ask again or `release`.

        Returns:
            (adapter, slots) of those that were nowhere: the slots are theirs, their content must be written.

        Raises:
            ValueError: more adapters than slots.
        """
        if (size := sum(map(self._size, adapters))) > self.count:
            raise ValueError(f"adapters: expected at most {self.count} (the slots), found {size}")
        if owner in self._held:
            return []
        first = owner == self._first and self._first is not None
        kept, coming, there = (set(), set(), set()) if first else (self._kept, self._coming, self._there)
        if any(a in coming or not kept.isdisjoint(self._where.get(a, ())) for a in adapters):
            return None
        own = {s for a in adapters for s in self._where.get(a, ())}
        missing = [a for a in adapters if a not in self._where]
        free = [s for s in self._recent if self.pins[s] == 0 and s not in kept | there | own]
        if sum(map(self._size, missing)) > len(free):
            if drain and (first or self._first is None):
                self._keep(owner, missing, free, own)
            return None
        if first:
            self._let_go()
        placed = []
        for adapter in missing:
            slots = tuple(self._claim(free) for _ in range(self._size(adapter)))
            for slot in slots:
                self.adapters[slot] = adapter
            placed.append((adapter, slots))
        self._where |= dict(placed)
        self._held[owner] = tuple(adapters)
        for slot in (s for a in adapters for s in self._where[a]):
            self.pins[slot] += 1
            self._recent.move_to_end(slot)
        return placed

    def release(self, owner: Hashable) -> None:
        """What an owner holds, or has kept for it, is others' again; an owner of nothing changes nothing."""
        if owner == self._first and self._first is not None:
            self._let_go()
        for slot in (s for a in self._held.pop(owner, ()) for s in self._where[a]):
            self.pins[slot] -= 1
            self._recent.move_to_end(slot)

    def forget(self, adapter: int) -> None:
        """Empties an adapter's slots, if it has any.

        Raises:
            ValueError: somebody holds it.
        """
        slots = self._where.get(adapter, ())
        if any(self.pins[s] for s in slots):
            raise ValueError(f"adapter {adapter}: expected one that nobody holds, found {self.pins[slots[0]]} holders")
        self._where.pop(adapter, None)
        for slot in slots:
            self.adapters[slot] = None
            self._recent.move_to_end(slot, last=False)

    def check(self) -> None:
        """Raises ValueError where the table contradicts itself."""
        found = {a: {s for s, b in enumerate(self.adapters) if a == b} for a in self.adapters if a is not None}
        where = {a: set(slots) for a, slots in self._where.items()}
        pins = [0] * self.count
        for held in self._held.values():
            for adapter in held:
                for slot in self._where[adapter]:
                    pins[slot] += 1
        if (
            found != where
            or any(len(s) != self._size(a) for a, s in where.items())
            or pins != self.pins
            or sorted(self._recent) != list(range(self.count))
        ):
            raise ValueError(f"slots: expected {self._where} pinned {pins}, found {found} pinned {self.pins}")

    def _claim(self, free: list[int]) -> int:
        """Takes an empty slot out of the free ones, or the least recently used, whose adapter leaves all it has."""
        slot = next((s for s in free if self.adapters[s] is None), free[0])
        if (old := self.adapters[slot]) is not None:
            for other in self._where.pop(old):
                self.adapters[other] = None
            self.evictions += 1
        free.remove(slot)
        return slot

    def _let_go(self) -> None:
        self._first, self._kept, self._coming, self._there = None, set(), set(), set()

    def _keep(self, owner: Hashable, missing: Sequence[int], free: Sequence[int], own: set[int]) -> None:
        """Keeps what is free now and, of the others, what was kept before; then those that fewest hold."""
        busy = [s for s in self._recent if s not in own and s not in free]
        busy.sort(key=lambda s: (s not in self._kept, self.pins[s]))
        self._first, self._coming, self._there = owner, set(missing), own
        self._kept = {*free, *busy[: sum(map(self._size, missing)) - len(free)]}


def _one(adapter: int) -> int:
    return 1
