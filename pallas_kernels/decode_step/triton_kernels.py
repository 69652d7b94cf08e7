"""The Triton kernels of a decoding step; `triton_gpu.py` launches them and says what each launch is for.

Weights, caches and routing traces are whole stacks of layers: a kernel is told the layer by one int32 in device
memory and finds it by its own offset, so that nobody copies a layer out of a stack. A program computes two blocks of
BH columns, `pair` says which two; products and sums are float32 in a fixed order. Arrays are dense, sizes constants.
"""

# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false, reportAssignmentType=false
# pyright: reportMissingImports=false, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# (Triton is optional, and a kernel is not Python: constants are upper case, blocks are no plain values)

import triton
import triton.language as tl

from pallas_kernels.routed_lora.triton_kernels import choose


@triton.jit
def pair(block, TAIL: tl.constexpr, O: tl.constexpr, H: tl.constexpr, BH: tl.constexpr):
    """First columns of a program's two blocks: a head's halves, the same columns of gate and up, or neighbours."""
    if TAIL == "rope":
        head = block // (H // 2 // BH)
        first = head * H + block % (H // 2 // BH) * BH
        return first, first + H // 2
    elif TAIL == "silu":
        return block * BH, O // 2 + block * BH
    else:
        return block * 2 * BH, block * 2 * BH + BH


@triton.jit
def projection(column, SPLITS: tl.constexpr):
    """The projection that a column of the group belongs to."""
    p = 0
    end = 0
    for i in tl.static_range(len(SPLITS) - 1):
        end += SPLITS[i]
        p += (column >= end).to(tl.int32)
    return p


@triton.jit
def input_block(x_ptr, norm_ptr, rows, ks, squares, M: tl.constexpr, I: tl.constexpr, NORM: tl.constexpr):
    """(x, or x times the norm's scale and its squares added to `squares`) of a block of columns."""
    x = tl.load(x_ptr + rows[:, None] * I + ks[None, :], mask=(rows < M)[:, None], other=0.0)
    if NORM:
        wide = x.to(tl.float32)
        squares += wide * wide
        x = (wide * tl.load(norm_ptr + ks)[None, :].to(tl.float32)).to(x.dtype)
    return x, squares


@triton.jit
def stream(
    x_ptr, norm_ptr, w_ptr, rows, first, second, begin, M: tl.constexpr, I: tl.constexpr, O: tl.constexpr,
    PART: tl.constexpr, NORM: tl.constexpr, EPS: tl.constexpr, BM: tl.constexpr, BH: tl.constexpr, BK: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Two blocks of norm(x) W, each [BM, BH], over PART of W's rows from `begin` on."""
    columns = tl.arange(0, BH)
    y0 = tl.zeros((BM, BH), tl.float32)
    y1 = tl.zeros((BM, BH), tl.float32)
    squares = tl.zeros((BM, BK), tl.float32)
    for k in tl.range(0, PART, BK, num_stages=STAGES):
        ks = begin + k + tl.arange(0, BK)
        x, squares = input_block(x_ptr, norm_ptr, rows, ks, squares, M, I, NORM)
        w0 = tl.load(w_ptr + ks[:, None] * O + (first + columns)[None, :], eviction_policy="evict_first")
        w1 = tl.load(w_ptr + ks[:, None] * O + (second + columns)[None, :], eviction_policy="evict_first")
        y0 = tl.dot(x, w0, y0, input_precision="ieee")
        y1 = tl.dot(x, w1, y1, input_precision="ieee")
    if NORM:
        factor = tl.rsqrt(tl.sum(squares, axis=1) / I + EPS)[:, None]
        y0 *= factor
        y1 *= factor
    return y0, y1


@triton.jit
def stream_slim(
    x_ptr, norm_ptr, slim_ptr, rows, columns, begin, M: tl.constexpr, I: tl.constexpr, PART: tl.constexpr,
    NORM: tl.constexpr, EPS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """norm(x) slim^T, [BM, BN]: slim's rows lie along I."""
    y = tl.zeros((BM, BN), tl.float32)
    squares = tl.zeros((BM, BK), tl.float32)
    for k in tl.range(0, PART, BK, num_stages=STAGES):
        ks = begin + k + tl.arange(0, BK)
        x, squares = input_block(x_ptr, norm_ptr, rows, ks, squares, M, I, NORM)
        slim = tl.load(slim_ptr + columns[None, :] * I + ks[:, None])
        y = tl.dot(x, slim, y, input_precision="ieee")
    if NORM:
        y *= tl.rsqrt(tl.sum(squares, axis=1) / I + EPS)[:, None]
    return y


@triton.jit
def routing(
    h_ptr, scale_ptr, count_ptr, temperature_ptr, index_ptr, weight_ptr, trace_ptr, traced_ptr, p, rows, writes,
    M: tl.constexpr, A: tl.constexpr, AP: tl.constexpr, C: tl.constexpr, CP: tl.constexpr, ROW: tl.constexpr,
    PARTS: tl.constexpr, GATES: tl.constexpr, CHOICE_ROW: tl.constexpr, CHOICE_P: tl.constexpr,
    TRACE_ROW: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """(adapters, weights times scale) of projection p: by its gates, then also traced, or as they were given."""
    which = tl.arange(0, CP)
    inside = (rows < M)[:, None] & (which < C)[None, :]
    if GATES:
        adapters, weights = choose(h_ptr, count_ptr, temperature_ptr, rows, M, A, AP, C, CP, ROW, PARTS, BM)
        place = rows[:, None] * TRACE_ROW + p * C + which[None, :]
        tl.store(trace_ptr + place, adapters, mask=inside & writes)
        tl.store(traced_ptr + place, weights, mask=inside & writes)
    else:
        place = rows[:, None] * CHOICE_ROW + p * CHOICE_P + which[None, :]
        adapters = tl.load(index_ptr + place, mask=inside, other=-1)
        weights = tl.load(weight_ptr + place, mask=inside, other=0.0)
    real = (adapters >= 0) & (adapters < A)
    scale = tl.load(scale_ptr + p * A + tl.where(real, adapters, 0))
    return adapters, tl.where(real, weights * scale, 0.0)


@triton.jit
def of_choice(block, c: tl.constexpr, CP: tl.constexpr):
    """Column c of a [BM, CP] block."""
    return tl.sum(tl.where((tl.arange(0, CP) == c)[None, :], block, 0), axis=1)


@triton.jit
def masked(
    h_ptr, adapters, weights, rows, ks, M: tl.constexpr, K: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
    CP: tl.constexpr, ROW: tl.constexpr, PARTS: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """[BM, BK]: columns ks of the shrinks of all adapters, times their weights."""
    inside = (rows < M)[:, None] & (ks < K)[None, :]
    h = tl.zeros((BM, BK), tl.float32)
    for part in range(PARTS):
        place = (part * M + rows)[:, None] * ROW + ks[None, :]
        h += tl.load(h_ptr + place, mask=inside, other=0.0, cache_modifier=".cg")
    weight = tl.zeros((BM, BK), tl.float32)
    for c in tl.static_range(C):
        own = (ks // R)[None, :] == of_choice(adapters, c, CP)[:, None]
        weight += tl.where(own, of_choice(weights, c, CP)[:, None], 0.0)
    return h * weight


@triton.jit
def gathered(
    h_ptr, adapters, weights, rows, ks, c: tl.constexpr, M: tl.constexpr, A: tl.constexpr, R: tl.constexpr,
    C: tl.constexpr, CP: tl.constexpr, ROW: tl.constexpr, PARTS: tl.constexpr, COMPACT: tl.constexpr,
):  # fmt: skip
    """([BM, BK] block-diagonal: row m's shrink of its choice c in columns m R .. m R + R, the rows of B for them)."""
    row = ks // R
    own = rows[:, None] == row[None, :]
    adapter = tl.sum(tl.where(own, of_choice(adapters, c, CP)[:, None], 0), axis=0)
    weight = tl.sum(tl.where(own, of_choice(weights, c, CP)[:, None], 0.0), axis=0)
    real = (row < M) & (adapter >= 0) & (adapter < A)
    source = tl.where(real, adapter * R + ks % R, 0)
    column = c * R + ks % R if COMPACT else source
    h = tl.zeros(ks.shape, tl.float32)
    for part in range(PARTS):
        h += tl.load(h_ptr + (part * M + row) * ROW + column, mask=real, other=0.0, cache_modifier=".cg")
    return tl.where(own, (h * weight)[None, :], 0.0), source, real


@triton.jit
def expand(
    y0, y1, h0_ptr, h1_ptr, b_ptr, adapters0, weights0, adapters1, weights1, rows, first, second,
    M: tl.constexpr, O: tl.constexpr, A: tl.constexpr, R: tl.constexpr, C: tl.constexpr, CP: tl.constexpr,
    ROW: tl.constexpr, PARTS: tl.constexpr, GATHER: tl.constexpr, COMPACT: tl.constexpr, SAME: tl.constexpr,
    BM: tl.constexpr, BH: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """Both blocks plus their update: through every adapter's B, masked, or through the rows of B that were chosen."""
    columns = tl.arange(0, BH)
    if GATHER:
        for c in tl.static_range(C):
            for k in range(0, M * R, BE):
                ks = k + tl.arange(0, BE)
                h, source, real = gathered(
                    h0_ptr, adapters0, weights0, rows, ks, c, M, A, R, C, CP, ROW, PARTS, COMPACT
                )
                b_row = b_ptr + source[:, None].to(tl.int64) * O
                b = tl.load(b_row + (first + columns)[None, :], mask=real[:, None], other=0.0)
                y0 = tl.dot(h.to(b.dtype), b, y0, input_precision="ieee")
                if not SAME:
                    h, source, real = gathered(
                        h1_ptr, adapters1, weights1, rows, ks, c, M, A, R, C, CP, ROW, PARTS, COMPACT
                    )
                    b_row = b_ptr + source[:, None].to(tl.int64) * O
                b = tl.load(b_row + (second + columns)[None, :], mask=real[:, None], other=0.0)
                y1 = tl.dot(h.to(b.dtype), b, y1, input_precision="ieee")
    else:
        K: tl.constexpr = A * R
        for k in range(0, K, BE):
            ks = k + tl.arange(0, BE)
            h = masked(h0_ptr, adapters0, weights0, rows, ks, M, K, R, C, CP, ROW, PARTS, BM, BE)
            b_row = b_ptr + ks[:, None] * O
            b = tl.load(b_row + (first + columns)[None, :], mask=(ks < K)[:, None], other=0.0)
            y0 = tl.dot(h.to(b.dtype), b, y0, input_precision="ieee")
            if not SAME:
                h = masked(h1_ptr, adapters1, weights1, rows, ks, M, K, R, C, CP, ROW, PARTS, BM, BE)
            b = tl.load(b_row + (second + columns)[None, :], mask=(ks < K)[:, None], other=0.0)
            y1 = tl.dot(h.to(b.dtype), b, y1, input_precision="ieee")
    return y0, y1


@triton.jit
def finish(
    y0, y1, first, second, rows, layer, h_ptr, b_ptr, scale_ptr, count_ptr, temperature_ptr, index_ptr, weight_ptr,
    trace_ptr, traced_ptr, residual_ptr, cos_ptr, sin_ptr, slot_ptr, out_ptr, keys_ptr, values_ptr,
    M: tl.constexpr, O: tl.constexpr, H: tl.constexpr, S: tl.constexpr, SPLITS: tl.constexpr, TAIL: tl.constexpr,
    ADAPT: tl.constexpr, GATES: tl.constexpr, GATHER: tl.constexpr, COMPACT: tl.constexpr, A: tl.constexpr,
    AP: tl.constexpr, R: tl.constexpr, C: tl.constexpr, CP: tl.constexpr, W: tl.constexpr, FIRST: tl.constexpr,
    ROW: tl.constexpr, HPARTS: tl.constexpr, CHOICE_ROW: tl.constexpr, CHOICE_P: tl.constexpr,
    CHOICE_LAYER: tl.constexpr, CHOICE_FIRST: tl.constexpr, TRACE_ROW: tl.constexpr, TRACE_FIRST: tl.constexpr,
    BM: tl.constexpr, BH: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """Update, then what follows the group: rotary and cache (rope), silu(gate) up (silu), the residual sum."""
    P: tl.constexpr = len(SPLITS)
    dtype = out_ptr.dtype.element_ty
    columns = tl.arange(0, BH)
    if ADAPT:
        b_ptr += layer * (A * R * O)
        scale_ptr += layer * (P * A)
        index_ptr += layer * CHOICE_LAYER + CHOICE_FIRST
        weight_ptr += layer * CHOICE_LAYER + CHOICE_FIRST
        trace_ptr += layer * (M * TRACE_ROW) + TRACE_FIRST
        traced_ptr += layer * (M * TRACE_ROW) + TRACE_FIRST
        SAME: tl.constexpr = TAIL != "silu"
        p = projection(first, SPLITS)
        start = 0
        for i in tl.static_range(P - 1):
            start = tl.where(p > i, start + SPLITS[i], start)
        adapters0, weights0 = routing(
            h_ptr + p * W, scale_ptr, count_ptr, temperature_ptr, index_ptr, weight_ptr, trace_ptr, traced_ptr,
            p, rows, first == start, M, A, AP, C, CP, ROW, HPARTS, GATES, CHOICE_ROW, CHOICE_P, TRACE_ROW, BM,
        )  # fmt: skip
        adapters1 = adapters0
        weights1 = weights0
        if not SAME:
            adapters1, weights1 = routing(
                h_ptr + W, scale_ptr, count_ptr, temperature_ptr, index_ptr, weight_ptr, trace_ptr, traced_ptr,
                1, rows, first == 0, M, A, AP, C, CP, ROW, HPARTS, GATES, CHOICE_ROW, CHOICE_P, TRACE_ROW, BM,
            )  # fmt: skip
        h0_ptr = h_ptr + p * W + FIRST
        h1_ptr = h_ptr + W + FIRST
        y0, y1 = expand(
            y0, y1, h0_ptr, h1_ptr, b_ptr, adapters0, weights0, adapters1, weights1, rows, first, second,
            M, O, A, R, C, CP, ROW, HPARTS, GATHER, COMPACT, SAME, BM, BH, BE,
        )  # fmt: skip
    y0 = y0.to(dtype).to(tl.float32)
    y1 = y1.to(dtype).to(tl.float32)
    inside = (rows < M)[:, None] & (columns < BH)[None, :]
    if TAIL == "silu":
        gate = (y0 / (1.0 + tl.exp(-y0))).to(dtype).to(tl.float32)
        place = rows[:, None] * (O // 2) + (first + columns)[None, :]
        tl.store(out_ptr + place, (gate * y1).to(dtype), mask=inside)
    elif TAIL == "residual":
        place = rows[:, None] * O + (first + columns)[None, :]
        x0 = tl.load(residual_ptr + place, mask=inside, other=0.0).to(tl.float32)
        x1 = tl.load(residual_ptr + place + (second - first), mask=inside, other=0.0).to(tl.float32)
        tl.store(out_ptr + place, (x0 + y0).to(dtype), mask=inside)
        tl.store(out_ptr + place + (second - first), (x1 + y1).to(dtype), mask=inside)
    else:
        Q: tl.constexpr = SPLITS[0]
        KV: tl.constexpr = SPLITS[1]
        if first < Q + KV:
            angle = rows[:, None] * (H // 2) + (first % H + columns)[None, :]
            cos = tl.load(cos_ptr + angle, mask=inside, other=1.0)
            sin = tl.load(sin_ptr + angle, mask=inside, other=0.0)
            turned = y0 * cos - y1 * sin
            y1 = y1 * cos + y0 * sin
            y0 = turned
        if first < Q:
            query = out_ptr + rows[:, None] * Q + (first + columns)[None, :]
            tl.store(query, y0.to(dtype), mask=inside)
            tl.store(query + H // 2, y1.to(dtype), mask=inside)
        else:
            slot = tl.load(slot_ptr).to(tl.int64)
            row = ((layer * M + rows) * S + slot)[:, None] * KV + columns[None, :]
            if first < Q + KV:
                key = keys_ptr + row + (first - Q)
                tl.store(key, y0.to(dtype), mask=inside)
                tl.store(key + H // 2, y1.to(dtype), mask=inside)
            else:
                value = values_ptr + row + (first - Q - KV)
                tl.store(value, y0.to(dtype), mask=inside)
                tl.store(value + H // 2, y1.to(dtype), mask=inside)


@triton.jit
def product_kernel(
    layer_ptr,  # int32 [1]
    x_ptr,  # [M, I]
    norm_ptr,  # [L, I]
    w_ptr,  # [L, I, O]
    slim_ptr,  # [L, N, I]
    y_ptr,  # float32 [PARTS, M, O + N], written
    M: tl.constexpr, I: tl.constexpr, O: tl.constexpr, N: tl.constexpr, H: tl.constexpr, TAIL: tl.constexpr,
    NORM: tl.constexpr, EPS: tl.constexpr, PART: tl.constexpr, BM: tl.constexpr, BH: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """norm(x) [W | slim^T], the sum over I in parts: the first N / BN programs take the slim matrix."""
    layer = tl.load(layer_ptr).to(tl.int64)
    block = tl.program_id(0)
    part = tl.program_id(1)
    rows = tl.arange(0, BM)
    norm_ptr += layer * I
    place = y_ptr + (part * M + rows)[:, None] * (O + N)
    inside = (rows < M)[:, None]
    if block < N // BN:
        slim = block * BN + tl.arange(0, BN)
        y = stream_slim(
            x_ptr, norm_ptr, slim_ptr + layer * (N * I), rows, slim, part * PART, M, I, PART, NORM, EPS, BM, BN, BK,
            STAGES,
        )  # fmt: skip
        tl.store(place + (O + slim)[None, :], y, mask=inside)
    else:
        first, second = pair(block - N // BN, TAIL, O, H, BH)
        y0, y1 = stream(
            x_ptr, norm_ptr, w_ptr + layer * (I * O), rows, first, second, part * PART, M, I, O, PART, NORM, EPS, BM,
            BH, BK, STAGES,
        )  # fmt: skip
        columns = tl.arange(0, BH)
        tl.store(place + (first + columns)[None, :], y0, mask=inside)
        tl.store(place + (second + columns)[None, :], y1, mask=inside)


@triton.jit
def tail_kernel(
    layer_ptr,  # int32 [1]
    y_ptr,  # float32 [PARTS, M, O + N]
    h_ptr,  # y_ptr again, or float32 [HPARTS, M, P, C, R]
    b_ptr,  # [L, A, R, O]
    scale_ptr,  # float32 [L, P, A]
    count_ptr,  # int32 [M]
    temperature_ptr,  # float32 [M]
    index_ptr,  # int32, a routing that was given
    weight_ptr,  # float32, likewise
    residual_ptr,  # [M, O]
    cos_ptr,  # float32 [M, H / 2]
    sin_ptr,  # float32 [M, H / 2]
    slot_ptr,  # int32 [1]
    keys_in, values_in, trace_in, traced_in,  # the last four outputs before this launch
    out_ptr,  # [M, Q], [M, O / 2] or [M, O], written
    keys_ptr,  # [L, M, S, KV], a slot of it written
    values_ptr,  # [L, M, S, KV], likewise
    trace_ptr,  # int32 [L, M, projections of a layer, C], this group's written
    traced_ptr,  # float32, likewise
    M: tl.constexpr, O: tl.constexpr, N: tl.constexpr, PARTS: tl.constexpr, H: tl.constexpr, S: tl.constexpr,
    SPLITS: tl.constexpr, TAIL: tl.constexpr, ADAPT: tl.constexpr, GATES: tl.constexpr, GATHER: tl.constexpr,
    COMPACT: tl.constexpr, A: tl.constexpr, AP: tl.constexpr, R: tl.constexpr, C: tl.constexpr, CP: tl.constexpr,
    W: tl.constexpr, FIRST: tl.constexpr, ROW: tl.constexpr, HPARTS: tl.constexpr, CHOICE_ROW: tl.constexpr,
    CHOICE_P: tl.constexpr, CHOICE_LAYER: tl.constexpr, CHOICE_FIRST: tl.constexpr, TRACE_ROW: tl.constexpr,
    TRACE_FIRST: tl.constexpr, BM: tl.constexpr, BH: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """The second launch of a group: adds the parts of the product and finishes."""
    layer = tl.load(layer_ptr).to(tl.int64)
    first, second = pair(tl.program_id(0), TAIL, O, H, BH)
    rows = tl.arange(0, BM)
    columns = tl.arange(0, BH)
    inside = (rows < M)[:, None] & (columns < BH)[None, :]
    y0 = tl.zeros((BM, BH), tl.float32)
    y1 = tl.zeros((BM, BH), tl.float32)
    for part in range(PARTS):
        place = y_ptr + (part * M + rows)[:, None] * (O + N) + columns[None, :]
        y0 += tl.load(place + first, mask=inside, other=0.0)
        y1 += tl.load(place + second, mask=inside, other=0.0)
    shrinks = h_ptr if COMPACT else h_ptr + O
    finish(
        y0, y1, first, second, rows, layer, shrinks, b_ptr, scale_ptr, count_ptr, temperature_ptr, index_ptr,
        weight_ptr, trace_ptr, traced_ptr, residual_ptr, cos_ptr, sin_ptr, slot_ptr, out_ptr, keys_ptr, values_ptr,
        M, O, H, S, SPLITS, TAIL, ADAPT, GATES, GATHER, COMPACT, A, AP, R, C, CP, W, FIRST, ROW, HPARTS,
        CHOICE_ROW, CHOICE_P, CHOICE_LAYER, CHOICE_FIRST, TRACE_ROW, TRACE_FIRST, BM, BH, BE,
    )  # fmt: skip


@triton.jit
def whole_kernel(
    layer_ptr, x_ptr, norm_ptr, w_ptr, slim_ptr, b_ptr, scale_ptr, count_ptr, temperature_ptr, index_ptr, weight_ptr,
    residual_ptr, cos_ptr, sin_ptr, slot_ptr, keys_in, values_in, trace_in, traced_in, flags_in,
    out_ptr, keys_ptr, values_ptr, trace_ptr, traced_ptr,
    flags_ptr,  # int32 [2]: slim blocks that are there, programs that have seen them; 0 before and after
    h_ptr,  # float32 [M, N], written and read by the same launch
    M: tl.constexpr, I: tl.constexpr, O: tl.constexpr, N: tl.constexpr, H: tl.constexpr, S: tl.constexpr,
    SPLITS: tl.constexpr, TAIL: tl.constexpr, NORM: tl.constexpr, EPS: tl.constexpr, ADAPT: tl.constexpr,
    GATES: tl.constexpr, GATHER: tl.constexpr, COMPACT: tl.constexpr, A: tl.constexpr, AP: tl.constexpr,
    R: tl.constexpr, C: tl.constexpr, CP: tl.constexpr, W: tl.constexpr, FIRST: tl.constexpr, ROW: tl.constexpr,
    HPARTS: tl.constexpr, CHOICE_ROW: tl.constexpr, CHOICE_P: tl.constexpr, CHOICE_LAYER: tl.constexpr,
    CHOICE_FIRST: tl.constexpr, TRACE_ROW: tl.constexpr, TRACE_FIRST: tl.constexpr, BM: tl.constexpr,
    BH: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, BE: tl.constexpr, STAGES: tl.constexpr, POLLS: tl.constexpr,
):  # fmt: skip
    """A group in one launch.

    The programs of the slim matrix come first and wait for nobody; the others stream their columns of W and only then
    wait for them. GPUs start programs in order, so whoever is waited for runs already; should that ever fail, a
    program gives up after POLLS looks and writes NaN instead of hanging.
    """
    layer = tl.load(layer_ptr).to(tl.int64)
    block = tl.program_id(0)
    rows = tl.arange(0, BM)
    norm_ptr += layer * I
    if block < N // BN:
        slim = block * BN + tl.arange(0, BN)
        y = stream_slim(
            x_ptr, norm_ptr, slim_ptr + layer * (N * I), rows, slim, 0, M, I, I, NORM, EPS, BM, BN, BK, STAGES
        )
        tl.store(h_ptr + rows[:, None] * N + slim[None, :], y, mask=(rows < M)[:, None])
        tl.debug_barrier()  # every thread has stored before one of them says so
        tl.atomic_add(flags_ptr, 1, sem="release", scope="gpu")
    else:
        first, second = pair(block - N // BN, TAIL, O, H, BH)
        y0, y1 = stream(
            x_ptr, norm_ptr, w_ptr + layer * (I * O), rows, first, second, 0, M, I, O, I, NORM, EPS, BM, BH, BK, STAGES
        )
        if N > 0:
            polls = 0
            there = tl.atomic_add(flags_ptr, 0, sem="acquire", scope="gpu")
            while (there < N // BN) & (polls < POLLS):
                there = tl.atomic_add(flags_ptr, 0, sem="acquire", scope="gpu")
                polls += 1
            tl.debug_barrier()
            y0 = tl.where(there >= N // BN, y0, float("nan"))
            y1 = tl.where(there >= N // BN, y1, float("nan"))
        finish(
            y0, y1, first, second, rows, layer, h_ptr, b_ptr, scale_ptr, count_ptr, temperature_ptr, index_ptr,
            weight_ptr, trace_ptr, traced_ptr, residual_ptr, cos_ptr, sin_ptr, slot_ptr, out_ptr, keys_ptr, values_ptr,
            M, O, H, S, SPLITS, TAIL, ADAPT, GATES, GATHER, COMPACT, A, AP, R, C, CP, W, FIRST, ROW, HPARTS,
            CHOICE_ROW, CHOICE_P, CHOICE_LAYER, CHOICE_FIRST, TRACE_ROW, TRACE_FIRST, BM, BH, BE,
        )  # fmt: skip
        if N > 0:
            seen = tl.atomic_add(flags_ptr + 1, 1, sem="acq_rel", scope="gpu")
            if seen == tl.num_programs(0) - N // BN - 1:  # the last: nobody looks any more
                tl.store(flags_ptr, 0)
                tl.store(flags_ptr + 1, 0)


@triton.jit
def shrink_kernel(
    layer_ptr,  # int32 [1]
    x_ptr,  # [M, I]
    norm_ptr,  # [L, I]
    a_ptr,  # [L, P, A, R, I]
    logit_ptr,  # float32 [PARTS, M, O + N]: the gates' product from column O on, W columns a projection
    count_ptr, temperature_ptr, index_ptr, weight_ptr, trace_in, traced_in,
    h_ptr,  # float32 [HPARTS, M, P, C, R], written
    trace_ptr,  # int32 [L, M, projections of a layer, C], written where gates choose
    traced_ptr,  # float32, likewise
    M: tl.constexpr, I: tl.constexpr, O: tl.constexpr, N: tl.constexpr, P: tl.constexpr, A: tl.constexpr,
    AP: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, C: tl.constexpr, CP: tl.constexpr, W: tl.constexpr,
    PARTS: tl.constexpr, GATES: tl.constexpr, CHOICE_ROW: tl.constexpr, CHOICE_P: tl.constexpr,
    CHOICE_LAYER: tl.constexpr, TRACE_ROW: tl.constexpr, TRACE_FIRST: tl.constexpr, NORM: tl.constexpr,
    EPS: tl.constexpr, PART: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """The shrinks of a wide bank's chosen adapters, and the choice: a program a row, projection, choice and part."""
    layer = tl.load(layer_ptr).to(tl.int64)
    m = tl.program_id(0) // (P * C)
    p = tl.program_id(0) // C % P
    c = tl.program_id(0) % C
    part = tl.program_id(1)
    which = tl.arange(0, CP)
    if GATES:
        row = m + tl.zeros((1,), tl.int32)
        logits = logit_ptr + O + p * W
        adapters, weights = choose(logits, count_ptr, temperature_ptr, row, M, A, AP, C, CP, O + N, PARTS, 1)
        place = layer * (M * TRACE_ROW) + TRACE_FIRST + m * TRACE_ROW + p * C + which[None, :]
        writes = (which < C)[None, :] & (c == 0) & (part == 0)
        tl.store(trace_ptr + place, adapters, mask=writes)
        tl.store(traced_ptr + place, weights, mask=writes)
        adapter = tl.sum(tl.where((which == c)[None, :], adapters, 0))
    else:
        adapter = tl.load(index_ptr + layer * CHOICE_LAYER + m * CHOICE_ROW + p * CHOICE_P + c)
    ranks = tl.arange(0, RP)
    real = (adapter >= 0) & (adapter < A)
    a_ptr += layer * (P * A * R * I) + (p * A + tl.where(real, adapter, 0)).to(tl.int64) * (R * I)
    norm_ptr += layer * I
    h = tl.zeros((RP, BK), tl.float32)
    for k in range(0, PART, BK):
        ks = part * PART + k + tl.arange(0, BK)
        x = tl.load(x_ptr + m * I + ks)
        if NORM:
            x = (x.to(tl.float32) * tl.load(norm_ptr + ks).to(tl.float32)).to(x.dtype)
        a = tl.load(a_ptr + ranks[:, None] * I + ks[None, :], mask=(ranks < R)[:, None] & real, other=0.0)
        h += a.to(tl.float32) * x.to(tl.float32)[None, :]
    total = tl.sum(h, axis=1)
    if NORM:
        squares = tl.zeros((BK,), tl.float32)
        for k in range(0, I, BK):
            x = tl.load(x_ptr + m * I + k + tl.arange(0, BK)).to(tl.float32)
            squares += x * x
        total *= tl.rsqrt(tl.sum(squares) / I + EPS)
    place = ((part * M + m) * P * C + p * C + c) * R
    tl.store(h_ptr + place + ranks, total, mask=ranks < R)
