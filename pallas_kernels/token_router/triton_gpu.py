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
WIDTHS = (32, 64, 128)  # of the stream: a program holds matrices of so many rows and columns in registers
MOST_COLUMNS = 127  # of the logits, one fewer than of what looks them up
LONGEST = 4096  # slots of a sequence, whose keys one program reads after each other
WARPS, SLOTS, STAGES = 8, 64, 2  # of a program; slots that it reads at a time, and so many times ahead
shape = jax.ShapeDtypeStruct


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepWeights:
    """A token router's weights as the kernel reads them, in the model's type but for `lookup`; F layers of width E.

    read [D, (1 + 3 F) E]: of the embedding into the stream, and into queries, keys and values of every layer. shift
    [SHIFTS, E, E], qkv [F, 3 E, E], o [F, E, E], gate_up [F, 4 E, E], down [F, E, 2 E], hop [1 + SHIFTS, E, E]: the
    module's, turned: outputs first, so that a warp holds all inputs of some. task, before, segment: `thrice`. lookup
    float32 [2].
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


def serves(width: int, columns: int, tokens: StepTokens, block_size: int) -> bool:
    """Whether the kernel serves a router of that width and so many logits, and a step: one that reads no prompt, of
    short sequences."""
    fits = width in WIDTHS and columns <= MOST_COLUMNS and tokens.tables.shape[1] * block_size <= LONGEST
    return fits and not len(tokens.runs)


def turned(w: Float[Array, "*L I O"], kind: Any) -> jax.Array:
    """Outputs first, [L.., O, I], in that type."""
    return jnp.swapaxes(w, -1, -2).astype(kind)


def thrice(w: Float[Array, "E N"], units: Float[Array, "E N"], kind: Any) -> jax.Array:
    """[3, P, E] elements: columns w turned [P, E]; of length 1, [E, P], and turned; with zeros behind the N; P a power
    of two, at least 16."""
    w, units = (jnp.pad(z, ((0, 0), (0, max(16, power(w.shape[1])) - w.shape[1]))) for z in (w, units))
    return jnp.stack([w.T, units.reshape(units.shape[::-1]), units.T]).astype(kind)


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
        F=f, E=e, H=width, A=columns, AP=weights.task.shape[1], BP=weights.before.shape[1], S=weights.segment.shape[1],
        SHIFTS=len(weights.shift), W=tokens.tables.shape[1], BLOCK=block_size, BLOCKS=len(layers) // f,
        BS=16 if layers.dtype.itemsize == 4 else SLOTS, STAGES=STAGES,
    )  # fmt: skip
    return logits, layers, hops, shifts
