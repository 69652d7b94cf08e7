"""Which adapters act by scores of their shrinks, in a decoding step: one launch between a product and its epilogue.

For NVIDIA GPUs; not timed yet. `choosing.py` launches it.
"""

# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false, reportAssignmentType=false
# pyright: reportMissingImports=false, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# (Triton is optional, and a kernel is not Python: constants are upper case, blocks are no plain values)

import triton
import triton.language as tl

from pallas_kernels.decode_step.adapter_kernels import load_sum, rms_factor
from pallas_kernels.topk_gating.triton_kernels import column, softmax_of_largest


@triton.jit
def arrow_scores(h, arrow_ptr, adapters, ranks, inside, R: tl.constexpr):
    """float32 [AP]: |v_a . h_a| of shrinks h [AP, RP]. arrow_ptr: a projection's v, float32 [A, R]."""
    v = tl.load(arrow_ptr + adapters[:, None] * R + ranks[None, :], mask=inside, other=0.0)
    return tl.abs(tl.sum(v * h, axis=1))


@triton.jit
def spectr_scores(
    h, spectr_ptr, adapters, ranks, inside, R: tl.constexpr, AP: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """float32 [AP]: ||S_a h_a|| of shrinks h [AP, RP], BS rows of every S at a time. spectr_ptr: a projection's S,
    float32 [A, R, R]."""
    total = tl.zeros((AP,), tl.float32)
    for start in tl.range(0, R, BS):
        rows = start + tl.arange(0, BS)
        place = (adapters[:, None, None] * R + rows[None, :, None]) * R + ranks[None, None, :]
        s = tl.load(spectr_ptr + place, mask=inside[:, None, :] & (rows < R)[None, :, None], other=0.0)
        y = tl.sum(s * h[:, None, :], axis=2)
        total += tl.sum(y * y, axis=1)
    return tl.sqrt(total)


@triton.jit
def rank_kernel(
    layer_ptr,  # int32 [1]
    product_ptr,  # float32 [at least M, ROW], or SPLITS summands of it; projection p's shrinks from START + p PACKED on
    square_ptr,  # float32 [M, PARTS], squares of the residual stream before the norm, if NORM
    scale_ptr,  # float32 [L, P, A], 0 where an adapter has no part
    arrow_ptr,  # float32 [L, P, A, R], if ARROW
    spectr_ptr,  # float32 [L, P, A, R, R], if SPECTR
    allowed_ptr,  # int32 [M, A], not 0 where an adapter may be chosen, if ALLOWED
    candidate_ptr,  # int32 [M]: so many of the best by Arrow's score are ranked by SpectR's, if both
    count_ptr,  # int32 [M], how many act on a row, at most C
    temperature_ptr,  # float32 [M]
    index_ptr,  # int32 [M, P, C], written
    weight_ptr,  # float32 [M, P, C], written
    M: tl.constexpr, I: tl.constexpr, P: tl.constexpr, NORM: tl.constexpr, EPS: tl.constexpr, PARTS: tl.constexpr,
    ROW: tl.constexpr, SPLITS: tl.constexpr, START: tl.constexpr, PACKED: tl.constexpr, A: tl.constexpr,
    AP: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, C: tl.constexpr, CP: tl.constexpr, ARROW: tl.constexpr,
    SPECTR: tl.constexpr, ALLOWED: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """The best adapters of each row and projection and the softmax of their scores; what may not act is no choice.

    Grid: rows, P. AP, RP, CP: A, R and C, rounded up to powers of two.
    """
    layer = tl.load(layer_ptr).to(tl.int64)
    row = tl.program_id(0)
    p = tl.program_id(1)
    adapters = tl.arange(0, AP)
    ranks = tl.arange(0, RP)
    real = adapters < A
    inside = real[:, None] & (ranks < R)[None, :]
    first = (layer * P + p) * A
    place = product_ptr + row * ROW + START + p * PACKED + adapters[:, None] * R + ranks[None, :]
    h = load_sum(place, inside, M, ROW, SPLITS)
    if NORM:
        h *= tl.sum(rms_factor(square_ptr, row + tl.zeros((1,), tl.int32), M, I, PARTS, EPS))
    may = tl.load(scale_ptr + first + adapters, mask=real, other=0.0) != 0
    if ALLOWED:
        may = may & (tl.load(allowed_ptr + row * A + adapters, mask=real, other=0) != 0)
    least = -3e38  # of what must not be chosen: finite, for a softmax over it alone
    if ARROW:
        scores = arrow_scores(h, arrow_ptr + first * R, adapters, ranks, inside, R)
    if SPECTR:
        if ARROW:
            before = tl.where(may, scores, least)
            better = before[None, :] > before[:, None]
            better = better | ((before[None, :] == before[:, None]) & (adapters[None, :] < adapters[:, None]))
            better = better & real[None, :]
            may = may & (tl.sum(better.to(tl.int32), axis=1) < tl.load(candidate_ptr + row))
        scores = spectr_scores(h, spectr_ptr + first * R * R, adapters, ranks, inside, R, AP, BS)
    scores = tl.where(may, scores, least)
    scores = tl.where(real, scores, float("-inf"))[None, :]
    count = tl.load(count_ptr + row + tl.zeros((1,), tl.int32))
    temperature = tl.load(temperature_ptr + row + tl.zeros((1,), tl.int32))
    chosen, weights = softmax_of_largest(scores, count, temperature, A, AP, C, CP, 1)
    which = tl.arange(0, CP)
    acts = tl.zeros((1, CP), tl.int32)
    for c in tl.static_range(C):
        own = adapters == tl.sum(column(chosen, c, CP), axis=0)
        acts = tl.where((which == c)[None, :], tl.max((own & may).to(tl.int32), axis=0), acts)
    place = (row * P + p) * C + which[None, :]
    tl.store(index_ptr + place, tl.where(acts > 0, chosen, -1), mask=(which < C)[None, :])
    tl.store(weight_ptr + place, tl.where(acts > 0, weights, 0.0), mask=(which < C)[None, :])
