"""`bench.py --what prefill | decode | train`: the whole model, bare and with adapters, under each execution setting."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from bench_programs import (
    DOTS,
    LazyArrays,
    executions,
    generating,
    kernels_of,
    prepared,
    run_as,
    started,
    training,
)  # fmt: skip
from bench_settings import Bench
from bench_timing import Timed, alternate, console, measurement, random_arrays
from flax import nnx
from least import Work, least_work
from rich.table import Table

import meteora_jax as mj
from meteora_jax.bank import BaseParam
from meteora_jax.config import PROJECTIONS, AdapterInfo, BankConfig, InputError, LlamaConfig
from meteora_jax.execution import platform
from meteora_jax.gate_config import TokenRouterForm
from meteora_jax.model.routed_llama import gated_llama
from meteora_jax.routing import BoundRouter
from pallas_kernels.paged_attention import QUERY_BLOCK


def random_bank(config: LlamaConfig, adapters: int, rank: int, own_gate: bool = False) -> BankConfig:
    """The description of a bank, whose adapters change every projection. own_gate: each has a gate of its own."""
    infos = tuple(
        AdapterInfo(f"adapter_{i}", rank, PROJECTIONS, "", "", {}, own_gate=own_gate) for i in range(adapters)
    )
    shapes = {p: config.projection_shape(p) for p in PROJECTIONS}
    return BankConfig(infos, dict.fromkeys(PROJECTIONS, rank), config.num_layers, shapes)


def random_model(
    config: LlamaConfig,
    adapters: int,
    rank: int,
    dtype: jnp.dtype,
    form: TokenRouterForm | None,
    own_gate: bool = False,
) -> tuple[LazyArrays, tuple[str, ...]]:
    """A model with a bank and gates, as training has it, and the adapters' names."""
    bank = random_bank(config, adapters, rank, own_gate)
    abstract = nnx.eval_shape(lambda: gated_llama(config, bank, form, dtype, nnx.Rngs(0)))
    graph, state = nnx.split(abstract)
    return LazyArrays(graph, state, lambda: plausible(random_arrays(state, 0))), bank.names


def plausible(weights: Any) -> Any:
    """Scales and zeros of a quantised base for which its random matrices are as large as those of a plain one."""
    flat = nnx.to_flat_state(weights)
    kinds = {path: leaf[...].dtype.name for path, leaf in flat if isinstance(leaf, BaseParam)}
    for path, leaf in flat:
        values = kinds.get((*path[:-1], str(path[-1]).removesuffix("_scale")))
        if path not in kinds or not str(path[-1]).endswith(("_scale", "_zero")):
            continue
        size = {"int8": 74.0, "float8_e4m3fn": 64.0, "uint8": 4.6}.get(values or "", 1.0)
        leaf.set_value(jnp.full_like(leaf[...], 8 if str(path[-1]).endswith("_zero") else 0.02 / size))
    return weights


