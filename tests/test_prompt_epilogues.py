"""Launches behind the products of prompts: against float64 NumPy and the model by XLA, and on a GPU."""

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
from extent import ALL, examples

from meteora_jax.routing import Routing
from pallas_kernels.routed_lora import LoraBank, routed_lora
from pallas_kernels.routed_lora.triton_gpu import add_lora, many_refusal, silu_lora
from pallas_kernels.routed_lora.xla import chosen_shrinks, used_blocks

PROGRAM = Path(__file__).parent / "prompt_epilogues_on_cpu.py"


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_numerics_by_triton_s_interpreter():
    result = subprocess.run(
        [sys.executable, str(PROGRAM), str(examples(4, 48))],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "TRITON_INTERPRET": "1"},
        capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]
    lines = [line for line in result.stdout.splitlines() if line.startswith(("tiles", "whole", "benchmark"))]
    assert lines == [
        f"tiles of 16: {examples(4, 48)} cases", "tiles as on a GPU", "whole model",
        *["benchmark"] * ALL,
    ]  # fmt: skip


def test_blocks_of_b_that_tiles_use():
    """Blocks of two adapters, tiles of two tokens, two projections, a tile of one token."""
    chosen = np.full((7, 2, 2), -1, np.int32)
    chosen[0, 0], chosen[1, 0, 1], chosen[1, 1, 0] = (4, 1), 0, 3
    chosen[4, 1, 1] = 5
    chosen[6, 0] = 0, 9
    found = np.asarray(used_blocks(jnp.asarray(chosen), 2, 2))
    assert found.tolist() == [[0b101, 0b10], [0, 0], [0, 0b100], [0b10001, 0]]


def test_what_acts_on_a_token():
    """Null choices, weights of zero and adapters named twice, by projections that share a choice and do not."""
    shrink = jnp.arange(12, dtype=jnp.float32).reshape(1, 2, 3, 2)
    indices, weights = jnp.asarray([[[2, -1, 2, 1]]]), jnp.asarray([[[1.0, 5.0, 2.0, 0.5]], [[1.0, 5.0, 2.0, 0.0]]])
    scale = jnp.asarray([[1.0, 2.0, 3.0], [1.0, 1.0, 1.0]])
    h, chosen = chosen_shrinks(shrink, indices, weights.reshape(1, 2, 4), scale)
    assert chosen.tolist() == [[[2, -1, 2, 1], [2, -1, 2, -1]]]
    np.testing.assert_array_equal(h[0, 0], [[12, 15], [0, 0], [36, 45], [2, 3]])
    np.testing.assert_array_equal(h[0, 1, :3], [[10, 11], [0, 0], [30, 33]])


def test_gate_and_up_of_two_widths_are_refused():
    zeros = jnp.zeros
    bank = LoraBank(None, zeros((1, 2, 12), jnp.bfloat16), zeros((2, 1)), (8, 4))
    with pytest.raises(NotImplementedError, match="two projections of one width"):
        silu_lora(
            bank, zeros((1, 2, 1), jnp.int32), zeros((1, 2, 1)), zeros((1, 2, 1, 2)), zeros((1, 12), jnp.bfloat16)
        )


@pytest.mark.parametrize(
    ("adapters", "rank", "choices", "kind", "reason"),
    [
        (28, 8, 2, "bfloat16", None), (28, 8, 4, "float16", None), (40, 8, 2, "bfloat16", None),
        (5, 64, 2, "bfloat16", None), (28, 8, 5, "bfloat16", "5 of 28 of rank 8"), (41, 8, 2, "bfloat16", "2 of 41"),
        (4, 65, 2, "bfloat16", "2 of 4 of rank 65"), (28, 8, 2, "float32", "expected 16 bits"),
    ],
)  # fmt: skip
def test_what_is_served(adapters: int, rank: int, choices: int, kind: str, reason: str | None):
    bank = LoraBank(None, jnp.zeros((adapters, rank, 16), kind), jnp.ones((2, adapters)), (8, 8))
    found = many_refusal(bank, choices)
    assert found == reason or (reason is not None and reason in str(found))


def test_a_tile_of_the_bench_that_is_none_is_refused_in_a_line():
    script = Path(__file__).parents[1] / "scripts" / "bench_prompt_epilogues.py"
    command = [sys.executable, str(script), "--shape", "tiny", "--tile", "64,64,32"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(script.parents[1])}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 1
    assert result.stderr.strip() == "error: --tile: expected BM,BN,BK,RUN,STAGES,warps, found 64,64,32"


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [128, 1000])
@pytest.mark.parametrize(("adapters", "rank", "width"), [(28, 8, 1536), (5, 3, 200)])
@pytest.mark.parametrize("end", ["silu", "", "residual"])
def test_on_a_gpu(rows: int, adapters: int, rank: int, width: int, end: str):
    """As XLA's products in float32, some tiles without adapters."""
    rng = np.random.default_rng(rows)

    def draw(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape), jnp.bfloat16)

    a, b = jnp.zeros((2, adapters, rank, 16), jnp.bfloat16), draw(adapters, rank, 2 * width)
    bank = LoraBank(a, b, jnp.ones((2, adapters), jnp.float32), (width, width))
    indices = rng.integers(-1, adapters, (rows, 2, 2)).astype(np.int32)
    indices[rows // 2 :] = rng.integers(-1, 1)
    routing = Routing(jnp.asarray(indices), jnp.full(indices.shape, 0.5, jnp.float32))
    shrink, base = jnp.asarray(rng.standard_normal((rows, 2, adapters, rank)), jnp.float32), draw(rows, 2 * width)
    residual = draw(rows, 2 * width) if end == "residual" else None

    @jax.jit
    def wanted(base):
        x = jnp.zeros((rows, 16), jnp.bfloat16)
        y = routed_lora(x, bank, routing, base.astype(jnp.float32), shrink=shrink, implementation="reference")
        if end == "silu":
            gate, up = jnp.split(y, 2, axis=1)
            return jax.nn.silu(gate) * up
        return y if residual is None else y + residual.astype(jnp.float32)

    given = bank, routing.indices, routing.weights, shrink, base
    found = jax.jit(silu_lora)(*given) if end == "silu" else jax.jit(add_lora)(*given, residual)
    error = np.linalg.norm(np.float32(found) - np.asarray(wanted(base))) / np.linalg.norm(wanted(base))
    assert error < 1e-2
