"""Products that mean float32 where they say so."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

CPU_BLOCK = 192  # terms of a sum in a row, see `contract`


def cpu_block(x: jax.Array) -> int | None:
    """Terms of a sum over x's last axis that are added in a row; None: all, as XLA does it. See `contract`."""
    return CPU_BLOCK if x.dtype == jnp.float32 and jax.default_backend() == "cpu" and x.shape[-1] > CPU_BLOCK else None


def contract(equation: str, x: jax.Array, weight: jax.Array, axis: int) -> jax.Array:
    """einsum(equation, x, weight) over x's last and weight's `axis` dimension; float32 is exact to its last bits.

    XLA's CPU matmul adds in one long chain; where activations are massive (the down projections of SmolLM2)
    its rounding alone put 1.5e-4 between logits and their exact values. On a CPU in float32 the sum is
    therefore taken in blocks, which costs a few percent. GPUs and TPUs accumulate in blocks by themselves.
    """
    width = x.shape[-1]
    if cpu_block(x) is None:
        return jnp.einsum(equation, x, weight)
    blocks = [(start, min(start + CPU_BLOCK, width)) for start in range(0, width, CPU_BLOCK)]
    parts = [jnp.einsum(equation, x[..., a:b], jax.lax.slice_in_dim(weight, a, b, axis=axis)) for a, b in blocks]
    return functools.reduce(jnp.add, parts)


def matmul_precision(dtype: Any) -> Any:
    """Context in which float32 means float32: GPUs and TPUs would round float32 operands by default."""
    return jax.default_matmul_precision("highest" if dtype == jnp.float32 else None)
