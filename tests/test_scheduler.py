"""The scheduler and its blocks without a device: a clock of rounds, and requests that end when they like."""

from __future__ import annotations

import dataclasses
import itertools
from collections import deque

import pytest
from extent import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from meteora_jax.engine.blocks import BlockPool
from meteora_jax.engine.job import Job, thinned
from meteora_jax.engine.prefix_cache import PrefixCache
from meteora_jax.engine.request import Progress, Request
from meteora_jax.engine.scheduler import Limits, Plan, Scheduler
from pallas_kernels.paged_attention import QUERY_BLOCK


@dataclasses.dataclass
class Clock:
    """Plans, and carries them out two rounds later, as a device that is never waited for."""

    scheduler: Scheduler
    lengths: dict[int, int]  # how many tokens each response has before its end token
    in_flight: deque[tuple[Plan, list[tuple[Progress, int]]]] = dataclasses.field(default_factory=deque)
    drawn: dict[int, int] = dataclasses.field(default_factory=dict)  # what the device has drawn for each
    done: list[int] = dataclasses.field(default_factory=list)
    rounds: int = 0

    def round(self) -> None:
        self.rounds += 1
        plan = self.scheduler.plan(bool(self.in_flight))
        if plan is not None:
            self.check(plan)
            draws = [(p, plan.steps) for p in plan.decoding] + [(c.progress, 1) for c in plan.chunks if c.last]
            self.in_flight.append((plan, draws))
        if self.in_flight and (plan is None or len(self.in_flight) > 1):
            for p, most in self.in_flight.popleft()[1]:
                self.carry_out(p, most)

    def check(self, plan: Plan) -> None:
        limits, size = self.scheduler.limits, self.scheduler.cache.block_size
        rows = [p.row for p in plan.decoding] + [c.progress.row for c in plan.chunks]
        assert None not in rows
        assert len(set(rows)) == len(rows) <= limits.rows
        padded = sum(-(-(c.stop - c.start) // QUERY_BLOCK) * QUERY_BLOCK for c in plan.chunks)
        assert len(plan.decoding) + padded <= limits.tokens
        assert plan.steps == 1 or not plan.chunks
        for p in self.scheduler.running:
            assert len(p.blocks) * size >= p.slots
            assert len(set(p.blocks)) == len(p.blocks)
        self.scheduler.cache.pool.check()

    def carry_out(self, p: Progress, most: int) -> None:
        for _ in range(most):
            if p.finish_reason is not None:
                return
            if len(p.tokens) == self.lengths[p.number]:
                self.end(p, "end")
            else:
                p.tokens.append(1)
                self.scheduler.learned(p)
                if len(p.tokens) == p.request.max_new_tokens:
                    self.end(p, "length")

    def end(self, p: Progress, reason) -> None:
        self.scheduler.release(p)
        p.finish_reason = reason
        self.done.append(p.number)


def new(number: int, prompt: int, most: int, shared: int = 0) -> Progress:
    tokens = (7,) * shared + (number + 10,) * (prompt - shared)
    return Progress(Request(tokens, most), number, list(tokens))


asked = st.tuples(st.integers(1, 70), st.integers(1, 40), st.integers(0, 45), st.integers(0, 30), st.integers(0, 70))


@settings(max_examples=examples(60, 1000), deadline=None)
@given(
    st.lists(asked, min_size=1, max_size=25), st.integers(1, 6), st.integers(0, 60), st.sampled_from([1, 4, 16]),
    st.integers(0, 20), st.sampled_from([1, 3, 8]),
)  # fmt: skip
def test_every_request_ends_and_every_block_comes_back(asked, rows, tokens, block_size, spare, steps):
    """(prompt, most, tokens before its end, arrival, tokens shared with others) each; few blocks preempt."""
    blocks = max(-(-(prompt + most) // block_size) for prompt, most, *_ in asked) + spare
    scheduler = Scheduler(Limits(rows, rows + QUERY_BLOCK + tokens, steps), PrefixCache(blocks, block_size))
    clock = Clock(scheduler, {i: length for i, (_, _, length, _, _) in enumerate(asked)})
    coming = sorted((arrival, i) for i, (_, _, _, arrival, _) in enumerate(asked))
    oldest_preempted = 0
    while coming or scheduler.busy or clock.in_flight:
        while coming and coming[0][0] <= clock.rounds:
            _, i = coming.pop(0)
            prompt, most, _, _, shared = asked[i]
            scheduler.add(new(i, prompt, most, min(shared, prompt)))
        first = scheduler.running[0] if scheduler.running else None
        before = 0 if first is None else first.preemptions
        clock.round()
        oldest_preempted += first is not None and first.preemptions > before
        assert clock.rounds < 20_000
    assert sorted(clock.done) == list(range(len(asked)))
    assert oldest_preempted == 0  # so somebody always comes nearer to its end
    assert scheduler.cache.pool.available == blocks
    scheduler.cache.pool.check()


def test_a_step_reads_less_where_its_program_would_be_padded_more():
    """Sizes of programs and what may be padded are such that no step reads nothing."""
    limits = Limits(8, 20_000, prompt_sizes=(64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384))
    assert [limits.prompt_tokens(n) for n in (0, 48, 64, 272, 544, 832)] == [0, 48, 64, 272, 512, 832]
    assert [limits.prompt_tokens(n) for n in (4300, 7168, 7184, 12_000, 16_000)] == [4096, 7168, 7184, 8192, 16_000]
    assert Limits(8, 20_000).prompt_tokens(4300) == 4300


def test_first_come_first_served():
    scheduler = Scheduler(Limits(2, 2 + 2 * QUERY_BLOCK, 4), PrefixCache(64, 8))
    for i in range(6):
        scheduler.add(new(i, 100, 1))
    clock = Clock(scheduler, dict.fromkeys(range(6), 5))
    while scheduler.busy or clock.in_flight:
        clock.round()
    assert clock.done == list(range(6))


def test_a_prompt_that_comes_late_does_not_stop_those_that_decode():
    scheduler = Scheduler(Limits(4, 4 + 2 * QUERY_BLOCK), PrefixCache(64, 8))
    early = new(0, 10, 50)
    scheduler.add(early)
    clock = Clock(scheduler, {0: 100, 1: 100})
    for _ in range(3):
        clock.round()
    scheduler.add(new(1, 160, 4))
    before = early.promised
    for _ in range(5):  # five chunks of 32
        plan = scheduler.plan(True)
        assert plan is not None
        assert [c.progress.number for c in plan.chunks] == [1]
        assert [p.number for p in plan.decoding] == [0]
    assert early.promised == before + 5


def test_what_two_requests_share_is_read_once():
    cache = PrefixCache(32, 8)
    scheduler = Scheduler(Limits(4, 100), cache)
    scheduler.add(new(0, 40, 4, shared=35))
    clock = Clock(scheduler, dict.fromkeys(range(3), 100))
    clock.round()
    late = new(1, 40, 4, shared=35)
    scheduler.add(late)
    clock.round()
    assert late.skipped == 32
    while scheduler.busy or clock.in_flight:
        clock.round()
    other = dataclasses.replace(new(2, 40, 4, shared=35))
    other.request = dataclasses.replace(other.request, trace=True)  # a trace needs every token
    scheduler.add(other)
    clock.round()
    assert other.skipped == 0


def test_a_prefix_is_of_what_acted_on_it():
    cache = PrefixCache(8, 4)
    keys = cache.keys(range(9), b"")
    cache.publish(keys, cache.pool.take(2))
    assert cache.match(cache.keys(range(9), b"gates"), 9) == []
    assert len(cache.match(cache.keys(range(9), b""), 9)) == 2
    assert cache.keys(range(9), b"", keys[:1]) == keys
    assert len(cache.match(keys, 8)) == 1  # the last token is read: its logits are wanted


def test_the_least_recently_used_goes_first():
    cache = PrefixCache(4, 4)
    for first in (0, 100):
        blocks = cache.pool.take(2)
        cache.publish(cache.keys(range(first, first + 8), b""), blocks)
        cache.pool.release(blocks)
    assert cache.pool.idle == 4
    cache.pool.release(cache.match(cache.keys(range(8), b""), 9))  # used again
    cache.pool.release(cache.pool.take(2))
    assert len(cache.match(cache.keys(range(8), b""), 9)) == 2
    assert cache.match(cache.keys(range(100, 108), b""), 9) == []


def test_a_block_is_released_once():
    pool = BlockPool(3)
    blocks = pool.take(2)
    pool.release(blocks)
    with pytest.raises(ValueError, match="expected one that is held"):
        pool.release(blocks)
    with pytest.raises(ValueError, match="expected at most 3, found 4"):
        pool.take(4)


def test_a_job_uses_few_of_the_sizes():
    sizes = (1, 8, 32, 64, 128, 256)
    assert thinned(sizes, 480, 16) == (8, 256)
    assert thinned(sizes, 40, 16) == (1, 64, 128, 256)  # those above hold what comes meanwhile
    assert thinned(sizes, 1, 16) == sizes
    assert thinned((64, 128, 256, 512, 1024, 2048), 500, 4) == (128, 512, 1024, 2048)
    job = Job(any_table=True)
    for length in (20, 300):
        job.add(Request((5,) * length, 12))
    assert job.prompts((64, 128, 256, 512)) == (128, 512)
    assert (job.tables((8, 32, 128), 8), job.tables((8, 32, 128), 64)) == ((128,), (8, 32, 128))
    assert Job(any_table=False).tables((8, 32, 128), 8) == (8, 32, 128)


def test_after_an_end_the_next_request_need_not_wait_for_a_long_dispatch():
    """Steps are given one at a time for a while, but not where somebody waits for the row, or for nobody."""
    steps = []
    scheduler = Scheduler(Limits(3, 3 + 2 * QUERY_BLOCK, 8), PrefixCache(64, 16))
    clock = Clock(scheduler, {0: 60, 1: 9, 2: 5})
    for i in (0, 1):
        scheduler.add(new(i, 8, 60))
    while scheduler.busy or clock.in_flight:
        known = {i: i in clock.done for i in (0, 1)}
        clock.round()
        if clock.in_flight and known[0] is False:
            steps.append((known[1], clock.in_flight[-1][0].steps))
    before, after = [n for ended, n in steps if not ended], [n for ended, n in steps if ended]
    assert before[1:] == [8] * (len(before) - 1)  # behind the prompts
    assert after[:6] == [1] * 6
    assert after[6] == 8
    scheduler.add(new(3, 8, 30))  # alone: nobody else is expected
    clock.lengths[3], alone = 30, list[int]()
    while scheduler.busy or clock.in_flight:
        if (plan := scheduler.plan(bool(clock.in_flight))) is not None:
            alone.append(plan.steps)
            draws = [(p, plan.steps) for p in plan.decoding] + [(c.progress, 1) for c in plan.chunks]
            clock.in_flight.append((plan, draws))
        for p, most in clock.in_flight.popleft()[1]:
            clock.carry_out(p, most)
    assert alone[:3] == [1, 8, 8]


def test_who_waits_gets_the_row_of_one_whose_last_token_is_promised():
    """Its row and blocks are given away before the host knows that token, and it still ends with all its tokens."""
    scheduler = Scheduler(Limits(2, 2 + 4 * QUERY_BLOCK, 8), PrefixCache(64, 8))
    clock = Clock(scheduler, dict.fromkeys(range(3), 100))
    first, second, third = (new(i, 8, most) for i, most in enumerate((1 + 8, 60, 5)))
    for p in (first, second, third):
        scheduler.add(p)
    for _ in range(2):  # the prompts, and eight steps
        clock.round()
    assert third.row is None
    assert len(first.tokens) == 1
    clock.round()
    assert [c.progress for c in clock.in_flight[-1][0].chunks] == [third]
    while scheduler.busy or clock.in_flight:
        clock.round()
    assert [len(p.tokens) for p in (first, second, third)] == [9, 60, 5]
    assert [p.finish_reason for p in (first, second, third)] == ["length"] * 3
    assert scheduler.cache.pool.available == 64


def test_a_row_given_away_leaves_a_request_that_can_be_cancelled():
    scheduler = Scheduler(Limits(1, 1 + QUERY_BLOCK, 8), PrefixCache(64, 8))
    first, second = new(0, 8, 1), new(1, 8, 1)
    for p in (first, second):
        scheduler.add(p)
    for _ in range(2):
        assert scheduler.plan(True) is not None
    assert (first.row, second.row) == (None, 0)
    scheduler.release(first)
    scheduler.release(second)
    assert not scheduler.busy
    assert scheduler.cache.pool.available == 64
    scheduler.cache.pool.check()


@pytest.mark.parametrize(("waiting", "gathers"), [(40, True), (2, False)])
def test_in_a_crowd_a_long_dispatch_follows_every_step_with_prompts(waiting, gathers):
    """So those whose rows become free one after the other are let in together; where few wait, each at once."""
    rows = 16
    scheduler = Scheduler(Limits(rows, rows + 64 * QUERY_BLOCK, 8), PrefixCache(400, 16))
    clock = Clock(scheduler, {})
    for i in range(rows + waiting):
        clock.lengths[i] = 100
        scheduler.add(new(i, 16, 20 + 3 * (i % rows)))
    plans = []
    while scheduler.waiting:
        crowd = len(scheduler.waiting) > len(scheduler._rows) + rows // 8
        clock.round()
        plans.append((crowd, clock.in_flight[-1][0]))
    behind = [plan.steps for (_, before), (crowd, plan) in itertools.pairwise(plans) if before.chunks and crowd]
    assert bool(behind) == gathers
    assert set(behind) <= {8}
    while scheduler.busy or clock.in_flight:
        clock.round()
    assert sorted(clock.done) == list(range(rows + waiting))
