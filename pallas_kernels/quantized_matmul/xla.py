"""By XLA.

In 8 bit the product is of the values themselves, which 16-bit types hold exactly, and the scale comes after it; in 4
bit the matrix is made first, as each group has its own scale, and rounded to x's type.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.quantized_matmul.reference import dequantize
from pallas_kernels.quantized_matmul.weight import QuantizedWeight
from pallas_kernels.routed_lora.reference import einsum_float32


def quantized_matmul(x: jax.Array, weight: QuantizedWeight, block: int | None) -> jax.Array:
    """As `api.quantized_matmul`."""
    if weight.zero is not None:
        return _product(x, dequantize(weight).astype(x.dtype), False, block)
    y = _product(x, weight.values.astype(x.dtype), weight.turned, block)
    return y * jnp.expand_dims(weight.scale, tuple(range(y.ndim - 1)))


def _product(x: jax.Array, matrix: jax.Array, turned: bool, block: int | None) -> jax.Array:
    """x [.., I] and [I, O], or [O, I] if turned -> float32 [.., O]; `block` terms of a sum in a row."""
    equation, axis, width = "...i,oi->...o" if turned else "...i,io->...o", int(turned), x.shape[-1]
    product = functools.partial(einsum_float32, x.dtype, equation)
    if block is None or width <= block:
        return product(x, matrix)
    ends = [(start, min(start + block, width)) for start in range(0, width, block)]
    parts = [product(x[..., a:b], jax.lax.slice_in_dim(matrix, a, b, axis=axis)) for a, b in ends]
    return functools.reduce(jnp.add, parts)
