"""What products of few rows with a quantised matrix take by Triton, tile by tile, and by XLA; GB/s of the matrices.

    python scripts/bench_quantized.py --json products.json         # the projections of a Llama-3-8B; needs a GPU

Each time is of one launch among those of as many layers as 0.4 GB holds, in one program: nothing is left in L2.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import operator
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import tyro
from bench_settings import llama
from bench_timing import Timed, alternate, console, random_arrays
from rich.table import Table

from meteora_jax.config import GROUPS, InputError
from meteora_jax.execution import jit
from meteora_jax.quantization import Quantization, WeightFormat
from pallas_kernels.quantized_matmul import QuantizedWeight, quantized_matmul, triton_gpu
from pallas_kernels.quantized_matmul.weight import turn_zero

Group = Literal["qkv", "o", "gate_up", "down"]


@dataclasses.dataclass(frozen=True)
class BenchProducts:
    """Times products of few rows with quantised matrices."""

    weights: tuple[WeightFormat, ...] = ("fp8", "int4")
    """How the matrices are stored."""
    group: tuple[Group, ...] = ("qkv", "o", "gate_up", "down")
    """The matrices: of projection groups of a Llama-3-8B."""
    rows: tuple[int, ...] = (1, 8, 64)
    """Rows of x."""
    behind: int = 0
    """Rows of 16 bits behind each matrix, as gates and A's are."""
    tile: tuple[str, ...] = ()
    """Tiles to compare with the ones that are chosen: BM,BN,J,SPLITS,stages,warps."""
    xla: bool = True
    """XLA's product as well, bfloat16's, and of fp8 that of activations in fp8."""
    seconds: float = 0.05
    """Measuring time of each, compilation excluded."""
    json: Path | None = None
    """Write the records here: a list with one object a measurement."""


def stacked(weights: WeightFormat, width: int, total: int) -> QuantizedWeight:
    """Random matrices in words of one shape, as many as 0.4 GB holds."""
    parts = Quantization.of(weights).parts(width, total)
    layers = max(2, round(4e8 * (2 if weights == "int4" else 1) / width / total))

    def make(name: str) -> Any:
        shape, kind = parts[name]
        if name == "kernel":
            shape = shape[::-1]
        return random_arrays(jax.ShapeDtypeStruct((layers, *shape), kind), 0)

    zero = None
    if "kernel_zero" in parts:
        lies = jax.eval_shape(lambda: turn_zero(jnp.zeros(*parts["kernel_zero"]), width))
        zero = jnp.full((layers, *lies.shape), 8, jnp.uint8)
    return QuantizedWeight(make("kernel"), make("kernel_scale"), zero, turned=True, words=True)


def parse(tile: str) -> dict[str, Any]:
    """The arguments of `triton_gpu.product` that a `--tile` means."""
    numbers = tile.split(",")
    if len(numbers) != 6 or not all(map(str.isdecimal, numbers)):
        raise InputError(f"--tile: expected BM,BN,J,SPLITS,stages,warps, found {tile}")
    bm, bn, j, splits, stages, warps = map(int, numbers)
    size = dict(BM=bm, BN=bn, J=j, SPLITS=splits, STAGES=stages, warps=warps)
    return dict(tile=size)


