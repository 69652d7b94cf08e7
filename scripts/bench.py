"""What adapters cost: the bare model and the adapted one in the same run, alternating, medians, synchronised.

    python scripts/bench.py --shape tiny                                             # any machine, a minute or two
    python scripts/bench.py --shape llama-3-8b --what decode --batch 1 8 32 --json decode.json --picture decode.png
    python scripts/bench.py --shape llama-3-8b --what kernel --batch 1 8 32 2048     # every implementation, alone

Weights are random. `kernel` times one projection group, base product included, over several layers' own weights, so
that none stays in a cache; its last table names the fastest implementation of each shape, which is what the table in
pallas_kernels/routed_lora/api.py is made from. Rooflines use the rates measured at the start of the run.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import itertools
import json
import shlex
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import tyro
from bench_programs import (
    DOTS,
    Held,
    Timed,
    executions,
    generating,
    kernels_of,
    prepared,
    run_as,
    started,
    training,
)  # fmt: skip
from bench_tables import LABELS, draw, show
from flax import nnx
from least import Work, adapter_work, group_work, least_work
from rich.console import Console
from rich.table import Table

import meteora_jax as mj
from meteora_jax.config import GROUPS, PROJECTIONS, AdapterInfo, BankConfig, InputError, LlamaConfig
from meteora_jax.execution import default_dtype, platform
from meteora_jax.gate_config import FormName, TokenRouterForm
from meteora_jax.model.routed_llama import gated_llama
from meteora_jax.training.recipes import RECIPES
from pallas_kernels.routed_lora import add_routed_lora
from pallas_kernels.routed_lora.gated import choose_adapters, gated_lora, slim_matrix

Group = Literal["qkv", "o", "gate_up", "down"]
XLA = ("reference", "gathered", "grouped")
GATED = {"gated_reference": "reference", "gated_triton": "triton", "gated_diagonal": "diagonal"}
AVAILABLE = {
    "cpu": (*XLA, "gated_reference"),
    "gpu": (*XLA, *GATED),
    "tpu": (*XLA, "tpu_gathered", "tpu_dense", "gated_reference"),
}


@dataclasses.dataclass(frozen=True)
class Bench:
    """Times the bare and the adapted model side by side."""

    shape: Literal["tiny", "smollm2-135m", "llama-3-8b"]
    """Of the base."""
    what: tuple[Literal["kernel", "prefill", "decode", "train"], ...] = ("kernel", "prefill", "decode", "train")
    batch: tuple[int, ...] = (1, 8)
    """Sequences; for `kernel`, tokens or requests."""
    sequence: tuple[int, ...] = (32,)
    """Tokens of a prompt or training sequence; for `kernel` with --routing request, of a request."""
    adapters: tuple[int, ...] = (28,)
    rank: tuple[int, ...] = (8,)
    top_k: tuple[int, ...] = (2,)
    """Several are timed in turns, beside one bare model."""
    gates: FormName = "meteora"
    """Not `kernel`: whose gates, a gate at every projection or the token router as its recipe has it."""
    routing: Literal["gates", "given", "request"] = "gates"
    """Tokens routed by gates (which are timed too), `kernel` only: by indices given beforehand, or a mixture of
    --top-k adapters for each request."""
    implementation: tuple[str, ...] = ()
    """`kernel` only: which to time; all that this device has, if none is named."""
    group: tuple[Group, ...] = ("qkv", "o", "gate_up", "down")
    """`kernel` only: which projection groups to time."""
    settings: tuple[str, ...] = ()
    """Not `kernel`: `ExecutionConfig`s to time side by side, each bare and adapted: today, xla (without Triton), plain
    (nothing that is a GPU's alone) and, of training, dots; or "all"."""
    profile: bool = False
    """Also list the kernels of each setting's fastest call that take longest: name, launches, microseconds."""
    layers: int | None = None
    """Layers of the model, or for `kernel` how many layers' weights take turns."""
    seconds: float = 2.0
    """Time given to each pair once it is compiled."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """bfloat16, on a CPU float32, if not given."""
    json: Path | None = None
    picture: Path | None = None

    @property
    def form(self) -> TokenRouterForm | None:
        return RECIPES[self.gates].form


def llama(name: str) -> LlamaConfig:
    """The published shapes; `tiny` is nobody's."""
    vocab, d, f, layers, heads, kv, width = {
        "tiny": (256, 64, 160, 2, 4, 2, 16),
        "smollm2-135m": (49152, 576, 1536, 30, 9, 3, 64),
        "llama-3-8b": (128256, 4096, 14336, 32, 32, 8, 128),
    }[name]
    return LlamaConfig(
        vocab_size=vocab, hidden_size=d, intermediate_size=f, num_layers=layers, num_heads=heads, num_kv_heads=kv,
        head_dim=width, rms_norm_eps=1e-5, rope_theta=500000.0, rope_scaling=None, max_position_embeddings=8192,
        tie_word_embeddings=name == "smollm2-135m", attention_bias=False, mlp_bias=False, bos_token_id=None,
        eos_token_ids=(),
    )  # fmt: skip


def random_arrays(shapes: Any, seed: int) -> Any:
    """Small normal values in the shapes and dtypes of a pytree, made on the device; integers are 0."""
    leaves, tree = jax.tree.flatten(shapes)

    @jax.jit
    def fill() -> list[jax.Array]:
        keys = jax.random.split(jax.random.key(seed), len(leaves))
        draw = lambda key, x: (0.02 * jax.random.normal(key, x.shape, jnp.float32)).astype(x.dtype)  # noqa: E731
        return [draw(k, x) for k, x in zip(keys, leaves, strict=True)]

    return jax.tree.unflatten(tree, fill())


def alternate(contenders: dict[str, Timed], seconds: float) -> dict[str, float]:
    """Median milliseconds of each, measured in turns; compiled and warm before the first measurement."""
    inner = {}
    for name, timed in contenders.items():
        once = 0.0
        for _ in range(2):
            made = jax.block_until_ready(timed.prepare())
            start = time.perf_counter()
            jax.block_until_ready(timed.call(made))
            once = time.perf_counter() - start
        inner[name] = 1 if timed.prepare() is not None else max(1, min(100, round(0.01 / once)))
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    end = time.perf_counter() + seconds * len(contenders)
    while time.perf_counter() < end or min(map(len, samples.values())) < 5:
        for name, timed in contenders.items():
            made = jax.block_until_ready(timed.prepare())
            start, out = time.perf_counter(), None
            for _ in range(inner[name]):
                out = timed.call(made)
            jax.block_until_ready(out)
            samples[name].append((time.perf_counter() - start) / inner[name] / timed.calls * 1e3)
    return {name: statistics.median(values) for name, values in samples.items()}


def ceilings(dtype: Any) -> Work:
    """Operations and bytes a second of this device: a large product of random values, a large copy."""
    large = jax.default_backend() != "cpu"
    side, length = (8192, 1 << 30) if large else (512, 1 << 22)
    left, right = (random_arrays(jax.ShapeDtypeStruct((side, side), dtype), seed) for seed in (0, 1))
    source = jnp.arange(length // 4, dtype=jnp.int32)
    product, copy = jax.jit(jnp.matmul), jax.jit(lambda x: x ^ 1)
    times = alternate({"product": Timed(lambda _: product(left, right)), "copy": Timed(lambda _: copy(source))}, 0.5)
    return Work(2.0 * side**3 / times["product"] * 1e3, 2.0 * length / times["copy"] * 1e3)


def measured(bench: Bench, what: str, ms: float, bare: float, work: Work, peak: Work, **more: Any) -> dict[str, Any]:
    """One record of the JSON file."""
    least = 1e3 * max(work.flops / peak.flops, work.bytes / peak.bytes)
    stats = jax.devices()[0].memory_stats() or {}
    return {
        "what": what, "shape": bench.shape, **more, "ms": ms, "ms_bare": bare, "ratio": ms / bare,
        "gb_per_s": work.bytes / ms / 1e6, "tflop_per_s": work.flops / ms / 1e9, "roofline": least / ms,
        "peak_memory_gb": stats.get("peak_bytes_in_use", 0) / 1e9 or None,
        "device": jax.devices()[0].device_kind, "jax": jax.__version__,
        "date": datetime.date.today().isoformat(), "command": shlex.join(["python", *sys.argv]),
    }  # fmt: skip


def bench_kernel(bench: Bench, config: LlamaConfig, dtype: Any, peak: Work) -> Iterator[dict[str, Any]]:
    """Every implementation of a projection group, over the weights of several layers."""
    platform = jax.default_backend()
    names = bench.implementation or AVAILABLE[platform]
    if unknown := sorted(set(names) - set(AVAILABLE[platform])):
        raise InputError(f"--implementation: expected {', '.join(AVAILABLE[platform])}; found {', '.join(unknown)}")
    if bench.routing != "gates":
        names = [name for name in names if name not in GATED]
    layers, size, array = bench.layers or 8, jnp.dtype(dtype).itemsize, jax.ShapeDtypeStruct
    cases = itertools.product(bench.group, bench.adapters, bench.rank, bench.top_k)
    for group, adapters, rank, top_k in cases:
        projections = GROUPS[group]
        splits = tuple(config.projection_shape(p)[1] for p in projections)
        (i, _), o, count = config.projection_shape(projections[0]), sum(splits), len(projections)
        shapes = {"w": (i, o), "a": (count, adapters, rank, i), "b": (adapters, rank, o), "gate": (i, count, adapters)}
        made = {k: array(s, jnp.float32 if k == "gate" else dtype) for k, s in shapes.items()}
        weights = [random_arrays(made, seed) for seed in range(layers)]
        slims = [slim_matrix(w["gate"], w["a"]) for w in weights]
        scale = jnp.full((count, adapters), 20.0)  # makes updates about as large as what they are added to
        lengths = bench.sequence if bench.routing == "request" else (1,)
        for groups, tokens in ((b, s) for b in bench.batch for s in lengths):
            x = random_arrays(array((groups, tokens, i), dtype), 99)
            choices = min(top_k, adapters)
            counts, ones = jnp.full((groups,), choices, jnp.int32), jnp.ones((groups,), jnp.float32)
            key = jax.random.key(7)
            shared = jax.random.randint(key, (groups, 1, count, choices), 0, adapters, jnp.int32)
            given = (shared, jnp.full(shared.shape, 1 / choices, jnp.float32))

            def bare(x, weights):
                return [x @ w["w"] for w in weights]

            def adapted(x, weights, slims, given, counts, ones, name, splits=splits, choices=choices, scale=scale):
                ys = []
                for w, slim in zip(weights, slims, strict=True):
                    y = x @ w["w"]
                    if name in GATED:
                        rest = (w["b"], scale, counts, ones, y[:, 0], splits, choices)
                        ys.append(gated_lora(x[:, 0], slim, *rest, implementation=GATED[name])[0][:, None])
                        continue
                    routing = given
                    if bench.routing == "gates":
                        gate = w["gate"].astype(x.dtype)
                        logits = jnp.einsum("gsi,ipa->gpa", x, gate, preferred_element_type=jnp.float32)
                        routing = choose_adapters(logits, counts, ones, choices)
                        routing = tuple(r[:, None] for r in routing)
                    ys.append(add_routed_lora(x, w["a"], w["b"], *routing, scale, y, splits, implementation=name))
                return ys

            arguments = (x, weights, slims, given, counts, ones)
            bare_call = jax.jit(bare)
            contenders = {"bare": Timed(lambda _, call=bare_call, x=x, w=weights: call(x, w), calls=layers)}
            base, wanted = (
                f(*arguments[:n])[0].astype(jnp.float32)
                for f, n in ((bare_call, 2), (jax.jit(functools.partial(adapted, name="reference")), 6))
            )
            errors = {}
            for name in names:
                call = jax.jit(functools.partial(adapted, name=name))
                try:
                    y = jax.block_until_ready(call(*arguments))[0].astype(jnp.float32)
                except (NotImplementedError, jax.errors.JaxRuntimeError) as e:
                    console.print(
                        f"{group} {groups}x{tokens} A={adapters} R={rank} {name}: not timed: {e}", markup=False
                    )
                    continue
                errors[name] = float(jnp.linalg.norm(y - wanted) / jnp.linalg.norm(wanted - base))
                contenders[name] = Timed(lambda _, call=call, arguments=arguments: call(*arguments), calls=layers)
            times = alternate(contenders, bench.seconds / 2)
            rows = groups * tokens
            work = group_work(config, group, rows, size)
            work += adapter_work(config, group, rows, min(adapters, groups * choices), choices, rank, size)
            for name, ms in times.items():
                if name != "bare":
                    yield measured(
                        bench, "kernel", ms, times["bare"], work, peak, top_k=top_k, adapters=adapters, rank=rank,
                        batch=groups, sequence=tokens, group=group, routing=bench.routing,
                        implementation=name, error=errors[name],
                    )  # fmt: skip


def random_model(
    config: LlamaConfig, adapters: int, rank: int, dtype: Any, form: TokenRouterForm | None
) -> tuple[Held, tuple[str, ...]]:
    """A model with a bank and gates, as training has it, and the adapters' names."""
    infos = tuple(AdapterInfo(f"adapter_{i}", rank, PROJECTIONS, "", "", {}) for i in range(adapters))
    shapes = {p: config.projection_shape(p) for p in PROJECTIONS}
    bank = BankConfig(infos, dict.fromkeys(PROJECTIONS, rank), config.num_layers, shapes)
    abstract = nnx.eval_shape(lambda: gated_llama(config, bank, form, dtype, nnx.Rngs(0)))
    graph, state = nnx.split(abstract)
    return Held(graph, state, lambda: random_arrays(state, 0)), bank.names


def bench_model(bench: Bench, config: LlamaConfig, dtype: Any, peak: Work) -> Iterator[dict[str, Any]]:
    """The whole model: prompts, decoding steps, training steps."""
    size = jnp.dtype(dtype).itemsize
    for adapters, rank in ((a, r) for a in bench.adapters for r in bench.rank):
        model, names = random_model(config, adapters, rank, dtype, bench.form)
        ways = executions("train", dtype)
        bare = {name: run_as(model, way) for name, way in ways.items()}
        ready = dict(bare)
        if platform() == "gpu" and size == 2:
            ready = {name: prepared(model, way) for name, way in ways.items()}
        choices = {"adapted" + f":{k}" * (len(bench.top_k) > 1): min(k, adapters) for k in bench.top_k}
        case: dict[str, Any] = dict(adapters=adapters, rank=rank)
        case |= {"gates": bench.gates} if bench.form else {}
        for batch, length in ((b, s) for b in bench.batch for s in bench.sequence):
            routers = {kind: bound_router(bench.routing, k, batch, names) for kind, k in choices.items()}
            routers: dict[str, Any] = {"bare": None, **routers}
            tokens = jax.random.randint(jax.random.key(1), (batch, length), 0, config.vocab_size, jnp.int32)
            for what in (w for w in bench.what if w != "kernel"):
                title, contenders = f"{what} {batch}x{length}", {}
                starts: dict[str, Any] = dict.fromkeys(routers)
                if what == "decode":
                    starts = {
                        kind: started((bare if kind == "bare" else ready)["xla"], router, tokens)
                        for kind, router in routers.items()
                    }
                for name in chosen_settings(bench, what):
                    try:
                        if what == "train":
                            first = next(iter(choices))
                            remat = "dots" if name == DOTS else True
                            made = training(bare[name], routers[first], tokens, adapters, remat)
                            made = {first if kind == "adapted" else kind: timed for kind, timed in made.items()}
                        else:
                            made = {
                                kind: generating(
                                    (bare if kind == "bare" else ready)[name], router, tokens, starts[kind]
                                )
                                for kind, router in routers.items()
                            }
                    except Exception as e:  # whatever it is, the other settings are worth their time on the device
                        if name == "today":
                            raise
                        console.print(f"{title} {name}: not timed: {reason(e)}", markup=False)
                        continue
                    contenders |= {f"{kind} {name}": timed for kind, timed in made.items()}
                times = measure(
                    title, contenders, bench, [model, *bare.values(), *ready.values(), *filter(None, starts.values())]
                )
                ms_bare = min(ms for name, ms in times.items() if name.startswith("bare "))
                least = functools.partial(least_work, config, what, batch, length, adapters, rank)
                for name, ms in times.items():
                    kind, setting = name.split(" ")
                    if kind == "bare" and not bench.settings:
                        continue
                    k = choices.get(kind, max(choices.values()))
                    more = dict(setting=setting, model=kind.partition(":")[0]) if bench.settings else {}
                    yield measured(
                        bench, what, ms, ms_bare, least(k, bench.routing, size), peak, top_k=k, **case, batch=batch,
                        sequence=length, routing=bench.routing, **more,
                    )  # fmt: skip


def reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]


def measure(title: str, contenders: dict[str, Timed], bench: Bench, held: list[Held]) -> dict[str, float]:
    """Milliseconds of each contender, compiled already, that gives what today's gives; then frees what is held."""
    agreed: dict[str, Any] = {}
    right: dict[str, Timed] = {}
    for name in sorted(contenders, key=lambda name: not name.endswith(" today")):
        try:
            compare(f"{title} {name}", name.split(" ")[0], contenders[name], agreed)
            right[name] = contenders[name]
        except Exception as e:  # as above
            if name.endswith(" today"):
                raise
            console.print(f"{title} {name}: not timed: {reason(e)}", markup=False)
    times = alternate(right, bench.seconds)
    for name, ms in times.items():
        console.print(f"[dim]{title} {name}: {ms:.4g} ms")
    if bench.profile:
        for name, timed in right.items():
            list_kernels(f"{title} {name}", timed)
    for arrays in held:
        arrays.free()
    return times


def chosen_settings(bench: Bench, what: str) -> tuple[str, ...]:
    """Names of `executions(what)`; today's is always among them."""
    known = {w: tuple(executions(w, "float32")) for w in ("decode", "prefill", "train")}
    if wrong := sorted(set(bench.settings) - set(known["train"]) - {"all"}):
        raise InputError(f"--settings: expected all or some of {', '.join(known['train'])}; found {', '.join(wrong)}")
    named = known[what] if "all" in bench.settings else [n for n in bench.settings if n in known[what]]
    return tuple(dict.fromkeys(("today", *named)))


def compare(title: str, kind: str, timed: Timed, agreed: dict[str, Any]) -> None:
    """Runs a contender once and says how far its result is from today's; NaN is an error.

    A choice of adapters that rounding turns is a difference too: a few percent are no alarm.
    """
    result = jax.block_until_ready(timed.call(timed.prepare()))
    if timed.shown is None:
        return
    shown = timed.shown(result).astype(jnp.float32)
    first = agreed.setdefault(kind, shown)
    error = float(jnp.linalg.norm(shown - first) / jnp.linalg.norm(first))
    if not error < 0.5:
        raise ValueError(f"its keys differ from today's by {error:.2g}")
    if first is not shown:
        console.print(f"[dim]{title}: keys differ from today's by {error:.1e}")


def list_kernels(title: str, timed: Timed) -> None:
    """The kernels of one call, the ten that take longest by name."""
    made = jax.block_until_ready(timed.prepare())
    rows = kernels_of(lambda: timed.call(made))
    table = Table("kernel", "launches", "us", "us each", title=f"{title}: {sum(r[2] for r in rows):.0f} us in "
                  f"{sum(r[1] for r in rows)} launches, {timed.calls} steps a call")  # fmt: skip
    for name, count, us in rows[:14]:
        table.add_row(name[:90], str(count), f"{us:.0f}", f"{us / count:.2f}")
    console.print(table)


def bound_router(routing: str, choices: int, batch: int, names: tuple[str, ...]) -> Any:
    """Gates for every token, or for request i a mixture of the adapters i * choices, i * choices + 1, ..."""
    if routing == "gates":
        gates = mj.Gates(top_k=choices)
        return gates.bind([gates] * batch, names)
    mixed = [[names[(i * choices + c) % len(names)] for c in range(choices)] for i in range(batch)]
    requests = [mj.Fixed(dict.fromkeys(row, 1 / choices)) for row in mixed]
    return requests[0].bind(requests, names)


console = Console(width=None if sys.stdout.isatty() else 140)


def main(bench: Bench) -> None:
    """Measures, prints, and keeps what was asked for; records measured before an error are kept too."""
    config = llama(bench.shape)
    if bench.routing != "gates" and "train" in bench.what:
        raise InputError(f"--what train: expected --routing gates, found {bench.routing}")
    if bench.routing == "given" and set(bench.what) != {"kernel"}:
        raise InputError(f"--routing given: expected --what kernel, found {', '.join(bench.what)}")
    if bench.layers is not None:
        config = dataclasses.replace(config, num_layers=bench.layers)
    dtype = jnp.dtype(default_dtype(bench.dtype))
    peak = ceilings(dtype)
    console.print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {dtype.name}: a product reaches "
                  f"{peak.flops / 1e12:.3g} TFLOP/s, a copy {peak.bytes / 1e9:.3g} GB/s")  # fmt: skip
    records: list[dict[str, Any]] = []
    sources = [bench_kernel] if "kernel" in bench.what else []
    if set(bench.what) - {"kernel"}:
        sources.append(bench_model)
    try:
        for source in sources:
            for record in source(bench, config, dtype, peak):
                records.append(record)
                if bench.json:  # at once: the machine may be taken away
                    bench.json.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
                what = " ".join(str(record[k]) for k in LABELS if k in record)
                error = (
                    f"  differs from the reference by {record['error']:.1e} of the update" if "error" in record else ""
                )
                console.print(f"[dim]{what} {record['batch']}x{record['sequence']} {record['ratio']:.3f}{error}")
    finally:
        if records:
            show(records, console)
            if bench.picture:
                draw(records, bench.picture)


if __name__ == "__main__":
    try:
        main(tyro.cli(Bench, description=__doc__))
    except InputError as e:
        sys.exit(f"error: {e}")
