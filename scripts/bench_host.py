"""What the host does a decoding step: the engine with a device that does nothing.

    JAX_PLATFORMS=cpu python scripts/bench_host.py --rows 128 256

Every dispatch runs a program of the same arguments that gives back the state and a token a row, so what is timed is the
engine's own: scheduling, tables and routers, the call with its transfers, reading tokens and finishing requests. It is
hidden as long as it takes less than the device's step. Times are the thread's own, so other processes do not matter.
"""

from __future__ import annotations

import cProfile
import dataclasses
import pstats
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import tyro
from bench_engine import Bench, BenchEngine, Kind
from bench_settings import llama
from bench_timing import console

from meteora_jax.engine import engine as engine_module
from meteora_jax.engine.step import StepResult
from meteora_jax.execution import jit


@dataclasses.dataclass(frozen=True)
class BenchHost:
    """Times the engine's host side."""

    rows: tuple[int, ...] = (128, 256)
    kinds: tuple[Kind, ...] = ("bare", "gates", "adapter")
    prompt: int = 512
    new: int = 128
    layers: int = 32
    profile: bool = False
    """Print the functions that take most, of the decoding steps."""


@jit(static_argnames=("graph", "steps", "logprobs", "trace"), donate_argnames=("state",))
def idle_steps(
    graph: Any, weights: Any, state: Any, rows: Any, prompt: Any, router: Any, end: Any, *, steps: int, logprobs: Any,
    trace: bool,
) -> Any:  # fmt: skip
    """As `run_steps`, but nothing is computed: a row that would draw a token draws 7."""
    draws = rows.decodes if prompt is None else rows.decodes | (prompt.last >= 0)
    return state, StepResult(jnp.broadcast_to(jnp.where(draws, 7, -1)[None], (steps, len(draws))).astype(jnp.int32))


def host_times(bench: Bench, kind: Kind, rows: int, profile: bool) -> dict[str, float]:
    """Milliseconds of a decoding step, and of a dispatch that reads prompts; the second of two rounds."""
    new, prompt = bench.settings.new, bench.settings.prompt
    engine = bench.engine(rows, rows * (prompt + new))
    found, profiler = {}, cProfile.Profile()
    for _ in range(2):
        handles = [engine.submit(bench.request(kind, i, prompt, new)) for i in range(rows)]
        dispatches, start = engine.counters.dispatches, time.thread_time()
        while not all(h.progress.tokens for h in handles):
            engine.step()
        middle, read = time.thread_time(), engine.counters.dispatches - dispatches
        before, dispatches = min(len(h.progress.tokens) for h in handles), engine.counters.dispatches
        profiler.clear()
        if profile:
            profiler.enable()
        start_decoding = time.thread_time()
        engine.drain()
        end = time.thread_time()
        profiler.disable()
        found = {
            "step_ms": 1e3 * (end - start_decoding) / (new - before),
            "dispatch_ms": 1e3 * (end - start_decoding) / (engine.counters.dispatches - dispatches),
            "prompt_dispatch_ms": 1e3 * (middle - start) / read,
        }
    if profile:
        pstats.Stats(profiler, stream=sys.stdout).sort_stats("tottime").print_stats(22)
    return found


def main(settings: BenchHost) -> None:
    """Measures and prints."""
    engine_module.run_steps = idle_steps
    config = dataclasses.replace(llama("tiny"), num_layers=settings.layers)
    how = BenchEngine(shape="tiny", prompt=settings.prompt, new=settings.new, adapters=28)
    bench = Bench(how, config, "meteora", "bf16")
    console.print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}")
    for rows in settings.rows:
        for kind in settings.kinds:
            times = host_times(bench, kind, rows, settings.profile)
            said = ", ".join(f"{name} {value:.3f}" for name, value in times.items())
            console.print(f"{rows} rows, {kind}: {said}", highlight=False)


if __name__ == "__main__":
    main(tyro.cli(BenchHost, description=__doc__))
