"""The specification, in plain jnp: experts batched by einsum, dense over the adapters."""

from __future__ import annotations

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int32

# Products so named are kept where a layer is otherwise recomputed in the backward pass (`remat="dots"`).
KEPT = "product"
FEW_ROWS = 64  # tokens for which a product's operands cost more than its operations
# How the 16-bit updates of many tokens are added: in float32 and rounded once, projection by projection; or by one
# product a group that adds in place, see `add_diagonal`, which cuBLAS does in float32 too and a GPU was timed with.
Expand = Literal["reference", "diagonal"]


def einsum_float32(dtype: Any, equation: str, *operands: jax.Array) -> jax.Array:
    """einsum of operands of `dtype`, accumulated in float32; float32 operands are not rounded to fewer bits."""
    if dtype == jnp.bfloat16 and len(operands) == 2:
        return _einsum_bfloat16(equation, *operands)
    precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
    return jnp.einsum(equation, *operands, precision=precision, preferred_element_type=jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _einsum_bfloat16(equation: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """A float32 product of bfloat16 operands whose backward products are of bfloat16 operands as well.

    By itself JAX multiplies the float32 gradient with the other operand, and XLA widens that one to float32.
    """
    return jnp.einsum(equation, x, y, preferred_element_type=jnp.float32)


def _einsum_forward(equation, x, y):
    return _einsum_bfloat16(equation, x, y), (x, y)


def _einsum_backward(equation, kept, dz):
    _, pull = jax.vjp(functools.partial(jnp.einsum, equation), *kept)
    return pull(dz.astype(jnp.bfloat16))


_einsum_bfloat16.defvjp(_einsum_forward, _einsum_backward)


def columns(splits: tuple[int, ...]) -> list[tuple[int, int]]:
    """(start, stop) of each projection's columns in the group."""
    return [(sum(splits[:p]), sum(splits[: p + 1])) for p in range(len(splits))]


def dense_weights(
    indices: Int32[Array, "*L C"], weights: Float[Array, "*L C"], num_adapters: int
) -> Float[Array, "*L A"]:
    """The weight of every adapter, zero where it was not chosen; an index outside 0..A-1 chooses nothing."""
    chosen = jax.nn.one_hot(indices, num_adapters, dtype=jnp.float32)
    return jnp.sum(chosen * weights[..., None], axis=-2)


def expand(h: Float[Array, "B T P A R"], b: Float[Array, "A R O"], splits: tuple[int, ...]) -> Float[Array, "B T O"]:
    """The masked shrink of each projection through its own columns of every B, summed over adapters; float32."""
    einsum = functools.partial(einsum_float32, b.dtype)
    updates = [
        einsum("btar,aro->bto", h[:, :, p], b[:, :, start:stop]) for p, (start, stop) in enumerate(columns(splits))
    ]
    return jnp.concatenate(updates, axis=-1)


def add_expanded(
    base: Float[Array, "*L O"], h: Float[Array, "*L P A R"], b: Float[Array, "A R O"], splits: tuple[int, ...],
    implementation: Expand = "reference",
) -> Float[Array, "*L O"]:  # fmt: skip
    """base + `expand`, in base's dtype; `implementation` of many tokens in 16 bit."""
    lead, width = base.shape[:-1], base.shape[-1]
    base, h = base.reshape(-1, width), h.reshape(-1, *h.shape[-3:])
    if base.dtype == jnp.float32:
        y = base + expand(h[:, None], b, splits)[:, 0]
    elif base.shape[0] <= FEW_ROWS and len(splits) > 1:
        # every column for every projection, and then the own ones: b cut by columns would be copied
        wide = jnp.einsum("mpar,aro->mpo", h, b, preferred_element_type=jnp.float32)
        own = [wide[:, p, start:stop] for p, (start, stop) in enumerate(columns(splits))]
        y = (base.astype(jnp.float32) + jnp.concatenate(own, axis=-1)).astype(base.dtype)
    elif implementation == "diagonal":
        y = add_diagonal(base, h.reshape(*h.shape[:2], -1), b, splits)
    else:
        parts = []
        for p, (start, stop) in enumerate(columns(splits)):
            update = einsum_float32(b.dtype, "mar,aro->mo", h[:, p], b[:, :, start:stop])
            parts.append((base[:, start:stop].astype(jnp.float32) + update).astype(base.dtype))
        y = jnp.concatenate(parts, axis=-1)
    return y.reshape(*lead, width)


def add_diagonal(
    base: Float[Array, "M O"], h: Float[Array, "M P K"], b: Float[Array, "A R O"], splits: tuple[int, ...]
) -> Float[Array, "M O"]:
    """base + h B as one product: B's columns of each projection on a diagonal of blocks, zeros beside them.

    P times the operations, but no slices of base and no concatenation, and the sum is the product's own (cuBLAS adds to
    float32 and rounds once; elsewhere the update is rounded to base's dtype first).
    """
    rows, projections, inner = h.shape
    total = b.shape[2]
    flat = b.reshape(inner, total)
    pieces = [jnp.pad(flat[:, i:j], ((0, 0), (i, total - j))) for i, j in columns(splits)]
    wide = flat if projections == 1 else jnp.concatenate(pieces, axis=0)
    update = jnp.einsum("mk,ko->mo", h.reshape(rows, projections * inner), wide)
    return base + update


def shrink(
    x: Float[Array, "B T I"], a: Float[Array, "P A R I"], combine: Float[Array, "B T1 P1 A"]
) -> Float[Array, "B T P A R"]:
    """x through every A, times the weights of `routed_lora`, in x's dtype."""
    h = checkpoint_name(einsum_float32(x.dtype, "bti,pari->btpar", x, a), KEPT)
    return (h * combine[..., None].astype(jnp.float32)).astype(x.dtype)


def routed_lora(
    x: Float[Array, "B T I"],
    a: Float[Array, "P A R I"],
    b: Float[Array, "A R O"],
    combine: Float[Array, "B T1 P1 A"],
    splits: tuple[int, ...],
) -> Float[Array, "B T O"]:
    """The update of a whole projection group: for each projection p, with its own columns of b,

        y_p = sum_a combine[.., p, a] * (x @ A[p, a]) @ B[a, :, columns of p]

    Args:
        x: the group's input, any float dtype.
        a: A of every adapter as rows (PEFT's lora_A), zero-padded to a common rank R.
        b: B of every adapter; the columns of the P projections side by side.
        combine: routing weight times the adapter's scale; T1 and P1 are T and P, or 1 and broadcast.
        splits: the width of each projection in O; sums to O.

    Returns:
        float32. Products are accumulated in float32; the weighted shrink is rounded to x's dtype.
    """
    return expand(shrink(x, a, combine), b, splits)
