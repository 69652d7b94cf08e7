"""NVIDIA GPUs: the token router's part of a decoding step in one launch (the extra `gpu`)."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.launch import launch
from pallas_kernels.paged_attention import StepTokens
from pallas_kernels.routed_lora.triton_gpu import power

MODULE = "pallas_kernels.token_router.triton_kernels"
WIDTHS = (32, 64, 128, 256)  # of the stream, which a program holds in registers
LONGEST = 4096  # slots of a sequence, whose keys one program reads after each other
WARPS, SLOTS, STAGES = 8, 64, 2  # of a program; slots that it reads at a time, and so many times ahead
shape = jax.ShapeDtypeStruct


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepWeights:
    """A token router's weights as the kernel reads them, in the model's type but for `lookup`; F layers of width E.

    read [D, (1 + 3 F) E]: of the embedding into the stream, and into queries, keys and values of every layer. shift
    [SHIFTS, E, E], qkv [F, E, 3 E], o [F, E, E], gate_up [F, E, 4 E], down [F, 2 E, E], hop [1 + SHIFTS, E, E]: as the
    module has them. task, before, segment: `paired` columns. lookup float32 [2].
    """

    read: Any
    shift: Any
    qkv: Any
    o: Any
    gate_up: Any
    down: Any
    hop: Any
    task: Any
    before: Any
    segment: Any
    lookup: Any


def serves(width: int, tokens: StepTokens, block_size: int) -> bool:
    """Whether the kernel serves a router of that width and a step: one that reads no prompt, of short sequences."""
    return width in WIDTHS and not len(tokens.runs) and tokens.tables.shape[1] * block_size <= LONGEST


def paired(w: Float[Array, "E N"], units: Float[Array, "E N"], kind: Any) -> jax.Array:
    """Columns as they are and of length 1, [2, E, P] with zeros behind the N; P a power of two, at least 16."""
    both = jnp.stack([w, units]).astype(kind)
    return jnp.pad(both, ((0, 0), (0, 0), (0, max(16, power(w.shape[1])) - w.shape[1])))


def token_router(
    read: Float[Array, "M N"],
    cos: Float[Array, "M H2"],
    sin: Float[Array, "M H2"],
    weights: StepWeights,
    columns: int,
    layers: Float[Array, "X Bs K2 H"],
    hops: Float[Array, "X2 Bs 2 E"],
    shifts: Float[Array, "X3 E"],
    tokens: StepTokens,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Logits float32 [M, columns] of a step's tokens, and layers, hops and shifts with them.

    Args:
        read: float32, the embeddings over their root mean square times `StepWeights.read`.
        cos, sin: float32, of the rotary embedding. layers, hops, shifts: of `RouterCache`.
    """
    f, e, _ = weights.o.shape
    _, block_size, _, width = layers.shape
    given = (
        read, cos, sin, tokens.positions, tokens.tables, weights.shift, weights.qkv, weights.o, weights.gate_up,
        weights.down, weights.hop, weights.task, weights.before, weights.segment, weights.lookup,
    )  # fmt: skip
    cache = layers, hops, shifts
    logits, layers, hops, shifts = launch(
        MODULE, "token_router_kernel", *given, *cache,
        out=(shape((len(read), columns), jnp.float32), *(shape(z.shape, z.dtype) for z in cache)),
        grid=(len(read),), warps=WARPS, aliases={len(given) + i: 1 + i for i in range(3)},
        F=f, E=e, H=width, A=columns, AP=weights.task.shape[2], BP=weights.before.shape[2], S=weights.segment.shape[2],
        SHIFTS=len(weights.shift), W=tokens.tables.shape[1], BLOCK=block_size, BLOCKS=len(layers) // f,
        BS=16 if layers.dtype.itemsize == 4 else SLOTS, STAGES=STAGES,
    )  # fmt: skip
    return logits, layers, hops, shifts
