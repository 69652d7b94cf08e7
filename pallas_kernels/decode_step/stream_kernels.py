"""The gates' own stream in Triton, one token a row through one layer; see `stream_gpu`, which launches it.

Formulas: meteora_jax.routing.memory. A row's vectors are two halves, as its rotary embedding turns them.
"""

# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false, reportAssignmentType=false
# pyright: reportMissingImports=false, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# (Triton is optional, and a kernel is not Python: constants are upper case, blocks are no plain values)

import triton
import triton.language as tl

from pallas_kernels.decode_step.triton_kernels import rms_factor


@triton.jit
def normed(u0, u1, dtype: tl.constexpr, E: tl.constexpr):
    """u / rms(u) rounded to dtype, as float32 halves."""
    factor = tl.rsqrt((tl.sum(u0 * u0, axis=0) + tl.sum(u1 * u1, axis=0)) / E + 1e-6)
    return (u0 * factor).to(dtype).to(tl.float32), (u1 * factor).to(dtype).to(tl.float32)


@triton.jit
def columns_of(w_ptr, c0, c1, dtype: tl.constexpr, E: tl.constexpr, EH: tl.constexpr, ROW, COUNT, B: tl.constexpr):
    """[B]: c times the first COUNT columns at w_ptr of a matrix [E, ROW]."""
    half = tl.arange(0, EH)
    column = tl.arange(0, B)
    inside = (half < E // 2)[:, None] & (column < COUNT)[None, :]
    place = w_ptr + half[:, None] * ROW + column[None, :]
    w0 = tl.load(place, mask=inside, other=0.0).to(dtype).to(tl.float32)
    w1 = tl.load(place + (E // 2) * ROW, mask=inside, other=0.0).to(dtype).to(tl.float32)
    return tl.sum(c0[:, None] * w0 + c1[:, None] * w1, axis=0)


@triton.jit
def own_vector(y_ptr, w_ptr, c0, c1, factor, dtype: tl.constexpr, E: tl.constexpr, EH: tl.constexpr):
    """The halves of a query, key or value, rounded: what the layer's input (at y_ptr) and the stream give it."""
    half = tl.arange(0, EH)
    inside = half < E // 2
    z0 = tl.load(y_ptr + half, mask=inside, other=0.0) * factor
    z1 = tl.load(y_ptr + E // 2 + half, mask=inside, other=0.0) * factor
    z0 += columns_of(w_ptr, c0, c1, dtype, E, EH, 3 * E, E // 2, EH)
    z1 += columns_of(w_ptr + E // 2, c0, c1, dtype, E, EH, 3 * E, E // 2, EH)
    return z0.to(dtype).to(tl.float32), z1.to(dtype).to(tl.float32)


@triton.jit
def turned(z0, z1, cos, sin, dtype: tl.constexpr):
    """The halves turned and rounded."""
    return (z0 * cos - z1 * sin).to(dtype).to(tl.float32), (z1 * cos + z0 * sin).to(dtype).to(tl.float32)


@triton.jit
def slots_from(
    s, end, keys_ptr, values_ptr, position_ptr, E: tl.constexpr, EH: tl.constexpr, EMPTY: tl.constexpr, BS: tl.constexpr
):
    """The positions [BS] of the slots from s on, EMPTY from `end` on, and the halves [BS, EH] of their keys, values."""
    slots = s + tl.arange(0, BS)
    half = tl.arange(0, EH)
    position = tl.load(position_ptr + slots, mask=slots < end, other=EMPTY)
    place = slots[:, None] * E + half[None, :]
    inside = (slots < end)[:, None] & (half < E // 2)[None, :]
    k0 = tl.load(keys_ptr + place, mask=inside, other=0.0)
    k1 = tl.load(keys_ptr + place + E // 2, mask=inside, other=0.0)
    v0 = tl.load(values_ptr + place, mask=inside, other=0.0)
    v1 = tl.load(values_ptr + place + E // 2, mask=inside, other=0.0)
    return position, k0, k1, v0, v1


@triton.jit
def stream_kernel(
    layer_ptr,  # int32 [1]
    y_ptr,  # float32 [at least M, ROW]: from column FIRST on x read [4, E], not yet times the norm's factor
    square_ptr,  # float32 [M, NS]: of the residual stream before the norm
    u_ptr,  # float32 [M, E]: of the layer before
    own_ptr,  # [L, E, 3, E]
    out_ptr,  # [L, E, Z]
    bias_ptr,  # float32 [L, Z], if BIASED
    cos_ptr,  # float32 [M, E / 2]
    sin_ptr,  # float32 [M, E / 2]
    token_ptr,  # int32 [M]: the position of each row's token
    position_ptr,  # int32 [M, S]: those of its slots, EMPTY for none
    slot_ptr,  # int32 [1]: the token's own; slots before it are looked at
    keys_in, values_in, arrived_in,  # the last three outputs before this launch
    u_out,  # float32 [M, E], written
    logit_ptr,  # float32 [M, Z], written
    part_ptr,  # float32 [M, PARTS + 1, E + 2], written: sums, then maximum and total
    keys_ptr,  # [L, M, S, E], a slot of it written
    values_ptr,  # [L, M, S, E], likewise
    arrived_ptr,  # int32 [at least M], 0 before and after
    M: tl.constexpr, I: tl.constexpr, ROW: tl.constexpr, FIRST: tl.constexpr, S: tl.constexpr, E: tl.constexpr,
    EH: tl.constexpr, Z: tl.constexpr, EPS: tl.constexpr, NS: tl.constexpr, NSP: tl.constexpr, BIASED: tl.constexpr,
    PARTS: tl.constexpr, PART: tl.constexpr, PP: tl.constexpr, EMPTY: tl.constexpr, FACTOR: tl.constexpr,
    BS: tl.constexpr, BZ: tl.constexpr,
):  # fmt: skip
    """The stream through one layer: a program a row and part of the slots, and one for its token's own slot. Whoever
    ends last of a row adds the parts in their order, so that nothing waits and sums repeat."""
    dtype = keys_ptr.dtype.element_ty
    layer = tl.load(layer_ptr).to(tl.int64)
    m = tl.program_id(0)
    part = tl.program_id(1)
    half = tl.arange(0, EH)
    inside = half < E // 2
    slot = tl.load(slot_ptr)
    token = tl.load(token_ptr + m)
    keys_ptr += (layer * M + m) * (S * E)
    values_ptr += (layer * M + m) * (S * E)
    position_ptr += m * S
    # what waits for nothing is asked for first
    s = part * PART
    end = tl.minimum(slot, s + PART)
    position, k0, k1, v0, v1 = slots_from(s, end, keys_ptr, values_ptr, position_ptr, E, EH, EMPTY, BS)
    u0 = tl.load(u_ptr + m * E + half, mask=inside, other=0.0)
    u1 = tl.load(u_ptr + m * E + E // 2 + half, mask=inside, other=0.0)
    cos = tl.load(cos_ptr + m * (E // 2) + half, mask=inside, other=1.0)
    sin = tl.load(sin_ptr + m * (E // 2) + half, mask=inside, other=0.0)
    row = m + tl.zeros((1,), tl.int32)
    factor = tl.sum(tl.sum(rms_factor(square_ptr, row, M, I, NS, NSP, EPS), axis=1), axis=0)
    y_ptr += m * ROW + FIRST
    own_ptr += layer * (3 * E * E)
    c0, c1 = normed(u0, u1, dtype, E)
    q0, q1 = own_vector(y_ptr, own_ptr, c0, c1, factor, dtype, E, EH)
    q0, q1 = turned(q0, q1, cos, sin, dtype)
    place = part_ptr + (m * (PARTS + 1) + part) * (E + 2)
    if part < PARTS:
        # each slot of a block keeps its own maximum and sums: warps meet once, behind the last block
        largest = tl.full((BS,), -1e30, tl.float32)
        total = tl.zeros((BS,), tl.float32)
        y0 = tl.zeros((BS, EH), tl.float32)
        y1 = tl.zeros((BS, EH), tl.float32)
        for start in tl.range(s, end, BS):
            seen = (position != EMPTY) & (position <= token)
            score = tl.sum(k0.to(tl.float32) * q0[None, :] + k1.to(tl.float32) * q1[None, :], axis=1) * FACTOR
            score = tl.where(seen, score, -1e30)
            now = tl.maximum(largest, score)
            weight = tl.where(seen, tl.exp(score - now), 0.0)
            kept = tl.exp(largest - now)
            total = total * kept + weight
            y0 = y0 * kept[:, None] + weight[:, None] * v0.to(tl.float32)
            y1 = y1 * kept[:, None] + weight[:, None] * v1.to(tl.float32)
            largest = now
            position, k0, k1, v0, v1 = slots_from(start + BS, end, keys_ptr, values_ptr, position_ptr, E, EH, EMPTY, BS)
        most = tl.max(largest, axis=0)
        weight = tl.exp(largest - most)
        tl.store(place + half, tl.sum(y0 * weight[:, None], axis=0), mask=inside)
        tl.store(place + E // 2 + half, tl.sum(y1 * weight[:, None], axis=0), mask=inside)
        tl.store(place + E, most)
        tl.store(place + E + 1, tl.sum(total * weight, axis=0))
    else:
        a0, a1 = own_vector(y_ptr + E, own_ptr + E, c0, c1, factor, dtype, E, EH)
        a0, a1 = turned(a0, a1, cos, sin, dtype)
        b0, b1 = own_vector(y_ptr + 2 * E, own_ptr + 2 * E, c0, c1, factor, dtype, E, EH)
        at = slot.to(tl.int64) * E + half
        tl.store(keys_ptr + at, a0.to(dtype), mask=inside)
        tl.store(keys_ptr + at + E // 2, a1.to(dtype), mask=inside)
        tl.store(values_ptr + at, b0.to(dtype), mask=inside)
        tl.store(values_ptr + at + E // 2, b1.to(dtype), mask=inside)
        there = token != EMPTY
        score = tl.sum(q0 * a0 + q1 * a1, axis=0) * FACTOR
        tl.store(place + half, tl.where(there, b0, 0.0), mask=inside)
        tl.store(place + E // 2 + half, tl.where(there, b1, 0.0), mask=inside)
        tl.store(place + E, tl.where(there, score, -1e30))
        tl.store(place + E + 1, tl.where(there, 1.0, 0.0))
    tl.debug_barrier()  # all of this program's part is written before it says so
    arrived = tl.atomic_add(arrived_ptr + m, 1, sem="acq_rel")
    if arrived == PARTS:
        tl.store(arrived_ptr + m, 0)
        parts = tl.arange(0, PP)
        source = part_ptr + (m * (PARTS + 1) + parts) * (E + 2)
        own = parts <= PARTS
        largest = tl.load(source + E, mask=own, other=-1e30, cache_modifier=".cg")
        total = tl.load(source + E + 1, mask=own, other=0.0, cache_modifier=".cg")
        wide = own[:, None] & inside[None, :]
        y0 = tl.load(source[:, None] + half[None, :], mask=wide, other=0.0, cache_modifier=".cg")
        y1 = tl.load(source[:, None] + (E // 2 + half)[None, :], mask=wide, other=0.0, cache_modifier=".cg")
        x0 = tl.load(y_ptr + 3 * E + half, mask=inside, other=0.0)
        x1 = tl.load(y_ptr + 3 * E + E // 2 + half, mask=inside, other=0.0)
        weight = tl.exp(largest - tl.max(largest, axis=0))
        whole = tl.sum(total * weight, axis=0)
        weight = weight / tl.where(whole > 0, whole, 1.0)
        u0 += x0 * factor + tl.sum(y0 * weight[:, None], axis=0).to(dtype).to(tl.float32)
        u1 += x1 * factor + tl.sum(y1 * weight[:, None], axis=0).to(dtype).to(tl.float32)
        tl.store(u_out + m * E + half, u0, mask=inside)
        tl.store(u_out + m * E + E // 2 + half, u1, mask=inside)
        c0, c1 = normed(u0, u1, dtype, E)
        out_ptr += layer * (E * Z)
        column = tl.arange(0, BZ)
        for z in tl.range(0, Z, BZ, num_stages=1):
            logits = columns_of(out_ptr + z, c0, c1, dtype, E, EH, Z, Z - z, BZ)
            if BIASED:
                logits += tl.load(bias_ptr + layer * Z + z + column, mask=column < Z - z, other=0.0)
            tl.store(logit_ptr + m * Z + z + column, logits, mask=column < Z - z)
