"""Few tokens, or requests that share a routing: only the chosen adapters are read."""

from __future__ import annotations

import functools

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.routed_lora.reference import columns, einsum_float32


def gathered_lora(
    x: Float[Array, "G S I"],
    a: Float[Array, "P A R I"],
    b: Float[Array, "A R O"],
    indices: Int32[Array, "G P C"],
    weights: Float[Array, "G P C"],
    base: Float[Array, "G S O"],
    splits: tuple[int, ...],
) -> Float[Array, "G S O"]:
    """base + update; the weights include the scale, and are 0 where an index is NO_ADAPTER (-1).

    The choices of a group of tokens are laid side by side, so its update is two matmuls of inner width C*R.
    Bytes read: G*C adapters, whatever A is.
    """
    einsum = functools.partial(einsum_float32, x.dtype)
    rows = jnp.maximum(indices, 0)
    updates = []
    for p, (start, stop) in enumerate(columns(splits)):
        h = einsum("gsi,gcri->gscr", x, a[p, rows[:, p]])
        h = (h * weights[:, None, p, :, None]).astype(x.dtype)
        updates.append(einsum("gscr,gcro->gso", h, b[rows[:, p], :, start:stop]))
    return (base.astype(jnp.float32) + jnp.concatenate(updates, axis=-1)).astype(base.dtype)
