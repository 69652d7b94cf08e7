"""Run as a program with TRITON_INTERPRET=1: launches behind prompts' products against float64 NumPy.

Everything but the launch is the package's own code. Prints a line a number of cases, exits 1 on the first wrong one.
tests/test_prompt_epilogues.py starts it.
"""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from decode_step_on_cpu import exact
from test_gated_model import prompt_hidden, small
from triton_interpreter import RAN, interpret

import meteora_jax as mj
from meteora_jax.execution import ExecutionConfig
from meteora_jax.gate_config import TokenRouterForm
from meteora_jax.model import layout
from pallas_kernels.routed_lora import LoraBank
from pallas_kernels.routed_lora.triton_gpu import add_lora, many_tiles, padded_rank, silu_lora

SMALL = dict(BM=16, BN=16, BK=16, RUN=2)
LAYER = ["add_expand_kernel", "add_expand_kernel", "silu_expand_kernel", "add_expand_kernel"]
ENDS = ("silu", "", "residual")
EPS = {"float16": 2.0**-10, "bfloat16": 2.0**-7}
# adapters, rank: one block of B with a rest, two with a rest, whole ones of two adapters, and those with a rest
BANKS = ((2, 1), (5, 3), (12, 8), (9, 8))
ROWS = (37, 48, 5)  # a last tile that is not full; three that are, the second without adapters; one that is not full


