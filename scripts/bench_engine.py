"""What the engine takes: a decoding step by rows, prompts, and requests that come all at once; bare and with adapters.

    python scripts/bench_engine.py --shape tiny --rows 1 4 --prompt 32 --new 8 --requests 6    # any machine
    python scripts/bench_engine.py --shape llama-3-8b --json engine.json                       # the table of the docs
    python scripts/bench_engine.py --shape llama-3-8b --weights bf16 fp8 int4 # quantised as well
    NCCL_NVLS_ENABLE=0 python scripts/bench_engine.py --shape llama-3-8b --tensor 1 2 --rows 32 --requests 0

Weights are random and nothing ends a response early. A step's time is that of the whole engine, host included, while
all rows decode; results are read while the device works on the next dispatch.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from bench_models import random_bank, random_model
from bench_programs import kernels_of, prepared, run_as
from bench_scaling import random_on
from bench_schedule import schedule
from bench_settings import llama
from bench_timing import console
from flax import nnx
from rich.table import Table

import meteora_jax as mj
from meteora_jax.config import GROUPS, InputError, LlamaConfig
from meteora_jax.engine import EngineCore, EngineSize, Request, bind_row
from meteora_jax.engine.batch import round_up
from meteora_jax.engine.programs import Program
from meteora_jax.execution import ExecutionConfig, default_dtype, platform
from meteora_jax.gate_config import FormName
from meteora_jax.io.model_state import execution_on
from meteora_jax.model.layout import lay_out, pack
from meteora_jax.model.routed_llama import gated_llama
from meteora_jax.planning import spread
from meteora_jax.quantization import Quantization
from meteora_jax.sharding import make_mesh
from meteora_jax.training.recipes import RECIPES

Kind = Literal["bare", "gates", "adapter", "mixture", "logo", "arrow", "spectr", "lag", "phatgoose"]
Weights = Literal["bf16", "int8", "fp8", "int4"]


@dataclasses.dataclass(frozen=True)
class BenchEngine:
    """Times the engine on the bare base and on the same base with adapters, in one run."""

    shape: Literal["tiny", "smollm2-135m", "llama-3-8b"]
    """Shape of the base; its weights are random."""
    rows: tuple[int, ...] = (1, 8, 32, 64, 128, 256)
    """Sequences that decode at once."""
    gates: tuple[FormName, ...] = ("token-router", "meteora")
    """What routes, top-2."""
    kinds: tuple[Kind, ...] = ("bare", "gates", "adapter")
    """bare: no adapter acts; gates; adapter: one of its own for each request; mixture: three for each; logo: twenty, as
    `mj.Logo` chooses them once a further pass of the bare base has read the prompt, which is not in the figures; the
    others: that router, with its choices as docs/python.md has them."""
    weights: tuple[Weights, ...] = ("bf16",)
    """How the base is stored, one after the other. bf16: unquantised (on a CPU float32)."""
    head: bool = False
    """The head of a quantised base in 8 bit as well."""
    tensor: tuple[int, ...] = (1,)
    """Devices that share each step, one number after the other."""
    prompt: int = 512
    """Tokens of a prompt."""
    new: int = 128
    """Tokens of a response."""
    adapters: int = 28
    """Adapters in the bank."""
    rank: int = 8
    """Of every adapter."""
    budget: int = 16384
    """Tokens of prompts in a step."""
    requests: int = 256
    """Of the last measurement: prompts of 64 to 1,024 tokens and responses of 16 to 256, all at once, at most 128 rows;
    0 leaves it out."""
    profile: bool = False
    """Print the kernels of a decoding step and of the prompts as well."""
    layers: int | None = None
    """Layers of the model, all of the shape's unless given."""
    json: Path | None = None
    """Write the records here: a list with one object a measurement."""


