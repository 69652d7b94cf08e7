"""The specification: the matrix in float32, and x through it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from pallas_kernels.quantized_matmul.weight import QuantizedWeight, halves, turn_back, turn_zero_back


def unpack(values: UInt8[Array, "H O"]) -> UInt8[Array, "I O"]:
    """The q's of packed bytes, 0..15, one a byte."""
    return halves(values.T).T


def dequantize(weight: QuantizedWeight) -> Float[Array, "I O"]:
    """The matrix, float32."""
    values, zero = weight.values, weight.zero
    if weight.words:
        values = turn_back(values, weight.group)
        zero = None if zero is None else turn_zero_back(zero, len(weight.scale), weight.shape[0])
    elif weight.turned:
        values = values.T
    if zero is None:
        return values.astype(jnp.float32) * weight.scale[None, :]
    q, (groups, total) = unpack(values), weight.scale.shape
    q = q.reshape(groups, -1, total).astype(jnp.float32) - zero.astype(jnp.float32)[:, None]
    return (q * weight.scale[:, None]).reshape(-1, total)


def quantized_matmul(x: jax.Array, weight: QuantizedWeight) -> jax.Array:
    """x [.., I] -> float32 [.., O]."""
    precision = jax.lax.Precision.HIGHEST
    return jnp.einsum("...i,io->...o", x.astype(jnp.float32), dequantize(weight), precision=precision)
