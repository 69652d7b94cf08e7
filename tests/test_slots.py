"""The slot table without a device: a clock of rounds, and requests that hold their adapters for some of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
from extent import examples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from meteora_jax.engine.slots import SlotTable


@dataclasses.dataclass(eq=False)
class Asked:
    """Adapters that are held for so many rounds from the one on in which they are had."""

    adapters: tuple[int, ...]
    rounds: int
    arrival: int = 0
    began: int | None = None


class Clock:
    """Serves a queue as a scheduler does: in order, passing those who wait."""

    def __init__(self, slots: int, size: Callable[[int], int] | None = None):
        self.table, self.now = SlotTable(slots, size), 0
        self.queue: list[Asked] = []
        self.running: list[Asked] = []

    def round(self) -> None:
        for asked in [r for r in self.running if r.began is not None and r.began + r.rounds <= self.now]:
            self.running.remove(asked)
            self.table.release(asked)
        drain = True
        for asked in list(self.queue):
            before = {a for r in self.running for a in r.adapters}
            placed = self.table.take(asked, asked.adapters, drain)
            self.table.check()
            assert all(self.table.slots(a) is not None for a in before)  # what is used stays
            if placed is None:
                drain = False
                continue
            asked.began = self.now
            self.queue.remove(asked)
            self.running.append(asked)
            assert all(self.table.slots(a) is not None for a in asked.adapters)
        self.now += 1


def two_of_some(adapter: int) -> int:
    return 2 if adapter % 4 == 0 else 1


some = st.lists(st.integers(0, 9), min_size=1, max_size=4, unique=True)
requests = st.tuples(some, st.integers(1, 9), st.integers(0, 20))


@settings(max_examples=examples(200, 5000), deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(requests, min_size=1, max_size=25), st.integers(7, 9), st.lists(st.integers(0, 24), max_size=4))
def test_everybody_is_served_and_nobody_waits_longer_than_those_before_take(drawn, slots, cancelled):
    asked = [Asked(tuple(adapters), rounds, arrival) for adapters, rounds, arrival in drawn]
    asked.sort(key=lambda a: a.arrival)
    clock, coming = Clock(slots, two_of_some), list(asked)
    ahead: dict[int, int] = {}
    gone = {i for i in cancelled if i < len(asked) and i % 2}
    while coming or clock.queue or clock.running:
        while coming and coming[0].arrival <= clock.now:
            ahead[id(coming[0])] = len(clock.queue)
            clock.queue.append(coming.pop(0))
        clock.round()
        for i in gone:  # whoever waits may stop waiting
            if asked[i] in clock.queue and clock.now > asked[i].arrival + 2:
                clock.queue.remove(asked[i])
                clock.table.release(asked[i])
        assert clock.now < 10_000
    longest = max(a.rounds for a in asked)
    for i, a in enumerate(asked):
        assert a.began is not None or i in gone
        if a.began is not None:
            assert a.began - a.arrival <= longest * (1 + ahead[id(a)])
    assert clock.table.pins == [0] * slots
    clock.table.check()


def test_a_steady_stream_starves_nobody():
    """Somebody always uses each of two adapters; who wants two others gets both slots within one request's time."""
    clock = Clock(2)
    late = Asked((8, 9), 3, 10)
    for now in range(60):
        clock.queue.append(Asked((now % 2,), 5, now))
        if now == late.arrival:
            clock.queue.append(late)
        clock.round()
    assert late.began is not None
    assert late.began - late.arrival <= 5


def test_what_the_first_needs_and_finds_there_stays():
    """Somebody who comes later would else take the slots of adapter 0, and be waited for."""
    table = SlotTable(7, two_of_some)
    table.take("a", [0])
    table.take("b", [4])
    table.release("a")
    assert table.take("c", [0, 8, 1, 5]) is None  # one slot too few
    assert table.take("d", [2, 3], drain=False) is None
    assert table.take("e", [0], drain=False) == []  # whoever else uses it is not in the way
    table.release("b")
    assert table.take("c", [0, 8, 1, 5]) is not None
    table.check()


def test_who_has_its_adapter_passes_who_waits():
    table = SlotTable(3)
    assert table.take("a", [1, 2]) == [(1, (0,)), (2, (1,))]
    assert table.take("b", [5, 6]) is None  # one slot is free, and one of the others is kept
    assert table.take("c", [2], drain=False) == []
    assert table.take("d", [1], drain=False) is None  # the kept one: nobody begins to use what is in it
    assert table.take("d", [7], drain=False) is None  # nor takes the free one
    table.release("a")
    assert table.take("d", [1], drain=False) is None
    assert sorted(table.take("b", [5, 6]) or []) == [(5, (2,)), (6, (0,))]
    assert table.slots(1) is None
    table.check()


def test_two_who_wait_for_each_others_adapters_both_get_them():
    table = SlotTable(2)
    table.take("a", [1])
    table.take("b", [2])
    assert table.take("c", [1, 3]) is None
    assert table.take("d", [2, 4], drain=False) is None
    table.release("b")
    assert table.take("c", [1, 3]) == [(3, (1,))]
    assert table.take("d", [2, 4]) is None
    for owner in ("a", "c"):
        table.release(owner)
    assert sorted(a for a, _ in table.take("d", [2, 4]) or []) == [2, 4]


def test_the_least_recently_used_goes_first_and_pinned_ones_stay():
    table = SlotTable(3)
    for a in (1, 2, 3):
        table.take(a, [a])
        table.release(a)
    table.take("again", [1])
    table.release("again")
    table.take("pin", [2])
    assert table.take("x", [4]) == [(4, (2,))]  # 3 was used last before 1
    assert table.take("y", [5]) == [(5, (0,))]
    assert table.take("z", [6]) is None
    assert table.evictions == 2


def test_a_cancelled_request_keeps_no_slots():
    table = SlotTable(1)
    table.take("a", [1])
    assert table.take("b", [2]) is None
    assert table.take("c", [1], drain=False) is None
    table.release("b")
    assert table.take("c", [1], drain=False) == []


def test_what_is_held_is_not_forgotten_and_too_many_are_refused():
    table = SlotTable(2)
    table.take("a", [1])
    with pytest.raises(ValueError, match="expected one that nobody holds"):
        table.forget(1)
    with pytest.raises(ValueError, match="expected at most 2"):
        table.take("b", [1, 2, 3])
    table.release("a")
    table.take("b", [2])
    table.forget(1)
    table.release("b")
    assert table.take("c", [3]) == [(3, (0,))]  # empty slots first
    table.check()


def test_a_large_adapter_has_all_its_slots_and_gives_them_back_together():
    sizes = {1: 2, 2: 1, 3: 3, 4: 1}
    table = SlotTable(4, sizes.__getitem__)
    assert table.take("a", [1]) == [(1, (0, 1))]
    assert table.take("b", [2]) == [(2, (2,))]
    assert table.take("c", [3]) is None  # one is free; the two of 1 are kept
    assert table.take("d", [2], drain=False) == []
    assert table.take("e", [1], drain=False) is None
    assert table.take("e", [4], drain=False) is None
    table.release("a")
    placed = table.take("c", [3])
    assert placed is not None
    assert len(set(placed[0][1])) == 3
    table.check()
    table.release("c")
    assert len(table.take("e", [4]) or []) == 1  # in one of its slots: the others are empty, too
    assert table.slots(3) is None
    assert table.adapters.count(None) == 2
    table.check()
    with pytest.raises(ValueError, match=r"expected at most 4 .the slots., found 5"):
        table.take("f", [1, 3])
