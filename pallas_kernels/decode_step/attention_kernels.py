"""Attention of a decoding step: one token a row, over a cache that is a whole stack of layers.

For NVIDIA GPUs; timed on an H100 and an H200 (docs/performance.md). `triton_gpu.attend` launches the kernels.
"""

# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false, reportAssignmentType=false
# pyright: reportMissingImports=false, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# (Triton is optional, and a kernel is not Python: constants are upper case, blocks are no plain values)

import triton
import triton.language as tl


@triton.jit
def online_softmax(scores, seen, largest, total):
    """A running softmax after one more block of scores float32 [GP, BS], of which those `seen` count.

    largest, total: float32 [GP], the maximum so far and the sum of exp(score - maximum).

    Returns (the block's exp(score - maximum) [GP, BS], what earlier sums are times [GP], maximum, total).
    """
    scores = tl.where(seen, scores, -1e30)
    maximum = tl.maximum(largest, tl.max(scores, axis=1))
    weights = tl.where(seen, tl.exp(scores - maximum[:, None]), 0.0)
    rescale = tl.exp(largest - maximum)
    return weights, rescale, maximum, total * rescale + tl.sum(weights, axis=1)


@triton.jit
def over_total(y, total):
    """y divided by a softmax's total; 0 where nothing was seen."""
    return y / tl.where(total > 0, total, 1.0)


@triton.jit
def attend_kernel(
    layer_ptr,  # int32 [1]
    q_ptr,  # [M, N H]
    keys_ptr,  # [L, M, S, KV]
    values_ptr,  # [L, M, S, KV]
    position_ptr,  # int32 [M]: the position of each row's token
    slot_position_ptr,  # int32 [M, S]: the positions of the tokens in its slots, EMPTY for none
    used_ptr,  # int32 [1]: slots to look at
    y_ptr,  # [M, N H], or float32 [PARTS, M, N, H + 2]: sums, then maximum and total
    M: tl.constexpr, S: tl.constexpr, N: tl.constexpr, KV: tl.constexpr, H: tl.constexpr, G: tl.constexpr,
    GP: tl.constexpr, PARTS: tl.constexpr, PART: tl.constexpr, EMPTY: tl.constexpr, FACTOR: tl.constexpr,
    BS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Attention of N heads of H over the first `used` of S slots, for tokens at or before each row's own.

    Programs: rows; groups of G heads that share keys (GP: the next power of two); parts of PART slots, in blocks of
    BS. FACTOR: what the products of query and key are times.
    """
    layer = tl.load(layer_ptr).to(tl.int64)
    m = tl.program_id(0)
    head = tl.program_id(1)
    part = tl.program_id(2)
    used = tl.load(used_ptr)
    own = tl.load(position_ptr + m)
    group = tl.arange(0, GP)
    inside = (group < G)[:, None]
    width = tl.arange(0, H)
    q = tl.load(q_ptr + m * (N * H) + (head * G + group)[:, None] * H + width[None, :], mask=inside, other=0.0)
    keys_ptr += (layer * M + m) * (S * KV) + head * H
    values_ptr += (layer * M + m) * (S * KV) + head * H
    largest = tl.full((GP,), -1e30, tl.float32)
    total = tl.zeros((GP,), tl.float32)
    y = tl.zeros((GP, H), tl.float32)
    for s in tl.range(part * PART, tl.minimum(used, part * PART + PART), BS, num_stages=STAGES):
        slots = s + tl.arange(0, BS)
        position = tl.load(slot_position_ptr + m * S + slots, mask=slots < used, other=EMPTY)
        seen = (position != EMPTY) & (position <= own)
        k = tl.load(keys_ptr + slots[None, :] * KV + width[:, None], mask=(slots < used)[None, :], other=0.0)
        scores = tl.dot(q, k, input_precision="ieee") * FACTOR
        weights, rescale, largest, total = online_softmax(scores, seen[None, :], largest, total)
        v = tl.load(values_ptr + slots[:, None] * KV + width[None, :], mask=(slots < used)[:, None], other=0.0)
        y = tl.dot(weights.to(v.dtype), v, y * rescale[:, None], input_precision="ieee")
    heads = head * G + group
    if PARTS == 1:
        y = over_total(y, total[:, None])
        place = y_ptr + m * (N * H) + heads[:, None] * H + width[None, :]
        tl.store(place, y.to(y_ptr.dtype.element_ty), mask=inside)
    else:
        place = y_ptr + ((part * M + m) * N + heads) * (H + 2)
        tl.store(place[:, None] + width[None, :], y, mask=inside)
        tl.store(place + H, largest, mask=group < G)
        tl.store(place + H + 1, total, mask=group < G)


@triton.jit
def combine_kernel(
    parts_ptr,  # float32 [PARTS, M, N, H + 2]
    y_ptr,  # [M, N H]
    M: tl.constexpr, N: tl.constexpr, H: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """The sums of an attention's parts, each brought to the largest maximum and added. Programs: rows times heads."""
    place = tl.program_id(0)
    width = tl.arange(0, H)
    largest = -1e30
    for part in tl.static_range(PARTS):
        largest = tl.maximum(largest, tl.load(parts_ptr + (part * M * N + place) * (H + 2) + H))
    y = tl.zeros((H,), tl.float32)
    total = 0.0
    for part in tl.static_range(PARTS):
        source = parts_ptr + (part * M * N + place) * (H + 2)
        weight = tl.exp(tl.load(source + H) - largest)
        total += weight * tl.load(source + H + 1)
        y += weight * tl.load(source + width)
    y = over_total(y, total)
    tl.store(y_ptr + place * H + width, y.to(y_ptr.dtype.element_ty))
