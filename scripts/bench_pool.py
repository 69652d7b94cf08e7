"""What adapters in slots cost: requests that name adapters by a Zipf law, many more adapters than slots.

    python scripts/bench_pool.py --shape tiny --adapters 1 12 40 --slots 8 --batch 4 --requests 24 --prompt 16 --new 8
    python scripts/bench_pool.py --shape llama-3-8b --adapters 1 28 256 1000 --slots 64 --rank 16 --zipf 1.0 0.5
        --batch 64 --json pool.json

Weights are random and nothing ends a response early. bare: no adapter acts. resident: as many slots as adapters.
Engines have few programs, as `generate` does, and all are compiled before the first round; `compiled` says how many the
timed round compiled nevertheless: 0, or its figures are the compiler's.
Without --folder adapters are made in host memory as they are asked for, so that what is timed is the padding, the copy
to the device and the engine; with it they are read from a BANK folder that is written there first, and the system has
forgotten the file when the timed round begins. Each record also has what a step of one adapter's way costs while
nothing is decoded (`copying`).
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import mmap
import os
import re
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from bench_settings import llama
from bench_timing import console, random_arrays
from flax import nnx
from rich.table import Table

import meteora_jax as mj
from converters.peft_lora import bank_writer
from meteora_jax.bank import AdapterBank
from meteora_jax.config import GROUPS, PROJECTIONS, AdapterInfo, BankConfig, InputError, LlamaConfig
from meteora_jax.engine import EngineCore, EngineSize, Request
from meteora_jax.engine.adapter_pool import AdapterPool
from meteora_jax.engine.copies import READERS
from meteora_jax.engine.step import run_steps
from meteora_jax.execution import ExecutionConfig, default_dtype
from meteora_jax.io.files import whole_folder, write_json
from meteora_jax.io.stored_bank import StoredBank, empty_slots
from meteora_jax.io.tensors import WEIGHTS, mapping_of
from meteora_jax.model.layout import pack
from meteora_jax.model.llama import Llama

Kind = Literal["bare", "resident", "slots"]


@dataclasses.dataclass(frozen=True)
class BenchPool:
    """Tokens a second of a pool, of the same adapters all resident, and of the bare base, in one run."""

    shape: Literal["tiny", "smollm2-135m", "llama-3-8b"]
    """Shape of the base."""
    kinds: tuple[Kind, ...] = ("bare", "slots", "resident")
    """What is timed."""
    adapters: tuple[int, ...] = (1, 28, 256, 1000)
    """Adapters in the bank."""
    slots: int = 64
    """Of the pool."""
    rank: int = 16
    """Of every adapter."""
    zipf: tuple[float, ...] = (1.0, 0.5)
    """The n-th adapter is asked for in proportion to n to the power of minus this."""
    batch: int = 64
    """Rows that decode at once."""
    requests: int = 512
    """Of each of two rounds, all at once; the second is timed."""
    prompt: int = 128
    """Tokens of a prompt."""
    new: int = 128
    """Tokens of a response."""
    resident: int = 256
    """Banks of up to so many adapters are timed all resident, too."""
    layers: int | None = None
    """Layers of the model, all of the shape's unless given."""
    folder: Path | None = None
    """Where BANK folders are written and read from."""
    json: Path | None = None
    """Write the records here."""


class RandomBank(StoredBank):
    """Adapters that are made when they are asked for, all of the same numbers."""

    def __init__(self, config: LlamaConfig, count: int, rank: int, dtype: np.dtype):
        names = tuple(f"adapter{i}" for i in range(count))
        infos = tuple(AdapterInfo(n, rank, PROJECTIONS, "", "", {}) for n in names)
        shapes = {p: config.projection_shape(p) for p in PROJECTIONS}
        self.folder = Path("memory")
        self.config = BankConfig(infos, dict.fromkeys(PROJECTIONS, rank), config.num_layers, shapes)
        rng, layers = np.random.default_rng(0), config.num_layers

        def draw(width: int) -> np.ndarray:
            return (rng.standard_normal((layers, 1, rank, width), np.float32) / width**0.5).astype(dtype)

        self._a, self._b = ({p: draw(shapes[p][i]) for p in PROJECTIONS} for i in (0, 1))
        self._scale = {p: np.ones((layers, 1), np.float32) for p in PROJECTIONS}

    def adapter(self, at: int) -> AdapterBank:
        """As `StoredBank`."""
        alone = dataclasses.replace(self.config, adapters=self.config.adapters[at : at + 1])
        return AdapterBank(self._a, self._b, self._scale, alone)


