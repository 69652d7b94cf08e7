"""NVIDIA GPUs: Triton kernels of few tokens routed by gates, and of many, chosen by XLA (the extra `gpu`).

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
from pallas_kernels.routed_lora import packing, xla
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


MOST_CHOICES = 4  # whose shrinks a program of a prompt's epilogue has registers for, at 32 ranks each
MOST_RANKS = 320  # of all adapters: 80 KiB of shared memory, which GPUs have since Ampere
LONGEST_RUN = 16  # tiles of a program, so that reading B is little of its time
PROGRAMS = 8 * 132  # of a launch at least, before programs have several tiles


def many_refusal(bank: LoraBank, choices: int) -> str | None:
    """Why `silu_lora` and `add_lora` do not serve a bank and so many choices of a token; None where they do."""
    adapters, rank, _ = bank.b.shape
    if jnp.dtype(bank.b.dtype).itemsize != 2:
        return f"expected 16 bits, found {bank.b.dtype}"
    if choices * many_tiles(rank, 64)["BK"] > 32 * MOST_CHOICES or adapters * padded_rank(rank) > MOST_RANKS:
        return f"expected few choices, adapters and ranks, found {choices} of {adapters} of rank {rank}"
    return None


def padded_rank(rank: int) -> int:
    """Of an adapter's rows in a block of B: pairs of shrinks stay together."""
    return max(2, power(rank))


def many_tiles(rank: int, columns: int) -> dict[str, int]:
    """Tiles of a launch for many tokens: BM of them, BN columns, BK rows of B at a time, warps, stages.

    On Hopper, 28 adapters of rank 8, two of a token, 128 columns or 64 of gate and of up: at most 168 registers a
    thread, and 64 KiB, so that three programs run on a multiprocessor, and one multiplies while others wait for memory.
    """
    return dict(BM=64, BN=columns, BK=max(32, padded_rank(rank)), STAGES=1, warps=4)


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
        tiles: in the place of those of `many_tiles`; RUN: tiles of a program.

    Raises:
        NotImplementedError: what `many_refusal` says, projections of two widths, or no extra `gpu`.
    """
    half = bank.b.shape[2] // 2
    if bank.splits != (half, half):
        raise NotImplementedError(f"silu_lora: expected two projections of one width, found {bank.splits}")
    how = many_tiles(bank.b.shape[1], 64) | tiles
    given, blocks = (bank, indices, weights, shrink), math.ceil(half / how["BN"])
    return _launch_many("silu_expand_kernel", base, given, (), (len(base), half), blocks, how, F=half)


def add_lora(
    bank: LoraBank,
    indices: Int32[Array, "M P1 C"],
    weights: Float[Array, "M P2 C"],
    shrink: Float[Array, "M P A R"],
    base: Float[Array, "M O"],
    residual: Float[Array, "M O"] | None = None,
    **tiles: int,
) -> Float[Array, "M O"]:
    """base + update + residual in one launch; otherwise as `silu_lora`, of any projections."""
    how = many_tiles(bank.b.shape[1], 128) | tiles
    given, blocks = (bank, indices, weights, shrink), column_blocks(bank.splits, how["BN"])
    rest = (base if residual is None else residual,)
    own: dict[str, Any] = dict(O=base.shape[1], SPLITS=bank.splits, RESIDUAL=residual is not None)
    return _launch_many("add_expand_kernel", base, given, rest, base.shape, blocks, how, **own)


def _launch_many(
    kernel: str, base: jax.Array, given: Any, rest: tuple[jax.Array, ...], shape: tuple[int, ...], blocks: int,
    how: dict[str, int], **constants: Any,
) -> jax.Array:  # fmt: skip
    """A launch for many tokens of so many blocks of columns. given: bank, indices, weights, shrink. rest: what the
    kernel reads behind B. shape: of the result."""
    bank, indices, weights, shrink = given
    if problem := many_refusal(bank, indices.shape[2]):
        raise NotImplementedError(f"{kernel}: {problem}")
    adapters, rank, _ = bank.b.shape
    rows, projections, choices, padded = len(base), len(bank.splits), indices.shape[2], padded_rank(rank)
    count = math.ceil(rows / how["BM"])
    how = {"RUN": max(1, min(LONGEST_RUN, count * blocks // PROGRAMS))} | how
    h, chosen = xla.chosen_shrinks(shrink, indices, weights, bank.scale)
    h = jnp.pad(h.astype(bank.b.dtype), ((0, 0), (0, 0), (0, 0), (0, padded - rank)))
    pairs = jax.lax.bitcast_convert_type(h.reshape(rows, projections, choices, padded // 2, 2), jnp.int32)
    used = xla.used_blocks(chosen, how["BM"], how["BK"] // padded)
    (out,) = launch(
        kernel, base, pairs, chosen, used, bank.b, *rest, out=(jax.ShapeDtypeStruct(shape, base.dtype),),
        grid=(blocks, math.ceil(count / how["RUN"])), warps=how.pop("warps"), M=rows, A=adapters, R=rank, RP=padded,
        C=choices, **constants, **how,
    )  # fmt: skip
    return out
