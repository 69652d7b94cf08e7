"""Rotary embedding and attention, as the model's layers and the token router share them."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from meteora_jax.execution import Fused
from meteora_jax.sharding import by_device
from pallas_kernels.routed_lora.reference import einsum_float32


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotary embedding in the half-split convention: dimension i turns with i + H/2. x [B, T, N, H]."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


def router_rotation(width: int, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines float32 [B, T, 1, width / 2] of the token router, int32 positions [B, T]: wavelengths up to
    10,000, whatever the base's."""
    frequencies = 10000.0 ** -(jnp.arange(0, width, 2, dtype=jnp.float32) / width)
    angles = positions[:, :, None, None].astype(jnp.float32) * frequencies[None, None, None, :]
    return jnp.cos(angles), jnp.sin(angles)


def unit_rms(u: jax.Array) -> jax.Array:
    """u float32 over its rms along the last axis."""
    return u * jax.lax.rsqrt(jnp.mean(u * u, axis=-1, keepdims=True) + 1e-6)


def attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, fused: Fused | None = None) -> jax.Array:
    """Grouped-query attention: q [B, T, N, H], k and v [B, S, K, H], mask bool [B, 1, T, S] -> [B, T, N*H].

    Scores and softmax are float32. `fused`: by cuDNN, which never writes the scores; see
    `ExecutionConfig.fused_attention`. A prompt's mask is causal, its padding behind it, and is not read. What stands at
    padding means nothing.
    jax.nn.dot_product_attention is not used elsewhere: it refuses float16 on a CPU.
    """
    if fused is not None:
        cudnn = functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn")
        rows, heads = ("batch", None, "heads", None), ("heads", k.shape[2])
        given = [(q, rows), (k, rows), (v, rows)] + ([] if fused == "prompt" else [(mask, ("batch", None, None, None))])
        y = by_device(lambda q, k, v, mask=None: cudnn(q, k, v, mask=mask), given, rows, heads)
        return y.reshape(*y.shape[:2], -1)
    batch, length, heads, width = q.shape
    q = q.reshape(batch, length, k.shape[2], heads // k.shape[2], width)
    scores = einsum_float32(q.dtype, "btkgh,bskh->bkgts", q, k) * width**-0.5
    # finite, so that the rows of padding, which see nobody, stay numbers
    scores = jnp.where(mask[:, :, None], scores, jnp.finfo(jnp.float32).min)
    y = jnp.einsum("bkgts,bskh->btkgh", jax.nn.softmax(scores, axis=-1).astype(v.dtype), v)
    return y.reshape(batch, length, heads * width)
