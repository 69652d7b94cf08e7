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
from pallas_kernels.decode_step import operands
from pallas_kernels.decode_step import triton_gpu as step_gpu
from pallas_kernels.decode_step.triton_gpu import StepLimits
from pallas_kernels.quantized_matmul import QuantizedWeight, triton_gpu
from pallas_kernels.quantized_matmul.weight import turn, turn_zero

# rows, inputs, columns, groups in 4 bit, rows behind: a row alone; more than a tile; few inputs; wider blocks of what
# is behind
SHAPES = [(1, 512, 16, 4, 32), (19, 128, 32, 1, 32), (3, 256, 16, 8, 0), (33, 128, 16, 1, 32), (64, 128, 16, 1, 64)]

# how adapters are chosen, whether the bank is wide, up to how many rows gather
SUMMANDS = [
    ("gates", False, 64), ("gates", False, 0), ("gates", True, 64), ("given", False, 64), ("given", False, 0),
    ("fused", False, 0),
]  # fmt: skip


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


def summands(steps: Any, seed: int, how: str, wide: bool, gather: int) -> None:
    """A group whose product is two summands: who reads base, logits or shrinks of it reads the sum of both, so that the
    result is that of the same matrices unquantised. how: "gates", "given" or "fused"."""
    rng, rows, (adapters, null), top_k = np.random.default_rng(seed), 9, (5, 1), 2
    plain, _, packed = steps.random_group(rng, "float32", 2, 128, (64,), adapters, 4, wide, False, True, 3, null)
    made = [quantize.eight_bit(np.asarray(w[:64]).T, "float8_e4m3fn") for w in plain.w]
    values, scale = (np.stack(z) for z in zip(*made, strict=True))
    rounded = jnp.asarray(values.astype(np.float32) * scale[:, None]).swapaxes(1, 2)
    turned = jnp.stack([turn(jnp.asarray(v), 0) for v in values])
    behind = packed.reshape(2, -1, 128)
    plain = dataclasses.replace(plain, w=jnp.concatenate([rounded, behind], axis=1))
    weight = QuantizedWeight(turned, jnp.asarray(scale), turned=True, words=True)
    group = dataclasses.replace(plain, w=weight, behind=behind)
    if how == "gates":
        choice = operands.Choice(top_k, jnp.full(rows, top_k), jnp.full(rows, 5.0, jnp.float32))
    else:
        indices = jnp.asarray(rng.integers(-1, adapters, (rows, top_k)), jnp.int32)
        weights = jnp.asarray(rng.standard_normal((rows, top_k)), jnp.float32)
        fused = jnp.arange(rows) % 2 == 0 if how == "fused" else None
        choice = operands.Choice(top_k, indices=indices, weights=weights, fused=fused)
    shape = (2, rows, 7, top_k) if how == "gates" else (1,)
    state = operands.StepState(jnp.zeros((8, 4, 2, 32)), jnp.full(shape, -1, jnp.int32), jnp.zeros(shape), 4)
    x = jnp.asarray(rng.integers(-2, 3, (rows, 128)), jnp.float32)
    residual, ones = jnp.asarray(rng.standard_normal((rows, 64)), jnp.float32), jnp.ones((2, 64))
    results = [
        step_gpu.residual_step(
            1, x, g, state, choice, StepLimits(gather=gather), residual=residual, next_scale=ones, next_layer=0
        )
        for g in (group, plain)
    ]  # fmt: skip
    (found, after), (wanted, before) = results
    np.testing.assert_allclose(found.x, wanted.x, atol=1e-4, rtol=1e-4)
    np.testing.assert_array_equal(after.indices, before.indices)
    np.testing.assert_allclose(after.weights, before.weights, atol=1e-5)


FEW = StepLimits(rows=64, programs=1)  # fewer programs to interpret, and no prompts


def stepping(model: mj.Meteora, limits: StepLimits | None = FEW) -> mj.Meteora:
    """As a GPU has it: turned, gates and A's behind it, decoding by Triton."""
    graph = layout.with_execution(model.graph, model.weights, ExecutionConfig(step=limits))
    graph, weights = layout.pack(graph, model.weights)
    return dataclasses.replace(model, graph=graph, weights=weights)


def main() -> None:
    import decode_step_on_cpu as steps

    steps.interpret()
    chosen = triton_gpu.tiles
    count = 0
    for kind in ("int8", "fp8", "int4"):
        for i, shape in enumerate(SHAPES):
            product(kind, ("bfloat16", "float32")[(i + (kind == "fp8")) % 2], *shape)
            count += 1
    print(f"products: {count} cases")

    def wide(rows: int, width: int, total: int, group: int) -> dict[str, int]:
        return chosen(rows, width, total, group) | {"BN": 64, "SPLITS": 3 if width == 192 else 1}

    steps.packing.ROWS = 64  # fewer rows of zeros, and fewer programs, to interpret
    triton_gpu.behind_block = lambda *_: 64
    triton_gpu.tiles = wide
    chosen_here, triton_gpu.tiles = triton_gpu.tiles, lambda *_: dict(BM=16, BN=64, J=16, SPLITS=2, STAGES=2, warps=4)
    for seed, case in enumerate(SUMMANDS):
        summands(steps, seed, *case)
    print(f"summands: {len(SUMMANDS)} cases")
    triton_gpu.tiles = chosen_here
    model = quantized_model("fp8", "float32")
    steps.agree(model, stepping(model), [mj.Gates(1, 3.0), None], 2)
    assert "product_kernel" in steps.RAN, steps.RAN
    print("model")


if __name__ == "__main__":
    main()
