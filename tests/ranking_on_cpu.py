"""`rank_kernel` against float64 NumPy, by Triton's interpreter; `decode_step_on_cpu.py` runs these cases."""

from __future__ import annotations

import types
from typing import Any

import jax.numpy as jnp
import numpy as np

from pallas_kernels.decode_step import choosing
from pallas_kernels.decode_step.choosing import BLOCK, Shrinks
from pallas_kernels.decode_step.operands import Group
from pallas_kernels.topk_gating import TopK

RULES = ("arrow", "spectr", "lag")
SHAPES = ((1, 28, 8, 3), (3, 5, 3, 2), (2, 40, 1, 1), (5, 2, 16, 3))  # rows, adapters, rank, projections
WIDTH = 24  # of the input, and columns of the base


def one_ranking(seed: int) -> None:
    """A random product, of which some adapters have no part and some rows may not choose all."""
    rng = np.random.default_rng(seed)
    rule, (rows, adapters, rank, p) = RULES[seed % 3], SHAPES[seed % 4]
    splits, normed, limited = 1 + seed // 2 % 2, seed % 2 == 0, seed // 3 % 2 == 0
    layers, layer, top_k = 2, seed // 4 % 2, min(adapters, 1 + seed % 4)
    packed, gates = 32 + adapters * rank + 7, 5  # shrinks begin behind the gates' 32 rows
    product = rng.standard_normal((splits * rows + 1, WIDTH + p * packed)).astype(np.float32)
    squares = rng.uniform(1, 9, (rows, 3)).astype(np.float32) if normed else None
    scale = rng.uniform(0.5, 2, (layers, p, adapters)) * (rng.random((layers, p, adapters)) < 0.8)
    arrow = rng.standard_normal((layers, p, adapters, rank)).astype(np.float32)
    spectr = rng.standard_normal((layers, p, adapters, rank, rank)).astype(np.float32)
    allowed = rng.random((rows, adapters)) < 0.6 if limited else None
    if allowed is not None:
        allowed[-1] = rows == 1  # a row that may choose nobody
    counts = rng.integers(0, top_k + 1, rows).astype(np.int32)
    counts[0] = top_k
    temperatures = rng.uniform(0.5, 4, rows).astype(np.float32)
    candidates = rng.integers(1, adapters + 1, rows).astype(np.int32) if rule == "lag" else None
    b: Any = jnp.zeros((layers, adapters, rank, WIDTH))
    group = Group(
        jnp.zeros((layers, 1, 1)), None, b, jnp.asarray(scale, jnp.float32), (WIDTH // p,) * p,
        1e-5 if normed else None, packed, gates, 0,
    )  # fmt: skip
    before = choosing.quantized_gpu, choosing.BLOCK
    choosing.quantized_gpu = types.SimpleNamespace(summands=lambda w, rows: splits)
    choosing.BLOCK = (BLOCK, 64)[seed % 2]  # a matrix at once, or in blocks of its rows
    try:
        lying = Shrinks(
            layer, rows, WIDTH, jnp.asarray(product), None if squares is None else jnp.asarray(squares), group
        )
        found = lying.rank(
            TopK(jnp.asarray(counts), jnp.asarray(temperatures), top_k),
            None if rule == "spectr" else jnp.asarray(arrow), None if rule == "arrow" else jnp.asarray(spectr),
            None if allowed is None else jnp.asarray(allowed), None if candidates is None else jnp.asarray(candidates),
        )  # fmt: skip
    finally:
        choosing.quantized_gpu, choosing.BLOCK = before

    behind = product[: splits * rows, group.columns :].astype(np.float64).reshape(splits, rows, p, packed).sum(0)
    if squares is not None:
        behind /= np.sqrt(squares.astype(np.float64).sum(1) / WIDTH + 1e-5)[:, None, None]
    h = behind[:, :, 32 : 32 + adapters * rank].reshape(rows, p, adapters, rank)
    by_arrow = np.abs(np.einsum("mpar,par->mpa", h, arrow[layer].astype(np.float64)))
    by_spectr = np.linalg.norm(np.einsum("mpar,pasr->mpas", h, spectr[layer].astype(np.float64)), axis=-1)
    for m in range(rows):
        for q in range(p):
            may = scale[layer, q] != 0
            may &= True if allowed is None else allowed[m]
            if candidates is not None:
                ranked = np.argsort(-np.where(may, by_arrow[m, q], -np.inf), kind="stable")[: candidates[m]]
                may &= np.isin(np.arange(adapters), ranked)
            scores = (by_arrow if rule == "arrow" else by_spectr)[m, q]
            order = [a for a in np.argsort(-scores, kind="stable") if may[a]][: counts[m]]
            weights = np.exp((scores[order] - scores[order[:1]]) / temperatures[m])
            indices, shares = (np.asarray(z)[m, q] for z in found)
            nobody = [-1] * (top_k - len(order))
            where = f"seed {seed}, {rule}, row {m}, projection {q}"
            np.testing.assert_array_equal(indices, [*order, *nobody], where)
            shares_wanted = [*(weights / weights.sum() if order else ()), *[0.0] * len(nobody)]
            np.testing.assert_allclose(shares, shares_wanted, atol=1e-4, err_msg=where)
