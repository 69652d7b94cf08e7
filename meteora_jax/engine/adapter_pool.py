"""Many adapters on disk, some of them in device slots: what a model of `mj.load(..., adapter_slots=N)` has as `pool`.

    model = mj.load(base, bank=bank, adapter_slots=64)
    model.pool.names()                          # every adapter that a request may name, wherever it lies
    model.pool.load(folder, "poems")            # -> 1, its version; again under the same name -> 2
    model.pool.unload("poems")
    model.generate([...], router=mj.Fixed("poems"))

All of it may be called from any thread while engines run. A request names adapters by its router, as ever: `Fixed`,
`Retrieval` and `GatesWithin` are given the newest version of each name when the request is made, and keep that version
to their end, whatever is loaded or unloaded meanwhile. It waits in the engine's queue until its adapters lie in slots,
all at once or none of them (see `slots`); who is behind it and has its own there goes on. `Gates` without names choose
for every token among the adapters that lie in slots when the step is given to the device, at least as many as their
top_k. A gate's column belongs to a name: a newer version is chosen by the column of the older one, and a name that
gates do not know is reached by routers that name it. Routers by score (`Arrow` and its like) choose as gates do, of all
names; from the first of them on copies bring what they read of an adapter's matrices. `Logo` would pass every prompt
through every adapter of the bank, and is refused.

An adapter is read from its memory-mapped BANK folder, checked, padded and copied to the device by a thread of the
pool, ahead of the request's turn; the engine writes it into its slot between two steps once it has arrived. Slots have
one shape, so no program changes. Steps that the device was given before the write still see the old content, since it
works in order.

A file that is corrupt or another base's is refused by `load` before anything of the pool changes; where a file of the
bank itself is found corrupt later, the requests that need it are refused, and no others.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from flax import nnx
from jax.sharding import Mesh
from numpy.typing import DTypeLike

from meteora_jax.config import BankConfig, InputError, LlamaConfig
from meteora_jax.engine.adapter_versions import AdapterVersion, AdapterVersions
from meteora_jax.engine.batch import bind_row
from meteora_jax.engine.copies import READERS, Copies, wait_for
from meteora_jax.engine.request import BoundRow, WantedAdapters
from meteora_jax.engine.sharing import Member, Sharing
from meteora_jax.engine.slot_weights import SlotWeights
from meteora_jax.engine.slots import SlotTable
from meteora_jax.engine.staging import Staged
from meteora_jax.gate_config import GateConfig
from meteora_jax.io.provenance import BaseOrigin
from meteora_jax.io.stored_bank import StoredBank, misfits_slots, slots_for
from meteora_jax.routing import NO_ADAPTER, NamedAdapters, bind
from meteora_jax.routing.alora import watch
from meteora_jax.routing.gates import GATES
from meteora_jax.sharding import Params

# of a PEFT folder, the BANK folder that is made of it, the adapter's name, and whether any base will do
Import = Callable[[Path, Path, str, bool], None]
State = Literal["ready", "loading", "waiting"]


@dataclasses.dataclass
class PoolCounters:
    """What a pool has done: adapters copied into slots, requests that found theirs there or did not, and how long
    engines had nothing to do but wait for copies, in seconds."""

    copies: int = 0
    hits: int = 0
    misses: int = 0
    stalled: float = 0.0


class AdapterPool:
    """The adapters of a model with slots; see above."""

    def __init__(
        self, stored: StoredBank, slots: BankConfig, graph: nnx.GraphDef, weights: Params, config: LlamaConfig,
        gates: GateConfig | None = None, columns: Mapping[tuple[str, ...], np.ndarray] | None = None,
        mesh: Mesh | None = None, dtype: DTypeLike = np.float32, origin: BaseOrigin | None = None,
        importer: Import | None = None,
    ):  # fmt: skip
        """Fills the slots with the bank's first adapters.

        Args:
            stored: the bank. slots: their description (`empty_slots`). graph, weights: a model with them, which is
                changed in place from now on. gates: of the model, which know all of the bank's adapters.
            columns: of the gates, [L, I, P, A] by their place in the module tree; none of a token router, whose columns
                have no slots.
            importer: of PEFT folders; None: only BANK folders can be loaded.
        """
        self.slots, self.config, self.gates, self.dtype, self.origin = slots, config, gates, dtype, origin
        self.lock = threading.RLock()  # of all below, and of the weights: whoever gives them to a program holds it
        self.counters, self.sharing = PoolCounters(), Sharing()
        self.table = SlotTable(len(slots.adapters), self._slots_of)
        self.changes = 0  # of what lies in the slots, or of what a name stands for
        self._columns = columns or {}
        self._router = gates is not None and gates.form is not None
        self._weights = SlotWeights(graph, weights, config, mesh, self._router)
        self._importer = importer
        self.versions = AdapterVersions()
        self._copies = Copies(self._weights, self.table, self._stage)
        self._choosable: dict[tuple[bool, bool], tuple[set[int], int]] = {}  # of `WantedAdapters`' gated and scored
        self._choosable_at = -1  # so many changes
        for place, info in enumerate(stored.config.adapters):
            self.versions.add(info.name, stored, place, slots=slots_for(info.rank, slots))
        self._fill()

    def names(self) -> tuple[str, ...]:
        """The adapters that a request may name, in the order in which they came."""
        with self.lock:
            return self.versions.names()

    def version(self, name: str) -> int:
        """The newest version of an adapter. Raises InputError: no adapter has the name."""
        with self.lock:
            return self.versions.newest([name])[0].version

    def resident(self) -> tuple[str, ...]:
        """The names whose newest version lies in a slot now."""
        with self.lock:
            return tuple(v.name for v in self.versions.find(self.versions.names()) if v.number in self._copies.there)

    def load(
        self, path: str | os.PathLike[str], name: str, *, adapter: str | None = None, any_base: bool = False
    ) -> int:
        """Makes an adapter known under a name, or a new version of that name; it gets a slot when a request needs it.

        Args:
            path: a PEFT folder, or a BANK folder. adapter: which one of a BANK folder; None: the one called `name`, or
                its only one. any_base: as in `Meteora.add_adapter`.

        Returns:
            the version, from 1.

        Raises:
            InputError: what `meteora import adapters` refuses, an adapter that the slots have no room for, values that
                are no finite numbers. The pool is then as it was.
        """
        path, scratch = Path(path), None
        if not isinstance(name, str) or not name:
            raise InputError(f"name: expected an adapter's name, found {name!r:.200}")
        try:
            if not (path / "bank.json").exists():
                if self._importer is None:
                    raise InputError(f"{path}: expected a BANK folder, found none")
                scratch = Path(tempfile.mkdtemp(prefix="meteora-adapter-"))
                self._importer(path, scratch / "bank", name, any_base)
                path, adapter = scratch / "bank", name
            bank = StoredBank(path, self.config, self.dtype, self.origin)
            place = bank.place(adapter, name)
            read = bank.adapter(place)
            count = slots_for(read.config.adapters[0].rank, self.slots)
            if problems := misfits_slots(read.config, self.slots, str(path)):
                raise InputError(problems)
        except BaseException:
            if scratch is not None:
                shutil.rmtree(scratch, ignore_errors=True)
            raise
        with self.lock:
            if self.versions.find([name]):
                self._drop(self.versions.retire(name))
            self.changes += 1
            return self.versions.add(name, bank, place, scratch, count).version

    def unload(self, name: str) -> None:
        """Takes a name away. What lies in a slot goes once no request uses it any more.

        Raises:
            InputError: no adapter has the name.
        """
        with self.lock:
            self.versions.newest([name])
            self._drop(self.versions.retire(name))
            self.changes += 1

    def want(self, router: Any, prompt: Sequence[int]) -> WantedAdapters | None:
        """What a request with this router asks of the pool; None: nothing, the base answers.

        Args:
            router: one whose text was looked up and whose words were spelled out.

        Raises:
            InputError: an unknown adapter, more of them than slots, a router that says of no token what it may choose.
        """
        if router is None:
            return None
        if not isinstance(router, NamedAdapters):
            wanted = "Fixed, Retrieval, Gates, GatesWithin, Arrow, Spectr, Lag or Phatgoose with adapter_slots"
            raise InputError(f"router: expected {wanted}, found {router!r:.200}")
        if router.needs_gates and self.gates is None:
            raise InputError(f"router: {router!r} expected trained gates, found a model loaded without them")
        with self.lock:
            named = router.named()
            every = isinstance(named, int)
            gated = bool(router.needs_gates)
            known_names = self.gates.names if gated and self.gates is not None else self.versions.names()
            if isinstance(named, int):
                versions = self._some(router, named, known_names, "gates know" if gated else "are loaded")
            else:
                versions = self.versions.newest(list(dict.fromkeys(named)))
        if not versions:
            return None
        if (count := sum(v.slots for v in versions)) > self.table.count:
            found = f"{len(versions)} of {count} slots"
            raise InputError(f"router: expected at most {self.table.count} adapters (the slots), found {found}")
        names = tuple(v.name for v in versions)
        if lacking := [n for n in names if gated and n not in known_names]:
            raise InputError(f"Gates: within: expected adapters that gates know, found {', '.join(lacking)}")
        view = dataclasses.replace(self.slots, adapters=tuple(v.info for v in versions))
        both: list[Any] = [router, None]
        bound = watch(bind(both, names, 2, names if router.needs_gates else None), view, [prompt, prompt])
        row = bind_row(bound)
        assert row is not None
        assert bound is not None
        scored = not bound.asks <= GATES
        if scored:
            with self.lock:
                self._score(self.versions.find(known_names) if every else versions, router)
        return WantedAdapters(tuple(v.number for v in versions), row, every, gated, scored)

    # what a scheduler asks, under `lock`

    def enlist(self, wanted: WantedAdapters) -> None:
        """A request that will need these versions.

        Raises:
            InputError: one is gone since the request was made.
        """
        with self.lock:
            self.versions.use(wanted.versions)

    def reserve(self, owner: Hashable, wanted: WantedAdapters, drain: bool, fetch: bool = True) -> State:
        """Slots for a request's adapters, and their copies on the way: whether it may run, waits for copies, or for
        slots. drain: see `SlotTable.take`. fetch: whether anything is copied for it yet.

        Raises:
            InputError: one of them cannot be read.
        """
        for n in wanted.versions:
            if (failure := self._copies.failed.get(n)) is not None:
                raise failure
        there = self._copies.scored if wanted.scored else self._copies.there
        if not self.table.holds(owner):
            if not fetch and any(n not in there for n in wanted.versions):
                return "waiting"
            placed = self.table.take(owner, wanted.versions, drain)
            if placed is None:
                return "waiting"
            self.changes += self._copies.start(placed)
            missing = any(n not in there for n in wanted.versions)
            self.counters.misses += missing
            self.counters.hits += not missing
        if wanted.every and wanted.scored and self._copies.repeated:
            return "loading"  # it chooses among all that is there, and must be able to score all of it
        return "ready" if all(n in there for n in wanted.versions) else "loading"

    def dismiss(self, owner: Hashable, wanted: WantedAdapters) -> None:
        """A request that needs nothing any more."""
        with self.lock:
            self.table.release(owner)
            self._drop(self.versions.leave(wanted.versions))

    def place(self, wanted: WantedAdapters) -> BoundRow:
        """A request's router over the slots as they are now."""
        slots = [self.table.slots(n) or () for n in self._acting(wanted)]
        most = max(map(len, slots))
        if wanted.every:
            most = max(most, self._all_of(wanted)[1])
        width = 1 << (most - 1).bit_length()  # few widths: each is a program
        where = np.full((len(slots), width), NO_ADAPTER, np.int32)
        for row, own in zip(where, slots, strict=True):
            row[: len(own)] = own
        columns = self._router_columns() if self._router else None
        return wanted.row.moved(where, self.table.count, columns)

    def identity(self, wanted: WantedAdapters) -> bytes:
        """What is the same for two requests that treat the same tokens alike, whichever slots they have."""
        numbers = self._acting(wanted)
        return hashlib.blake2b(repr(numbers).encode() + wanted.row.identity, digest_size=16).digest()

    # what an engine asks, under `lock`

    def advance(self) -> bool:
        """Writes what has arrived into its slots; whether anything is on its way still."""
        self.sharing.release_gone()
        written = self._copies.advance(self.versions.__contains__)
        self.changes += written
        self.counters.copies += written
        return len(self._copies) > 0

    def wait(self, asking: Member | None = None) -> None:
        """Until the next adapter has arrived; where none is on its way, a round of the engines that may hold the slots,
        or a moment. Not under `lock`. asking: the engine that waits."""
        with self.lock:
            coming = self._copies.first()
        if coming is not None or not self.sharing.step_others(asking):
            self.counters.stalled += wait_for(coming)

    def numbers(self) -> np.ndarray:
        """int32 [slots]: which version lies in each slot, -1: none, or one that begins in another."""
        found = np.full((self.table.count,), -1, np.int32)
        for n in {n for n in self.table.adapters if n is not None}:
            found[list(self.table.slots(n) or ())[:1]] = n
        return found

    # inside

    def _drop(self, numbers: Sequence[int]) -> None:
        """Nobody can ask for these any more."""
        for n in numbers:
            self.table.forget(n)
            self._copies.forget(n)
            self.changes += 1

    def _known(self) -> list[AdapterVersion]:
        """The newest versions that gates have a column for."""
        assert self.gates is not None
        return self.versions.find(self.gates.names)

    def _acting(self, wanted: WantedAdapters) -> tuple[int, ...]:
        """What a request may choose: its own, or beside them all that its router knows and whose weights, and what it
        reads of them, are in their slots; of its own no newer version."""
        if not wanted.every:
            return wanted.versions
        own = {self.versions[n].name for n in wanted.versions}
        others = (n for n in self._all_of(wanted)[0] if self.versions[n].name not in own)
        return tuple(sorted({*wanted.versions, *others}))

    def _all_of(self, wanted: WantedAdapters) -> tuple[set[int], int]:
        """What such a request may choose now, and the slots of the largest that may ever come to lie there."""
        if self._choosable_at != self.changes:
            self._choosable, self._choosable_at = {}, self.changes
        if (found := self._choosable.get(kind := (wanted.gated, wanted.scored))) is None:
            known = self._known() if wanted.gated else self.versions.find(self.versions.names())
            if wanted.scored:  # routers by score have whole adapters
                known = [v for v in known if v.slots == 1]
            there = self._copies.scored if wanted.scored else self._copies.there
            found = {v.number for v in known if v.number in there}, max((v.slots for v in known), default=1)
            self._choosable[kind] = found
        return found

    def _some(self, router: Any, count: int, names: Sequence[str], which: str) -> list[AdapterVersion]:
        """So many of these adapters, which stay in their slots while the request runs."""
        known = sorted(self.versions.find(names), key=lambda v: v.number not in self._copies.there)
        if len(known) < count:
            found = f"{type(router).__name__}: top_k: expected at most {len(known)} (adapters that {which})"
            raise InputError(f"{found}, found {count}")
        return known[:count]

    def _score(self, versions: Sequence[AdapterVersion], router: Any) -> None:
        """Readies the pool for a router by score over these."""
        if large := [v.name for v in versions if v.slots > 1]:
            found = f"{type(router).__name__} with {', '.join(large[:8])}"
            raise InputError(f"router: expected adapters of one slot each (adapter_rank) to be scored, found {found}")
        self._copies.score()

    def _slots_of(self, number: int) -> int:
        return self.versions[number].slots

    def _stage(self, number: int, spectra: bool) -> list[Staged]:
        version = self.versions[number]
        read = version.bank.adapter(version.place)
        columns = {}
        if self.gates is not None and version.name in self.gates.names:
            at = self.gates.names.index(version.name)
            columns = {path: z[..., at] for path, z in self._columns.items()}
        return self._weights.stage(read, columns, version.slots, spectra)

    def _router_columns(self) -> np.ndarray:
        """The token router's columns of what lies in the slots, and of its null choice; 0 where it has none."""
        assert self.gates is not None
        at = {name: i for i, name in enumerate(self.gates.names)}
        names = ["" if n is None else self.versions[n].name for n in self.table.adapters]
        null = [len(self.gates.names)] if self.gates.null else []
        return np.asarray([at.get(name, 0) for name in names] + null, np.int32)

    def _fill(self) -> None:
        """The first adapters into the slots, some at a time: what is on its way takes memory, too."""
        left = self.table.count
        for version in self.versions.find(self.versions.names()[: self.table.count]):
            left -= version.slots
            if left < 0:
                break
            self._copies.start(self.table.take("fill", [version.number]) or [])
            self.table.release("fill")
            while len(self._copies) >= READERS:
                self.wait()
                self.advance()
        while self.advance():
            self.wait()
        for failure in self._copies.failed.values():
            raise failure
        self.counters = PoolCounters()
