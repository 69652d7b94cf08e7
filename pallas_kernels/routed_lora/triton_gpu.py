"""NVIDIA GPUs: Triton kernels launched through jax-triton (the extra `gpu`).

    triton_fused      one launch; each block of columns computes the shrink of the chosen adapters again.
                      One or two tokens: the bytes are few and a second launch would cost more.
    triton_gathered   two launches, shrink and expand, of the chosen adapters only. Few tokens, or one
                      routing a request; NO_ADAPTER reads nothing.
    triton_dense      XLA's slim product with every A, then one launch: mask, product with every B on tensor
                      cores, sum with the base.

Tiles are chosen here from the shape alone; nothing is tuned at run time.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels import triton_launch
from pallas_kernels.routed_lora.grouped import spread
from pallas_kernels.routed_lora.reference import einsum_float32

PROGRAMS = 264  # two on each of an H100's or H200's 132 multiprocessors


def power(n: int) -> int:
    """The next power of two: Triton's blocks have no other sizes."""
    return 1 << max(n - 1, 0).bit_length()


def column_blocks(splits: tuple[int, ...], width: int) -> int:
    """How many blocks of `width` columns the projections have; none crosses from one to the next."""
    return sum(-(-split // width) for split in splits)


def parts_of(total: int, programs: int, block: int) -> tuple[int, int]:
    """(parts, columns of a part): a sum over `total` cut so that `programs` times parts fill the chip."""
    columns = -(-total // max(1, -(-PROGRAMS // programs)))
    columns = min(-(-max(columns, 512) // block) * block, -(-total // block) * block)
    return -(-total // columns), columns


launch: Any = functools.partial(triton_launch.launch, "pallas_kernels.routed_lora.triton_kernels")


def fused_lora(
    x: Float[Array, "G S I"],
    a: Float[Array, "P A R I"],
    b: Float[Array, "A R O"],
    indices: Int32[Array, "G P C"],
    weights: Float[Array, "G P C"],
    base: Float[Array, "G S O"],
    splits: tuple[int, ...],
) -> Float[Array, "G S O"]:
    """base + update of tokens that each have their own routing (S = 1); see `api.add_routed_lora`."""
    groups, tokens, width = x.shape
    if tokens != 1:
        raise NotImplementedError(f"triton_fused: expected a routing for each token, found {tokens} tokens that share")
    _, adapters, rank, _ = a.shape
    block = min(512, max(32, power(-(-b.shape[2] // (PROGRAMS // 2)))))
    return launch(
        "fused_kernel", x, a, b, indices, weights, base, out=jax.ShapeDtypeStruct(base.shape, base.dtype),
        grid=(column_blocks(splits, block), groups), warps=8,
        I=width, O=b.shape[2], A=adapters, R=rank, C=indices.shape[2], SPLITS=splits,
        RP=power(rank), BK=max(64, 8192 // power(rank)), BN=block,
    )  # fmt: skip


def gathered_lora(
    x: Float[Array, "G S I"],
    a: Float[Array, "P A R I"],
    b: Float[Array, "A R O"],
    indices: Int32[Array, "G P C"],
    weights: Float[Array, "G P C"],
    base: Float[Array, "G S O"],
    splits: tuple[int, ...],
) -> Float[Array, "G S O"]:
    """base + update, reading the adapters that are chosen; see `api.add_routed_lora`."""
    groups, tokens, width = x.shape
    projections, adapters, rank, _ = a.shape
    choices = indices.shape[2]
    routed = groups * projections * choices
    exact = x.dtype == jnp.float32
    rows = 1 if tokens == 1 else min(16 if exact else 64, max(16, power(tokens)))
    row_blocks = -(-tokens // rows)
    padded = power(rank) if rows == 1 else max(16, power(rank))  # a matrix product has sides of at least 16
    deep = max(64, 4096 // padded) if rows == 1 else 64
    parts, part = parts_of(width, routed * row_blocks, deep)
    sizes = dict(G=groups, S=tokens, R=rank, C=choices, RP=padded, BS=rows)
    h = launch(
        "gathered_shrink_kernel", x, a, indices,
        out=jax.ShapeDtypeStruct((parts, groups, projections, choices, tokens, rank), jnp.float32),
        grid=(routed, row_blocks, parts), I=width, A=adapters, P=projections, BK=deep, PART=part, **sizes,
    )  # fmt: skip
    block = 64 if exact else 128
    return launch(
        "gathered_expand_kernel", h, b, indices, weights, base, out=jax.ShapeDtypeStruct(base.shape, base.dtype),
        grid=(column_blocks(splits, block), groups, row_blocks),
        O=b.shape[2], SPLITS=splits, PARTS=parts, BN=block, **sizes,
    )  # fmt: skip


def expand_tiles(rows: int, dtype: Any) -> dict[str, int]:
    """Tiles of a masked expand over `rows` tokens: rows, columns and depth of a block."""
    if dtype == jnp.float32:  # no tensor cores: what does not fit in registers is spilt
        return dict(BM=min(32, max(16, power(rows))), BN=64, BK=32)
    return dict(BM=min(128, max(16, power(rows))), BN=128, BK=64)


def dense_lora(
    x: Float[Array, "G S I"],
    a: Float[Array, "P A R I"],
    b: Float[Array, "A R O"],
    indices: Int32[Array, "G P C"],
    weights: Float[Array, "G P C"],
    base: Float[Array, "G S O"],
    splits: tuple[int, ...],
) -> Float[Array, "G S O"]:
    """base + update through products with every adapter; see `api.add_routed_lora`."""
    projections, adapters, rank, _ = a.shape
    indices, weights = spread(indices, weights, x.shape[1])
    rows, inner = indices.shape[0], adapters * rank
    h = einsum_float32(x.dtype, "gsi,ki->gsk", x, a.reshape(projections * inner, -1))
    tiles = expand_tiles(rows, x.dtype)
    return launch(
        "dense_expand_kernel", h, b, indices, weights, base, out=jax.ShapeDtypeStruct(base.shape, base.dtype),
        grid=(-(-rows // tiles["BM"]), column_blocks(splits, tiles["BN"])), warps=4 if tiles["BM"] <= 64 else 8,
        M=rows, O=b.shape[2], K=inner, R=rank, C=indices.shape[2], CP=power(indices.shape[2]), SPLITS=splits, **tiles,
    )  # fmt: skip


def slim_product(x: Float[Array, "M I"], slim: Float[Array, "N I"]) -> Float[Array, "K M N"]:
    """float32: x slim^T for few rows, as K parts to be added: the slim matrix is read once by the whole chip."""
    rows, width = x.shape
    columns = slim.shape[0]
    tile = min(64, max(16, power(rows)))
    blocks = -(-columns // 32)
    parts, part = parts_of(width, blocks * -(-rows // tile), 128)
    return launch(
        "slim_kernel", x, slim, out=jax.ShapeDtypeStruct((parts, rows, columns), jnp.float32),
        grid=(blocks, parts, -(-rows // tile)), M=rows, I=width, N=columns, BM=tile, BN=32, BK=128, PART=part,
    )  # fmt: skip


def gated_expand(
    h: Float[Array, "K M N"],
    b: Float[Array, "A R O"],
    scale: Float[Array, "P A"],
    counts: Int32[Array, " M"],
    temperatures: Float[Array, " M"],
    base: Float[Array, "M O"],
    splits: tuple[int, ...],
    top_k: int,
    first: int,
) -> tuple[Float[Array, "M O"], Int32[Array, "M P C"], Float[Array, "M P C"]]:
    """(base + update, indices, weights) from the slim product (the sum of h's K parts); see `gated.gated_lora`.

    h: P times N/P columns: the logits of a projection's A adapters, its shrink from column `first` on.
    """
    parts, rows, columns = h.shape
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
        W=columns // projections, FIRST=first, SPLITS=splits, PARTS=parts, **tiles,
    )  # fmt: skip


def masked_shrink(
    h: Float[Array, "M N"],
    rank: int,
    dtype: Any,
    scale: Float[Array, "P A"],
    counts: Int32[Array, " M"],
    temperatures: Float[Array, " M"],
    top_k: int,
    first: int,
) -> tuple[Float[Array, "M P K"], Int32[Array, "M P C"], Float[Array, "M P C"]]:
    """(the shrinks of all adapters times their weights, in `dtype`; indices, weights) of many tokens' slim product."""
    rows, columns = h.shape
    projections, adapters = scale.shape
    shape, routing = jax.ShapeDtypeStruct, (rows, projections, top_k)
    inner = adapters * rank
    return launch(
        "gated_mask_kernel", h, scale, counts, temperatures,
        out=(
            shape((rows, projections, inner), dtype),
            shape(routing, jnp.int32),
            shape(routing, jnp.float32),
        ),
        grid=(-(-rows // 16), projections), M=rows, A=adapters, AP=power(adapters), K=inner, KP=power(inner), R=rank,
        C=top_k, CP=power(top_k), P=projections, W=columns // projections, FIRST=first, BM=16,
    )  # fmt: skip


def add_tiles(
    base: Float[Array, "M O"], h: Float[Array, "M P K"], b: Float[Array, "A R O"], splits: tuple[int, ...]
) -> Float[Array, "M O"]:
    """base + h B, each projection through its own columns: one pass over base, in its place."""
    rows, _, inner = h.shape
    total, size = b.shape[2], base.dtype.itemsize
    deep = max(16, power(inner))
    tokens, columns = (64, 128) if deep * size <= 512 else (32, 64)
    blocks = column_blocks(splits, columns)
    # as many tokens a program as leave two programs to a multiprocessor
    walks = max(1, -(-rows // tokens) * blocks // PROGRAMS)
    walk = tokens * min(walks, -(-rows // tokens))
    return launch(
        "add_tiles_kernel", h, b.reshape(inner, total), base, out=jax.ShapeDtypeStruct(base.shape, base.dtype),
        aliases={2: 0}, grid=(blocks, -(-rows // walk)), M=rows, O=total, K=inner, KP=deep, SPLITS=splits, ROWS=walk,
        BM=tokens, BN=columns, STAGES=3, warps=8,
    )  # fmt: skip


IMPLEMENTATIONS = {"triton_fused": fused_lora, "triton_gathered": gathered_lora, "triton_dense": dense_lora}
