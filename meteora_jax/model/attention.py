"""Attention, as the model's layers and the token router share them."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from meteora_jax.execution import Fused
from meteora_jax.sharding import by_device
from pallas_kernels.routed_lora.reference import einsum_float32


def unit_rms(u: jax.Array) -> jax.Array:
    """u float32 over its rms along the last axis."""
    return u * jax.lax.rsqrt(jnp.mean(u * u, axis=-1, keepdims=True) + 1e-6)


def attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, fused: Fused | None = None) -> jax.Array:
    """Grouped-query attention: q [B, T, N, H], k and v [B, S, K, H], mask bool [B, 1, T, S] -> [B, T, N*H].

    Scores and softmax are float32. `fused`: by cuDNN, which never writes the scores; see
    `ExecutionConfig.fused_attention`. What stands at padding means nothing.
    jax.nn.dot_product_attention is not used elsewhere: it refuses float16 on a CPU.
    """
    if fused is not None:
        cudnn = functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn")
        rows, heads = ("batch", None, "heads", None), ("heads", k.shape[2])
        given = [(q, rows), (k, rows), (v, rows), (mask, ("batch", None, None, None))]
        y = by_device(lambda q, k, v, mask: cudnn(q, k, v, mask=mask), given, rows, heads)
        return y.reshape(*y.shape[:2], -1)
    batch, length, heads, width = q.shape
    q = q.reshape(batch, length, k.shape[2], heads // k.shape[2], width)
    scores = einsum_float32(q.dtype, "btkgh,bskh->bkgts", q, k) * width**-0.5
    # finite, so that the rows of padding, which see nobody, stay numbers
    scores = jnp.where(mask[:, :, None], scores, jnp.finfo(jnp.float32).min)
    y = jnp.einsum("bkgts,bskh->btkgh", jax.nn.softmax(scores, axis=-1).astype(v.dtype), v)
    return y.reshape(batch, length, heads * width)
