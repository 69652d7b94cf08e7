"""Problems dealt out among processes that share nothing else; the first one is told what the others answered, and
tells them what it knows alone.

All of it travels through the key-value store of the coordinator that `jax.distributed` starts with the first process:
no device takes part, nobody waits but for what the first one knows alone, and hosts need no common disk.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from meteora_jax.evaluation.problems import Problem
from meteora_jax.evaluation.runner import KEPT, Answer

POLL = 0.2  # seconds between two looks for others' answers
LONGEST = 7 * 24 * 3600 * 1000  # milliseconds that a process waits for another


class Exchange:
    """One process' side: of `count` that deal out problems, the `index`-th."""

    def __init__(self, index: int, count: int):
        from jax._src import distributed  # the store has no public name

        self.index, self.count = index, count
        self._store: Any = distributed.global_state.client
        self._rounds, self._sent, self._asked = itertools.count(), itertools.count(), itertools.count()

    def dealt(self, answer: Answer) -> Answer:
        """`answer` of this process' share of what it is asked; in the first process of all of it, as it ends.

        The others give their own answers alone. Every process must be asked the same, in the same order.
        """

        def deal(asked: Sequence[tuple[str, Problem]]) -> Iterator[tuple[int, dict[str, Any]]]:
            key = f"meteora/answers/{next(self._rounds)}/"
            places = range(self.index, len(asked), self.count)
            own = answer([asked[i] for i in places]) if places else ()
            if self.index == 0:
                yield from self._collected(key, own, places, len(asked))
            else:
                yield from self._told(key, own, places)

        return deal

    def as_the_first_says(self, said: list[Any]) -> list[Any]:
        """What the first process says, in every process: a list of what JSON has. What the others say is dropped."""
        key = f"meteora/said/{next(self._asked)}"
        if self.index == 0:
            self._store.key_value_set(key, json.dumps(said))
            return said
        return json.loads(self._store.blocking_key_value_get(key, LONGEST))

    def finish(self) -> None:
        """Waits until every process has come to this: the store ends with the first one."""
        self._store.wait_at_barrier("meteora/answers/end", LONGEST)

    def _told(self, key: str, own: Any, places: range) -> Iterator[tuple[int, dict[str, Any]]]:
        """This process' answers; the first process is told of them, KEPT at a time."""
        kept: list[tuple[int, dict[str, Any]]] = []
        for place, said in own:
            kept.append((places[place], said))
            if len(kept) == KEPT:
                self._tell(key, kept)
                kept = []
            yield places[place], said
        self._tell(key, kept)

    def _tell(self, key: str, kept: Sequence[tuple[int, dict[str, Any]]]) -> None:
        if kept:
            self._store.key_value_set(f"{key}{self.index}/{next(self._sent)}", json.dumps(kept))

    def _collected(self, key: str, own: Any, places: range, count: int) -> Iterator[tuple[int, dict[str, Any]]]:
        """This process' answers and those that the others tell of, until there are `count`."""
        left = count
        for place, said in own:
            left -= 1
            yield places[place], said
            for other in self._heard(key):
                left -= 1
                yield other
        while left:
            others = list(self._heard(key))
            left -= len(others)
            yield from others
            if not others:
                time.sleep(POLL)

    def _heard(self, key: str) -> Iterator[tuple[int, dict[str, Any]]]:
        for name, told in self._store.key_value_dir_get(key):
            self._store.key_value_delete(name)
            yield from json.loads(told)


def exchange() -> Exchange | None:
    """This process' side of all of a run's; None where it is alone."""
    return Exchange(jax.process_index(), jax.process_count()) if jax.process_count() > 1 else None
