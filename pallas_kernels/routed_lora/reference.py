"""The specification, in plain jnp: every adapter for every token, masked by the routing.

    y_p = base_p + sum_a combine[.., p, a] * (x @ A[p, a]^T) @ B[a, :, columns of p]      for each projection p

combine is `dense_weights` times the adapters' scale. Products are accumulated in float32; the weighted shrink is
rounded to x's dtype before it meets B, and the sum once to base's.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int32

# Products so named are kept where a layer is otherwise recomputed in the backward pass (`remat="dots"`).
KEPT = "product"


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
    indices: Int32[Array, "... C"], weights: Float[Array, "... C"], num_adapters: int
) -> Float[Array, "... A"]:
    """The weight of every adapter, zero where it was not chosen; an index outside 0..A-1 chooses nothing."""
    chosen = jax.nn.one_hot(indices, num_adapters, dtype=jnp.float32)
    return jnp.sum(chosen * weights[..., None], axis=-2)


def shrink(x: Float[Array, "B T I"], a: Float[Array, "P A R I"]) -> Float[Array, "B T P A R"]:
    """x through every A, float32."""
    return checkpoint_name(einsum_float32(x.dtype, "bti,pari->btpar", x, a), KEPT)


def expand(
    h: Float[Array, "B T P A R"], b: Float[Array, "A R O"], base: Float[Array, "B T O"], splits: tuple[int, ...]
) -> Float[Array, "B T O"]:
    """base + the weighted shrink of each projection through its own columns of every B, summed over adapters in float32
    and rounded once to base's dtype."""
    parts = []
    for p, (start, stop) in enumerate(columns(splits)):
        update = einsum_float32(b.dtype, "btar,aro->bto", h[:, :, p], b[:, :, start:stop])
        parts.append((base[..., start:stop].astype(jnp.float32) + update).astype(base.dtype))
    return jnp.concatenate(parts, axis=-1)
