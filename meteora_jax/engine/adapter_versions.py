"""Which adapters there are: names, their versions, and who still uses one that was replaced or unloaded."""

from __future__ import annotations

import dataclasses
import shutil
import weakref
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from meteora_jax.config import AdapterInfo, InputError
from meteora_jax.io.stored_bank import StoredBank
from meteora_jax.routing import NO_ADAPTER


class AdapterGone(InputError):
    """A request names a version of an adapter that was unloaded, or loaded anew, since the request was made."""


@dataclasses.dataclass(frozen=True, eq=False)
class AdapterVersion:
    """One version of an adapter: number is never used twice, version counts from 1 under each name; scratch: a folder
    that goes with it. slots: that it takes."""

    number: int
    name: str
    version: int
    info: AdapterInfo
    bank: StoredBank
    place: int
    scratch: Path | None = None
    slots: int = 1


class AdapterVersions:
    """Versions that can be asked for, each the newest of its name, and older ones that somebody uses."""

    def __init__(self):
        self._names: dict[str, AdapterVersion] = {}
        self._last: dict[str, int] = {}
        self._held: dict[int, AdapterVersion] = {}
        self._users: dict[int, int] = {}
        self._called: list[str] = []  # by number

    def __getitem__(self, number: int) -> AdapterVersion:
        return self._held[number]

    def __contains__(self, number: int) -> bool:
        return number in self._held

    def names(self) -> tuple[str, ...]:
        """Those that can be asked for, in the order in which they came."""
        return tuple(self._names)

    def find(self, names: Iterable[str]) -> list[AdapterVersion]:
        """The newest version of each name that there is."""
        return [self._names[name] for name in names if name in self._names]

    def newest(self, names: Sequence[str]) -> list[AdapterVersion]:
        """The newest version of each name. Raises InputError: no adapter has one of them."""
        if unknown := [name for name in names if name not in self._names]:
            known = list(self._names)
            some = ", ".join(known[:8]) + (f" and {len(known) - 8} more" if len(known) > 8 else "")
            raise InputError([f"router: adapter: expected one of {some or 'none'}, found {n!r:.200}" for n in unknown])
        return [self._names[name] for name in names]

    def add(
        self, name: str, bank: StoredBank, place: int, scratch: Path | None = None, slots: int = 1
    ) -> AdapterVersion:
        """A new version of a name; the older one must be retired first."""
        self._last[name] = self._last.get(name, 0) + 1
        number = len(self._called)
        new = AdapterVersion(number, name, self._last[name], bank.config.adapters[place], bank, place, scratch, slots)
        self._called.append(name)
        self._names[name] = self._held[number] = new
        self._users[number] = 0
        if scratch is not None:  # also where the process ends, or nobody has the pool any more
            weakref.finalize(new, shutil.rmtree, scratch, ignore_errors=True)
        return new

    def retire(self, name: str) -> list[int]:
        """A name that nobody can ask for any more; the version's number where nobody uses it either."""
        old = self._names.pop(name)
        return self._gone([old.number])

    def use(self, numbers: Sequence[int]) -> None:
        """One more user of each. Raises AdapterGone: one of them is."""
        if any(n not in self._held for n in numbers):
            raise AdapterGone("router: expected adapters that are loaded, found one that was unloaded since")
        for n in numbers:
            self._users[n] += 1

    def leave(self, numbers: Sequence[int]) -> list[int]:
        """One user less of each; those that are gone now."""
        for n in numbers:
            self._users[n] -= 1
        return self._gone(numbers)

    def _gone(self, numbers: Sequence[int]) -> list[int]:
        gone = [n for n in numbers if not self._users[n] and self._names.get(self._called[n]) is not self._held[n]]
        for n in gone:
            if (scratch := self._held[n].scratch) is not None:
                shutil.rmtree(scratch, ignore_errors=True)
            del self._held[n], self._users[n]
        return gone

    def named_choices(self, numbers: np.ndarray) -> tuple[tuple[str, ...], np.ndarray]:
        """The names among versions that acted (also of those that are gone), and int32, for each its place in them."""
        acted = [int(n) for n in np.unique(numbers) if n >= 0]
        names = tuple(dict.fromkeys(self._called[n] for n in acted))
        places = np.full(max(acted, default=0) + 2, NO_ADAPTER, np.int32)  # the last for NO_ADAPTER
        for n in acted:
            places[n] = names.index(self._called[n])
        return names, places[numbers]
