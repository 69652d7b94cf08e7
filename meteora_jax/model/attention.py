"""Attention, as the model's layers and the token router share them."""

from __future__ import annotations

import functools
from typing import Literal

import jax
import jax.numpy as jnp

from meteora_jax.execution import Fused
from meteora_jax.sharding import by_device, partitioned_mesh
from pallas_kernels.routed_lora.reference import einsum_float32

How = Fused | Literal["parts"]
SCORES = 1 << 28  # of a device at a time; a GiB in float32


def unit_rms(u: jax.Array) -> jax.Array:
    """u float32 over its rms along the last axis."""
    return u * jax.lax.rsqrt(jnp.mean(u * u, axis=-1, keepdims=True) + 1e-6)


def attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, how: How | None = None) -> jax.Array:
    """Grouped-query attention: q [B, T, N, H], k and v [B, S, K, H], mask bool [B, 1, T, S] -> [B, T, N*H].

    Scores and softmax are float32. What stands at padding means nothing.
    jax.nn.dot_product_attention is not used elsewhere: it refuses float16 on a CPU.

    Args:
        how: "packed": by cuDNN, which never writes the scores; see `ExecutionConfig.fused_attention`. "parts": some
            queries after the others where all scores would be more than SCORES, for sequences that nobody trains on.
    """
    if how == "packed":
        cudnn = functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn")
        rows, heads = ("batch", None, "heads", None), ("heads", k.shape[2])
        given = [(q, rows), (k, rows), (v, rows), (mask, ("batch", None, None, None))]
        y = by_device(lambda q, k, v, mask: cudnn(q, k, v, mask=mask), given, rows, heads)
        return y.reshape(*y.shape[:2], -1)
    parts = _parts(q.shape[0] * q.shape[2] * k.shape[1], q.shape[1]) if how == "parts" else 1
    if parts > 1:

        def cut(z: jax.Array, axis: int) -> jax.Array:  # [.., T, ..] -> [parts, .., T / parts, ..]
            return jnp.moveaxis(z.reshape(*z.shape[:axis], parts, -1, *z.shape[axis + 1 :]), axis, 0)

        y = jax.lax.map(lambda some: attend(some[0], k, v, some[1]), (cut(q, 1), cut(mask, 2)))
        return jnp.moveaxis(y, 0, 1).reshape(*q.shape[:2], -1)
    batch, length, heads, width = q.shape
    q = q.reshape(batch, length, k.shape[2], heads // k.shape[2], width)
    scores = einsum_float32(q.dtype, "btkgh,bskh->bkgts", q, k) * width**-0.5
    # finite, so that the rows of padding, which see nobody, stay numbers
    scores = jnp.where(mask[:, :, None], scores, jnp.finfo(jnp.float32).min)
    y = jnp.einsum("bkgts,bskh->btkgh", jax.nn.softmax(scores, axis=-1).astype(v.dtype), v)
    return y.reshape(batch, length, heads * width)


def _parts(each: int, length: int) -> int:
    """Into how many equal parts `length` queries with `each` scores are cut."""
    mesh = partitioned_mesh()
    each = -(-each // (1 if mesh is None else mesh.size))
    return next((n for n in range(1, length + 1) if length % n == 0 and each * (length // n) <= SCORES), length)
