"""Adapters that come and go through a few slots, against the same requests of a model that has all of them at once."""

from __future__ import annotations

import dataclasses
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapter_banks import NAMES, SIZE, joined, random_bank, rows_of
from extent import examples

import meteora_jax as mj
from meteora_jax.config import PROJECTIONS, InputError
from meteora_jax.engine import EngineCore, Handle
from meteora_jax.engine.adapter_pool import AdapterPool
from meteora_jax.engine.slot_weights import write_slot
from meteora_jax.engine.step import run_steps
from meteora_jax.gate_config import GateConfig
from meteora_jax.io.bank import save_bank
from meteora_jax.io.gates import save_gates
from meteora_jax.routing.retrieval import Composed


@pytest.fixture(scope="module")
def banks(world: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Folders `first` and `second` of the same names, `all` has both; gates of `first`, the same for `second`."""
    folder, config = tmp_path_factory.mktemp("banks"), world["model"].config
    first, second = random_bank(config, NAMES, 1), random_bank(config, NAMES, 2)
    whole = joined(first, second)
    for name, bank in {"first": first, "second": second, "all": whole}.items():
        save_bank(folder / name, bank)
    rng = np.random.default_rng(3)
    gates = {
        p: rng.standard_normal((config.num_layers, config.projection_shape(p)[0], 13), np.float32) for p in PROJECTIONS
    }
    save_gates(folder / "gates", GateConfig(NAMES, 2, 1.0, null=True), gates)
    twice = {p: np.concatenate([g[..., :12], g[..., :12], g[..., 12:]], -1) for p, g in gates.items()}
    save_gates(folder / "all-gates", GateConfig(whole.config.names, 2, 1.0, null=True), twice)
    base = world["base"]
    return {
        "base": base, "folder": folder, "first": folder / "first", "second": folder / "second",
        "all": mj.load(base, folder / "all", folder / "all-gates", dtype="float32"),
        "slots": mj.load(base, folder / "first", folder / "gates", dtype="float32", adapter_slots=3),
    }  # fmt: skip


def fresh(banks: dict[str, Any], bank: Path | None = None) -> mj.Meteora:
    """A pool of its own, of a model that runs the programs of `slots`."""
    gates = banks["folder"] / "gates"
    return mj.load(banks["base"], bank or banks["first"], gates, dtype="float32", adapter_slots=3)


def check(engine: EngineCore, pool: AdapterPool) -> None:
    """What is used is in its slot, and nothing contradicts itself."""
    pool.table.check()
    engine.scheduler.cache.pool.check()
    for p in engine.scheduler.running:
        wanted = p.request.adapters
        assert wanted is None or all(pool.table.slots(n) is not None for n in wanted.versions)


class Schedule:
    """Requests, cancellations, loads, unloads and new versions at random, from a seed."""

    def __init__(self, banks: dict[str, Any], seed: int, count: int, model: mj.Meteora, fuses: bool = False):
        self.rng, self.banks, self.count = np.random.default_rng(seed), banks, count
        self.model, self.fuses = model, fuses
        for name in NAMES:  # whatever an earlier schedule left
            self.model.pool.load(banks["first"], name)
        self.versions = dict.fromkeys(NAMES, "")  # the mark of what a name stands for now
        self.asked: list[tuple[Handle, list[int], Any, int, bool]] = []

    def submit(self, engine: EngineCore) -> None:
        prompt = self.rng.integers(3, 300, int(self.rng.integers(1, 50))).tolist()
        names = [str(n) for n in self.rng.choice(sorted(self.versions), 2, replace=False)]
        weights = {n: float(w) for n, w in zip(names, self.rng.uniform(0.3, 1.0, 2), strict=True)}
        router, same = None, None
        if self.rng.random() < 0.9:
            second = {n + self.versions[n]: w for n, w in weights.items()}
            if self.fuses:
                router, same = (Composed(tuple(w.items()), True) for w in (weights, second))
            else:
                router, same = mj.Fixed(weights), mj.Fixed(second)
        most = int(self.rng.integers(1, 12))
        handle = engine.submit(self.model.request(prompt, router, most))
        self.asked.append((handle, prompt, same, most, bool(self.rng.random() < 0.15)))

    def change(self) -> None:
        pool, name = self.model.pool, str(self.rng.choice(NAMES))
        if name in self.versions and self.rng.random() < 0.5 and len(self.versions) > 6:
            pool.unload(name)
            del self.versions[name]
            return
        second = bool(self.rng.random() < 0.5)
        pool.load(self.banks["second" if second else "first"], name)
        self.versions[name] = "-2" if second else ""

    def run(self, engine: EngineCore) -> None:
        pool = self.model.pool
        while len(self.asked) < self.count or engine.busy:
            if len(self.asked) < self.count:
                for _ in range(int(self.rng.integers(0, 3))):
                    self.submit(engine)
                if self.rng.random() < 0.3:
                    self.change()
            engine.step()
            for handle, *_, cancelled in self.asked:
                if cancelled and not handle.done and self.rng.random() < 0.2:
                    handle.cancel()
            check(engine, pool)
        assert pool.table.pins == [0] * pool.table.count
        assert pool.names() == tuple(self.versions) or set(pool.names()) == set(self.versions)


@pytest.mark.parametrize("seed", range(examples(3, 40)))
def test_a_random_schedule_gives_what_all_resident_adapters_give(banks: dict[str, Any], seed: int):
    check_schedule(banks, banks["slots"], seed)


@pytest.mark.exhaustive("test_slot_weights fuses adapters of several slots; schedules are tested above")
@pytest.mark.parametrize("seed", range(examples(1, 10)))
def test_a_random_schedule_of_fused_adapters_of_several_slots_does_too(banks: dict[str, Any], seed: int):
    """Ranks 1 to 4 in slots of rank 1: one to four of them each, eight in all."""
    given = banks["base"], banks["first"], banks["folder"] / "gates"
    model = mj.load(*given, dtype="float32", adapter_slots=8, adapter_rank=1)
    assert model.pool is not None
    assert {v.slots for v in model.pool.versions.find(NAMES)} == {1, 2, 3, 4}
    check_schedule(banks, model, seed, fuses=True)


def check_schedule(banks: dict[str, Any], model: mj.Meteora, seed: int, fuses: bool = False) -> None:
    slots, whole, pool = rows_of(model), rows_of(banks["all"]), model.pool
    assert pool is not None
    schedule, copies = Schedule(banks, seed, 30, model, fuses), pool.counters.copies
    schedule.run(slots)
    expected = [whole.submit(banks["all"].request(prompt, same, most)) for _, prompt, same, most, _ in schedule.asked]
    whole.drain()
    told = set()
    for (handle, _, same, _, _), right in zip(schedule.asked, expected, strict=True):
        found, wanted = handle.progress, right.wait()
        if found.finish_reason == "cancelled":
            assert found.tokens == wanted.tokens[: len(found.tokens)]
        else:
            assert (found.tokens, found.finish_reason) == (wanted.tokens, wanted.finish_reason)
        told.add(same is not None and tuple(found.tokens))
    assert len(told) > 10  # adapters are heard
    assert pool.counters.copies > copies + 10
    assert slots.scheduler.cache.pool.available == SIZE.blocks


def test_no_program_is_compiled_for_another_adapter(banks: dict[str, Any]):
    model = banks["slots"]
    engine = rows_of(model)
    known = sizes = None
    for name in model.pool.names()[:6]:
        engine.submit(model.request([5, 6, 7], mj.Fixed({name: 1.0, model.pool.names()[6]: 0.5}), 3)).wait()
        sizes = run_steps._cache_size(), write_slot._cache_size()
        known = known or sizes
    assert sizes == known


def test_a_warm_model_compiles_nothing_whenever_adapters_arrive(banks: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    model, asked = fresh(banks), dict(max_new_tokens=12, routing=False)
    mj.warm_up(model, [20], [8], router=mj.Fixed(NAMES[0]), progress=None, **asked)
    programs, rng, arrive = run_steps._cache_size(), np.random.default_rng(0), model.pool._copies.advance
    for late in (0.0, 0.5, 0.9):
        monkeypatch.setattr(
            model.pool._copies, "advance", lambda known, p=late: 0 if rng.random() < p else arrive(known)
        )
        for lengths in ([20] * 8, [3] * 7 + [20]):
            routers = [mj.Fixed(str(n)) for n in rng.choice(NAMES, len(lengths))]
            model.generate([[5] * n for n in lengths], routers, **asked)
    assert model.pool.counters.copies > 8
    assert run_steps._cache_size() == programs


def test_a_request_keeps_its_version_and_the_prefix_cache_knows_it(banks: dict[str, Any]):
    """The same prompt before, while and after a name gets another adapter, and the first again."""
    model, whole = fresh(banks), banks["all"]
    engine, prompt, name = rows_of(model), list(range(20, 60)), NAMES[0]
    alone, other = rows_of(whole), NAMES[3]
    routers = {m: mj.Fixed({name + m: 1.0, other: 0.1}) for m in ("", "-2")}
    right = {m: alone.submit(whole.request(prompt, router, 8)).wait().tokens for m, router in routers.items()}
    assert right[""] != right["-2"]

    def submit() -> Handle:
        return engine.submit(model.request(prompt, routers[""], 8))

    before = submit()
    engine.step()
    made = model.request(prompt, routers[""], 8)  # not submitted yet
    assert model.pool.load(banks["second"], name) == 2
    assert model.pool.version(name) == 2
    after = submit()
    assert (before.wait().tokens, after.wait().tokens) == (right[""], right["-2"])
    again = submit().wait()
    assert (again.tokens, again.skipped) == (right["-2"], 32)
    with pytest.raises(InputError, match="one that was unloaded since"):
        engine.submit(made)
    assert [model.pool.table.slots(0), model.pool.load(banks["first"], name)] == [None, 3]  # version 1 is gone
    assert (submit().wait().tokens, submit().wait().tokens) == (right[""], right[""])
    model.pool.unload(name)
    with pytest.raises(InputError, match=f"adapter: expected one of .*adapter2.* found '{name}'"):
        submit()
    assert model.pool.table.pins == [0, 0, 0]


def test_gates_choose_among_what_is_resident(banks: dict[str, Any]):
    """With names it is those; without, what lies in the slots: here always the first three."""
    model, prompts = fresh(banks), [list(range(9, 40)), list(range(50, 60))]
    slots, whole = rows_of(model), rows_of(banks["all"])

    def ask(engine: EngineCore, of: mj.Meteora, router: Any) -> list[list[int]]:
        handles = [engine.submit(of.request(prompt, router, 8)) for prompt in prompts]
        return [h.wait().tokens for h in handles]

    right = []
    for within in ((NAMES[7], NAMES[2], NAMES[9]), NAMES[:3]):
        right = ask(whole, banks["all"], mj.Gates(2, within=within))
        assert ask(slots, model, mj.Gates(2, within=within)) == right
    assert model.pool.resident() == NAMES[:3]
    assert ask(slots, model, "gates") == right
    traced = slots.submit(model.request(prompts[0], mj.Gates(2), 8, trace=True)).wait()
    trace = model.completion(traced, "", ()).routing
    assert trace is not None
    assert {NAMES[0]} < set(trace.adapter_names) <= set(NAMES[:3])
    assert set(np.unique(trace.indices[:-1])) == {-1, *range(len(trace.adapter_names))}  # the null choice, too
    skipped = [slots.submit(model.request([*prompts[0], 7], mj.Gates(2), 2)).wait().skipped for _ in "ab"]
    slots.submit(model.request(prompts[0], mj.Fixed({NAMES[5]: 1.0, NAMES[6]: 0.5}), 2)).wait()
    skipped.append(slots.submit(model.request([*prompts[0], 7], mj.Gates(2), 2)).wait().skipped)
    assert skipped == [24, 24, 0]  # what was read under another choice is not found
    with pytest.raises(InputError, match="expected at most 3 adapters"):
        model.request(prompts[0], mj.Gates(2, within=NAMES[:5]), 8)


def test_what_gates_may_choose_follows_the_slots(banks: dict[str, Any]):
    """Its own two stay; the third slot's adapter changes, is replaced by name, and is one that gates do not know."""
    pool = fresh(banks).pool
    assert pool is not None

    def allowed() -> set[str]:
        (mask,) = (z for z in pool.place(wanted).leaves if z.dtype == bool)
        numbers = [n for n, may in zip(pool.table.adapters, mask[0], strict=True) if may and n is not None]
        return {f"{pool.versions[n].name} {pool.versions[n].version}" for n in numbers}

    def bring(name: str) -> None:
        other = pool.want(mj.Fixed(name), [5])
        assert other is not None
        pool.enlist(other)
        pool.reserve(name, other, True)
        while pool.advance():
            pool.wait()
        assert pool.reserve(name, other, True) == "ready"
        pool.dismiss(name, other)

    wanted = pool.want(mj.Gates(2), [5])
    assert wanted is not None
    pool.enlist(wanted)
    assert pool.reserve("gates", wanted, True) == "ready"
    own = {"adapter0 1", "adapter1 1"}
    found, identities = [allowed()], [pool.identity(wanted)]
    for name in ("adapter7", "adapter8"):
        bring(name)
        found.append(allowed())
        identities.append(pool.identity(wanted))
    assert found == [own | {f"{name} 1"} for name in ("adapter2", "adapter7", "adapter8")]
    assert len(set(identities)) == 3
    pool.load(banks["second"], "adapter8")
    pool.load(banks["second"], "adapter0")  # the request keeps what it began with
    assert allowed() == own
    bring("adapter0")  # beside it: one column of the gates would choose both
    assert allowed() == own
    assert "adapter0" in pool.resident()
    pool.load(banks["second"], "unknown", adapter="adapter3")
    bring("unknown")
    assert allowed() == own
    pool.dismiss("gates", wanted)
    assert pool.table.pins == [0, 0, 0]


def test_bad_files_are_refused_before_anything_changes(banks: dict[str, Any], tmp_path: Path):
    model = banks["slots"]
    pool, config = model.pool, model.config
    before = pool.names(), list(pool.table.adapters), pool.changes

    def refused(folder: Path, expected: str) -> None:
        with pytest.raises(InputError, match=expected) as info:
            pool.load(folder, "adapter1")
        assert "\n" not in str(info.value)
        assert (pool.names(), list(pool.table.adapters), pool.changes) == before

    good = random_bank(config, ("adapter1",), 5)
    save_bank(tmp_path / "cut", good)
    weights = tmp_path / "cut" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    refused(tmp_path / "cut", "expected a complete safetensors file")
    bad = random_bank(config, ("adapter1",), 5)
    bad.b["o_proj"][1, 0, 0, 3] = np.nan
    save_bank(tmp_path / "nan", bad)
    refused(tmp_path / "nan", "o_proj.b: expected finite numbers")
    deep = random_bank(dataclasses.replace(config, num_layers=2), ("adapter1",), 5)
    save_bank(tmp_path / "deep", deep)
    refused(tmp_path / "deep", r"num_layers: expected 3 \(the base's\), found 2")
    save_bank(tmp_path / "wide", random_bank(config, ("adapter1",), 5, rank=16))
    refused(tmp_path / "wide", r"expected a rank of at most 12 .*, found 16")
    norms = {"names": {}, "revision": None, "norms_sha256": "0" * 64}
    other = dataclasses.replace(good, config=dataclasses.replace(good.config, base=norms))
    save_bank(tmp_path / "other", other)
    refused(tmp_path / "other", "norms_sha256: expected the base's")
    refused(tmp_path / "nowhere", "nowhere")


def test_a_corrupt_adapter_of_the_bank_refuses_its_own_requests(banks: dict[str, Any], tmp_path: Path):
    bank = random_bank(banks["all"].config, NAMES, 1)
    bank.a["v_proj"][0, 8, 0, 0] = np.inf
    save_bank(tmp_path / "bank", bank)
    model = fresh(banks, tmp_path / "bank")
    engine = rows_of(model)
    handles = {n: engine.submit(model.request([5, 6], mj.Fixed({n: 1.0, NAMES[1]: 0.0}), 4)) for n in NAMES[7:10]}
    assert len(handles[NAMES[9]].wait().tokens) > 0
    with pytest.raises(InputError, match=r"v_proj.a: expected finite numbers for 'adapter8', found others"):
        handles[NAMES[8]].wait()
    handles[NAMES[7]].wait()
    assert not engine.busy
    assert model.pool.table.pins == [0, 0, 0]
    model.pool.load(banks["first"], NAMES[8])  # a good one in its place
    engine.submit(model.request([5, 6], mj.Fixed({NAMES[8]: 1.0, NAMES[1]: 0.0}), 4)).wait()


def test_an_engine_that_fails_keeps_no_slots(banks: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    model = fresh(banks)
    engine, other = rows_of(model), rows_of(model)

    def broken(*_: Any) -> None:
        raise RuntimeError("no device")

    handles = [engine.submit(model.request([5], mj.Fixed({n: 1.0, NAMES[0]: 0.1}), 9)) for n in NAMES[1:7]]
    monkeypatch.setattr(engine, "_dispatch", broken)
    with pytest.raises(RuntimeError, match="no device"):
        engine.step()
    handles[0].cancel()
    assert model.pool.table.pins == [0, 0, 0]
    other.submit(model.request([5], mj.Fixed({NAMES[5]: 1.0, NAMES[6]: 0.5}), 2)).wait()
    model.pool.unload(NAMES[1])  # nobody uses it any more
    assert model.pool.versions.find([NAMES[1]]) == []


def test_a_peft_folder_is_loaded_while_others_are_served(banks: dict[str, Any], world: dict[str, Any]):
    """From another thread; what it says is what the same adapter of a BANK folder says."""
    model = fresh(banks)
    engine, pool = rows_of(model), model.pool
    thread = threading.Thread(target=lambda: [pool.load(world["peft"][n], n) for n in ("birch", "apple")])
    thread.start()
    handles = [engine.submit(model.request([9] * 20, mj.Fixed({n: 1.0, NAMES[0]: 0.2}), 20)) for n in NAMES[3:6]]
    engine.drain()
    thread.join()
    assert all(h.done for h in handles)
    pool.load(world["bank"], "of the bank", adapter="birch")
    prompt = model.encode("How many apples")
    said = [
        engine.submit(model.request(prompt, mj.Fixed({name: 1.0, "apple": 0.7}), 12)).wait().tokens
        for name in ("birch", "of the bank", NAMES[2])
    ]
    assert said[0] == said[1] != said[2]
    scratch = pool.versions.newest(["birch"])[0].scratch
    assert scratch is not None
    assert scratch.exists()
    pool.unload("birch")
    assert not scratch.exists()


def test_what_slots_cannot_do_is_refused(banks: dict[str, Any]):
    model = banks["slots"]
    some = dict.fromkeys(model.pool.names()[:5], 0.2)  # others may have been unloaded by tests before
    for call, expected in (
        (lambda: mj.load(banks["base"], adapter_slots=3), "expected a bank beside them"),
        (lambda: mj.load(banks["base"], banks["first"], adapter_rank=3), "expected adapter_slots beside it"),
        (lambda: mj.load(banks["base"], banks["first"], adapter_slots=0), "adapter_slots"),
        (lambda: model.add_adapter(banks["second"], NAMES[0]), "expected one that no adapter has"),
        (lambda: model.add_adapter(banks["second"], "nobody"), "expected an adapter's name"),
        (lambda: model.remove_adapter("nobody"), "expected an adapter's"),
        (lambda: model.logits([[5, 6]], mj.Fixed(some)), "at most 3 adapters"),
        (lambda: model.logits([[5, 6]], [None, None]), "expected a list of 1"),
        (lambda: model.logits([[5, 6]], mj.Logo(2)), "expected Fixed, Retrieval, Gates, .* or Phatgoose with adapter"),
        (lambda: model.logits([[5, 6]], mj.Arrow(13)), r"top_k: expected at most 1[012] \(adapters that are loaded\)"),
        (lambda: model.generate(["a"], mj.Fixed(some)), "at most 3 adapters"),
        (lambda: model.generate(["a"], mj.Gates(13)), "Gates"),
        (lambda: model.pool.unload("nobody"), "expected one of"),
        (lambda: model.pool.load(banks["second"], "nobody"), "expected an adapter's name"),
    ):
        with pytest.raises(InputError, match=expected):
            call()
