"""XLA on any platform: one masked product, the chosen adapters alone, or tokens sorted by adapter.

`lax.ragged_dot` is not used: XLA may expand it on GPUs to a product with every group. Here each adapter's rows are
padded to whole blocks of `block` rows, and a block reads one adapter. The number of blocks has a static bound, so
nothing depends on how the routing falls, and every sum has a fixed order.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from pallas_kernels.routed_lora.reference import columns, einsum_float32

FEW_ROWS = 64  # tokens for which a product's operands cost more than its operations


def masked_expand(
    h: Float[Array, "M P A R"], b: Float[Array, "A R O"], base: Float[Array, "M O"], splits: tuple[int, ...]
) -> Float[Array, "M O"]:
    """`reference.expand` in 16 bit as one product a group; h is the weighted shrink, in b's dtype.

    Few tokens: every column for every projection, and then the own ones; b cut by columns would be copied. Many: B's
    columns of each projection on a diagonal of blocks, zeros elsewhere. That is P times the operations, but no slices
    of base and no concatenation, and the sum is the product's own (cuBLAS adds to float32 and rounds once; elsewhere
    the update is rounded to base's dtype first).
    """
    rows, projections = h.shape[:2]
    total = b.shape[2]
    if rows <= FEW_ROWS and projections > 1:
        every = jnp.einsum("mpar,aro->mpo", h, b, preferred_element_type=jnp.float32)
        own = [every[:, p, start:stop] for p, (start, stop) in enumerate(columns(splits))]
        return (base.astype(jnp.float32) + jnp.concatenate(own, axis=-1)).astype(base.dtype)
    flat = b.reshape(-1, total)
    blocks = flat
    if projections > 1:
        pieces = [jnp.pad(flat[:, i:j], ((0, 0), (i, total - j))) for i, j in columns(splits)]
        blocks = jnp.concatenate(pieces, axis=0)
    return base + jnp.einsum("mk,ko->mo", h.reshape(rows, -1), blocks)


def gathered_shrink(
    x: Float[Array, "G S I"], a: Float[Array, "P A R I"], chosen: Int32[Array, "G P1 C"]
) -> Float[Array, "G S P C R"]:
    """x through the A's of its group's choices, float32; bytes read: G * C adapters, whatever A is."""
    own = jnp.arange(a.shape[0], dtype=jnp.int32)[None, :, None]
    return einsum_float32(x.dtype, "gsi,gpcri->gspcr", x, a[own, chosen])


def gathered_expand(
    h: Float[Array, "G S P C R"],
    b: Float[Array, "A R O"],
    chosen: Int32[Array, "G P1 C"],
    weights: Float[Array, "G S1 P2 C"],
    scale: Float[Array, "G P C"],
    fused: Bool[Array, " G"] | None,
    base: Float[Array, "G S O"],
    splits: tuple[int, ...],
    runs: Int32[Array, " G"] | None = None,
) -> Float[Array, "G S O"]:
    """base + what the choices of each group of tokens add, LoraRetriever (arXiv 2402.09997), section 3.3:

        mixture (selection: C = 1)   sum_c w_c s_c h_c B_c
        fusion                       (sum_c w_c h_c) (sum_c w_c s_c B_c)

    h: float32, from `gathered_shrink`. weights, scale: float32, 0 for a choice that is none. fused: which groups'
    matrices are averaged; None: nobody's. runs: of these, so many choices in a row are parts of one adapter's ranks, of
    which each is averaged with the others' same part; None: 1. The choices lie side by side, so an update is a matmul
    of inner width C * R.
    """
    if fused is not None:
        mean = jnp.sum(h * weights[..., None], axis=3, keepdims=True)
        if runs is not None:
            part = jnp.arange(h.shape[3], dtype=jnp.int32)[None] % runs[:, None]
            same = (part[:, :, None] == part[:, None]).astype(h.dtype)
            mean = einsum_float32(jnp.float32, "gspcr,gcd->gspdr", h * weights[..., None], same)
        h = jnp.where(fused[:, None, None, None, None], mean, h)
    h = (h * (weights * scale[:, None])[..., None]).astype(b.dtype)
    taken = b[chosen]  # [G, P1, C, R, O]
    updates = [
        einsum_float32(b.dtype, "gscr,gcro->gso", h[:, :, p], taken[:, min(p, taken.shape[1] - 1), :, :, start:stop])
        for p, (start, stop) in enumerate(columns(splits))
    ]
    return (base.astype(jnp.float32) + jnp.concatenate(updates, axis=-1)).astype(base.dtype)


def gathered_lora(
    x: Float[Array, "G S I"],
    a: Float[Array, "P A R I"],
    b: Float[Array, "A R O"],
    indices: Int32[Array, "G P1 C"],
    weights: Float[Array, "G P C"],
    base: Float[Array, "G S O"],
    splits: tuple[int, ...],
) -> Float[Array, "G S O"]:
    """base + update; the weights include the scale, and are 0 where an index is NO_ADAPTER (-1)."""
    chosen = jnp.maximum(indices, 0)
    h = gathered_shrink(x, a, chosen)
    return gathered_expand(h, b, chosen, weights[:, None], jnp.ones_like(weights), None, base, splits)


def chosen_shrinks(
    shrink: Float[Array, "M P A R"],
    indices: Int32[Array, "M P1 C"],
    weights: Float[Array, "M P2 C"],
    scale: Float[Array, "P A"],
) -> tuple[Float[Array, "M P C R"], Int32[Array, "M P C"]]:
    """What acts on each token: shrinks times weight and scale, float32, and the adapters, -1 for a choice that adds
    nothing. Of an adapter that is named several times the last has the sum of them all."""
    projections, adapters = scale.shape
    shape = (*shrink.shape[:2], indices.shape[2])
    indices, weights = jnp.broadcast_to(indices, shape), jnp.broadcast_to(weights, shape)
    real = (indices >= 0) & (indices < adapters)
    safe = jnp.where(real, indices, 0)
    own = jnp.arange(projections, dtype=jnp.int32)[None, :, None]
    weights = jnp.where(real, weights * scale[own, safe], 0.0)
    chosen = jnp.where(weights != 0, indices, -1)
    h = jnp.take_along_axis(shrink, safe[..., None], axis=2, mode="promise_in_bounds") * weights[..., None]
    parts = []
    for c in range(shape[2]):
        same = (chosen[..., : c + 1] == chosen[..., c : c + 1])[..., None]
        parts.append(jnp.sum(jnp.where(same, h[..., : c + 1, :], 0.0), axis=2))
    return jnp.stack(parts, axis=2), chosen


def used_blocks(chosen: Int32[Array, "M P C"], rows: int, adapters: int) -> Int32[Array, "tiles P"]:
    """Which blocks of so many adapters, at most 31, are chosen in each tile of so many rows, a bit each."""
    bits = jnp.where(chosen < 0, 0, jnp.left_shift(1, jnp.maximum(chosen, 0) // adapters))
    bits = jnp.pad(bits, ((0, -len(bits) % rows), (0, 0), (0, 0))).reshape(-1, rows, *bits.shape[1:])
    return jax.lax.reduce(bits, jnp.int32(0), jax.lax.bitwise_or, (1, 3))


def block_rows(rows: int, adapters: int) -> int:
    """Rows of a block: the mean of an adapter's rows as a power of two, 8 to 128, so that padding at most doubles."""
    return max(8, min(128, 1 << (max(rows // max(adapters, 1), 1) - 1).bit_length()))


@dataclasses.dataclass(frozen=True)
class Buckets:
    """Rows (token, choice), numbered token * C + choice, sorted by adapter into N blocks of T.

    adapter: int32 [N], the adapter of each block. source: int32 [N, T], the row in each place.
    filled: bool [N, T], False in padding. place: int32 [rows], where each row went (in N * T).
    """

    adapter: jax.Array
    source: jax.Array
    filled: jax.Array
    place: jax.Array

    @classmethod
    def sort(cls, chosen: Int32[Array, " rows"], adapters: int, block: int) -> Buckets:
        """Rows that chose NO_ADAPTER (-1) are in no block; their `place` means nothing."""
        rows = chosen.shape[0]
        key = jnp.where(chosen < 0, adapters, chosen)
        order = jnp.argsort(key, stable=True).astype(jnp.int32)
        first = jnp.searchsorted(key[order], jnp.arange(adapters + 1, dtype=jnp.int32)).astype(jnp.int32)
        counts = first[1:] - first[:-1]
        blocks = (counts + block - 1) // block
        ends = jnp.cumsum(blocks).astype(jnp.int32)
        begins = ends - blocks
        # sum of ceil(count / block) <= rows / block + the adapters that have rows
        number = jnp.arange(rows // block + min(adapters, rows), dtype=jnp.int32)
        adapter = jnp.searchsorted(ends, number, side="right").astype(jnp.int32)
        used, adapter = adapter < adapters, jnp.minimum(adapter, adapters - 1)
        offset = ((number - begins[adapter]) * block)[:, None] + jnp.arange(block, dtype=jnp.int32)[None, :]
        filled = used[:, None] & (offset < counts[adapter][:, None])
        source = order[jnp.where(filled, first[adapter][:, None] + offset, 0)]
        rank = jnp.zeros((rows,), jnp.int32).at[order].set(jnp.arange(rows, dtype=jnp.int32), unique_indices=True)
        own = jnp.minimum(key, adapters - 1)
        place = jnp.where(chosen < 0, 0, begins[own] * block + rank - first[own])
        return cls(adapter, source, filled, place)

    def gather(self, tokens: Float[Array, "M W"], choices: int) -> Float[Array, "N T W"]:
        """The token of every place."""
        return tokens[self.source // choices]

    def weights(self, weights: Float[Array, "M C"]) -> Float[Array, "N T"]:
        """The weight of every place, 0 in padding."""
        return jnp.where(self.filled, weights.reshape(-1)[self.source], 0.0)

    def combine(self, values: Float[Array, "N T W"], chosen: Int32[Array, "M C"]) -> Float[Array, "M W"]:
        """float32: each token's sum over its choices."""
        taken = values.reshape(-1, values.shape[-1])[self.place].reshape(*chosen.shape, -1)
        return jnp.sum(jnp.where(chosen[..., None] < 0, 0.0, taken.astype(jnp.float32)), axis=1)

    def pick(self, values: Float[Array, "N T"], chosen: Int32[Array, "M C"]) -> Float[Array, "M C"]:
        """Each row's value, 0 for NO_ADAPTER."""
        return jnp.where(chosen < 0, 0.0, values.reshape(-1)[self.place].reshape(chosen.shape))


def spread(
    indices: Int32[Array, "G P C"], weights: Float[Array, "G P C"], tokens: int
) -> tuple[Int32[Array, "M P C"], Float[Array, "M P C"]]:
    """The routing of groups of `tokens` tokens, for each token of its own: M = G * tokens."""
    return jnp.repeat(indices, tokens, axis=0), jnp.repeat(weights, tokens, axis=0)


def grouped_lora(
    x: Float[Array, "G S I"],
    a: Float[Array, "P A R I"],
    b: Float[Array, "A R O"],
    indices: Int32[Array, "G P C"],
    weights: Float[Array, "G P C"],
    base: Float[Array, "G S O"],
    splits: tuple[int, ...],
) -> Float[Array, "G S O"]:
    """base + update; the weights include the scale, and are 0 where an index is NO_ADAPTER (-1).

    An update is rounded to x's dtype once for each choice, before the choices are added in float32.
    """
    einsum = functools.partial(einsum_float32, x.dtype)
    indices, weights = spread(indices, weights, x.shape[1])
    tokens, choices, adapters = x.reshape(-1, x.shape[-1]), indices.shape[2], a.shape[1]
    updates = []
    for p, (start, stop) in enumerate(columns(splits)):
        chosen = indices[:, p]
        buckets = Buckets.sort(chosen.reshape(-1), adapters, block_rows(chosen.size, adapters))
        h = einsum("nti,nri->ntr", buckets.gather(tokens, choices), a[p, buckets.adapter])
        h = (h * buckets.weights(weights[:, p])[..., None]).astype(x.dtype)
        y = einsum("ntr,nro->nto", h, b[buckets.adapter, :, start:stop]).astype(x.dtype)
        updates.append(buckets.combine(y, chosen))
    update = jnp.concatenate(updates, axis=-1).reshape(base.shape)
    return (base.astype(jnp.float32) + update).astype(base.dtype)