def bench_model(bench: Bench, config: LlamaConfig, dtype: jnp.dtype, rates: Work) -> Iterator[dict[str, Any]]:
    """The whole model: prompts, decoding steps, training steps."""
    size = jnp.dtype(dtype).itemsize
    if odd := [n for n in bench.sequence if n % QUERY_BLOCK and {"prefill", "decode"} & set(bench.what)]:
        raise InputError(f"--sequence: expected a multiple of {QUERY_BLOCK} with prefill and decode, found {odd[0]}")
    for adapters, rank in ((a, r) for a in bench.adapters for r in bench.rank):
        model, names = random_model(config, adapters, rank, dtype, bench.form)
        settings = executions("train", dtype)
        bare = {name: run_as(model, execution) for name, execution in settings.items()}
        ready = dict(bare)
        if platform() == "gpu" and size == 2:
            ready = {name: prepared(model, execution) for name, execution in settings.items()}
        choices = {"adapted" + f":{k}" * (len(bench.top_k) > 1): min(k, adapters) for k in bench.top_k}
        case: dict[str, Any] = dict(adapters=adapters, rank=rank)
        case |= {"gates": bench.gates} if bench.form else {}
        for batch, length in ((b, s) for b in bench.batch for s in bench.sequence):
            routers = {kind: bound_router(bench.routing, k, batch, names) for kind, k in choices.items()}
            routers: dict[str, Any] = {"bare": None, **routers}
            tokens = jax.random.randint(jax.random.key(1), (batch, length), 0, config.vocab_size, jnp.int32)
            for what in (w for w in bench.what if w != "kernel"):
                title, programs = f"{what} {batch}x{length}", {}
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
                            timed = training(bare[name], routers[first], tokens, adapters, remat)
                            timed = {first if kind == "adapted" else kind: one for kind, one in timed.items()}
                        else:
                            timed = {
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
                    programs |= {f"{kind} {name}": one for kind, one in timed.items()}
                times = measure(
                    title, programs, bench, [model, *bare.values(), *ready.values(), *filter(None, starts.values())]
                )
                ms_bare = min(ms for name, ms in times.items() if name.startswith("bare "))
                least = functools.partial(least_work, config, what, batch, length, adapters, rank)
                for name, ms in times.items():
                    kind, setting = name.split(" ")
                    if kind == "bare" and not bench.settings:
                        continue
                    k = choices.get(kind, max(choices.values()))
                    compared = dict(setting=setting, model=kind.partition(":")[0]) if bench.settings else {}
                    yield measurement(
                        ms, ms_bare, least(k, bench.routing, size), rates, what=what, shape=bench.shape, top_k=k,
                        **case, batch=batch, sequence=length, routing=bench.routing, **compared,
                    )  # fmt: skip


def reason(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]


def measure(title: str, programs: dict[str, Timed], bench: Bench, arrays: Sequence[LazyArrays]) -> dict[str, float]:
    """Milliseconds of each program whose result agrees with that of the setting "today"; frees `arrays` at last."""
    agreed: dict[str, jax.Array] = {}
    right: dict[str, Timed] = {}
    for name in sorted(programs, key=lambda name: not name.endswith(" today")):
        try:
            compare(f"{title} {name}", name.split(" ")[0], programs[name], agreed)
            right[name] = programs[name]
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
    for lazy in arrays:
        lazy.free()
    return times


def chosen_settings(bench: Bench, what: str) -> tuple[str, ...]:
    """Names of `executions(what)` that are timed; "today" is always one of them."""
    known = {w: tuple(executions(w, "float32")) for w in ("decode", "prefill", "train")}
    if wrong := sorted(set(bench.settings) - set(known["train"]) - {"all"}):
        raise InputError(f"--settings: expected all or some of {', '.join(known['train'])}; found {', '.join(wrong)}")
    named = known[what] if "all" in bench.settings else [n for n in bench.settings if n in known[what]]
    return tuple(dict.fromkeys(("today", *named)))


def compare(title: str, kind: str, timed: Timed, agreed: dict[str, jax.Array]) -> None:
    """Runs a program once and says how far its result is from that of the setting "today"; NaN is an error.

    Where rounding changes which adapters are chosen, results differ by a few percent: that is expected.
    """
    result = jax.block_until_ready(timed.call(timed.prepare()))
    if timed.compared is None:
        return
    found = timed.compared(result).astype(jnp.float32)
    first = agreed.setdefault(kind, found)
    error = float(jnp.linalg.norm(found - first) / jnp.linalg.norm(first))
    if not error < 0.5:
        raise ValueError(f"its keys differ from today's by {error:.2g}")
    if first is not found:
        console.print(f"[dim]{title}: keys differ from today's by {error:.1e}")


def list_kernels(title: str, timed: Timed) -> None:
    """The kernels of one call, the ten that take longest by name."""
    given = jax.block_until_ready(timed.prepare())
    rows = kernels_of(lambda: timed.call(given))
    table = Table("kernel", "launches", "us", "us each", title=f"{title}: {sum(r[2] for r in rows):.0f} us in "
                  f"{sum(r[1] for r in rows)} launches, {timed.calls} steps a call")  # fmt: skip
    for name, count, us in rows[:14]:
        table.add_row(name[:90], str(count), f"{us:.0f}", f"{us / count:.2f}")
    console.print(table)


def bound_router(routing: str, choices: int, batch: int, names: tuple[str, ...]) -> BoundRouter:
    """Gates for every token, or for request i a mixture of the adapters i * choices, i * choices + 1, ..."""
    if routing == "gates":
        gates = mj.Gates(top_k=choices)
        return gates.bind([gates] * batch, names)
    mixed = [[names[(i * choices + c) % len(names)] for c in range(choices)] for i in range(batch)]
    requests = [mj.Fixed(dict.fromkeys(row, 1 / choices)) for row in mixed]
    return requests[0].bind(requests, names)
