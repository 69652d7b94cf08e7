"""The Triton kernels behind the products of a group: of few tokens choice, mask, expand and sum; of many, once XLA has
chosen and masked, expand, sum and activation. `triton_gpu.py` launches them.

For NVIDIA GPUs; timed on an H100 and an H200 (docs/performance.md). All shapes are compile-time constants (JAX knows
them), arrays are dense in the order given. The columns of a group are cut into blocks of BN that never cross from one
projection to the next: `project` finds a block's place. Sums are float32 in a fixed order; nothing is atomic.
"""

# Triton's types do not know that static_range is unrolled, not iterated.
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false, reportAssignmentType=false

# pyright: reportMissingImports=false, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# (Triton is optional, and a kernel is not Python: constants are upper case, blocks are no plain values)
# ruff: noqa: RUF005  # it adds tuples, and has no unpacking

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
def load_blocks(
    b_ptr, columns, own_columns, O: tl.constexpr, A: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, BK: tl.constexpr
):  # fmt: skip
    """Some columns of B [A, R, O] in blocks of BK / RP adapters: a tuple of [BK, columns], rows of zeros behind R."""
    ks = tl.arange(0, BK)
    blocks = ()
    for k in tl.static_range((A * RP + BK - 1) // BK):
        adapters = k * (BK // RP) + ks // RP
        place = (adapters * R + ks % RP)[:, None] * O + columns[None, :]
        inside = ((adapters < A) & (ks % RP < R))[:, None] & own_columns[None, :]
        blocks = blocks + (tl.load(b_ptr + place, mask=inside, other=0.0),)
    return blocks


@triton.jit
def add_chosen(
    y, blocks, h_ptr, index_ptr, bits, rows, own_rows, A: tl.constexpr, RP: tl.constexpr, C: tl.constexpr,
    ROW: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """y float32 [BM, BN] plus the rows' weighed shrinks through what `load_blocks` gave.

    h_ptr, index_ptr: of rows that are ROW choices apart; see `silu_expand_kernel`. bits: which blocks the rows use.
    The last block is multiplied always: a result that ends in a branch is laid out twice by the compiler.
    """
    KB: tl.constexpr = (A * RP + BK - 1) // BK
    HALF: tl.constexpr = RP // 2
    pairs = tl.arange(0, BK // 2)
    indices = ()
    shrinks = ()  # of every choice, once for each adapter of a block
    for c in tl.static_range(C):
        place = (rows * ROW + c)[:, None] * HALF + (pairs % HALF)[None, :]
        indices = indices + (tl.load(index_ptr + rows * ROW + c, mask=own_rows, other=-1),)
        shrinks = shrinks + (tl.load(h_ptr + place, mask=own_rows[:, None], other=0),)
    for k in tl.static_range(KB):
        if k == KB - 1 or (bits >> k) & 1:
            adapters = k * (BK // RP) + pairs // HALF
            h = tl.zeros((BM, BK // 2), tl.int32)
            for c in tl.static_range(C):
                h = tl.where(indices[c][:, None] == adapters[None, :], shrinks[c], h)
            h = tl.join((h & 0xFFFF).to(tl.int16), (h >> 16).to(tl.int16))
            h = tl.reshape(h.to(blocks[k].dtype, bitcast=True), (BM, BK))
            y = tl.dot(h, blocks[k], y)
    return y


@triton.jit
def silu_expand_kernel(
    y_ptr,  # [M, 2 F]: the base's columns of gate, and of up
    h_ptr,  # int32 [M, 2, C, RP / 2]: pairs of weighed shrinks of gate's and of up's choices, 16 bits each
    index_ptr,  # int32 [M, 2, C]: the adapters chosen, -1 for none; of one named twice the last has both's shrinks
    used_ptr,  # int32 [tiles of BM rows, 2]: which blocks of BK / RP adapters the rows use, a bit each
    b_ptr,  # [A, R, 2 F]
    hidden_ptr,  # [M, F], written
    M: tl.constexpr, F: tl.constexpr, A: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, C: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, RUN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """silu(gate + h_gate B) * (up + h_up B), summed in float32 and rounded once. Grid: blocks of BN columns, RUN tiles.

    A program keeps its columns of every B in shared memory, and reads of a tile what must be read: gate, up and the
    chosen shrinks, which it places among zeros in registers.
    """
    rows = tl.arange(0, BM)
    first = tl.program_id(0) * BN
    columns = tl.arange(0, BN)
    own_columns = columns < F - first
    b_gate = load_blocks(b_ptr + first, columns, own_columns, 2 * F, A, R, RP, BK)
    b_up = load_blocks(b_ptr + F + first, columns, own_columns, 2 * F, A, R, RP, BK)
    place = rows[:, None] * (2 * F) + columns[None, :]
    start = tl.program_id(1) * RUN
    for i in tl.range(0, tl.minimum(RUN, (M + BM - 1) // BM - start), num_stages=STAGES):
        tile = start + i
        row = tile.to(tl.int64) * BM
        own_rows = rows < M - tile * BM
        inside = own_rows[:, None] & own_columns[None, :]
        y = y_ptr + row * (2 * F) + first
        h = h_ptr + row * (C * RP)
        index = index_ptr + row * (2 * C)
        bits = tl.load(used_ptr + 2 * tile)
        gate = tl.load(y + place, mask=inside, other=0.0).to(tl.float32)
        gate = add_chosen(gate, b_gate, h, index, bits, rows, own_rows, A, RP, C, 2 * C, BM, BK)
        bits = tl.load(used_ptr + 2 * tile + 1)
        up = tl.load(y + F + place, mask=inside, other=0.0).to(tl.float32)
        up = add_chosen(up, b_up, h + C * RP // 2, index + C, bits, rows, own_rows, A, RP, C, 2 * C, BM, BK)
        hidden = gate * up / (1 + tl.exp2(gate * -1.4426950408889634))
        own = hidden_ptr + row * F + first + rows[:, None] * F + columns[None, :]
        tl.store(own, hidden.to(hidden_ptr.dtype.element_ty), mask=inside)


@triton.jit
def add_expand_kernel(
    y_ptr,  # [M, O]: the base's columns of P projections
    h_ptr,  # int32 [M, P, C, RP / 2], and the next two: as `silu_expand_kernel` has them, of P projections
    index_ptr,  # int32 [M, P, C]
    used_ptr,  # int32 [tiles of BM rows, P]
    b_ptr,  # [A, R, O]
    residual_ptr,  # [M, O], if RESIDUAL
    out_ptr,  # [M, O], written
    M: tl.constexpr, O: tl.constexpr, A: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, C: tl.constexpr,
    SPLITS: tl.constexpr, RESIDUAL: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    RUN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """y + h B, and the residual, summed in float32 and rounded once; otherwise as `silu_expand_kernel`."""
    P: tl.constexpr = len(SPLITS)
    p, first, _, end = project(tl.program_id(0), SPLITS, BN)
    rows = tl.arange(0, BM)
    columns = tl.arange(0, BN)
    own_columns = columns < end - first
    b = load_blocks(b_ptr + first, columns, own_columns, O, A, R, RP, BK)
    place = rows[:, None] * O + columns[None, :]
    start = tl.program_id(1) * RUN
    for i in tl.range(0, tl.minimum(RUN, (M + BM - 1) // BM - start), num_stages=STAGES):
        tile = start + i
        row = tile.to(tl.int64) * BM
        own_rows = rows < M - tile * BM
        inside = own_rows[:, None] & own_columns[None, :]
        y = tl.load(y_ptr + row * O + first + place, mask=inside, other=0.0).to(tl.float32)
        if RESIDUAL:
            y += tl.load(residual_ptr + row * O + first + place, mask=inside, other=0.0).to(tl.float32)
        h = h_ptr + row * (P * C * RP // 2) + p * (C * RP // 2)
        index = index_ptr + row * (P * C) + p * C
        bits = tl.load(used_ptr + P * tile + p)
        y = add_chosen(y, b, h, index, bits, rows, own_rows, A, RP, C, P * C, BM, BK)
        tl.store(out_ptr + row * O + first + place, y.to(out_ptr.dtype.element_ty), mask=inside)
