"""The Triton kernel behind the product with gates and A's: choice, mask, expand, sum. `triton_gpu.py` launches it.

All shapes are compile-time constants (JAX knows them), arrays are dense in the order given. The columns of a
group are cut into blocks of BN that never cross from one projection to the next: `project` finds a block's place.
Sums are float32 in a fixed order; nothing is atomic.
"""

# Triton's types do not know that static_range is unrolled, not iterated.
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false

# pyright: reportMissingImports=false, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# (Triton is optional, and a kernel is not Python: constants are upper case, blocks are no plain values)

import triton
import triton.language as tl


@triton.jit
def project(block, SPLITS: tl.constexpr, BN: tl.constexpr):
    """(projection, first column of the block, first and end of the projection's columns) of a block of columns."""
    p = 0
    first = block * BN
    end = SPLITS[0]
    skipped = 0  # blocks of the projections before
    start = 0
    own = 0
    for i in tl.static_range(len(SPLITS) - 1):
        skipped += (SPLITS[i] + BN - 1) // BN
        start += SPLITS[i]
        here = block >= skipped
        p = tl.where(here, i + 1, p)
        first = tl.where(here, start + (block - skipped) * BN, first)
        own = tl.where(here, start, own)
        end = tl.where(here, start + SPLITS[i + 1], end)
    return p, first, own, end


@triton.jit
def masked_expand(
    y, h_ptr, b_ptr, adapters, weights, rows, columns, end,
    M: tl.constexpr, O: tl.constexpr, K: tl.constexpr, R: tl.constexpr, C: tl.constexpr, CP: tl.constexpr,
    ROW: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """y + (mask h) B over all K = A * R columns; h has rows of ROW, `adapters` and `weights` are [BM, CP]."""
    which = tl.arange(0, CP)
    for k in range(0, K, BK):
        ks = k + tl.arange(0, BK)
        inside = (rows < M)[:, None] & (ks < K)[None, :]
        h = tl.load(h_ptr + rows[:, None].to(tl.int64) * ROW + ks[None, :], mask=inside, other=0.0)
        weight = tl.zeros((BM, BK), tl.float32)
        for c in tl.static_range(C):
            adapter = tl.sum(tl.where(which[None, :] == c, adapters, 0), axis=1)
            own = tl.sum(tl.where(which[None, :] == c, weights, 0.0), axis=1)
            weight += tl.where((ks // R)[None, :] == adapter[:, None], own[:, None], 0.0)
        inside = (ks < K)[:, None] & (columns < end)[None, :]
        b = tl.load(b_ptr + ks[:, None].to(tl.int64) * O + columns[None, :], mask=inside, other=0.0)
        y = tl.dot((h * weight).to(b.dtype), b, y, input_precision="ieee")
    return y


@triton.jit
def choose(
    logit_ptr, count_ptr, temperature_ptr, rows, M: tl.constexpr, A: tl.constexpr, AP: tl.constexpr, C: tl.constexpr,
    CP: tl.constexpr, ROW: tl.constexpr, BM: tl.constexpr, factor=1.0,
):  # fmt: skip
    """(adapters, weights), each [BM, CP]: the C largest logits, ties to the lowest index, and their softmax.

    factor: what the logits are times, [BM, 1] or a number.
    """
    scores = tl.arange(0, AP)
    inside = (rows < M)[:, None] & (scores < A)[None, :]
    place = rows[:, None] * ROW + scores[None, :]
    logits = tl.load(logit_ptr + place, mask=inside, other=0.0, cache_modifier=".cg") * factor
    logits = tl.where((scores < A)[None, :], logits, float("-inf"))
    count = tl.load(count_ptr + rows, mask=rows < M, other=0)
    temperature = tl.load(temperature_ptr + rows, mask=rows < M, other=1.0)
    which = tl.arange(0, CP)
    adapters = tl.full((BM, CP), -1, tl.int32)
    values = tl.full((BM, CP), float("-inf"), tl.float32)
    best = tl.max(logits, axis=1)
    for c in tl.static_range(C):
        value = tl.max(logits, axis=1)
        adapter = tl.min(tl.where(logits == value[:, None], scores[None, :], AP), axis=1)
        logits = tl.where(scores[None, :] == adapter[:, None], float("-inf"), logits)
        here = (which == c)[None, :] & (count > c)[:, None]
        adapters = tl.where(here, adapter[:, None], adapters)
        values = tl.where(here, ((value - best) / temperature)[:, None], values)
    weights = tl.exp(values)
    total = tl.sum(weights, axis=1)
    return adapters, weights / tl.where(total > 0, total, 1.0)[:, None]


@triton.jit
def gated_expand_kernel(
    h_ptr,  # float32 [M, P, W]: the gates' logits in columns 0 .. A, the shrink from column FIRST on
    b_ptr,  # [K, O], K = A * R
    scale_ptr,  # float32 [P, A]
    count_ptr,  # int32 [M]: how many adapters a row takes
    temperature_ptr,  # float32 [M]
    base_ptr,  # [M, O]
    y_ptr,  # [M, O]
    index_ptr,  # int32 [M, P, C], written
    weight_ptr,  # float32 [M, P, C], written; without the scale
    M: tl.constexpr,
    O: tl.constexpr,
    A: tl.constexpr,
    AP: tl.constexpr,
    K: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    CP: tl.constexpr,
    W: tl.constexpr,
    FIRST: tl.constexpr,
    SPLITS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Top-k of the logits (ties to the lowest index), softmax, mask, expand, add: one launch behind the product."""
    p, first, start, end = project(tl.program_id(0), SPLITS, BN)
    P: tl.constexpr = len(SPLITS)
    rows = tl.program_id(1) * BM + tl.arange(0, BM)
    columns = first + tl.arange(0, BN)
    h_ptr += p * W
    adapters, weights = choose(h_ptr, count_ptr, temperature_ptr, rows, M, A, AP, C, CP, P * W, BM)
    which = tl.arange(0, CP)
    choice = (rows[:, None] * P + p) * C + which[None, :]
    inside = (rows < M)[:, None] & (which < C)[None, :] & (first == start)  # one block writes
    tl.store(index_ptr + choice, adapters, mask=inside)
    tl.store(weight_ptr + choice, weights, mask=inside)
    weights *= tl.load(scale_ptr + p * A + tl.maximum(adapters, 0))
    place = rows[:, None].to(tl.int64) * O + columns[None, :]
    inside = (rows < M)[:, None] & (columns < end)[None, :]
    y = tl.load(base_ptr + place, mask=inside, other=0.0).to(tl.float32)
    y = masked_expand(y, h_ptr + FIRST, b_ptr, adapters, weights, rows, columns, end, M, O, K, R, C, CP, P * W, BM, BK)
    tl.store(y_ptr + place, y.to(y_ptr.dtype.element_ty), mask=inside)