class Bench:
    """One model, and requests of its kinds."""

    def __init__(self, settings: BenchEngine, config: LlamaConfig, form: FormName, weights: Weights, tensor: int = 1):
        dtype = jnp.dtype(default_dtype())
        self.mesh = None
        if weights != "bf16":
            config = dataclasses.replace(config, quantization=Quantization.of(weights, settings.head))
        self.settings, self.config, self.form = settings, config, form
        if tensor > 1:
            self._share_out(tensor, dtype)
            return
        own = "phatgoose" in settings.kinds
        model, self.names = random_model(config, settings.adapters, settings.rank, dtype, RECIPES[form].form, own)
        execution = ExecutionConfig.here(dtype)
        packed = platform() == "gpu" and dtype.itemsize == 2
        ready = prepared(model, execution) if packed else run_as(model, execution)
        self.weights, self.graph = ready(), ready.graph
        model.free()

    def _share_out(self, tensor: int, dtype: jnp.dtype) -> None:
        """The same model on so many devices, each with its share of every layer."""
        self.mesh = mesh = make_mesh(1, 1, tensor, devices=jax.devices()[:tensor])
        execution = execution_on(self.config, dtype, mesh)
        bank = random_bank(self.config, self.settings.adapters, self.settings.rank)
        form, self.names = RECIPES[self.form].form, bank.names
        abstract = nnx.eval_shape(lambda: gated_llama(self.config, bank, form, dtype, nnx.Rngs(0), execution))
        lay_out(abstract, tensor)
        graph, state = nnx.split(abstract)
        self.graph, self.weights = graph, random_on(spread(state, mesh), 0)
        if execution.packs(dtype, mesh):
            self.graph, self.weights = pack(graph, self.weights, release=GROUPS)

    def engine(self, rows: int, positions: int) -> EngineCore:
        """With room for so many positions in all."""
        blocks = -(-positions // 16) + rows
        size = EngineSize(rows, self.settings.budget + rows, blocks)
        return EngineCore(self.graph, self.weights, self.config, size, mesh=self.mesh, prefix_cache=False)

    def request(self, kind: Kind, number: int, prompt: int, new: int) -> Request:
        tokens = np.random.default_rng(number).integers(0, self.config.vocab_size, prompt).tolist()
        count = min(mj.Logo().k if kind == "logo" else 3, len(self.names))
        own = [self.names[(number + i) % len(self.names)] for i in range(count)]
        mixture = mj.Fixed(dict.fromkeys(own, 1 / count))
        router: dict[str, Any] = {
            "bare": None, "gates": mj.Gates(2), "adapter": mj.Fixed(own[0]),
            "mixture": mixture, "logo": mixture, "arrow": mj.Arrow(), "spectr": mj.Spectr(), "lag": mj.Lag(),
            "phatgoose": mj.Phatgoose(),
        }  # fmt: skip
        chosen = router[kind]
        bound = None if chosen is None else chosen.bind([chosen, None], self.names)
        return Request(tuple(tokens), new, bind_row(bound))


def compile_planned(engine: EngineCore, asked: Sequence[Request]) -> None:
    """Begins to compile, several at once, what requests that come all at once meet: plans do not depend on time."""
    steps, _ = schedule(
        [(len(r.prompt), r.max_new_tokens) for r in asked], engine.size.rows, engine.size.tokens - engine.size.rows
    )
    found = {Program(s.rows, s.padded, round_up(s.blocks, engine.table_sizes), s.steps) for s in steps}
    engine.compile(asked, asked[0].router, [*found])


def time_rows(bench: Bench, kind: Kind, rows: int) -> dict[str, float]:
    """Milliseconds of a step with so many rows, and of the prompts; the third round: in the second, too, programs are
    compiled (single steps behind the first round's ends)."""
    new, prompt = bench.settings.new, bench.settings.prompt
    engine = bench.engine(rows, rows * (prompt + new))
    asked = [bench.request(kind, i, prompt, new) for i in range(rows)]
    compile_planned(engine, asked)
    found: dict[str, float] = {}
    for _ in range(3):
        handles = [engine.submit(request) for request in asked]
        start = time.perf_counter()
        while not all(h.progress.tokens for h in handles):
            engine.step()
        middle = time.perf_counter()
        before = min(len(h.progress.tokens) for h in handles)
        engine.drain()
        end = time.perf_counter()
        found = {"prompts_ms": 1e3 * (middle - start), "step_ms": 1e3 * (end - middle) / (new - before)}
    return found


def profile_rows(bench: Bench, kind: Kind, rows: int) -> None:
    """Prints the kernels of the prompts and of a decoding step, as `time_rows` has just compiled them."""
    new, prompt = bench.settings.new, bench.settings.prompt
    engine = bench.engine(rows, rows * (prompt + new))
    handles = [engine.submit(bench.request(kind, i, prompt, new)) for i in range(rows)]

    def prompts() -> Any:
        while not all(h.progress.tokens for h in handles):
            engine.step()
        return engine._state

    def steps() -> Any:
        engine.drain()
        return engine._state

    for name, call in (("prompts", prompts), ("step", steps)):
        done = engine.counters.steps
        kernels = kernels_of(call)
        count = max(1, engine.counters.steps - done)
        total = sum(us for _, _, us in kernels) / count
        console.print(f"{name}, {kind}, {rows} rows: {count} steps of {total / 1e3:.3f} ms in kernels")
        for kernel, launches, us in kernels[:16]:
            console.print(f"  {us / count:9.1f} us {launches / count:7.1f} x {kernel[:100]}", highlight=False)


def time_requests(bench: Bench, kind: Kind, count: int) -> dict[str, float]:
    """New tokens a second of requests of all lengths that come at once."""
    draw = np.random.default_rng(0)
    lengths = list(zip(draw.integers(64, 1025, count).tolist(), draw.integers(16, 257, count).tolist(), strict=True))
    if bench.settings.shape == "tiny":
        lengths = [(p // 16 + 1, n // 16 + 1) for p, n in lengths]
    rows = min(128, count)
    engine = bench.engine(rows, rows * (max(p for p, _ in lengths) + 257))
    asked = [bench.request(kind, i, p, n) for i, (p, n) in enumerate(lengths)]
    compile_planned(engine, asked)
    spent = 0.0
    for _ in range(3):
        for request in asked:
            engine.submit(request)
        start = time.perf_counter()
        engine.drain()
        spent = time.perf_counter() - start
    new = sum(n for _, n in lengths)
    return {"seconds": spent, "new_tokens": float(new), "tokens_per_s": new / spent}


def main(settings: BenchEngine) -> None:
    """Measures, prints and writes the records; each is written at once."""
    config = llama(settings.shape)
    if settings.layers is not None:
        config = dataclasses.replace(config, num_layers=settings.layers)
    console.print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}")
    records: list[dict[str, Any]] = []

    def keep(record: dict[str, Any]) -> None:
        records.append(record)
        if settings.json:
            settings.json.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
        console.print(f"[dim]{record}", markup=True, highlight=False)

    for tensor, weights, (i, form) in itertools.product(settings.tensor, settings.weights, enumerate(settings.gates)):
        bench = Bench(settings, config, form, weights, tensor)
        about = dict(weights=weights, form=form, tensor=tensor)
        kinds = [k for k in settings.kinds if k == "gates" or i == 0]
        for rows in settings.rows:
            for kind in kinds:
                attempt(keep, dict(what="rows", kind=kind, **about, rows=rows), time_rows, bench, kind, rows)
                if settings.profile:
                    profile_rows(bench, kind, rows)
        for kind in kinds if settings.requests else ():
            count = settings.requests
            attempt(keep, dict(what="requests", kind=kind, **about, count=count), time_requests, bench, kind, count)
        del bench
    show(records)


def attempt(keep: Any, case: dict[str, Any], measure: Any, *given: Any) -> None:
    """A measurement that fails says so and leaves the others their time on the device."""
    try:
        keep({**case, **measure(*given)})
    except Exception as e:
        keep({**case, "error": f"{type(e).__name__}: {e}"[:300]})


def show(records: Sequence[dict[str, Any]]) -> None:
    """The table: a line a measurement, ratios to the bare base of the same rows on as many devices, stored alike, and
    in bf16 on one device."""
    bare = {
        (r["weights"], r["tensor"], r["what"], r.get("rows")): r
        for r in records
        if r["kind"] == "bare" and "error" not in r
    }
    table = Table(
        "what", "rows", "weights", "devices", "kind", "form", "step ms", "x bare", "x bf16 on 1", "prompts ms",
        "x bare", "x bf16 on 1",
        "tokens/s",
    )  # fmt: skip
    for r in records:

        def ratios(key: str, r: dict[str, Any] = r) -> list[str]:
            keys = (r["weights"], r["tensor"]), ("bf16", 1)
            firsts = [bare.get((*key, r["what"], r.get("rows")), {}) for key in keys]
            return [f"{r[key] / first[key]:.3f}" if key in r and key in first else "" for first in firsts]

        cells = [f"{r[k]:.2f}" if k in r else "" for k in ("step_ms", "prompts_ms", "tokens_per_s")]
        table.add_row(
            r["what"], str(r.get("rows", r.get("count"))), r["weights"], str(r["tensor"]), r["kind"], r["form"],
            r.get("error", cells[0]), *ratios("step_ms"), cells[1], *ratios("prompts_ms"), cells[2],
        )  # fmt: skip
    console.print(table)


if __name__ == "__main__":
    try:
        main(tyro.cli(BenchEngine, description=__doc__))
    except InputError as e:
        sys.exit(f"error: {e}")
