"""The specification, in plain jnp: experts batched by einsum, dense over the adapters."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


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
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    einsum = functools.partial(jnp.einsum, precision=precision, preferred_element_type=jnp.float32)
    h = einsum("bti,pari->btpar", x, a)
    h = (h * combine[..., None].astype(jnp.float32)).astype(x.dtype)
    updates, start = [], 0
    for p, width in enumerate(splits):
        updates.append(einsum("btar,aro->bto", h[:, :, p], b[:, :, start : start + width]))
        start += width
    return jnp.concatenate(updates, axis=-1)
