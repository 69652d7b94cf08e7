"""What adapters of gate and up, and silu(gate) * up, of a prompt take: XLA's products and fusion, or one Triton launch.

    python scripts/bench_silu.py --json silu.json                                 # a Llama-3-8B's; needs a GPU
    python scripts/bench_silu.py --tile 64,64,32,8,1,4 128,64,32,8,2,8 --profile  # other tiles; each kernel's time

us of a layer behind its base's product: a program of several layers, each a product of 64 columns with its own matrix,
less the same program with the products alone. GB/s are of what any form must read and write: gate, up and the result.
`bare` has no adapters. random: each token another pair of adapters at each projection; runs: 256 tokens share a pair.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import sys
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import tyro
from bench_programs import kernels_of
from bench_quantized import compile_all
from bench_settings import llama
from bench_timing import Timed, alternate, console, random_arrays
from rich.table import Table

from meteora_jax.config import InputError
from meteora_jax.routing import Routing
from pallas_kernels.routed_lora import LoraBank, routed_lora
from pallas_kernels.routed_lora.triton_gpu import silu_lora

Pairs = Literal["random", "runs"]
RUN = 256  # tokens that share a pair
INNER = 64  # columns of the products' input


@dataclasses.dataclass(frozen=True)
class BenchSilu:
    """Times gate and up of prompts with adapters."""

    shape: Literal["tiny", "llama-3-8b"] = "llama-3-8b"
    """Whose F; `tiny` is for trying the script."""
    rows: tuple[int, ...] = (2048, 4096, 16384)
    """Tokens."""
    pairs: tuple[Pairs, ...] = ("random", "runs")
    """How tokens choose two adapters."""
    tile: tuple[str, ...] = (
        "64,64,32,16,2,4",
        "64,64,32,8,1,4",
        "64,32,32,16,1,4",
        "128,64,32,16,2,8",
        "128,64,32,8,1,8",
    )
    """Tiles to compare with the ones that are chosen: BM,BN,BK,RUN,STAGES,warps."""
    adapters: int = 28
    """Adapters in the bank."""
    rank: int = 8
    """Rank of every adapter."""
    layers: int = 2
    """Layers of a program."""
    profile: bool = False
    """List the kernels of one call of each form (name, launches, microseconds)."""
    seconds: float = 0.3
    """Measuring time of each program, compilation excluded."""
    json: Path | None = None
    """Write the records here: a list with one object a measurement."""


def parse(tile: str) -> dict[str, int]:
    """The arguments of `silu_lora` that a `--tile` means."""
    numbers = tile.split(",")
    if len(numbers) != 6 or not all(map(str.isdecimal, numbers)):
        raise InputError(f"--tile: expected BM,BN,BK,RUN,STAGES,warps, found {tile}")
    return dict(zip(("BM", "BN", "BK", "RUN", "STAGES", "warps"), map(int, numbers), strict=True))


def chosen_pairs(pairs: Pairs, rows: int, adapters: int) -> jax.Array:
    """Two adapters, another one each, for every token and both projections: int32 [M, 2, 2]."""
    count = (rows, 2) if pairs == "random" else (-(-rows // RUN), 1)
    first, step = (jax.random.randint(jax.random.key(i), count, i, adapters, jnp.int32) for i in (0, 1))
    found = jnp.stack([first, (first + step) % adapters], axis=-1)
    if pairs == "runs":
        found = jnp.repeat(found, RUN, axis=0)[:rows]
    return jnp.broadcast_to(found, (rows, 2, 2))


def product(x: jax.Array, w: jax.Array) -> jax.Array:
    """x [M, I] times w [2 F, I]."""
    return jnp.einsum("mi,oi->mo", x, w)


def activated(y: jax.Array) -> jax.Array:
    """silu(gate) * up of [M, 2 F]."""
    gate, up = jnp.split(y, 2, axis=1)
    return jax.nn.silu(gate) * up


def programs(settings: BenchSilu, width: int) -> dict[str, Any]:
    """What is timed, of x [M, I], each layer's w, b and shrinks float32 [M, 2, A, R], and a routing [M, 2, 2]."""
    scale = jnp.full((2, settings.adapters), 20.0)

    def each(layer: Any) -> Any:
        def run(x: jax.Array, weights: Any, routing: Routing) -> list[jax.Array]:
            return [layer(product(x, w), LoraBank(None, b, scale, (width, width)), h, routing) for w, b, h in weights]

        return run

    def xla(y: jax.Array, bank: LoraBank, h: jax.Array, routing: Routing) -> jax.Array:
        own = LoraBank(jnp.zeros((*h.shape[1:], INNER), y.dtype), bank.b, bank.scale, bank.splits)
        x = jnp.zeros((len(y), INNER), y.dtype)  # of which the shrinks are given
        return activated(routed_lora(x, own, routing, y, shrink=h, implementation="masked"))

    def triton(y: jax.Array, bank: LoraBank, h: jax.Array, routing: Routing, **tiles: int) -> jax.Array:
        return silu_lora(bank, routing.indices, routing.weights, h, y, **tiles)

    fused = {tile: functools.partial(triton, **parse(tile)) for tile in settings.tile}
    layers = dict(product=lambda y, *_: y, bare=lambda y, *_: activated(y), xla=xla, chosen=triton, **fused)
    return {name: each(layer) for name, layer in layers.items()}


