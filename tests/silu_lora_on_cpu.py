"""Run as a program with TRITON_INTERPRET=1: gate and up of prompts by one launch against float64 NumPy.

Everything but the launch is the package's own code. Prints a line a number of cases, exits 1 on the first wrong one.
tests/test_silu_lora.py starts it.
"""

from __future__ import annotations

import dataclasses
import importlib
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

import decode_step_on_cpu
from decode_step_on_cpu import RAN, exact
from test_gated_model import prompt_hidden, small

import meteora_jax as mj
from meteora_jax.execution import ExecutionConfig
from meteora_jax.gate_config import TokenRouterForm
from meteora_jax.model import layout
from pallas_kernels.routed_lora import LoraBank
from pallas_kernels.routed_lora.triton_gpu import padded_rank, silu_lora, silu_tiles

SMALL = dict(BM=16, BN=16, BK=16, RUN=2)
EPS = {"float16": 2.0**-10, "bfloat16": 2.0**-7}
# adapters, rank; their product is not always a multiple of BK, and an adapter may lie in two blocks
BANKS = ((5, 3), (28, 8), (2, 1), (9, 8))


def one_case(seed: int, rows: int, tiles: dict[str, int]) -> None:
    """Random rows, of which some tiles have no adapters, some one pair, and some another pair each."""
    rng = np.random.default_rng(seed)
    kind = ("float16", "bfloat16")[seed % 2]
    (adapters, rank), width = BANKS[seed // 2 % 4], (40, 48)[seed // 4 % 2]  # a last tile that is full, or is not
    choices, shared = min(3, adapters), seed % 3 == 0  # by both projections

    def draw(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape), kind)

    base = np.asarray(draw(rows, 2 * width)).copy()
    base[::5, :6] = np.asarray([-2e3, 2e3, -88.8, 100, -0.0, 0], base.dtype)
    base[1::5, width : width + 2] = np.asarray([-0.0, 0.0], base.dtype)
    lead = (rows, 1 if shared else 2, choices)
    indices = rng.integers(-1, adapters + 2, lead).astype(np.int32)  # -1 and null choices name nobody
    indices[: rows // 3] = rng.integers(0, adapters, choices)
    indices[rows // 3 : 2 * rows // 3] = -1
    first = tiles["BK"] // padded_rank(rank)  # adapters of the first block, which nobody reads here
    alone = adapters > 2 * first and seed % 4 > 1
    if alone:
        indices[(indices >= 0) & (indices < first)] = first
    weights = np.where(rng.random(lead) < 0.1, 0, rng.standard_normal(lead)).astype(np.float32)
    b = draw(adapters, rank, 2 * width)
    b = b.at[:first].set(jnp.nan) if alone else b
    bank = LoraBank(None, b, jnp.asarray(rng.uniform(0.5, 2, (2, adapters)), jnp.float32), (width, width))
    shrink = jnp.asarray(rng.standard_normal((rows, 2, adapters, rank)), jnp.float32)
    found = silu_lora(bank, *map(jnp.asarray, (indices, weights)), shrink, jnp.asarray(base), **tiles)

    y, size = exact(base), np.abs(exact(base))
    for m in range(rows):
        for p in range(2):
            columns = slice(p * width, (p + 1) * width)
            for i, w in zip(indices[m, p % lead[1]], exact(weights)[m, p % lead[1]], strict=True):
                if 0 <= i < adapters and w:
                    h = w * exact(bank.scale)[p, i] * exact(shrink)[m, p, i]
                    y[m, columns] += h @ exact(b)[i, :, columns]
                    size[m, columns] += np.abs(h) @ np.abs(exact(b)[i, :, columns])
    gate, up = np.split(y, 2, -1)
    with np.errstate(over="ignore"):
        wanted = gate / (1 + np.exp(-gate)) * up
    left, right = np.split(size, 2, -1)
    bound = 4 * EPS[kind] * ((1 + left) * (1 + right) + np.abs(wanted))
    error = np.abs(exact(found) - wanted)
    assert found.dtype == base.dtype
    assert (error <= bound).all(), f"seed {seed}, {rows} rows: {(error / bound).max()} at {np.argmax(error / bound)}"


def whole_model() -> None:
    """A prompt through all layers, by gates with a null choice, a token router, and a mixture a request."""
    for form, routers in (
        (None, [mj.Gates(2), [mj.Fixed({"cedar": 0.7, "apple": 0.4}), None, mj.Fixed("birch"), mj.Fixed("apple")]]),
        (TokenRouterForm(width=64, depth=2), [mj.Gates(2)]),
    ):
        model = small("float16", form, layers=2, null=form is None)
        plain, fused = (
            packed(model, dataclasses.replace(ExecutionConfig("gpu"), silu_tokens=tokens)) for tokens in (None, 128)
        )
        for router in routers:
            RAN.clear()
            wanted = prompt_hidden(plain, router)
            assert not RAN, RAN
            np.testing.assert_allclose(prompt_hidden(fused, router), wanted, atol=2e-2, rtol=2e-2)
            assert RAN == ["silu_expand_kernel"] * 2, RAN
            late = dataclasses.replace(ExecutionConfig("gpu"), silu_tokens=261)
            prompt_hidden(packed(model, late), router)
            assert len(RAN) == 2, "fewer tokens than the launch is for"


def benchmark() -> None:
    """scripts/bench_silu.py times every form at a tiny shape, and finds that they agree."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
    bench_silu = importlib.import_module("bench_silu")
    tile = "16,32,16,2,1,4"
    records = bench_silu.main(
        bench_silu.BenchSilu("tiny", (40,), tile=(tile,), adapters=4, rank=3, layers=1, seconds=0.01)
    )
    assert [r["how"] for r in records] == ["bare", "xla", "chosen", tile] * 2, records


def packed(model: Any, execution: ExecutionConfig) -> Any:
    graph = layout.with_execution(model.graph, model.weights, execution)
    graph, weights = layout.pack(graph, model.weights)
    return dataclasses.replace(model, graph=graph, weights=weights)


def main(examples: int) -> None:
    decode_step_on_cpu.interpret()
    for seed in range(examples):
        one_case(seed, (37, 64, 5)[seed % 3], SMALL)
    print(f"tiles of 16: {examples} cases")
    for seed in range(examples // 8):
        one_case(1 + 6 * seed, 140, silu_tiles(8))
    print(f"tiles as on a GPU: {examples // 8} cases")
    whole_model()
    print("whole model")
    benchmark()
    print("benchmark")


if __name__ == "__main__":
    main(int(sys.argv[1]))
