"""NVIDIA GPUs: few rows through a stack of matrices in 8 or 4 bits, in words, by Triton (the extra `gpu`)."""

from __future__ import annotations

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from pallas_kernels.launch import launch
from pallas_kernels.quantized_matmul.weight import QuantizedWeight, word_block

MODULE = "pallas_kernels.quantized_matmul.triton_kernels"
PROGRAMS = 128  # of an H200's 132 multiprocessors
shape = jax.ShapeDtypeStruct


def tiles(rows: int, width: int, total: int, group: int) -> dict[str, int]:
    """Tiles of a product: BM rows, BN columns, J words a step, SPLITS shares of the inputs, STAGES of loads, warps.

    A program reads its rows of x anew: from L2, which gives little more than memory, so that many rows want many
    columns (also of what is behind, see `behind_block`), and the inputs are shared out where few programs are left.
    group: of `QuantizedWeight`.

    Raises:
        NotImplementedError: no tile divides the matrix.
    """
    bm, block = min(128, max(8, 1 << (rows - 1).bit_length())), word_block(width, group)
    wide = total >= 128 * PROGRAMS
    widest = 64 if rows <= (64 if group else 16) or not wide else 128
    widest *= 2 if rows > 64 else 1
    bn = next((n for n in (256, 128, 64, 32, 16) if n <= widest and total % n == 0), 0)
    if not bn or not block:
        found = f"{width} x {total}" + f" in groups of {group}" * bool(group)
        wanted = "inputs in blocks of 128 (8 bit: 64), columns of 16"
        raise NotImplementedError(f"quantised products: expected {wanted}, found {found}")
    splits = 1
    while total // bn * splits < 3 * PROGRAMS // 2 and splits < 8 and width % (2 * splits * block) == 0:
        splits *= 2
    words = min(block // (8 if group else 4), 64 if rows <= 16 else 32)
    stages = 2 if group and rows > 16 else 3 if rows <= 16 or rows > 64 else 4
    return dict(BM=bm, BN=bn, J=words, SPLITS=splits, STAGES=stages, warps=8 if bn > 64 else 4)


def behind_block(rows: int) -> int:
    """Of how many rows a program multiplies what is behind a matrix, whose rows are a multiple (`packing.ROWS`)."""
    return max(16, min(64, 1 << (rows.bit_length() - 1)))


def summands(weight: QuantizedWeight | jax.Array, rows: int) -> int:
    """Of how many a product of so many rows is the sum; 1 of a plain matrix."""
    return tiles(rows, *weight.shape, weight.group)["SPLITS"] if isinstance(weight, QuantizedWeight) else 1


def serves(weight: QuantizedWeight) -> bool:
    """Whether there are tiles for a matrix, however many the rows."""
    if not weight.words:
        return False
    try:
        for rows in (1, 64):
            tiles(rows, *weight.shape, weight.group)
    except NotImplementedError:
        return False
    return True


def product(
    layer: int | jax.Array,
    x: jax.Array,
    weight: QuantizedWeight,
    behind: jax.Array | None = None,
    rows: int | None = None,
    tile: Mapping[str, int] | None = None,
) -> jax.Array:
    """x [at least M, I] through a layer's matrix and the rows behind it [L, N, I].

    Args:
        weight: stacked over layers, in words. rows: M, all of x's unless given. tile: of `tiles` unless given.

    Returns:
        Summands, float32 [SPLITS, M, O + N].

    Raises:
        NotImplementedError: no tile divides the matrix, it is not in words, or the extra `gpu` is not installed.
    """
    if not weight.words:
        raise NotImplementedError("quantised products by Triton: expected values in words")
    (width, total), count = weight.shape, x.shape[0] if rows is None else rows
    size = dict(tiles(count, width, total, weight.group) if tile is None else tile)
    warps, splits = size.pop("warps"), size["SPLITS"]
    number = jnp.full((1,), layer, jnp.int32)
    n = 0 if behind is None else behind.shape[1]
    block = behind_block(count)
    assert n % block == 0, f"quantised products: {n} rows behind, in blocks of {block}"
    given = (weight.scale, number if weight.zero is None else weight.zero, number if behind is None else behind)
    (y,) = launch(
        MODULE, "product_kernel", number, x, weight.values, *given,
        out=(shape((splits, count, total + n), jnp.float32),),
        grid=(n // block + total // size["BN"], math.ceil(count / size["BM"]), splits), warps=warps, aliases={},
        M=count, I=width, O=total, N=n, S=weight.group, B=word_block(width, weight.group), BEHIND=block,
        ASM=x.dtype == jnp.bfloat16, **size,
    )  # fmt: skip
    return y
