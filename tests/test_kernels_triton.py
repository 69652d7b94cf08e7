"""Triton kernels: interpreted on the CPU against float64 NumPy, compiled for Hopper, and run where there is a GPU."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from routed_cases import GATED, PACKED, follow_product

from pallas_kernels.routed_lora import LoraBank, packing
from pallas_kernels.topk_gating import TopK

HERE = Path(__file__).parent
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
needs_gpu_extra = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("triton", "jax_triton", "jax_cuda13_plugin"))),
    reason="the extra gpu is not installed",
)


def program(name: str, *arguments: str, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, str(HERE / name), *arguments],
        env=os.environ | {"JAX_PLATFORMS": "cpu"} | environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]
    return result.stdout


@needs_triton
def test_numerics_by_triton_s_interpreter():
    served = ["odd", "requests in 16 bit", "more choices than adapters"]
    expected = [*(f"gated: {shape}" for shape in GATED), *(f"many: {shape}" for shape in served)]
    assert program("triton_on_cpu.py", TRITON_INTERPRET="1").splitlines() == expected


@needs_gpu_extra
def test_every_kernel_compiles_for_hopper():
    out = program("triton_lowering.py")
    for kernel in (
        "gated_expand",
        "silu_expand",
        "add_expand",
        "qkv_epilogue",
        "silu_epilogue",
        "residual_epilogue",
        "shrink",
        "weigh",
        "decode",
        "runs",
        "combine",
    ):
        assert f"  {kernel}_kernel: " in out
    for case in re.split(r"\n(?=\S)", out):  # a case, and its kernels indented below it
        header, *kernels = case.strip().splitlines()
        assert header.endswith("float32") or all(" 0 bytes spilt" in kernel for kernel in kernels), case


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 8, 40, 1000])
@pytest.mark.parametrize("name", PACKED[1:])
def test_gated_on_a_gpu(name: str, rows: int):
    rng = np.random.default_rng(rows)
    adapters, rank, width, splits = 28, 8, 576, (576, 192, 192)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.bfloat16)  # noqa: E731
    gate = jnp.asarray(rng.standard_normal((width, 3, adapters)), jnp.float32)
    a, b = draw(3, adapters, rank, width), draw(adapters, rank, sum(splits))
    bank = LoraBank(a, b, jnp.ones((3, adapters), jnp.float32), splits)
    rule = TopK(jnp.full((rows,), 2, jnp.int32), jnp.ones((rows,), jnp.float32), 2)
    given = draw(rows, width), packing.pack_gates_and_a(gate, a), bank, rule, draw(rows, sum(splits))
    run = jax.jit(follow_product, static_argnames="name")
    (y, indices, weights), (y0, indices0, weights0) = run(*given, name=name), run(*given, name="reference")
    np.testing.assert_array_equal(indices, indices0)
    np.testing.assert_allclose(weights, weights0, atol=1e-3)
    error = np.linalg.norm(np.float32(y) - np.float32(y0)) / np.linalg.norm(np.float32(y0))
    assert error < 1e-2


@pytest.mark.skipif(importlib.util.find_spec("jax_triton") is not None, reason="jax-triton is installed")
def test_without_the_extra_the_error_names_it():
    ones = jnp.ones
    bank = LoraBank(ones((1, 2, 4, 8)), ones((2, 4, 8)), ones((1, 2)), (8,))
    rule = TopK(jnp.ones((1,), jnp.int32), ones((1,)), 1)
    with pytest.raises(NotImplementedError, match="the extra `gpu`"):
        follow_product(ones((1, 8)), ones((1, 256, 8)), bank, rule, ones((1, 8)), "triton")


def test_packed_rows_are_padded_to_whole_tiles():
    gate, a = jnp.ones((64, 3, 28)), jnp.ones((3, 28, 8, 64))
    assert packing.pack_gates_and_a(gate, a).shape == (3, 256, 64)
    two = packing.pack_gates_and_a(gate[..., :2], a[:, :2])
    assert two.shape == (3, 256, 64)
    np.testing.assert_array_equal(two.sum(-1)[0, :48] > 0, [True] * 2 + [False] * 30 + [True] * 16)