def written(folder: Path, bank: RandomBank, config: LlamaConfig, dtype: np.dtype) -> StoredBank:
    """The same adapters in a BANK folder, in the type that they have here."""
    if not folder.exists():
        with whole_folder(folder) as partial:
            writer = bank_writer(partial, bank.config, dtype)
            parts = {kind: getattr(bank.adapter(0), kind) for kind in ("a", "b", "scale")}
            for kind, p in itertools.product(parts, PROJECTIONS):
                for layer in range(config.num_layers):
                    writer.slice(f"{p}.{kind}", layer)[:] = parts[kind][p][layer]
            writer.sync()  # only what is on disk can be forgotten
            write_json(partial / "bank.json", bank.config.to_json())
    return StoredBank(folder, config, dtype)


def forget(bank: StoredBank) -> None:
    """Has the system forget what it keeps of a bank's file, so that it is read from the disk again."""
    mapping_of(next(iter(bank._tensors.values()))).madvise(mmap.MADV_DONTNEED)  # pages that are mapped would stay
    with (bank.folder / WEIGHTS).open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class Bench:
    """A model with so many slots, and its pool; without a bank, the base alone."""

    def __init__(self, settings: BenchPool, config: LlamaConfig, bank: StoredBank | None, slots: int):
        dtype = jnp.dtype(default_dtype())
        described = None if bank is None else empty_slots(bank.config, slots)
        execution = ExecutionConfig.here(dtype)
        abstract = nnx.eval_shape(lambda: Llama(config, described, dtype=dtype, rngs=nnx.Rngs(0), execution=execution))
        self.graph, state = nnx.split(abstract)
        self.weights = random_arrays(state, 0)
        if execution.packs(dtype, None):
            self.graph, self.weights = pack(self.graph, self.weights, release=GROUPS)
        self.pool = None
        self.stored = None if isinstance(bank, RandomBank) else bank
        if bank is not None and described is not None:
            self.pool = AdapterPool(bank, described, self.graph, self.weights, config, dtype=dtype)
        blocks = -(-(settings.prompt + settings.new) // 16) * settings.batch + settings.batch
        size = EngineSize(settings.batch, max(1024, settings.batch * 32), blocks)
        how: dict[str, Any] = dict(prefix_cache=False, pool=self.pool, few_programs=True)
        self.engine = EngineCore(self.graph, self.weights, config, size, **how)
        self.settings, self.config = settings, config

    def request(self, rng: np.random.Generator, chances: np.ndarray) -> Request:
        prompt = tuple(rng.integers(0, self.config.vocab_size, self.settings.prompt).tolist())
        wanted = None
        if self.pool is not None:
            wanted = self.pool.want(mj.Fixed(f"adapter{rng.choice(len(chances), p=chances)}"), prompt)
        return Request(prompt, self.settings.new, adapters=wanted)

    def warm(self) -> dict[str, float]:
        """Compiles all programs that the rounds can meet: how many, and in how many seconds."""
        before, start = run_steps._cache_size(), time.perf_counter()
        self.engine.warm([self.request(np.random.default_rng(0), np.ones(1))] * self.settings.requests)
        return {"programs": run_steps._cache_size() - before, "warm_s": time.perf_counter() - start}

    def run(self, adapters: int, zipf: float) -> dict[str, float]:
        """Two rounds of other requests, the second timed: the first finds out what is asked for often."""
        chances = np.arange(1, adapters + 1, dtype=np.float64) ** -zipf
        chances /= chances.sum()
        found: dict[str, float] = {}
        for seed in (0, 1):
            rng = np.random.default_rng(seed)
            asked = [self.request(rng, chances) for _ in range(self.settings.requests)]
            before = None if self.pool is None else dataclasses.replace(self.pool.counters)
            if self.stored is not None:
                forget(self.stored)
            known, did = run_steps._cache_size(), dataclasses.replace(self.engine.counters)
            start = time.perf_counter()
            for request in asked:
                self.engine.submit(request)
            self.engine.drain()
            spent = time.perf_counter() - start
            found = {"tokens_per_s": self.settings.requests * self.settings.new / spent, "seconds": spent}
            found |= {k: getattr(self.engine.counters, k) - getattr(did, k) for k in ("dispatches", "steps")}
            found["compiled"] = run_steps._cache_size() - known
            if self.pool is not None and before is not None:
                now = self.pool.counters
                found |= {k: getattr(now, k) - getattr(before, k) for k in ("copies", "hits", "misses", "stalled")}
            found["host_gb"] = host_bytes() / 1e9
        return found

    def copying(self) -> dict[str, float]:
        """Milliseconds of an adapter's way: disk_ms, from a file that the system has forgotten; read_ms, from where it
        is stored; copy_ms, that and to the device, alone; copies_ms, of each where all readers are at it; write_ms,
        from there into its slot."""
        if (pool := self.pool) is None:
            return {}
        numbers = [v.number for v in pool.versions.find(pool.names())]
        some = [numbers[i % len(numbers)] for i in range(4 * READERS)]
        found: dict[str, float] = {}

        def timed(name: str, calls: int, call: Callable[[], Any]) -> None:
            call()  # compiles, and makes the readers' memory
            start = time.perf_counter()
            call()
            found[name] = (time.perf_counter() - start) / calls * 1e3

        def write() -> None:
            for _ in some:
                for part, slot in zip(staged, slots, strict=True):
                    pool._weights.write(part, slot)
            jax.block_until_ready([leaf[...] for leaf in pool._weights._leaves.values()])

        with ThreadPoolExecutor(READERS) as readers, pool.lock:
            version = pool.versions[number := next(n for n in numbers if pool.table.slots(n))]
            slots, staged = pool.table.slots(number) or (), pool._stage(number, False)
            if self.stored is not None:
                places = dict.fromkeys(pool.versions[n].place for n in some)
                forget(self.stored)
                start = time.perf_counter()
                for place in places:
                    self.stored.adapter(place)  # looks at every value
                found["disk_ms"] = (time.perf_counter() - start) / len(places) * 1e3
            timed("read_ms", len(some), lambda: [version.bank.adapter(pool.versions[n].place) for n in some])
            timed("copy_ms", len(some), lambda: [pool._stage(n, False) for n in some])
            timed("copies_ms", len(some), lambda: list(readers.map(lambda n: pool._stage(n, False), some)))
            timed("write_ms", len(some), write)
        return found


def host_bytes() -> int:
    """This process's own memory; mapped files are the system's."""
    status = Path("/proc/self/status")
    match = re.search(r"RssAnon:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return int(match[1]) * 1024 if match else 0


def main(settings: BenchPool) -> None:
    """Measures, prints and writes the records; each is written at once."""
    config = llama(settings.shape)
    if settings.layers is not None:
        config = dataclasses.replace(config, num_layers=settings.layers)
    dtype = np.dtype(jnp.dtype(default_dtype()))
    console.print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {dtype}")
    records: list[dict[str, Any]] = []

    def measure(kind: Kind, bank: StoredBank | None, adapters: int, slots: int) -> None:
        bench = None
        if kind not in settings.kinds:
            return
        try:
            bench = Bench(settings, config, bank, slots)
            warm = bench.warm()
            console.print(f"[dim]{kind} {adapters}: {warm}", highlight=False)
            copying = bench.copying()
            for zipf in settings.zipf if bank is not None else (0.0,):
                case = dict(kind=kind, adapters=adapters, slots=slots, rank=settings.rank, zipf=zipf)
                records.append({**case, **warm, **bench.run(adapters, zipf), **copying})
        except Exception as e:  # too little memory: the others are worth their time on the device
            records.append(dict(kind=kind, adapters=adapters, slots=slots, error=f"{type(e).__name__}: {e}"[:300]))
        console.print(f"[dim]{records[-1]}", highlight=False)
        if settings.json:
            settings.json.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")

    measure("bare", None, 0, 0)
    for adapters in settings.adapters:
        bank: StoredBank = RandomBank(config, adapters, settings.rank, dtype)
        if settings.folder is not None and isinstance(bank, RandomBank):
            bank = written(settings.folder / f"bank-{adapters}-rank{settings.rank}", bank, config, dtype)
        measure("slots", bank, adapters, min(settings.slots, adapters))
        if settings.slots < adapters <= settings.resident:
            measure("resident", bank, adapters, adapters)
    show(records)


def show(records: list[dict[str, Any]]) -> None:
    """A line a measurement; ratios of time to the bare base, and to all resident (of the most adapters that were)."""
    bare = next((r["tokens_per_s"] for r in records if r["kind"] == "bare" and "error" not in r), None)
    heads = "kind", "adapters", "slots", "zipf", "tokens/s", "x bare", "of resident"
    table = Table(*heads, "misses", "copies", "stalled s", "compiled", "host GB")
    for r in records:
        if "error" in r:
            table.add_row(r["kind"], str(r["adapters"]), str(r["slots"]), "", r["error"])
            continue
        whole = [o for o in records if o.get("zipf") == r["zipf"] and o["slots"] == o["adapters"] and "error" not in o]
        most = None
        if r["kind"] == "slots":
            most = max(whole, key=lambda o: min(o["adapters"], r["adapters"]), default=None)
        table.add_row(
            r["kind"], str(r["adapters"]), str(r["slots"]), str(r["zipf"]), f"{r['tokens_per_s']:.0f}",
            f"{bare / r['tokens_per_s']:.3f}" if bare else "",
            f"{r['tokens_per_s'] / most['tokens_per_s']:.3f} ({most['adapters']})" if most else "",
            str(r.get("misses", "")), str(r.get("copies", "")), f"{r['stalled']:.3f}" if "stalled" in r else "",
            str(r["compiled"]), f"{r['host_gb']:.2f}",
        )  # fmt: skip
    console.print(table)


if __name__ == "__main__":
    try:
        main(tyro.cli(BenchPool, description=__doc__))
    except InputError as e:
        sys.exit(f"error: {e}")
