"""Run as a program with TRITON_INTERPRET=1: the Triton kernel of few tokens on CPU tensors, launched as on a GPU.

Everything but the last call is the package's own code: tiles, grids, order of arguments. Prints one line a
number of cases, exits 1 on the first wrong one. tests/test_kernels_triton.py starts it.
"""

# pyright: reportMissingImports=false
# (triton and jax-triton are optional)

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import torch
import triton.language as tl
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from triton.runtime import interpreter

sys.path.insert(0, str(Path(__file__).parents[1]))

from routed_cases import DTYPES, PACKED, Case, assert_close, follow_product

from pallas_kernels.routed_lora import LoraBank, packing, triton_gpu, triton_kernels
from pallas_kernels.topk_gating import TopK

RANDOM: Any = dict(
    deadline=None, derandomize=True, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
)
LAUNCHES: list[str] = []


def to_torch(array: Any) -> torch.Tensor:
    array = np.array(array)
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    if array.dtype == ml_dtypes.float8_e4m3fn:
        return torch.from_numpy(array.view(np.uint8)).view(torch.float8_e4m3fn)
    return torch.from_numpy(array)


def to_jax(tensor: torch.Tensor) -> jax.Array:
    if tensor.dtype == torch.bfloat16:
        return jnp.array(tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16))
    return jnp.array(tensor.numpy())


def launch(
    kernel: str, *arrays: Any, out: Any, grid: tuple[int, ...], warps: int = 4, aliases: Any = None, **constants: Any
) -> Any:
    """`triton_gpu.launch` on CPU tensors; outputs start as NaN, or as a wild index, or as the input they alias."""
    LAUNCHES.append(kernel)
    several = isinstance(out, tuple)
    results, inputs = [], {place: i for i, place in (aliases or {}).items()}
    for place, shape in enumerate(out if several else (out,)):
        wild = np.nan if jnp.issubdtype(shape.dtype, jnp.floating) else 10**6
        start = arrays[inputs[place]] if place in inputs else np.full(shape.shape, wild, shape.dtype)
        results.append(to_torch(start))
    getattr(triton_kernels, kernel)[grid](*map(to_torch, arrays), *results, **constants)
    results = tuple(map(to_jax, results))
    return results if several else results[0]


triton_gpu.launch = launch

# Triton's interpreter keeps bfloat16 as 16 bits and multiplies matrices of it as if they were integers.
interpreted_dot = interpreter.InterpreterBuilder.create_dot


def dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
    def widen(block: Any) -> Any:
        if block.dtype.scalar != tl.bfloat16:
            return block
        return interpreter.TensorHandle((block.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    return interpreted_dot(self, widen(a), widen(b), *rest)


interpreter.InterpreterBuilder.create_dot = dot

# It also takes integers that become bfloat16 for the bits of one.
interpreted_cast = interpreter.InterpreterBuilder.cast_impl


def cast(self: Any, source: Any, kind: Any) -> Any:
    if kind.scalar == tl.bfloat16 and source.dtype.scalar.is_int():
        source = interpreter.TensorHandle(source.data.astype(np.float32), tl.float32)
    return interpreted_cast(self, source, kind)


interpreter.InterpreterBuilder.cast_impl = cast

# Each call of a device function puts the interpreter's functions into the language, a fifth of the time; a launch has.
put_into_language = interpreter._patch_lang


def put_once(function: Any) -> Any:
    seen = [value for value in function.__globals__.values() if value is tl or value is tl.core]
    if any(tl.core.is_builtin(language.load) for language in seen):
        return put_into_language(function)
    return interpreter._LangPatchScope()


interpreter._patch_lang = put_once


@st.composite
def gated_cases(draw) -> tuple[Any, ...]:
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kind = DTYPES[draw(st.sampled_from(list(DTYPES)))]
    rows, adapters, rank = draw(st.integers(1, 20)), draw(st.integers(1, 40)), draw(st.sampled_from([1, 3, 8]))
    width, splits = (
        draw(st.sampled_from([7, 32])),
        tuple(draw(st.lists(st.sampled_from([5, 48, 130]), min_size=1, max_size=3))),
    )
    top_k = draw(st.integers(1, min(4, adapters)))

    def draw_array(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape).astype(kind))

    # few distinct values make ties
    columns = adapters + draw(st.sampled_from([0, 1]))  # with a null choice
    gate = jnp.asarray(rng.integers(-2, 3, (width, len(splits), columns)).astype(np.float32))
    x = jnp.asarray(rng.integers(-2, 3, (rows, width)).astype(kind))
    a, b = draw_array(len(splits), adapters, rank, width), draw_array(adapters, rank, sum(splits))
    scale = jnp.asarray(rng.uniform(0.5, 2, (len(splits), adapters)).astype(np.float32))
    counts = jnp.asarray(rng.integers(0, top_k + 1, rows).astype(np.int32))
    temperatures = jnp.asarray(rng.uniform(0.5, 20, rows).astype(np.float32))
    return x, gate, a, b, scale, counts, temperatures, draw_array(rows, sum(splits)), splits, top_k


def random_gated_shapes(name: str, examples: int) -> None:
    @settings(max_examples=examples, **RANDOM)
    @given(case=gated_cases())
    def check(case: tuple[Any, ...]) -> None:
        x, gate, a, b, scale, counts, temperatures, base, splits, top_k = case
        # the choice, by NumPy: logits are exact, being sums of small integers
        logits = np.einsum("mi,ipa->mpa", np.asarray(x, np.float64), np.asarray(gate, np.float64))
        order = np.argsort(-logits, axis=-1, kind="stable")[..., :top_k]
        taken = (np.arange(top_k) < np.asarray(counts)[:, None])[:, None, :]
        values = np.take_along_axis(logits, order, -1) / np.asarray(temperatures, np.float64)[:, None, None]
        values = np.where(taken, np.exp(values - values[..., :1]), 0)
        weights = values / np.maximum(values.sum(-1, keepdims=True), 1e-300)
        indices = np.where(taken & (order < a.shape[1]), order, -1).astype(np.int32)
        kind = next(k for k, v in DTYPES.items() if v == x.dtype)
        expected = Case(
            kind,
            *map(np.asarray, (x, a, b, indices, weights.astype(np.float32), scale, base)),
            splits,
            np.asarray(base),
        )
        bank, rule = LoraBank(a, b, scale, splits), TopK(counts, temperatures, top_k)
        packed = packing.pack_gates_and_a(gate, a)
        y, found_indices, found_weights = follow_product(x, packed, bank, rule, base, name, gate.shape[-1])
        np.testing.assert_array_equal(found_indices, indices)
        np.testing.assert_allclose(found_weights, weights, atol=1e-6)
        assert_close({"y": y}, expected)

    check()


def main(examples: int) -> None:
    for name in PACKED:
        random_gated_shapes(name, 2 * examples)  # fewer let a bias slip that one of them forgets
        print(f"gated, {name}: {2 * examples} random shapes")
    assert set(LAUNCHES) == {"gated_expand_kernel"}, LAUNCHES


if __name__ == "__main__":
    main(int(sys.argv[1]))
