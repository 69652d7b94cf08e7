"""NVIDIA GPUs: Triton kernels of few tokens routed by gates, and of gate and up of many (the extra `gpu`).

Tiles are chosen here from the shape alone; nothing is tuned at run time.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels import launch as triton_launch
from pallas_kernels.routed_lora import packing, reference, xla
from pallas_kernels.routed_lora.api import LoraBank
from pallas_kernels.topk_gating import TopK


def power(n: int) -> int:
    """The next power of two: Triton's blocks have no other sizes."""
    return 1 << max(n - 1, 0).bit_length()


def column_blocks(splits: tuple[int, ...], width: int) -> int:
    """How many blocks of `width` columns the projections have; none crosses from one to the next."""
    return sum(-(-split // width) for split in splits)


MAX_TOKENS = 64  # up to which one launch may follow the product; a prompt's took 17 ms of 62 on an H200
launch: Any = functools.partial(triton_launch.launch, "pallas_kernels.routed_lora.triton_kernels")


def expand_tiles(rows: int, dtype: Any) -> dict[str, int]:
    """Tiles of a masked expand over `rows` tokens: rows, columns and depth of a block."""
    if dtype == jnp.float32:  # no tensor cores: what does not fit in registers is spilt
        return dict(BM=min(32, max(16, power(rows))), BN=64, BK=32)
    return dict(BM=min(128, max(16, power(rows))), BN=128, BK=64)


def topk_gated_lora(
    product: Float[Array, "M N"],
    bank: LoraBank,
    rule: TopK,
    base: Float[Array, "M O"],
    gates: int,
) -> tuple[Float[Array, "M O"], Int32[Array, "M P C"], Float[Array, "M P C"]]:
    """`topk_gating` and `routed_lora` in one launch: (base + update, indices, weights).

    product: float32, x times the gates and A's of a packed weight, N / P columns a projection: the logits of its
    `gates` columns (the bank's adapters', and behind them any null choice's), and its shrinks; see `packing`.
    """
    rows, columns = product.shape
    adapters, rank, total = bank.b.shape
    projections = len(bank.splits)
    tiles = expand_tiles(rows, bank.b.dtype)
    routing = (rows, projections, rule.k)
    return launch(
        "gated_expand_kernel", product, bank.b, bank.scale, rule.counts, rule.temperatures, base,
        out=(
            jax.ShapeDtypeStruct(base.shape, base.dtype),
            jax.ShapeDtypeStruct(routing, jnp.int32),
            jax.ShapeDtypeStruct(routing, jnp.float32),
        ),
        grid=(column_blocks(bank.splits, tiles["BN"]), math.ceil(rows / tiles["BM"])),
        warps=4 if tiles["BM"] <= 64 else 8,
        M=rows, O=total, A=adapters, G=gates, GP=power(gates), K=adapters * rank, R=rank, C=rule.k, CP=power(rule.k),
        W=columns // projections, FIRST=packing.first_a_row(gates), SPLITS=bank.splits, **tiles,
    )  # fmt: skip


def silu_tiles(dtype: Any) -> dict[str, int]:
    """Tiles of `silu_lora`: BM tokens, BN columns of gate and as many of up, BK rows of B at a time, warps, stages.

    On Hopper two programs of 16-bit operands run on a multiprocessor (100 registers a thread, 48 KiB), so that one
    multiplies while the other waits for memory; float32 has no tensor cores.
    """
    if dtype == jnp.float32:
        return dict(BM=32, BN=32, BK=32, warps=4, STAGES=1)
    return dict(BM=128, BN=64, BK=32, warps=8, STAGES=3)


def silu_lora(
    bank: LoraBank,
    indices: Int32[Array, "M P1 C"],
    weights: Float[Array, "M P2 C"],
    shrink: Float[Array, "M 2 A R"],
    base: Float[Array, "M O"],
    **tiles: int,
) -> Float[Array, "M F"]:
    """silu(gate) * up of gate and up as `routed_lora` adapts them, in one launch: summed in float32, rounded once.

    Args:
        bank: of gate and up, of one width F. indices, weights: of `Choices`, each token's own; P1 and P2 are 2 or 1.
        shrink: x through every A, float32. base: the base's columns of gate and, behind them, of up.
        tiles: in the place of `silu_tiles`.

    Raises:
        NotImplementedError: projections of several widths, or the extra `gpu` is not installed.
    """
    adapters, rank, total = bank.b.shape
    rows, half = base.shape[0], total // 2
    if bank.splits != (half, half):
        raise NotImplementedError(f"silu_lora: expected two projections of one width, found {bank.splits}")
    how = silu_tiles(bank.b.dtype) | tiles
    warps, bm, bk = how.pop("warps"), how["BM"], how["BK"]
    combine = reference.dense_weights(indices, weights, adapters) * bank.scale[None]
    h = (shrink * combine[..., None]).astype(bank.b.dtype).reshape(rows, 2, -1)
    width = adapters * rank
    h = jnp.pad(h, ((0, 0), (0, 0), (0, -width % bk)))
    (hidden,) = launch(
        "silu_expand_kernel", base, h, xla.used_blocks(combine, rank, bm, bk), bank.b,
        out=(jax.ShapeDtypeStruct((rows, half), base.dtype),), grid=(math.ceil(half / how["BN"]), math.ceil(rows / bm)),
        warps=warps, M=rows, F=half, K=width, KP=h.shape[2], **how,
    )  # fmt: skip
    return hidden
