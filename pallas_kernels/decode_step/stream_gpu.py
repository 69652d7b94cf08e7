"""The gates' own stream through a layer, for one token a row: one Triton launch beside the layer's groups.

q k v's product has x read already, as columns behind its gates and A's; `look_back` makes queries, keys and values of
it, writes the latter, attends, and gives the logits that the four tails of the layer add to those of their columns.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.decode_step import triton_gpu
from pallas_kernels.routed_lora.triton_gpu import power

KERNELS = "pallas_kernels.decode_step.stream_kernels"
MAX_WIDTH = 128  # a row's vectors and a half of a square matrix lie in registers
BLOCK = 64  # slots that a program looks at together


@functools.partial(jax.tree_util.register_dataclass, data_fields=["own", "out", "bias"], meta_fields=["first", "eps"])
@dataclasses.dataclass(frozen=True)
class GateStream:
    """The stream's weights, stacked over layers.

    own [L, E, 3, E]: of the stream to queries, keys, values. out [L, E, P, A]: to the logits of a layer's projections.
    bias float32 [L, P, A], added to these; None: none. first: q k v's column where x read [4, E] begins; eps: of the
    norm before it.
    """

    own: Any
    out: Any
    bias: Any
    first: int
    eps: float


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Looked:
    """u float32 [M, E], the stream behind the layer before; changed in place: keys and values [L, M, S, E], and arrived
    int32 [at least M], zeros between launches."""

    u: Any
    keys: Any
    values: Any
    arrived: Any

    @classmethod
    def begin(cls, keys: jax.Array, values: jax.Array) -> Looked:
        """Before the first layer."""
        rows, width = keys.shape[1], keys.shape[3]
        arrived = jnp.zeros((max(rows, triton_gpu.LEAST_ROWS),), jnp.int32)  # one zero were a constant, to be copied
        return cls(jnp.zeros((rows, width), jnp.float32), keys, values, arrived)


def look_back(
    layer: int,
    sums: jax.Array,
    squares: jax.Array,
    width: int,
    stream: GateStream,
    looked: Looked,
    angles: tuple[jax.Array, jax.Array],
    own: jax.Array,
    positions: jax.Array,
    slot: jax.Array,
    captured: bool = True,
) -> tuple[jax.Array, Looked]:
    """The stream through one layer, before the layer itself.

    Args:
        sums: float32 [at least M, columns], q k v's product. squares: as `triton_gpu.group_step` takes them. width: I.
        angles: cosines and sines float32 [M, E/2]. own: int32 [M], the tokens' positions. positions: int32 [M, S],
            those of the slots, EMPTY for none. slot: int32 [1], the one to write.

    Returns:
        (what logits gain, float32 [M, P, A]; the stream behind this layer).

    Raises:
        NotImplementedError: a stream wider than `MAX_WIDTH`.
    """
    rows, slots, e = looked.keys.shape[1:]
    if e > MAX_WIDTH:
        raise NotImplementedError(f"decode_step: expected a gates' stream of at most {MAX_WIDTH}, found {e}")
    _, _, projections, adapters = stream.out.shape
    logits = projections * adapters
    # a part is long enough to be worth a program, and there are enough programs to fill the chip
    parts = max(1, min(32, math.ceil(slots / BLOCK), math.ceil(4 * triton_gpu.PROGRAMS / rows)))
    part = math.ceil(slots / (parts * BLOCK)) * BLOCK
    parts = math.ceil(slots / part)
    shape, number = jax.ShapeDtypeStruct, jnp.full((1,), layer, jnp.int32)
    held = (looked.keys, looked.values, looked.arrived)
    inputs = (
        number, sums, squares, looked.u, stream.own, stream.out, number if stream.bias is None else stream.bias,
        *angles, own, positions, slot, *held,
    )  # fmt: skip
    u, gained, _, *held = triton_gpu.launch(
        KERNELS, "stream_kernel", *inputs,
        out=(
            shape((rows, e), jnp.float32), shape((rows, projections, adapters), jnp.float32),
            shape((rows, parts + 1, e + 2), jnp.float32), *(shape(z.shape, z.dtype) for z in held),
        ),
        aliases={len(inputs) - 3 + i: 3 + i for i in range(3)}, grid=(rows, parts + 1), warps=4, capturable=captured,
        M=rows, I=width, ROW=sums.shape[1], FIRST=stream.first, S=slots, E=e, EH=power(e // 2), Z=logits,
        EPS=stream.eps, NS=squares.shape[1], NSP=power(squares.shape[1]), BIASED=stream.bias is not None, PARTS=parts,
        PART=part, PP=power(parts + 1), EMPTY=triton_gpu.EMPTY, FACTOR=e**-0.5, BS=BLOCK, BZ=min(128, power(logits)),
    )  # fmt: skip
    return gained, Looked(u, *held)
