"""Gates and adapters in one pass: the gate of every adapter and its A are rows of one slim matrix.

The product of x with that matrix holds the logits and every shrink; the choice, the mask, the expand and the sum
with the base follow from it without reading x again. For inference: the choice has no gradient here.
"""

from __future__ import annotations

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.routed_lora.reference import Expand, add_diagonal, add_expanded, dense_weights, einsum_float32

GATES = 32  # the gates' rows of a projection are padded to a multiple of this ...
ROWS = 256  # ... and all its rows to a multiple of this: matrix units want whole tiles
TRITON_ROWS = 64  # tokens up to which one Triton launch may follow the product; a prompt's took 17 ms of 62 on an H200

# "reference" in XLA; "triton" the product by XLA and one launch (few tokens); "diagonal" the update as one cuBLAS
# product that adds in place, B's on a diagonal of blocks (many tokens)
Implementation = Literal["reference", "triton", "diagonal"]


def first_shrink(num_adapters: int) -> int:
    """Where a projection's A rows begin in the slim matrix, behind its gates."""
    return -(-num_adapters // GATES) * GATES


def slim_matrix(gate: Float[Array, "I P A"], a: Float[Array, "P A R I"]) -> Float[Array, "P N I"]:
    """Gates and A's as rows, zero-padded, in a's dtype; N a multiple of 256 (28 adapters of rank 8: 256)."""
    projections, adapters, rank, width = a.shape
    first = first_shrink(adapters)
    gates = jnp.pad(gate.transpose(1, 2, 0).astype(a.dtype), ((0, 0), (0, first - adapters), (0, 0)))
    shrink = a.reshape(projections, adapters * rank, width)
    tail = -(first + adapters * rank) % ROWS
    return jnp.concatenate([gates, jnp.pad(shrink, ((0, 0), (0, tail), (0, 0)))], axis=1)


def choose_adapters(
    logits: Float[Array, "M P A"], counts: Int32[Array, " M"], temperatures: Float[Array, " M"], top_k: int
) -> tuple[Int32[Array, "M P C"], Float[Array, "M P C"]]:
    """(indices, weights): the `counts` largest of the logits, ties to the lowest index, softmax(value / temperature).

    A row takes at most `top_k`; the rest of its choices are -1 with weight 0.
    """
    columns = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    values, indices = [], []
    for _ in range(top_k):
        index = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        values.append(jnp.max(logits, axis=-1))
        indices.append(index)
        logits = jnp.where(columns == index[..., None], -jnp.inf, logits)
    index, value = jnp.stack(indices, -1), jnp.stack(values, -1)
    taken = (jnp.arange(top_k, dtype=jnp.int32)[None, :] < counts[:, None])[:, None, :]
    value = (value - value[..., :1]) / temperatures[:, None, None]
    weights = jnp.where(taken, jnp.exp(jnp.where(taken, value, 0.0)), 0.0)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    return jnp.where(taken, index, -1), weights / jnp.where(total > 0, total, 1.0)


@functools.partial(jax.jit, static_argnames=("splits", "top_k", "implementation"))
def gated_lora(
    x: Float[Array, "M I"],
    slim: Float[Array, "P N I"] | None,
    b: Float[Array, "A R O"],
    scale: Float[Array, "P A"],
    counts: Int32[Array, " M"],
    temperatures: Float[Array, " M"],
    base: Float[Array, "M O"],
    splits: tuple[int, ...],
    top_k: int,
    *,
    made: Float[Array, "M P N"] | None = None,
    implementation: Implementation = "reference",
) -> tuple[Float[Array, "M O"], Int32[Array, "M P C"], Float[Array, "M P C"]]:
    """(base + update, indices, weights) of tokens routed by gates (MeteoRA, section 3).

    Args:
        slim: from `slim_matrix`. b, scale, base, splits: as `api.add_routed_lora` has them.
        counts: how many adapters each token takes, at most `top_k`. temperatures: float32, of its softmax.
        made: x times the slim matrix (then None) where it is there already, float32.
    """
    adapters = b.shape[0]
    first = first_shrink(adapters)
    h = _product(x, slim) if made is None else made
    if implementation == "triton":
        from pallas_kernels.routed_lora import triton_gpu

        flat = h.reshape(h.shape[0], -1)
        return triton_gpu.gated_expand(flat, b, scale, counts, temperatures, base, splits, top_k, first)
    indices, weights = choose_adapters(h[..., :adapters], counts, temperatures, top_k)
    combine = dense_weights(indices, weights, adapters) * scale[None]
    return _add(base, h, combine, b, splits, x.dtype, implementation), indices, weights


@functools.partial(jax.jit, static_argnames=("splits", "implementation"))
def chosen_lora(
    x: Float[Array, "M I"],
    slim: Float[Array, "P N I"] | None,
    b: Float[Array, "A R O"],
    scale: Float[Array, "P A"],
    indices: Int32[Array, "M C"],
    weights: Float[Array, "M C"],
    base: Float[Array, "M O"],
    splits: tuple[int, ...],
    *,
    made: Float[Array, "M P N"] | None = None,
    implementation: Expand = "reference",
) -> Float[Array, "M O"]:
    """`gated_lora` where the choice is there already, one for all projections of a token; the gates are not looked at.

    indices: -1 for none; weights float32.
    """
    made = _product(x, slim) if made is None else made
    combine = dense_weights(indices[:, None], weights[:, None], b.shape[0]) * scale[None]
    return _add(base, made, combine, b, splits, x.dtype, implementation)


def _product(x: jax.Array, slim: jax.Array | None) -> jax.Array:
    """float32 [M, P, N]: x [M, I] times the rows of gates and A's."""
    assert slim is not None
    flat = slim.reshape(-1, slim.shape[2])
    return einsum_float32(x.dtype, "mi,ni->mn", x, flat).reshape(-1, *slim.shape[:2])


def _add(
    base: jax.Array, h: jax.Array, combine: jax.Array, b: jax.Array, splits: tuple[int, ...], kind: Any,
    implementation: Expand,
) -> jax.Array:  # fmt: skip
    """base [M, O] + the update of h [M, P, N], x of dtype `kind` times the slim matrix; combine float32 [M, P, A]."""
    adapters, rank, _ = b.shape
    first = first_shrink(adapters)
    h = h[..., first : first + adapters * rank].reshape(*h.shape[:2], adapters, rank)
    h = (h * combine[..., None]).astype(kind)
    if implementation == "diagonal":
        return add_diagonal(base, h.reshape(*h.shape[:2], -1), b, splits)
    return add_expanded(base, h, b, splits)
