"""The Triton kernels behind the products of a group: of few tokens choice, mask, expand and sum; of many, once XLA has
chosen and masked, expand, sum and activation. `triton_gpu.py` launches them.

For NVIDIA GPUs; timed on an H100 and an H200 (docs/performance.md). All shapes are compile-time constants (JAX knows
them), arrays are dense in the order given. The columns of a group are cut into blocks of BN that never cross from one
projection to the next: `project` finds a block's place. Sums are float32 in a fixed order; nothing is atomic.
"""

# Triton's types do not know that static_range is unrolled, not iterated.
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false

# pyright: reportMissingImports=false, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# (Triton is optional, and a kernel is not Python: constants are upper case, blocks are no plain values)

import triton
import triton.language as tl

from pallas_kernels.topk_gating.triton_kernels import column, top_k_softmax


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
def masked_shrink(
    h_ptr, adapters, weights, rows, ks, M: tl.constexpr, K: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
    CP: tl.constexpr, ROW: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """[BM, BK]: columns ks of the shrinks of all adapters, times their weights; 0 for adapters that do not act.

    h_ptr: float32 [M, K], K = A * R, rows ROW elements apart. adapters, weights: [BM, CP], the C that act on each row.
    rows: [BM]. ks: int32 [BK].
    """
    inside = (rows < M)[:, None] & (ks < K)[None, :]
    h = tl.load(h_ptr + rows[:, None] * ROW + ks[None, :], mask=inside, other=0.0)
    weight = tl.zeros((BM, BK), tl.float32)
    for c in tl.static_range(C):
        own = (ks // R)[None, :] == column(adapters, c, CP)[:, None]
        weight += tl.where(own, column(weights, c, CP)[:, None], 0.0)
    return h * weight


@triton.jit
def masked_expand(
    y, h_ptr, b_ptr, adapters, weights, rows, columns, end,
    M: tl.constexpr, O: tl.constexpr, K: tl.constexpr, R: tl.constexpr, C: tl.constexpr, CP: tl.constexpr,
    ROW: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """y + (mask h) B over all K = A * R rows of B; parameters as `masked_shrink` has them, columns below `end`."""
    for k in range(0, K, BK):
        ks = k + tl.arange(0, BK)
        h = masked_shrink(h_ptr, adapters, weights, rows.to(tl.int64), ks, M, K, R, C, CP, ROW, BM, BK)
        inside = (ks < K)[:, None] & (columns < end)[None, :]
        b = tl.load(b_ptr + ks[:, None].to(tl.int64) * O + columns[None, :], mask=inside, other=0.0)
        y = tl.dot(h.to(b.dtype), b, y, input_precision="ieee")
    return y


@triton.jit
def gated_expand_kernel(
    h_ptr,  # float32 [M, P, W]: the gates' logits in columns 0 .. G, the shrink from column FIRST on
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
    G: tl.constexpr,
    GP: tl.constexpr,
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
    adapters, weights = top_k_softmax(h_ptr, count_ptr, temperature_ptr, rows, M, A, G, GP, C, CP, P * W, BM)
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


@triton.jit
def silu_expand_kernel(
    y_ptr,  # [M, 2 F]: the base's columns of gate, and of up
    h_ptr,  # [M, 2, KP]: weighed shrinks of gate and of up, zeros behind the K-th
    used_ptr,  # int32 [tiles of BM rows, 1 + KP / BK]: how many blocks of BK shrinks any of the rows uses, and which
    b_ptr,  # [K, 2 F], K = A * R
    hidden_ptr,  # [M, F], written
    M: tl.constexpr, F: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """silu(gate + h_gate B) * (up + h_up B), summed in float32 and rounded once. Grid: blocks of BN columns, tiles.

    A tile reads the blocks of B that its rows use and no other.
    """
    tile = tl.program_id(1)
    rows = tl.arange(0, BM)
    first = tl.program_id(0) * BN
    columns = tl.arange(0, BN)
    y_ptr += tile.to(tl.int64) * (BM * 2 * F) + first
    h_ptr += tile.to(tl.int64) * (BM * 2 * KP)
    hidden_ptr += tile.to(tl.int64) * (BM * F) + first
    used_ptr += tile * (1 + KP // BK)
    b_ptr += first
    own_rows = (rows < M - tile * BM)[:, None]
    own_columns = (columns < F - first)[None, :]
    place = rows[:, None] * (2 * F) + columns[None, :]
    gate = tl.load(y_ptr + place, mask=own_rows & own_columns, other=0.0).to(tl.float32)
    up = tl.load(y_ptr + F + place, mask=own_rows & own_columns, other=0.0).to(tl.float32)
    for block in tl.range(0, tl.load(used_ptr), num_stages=STAGES):
        ks = tl.load(used_ptr + 1 + block) * BK + tl.arange(0, BK)
        shrinks = rows[:, None] * (2 * KP) + ks[None, :]
        h_gate = tl.load(h_ptr + shrinks, mask=own_rows, other=0.0)
        h_up = tl.load(h_ptr + KP + shrinks, mask=own_rows, other=0.0)
        b = ks.to(tl.int64)[:, None] * (2 * F) + columns[None, :]
        inside = (ks < K)[:, None] & own_columns
        b_gate = tl.load(b_ptr + b, mask=inside, other=0.0)
        b_up = tl.load(b_ptr + F + b, mask=inside, other=0.0)
        gate = tl.dot(h_gate, b_gate, gate, input_precision="ieee")
        up = tl.dot(h_up, b_up, up, input_precision="ieee")
    hidden = gate / (1 + tl.exp(-gate)) * up
    place = rows[:, None] * F + columns[None, :]
    tl.store(hidden_ptr + place, hidden.to(hidden_ptr.dtype.element_ty), mask=own_rows & own_columns)