def one_case(seed: int, rows: int, tiles: dict[str, int], end: str, bank: tuple[int, int]) -> None:
    """Random rows: a third has one choice, a third no adapters, and the rest a choice each.

    Every bank comes in both dtypes, with columns that the tiles divide and do not, with three ends in a row.
    """
    rng = np.random.default_rng(seed)
    turn = seed + ENDS.index(end)
    kind, width, (adapters, rank) = (*EPS,)[turn % 2], (40, 48)[turn // 2 % 2], bank
    splits = {"silu": (width, width), "": (width, 24, 24), "residual": (width,)}[end]
    choices, shared, total = min(3, adapters), seed % 2 == 0, sum(splits)  # shared by the projections

    def draw(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(jnp.dtype(kind))

    base = draw(rows, total)
    base[::5, :6] = np.asarray([-2e3, 2e3, -88.8, 100, -0.0, 0], base.dtype)
    base[1::5, width : width + 2] = np.asarray([-0.0, 0.0], base.dtype)[: max(0, total - width)]
    lead = (rows, 1 if shared else len(splits), choices)
    indices = rng.integers(-1, adapters + 2, lead).astype(np.int32)  # -1 and null choices name nobody
    indices[: rows // 3] = rng.integers(0, adapters, choices)
    indices[rows // 3 : 2 * rows // 3] = -1
    first = tiles["BK"] // padded_rank(rank)  # adapters of the first block, which nobody reads here
    alone = adapters > 2 * first and seed % 4 == 2
    if alone:
        indices[(indices >= 0) & (indices < first)] = first
    weights = np.where(rng.random(lead) < 0.1, 0, rng.standard_normal(lead)).astype(np.float32)
    b, scale = draw(adapters, rank, total), rng.uniform(0.5, 2, (len(splits), adapters)).astype(np.float32)
    shrink = rng.standard_normal((rows, len(splits), adapters, rank)).astype(np.float32)
    residual = draw(rows, total) if end == "residual" else None
    unread = b.copy()
    unread[: first if alone else 0] = np.nan

    @jax.jit
    def run(b, scale, indices, weights, shrink, base, residual):
        given = LoraBank(None, b, scale, splits), indices, weights, shrink, base
        return silu_lora(*given, **tiles) if end == "silu" else add_lora(*given, residual, **tiles)

    found = jax.device_get(run(unread, scale, indices, weights, shrink, base, residual))

    y, size = exact(base), np.abs(exact(base))
    names = indices[..., None] == np.arange(adapters)
    acting = np.where(names, exact(weights)[..., None], 0)  # [M, 1 or P, C, A]
    for p, start in enumerate(np.cumsum((0, *splits[:-1]))):
        columns = slice(start, start + splits[p])
        h, own = exact(scale)[p][:, None] * exact(shrink)[:, p], acting[:, p % lead[1]]
        y[:, columns] += np.einsum("ma,mar,aro->mo", own.sum(1), h, exact(b)[..., columns], optimize=True)
        parts = np.abs(own).sum(1), np.abs(h), np.abs(exact(b)[..., columns])
        size[:, columns] += np.einsum("ma,mar,aro->mo", *parts, optimize=True)
    if end == "silu":
        gate, up = np.split(y, 2, -1)
        with np.errstate(over="ignore"):
            y = gate / (1 + np.exp(-gate)) * up
        left, right = np.split(size, 2, -1)
        size = (1 + left) * (1 + right)
    elif residual is not None:
        y, size = y + exact(residual), size + np.abs(exact(residual))
    bound = 4 * EPS[kind] * (size + np.abs(y)) + 1e-30
    error = np.abs(exact(found) - y)
    assert found.dtype == base.dtype
    assert (error <= bound).all(), (
        f"{end}, seed {seed}, {rows} rows: {(error / bound).max()}, {np.argmax(error / bound)}"
    )


def whole_model() -> None:
    """A prompt through all layers, by gates with a null choice, a token router, and a mixture a request."""
    for form, routers in (
        (None, [mj.Gates(2), [mj.Fixed({"cedar": 0.7, "apple": 0.4}), None, mj.Fixed("birch"), mj.Fixed("apple")]]),
        (TokenRouterForm(width=64, depth=2), [mj.Gates(2)]),
    ):
        model = small("float16", form, layers=1 if form else 2, null=form is None, smaller=True)
        plain, fused, late = (
            packed(model, dataclasses.replace(ExecutionConfig("gpu"), epilogue_tokens=tokens))
            for tokens in (None, 128, 261)
        )
        for router in routers:
            RAN.clear()
            wanted = prompt_hidden(plain, router)
            assert not RAN, RAN
            np.testing.assert_allclose(prompt_hidden(fused, router), wanted, atol=2e-2, rtol=2e-2)
            assert list(RAN) == LAYER * model.config.num_layers, RAN
            if form is not None:  # once: every other model is as late
                np.testing.assert_array_equal(prompt_hidden(late, router), wanted)
                assert list(RAN) == LAYER, "fewer tokens than the launch is for"


def benchmark() -> None:
    """scripts/bench_prompt_epilogues.py times every form at a tiny shape, and finds that they agree."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
    bench_prompt_epilogues = importlib.import_module("bench_prompt_epilogues")
    tile = "16,32,16,2,1,4"
    settings = dict(rows=(20,), tile=(tile,), adapters=4, rank=3, layers=1, seconds=0.001)
    records = bench_prompt_epilogues.main(bench_prompt_epilogues.BenchPrompts("tiny", **settings))
    assert [r["how"] for r in records] == ["bare", "xla", "chosen", tile] * 6, records


def packed(model: Any, execution: ExecutionConfig) -> Any:
    graph = layout.with_execution(model.graph, model.weights, execution)
    graph, weights = layout.pack(graph, model.weights)
    return dataclasses.replace(model, graph=graph, weights=weights)


def main(examples: int) -> None:
    interpret()
    for seed, (turn, end) in itertools.product(range(examples), enumerate(ENDS)):
        one_case(seed, ROWS[(seed + turn) % 3], SMALL, end, BANKS[seed % 4])
    print(f"tiles of 16: {examples} cases")
    for end in ENDS:
        one_case(1, 140, many_tiles(8, 64), end, (28, 8))
    print("tiles as on a GPU")
    whole_model()
    print("whole model")
    if examples > 4:  # every shape is compiled: half a minute
        benchmark()
        print("benchmark")


if __name__ == "__main__":
    main(int(sys.argv[1]))
