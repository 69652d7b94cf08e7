"""The backward pass, shared by all implementations: gradients of x, A, B and the routing weights.

    dh = dy B^T      dweight = h . dh      dx = (weight dh) A
    dA = (weight dh)^T x        dB = (weight h)^T dy

h = x A^T is computed again instead of kept. Gradients that nobody asks for are removed by the compiler.
No sum is a scatter, whose order a GPU does not fix.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.routed_lora.reference import columns, dense_weights, einsum_float32
from pallas_kernels.routed_lora.xla import Buckets, block_rows, spread

Gradients = tuple[jax.Array, jax.Array, jax.Array, jax.Array]


def dense_gradients(
    x: Float[Array, "G S I"],
    a: Float[Array, "P A R I"],
    b: Float[Array, "A R O"],
    indices: Int32[Array, "G P C"],
    weights: Float[Array, "G P C"],
    dy: Float[Array, "G S O"],
    splits: tuple[int, ...],
) -> Gradients:
    """(dx, dA, dB, dweights) by products with every adapter: A * R up to a few hundred."""
    einsum = functools.partial(einsum_float32, x.dtype)
    dy = dy.astype(x.dtype)
    combine = dense_weights(indices, weights, a.shape[1])[:, None, :, :, None]  # [G, 1, P, A, 1]
    h = einsum("gsi,pari->gspar", x, a)
    dh = [einsum("gso,aro->gsar", dy[..., start:stop], b[..., start:stop]) for start, stop in columns(splits)]
    dh = jnp.stack(dh, axis=2)
    dcombine = jnp.sum(h * dh, axis=(1, 4))  # [G, P, A]
    dweights = jnp.take_along_axis(dcombine, jnp.maximum(indices, 0), axis=2)
    h, dh = (h * combine).astype(x.dtype), (dh * combine).astype(x.dtype)
    dx = einsum("gspar,pari->gsi", dh, a)
    da = einsum("gspar,gsi->pari", dh, x)
    db = [einsum("gsar,gso->aro", h[:, :, p], dy[..., i:j]) for p, (i, j) in enumerate(columns(splits))]
    db = jnp.concatenate(db, axis=-1)
    dweights = jnp.where(indices < 0, 0.0, dweights)
    return dx.astype(x.dtype), da.astype(a.dtype), db.astype(b.dtype), dweights


def grouped_gradients(
    x: Float[Array, "G S I"],
    a: Float[Array, "P A R I"],
    b: Float[Array, "A R O"],
    indices: Int32[Array, "G P C"],
    weights: Float[Array, "G P C"],
    dy: Float[Array, "G S O"],
    splits: tuple[int, ...],
) -> Gradients:
    """(dx, dA, dB, dweights) over tokens sorted by adapter: any A * R."""
    einsum = functools.partial(einsum_float32, x.dtype)
    groups, tokens, _ = x.shape
    indices, weights = spread(indices, weights, tokens)
    flat, flat_dy = x.reshape(groups * tokens, -1), dy.reshape(groups * tokens, -1).astype(x.dtype)
    choices, adapters = indices.shape[2], a.shape[1]
    dx, da, db, dweights = jnp.zeros(flat.shape, jnp.float32), [], [], []
    for p, (start, stop) in enumerate(columns(splits)):
        chosen = indices[:, p]
        buckets = Buckets.sort(chosen.reshape(-1), adapters, block_rows(chosen.size, adapters))
        xs, dys = buckets.gather(flat, choices), buckets.gather(flat_dy[:, start:stop], choices)
        a_of, b_of = a[p, buckets.adapter], b[buckets.adapter, :, start:stop]
        h, dh = einsum("nti,nri->ntr", xs, a_of), einsum("nto,nro->ntr", dys, b_of)
        dweights.append(buckets.pick(jnp.sum(h * dh, axis=-1), chosen))
        weight = buckets.weights(weights[:, p])[..., None]
        h, dh = (h * weight).astype(x.dtype), (dh * weight).astype(x.dtype)
        dx += buckets.combine(einsum("ntr,nri->nti", dh, a_of), chosen)
        # blocks of the same adapter are added by a product with a matrix of zeros and ones
        member = jax.nn.one_hot(buckets.adapter, adapters, dtype=jnp.float32)
        total = functools.partial(einsum_float32, jnp.float32)
        da.append(total("na,nri->ari", member, einsum("ntr,nti->nri", dh, xs)))
        db.append(total("na,nro->aro", member, einsum("ntr,nto->nro", h, dys)))
    dweight = jnp.stack(dweights, axis=1).reshape(groups, tokens, *indices.shape[1:]).sum(axis=1)
    dx = dx.reshape(x.shape).astype(x.dtype)
    return dx, jnp.stack(da).astype(a.dtype), jnp.concatenate(db, axis=-1).astype(b.dtype), dweight
