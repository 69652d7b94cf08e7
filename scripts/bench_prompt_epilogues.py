"""What adapters of a prompt's tokens take: XLA's products, or one Triton launch behind each of the base's products.

    python scripts/bench_prompt_epilogues.py --json times.json     # a Llama-3-8B's groups; needs a GPU
    python scripts/bench_prompt_epilogues.py --group gate_up --tile 64,64,32,8,1,4 128,64,32,8,2,8 --profile

us of a layer behind its base's product: a program of several layers, each a product of 64 columns with its own matrix,
less the same program with the products alone. GB/s are of what any form must read and write: the base's columns, the
result, and the residual stream. `bare` has no adapters. gate_up ends in silu(gate) * up, o with the residual stream.
random: each token another pair of adapters at each projection; runs: 256 tokens share a pair.
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

from meteora_jax.config import GROUPS, InputError
from meteora_jax.routing import Routing
from pallas_kernels.routed_lora import LoraBank, routed_lora
from pallas_kernels.routed_lora.triton_gpu import add_lora, silu_lora

Group = Literal["gate_up", "qkv", "o"]
Pairs = Literal["random", "runs"]
RUN = 256  # tokens that share a pair
INNER = 64  # columns of the products' input


@dataclasses.dataclass(frozen=True)
class BenchPrompts:
    """Times projection groups of prompts with adapters, behind the base's product."""

    shape: Literal["tiny", "llama-3-8b"] = "llama-3-8b"
    """Whose columns; `tiny` is for trying the script."""
    group: tuple[Group, ...] = ("gate_up", "qkv", "o")
    """Projection groups; down is as o."""
    rows: tuple[int, ...] = (2048, 4096, 16384)
    """Tokens."""
    pairs: tuple[Pairs, ...] = ("random", "runs")
    """How tokens choose two adapters."""
    tile: tuple[str, ...] = (
        "64,64,32,16,2,4", "64,64,64,16,1,4", "64,32,32,16,1,4", "64,32,32,16,2,4", "128,64,32,16,2,8"
    )  # fmt: skip
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
    """The arguments of `silu_lora` and `add_lora` that a `--tile` means."""
    numbers = tile.split(",")
    if len(numbers) != 6 or not all(map(str.isdecimal, numbers)):
        raise InputError(f"--tile: expected BM,BN,BK,RUN,STAGES,warps, found {tile}")
    return dict(zip(("BM", "BN", "BK", "RUN", "STAGES", "warps"), map(int, numbers), strict=True))


