"""Gate and up of prompts by one launch: against float64 NumPy and the model by XLA, and on a GPU."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from extent import examples

from meteora_jax.routing import Routing
from pallas_kernels.routed_lora import LoraBank, routed_lora
from pallas_kernels.routed_lora.triton_gpu import silu_lora, silu_tiles
from pallas_kernels.routed_lora.xla import used_blocks

PROGRAM = Path(__file__).parent / "silu_lora_on_cpu.py"


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_numerics_by_triton_s_interpreter():
    result = subprocess.run(
        [sys.executable, str(PROGRAM), str(examples(12, 48))],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "TRITON_INTERPRET": "1"},
        capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]
    lines = [line for line in result.stdout.splitlines() if line.startswith(("tiles", "whole", "benchmark"))]
    assert lines == [
        f"tiles of 16: {examples(12, 48)} cases", f"tiles as on a GPU: {examples(1, 6)} cases", "whole model",
        "benchmark",
    ]  # fmt: skip


def test_blocks_of_b_that_tiles_use():
    """Five adapters of rank 3 in blocks of 4 rows: 0 1 | 1 2 | 2 3 | 3 4; tiles of two tokens."""
    combine = np.zeros((7, 2, 5), np.float32)
    combine[0, 0, 4] = combine[1, 1, 0] = 1  # another projection's, another token's
    combine[4, 1, 2] = -0.5
    combine[6, 0, :] = 1  # a tile of one token
    found = np.asarray(used_blocks(jnp.asarray(combine), 3, 2, 4))
    assert [line[1 : 1 + line[0]].tolist() for line in found] == [[0, 3], [], [1, 2], [0, 1, 2, 3]]


def test_projections_of_two_widths_are_refused():
    ones = jnp.ones
    bank = LoraBank(None, ones((1, 2, 12)), ones((2, 1)), (8, 4))
    given = jnp.zeros((1, 2, 1), jnp.int32), ones((1, 2, 1)), ones((1, 2, 1, 2)), ones((1, 12))
    with pytest.raises(NotImplementedError, match="two projections of one width"):
        silu_lora(bank, *given)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [128, 1000])
@pytest.mark.parametrize(("adapters", "rank", "width"), [(28, 8, 1536), (5, 3, 200)])
def test_on_a_gpu(rows: int, adapters: int, rank: int, width: int):
    """As XLA's products and its silu in float32, some tiles without adapters."""
    rng = np.random.default_rng(rows)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.bfloat16)  # noqa: E731
    a, b = jnp.zeros((2, adapters, rank, 16), jnp.bfloat16), draw(adapters, rank, 2 * width)
    bank = LoraBank(a, b, jnp.ones((2, adapters), jnp.float32), (width, width))
    indices = rng.integers(-1, adapters, (rows, 2, 2)).astype(np.int32)
    indices[rows // 2 :] = rng.integers(-1, 1)
    routing = Routing(jnp.asarray(indices), jnp.full(indices.shape, 0.5, jnp.float32))
    shrink, base = jnp.asarray(rng.standard_normal((rows, 2, adapters, rank)), jnp.float32), draw(rows, 2 * width)

    @jax.jit
    def wanted(base):
        x = jnp.zeros((rows, 16), jnp.bfloat16)
        y = routed_lora(x, bank, routing, base.astype(jnp.float32), shrink=shrink, implementation="reference")
        gate, up = jnp.split(y, 2, axis=1)
        return jax.nn.silu(gate) * up

    found = jax.jit(silu_lora)(bank, routing.indices, routing.weights, shrink, base)
    assert silu_tiles(base.dtype)["BM"] <= rows
    error = np.linalg.norm(np.float32(found) - np.asarray(wanted(base))) / np.linalg.norm(wanted(base))
    assert error < 1e-2
