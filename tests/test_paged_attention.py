"""Attention over blocks against plain attention of each sequence by itself, in float64 NumPy."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu.ragged_paged_attention import kernel

from meteora_jax.execution import ExecutionConfig
from meteora_jax.sharding import make_mesh
from pallas_kernels.paged_attention import (
    EMPTY,
    QUERY_BLOCK,
    StepTokens,
    filled_cpu,
    paged_attention,
    ragged_tpu,
    triton_gpu,
    write_pages,
)
from pallas_kernels.paged_attention.api import choose

BLOCK, LAYERS = 4, 2
LENGTHS = (13, 1, 37, 22)  # tokens in the cache after the step
CHUNKS = (0, 0, 21, 16)  # of which so many are read by it; 0: one is decoded; the third row's go to two runs


class Case:
    """Sequences whose blocks lie in no order: some decode one token, others read a chunk, one does nothing."""

    def __init__(
        self, seed: int, heads: int = 6, kv: int = 2, width: int = 8, lengths: Sequence[int] = LENGTHS,
        chunks: Sequence[int] = CHUNKS,
    ):  # fmt: skip
        draw = np.random.default_rng(seed)
        self.heads, self.kv, self.width = heads, kv, width
        self.blocks = sum(-(-n // BLOCK) for n in lengths) + 3
        free = list(draw.permutation(self.blocks))
        # the last row is no sequence
        tables = np.zeros((len(lengths) + 1, -(-max(lengths) // BLOCK) + 2), np.int32)
        for row, n in enumerate(lengths):
            own = [free.pop() for _ in range(-(-n // BLOCK))]
            tables[row, : len(own)] = own
        positions = [n - 1 if c == 0 else EMPTY for n, c in zip(lengths, chunks, strict=True)] + [EMPTY]
        runs = []
        for row, (n, c) in enumerate(zip(lengths, chunks, strict=True)):
            for start in range(n - c, n, QUERY_BLOCK):
                read = list(range(start, min(start + QUERY_BLOCK, n))) if c else []
                positions += read + [EMPTY] * (QUERY_BLOCK - len(read)) if read else []
                runs += [row] if read else []
        arrays = positions, tables, runs, [*lengths, 0]
        self.tokens = StepTokens(*(jnp.asarray(z, jnp.int32) for z in arrays))
        self.keys, self.values = (draw.normal(size=(len(lengths), max(lengths), kv, width)) for _ in "kv")
        self.q = draw.normal(size=(len(positions), heads, width))
        self.layer = 1
        pages = np.full((LAYERS * self.blocks, BLOCK, 2 * kv, width), np.nan)
        for row, n in enumerate(lengths):
            for p in range(n):
                slot = pages[self.layer * self.blocks + tables[row, p // BLOCK], p % BLOCK]
                slot[0::2], slot[1::2] = self.keys[row, p], self.values[row, p]
        self.pages = pages  # what a sequence does not own must not matter

    def expected(self, window: int | None) -> np.ndarray:
        rows, positions = np.asarray(self.tokens.rows()), np.asarray(self.tokens.positions)
        out = np.zeros((len(positions), self.heads * self.width))
        for m, (row, p) in enumerate(zip(rows, positions, strict=True)):
            if p == EMPTY:
                continue
            first = 0 if window is None else max(0, p - window + 1)
            for h in range(self.heads):
                k, v = (z[row, first : p + 1, h // (self.heads // self.kv)] for z in (self.keys, self.values))
                scores = k @ self.q[m, h] / np.sqrt(self.width)
                weights = np.exp(scores - scores.max())
                out[m, h * self.width : (h + 1) * self.width] = weights @ v / weights.sum()
        return out


@pytest.mark.parametrize("slots", [filled_cpu.SLOTS, 12, 4])
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("implementation", ["reference", "cpu"])
def test_every_token_sees_its_own_sequence(implementation: str, window: int | None, slots: int, monkeypatch):
    monkeypatch.setattr(filled_cpu, "SLOTS", slots)  # so that sequences are read in one, four and ten parts
    case = Case(0)
    found = paged_attention(
        jnp.asarray(case.q, jnp.float32), jnp.asarray(case.pages, jnp.float32), case.tokens,
        case.layer * case.blocks, window=window, implementation=implementation,
    )  # fmt: skip
    np.testing.assert_allclose(found, case.expected(window), atol=2e-6)


def test_a_cpu_reads_no_more_of_a_table_than_is_filled():
    """Behind what the longest sequence needs stand blocks of NaN, which nothing times zero would hide."""
    case = Case(0)
    pages = jnp.pad(jnp.asarray(case.pages, jnp.float32), ((0, 1), (0, 0), (0, 0), (0, 0)), constant_values=jnp.nan)
    behind = np.full((len(case.tokens.tables), 2 * filled_cpu.SLOTS), len(pages) - 1 - case.layer * case.blocks)
    near = np.pad(
        np.asarray(case.tokens.tables), ((0, 0), (0, filled_cpu.SLOTS // BLOCK - case.tokens.tables.shape[1]))
    )
    tokens = dataclasses.replace(case.tokens, tables=jnp.asarray(np.concatenate([near, behind], axis=1), jnp.int32))
    found = paged_attention(
        jnp.asarray(case.q, jnp.float32), pages, tokens, case.layer * case.blocks, implementation="cpu"
    )
    np.testing.assert_allclose(found, case.expected(None), atol=2e-6)


def test_what_is_written_is_what_attention_reads():
    case = Case(1)
    rows, positions = np.asarray(case.tokens.rows()), np.asarray(case.tokens.positions)
    k, v = (z[np.minimum(rows, 3), np.maximum(positions, 0)] for z in (case.keys, case.values))
    empty = case.pages.copy()
    slots = np.asarray(case.tokens.slots(BLOCK))
    assert ((slots == EMPTY) == (positions == EMPTY)).all()
    flat = empty.reshape(-1, 2 * case.kv, case.width)
    flat[case.layer * case.blocks * BLOCK + slots[slots >= 0]] = -3.0
    written = write_pages(
        *(jnp.asarray(z, jnp.float32) for z in (empty, k, v)), jnp.asarray(slots), case.layer * case.blocks
    )
    np.testing.assert_array_equal(written, case.pages.astype(np.float32))


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_kernels_by_triton_s_interpreter():
    result = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "paged_attention_on_cpu.py")],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "TRITON_INTERPRET": "1"},
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]
    assert result.stdout == "10 cases\n"


@pytest.mark.parametrize("window", [None, 5])
def test_sequences_are_what_the_tpu_s_kernel_reads(window: int | None):
    """JAX's own specification of its kernel, given a step as the kernel is, tells what plain attention does: rows that
    decode, rows that do nothing, prompts whose last run has padding, and runs of nobody behind them."""
    case = Case(0)
    tokens = dataclasses.replace(
        case.tokens, positions=jnp.pad(case.tokens.positions, (0, QUERY_BLOCK), constant_values=EMPTY),
        runs=jnp.pad(case.tokens.runs, (0, 1)),
    )  # fmt: skip
    lengths, tables, starts, number = ragged_tpu.sequences(tokens, QUERY_BLOCK)
    read = int(starts[number[0]])
    assert read == len(case.q)
    q, pages = jnp.asarray(case.q, jnp.float32), jnp.asarray(np.nan_to_num(case.pages, nan=7.0), jnp.float32)
    first = case.layer * case.blocks
    found = kernel.ref_ragged_paged_attention(
        q, pages, lengths, tables + first, starts, number, sm_scale=case.width**-0.5, sliding_window=window
    )
    real = np.asarray(case.tokens.positions) != EMPTY
    np.testing.assert_allclose(
        np.asarray(found).reshape(read, -1)[real], case.expected(window)[real], atol=2e-6, rtol=1e-5
    )


def test_a_cpu_reads_what_is_filled_unless_a_mesh_splits_the_model():
    alone, float32 = ExecutionConfig.of("cpu", "float32"), jnp.dtype("float32")
    assert alone.reads_filled(None)
    assert choose("cpu", alone.kernels, 9, 3, 64, float32, 4096) == "cpu"
    assert choose("cpu", False, 9, 3, 64, float32, None) == "reference"
    assert not alone.reads_filled(make_mesh(1))
    assert not ExecutionConfig.of("gpu", "bfloat16", triton=False).reads_filled(None)


def test_heads_that_the_tpu_s_kernel_serves():
    def how(heads: int, kv: int, width: int, dtype: str = "bfloat16", kernels: bool = True) -> str:
        return choose("tpu", kernels, heads, kv, width, jnp.dtype(dtype), None)

    assert how(32, 8, 128) == how(8, 2, 128) == how(32, 32, 128, "float32") == "tpu"
    assert {how(32, 8, 64), how(9, 3, 128), how(32, 8, 128, kernels=False)} == {"reference"}
    assert "multiple of 128" in str(ragged_tpu.refusal(32, 8, 64, jnp.dtype("bfloat16")))


def test_triton_says_what_it_does_not_serve():
    case = Case(0)
    given = jnp.asarray(case.q, jnp.float32), jnp.asarray(case.pages, jnp.float32), case.tokens
    with pytest.raises(NotImplementedError, match="sliding window, found one of 5"):
        paged_attention(*given, window=5, implementation="triton")
    with pytest.raises(NotImplementedError, match="power of two from 16 to 256, found 8"):
        paged_attention(*given, implementation="triton")


@pytest.mark.parametrize("rows", [1, 8, 32, 64, 256])
@pytest.mark.parametrize("slots", [32, 2048, 131072])
def test_parts_reach_to_the_end_of_every_row(rows: int, slots: int):
    cut = triton_gpu.decode_parts(rows, 8, slots, 64)
    for length in {1, 63, 64, 65, 1000, slots // 2, slots}:
        size = max(cut["LEAST"], -(-length // (cut["PARTS"] * 64)) * 64)  # as `part_of` has it
        assert length > slots or cut["PARTS"] * size >= length
        assert size % 64 == 0


@pytest.mark.parametrize(("heads", "kv"), [(32, 8), (32, 32), (9, 3), (64, 4), (1, 1)])
@pytest.mark.parametrize("runs", [1, 32, 1024])
def test_tiles_of_runs_are_powers_of_two(heads: int, kv: int, runs: int):
    for most in (16, 64, 128):
        together, share = triton_gpu.run_tiles(runs, QUERY_BLOCK, heads, kv, most)
        queries = together * share * QUERY_BLOCK
        assert queries & (queries - 1) == 0
        assert QUERY_BLOCK <= queries <= most
