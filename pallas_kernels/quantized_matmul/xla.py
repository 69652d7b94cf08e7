"""By XLA.

In 8 bit the product is of the values themselves, which 16-bit types hold exactly, and the scale comes after it; in 4
bit the matrix is made first, as each group has its own scale, and rounded to x's type.

Prompts on fp8 values go by a plain dot of e4m3 operands, which XLA gives to cuBLASLt. `jax.nn.scaled_matmul` has a
scale a block of 32, which Hopper has no instruction for; JAX's `hopper_mixed_type_matmul_mgpu` multiplies in 16 bit, at
half of fp8's rate, and by tiles of 64 rows at least; qwix's dot of quantised operands is this one.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.quantized_matmul.reference import dequantize
from pallas_kernels.quantized_matmul.weight import QuantizedWeight, halves, in_words, turn_zero_back, word_block
from pallas_kernels.routed_lora.reference import einsum_float32


def quantized_matmul(x: jax.Array, weight: QuantizedWeight, block: int | None) -> jax.Array:
    """As `api.quantized_matmul`."""
    if weight.words:  # the inputs take the order of the matrix, which is far larger
        x = in_words(x, weight.group)
    if weight.words and weight.group:
        return _product(x, _matrix_in_words(weight).astype(x.dtype), True, block)
    if weight.zero is not None:
        return _product(x, dequantize(weight).astype(x.dtype), False, block)
    y = _product(x, weight.values.astype(x.dtype), weight.turned, block)
    return y * jnp.expand_dims(weight.scale, tuple(range(y.ndim - 1)))


def _matrix_in_words(weight: QuantizedWeight) -> jax.Array:
    """A matrix in 4 bit as [O, I], float32, its inputs in the order of the words: written as it is read."""
    width, total = weight.shape
    block = word_block(width, weight.group)

    def by_place(z: jax.Array) -> jax.Array:
        """Of each group [G, O] -> of each place in a block's words [O, blocks, 1, 8]."""
        each = jnp.repeat(z.T.astype(jnp.float32), max(1, weight.group // block), axis=1)
        return jnp.repeat(each, 8 * min(weight.group, block) // block, axis=1).reshape(total, -1, 1, 8)

    q = halves(weight.values).astype(jnp.float32).reshape(total, -1, block // 8, 8)
    zero = turn_zero_back(weight.zero, len(weight.scale), width)
    return ((q - by_place(zero)) * by_place(weight.scale)).reshape(total, width)


FP8_MAX = 448.0  # of e4m3


def quantized_matmul_fp8(x: jax.Array, weight: QuantizedWeight) -> jax.Array:
    """As `api.quantized_matmul`, with each token of x in fp8, the largest of its values as the largest that fp8 has.

    cuBLASLt writes bfloat16 of a bfloat16 x, in which no product can be too large: half of the bytes of float32.
    """
    if weight.values.dtype != jnp.float8_e4m3fn:
        raise NotImplementedError(f"xla_fp8: expected float8_e4m3fn values, found {weight.values.dtype.name}")
    x = in_words(x, 0) if weight.words else x
    exact = x.reshape(-1, x.shape[-1]).astype(jnp.float32)  # cuBLASLt's product of fp8 has two axes
    largest = jnp.max(jnp.abs(exact), axis=-1, keepdims=True)
    scale = jnp.where(largest > 0, largest / FP8_MAX, 1.0)
    rounded = (exact / scale).astype(jnp.float8_e4m3fn)
    axes = ((1,), (int(weight.turned),)), ((), ())
    kind = jnp.float32 if x.dtype == jnp.float16 else x.dtype
    y = jax.lax.dot_general(rounded, weight.values, axes, preferred_element_type=kind).astype(jnp.float32)
    return (y * (scale * weight.scale[None])).reshape(*x.shape[:-1], -1)


def _product(x: jax.Array, matrix: jax.Array, turned: bool, block: int | None) -> jax.Array:
    """x [.., I] and [I, O], or [O, I] if turned -> float32 [.., O]; `block` terms of a sum in a row."""
    equation, axis, width = "...i,oi->...o" if turned else "...i,io->...o", int(turned), x.shape[-1]
    product = functools.partial(einsum_float32, x.dtype, equation)
    if block is None or width <= block:
        return product(x, matrix)
    ends = [(start, min(start + block, width)) for start in range(0, width, block)]
    parts = [product(x[..., a:b], jax.lax.slice_in_dim(matrix, a, b, axis=axis)) for a, b in ends]
    return functools.reduce(jnp.add, parts)
