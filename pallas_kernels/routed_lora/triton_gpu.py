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


def power(n: int) -> int:
    """The next power of two: Triton's blocks have no other sizes."""
    return 1 << max(n - 1, 0).bit_length()


def column_blocks(splits: tuple[int, ...], width: int) -> int:
    """How many blocks of `width` columns the projections have; none crosses from one to the next."""
    return sum(-(-split // width) for split in splits)


launch: Any = functools.partial(triton_launch.launch, "pallas_kernels.routed_lora.triton_kernels")


def expand_tiles(rows: int, dtype: Any) -> dict[str, int]:
    """Tiles of a masked expand over `rows` tokens: rows, columns and depth of a block."""
    if dtype == jnp.float32:  # no tensor cores: what does not fit in registers is spilt
        return dict(BM=min(32, max(16, power(rows))), BN=64, BK=32)
    return dict(BM=min(128, max(16, power(rows))), BN=128, BK=64)


def gated_expand(
    h: Float[Array, "M N"],
    b: Float[Array, "A R O"],
    scale: Float[Array, "P A"],
    counts: Int32[Array, " M"],
    temperatures: Float[Array, " M"],
    base: Float[Array, "M O"],
    splits: tuple[int, ...],
    top_k: int,
    first: int,
) -> tuple[Float[Array, "M O"], Int32[Array, "M P C"], Float[Array, "M P C"]]:
    """(base + update, indices, weights) from the product with gates and A's; see `gated.gated_lora`.

    h: P times N/P columns: the logits of a projection's A adapters, its shrink from column `first` on.
    """
    rows, columns = h.shape
    adapters, rank, total = b.shape
    projections = len(splits)
    tiles = expand_tiles(rows, b.dtype)
    routing = (rows, projections, top_k)
    return launch(
        "gated_expand_kernel", h, b, scale, counts, temperatures, base,
        out=(
            jax.ShapeDtypeStruct(base.shape, base.dtype),
            jax.ShapeDtypeStruct(routing, jnp.int32),
            jax.ShapeDtypeStruct(routing, jnp.float32),
        ),
        grid=(column_blocks(splits, tiles["BN"]), math.ceil(rows / tiles["BM"])),
        warps=4 if tiles["BM"] <= 64 else 8,
        M=rows, O=total, A=adapters, AP=power(adapters), K=adapters * rank, R=rank, C=top_k, CP=power(top_k),
        W=columns // projections, FIRST=first, SPLITS=splits, **tiles,
    )  # fmt: skip