def main(settings: BenchProducts) -> None:
    """Measures, prints and writes the records; each is written at once."""
    config, records = llama("llama-3-8b"), []
    console.print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}")
    forced = {tile: parse(tile) for tile in settings.tile}
    for weights, group in itertools.product(settings.weights, settings.group):
        projections = GROUPS[group]
        width = config.projection_shape(projections[0])[0]
        total = sum(config.projection_shape(p)[1] for p in projections)
        weight = stacked(weights, width, total)
        layers = len(weight.values)
        behind = random_arrays(jax.ShapeDtypeStruct((layers, settings.behind, width), jnp.bfloat16), 2)
        own = sum(z.nbytes for z in (*jax.tree.leaves(weight), behind)) / layers
        plain = random_arrays(jax.ShapeDtypeStruct((layers, total, width), jnp.bfloat16), 3) if settings.xla else None
        for rows in settings.rows:
            x = random_arrays(jax.ShapeDtypeStruct((max(8, rows), width), jnp.bfloat16), 1)

            def triton(x, weight, behind, plain, how=None, rows=rows, layers=layers):
                more = None if behind.shape[1] == 0 else behind
                return [triton_gpu.product(i, x, weight, more, rows, **(how or {})) for i in range(layers)]

            def xla(x, weight, behind, plain, how=None, layers=layers):
                layer = operator.itemgetter
                return [quantized_matmul(x, jax.tree.map(layer(i), weight), implementation=how) for i in range(layers)]

            def bfloat16(x, weight, behind, plain, layers=layers):
                product = "mi,oi->mo"
                return [jnp.einsum(product, x, plain[i], preferred_element_type=jnp.float32) for i in range(layers)]

            calls: dict[str, Any] = {"chosen": triton}
            own_tile = triton_gpu.tiles(rows, width, total, weight.group)
            for tile, how in forced.items():
                if own_tile["BM"] != how["tile"]["BM"] != rows:
                    continue
                calls[tile] = functools.partial(triton, how=how)
            if settings.xla:
                calls |= {"xla": xla, "bf16": bfloat16}
            if settings.xla and weights == "fp8":
                calls["fp8"] = functools.partial(xla, how="xla_fp8")
            given = x, weight, behind, plain
            compiled, programs = compile_all(calls, given), {}
            wanted = compiled["xla"](*given)[1][:rows] if settings.xla else None
            for name, call in compiled.items():
                if isinstance(call, Exception):
                    console.print(f"{weights} {group} {rows} {name}: {call!r:.200}", markup=False)
                    continue
                found = call(*given)[1]
                found = (jnp.sum(found, axis=0) if found.ndim == 3 else found)[:rows, :total]
                if wanted is not None and name not in ("bf16", "fp8"):
                    error = float(jnp.linalg.norm(found - wanted) / jnp.linalg.norm(wanted))
                    if not error < 1e-2:
                        console.print(f"{weights} {group} {rows} {name}: differs from XLA by {error:.1e}", markup=False)
                programs[name] = Timed(lambda _, call=call, given=given: call(*given), calls=layers)
            for name, ms in alternate(programs, settings.seconds).items() if programs else ():
                size = own if name not in ("xla", "bf16", "fp8") else own - behind.nbytes / layers
                size = 2.0 * width * total if name == "bf16" else size
                record = dict(weights=weights, group=group, rows=rows, how=name, us=1e3 * ms, gb_per_s=size / ms / 1e6)
                records.append(record)
                if settings.json:
                    settings.json.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
        del weight, behind, plain
    show(records)


def compile_all(calls: dict[str, Any], given: Any) -> dict[str, Any]:
    """Each call compiled, or the error; several at a time."""

    def one(call: Any) -> Any:
        try:
            return jit()(call).lower(*given).compile()
        except Exception as e:  # the others are worth their time on the device
            return e

    with ThreadPoolExecutor(8) as pool:
        return dict(zip(calls, pool.map(one, calls.values()), strict=True))


def show(records: list[dict[str, Any]]) -> None:
    """A line a product, us and GB/s of each way, the fastest first."""
    table = Table("weights", "group", "rows", "us (GB/s)")
    for case in dict.fromkeys((r["weights"], r["group"], r["rows"]) for r in records):
        own = sorted((r for r in records if (r["weights"], r["group"], r["rows"]) == case), key=lambda r: r["us"])
        table.add_row(*map(str, case), "  ".join(f"{r['how']}: {r['us']:.1f} ({r['gb_per_s']:.0f})" for r in own))
    console.print(table)


if __name__ == "__main__":
    try:
        main(tyro.cli(BenchProducts, description=__doc__))
    except InputError as e:
        sys.exit(f"error: {e}")