def chosen_pairs(pairs: Pairs, rows: int, projections: int, adapters: int) -> jax.Array:
    """Two adapters, another one each, for every token and projection: int32 [M, P, 2]."""
    count = (rows, projections) if pairs == "random" else (-(-rows // RUN), 1)
    first, step = (jax.random.randint(jax.random.key(i), count, i, adapters, jnp.int32) for i in (0, 1))
    found = jnp.stack([first, (first + step) % adapters], axis=-1)
    if pairs == "runs":
        found = jnp.repeat(found, RUN, axis=0)[:rows]
    return jnp.broadcast_to(found, (rows, projections, 2))


def product(x: jax.Array, w: jax.Array) -> jax.Array:
    """x [M, I] times w [O, I]."""
    return jnp.einsum("mi,oi->mo", x, w)


def ended(y: jax.Array, group: Group, residual: jax.Array) -> jax.Array:
    """What XLA makes of a group's output [M, O]."""
    if group == "gate_up":
        gate, up = jnp.split(y, 2, axis=1)
        return jax.nn.silu(gate) * up
    return residual + y if group == "o" else y


def programs(settings: BenchPrompts, group: Group, splits: tuple[int, ...]) -> dict[str, Any]:
    """What is timed, of x [M, I], residual [M, O], each layer's w, b and shrinks float32 [M, P, A, R], a routing."""
    scale = jnp.full((len(splits), settings.adapters), 20.0)

    def each(layer: Any) -> Any:
        def run(x: jax.Array, residual: jax.Array, weights: Any, routing: Routing) -> list[jax.Array]:
            return [layer(product(x, w), LoraBank(None, b, scale, splits), h, routing, residual) for w, b, h in weights]

        return run

    def xla(y: jax.Array, bank: LoraBank, h: jax.Array, routing: Routing, residual: jax.Array) -> jax.Array:
        own = LoraBank(jnp.zeros((*h.shape[1:], INNER), y.dtype), bank.b, bank.scale, bank.splits)
        x = jnp.zeros((len(y), INNER), y.dtype)  # of which the shrinks are given
        return ended(routed_lora(x, own, routing, y, shrink=h, implementation="masked"), group, residual)

    def triton(
        y: jax.Array, bank: LoraBank, h: jax.Array, routing: Routing, residual: jax.Array, **tiles: int
    ) -> jax.Array:
        given = bank, routing.indices, routing.weights, h, y
        if group == "gate_up":
            return silu_lora(*given, **tiles)
        return add_lora(*given, residual if group == "o" else None, **tiles)

    def bare(y: jax.Array, bank: LoraBank, h: jax.Array, routing: Routing, residual: jax.Array) -> jax.Array:
        return ended(y, group, residual)

    fused = {tile: functools.partial(triton, **parse(tile)) for tile in settings.tile}
    layers = dict(product=lambda y, *_: y, bare=bare, xla=xla, chosen=triton, **fused)
    return {name: each(layer) for name, layer in layers.items()}


def main(settings: BenchPrompts) -> list[dict[str, Any]]:
    """Measures, prints and writes the records; each is written at once."""
    config, records = llama(settings.shape), []
    console.print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}")
    array = jax.ShapeDtypeStruct
    for group, rows in itertools.product(settings.group, settings.rows):
        splits = tuple(config.projection_shape(p)[1] for p in GROUPS[group])
        total, projections, adapters = sum(splits), len(splits), (settings.adapters, settings.rank)
        shapes = (
            array((total, INNER), jnp.bfloat16), array((*adapters, total), jnp.bfloat16),
            array((rows, projections, *adapters), jnp.float32),
        )  # fmt: skip
        weights = [random_arrays(shapes, seed) for seed in range(settings.layers)]
        x, residual = (jax.random.normal(jax.random.key(9), (rows, n), jnp.bfloat16) for n in (INNER, total))
        moved = 2.0 * rows * {"gate_up": 1.5 * total, "qkv": 2 * total, "o": 3 * total}[group]
        compiled: dict[str, Any] = {}
        for pairs in settings.pairs:
            chosen = chosen_pairs(pairs, rows, projections, settings.adapters)
            given = x, residual, weights, Routing(chosen, jnp.full(chosen.shape, 0.5, jnp.float32))
            compiled = compiled or compile_all(programs(settings, group, splits), given)
            timed = agreeing(f"{group} {rows} {pairs}", compiled, given, settings.layers)
            times = alternate(timed, settings.seconds)
            about = dict(shape=settings.shape, group=group, rows=rows, pairs=pairs)
            for name, ms in times.items():
                us = 1e3 * (ms - times["product"])
                if name != "product":
                    records.append(about | dict(how=name, us=us, gb_per_s=moved / us / 1e3, ms_of_all=ms))
            if settings.json:
                settings.json.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
            show([r for r in records if all(r[k] == value for k, value in about.items())])
            for name, one in timed.items() if settings.profile else ():
                for kernel, count, us in kernels_of(lambda: one.call(None))[:8]:  # noqa: B023  # called at once
                    console.print(f"  {name}: {kernel[:80]}: {count} launches, {us / count:.1f} us each", markup=False)
    return records


def agreeing(title: str, compiled: dict[str, Any], given: Any, layers: int) -> dict[str, Timed]:
    """The programs that run and tell what XLA's tells."""
    timed: dict[str, Timed] = {}
    wanted = compiled["xla"](*given)[-1].astype(jnp.float32)
    for name, call in compiled.items():
        try:
            if isinstance(call, Exception):
                raise call
            found = call(*given)[-1].astype(jnp.float32)
        except Exception as e:  # the others are worth their time on the device
            console.print(f"{title} {name}: not timed: {e!r:.200}", markup=False)
            continue
        error = 0.0 if name in ("product", "bare") else float(jnp.linalg.norm(found - wanted) / jnp.linalg.norm(wanted))
        if not error < 1e-2:
            console.print(f"{title} {name}: not timed: differs from XLA by {error:.1e}", markup=False)
            continue
        timed[name] = Timed(lambda _, call=call: call(*given), calls=layers)
    return timed


def show(records: list[dict[str, Any]]) -> None:
    """A line a form, the fastest first."""
    table = Table("group", "tokens", "pairs", "", "us", "GB/s")
    for r in sorted(records, key=lambda r: r["us"]):
        table.add_row(r["group"], str(r["rows"]), r["pairs"], r["how"], f"{r['us']:.1f}", f"{r['gb_per_s']:.0f}")
    console.print(table)


if __name__ == "__main__":
    try:
        main(tyro.cli(BenchPrompts, description=__doc__))
    except InputError as e:
        sys.exit(f"error: {e}")
