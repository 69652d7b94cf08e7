"""Rotary embedding, as the model's layers and the token router share it."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from meteora_jax.config import LlamaConfig
from pallas_kernels.paged_attention import EMPTY


def sequence_positions(tokens: jax.Array, lengths: jax.Array) -> jax.Array:
    """int32 [B, T]: 0, 1, .. of tokens [B, T], EMPTY behind each row's length int32 [B]."""
    columns = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :]
    return jnp.where(columns < lengths[:, None], columns, EMPTY)


def frequencies(theta: float, width: int) -> jax.Array:
    """float32 [1, width / 2]: theta^(-2i / width)."""
    return (1.0 / jnp.power(jnp.float32(theta), jnp.arange(0, width, 2, dtype=jnp.float32) / width))[None]


def inverse_frequencies(config: LlamaConfig, lengths: jax.Array) -> jax.Array:
    """Rotary frequencies, float32 [B, H/2] (B = 1 unless they depend on each row's length, int32 [B]).

    Sources: Llama 3.1's `apply_scaling` (llama3); "dynamic NTK" as transformers computes it: theta grows with the
    tokens that the row has so far, a prompt's all at once.
    """
    scaling, theta = config.rope_scaling, config.rope_theta
    plain = frequencies(theta, config.head_dim)
    if scaling is None:
        return plain
    if scaling.rope_type == "linear":
        return plain / scaling.factor
    if scaling.rope_type == "dynamic":
        original = scaling.original_max_position_embeddings
        length = jnp.maximum(lengths, original).astype(jnp.float32)  # [B]
        grown = scaling.factor * length / original - (scaling.factor - 1)
        theta_row = theta * jnp.power(grown, config.head_dim / (config.head_dim - 2))
        half = jnp.arange(0, config.head_dim, 2, dtype=jnp.float32) / config.head_dim
        return 1.0 / jnp.power(theta_row[:, None], half[None])
    assert scaling.low_freq_factor is not None, "the config reader requires both for llama3"
    assert scaling.high_freq_factor is not None
    wavelength = 2 * math.pi / plain
    low = scaling.original_max_position_embeddings / scaling.low_freq_factor
    high = scaling.original_max_position_embeddings / scaling.high_freq_factor
    blend = (scaling.original_max_position_embeddings / wavelength - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    smooth = (1 - blend) * plain / scaling.factor + blend * plain
    return jnp.where(wavelength > low, plain / scaling.factor, jnp.where(wavelength < high, plain, smooth))


def angles(frequencies: jax.Array, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines float32 [B, T, 1, H/2] of int32 positions [B, T] at frequencies [1 or B, H/2]."""
    turns = (positions[:, :, None].astype(jnp.float32) * frequencies[:, None, :])[:, :, None, :]
    return jnp.cos(turns), jnp.sin(turns)


def rotation(
    config: LlamaConfig, positions: jax.Array, lengths: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """`angles` of a base's own frequencies. lengths: int32 [B], tokens of each row so far; None: by its positions."""
    lengths = jnp.max(positions, axis=1) + 1 if lengths is None else lengths
    return angles(inverse_frequencies(config, lengths), positions)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotary embedding in the half-split convention: dimension i turns with i + H/2. x [B, T, N, H]."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)