def main(settings: BenchSilu) -> list[dict[str, Any]]:
    """Measures, prints and writes the records; each is written at once."""
    width, records = llama(settings.shape).intermediate_size, []
    console.print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}")
    array, calls = jax.ShapeDtypeStruct, programs(settings, width)
    for rows, pairs in itertools.product(settings.rows, settings.pairs):
        adapters = settings.adapters, settings.rank
        shapes = (
            array((2 * width, INNER), jnp.bfloat16), array((*adapters, 2 * width), jnp.bfloat16),
            array((rows, 2, *adapters), jnp.float32),
        )  # fmt: skip
        weights = [random_arrays(shapes, seed) for seed in range(settings.layers)]
        chosen = chosen_pairs(pairs, rows, settings.adapters)
        given = (
            jax.random.normal(jax.random.key(99), (rows, INNER), jnp.bfloat16), weights,
            Routing(chosen, jnp.full(chosen.shape, 0.5, jnp.float32)),
        )  # fmt: skip
        timed, compiled = {}, compile_all(calls, given)
        wanted = compiled["xla"](*given)[-1].astype(jnp.float32)
        for name, call in compiled.items():
            if isinstance(call, Exception):
                console.print(f"{rows} {pairs} {name}: not timed: {call!r:.200}", markup=False)
                continue
            if name not in ("product", "bare"):
                error = float(jnp.linalg.norm(call(*given)[-1].astype(jnp.float32) - wanted) / jnp.linalg.norm(wanted))
                if not error < 1e-2:
                    raise ValueError(f"{rows} {pairs} {name}: differs from XLA by {error:.1e}")
            timed[name] = Timed(lambda _, call=call, given=given: call(*given), calls=settings.layers)
        times = alternate(timed, settings.seconds)
        for name, ms in times.items():
            us = 1e3 * (ms - times["product"])
            if name != "product":
                about = dict(
                    shape=settings.shape, rows=rows, pairs=pairs, how=name, us=us, us_of_product=1e3 * times["product"]
                )
                records.append(about | dict(gb_per_s=6e-3 * rows * width / us))
        if settings.json:
            settings.json.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
        show([r for r in records if (r["rows"], r["pairs"]) == (rows, pairs)])
        for name in timed if settings.profile else ():
            for kernel, count, us in kernels_of(lambda: compiled[name](*given))[:6]:  # noqa: B023
                console.print(f"  {name}: {kernel[:80]}: {count} launches, {us / count:.1f} us each", markup=False)
    return records


def show(records: list[dict[str, Any]]) -> None:
    """A line a form, the fastest first."""
    table = Table("tokens", "pairs", "", "us", "GB/s")
    for r in sorted(records, key=lambda r: r["us"]):
        table.add_row(str(r["rows"]), r["pairs"], r["how"], f"{r['us']:.1f}", f"{r['gb_per_s']:.0f}")
    console.print(table)


if __name__ == "__main__":
    try:
        main(tyro.cli(BenchSilu, description=__doc__))
    except InputError as e:
        sys.exit(f"error: {e}")
