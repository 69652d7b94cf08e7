"""x through a matrix in 8 or 4 bits: checks its input and picks an implementation.

    y = x @ W        W: see `weight`

Differentiable in x alone: a quantised matrix is frozen.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.quantized_matmul import reference, triton_gpu, xla
from pallas_kernels.quantized_matmul.weight import QuantizedWeight, word_block

Implementation = Literal["reference", "xla", "xla_fp8", "triton"]
EIGHT_BIT = ("int8", "float8_e4m3fn")


def quantized_matmul(
    x: Float[Array, "*L I"],
    weight: QuantizedWeight,
    *,
    implementation: Implementation | None = None,
    block: int | None = None,
) -> Float[Array, "*L O"]:
    """x @ W, accumulated and left in float32.

    Args:
        x: float32, bfloat16 or float16. In 4 bit the matrix is rounded to its type; 8-bit values are exact in each.
        implementation: None: "xla", which is what every platform has. "xla_fp8": x is rounded to fp8 as well, with a
            scale a token; for fp8 values and many tokens. "triton": few tokens on an NVIDIA GPU, values in words; it
            has no gradient.
        block: terms of a sum that are added in a row; None: all. The reference does not ask.

    Raises:
        ValueError: shapes or types that do not fit together, all of them at once.
        NotImplementedError: what the implementation does not serve.
    """
    _check(x, weight)
    if implementation == "reference":
        return reference.quantized_matmul(x, weight)
    if implementation == "xla_fp8":
        return xla.quantized_matmul_fp8(x, weight)
    if implementation == "triton":
        one = jax.tree.map(lambda z: z[None], weight)
        summands = triton_gpu.product(0, x.reshape(-1, x.shape[-1]), one)
        return jnp.sum(summands, axis=0).reshape(*x.shape[:-1], -1)
    return xla.quantized_matmul(x, weight, block)


def _check(x, weight: QuantizedWeight) -> None:
    problems = []

    def expect(what: str, expected: object, found: object) -> None:
        if expected != found:
            problems.append(f"{what}: expected {expected}, found {found}")

    if x.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        problems.append(f"x's dtype: expected float32, bfloat16 or float16, found {x.dtype.name}")
    width, total = weight.shape
    expect("x's last axis", width, x.shape[-1])
    expect("scale's dtype", "float32", weight.scale.dtype.name)
    if weight.zero is None:
        if weight.values.dtype.name not in EIGHT_BIT:
            problems.append(f"values' dtype: expected {' or '.join(EIGHT_BIT)}, found {weight.values.dtype.name}")
        expect("scale's shape", (total,), weight.scale.shape)
    else:
        expect("values' dtype", "uint8", weight.values.dtype.name)
        expect("zero's dtype", "uint8", weight.zero.dtype.name)
        block = word_block(width, weight.group) if weight.words else 0
        expect("zero's shape", (total, 4 * width // block) if block else weight.scale.shape, weight.zero.shape)
        if weight.scale.ndim != 2 or weight.scale.shape[1] != total or width % weight.scale.shape[0]:
            problems.append(f"scale's shape: expected (a divisor of {width}, {total}), found {weight.scale.shape}")
    if weight.words and not word_block(width, weight.group):
        problems.append(f"words: expected inputs in blocks of 128 (8 bit: 64), found {width}")
    if problems:
        raise ValueError("quantized_matmul: " + "; ".join(problems))
