"""Run as a program with TRITON_INTERPRET=1: products with quantised matrices by Triton on CPU tensors against NumPy in
float64, and decoding steps of quantised models against XLA's.

Prints a line a part, exits 1 on the first wrong one. tests/test_quantized_steps.py starts it.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

sys.path.insert(0, str(Path(__file__).parents[1]))

from test_gated_model import small
from test_quantized_matmul import made

import meteora_jax as mj
from converters import quantize
from meteora_jax.execution import ExecutionConfig
from meteora_jax.model import layout
from meteora_jax.model.routed_llama import gated_llama
from meteora_jax.quantization import Quantization, WeightFormat
from pallas_kernels.decode_step.triton_gpu import StepLimits
from pallas_kernels.quantized_matmul import QuantizedWeight, triton_gpu
from pallas_kernels.quantized_matmul.weight import turn, turn_zero

# rows, inputs, columns, groups in 4 bit: a row alone; more than a tile; few inputs
SHAPES = [(1, 512, 16, 4), (19, 128, 32, 1), (3, 256, 16, 8)]


def product(kind: str, dtype: str, rows: int, width: int, total: int, groups: int, behind: int) -> None:
    """One layer of a stack of two, with rows behind it."""
    weight, matrix = made(kind, width, total, groups)
    zero = None if weight.zero is None else turn_zero(weight.zero, width)
    weight = QuantizedWeight(turn(weight.values, weight.group), weight.scale, zero, turned=True, words=True)
    stack = jax.tree.map(lambda z: jnp.stack([z[::-1], z]), weight)
    rng = np.random.default_rng(rows)
    x = jnp.asarray(rng.standard_normal((max(8, rows), width)), dtype)
    rest = jnp.asarray(rng.standard_normal((2, behind, width)), dtype) if behind else None
    summands = np.asarray(triton_gpu.product(1, x, stack, rest, rows))
    y = summands.sum(0)
    exact = np.asarray(x, np.float64)[:rows]
    wanted = exact @ matrix
    if rest is not None:
        wanted = np.concatenate([wanted, exact @ np.asarray(rest[1], np.float64).T], axis=1)
    assert y.shape == wanted.shape
    error = np.abs(y - wanted).max() / np.abs(wanted).max()
    assert error < 1e-5, f"{kind} {dtype} {rows} x {width} x {total}: {error}"


def quantized_model(weights: WeightFormat, dtype: str, head: bool = False) -> mj.Meteora:
    """The random model of the other tests, its matrices rounded."""
    model = small(dtype, layers=1, null=True)
    config = dataclasses.replace(model.config, quantization=Quantization.of(weights, head))
    graph, state = nnx.split(gated_llama(config, model.bank, None, jnp.dtype(dtype), nnx.Rngs(0), null=True))
    plain = {path: leaf[...] for path, leaf in nnx.to_flat_state(model.weights)}
    flat = list(nnx.to_flat_state(state))
    found: dict[tuple[Any, ...], Any] = {}
    for path, leaf in flat:
        scaled = (*path[:-1], f"{path[-1]}_scale")
        if scaled not in {p for p, _ in flat}:
            found.setdefault(path, plain.get(path))
            continue
        matrix, scale = np.asarray(plain[path], np.float32), dict(flat)[scaled][...]
        if leaf[...].dtype == jnp.uint8:
            parts = zip(*(quantize.int4(m, scale.shape[1]) for m in matrix), strict=True)
            found |= dict(zip((path, scaled, (*path[:-1], "kernel_zero")), map(np.stack, parts), strict=True))
        elif matrix.ndim == 2:
            found |= dict(zip((path, scaled), quantize.eight_bit(matrix, leaf[...].dtype.name), strict=True))
        else:
            parts = zip(*(quantize.eight_bit(m, leaf[...].dtype.name) for m in matrix), strict=True)
            found |= dict(zip((path, scaled), map(np.stack, parts), strict=True))
    leaves = [(path, leaf.replace(jnp.asarray(found[path]))) for path, leaf in flat]
    return dataclasses.replace(model, config=config, graph=graph, weights=nnx.from_flat_state(leaves))


FEW = StepLimits(rows=64, programs=1)  # fewer programs to interpret, and no prompts


def stepping(model: mj.Meteora, limits: StepLimits | None = FEW) -> mj.Meteora:
    """As a GPU has it: turned, gates and A's behind it, decoding by Triton."""
    graph = layout.with_execution(model.graph, model.weights, ExecutionConfig(step=limits))
    graph, weights = layout.pack(graph, model.weights)
    return dataclasses.replace(model, graph=graph, weights=weights)


def main() -> None:
    import decode_step_on_cpu as steps

    steps.interpret()
    interpreted = steps.triton_gpu.launch

    def launch(*given: Any, ASM: bool, **rest: Any) -> Any:
        return interpreted(*given, ASM=False, **rest)  # the interpreter knows no assembly

    triton_gpu.launch = launch
    chosen = triton_gpu.tiles
    count = 0
    for kind in ("int8", "fp8", "int4"):
        for i, shape in enumerate(SHAPES):
            product(kind, ("bfloat16", "float32")[(i + (kind == "fp8")) % 2], *shape, behind=32 * (i < 2))
            count += 1
    print(f"products: {count} cases")

    def wide(rows: int, width: int, total: int, group: int) -> dict[str, int]:
        return chosen(rows, width, total, group) | {"BN": 64, "SPLITS": 3 if width == 192 else 1}

    steps.packing.ROWS = triton_gpu.BEHIND = 64  # fewer rows of zeros, and fewer programs, to interpret
    triton_gpu.tiles = wide
    model = quantized_model("fp8", "float32")
    steps.agree(model, stepping(model), [mj.Gates(1, 3.0), None], 2)
    assert "product_kernel" in steps.RAN, steps.RAN
    print("model")


if __name__ == "__main__":
    main()
