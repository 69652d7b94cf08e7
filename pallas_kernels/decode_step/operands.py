"""What the launches of a decoding step read and change: weights, routing, cache, residual stream; stacked over layers.

Axis letters: M rows (one token each), L layers, D width, Bs slots of a block, K key and value heads, H head width, O
columns of a group, P its projections, I its input, A adapters, R rank, C adapters that act on a row.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from pallas_kernels.quantized_matmul import QuantizedWeight
from pallas_kernels.routed_lora import packing
from pallas_kernels.routed_lora.triton_gpu import power

LEAST_ROWS = 8  # of a product's input: XLA takes a single row for a sum and copies W for it
WEIGHED_ROWS = 16  # of a program that weighs shrinks; a matrix product has at least so many


def at_least(x: jax.Array, rows: int) -> jax.Array:
    """x [M, I] with rows of zeros up to so many."""
    return jnp.pad(x, ((0, max(0, rows - x.shape[0])), (0, 0)))


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["w", "a", "b", "scale", "behind"],
    meta_fields=["splits", "eps", "packed", "gates", "first_projection", "summed"],
)
@dataclasses.dataclass(frozen=True)
class Group:
    """The weights of projections that share an input (q k v, o, gate and up, down), stacked over layers.

    w: [L, I, O]; or packed, [L, O + P packed, I]: behind the O rows of the base, for each projection `packed` rows with
        its `gates` and, from row `first_shrink` of them on, its A's.
    a: [L, P, A, R, I] where the bank is too wide for that (then gates alone are packed), else None.
    b: [L, A, R, O]; None without adapters, like scale: float32 [L, P, A].
    splits: columns of each projection. eps: of the norm before the group, None without one.
    packed: packed rows of a projection, 0 without. gates: columns of its gates, the adapters' and any null choice's.
    first_projection: the group's first among a layer's projections.
    summed: the mesh's axes along which I is split, inside `jax.shard_map`: a product is then a share of the sum.
    """

    w: jax.Array | QuantizedWeight
    a: jax.Array | None
    b: jax.Array | None
    scale: jax.Array | None
    splits: tuple[int, ...]
    eps: float | None
    packed: int
    gates: int
    first_projection: int
    behind: jax.Array | None = None
    summed: tuple[str, ...] = ()

    def whole(self, x: jax.Array) -> jax.Array:
        """A product over I, summed over the devices that share it."""
        return jax.lax.psum(x, self.summed) if self.summed else x

    @property
    def depth(self) -> int:
        """L."""
        return (self.w.values if isinstance(self.w, QuantizedWeight) else self.w).shape[0]

    @property
    def columns(self) -> int:
        """O: columns of all projections."""
        return sum(self.splits)

    @property
    def first_shrink(self) -> int:
        """The first row of a projection's A's among its packed rows."""
        return packing.first_a_row(self.gates)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["counts", "temperatures", "indices", "weights", "fused"],
    meta_fields=["top_k"],
)
@dataclasses.dataclass(frozen=True)
class Choice:
    """Which adapters act: what the gates choose, or a routing that was given, for all projections or for each.

    top_k: C, at most so many on a row. Gates: counts int32 [M], how many on each row; temperatures float32 [M].
    Given: indices int32 [M, C] or [M, P, C], anything but an adapter's index for none; weights float32, as many,
    without the scale.
    fused: bool [M], the rows whose adapters act as one, their matrices averaged by the weights; None: nobody's.
    """

    top_k: int
    counts: jax.Array | None = None
    temperatures: jax.Array | None = None
    indices: jax.Array | None = None
    weights: jax.Array | None = None
    fused: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepState:
    """What launches change in place: the cache, and the trace of what gates chose.

    pages: [L * blocks, Bs, 2 K, H], see `paged_attention`; blocks: those of a layer. indices, weights: int32 and
    float32 [L, M, projections of a layer, C]; one element each where no gates choose.
    """

    pages: jax.Array
    indices: jax.Array
    weights: jax.Array
    blocks: int = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ResidualStream:
    """The residual stream, and what the norm that follows needs of it.

    x: [M, D]. scaled: [at least M, D], x times that norm's scale. squares: float32 [M, parts], whose sums are those of
    x's squares. A norm's 1 / rms commutes with a product: who reads `scaled` multiplies its product by that.
    """

    x: jax.Array
    scaled: jax.Array
    squares: jax.Array

    @classmethod
    def begin(cls, x: jax.Array, scale: jax.Array) -> ResidualStream:
        """x [M, D] before the first layer, whose first norm has the scale [D]."""
        exact = x.astype(jnp.float32)
        scaled = (exact * scale.astype(jnp.float32)[None]).astype(x.dtype)
        return cls(x, at_least(scaled, LEAST_ROWS), jnp.sum(exact * exact, axis=1, keepdims=True))


@dataclasses.dataclass(frozen=True)
class AdapterLayout:
    """How a kernel finds a group's adapters, shrinks and routing: one compile-time constant.

    A, R, C: as above; G: columns of a projection's gates, null choices behind the A adapters' own; a property with a P
        behind it is rounded up to a power of two.
    gates: the kernel chooses by logits. Else it reads a routing (a wide bank's `shrink_kernel` has chosen before it).
    gather: an epilogue's program has one row and reads its adapters' rows of B; else it has many, and multiplies every
        B with what `weigh_kernel` made of the shrinks: of BK columns in a block, KP in all, tiles of WM rows.
    fused: rows may average their adapters' matrices (without gather only).
    splits: summands of the product, M rows apart, whose sum has logits and shrinks.
    compact: shrinks are of the chosen adapters alone, in `parts` that are to be added, and times the norm's factor.
    start, projection, row: elements to the first projection's logits (compact: shrinks), from there to the next
        projection's, and from a row to the next; first_shrink: from a projection's logits to its shrinks.
    routing_layer, routing_row, routing_projection, routing_first: the same of a routing that is read or traced.
    """

    A: int
    G: int
    R: int
    C: int
    gates: bool
    gather: bool
    fused: bool
    splits: int
    compact: bool
    parts: int
    start: int
    projection: int
    row: int
    first_shrink: int
    routing_layer: int
    routing_row: int
    routing_projection: int
    routing_first: int

    @property
    def GP(self) -> int:
        return power(self.G)

    @property
    def RP(self) -> int:
        return power(self.R)

    @property
    def CP(self) -> int:
        return power(self.C)

    @property
    def KP(self) -> int:
        """A R, rounded up to whole blocks."""
        return -(-self.A * self.R // self.BK) * self.BK

    @property
    def KBP(self) -> int:
        return power(self.KP // self.BK)

    @property
    def BK(self) -> int:
        return 64

    @property
    def WM(self) -> int:
        return WEIGHED_ROWS
