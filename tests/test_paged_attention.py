"""Attention over blocks against plain attention of each sequence by itself, in float64 NumPy."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.paged_attention import EMPTY, QUERY_BLOCK, StepTokens, paged_attention, write_pages

BLOCK, LAYERS, HEADS, KV, WIDTH = 4, 2, 6, 2, 8


class Case:
    """Sequences whose blocks lie in no order: some decode one token, one reads a chunk, one does nothing."""

    def __init__(self, seed: int):
        draw = np.random.default_rng(seed)
        lengths = [13, 1, 37, 22]  # tokens in the cache after the step
        chunks = [0, 0, 21, 16]  # of which so many are read by it; 0: one is decoded; the third row's go to two runs
        self.blocks = sum(-(-n // BLOCK) for n in lengths) + 3
        free = list(draw.permutation(self.blocks))
        tables = np.zeros((5, 12), np.int32)  # the last row is no sequence
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
        self.keys, self.values = (draw.normal(size=(4, max(lengths), KV, WIDTH)) for _ in "kv")
        self.q = draw.normal(size=(len(positions), HEADS, WIDTH))
        self.layer = 1
        pages = np.full((LAYERS * self.blocks, BLOCK, 2 * KV, WIDTH), np.nan)
        for row, n in enumerate(lengths):
            for p in range(n):
                slot = pages[self.layer * self.blocks + tables[row, p // BLOCK], p % BLOCK]
                slot[0::2], slot[1::2] = self.keys[row, p], self.values[row, p]
        self.pages = np.nan_to_num(pages, nan=7.0)  # what a sequence does not own must not matter

    def expected(self, window: int | None) -> np.ndarray:
        rows, positions = np.asarray(self.tokens.rows()), np.asarray(self.tokens.positions)
        out = np.zeros((len(positions), HEADS * WIDTH))
        for m, (row, p) in enumerate(zip(rows, positions, strict=True)):
            if p == EMPTY:
                continue
            first = 0 if window is None else max(0, p - window + 1)
            for h in range(HEADS):
                k, v = (z[row, first : p + 1, h // (HEADS // KV)] for z in (self.keys, self.values))
                scores = k @ self.q[m, h] / np.sqrt(WIDTH)
                weights = np.exp(scores - scores.max())
                out[m, h * WIDTH : (h + 1) * WIDTH] = weights @ v / weights.sum()
        return out


@pytest.mark.parametrize("window", [None, 5])
def test_every_token_sees_its_own_sequence(window: int | None):
    case = Case(0)
    found = paged_attention(
        jnp.asarray(case.q, jnp.float32), jnp.asarray(case.pages, jnp.float32), case.tokens,
        case.layer * case.blocks, window=window,
    )  # fmt: skip
    np.testing.assert_allclose(found, case.expected(window), atol=2e-6)


def test_what_is_written_is_what_attention_reads():
    case = Case(1)
    rows, positions = np.asarray(case.tokens.rows()), np.asarray(case.tokens.positions)
    k, v = (z[np.minimum(rows, 3), np.maximum(positions, 0)] for z in (case.keys, case.values))
    empty = case.pages.copy()
    slots = np.asarray(case.tokens.slots(BLOCK))
    assert ((slots == EMPTY) == (positions == EMPTY)).all()
    flat = empty.reshape(-1, 2 * KV, WIDTH)
    flat[case.layer * case.blocks * BLOCK + slots[slots >= 0]] = -3.0
    written = write_pages(
        *(jnp.asarray(z, jnp.float32) for z in (empty, k, v)), jnp.asarray(slots), case.layer * case.blocks
    )
    np.testing.assert_array_equal(written, case.pages.astype(np.float32))
