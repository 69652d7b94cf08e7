"""How `bench.py` measures: random weights, programs timed in alternation, the device's rates, one record a time."""

from __future__ import annotations

import dataclasses
import datetime
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from least import Work
from rich.console import Console

T = TypeVar("T")

console = Console(width=None if sys.stdout.isatty() else 140)


def no_input() -> None:
    """`Timed.prepare` of a program that consumes nothing."""


@dataclasses.dataclass(frozen=True)
class Timed:
    """A program to time: `call(prepare())`, of which only `call` is measured.

    calls: what one call counts for: layers or decoding steps. compared: the part of a result that must agree between
    execution settings, up to rounding; None: nothing is compared.
    """

    call: Callable[[Any], Any]
    prepare: Callable[[], Any] = no_input
    calls: int = 1
    compared: Callable[[Any], jax.Array] | None = None


def random_arrays(shapes: T, seed: int) -> T:
    """Small normal values in the shapes and dtypes of a pytree, created on the device; those of 8 bits have all bits,
    other integers are 0."""
    leaves, tree = jax.tree.flatten(shapes)

    def draw(key: jax.Array, x: jax.ShapeDtypeStruct) -> jax.Array:
        if jnp.issubdtype(x.dtype, jnp.integer) and x.dtype.itemsize == 1:
            return jax.lax.bitcast_convert_type(jax.random.bits(key, x.shape, jnp.uint8), x.dtype)
        size = 64.0 if x.dtype.itemsize == 1 else 0.02
        return (size * jax.random.normal(key, x.shape, jnp.float32)).astype(x.dtype)

    @jax.jit
    def fill() -> list[jax.Array]:
        keys = jax.random.split(jax.random.key(seed), len(leaves))
        return [draw(key, x) for key, x in zip(keys, leaves, strict=True)]

    return jax.tree.unflatten(tree, fill())


def timed_calls(timed: Timed, repeats: int) -> float:
    """Seconds of `repeats` calls with one input, until the device has finished the last."""
    given = jax.block_until_ready(timed.prepare())
    start = time.perf_counter()
    for _ in range(repeats - 1):
        timed.call(given)
    jax.block_until_ready(timed.call(given))
    return time.perf_counter() - start


def alternate(programs: Mapping[str, Timed], seconds: float) -> dict[str, float]:
    """Median milliseconds of each, one after the other in rounds; each is called twice before the first measurement."""
    repeats = {}
    for name, timed in programs.items():
        timed_calls(timed, 1)
        once = timed_calls(timed, 1)
        # a call that consumes its input has one input a measurement
        repeats[name] = 1 if timed.prepare() is not None else max(1, min(100, round(0.01 / once)))
    samples: dict[str, list[float]] = {name: [] for name in programs}
    deadline = time.perf_counter() + seconds * len(programs)
    while time.perf_counter() < deadline or min(map(len, samples.values())) < 5:
        for name, timed in programs.items():
            samples[name].append(timed_calls(timed, repeats[name]) / repeats[name] / timed.calls * 1e3)
    return {name: statistics.median(values) for name, values in samples.items()}


def device_rates(dtype: jnp.dtype) -> Work:
    """Operations and bytes a second of this device: a large product of random values, a large copy."""
    large = jax.default_backend() != "cpu"
    side, length = (8192, 1 << 30) if large else (512, 1 << 22)
    left, right = (random_arrays(jax.ShapeDtypeStruct((side, side), dtype), seed) for seed in (0, 1))
    source = jnp.arange(length // 4, dtype=jnp.int32)
    product, copy = jax.jit(jnp.matmul), jax.jit(lambda x: x ^ 1)
    times = alternate({"product": Timed(lambda _: product(left, right)), "copy": Timed(lambda _: copy(source))}, 0.5)
    return Work(2.0 * side**3 / times["product"] * 1e3, 2.0 * length / times["copy"] * 1e3)


def measurement(ms: float, bare: float, work: Work, rates: Work, **about: Any) -> dict[str, Any]:
    """One record of the JSON file.

    Args:
        ms, bare: milliseconds with adapters and of the bare base.
        work: what the call must do at least.
        rates: of the device, a second.
        about: what was measured.
    """
    least = 1e3 * max(work.flops / rates.flops, work.bytes / rates.bytes)
    stats = jax.devices()[0].memory_stats() or {}
    return {
        **about, "ms": ms, "ms_bare": bare, "ratio": ms / bare,
        "gb_per_s": work.bytes / ms / 1e6, "tflop_per_s": work.flops / ms / 1e9, "roofline": least / ms,
        "peak_memory_gb": stats.get("peak_bytes_in_use", 0) / 1e9 or None,
        "device": jax.devices()[0].device_kind, "jax": jax.__version__,
        "date": datetime.date.today().isoformat(), "command": shlex.join(["python", *sys.argv]),
    }  # fmt: skip
