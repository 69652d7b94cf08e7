"""NVIDIA GPUs: attention over blocks by Triton (the extra `gpu`). Tiles follow from the shapes alone."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.launch import launch
from pallas_kernels.routed_lora.triton_gpu import power

if TYPE_CHECKING:
    from pallas_kernels.paged_attention.api import StepTokens

MODULE = "pallas_kernels.paged_attention.triton_kernels"
PROGRAMS = 128  # of an H200's 132 multiprocessors
MOST_PARTS = 32  # of a sequence
LONG_PART = 2048  # slots of a part where there are programs enough without parts: long sequences alone are cut
shape = jax.ShapeDtypeStruct


def paged_attention(
    q: Float[Array, "M N H"],
    pages: Float[Array, "X Bs K2 H"],
    tokens: StepTokens,
    first_block: jax.Array | int,
    window: int | None,
    least_rows: int = 0,
) -> Float[Array, "M2 NH"]:
    """As `api.paged_attention` says; least_rows: what is returned has at least so many, those behind M undefined."""
    rows, heads, width = q.shape
    if window is not None:
        raise NotImplementedError(f"paged_attention by Triton: expected no sliding window, found one of {window}")
    if not 16 <= width <= 256 or width != power(width):
        raise NotImplementedError(
            f"paged_attention by Triton: expected heads of a power of two from 16 to 256, found {width}"
        )
    decoded, kv, slots = tokens.decoding, pages.shape[2] // 2, pages.shape[1] * tokens.tables.shape[1]
    ratio, wide = heads // kv, q.dtype.itemsize * width  # bytes of a head
    first = jnp.asarray(first_block, jnp.int32).reshape(1)
    result = shape((max(rows, least_rows), heads * width), q.dtype)
    fixed: dict[str, Any] = dict(
        R=decoded, N=heads, K=kv, H=width, G=ratio, W=tokens.tables.shape[1], BLOCK=pages.shape[1]
    )
    fixed |= dict(
        FACTOR=width**-0.5 * math.log2(math.e), BS=tile_slots(wide, q.dtype.itemsize), STAGES=3 if wide <= 256 else 2
    )
    read = first, q.reshape(rows, -1), pages, tokens.positions, tokens.tables
    y: jax.Array | None = None
    if len(tokens.runs):
        run = (rows - decoded) // len(tokens.runs)
        most = 16 if q.dtype.itemsize == 4 else 128 if wide <= 256 else 64
        together, share = run_tiles(len(tokens.runs), run, heads, kv, most)
        programs = math.ceil(len(tokens.runs) / together), kv * math.ceil(ratio / share)
        (y,) = launch(
            MODULE, "runs_kernel", *read, tokens.runs, out=(result,), grid=programs,
            warps=8 if together * run * share > 64 else 4, COUNT=len(tokens.runs), GB=share, RUN=run, RUNS=together,
            **fixed,
        )  # fmt: skip
    if decoded:
        cut = decode_parts(decoded, kv, slots, fixed["BS"])
        # the rows of the runs are in y already; without any, an array in the place of one that is not read
        before, in_place = (first, False) if y is None else (y, True)
        direct = cut["PARTS"] == 1
        (y,) = launch(
            MODULE, "decode_kernel", *read, before if direct else first,
            out=(result if direct else shape((cut["PARTS"], decoded, heads, width + 2), jnp.float32),),
            aliases={len(read): 0} if direct and in_place else {}, grid=(decoded, kv, cut["PARTS"]),
            GP=max(16, power(ratio)), **fixed, **cut,
        )  # fmt: skip
        if not direct:
            (y,) = launch(
                MODULE, "combine_kernel", y, tokens.positions, before, out=(result,),
                aliases={2: 0} if in_place else {}, grid=(decoded, heads), R=decoded, N=heads, H=width, BS=fixed["BS"],
                **cut,
            )  # fmt: skip
    assert y is not None, "a step has tokens"
    return y


def decode_parts(rows: int, kv: int, slots: int, block: int) -> dict[str, int]:
    """PARTS into which a row's slots are cut at most, so that programs fill the chip; LEAST slots of each."""
    parts = min(MOST_PARTS, math.ceil(4 * PROGRAMS / (rows * kv)))
    least = block
    if parts <= 2 and slots > LONG_PART:  # rows of different length would wait for the longest
        parts, least = min(MOST_PARTS, math.ceil(slots / LONG_PART)), LONG_PART
    return dict(PARTS=max(1, min(parts, math.ceil(slots / least))), LEAST=least)


def tile_slots(wide: int, itemsize: int) -> int:
    """Slots of a tile. Float32 has no tensor cores: what does not fit in registers is spilt."""
    return 16 if itemsize == 4 else 64 if wide <= 256 else 32


def run_tiles(runs: int, run: int, heads: int, kv: int, most: int) -> tuple[int, int]:
    """(runs of a program, heads of a program), powers of two: at most so many queries, tokens times heads."""
    share = min(power(heads // kv), max(1, most // run))
    together = 1
    while 2 * together * run * share <= most and runs * kv >= 2 * PROGRAMS * 2 * together:
        together *= 2
    return together, share
