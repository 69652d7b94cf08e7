"""The Triton kernels: shrink, expand, both at once, and the gates' choice. `triton_gpu.py` launches them.

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
def shrink_row(
    x_ptr, a_ptr, begin,
    I: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, BK: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """[RP] = A [R, I] @ x [I] over PART columns from `begin` on."""
    ranks = tl.arange(0, RP)
    h = tl.zeros((RP, BK), tl.float32)
    for k in range(0, PART, BK):
        ks = begin + k + tl.arange(0, BK)
        x = tl.load(x_ptr + ks, mask=ks < I, other=0.0).to(tl.float32)
        inside = (ranks < R)[:, None] & (ks < I)[None, :]
        a = tl.load(a_ptr + ranks[:, None] * I + ks[None, :], mask=inside, other=0.0).to(tl.float32)
        h += a * x[None, :]
    return tl.sum(h, axis=1)


@triton.jit
def fused_kernel(
    x_ptr,  # [G, I]
    a_ptr,  # [P, A, R, I]
    b_ptr,  # [A, R, O]
    index_ptr,  # [G, P, C]
    weight_ptr,  # [G, P, C]
    base_ptr,  # [G, O]
    y_ptr,  # [G, O]
    I: tl.constexpr,
    O: tl.constexpr,
    A: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    SPLITS: tl.constexpr,
    RP: tl.constexpr,
    BK: tl.constexpr,
    BN: tl.constexpr,
):
    """Shrink and expand in one launch: every block of columns computes the shrink of its chosen adapters again."""
    p, first, _, end = project(tl.program_id(0), SPLITS, BN)
    g = tl.program_id(1)
    columns = first + tl.arange(0, BN)
    ranks = tl.arange(0, RP)
    y = tl.load(base_ptr + g * O + columns, mask=columns < end, other=0.0).to(tl.float32)
    for c in range(C):
        choice = (g * len(SPLITS) + p) * C + c
        adapter = tl.load(index_ptr + choice).to(tl.int64)
        if adapter >= 0:
            h = shrink_row(x_ptr + g * I, a_ptr + (p * A + adapter) * R * I, 0, I, R, RP, BK, I)
            h = (h * tl.load(weight_ptr + choice)).to(b_ptr.dtype.element_ty).to(tl.float32)
            inside = (ranks < R)[:, None] & (columns < end)[None, :]
            b = tl.load(b_ptr + (adapter * R + ranks)[:, None] * O + columns[None, :], mask=inside, other=0.0)
            y += tl.sum(h[:, None] * b.to(tl.float32), axis=0)
    tl.store(y_ptr + g * O + columns, y.to(y_ptr.dtype.element_ty), mask=columns < end)


@triton.jit
def gathered_shrink_kernel(
    x_ptr,  # [G, S, I]
    a_ptr,  # [P, A, R, I]
    index_ptr,  # [G, P, C]
    h_ptr,  # float32 [PARTS, G, P, C, S, R]; nothing is written for NO_ADAPTER
    G: tl.constexpr,
    S: tl.constexpr,
    I: tl.constexpr,
    A: tl.constexpr,
    R: tl.constexpr,
    P: tl.constexpr,
    C: tl.constexpr,
    RP: tl.constexpr,
    BS: tl.constexpr,
    BK: tl.constexpr,
    PART: tl.constexpr,
):
    """x A^T of the chosen adapters; the sum over I comes in parts of PART columns, a program for each."""
    choice = tl.program_id(0)  # (g * P + p) * C + c
    part = tl.program_id(2)
    g = choice // (P * C)
    p = choice // C % P
    adapter = tl.load(index_ptr + choice).to(tl.int64)
    if adapter >= 0:
        begin = part * PART
        ranks = tl.arange(0, RP)
        a_ptr += (p * A + adapter) * R * I
        h_ptr += (part * G * P * C + choice).to(tl.int64) * S * R
        if BS == 1:
            h = shrink_row(x_ptr + g * I, a_ptr, begin, I, R, RP, BK, PART)
            tl.store(h_ptr + ranks, h, mask=ranks < R)
        else:
            rows = tl.program_id(1) * BS + tl.arange(0, BS)
            x_ptr += g.to(tl.int64) * S * I
            acc = tl.zeros((BS, RP), tl.float32)
            for k in range(0, PART, BK):
                ks = begin + k + tl.arange(0, BK)
                inside = (rows < S)[:, None] & (ks < I)[None, :]
                x = tl.load(x_ptr + rows[:, None] * I + ks[None, :], mask=inside, other=0.0)
                inside = (ranks < R)[None, :] & (ks < I)[:, None]
                a = tl.load(a_ptr + ranks[None, :] * I + ks[:, None], mask=inside, other=0.0)
                acc = tl.dot(x, a, acc, input_precision="ieee")
            inside = (rows < S)[:, None] & (ranks < R)[None, :]
            tl.store(h_ptr + rows[:, None] * R + ranks[None, :], acc, mask=inside)


@triton.jit
def gathered_expand_kernel(
    h_ptr,  # float32 [PARTS, G, P, C, S, R]
    b_ptr,  # [A, R, O]
    index_ptr,  # [G, P, C]
    weight_ptr,  # [G, P, C]
    base_ptr,  # [G, S, O]
    y_ptr,  # [G, S, O]
    G: tl.constexpr,
    S: tl.constexpr,
    O: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    SPLITS: tl.constexpr,
    PARTS: tl.constexpr,
    RP: tl.constexpr,
    BS: tl.constexpr,
    BN: tl.constexpr,
):
    """y = base + sum_c (weight h) B of the chosen adapters; B is not read for NO_ADAPTER."""
    p, first, _, end = project(tl.program_id(0), SPLITS, BN)
    P: tl.constexpr = len(SPLITS)
    g = tl.program_id(1)
    rows = tl.program_id(2) * BS + tl.arange(0, BS)
    columns = first + tl.arange(0, BN)
    ranks = tl.arange(0, RP)
    place = (g * S + rows).to(tl.int64)[:, None] * O + columns[None, :]
    inside = (rows < S)[:, None] & (columns < end)[None, :]
    y = tl.load(base_ptr + place, mask=inside, other=0.0).to(tl.float32)
    h_inside = (rows < S)[:, None] & (ranks < R)[None, :]
    for c in range(C):
        choice = (g * P + p) * C + c
        adapter = tl.load(index_ptr + choice).to(tl.int64)
        if adapter >= 0:
            h = tl.zeros((BS, RP), tl.float32)
            for part in range(PARTS):
                row = h_ptr + (part * G * P * C + choice).to(tl.int64) * S * R
                h += tl.load(row + rows[:, None] * R + ranks[None, :], mask=h_inside, other=0.0)
            h = (h * tl.load(weight_ptr + choice)).to(b_ptr.dtype.element_ty)
            b_inside = (ranks < R)[:, None] & (columns < end)[None, :]
            b = tl.load(b_ptr + (adapter * R + ranks)[:, None] * O + columns[None, :], mask=b_inside, other=0.0)
            if BS == 1:
                h_row = tl.sum(h.to(tl.float32), axis=0)
                y += tl.sum(h_row[:, None] * b.to(tl.float32), axis=0)[None, :]
            else:
                y = tl.dot(h, b, y, input_precision="ieee")
    tl.store(y_ptr + place, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def slim_kernel(
    x_ptr,  # [M, I]
    slim_ptr,  # [N, I]
    h_ptr,  # float32 [PARTS, M, N]
    M: tl.constexpr,
    I: tl.constexpr,
    N: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PART: tl.constexpr,
):
    """x slim^T for few rows, the sum over I in parts: all gates and all A of a group in one pass."""
    part = tl.program_id(1)
    rows = tl.program_id(2) * BM + tl.arange(0, BM)
    columns = tl.program_id(0) * BN + tl.arange(0, BN)
    acc = tl.zeros((BM, BN), tl.float32)
    for k in range(0, PART, BK):
        ks = part * PART + k + tl.arange(0, BK)
        inside = (rows < M)[:, None] & (ks < I)[None, :]
        x = tl.load(x_ptr + rows[:, None] * I + ks[None, :], mask=inside, other=0.0)
        inside = (columns < N)[None, :] & (ks < I)[:, None]
        slim = tl.load(slim_ptr + columns[None, :].to(tl.int64) * I + ks[:, None], mask=inside, other=0.0)
        acc = tl.dot(x, slim, acc, input_precision="ieee")
    place = (part * M + rows)[:, None] * N + columns[None, :]
    tl.store(h_ptr + place, acc, mask=(rows < M)[:, None] & (columns < N)[None, :])


@triton.jit
def masked_expand(
    y, h_ptr, b_ptr, adapters, weights, rows, columns, end,
    M: tl.constexpr, O: tl.constexpr, K: tl.constexpr, R: tl.constexpr, C: tl.constexpr, CP: tl.constexpr,
    ROW: tl.constexpr, PARTS: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """y + (mask h) B over all K = A * R columns; h has rows of ROW, `adapters` and `weights` are [BM, CP]."""
    which = tl.arange(0, CP)
    for k in range(0, K, BK):
        ks = k + tl.arange(0, BK)
        inside = (rows < M)[:, None] & (ks < K)[None, :]
        h = tl.zeros((BM, BK), tl.float32)
        for part in range(PARTS):
            h += tl.load(h_ptr + (part * M + rows)[:, None].to(tl.int64) * ROW + ks[None, :], mask=inside, other=0.0)
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
def dense_expand_kernel(
    h_ptr,  # float32 [M, P, K]
    b_ptr,  # [K, O], K = A * R
    index_ptr,  # [M, P, C]
    weight_ptr,  # [M, P, C]
    base_ptr,  # [M, O]
    y_ptr,  # [M, O]
    M: tl.constexpr,
    O: tl.constexpr,
    K: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    CP: tl.constexpr,
    SPLITS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """y = base + (mask h) B with every adapter's B, on tensor cores; B is read once for BM rows."""
    p, first, _, end = project(tl.program_id(1), SPLITS, BN)
    P: tl.constexpr = len(SPLITS)
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    columns = first + tl.arange(0, BN)
    which = tl.arange(0, CP)
    inside = (rows < M)[:, None] & (which < C)[None, :]
    choice = (rows[:, None] * P + p) * C + which[None, :]
    adapters = tl.load(index_ptr + choice, mask=inside, other=-1)
    weights = tl.load(weight_ptr + choice, mask=inside, other=0.0)
    place = rows[:, None].to(tl.int64) * O + columns[None, :]
    inside = (rows < M)[:, None] & (columns < end)[None, :]
    y = tl.load(base_ptr + place, mask=inside, other=0.0).to(tl.float32)
    y = masked_expand(
        y, h_ptr + p * K, b_ptr, adapters, weights, rows, columns, end, M, O, K, R, C, CP, P * K, 1, BM, BK
    )
    tl.store(y_ptr + place, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def choose(
    logit_ptr, count_ptr, temperature_ptr, rows, M: tl.constexpr, A: tl.constexpr, AP: tl.constexpr, C: tl.constexpr,
    CP: tl.constexpr, ROW: tl.constexpr, PARTS: tl.constexpr, BM: tl.constexpr, factor=1.0,
):  # fmt: skip
    """(adapters, weights), each [BM, CP]: the C largest logits, ties to the lowest index, and their softmax.

    factor: what the logits are times, [BM, 1] or a number.
    """
    scores = tl.arange(0, AP)
    inside = (rows < M)[:, None] & (scores < A)[None, :]
    logits = tl.zeros((BM, AP), tl.float32)
    for part in range(PARTS):
        place = (part * M + rows)[:, None] * ROW + scores[None, :]
        logits += tl.load(logit_ptr + place, mask=inside, other=0.0, cache_modifier=".cg")
    logits *= factor
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
    h_ptr,  # float32 [PARTS, M, P, W]: the gates' logits in columns 0 .. A, the shrink from column FIRST on
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
    PARTS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Top-k of the logits (ties to the lowest index), softmax, mask, expand, add: one launch after the slim product."""
    p, first, start, end = project(tl.program_id(0), SPLITS, BN)
    P: tl.constexpr = len(SPLITS)
    rows = tl.program_id(1) * BM + tl.arange(0, BM)
    columns = first + tl.arange(0, BN)
    h_ptr += p * W
    adapters, weights = choose(h_ptr, count_ptr, temperature_ptr, rows, M, A, AP, C, CP, P * W, PARTS, BM)
    which = tl.arange(0, CP)
    choice = (rows[:, None] * P + p) * C + which[None, :]
    inside = (rows < M)[:, None] & (which < C)[None, :] & (first == start)  # one block writes
    tl.store(index_ptr + choice, adapters, mask=inside)
    tl.store(weight_ptr + choice, weights, mask=inside)
    weights *= tl.load(scale_ptr + p * A + tl.maximum(adapters, 0))
    place = rows[:, None].to(tl.int64) * O + columns[None, :]
    inside = (rows < M)[:, None] & (columns < end)[None, :]
    y = tl.load(base_ptr + place, mask=inside, other=0.0).to(tl.float32)
    y = masked_expand(
        y, h_ptr + FIRST, b_ptr, adapters, weights, rows, columns, end, M, O, K, R, C, CP, P * W, PARTS, BM, BK
    )
    tl.store(y_ptr + place, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def gated_mask_kernel(
    h_ptr,  # float32 [M, P, W]: the gates' logits in columns 0 .. A, the shrink from column FIRST on
    scale_ptr,  # float32 [P, A]
    count_ptr,  # int32 [M]
    temperature_ptr,  # float32 [M]
    masked_ptr,  # [M, P, K], K = A * R, written
    index_ptr,  # int32 [M, P, C], written
    weight_ptr,  # float32 [M, P, C], written; without the scale
    M: tl.constexpr,
    A: tl.constexpr,
    AP: tl.constexpr,
    K: tl.constexpr,
    KP: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    CP: tl.constexpr,
    P: tl.constexpr,
    W: tl.constexpr,
    FIRST: tl.constexpr,
    BM: tl.constexpr,
):
    """Top-k, softmax and mask of many tokens: the slim product is read once and leaves in 16 bits."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    p = tl.program_id(1)
    h_ptr += p * W
    adapters, weights = choose(h_ptr, count_ptr, temperature_ptr, rows, M, A, AP, C, CP, P * W, 1, BM)
    which = tl.arange(0, CP)
    choice = (rows[:, None] * P + p) * C + which[None, :]
    inside = (rows < M)[:, None] & (which < C)[None, :]
    tl.store(index_ptr + choice, adapters, mask=inside)
    tl.store(weight_ptr + choice, weights, mask=inside)
    weights *= tl.load(scale_ptr + p * A + tl.maximum(adapters, 0))
    ks = tl.arange(0, KP)
    weight = tl.zeros((BM, KP), tl.float32)
    for c in tl.static_range(C):
        adapter = tl.sum(tl.where(which[None, :] == c, adapters, 0), axis=1)
        own = tl.sum(tl.where(which[None, :] == c, weights, 0.0), axis=1)
        weight += tl.where((ks // R)[None, :] == adapter[:, None], own[:, None], 0.0)
    inside = (rows < M)[:, None] & (ks < K)[None, :]
    h = tl.load(h_ptr + FIRST + rows[:, None].to(tl.int64) * (P * W) + ks[None, :], mask=inside, other=0.0)
    place = masked_ptr + (rows[:, None].to(tl.int64) * P + p) * K + ks[None, :]
    tl.store(place, (h * weight).to(masked_ptr.dtype.element_ty), mask=inside)


@triton.jit
def add_tiles_kernel(
    h_ptr,  # [M, P, K], masked
    b_ptr,  # [K, O]
    base_ptr,  # [M, O]
    y_ptr,  # [M, O], the same memory
    M: tl.constexpr,
    O: tl.constexpr,
    K: tl.constexpr,
    KP: tl.constexpr,
    SPLITS: tl.constexpr,
    ROWS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    STAGES: tl.constexpr,
):
    """y += h B in one pass over y: a program keeps its columns of B and walks down ROWS tokens."""
    p, first, _, end = project(tl.program_id(0), SPLITS, BN)
    P: tl.constexpr = len(SPLITS)
    columns = first + tl.arange(0, BN)
    ks = tl.arange(0, KP)
    b = tl.load(
        b_ptr + ks[:, None] * O + columns[None, :], mask=(ks < K)[:, None] & (columns < end)[None, :], other=0.0
    )
    for m in tl.range(0, ROWS, BM, num_stages=STAGES):
        rows = tl.program_id(1) * ROWS + m + tl.arange(0, BM)
        inside = (rows < M)[:, None] & (columns < end)[None, :]
        place = rows[:, None].to(tl.int64) * O + columns[None, :]
        y = tl.load(base_ptr + place, mask=inside, other=0.0).to(tl.float32)
        h = tl.load(
            h_ptr + (rows[:, None].to(tl.int64) * P + p) * K + ks[None, :],
            mask=(rows < M)[:, None] & (ks < K)[None, :],
            other=0.0,
        )
        y = tl.dot(h, b, y, input_precision="ieee")
        tl.store(y_ptr + place, y.to(y_ptr.dtype.element_ty), mask=inside)
