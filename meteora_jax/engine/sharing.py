"""Engines of one pool: whoever waits for slots moves on those who hold them.

A model makes a second engine where a call needs more room than the first one has while that one serves, and users make
their own. A request keeps its slots to its end, and an engine works only while somebody asks it to: a stream that is
read to its half would keep them for ever.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from typing import Any, Protocol, runtime_checkable

from meteora_jax.engine.scheduler import Scheduler


@runtime_checkable
class Member(Protocol):
    """What is asked of an engine."""

    def step_for_others(self) -> bool:
        """One round for another's sake; False: it had nothing to do, or a thread of its own is at it."""
        ...


class Sharing:
    """The engines that live, and the requests of those that do not."""

    def __init__(self) -> None:
        self._members: weakref.WeakSet[Any] = weakref.WeakSet()
        self._gone: deque[Scheduler] = deque()
        self._lock = threading.Lock()  # of the members

    def add(self, engine: Member, scheduler: Scheduler) -> None:
        """An engine, and what knows its requests when it is no more."""
        with self._lock:
            self._members.add(engine)
        # the collector calls this wherever a thread happens to be, so it takes no lock and changes no table
        weakref.finalize(engine, self._gone.append, scheduler).atexit = False

    def release_gone(self) -> None:
        """Ends the requests of engines that nobody can reach any more; under the pool's lock."""
        while self._gone:
            self._gone.popleft().release_all()

    def step_others(self, asking: Member | None) -> bool:
        """A round of every other engine; whether one had something to do."""
        with self._lock:
            others = [m for m in self._members if m is not asking]
        return sum(m.step_for_others() for m in others) > 0  # `any` would stop at the first
