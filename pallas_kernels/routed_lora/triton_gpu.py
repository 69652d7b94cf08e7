"""NVIDIA GPUs: the Triton kernel of few tokens routed by gates, launched through jax-triton (the extra `gpu`).

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
from pallas_kernels.routed_lora import packing
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
