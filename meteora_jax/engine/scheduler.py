"""Who is served next: first come, first served, by whole steps under a budget of tokens. Knows of no device.

A request waits, then has a row and blocks, reads its prompt in chunks, and decodes. Every step serves all rows that
decode, and gives what is left of its budget to prompts in the order of their arrival. When blocks run out, the request
that came last gives its own back and waits again, in front; its response so far is read again like a prompt. A row is
free for who waits as soon as its request's last token is promised by the dispatches that the device was given.

With an adapter pool a request is ready once its adapters lie in slots. One that is not is passed by those behind it
that are; what it needs is kept for it in the order of the queue (`slots`). It keeps its slots until its end, also while
it waits a second time.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import deque
from collections.abc import Iterable
from typing import Literal, Protocol

from meteora_jax.config import InputError
from meteora_jax.engine.prefix_cache import PrefixCache
from meteora_jax.engine.request import BoundRow, Progress, WantedAdapters
from pallas_kernels.paged_attention import QUERY_BLOCK

PASSING = 4  # times the rows: how far back in the queue somebody is looked for whose adapters are there
SOON = 6  # steps after an end in which its user's next request is expected
SHARE = 8  # a crowd waits: more than an eighth of the rows beyond those that are free; and fewer than that idle
SPARE = 256  # tokens that take about as long as reading all weights once


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a step may hold: rows (sequences at once), tokens (decoded ones and those of prompts together, at least
    QUERY_BLOCK more than rows), how many decoding steps are given to the device at a time while nothing arrives, and
    the numbers of prompt tokens that programs have (none: any)."""

    rows: int
    tokens: int
    steps: int = 8
    prompt_sizes: tuple[int, ...] = ()

    def prompt_tokens(self, wanted: int) -> int:
        """How many of `wanted` prompt tokens a step reads: the program's padding costs no more than a step that reads
        the rest."""
        larger = next((n for n in self.prompt_sizes if n >= wanted), wanted)
        smaller = max((n for n in self.prompt_sizes if n < wanted), default=wanted)
        return wanted if larger - wanted <= max(SPARE, larger // 8) else smaller


class Adapters(Protocol):
    """What a scheduler asks of an `AdapterPool`."""

    @property
    def changes(self) -> int:
        """How often what lies in the slots has changed."""
        ...

    def reserve(
        self, owner: Progress, wanted: WantedAdapters, drain: bool, fetch: bool
    ) -> Literal["ready", "loading", "waiting"]:
        """Whether a request may run. Raises InputError: it never can."""
        ...

    def dismiss(self, owner: Progress, wanted: WantedAdapters) -> None:
        """It needs nothing any more."""
        ...

    def place(self, wanted: WantedAdapters) -> BoundRow:
        """Its router over the slots."""
        ...

    def identity(self, wanted: WantedAdapters) -> bytes:
        """What acts on its tokens."""
        ...


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Part of a prompt that a step reads: todo[start:stop]; `last`: a token is drawn behind it."""

    progress: Progress
    start: int
    stop: int
    last: bool


@dataclasses.dataclass(frozen=True)
class Plan:
    """One dispatch: chunks of prompts beside one decoding step, or `steps` decoding steps."""

    decoding: tuple[Progress, ...]
    chunks: tuple[Chunk, ...]
    steps: int


class Scheduler:
    """The requests that wait and those that run."""

    def __init__(self, limits: Limits, cache: PrefixCache, adapters: Adapters | None = None):
        self.limits, self.cache, self.adapters = limits, cache, adapters
        self.copying = False  # whether somebody waits for a copy
        self.waiting: deque[Progress] = deque()
        self.running: list[Progress] = []  # in the order in which they got their rows
        self._rows = list(range(limits.rows - 1, -1, -1))
        self.preemptions = 0
        self._expecting = 0  # steps in which somebody whose request ended may ask again
        self.ending: set[Progress] = set()  # without a row by now, their last tokens not known yet
        self._read = False  # whether the last dispatch read prompts

    @property
    def busy(self) -> bool:
        """Whether a request is left."""
        return bool(self.waiting or self.running or self.ending)

    def capacity(self) -> int:
        """Positions that one request can have."""
        return self.cache.pool.count * self.cache.block_size

    def add(self, progress: Progress) -> None:
        """A request at the end of the queue."""
        if not self.busy:
            self._expecting = 0  # who was expected is here
        self.waiting.append(progress)

    def release(self, progress: Progress) -> None:
        """Takes a request out, wherever it stands; what it has read stays findable."""
        if progress in self.running:
            self.running.remove(progress)
            self._give_back(progress)
            self._expecting = SOON
        elif progress in self.ending:
            self.ending.remove(progress)
            self._expecting = SOON
        elif progress in self.waiting:
            self.waiting.remove(progress)
        else:
            return
        if self.adapters is not None and progress.request.adapters is not None:
            self.adapters.dismiss(progress, progress.request.adapters)

    def release_all(self) -> None:
        """Takes out every request."""
        for progress in (*self.running, *self.ending, *self.waiting):
            self.release(progress)

    def plan(self, in_flight: bool) -> Plan | None:
        """The next dispatch; None: there is nothing to do, or its results must be awaited first.

        in_flight: whether results are outstanding. A request is preempted only when all its tokens are known.
        """
        if self.waiting:
            self._make_room()
        decoding = [p for p in self.running if not p.prefilling and p.left > 0 and not p.awaited]
        # in a crowd a long dispatch follows each step with prompts, and the next reads all that came together meanwhile
        pause = self._read and self._crowded(len(decoding))
        if not pause:
            self._admit()
        chunks, reads = [], not pause and any(p.prefilling for p in self.running)
        # A guide has to see a token before the next is drawn: its row sits out the dispatch behind its own, and others
        # go on. A longer dispatch of these alone would make it wait for all its steps, to spare them a host that is not
        # in the way as long as a step takes longer than planning one: it plans while the device works.
        if reads or any(p.request.guide is not None for p in self.running):
            steps = 1
        elif not decoding:
            return None
        else:  # who waits for a row or for blocks waits for the end of these: those let in together share a step
            few = self.copying or max(p.left for p in decoding) <= self.limits.steps // 2
            soon = self._expecting > 0 and not self.waiting  # a long dispatch would keep the next request waiting
            steps = 1 if few or soon else self.limits.steps
        self._expecting -= self._expecting > 0
        if not self._grow(decoding, steps):
            steps = 1
            if not self._grow(decoding, steps):
                if in_flight:
                    return None
                while not self._grow(decoding, steps):
                    victim = self.running[-1]
                    self._preempt(victim)
                    decoding = [p for p in decoding if p is not victim]
        reading = [p for p in self.running if p.prefilling] if reads else []
        left = (-(-(len(p.todo) - p.read) // QUERY_BLOCK) * QUERY_BLOCK for p in reading)
        budget = self.limits.prompt_tokens(min(self.limits.tokens - len(decoding), sum(left)))
        for p in reading:
            if budget < QUERY_BLOCK:
                break
            stop = min(len(p.todo), p.read + budget // QUERY_BLOCK * QUERY_BLOCK)
            chunks.append(Chunk(p, p.read, stop, stop == len(p.todo)))
            budget -= -(-(stop - p.read) // QUERY_BLOCK) * QUERY_BLOCK
        if not chunks and not decoding:
            return None
        self._read = bool(chunks)
        for p in decoding:
            p.promised += min(steps, p.left)
        for chunk in chunks:
            chunk.progress.read = chunk.stop
            chunk.progress.promised += chunk.last
            self._publish(chunk.progress, chunk.stop)
        return Plan(tuple(decoding), tuple(chunks), steps)

    def _make_room(self) -> None:
        """Takes rows and blocks from those who have been promised all their tokens: the device writes what others put
        there behind these."""
        for p in [p for p in self.running if not p.prefilling and p.left <= 0]:
            self.running.remove(p)
            self._give_back(p)
            self.ending.add(p)

    def _crowded(self, decoding: int) -> bool:
        """Whether rows are so well used, and so many wait, that fewer steps with prompts serve those who wait sooner:
        each of these takes about as long as a decoding step and its prompts' tokens together."""
        share = self.limits.rows // SHARE
        if len(self.waiting) <= len(self._rows) + share or self.limits.rows - decoding > share:
            return False
        return not self.copying and all(p.request.guide is None for p in self.running)

    def learned(self, progress: Progress) -> None:
        """Makes blocks findable that are full of tokens which the host knows by now."""
        if not self.cache.enabled or progress.row is None or self._changed(progress):
            return
        known = len(progress.request.prompt) + len(progress.tokens)
        if (known - 1) // self.cache.block_size > len(progress.keys):
            whole = [*progress.request.prompt, *progress.tokens]
            progress.keys = self.cache.keys(whole[: known - 1], progress.identity, progress.keys)
        self._publish(progress, min(known - 1, progress.slots))

    def _publish(self, progress: Progress, read: int) -> None:
        if self._changed(progress):
            return
        full = read // self.cache.block_size
        self.cache.publish(progress.keys[:full], progress.blocks[:full])

    def _changed(self, progress: Progress) -> bool:
        """Whether what may be chosen for a request is not what it was when its keys were made."""
        wanted = progress.request.adapters
        return wanted is not None and wanted.every and self.adapters is not None and (
            progress.changes != self.adapters.changes
        )  # fmt: skip

    def _place(self, progress: Progress) -> None:
        """Binds a request to what it found, and says how its blocks are found again."""
        wanted, router = progress.request.adapters, progress.request.router
        if wanted is None or self.adapters is None:
            progress.identity = b"" if router is None else router.identity
            return
        progress.identity = self.adapters.identity(wanted)
        progress.placed = self.adapters.place(wanted)
        progress.placed_at = progress.changes = self.adapters.changes

    def _ready(self) -> Iterable[Progress]:
        """Those who wait and have their adapters, in the order of the queue; copies for others are begun."""
        if self.adapters is None:
            return list(itertools.islice(self.waiting, len(self._rows)))
        ready, drain, self.copying = [], True, False
        for i, p in enumerate(tuple(itertools.islice(self.waiting, PASSING * self.limits.rows))):
            if i >= self.limits.rows and len(ready) >= len(self._rows):
                break
            wanted = p.request.adapters
            try:
                state = "ready" if wanted is None else self.adapters.reserve(p, wanted, drain, i < self.limits.rows)
            except InputError as e:
                p.failure = e
                continue
            drain &= state != "waiting"
            self.copying |= state == "loading" and bool(self._rows)
            if state == "ready":
                ready.append(p)
        return ready

    def _admit(self) -> None:
        """Gives rows and the blocks of their whole prompts to those who wait, as long as there are any."""
        size, pool = self.cache.block_size, self.cache.pool
        for p in self._ready():
            if not self._rows:
                return
            self._place(p)
            p.keys = self.cache.keys(p.todo, p.identity)
            traced = p.request.trace  # what is traced must be read: all, or all behind the prompt
            own = [] if traced is True else p.keys[: len(p.request.prompt) // size] if traced else p.keys
            shared = self.cache.match(own, len(p.todo))
            need = -(-min(len(p.todo) + 1, p.most_slots) // size) - len(shared)
            # one block a running sequence is left to it, so that who is let in is not thrown out at once
            if need > pool.available - len(self.running) and (self.running or need > pool.available):
                pool.release(shared)
                return
            self.waiting.remove(p)
            p.blocks = shared + pool.take(need)
            p.read = p.skipped = len(shared) * size
            p.row = self._rows.pop()
            self.running.append(p)

    def _grow(self, decoding: list[Progress], steps: int) -> bool:
        """Blocks for so many more positions of each; False, and nothing taken, where there are too few."""
        size, pool = self.cache.block_size, self.cache.pool
        wanted = [max(0, -(-(p.slots + min(steps, p.left)) // size) - len(p.blocks)) for p in decoding]
        if sum(wanted) > pool.available:
            return False
        for p, n in zip(decoding, wanted, strict=True):
            p.blocks += pool.take(n)
        return True

    def _preempt(self, progress: Progress) -> None:
        """Back to the front of the queue; prompt and response so far are read again."""
        self.running.remove(progress)
        self._give_back(progress)
        progress.todo = [*progress.request.prompt, *progress.tokens]
        progress.read, progress.promised = 0, len(progress.tokens)
        progress.preemptions += 1
        self.preemptions += 1
        self.waiting.appendleft(progress)

    def _give_back(self, progress: Progress) -> None:
        self.cache.pool.release(progress.blocks)
        assert progress.row is not None
        self._rows.append(progress.row)
        progress.blocks, progress.row = [], None
