"""The Triton kernels of a decoding step; `triton_gpu.py` launches them and says what each launch is for.

Weights, caches and routing traces are whole stacks of layers: a kernel is told the layer by one int32 in device
memory and finds it by its own offset, so that nobody copies a layer out of a stack. A program computes two blocks of
BH columns, `pair` says which two, of BM rows; sums are float32 in a fixed order. Arrays are dense, sizes constants.
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
def rms_factor(
    square_ptr, rows, M: tl.constexpr, I: tl.constexpr, NS: tl.constexpr, NSP: tl.constexpr, EPS: tl.constexpr
):
    """[BM, 1]: 1 / rms of the rows of a residual stream whose squares lie in NS parts; it commutes with a product."""
    part = tl.arange(0, NSP)
    inside = (rows < M)[:, None] & (part < NS)[None, :]
    squares = tl.load(square_ptr + rows[:, None] * NS + part[None, :], mask=inside, other=0.0)
    return tl.rsqrt(tl.sum(squares, axis=1) / I + EPS)[:, None]


@triton.jit
def routing(
    h_ptr, factor, scale_ptr, count_ptr, temperature_ptr, index_ptr, weight_ptr, trace_ptr, traced_ptr, p, rows, writes,
    M: tl.constexpr, A: tl.constexpr, AP: tl.constexpr, C: tl.constexpr, CP: tl.constexpr, ROW: tl.constexpr,
    GATES: tl.constexpr, CHOICE_ROW: tl.constexpr, CHOICE_P: tl.constexpr, TRACE_ROW: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """(adapters, weights times scale) of projection p: by its gates, then also traced, or as they were given."""
    which = tl.arange(0, CP)
    inside = (rows < M)[:, None] & (which < C)[None, :]
    if GATES:
        adapters, weights = choose(
            h_ptr, count_ptr, temperature_ptr, rows, M, A, AP, C, CP, ROW, BM, factor
        )  # fmt: skip
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
    CP: tl.constexpr, ROW: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """[BM, BK]: columns ks of the shrinks of all adapters, times their weights."""
    inside = (rows < M)[:, None] & (ks < K)[None, :]
    h = tl.load(h_ptr + rows[:, None] * ROW + ks[None, :], mask=inside, other=0.0)
    weight = tl.zeros((BM, BK), tl.float32)
    for c in tl.static_range(C):
        own = (ks // R)[None, :] == of_choice(adapters, c, CP)[:, None]
        weight += tl.where(own, of_choice(weights, c, CP)[:, None], 0.0)
    return h * weight


@triton.jit
def add_chosen(
    y0, y1, h_ptr, b_ptr, adapters, weights, first, second, row, c: tl.constexpr, M: tl.constexpr, O: tl.constexpr,
    A: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, C: tl.constexpr, CP: tl.constexpr, ROW: tl.constexpr,
    HPARTS: tl.constexpr, COMPACT: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """The blocks [1, BH] of one row, or the LEFT or RIGHT one, plus the update of its choice c."""
    columns = tl.arange(0, BH)
    ranks = tl.arange(0, RP)
    adapter = tl.sum(of_choice(adapters, c, CP), axis=0)
    weight = tl.sum(of_choice(weights, c, CP), axis=0)
    real = (ranks < R) & (adapter >= 0) & (adapter < A)
    source = tl.where(real, adapter * R + ranks, 0)
    own = real[:, None] & (columns < BH)[None, :]
    place = b_ptr + source[:, None].to(tl.int64) * O + columns[None, :]
    if LEFT:
        b0 = tl.load(place + first, mask=own, other=0.0)
    if RIGHT:
        b1 = tl.load(place + second, mask=own, other=0.0)
    if COMPACT:
        h = tl.zeros((RP,), tl.float32)
        for part in tl.static_range(HPARTS):
            h += tl.load(h_ptr + (part * M + row) * ROW + c * R + ranks, mask=real, other=0.0)
    else:
        h = tl.load(h_ptr + row * ROW + source, mask=real, other=0.0)
    h = (h * weight)[:, None]
    if LEFT:
        y0 += tl.sum(h * b0.to(tl.float32), axis=0)[None, :]
    if RIGHT:
        y1 += tl.sum(h * b1.to(tl.float32), axis=0)[None, :]
    return y0, y1


@triton.jit
def expand(
    y0, y1, h0_ptr, h1_ptr, b_ptr, adapters0, weights0, adapters1, weights1, rows, first, second,
    M: tl.constexpr, O: tl.constexpr, A: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, C: tl.constexpr,
    CP: tl.constexpr, ROW: tl.constexpr, HPARTS: tl.constexpr, GATHER: tl.constexpr, COMPACT: tl.constexpr,
    SAME: tl.constexpr, BM: tl.constexpr, BH: tl.constexpr, BE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Both blocks plus their update: by the rows of B that one row chose, or through every adapter's B, masked."""
    columns = tl.arange(0, BH)
    if GATHER:
        row = tl.sum(rows, axis=0)  # there is one
        for c in tl.static_range(C):
            y0, y1 = add_chosen(
                y0, y1, h0_ptr, b_ptr, adapters0, weights0, first, second, row, c, M, O, A, R, RP, C, CP, ROW, HPARTS,
                COMPACT, True, SAME, BH,
            )  # fmt: skip
            if not SAME:
                y0, y1 = add_chosen(
                    y0, y1, h1_ptr, b_ptr, adapters1, weights1, first, second, row, c, M, O, A, R, RP, C, CP, ROW,
                    HPARTS, COMPACT, False, True, BH,
                )  # fmt: skip
    else:
        K: tl.constexpr = A * R
        for k in tl.range(0, K, BE, num_stages=STAGES):
            ks = k + tl.arange(0, BE)
            b_row = b_ptr + ks[:, None] * O + columns[None, :]
            inside = (ks < K)[:, None] & (columns < BH)[None, :]
            b0 = tl.load(b_row + first, mask=inside, other=0.0)
            b1 = tl.load(b_row + second, mask=inside, other=0.0)
            h = masked(h0_ptr, adapters0, weights0, rows, ks, M, K, R, C, CP, ROW, BM, BE)
            y0 = tl.dot(h.to(b0.dtype), b0, y0, input_precision="ieee")
            if not SAME:
                h = masked(h1_ptr, adapters1, weights1, rows, ks, M, K, R, C, CP, ROW, BM, BE)
            y1 = tl.dot(h.to(b1.dtype), b1, y1, input_precision="ieee")
    return y0, y1


@triton.jit
def tail_kernel(
    layer_ptr,  # int32 [1]
    y_ptr,  # float32 [at least M, O + N]: x [W | slim], not yet times the norm's factor
    square_ptr,  # float32 [M, NS]: of the residual stream before the norm, if NORM
    h_ptr,  # y_ptr again, or float32 [HPARTS, M, P, C, R] (COMPACT), the factor in it
    b_ptr,  # [L, A, R, O]
    scale_ptr,  # float32 [L, P, A]
    count_ptr,  # int32 [M]
    temperature_ptr,  # float32 [M]
    index_ptr,  # int32, a routing that was given
    weight_ptr,  # float32, likewise
    residual_ptr,  # [M, O]
    next_ptr,  # [L, O]: the scale of the norm that follows
    cos_ptr,  # float32 [M, H / 2]
    sin_ptr,  # float32 [M, H / 2]
    slot_ptr,  # int32 [1]
    keys_in, values_in, trace_in, traced_in,  # the last four outputs before this launch
    out_ptr,  # [M, Q], [at least M, O / 2] or [M, O], written
    scaled_ptr,  # [at least M, O], the new residual stream times the next norm's scale, written
    squared_ptr,  # float32 [M, programs], its squares, written
    keys_ptr,  # [L, M, S, KV], a slot of it written
    values_ptr,  # [L, M, S, KV], likewise
    trace_ptr,  # int32 [L, M, projections of a layer, C], this group's written
    traced_ptr,  # float32, likewise
    M: tl.constexpr, I: tl.constexpr, O: tl.constexpr, N: tl.constexpr, H: tl.constexpr, S: tl.constexpr,
    L: tl.constexpr, SPLITS: tl.constexpr, TAIL: tl.constexpr, NORM: tl.constexpr, EPS: tl.constexpr,
    NS: tl.constexpr, NSP: tl.constexpr, NEXT: tl.constexpr, ADAPT: tl.constexpr, GATES: tl.constexpr,
    GATHER: tl.constexpr, COMPACT: tl.constexpr, A: tl.constexpr, AP: tl.constexpr, R: tl.constexpr,
    RP: tl.constexpr, C: tl.constexpr, CP: tl.constexpr, W: tl.constexpr, FIRST: tl.constexpr, ROW: tl.constexpr,
    HPARTS: tl.constexpr, CHOICE_ROW: tl.constexpr, CHOICE_P: tl.constexpr, CHOICE_LAYER: tl.constexpr,
    CHOICE_FIRST: tl.constexpr, TRACE_ROW: tl.constexpr, TRACE_FIRST: tl.constexpr, BM: tl.constexpr,
    BH: tl.constexpr, BE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """What follows a group's product: norm's factor, choice, update, and rotary and cache (rope), silu(gate) up
    (silu), or the residual sum with the next norm's scale and squares (residual). Programs: column blocks, row blocks.
    """
    P: tl.constexpr = len(SPLITS)
    dtype = out_ptr.dtype.element_ty
    layer = tl.load(layer_ptr).to(tl.int64)
    first, second = pair(tl.program_id(0), TAIL, O, H, BH)
    rows = tl.program_id(1) * BM + tl.arange(0, BM)
    columns = tl.arange(0, BH)
    inside = (rows < M)[:, None] & (columns < BH)[None, :]
    # what waits for nothing is asked for first
    place = y_ptr + rows[:, None] * (O + N) + columns[None, :]
    y0 = tl.load(place + first, mask=inside, other=0.0)
    y1 = tl.load(place + second, mask=inside, other=0.0)
    if TAIL == "residual":
        place = rows[:, None] * O + columns[None, :]
        x0 = tl.load(residual_ptr + place + first, mask=inside, other=0.0).to(tl.float32)
        x1 = tl.load(residual_ptr + place + second, mask=inside, other=0.0).to(tl.float32)
    if NORM:
        factor = rms_factor(square_ptr, rows, M, I, NS, NSP, EPS)
        y0 *= factor
        y1 *= factor
    else:
        factor = tl.full((BM, 1), 1.0, tl.float32)
    if ADAPT:
        b_ptr += layer * (A * R * O)
        scale_ptr += layer * (P * A)
        index_ptr += layer * CHOICE_LAYER + CHOICE_FIRST
        weight_ptr += layer * CHOICE_LAYER + CHOICE_FIRST
        trace_ptr += layer * (M * TRACE_ROW) + TRACE_FIRST
        traced_ptr += layer * (M * TRACE_ROW) + TRACE_FIRST
        SAME: tl.constexpr = TAIL != "silu"
        h_ptr = h_ptr if COMPACT else h_ptr + O
        p = projection(first, SPLITS)
        start = 0
        for i in tl.static_range(P - 1):
            start = tl.where(p > i, start + SPLITS[i], start)
        adapters0, weights0 = routing(
            h_ptr + p * W, factor, scale_ptr, count_ptr, temperature_ptr, index_ptr, weight_ptr, trace_ptr,
            traced_ptr, p, rows, first == start, M, A, AP, C, CP, ROW, GATES, CHOICE_ROW, CHOICE_P, TRACE_ROW, BM,
        )  # fmt: skip
        adapters1 = adapters0
        weights1 = weights0
        if not SAME:
            adapters1, weights1 = routing(
                h_ptr + W, factor, scale_ptr, count_ptr, temperature_ptr, index_ptr, weight_ptr, trace_ptr,
                traced_ptr, 1, rows, first == 0, M, A, AP, C, CP, ROW, GATES, CHOICE_ROW, CHOICE_P, TRACE_ROW, BM,
            )  # fmt: skip
        if not COMPACT:
            weights0 *= factor
            weights1 *= factor
        h0_ptr = h_ptr + p * W + FIRST
        h1_ptr = h_ptr + W + FIRST
        y0, y1 = expand(
            y0, y1, h0_ptr, h1_ptr, b_ptr, adapters0, weights0, adapters1, weights1, rows, first, second,
            M, O, A, R, RP, C, CP, ROW, HPARTS, GATHER, COMPACT, SAME, BM, BH, BE, STAGES,
        )  # fmt: skip
    y0 = y0.to(dtype).to(tl.float32)
    y1 = y1.to(dtype).to(tl.float32)
    if TAIL == "residual":
        x0 = (x0 + y0).to(dtype)
        x1 = (x1 + y1).to(dtype)
        tl.store(out_ptr + place + first, x0, mask=inside)
        tl.store(out_ptr + place + second, x1, mask=inside)
        x0 = x0.to(tl.float32)
        x1 = x1.to(tl.float32)
        following = next_ptr + tl.minimum(layer + NEXT, L - 1) * O + columns
        scaled0 = x0 * tl.load(following + first).to(tl.float32)[None, :]
        scaled1 = x1 * tl.load(following + second).to(tl.float32)[None, :]
        tl.store(scaled_ptr + place + first, scaled0.to(dtype), mask=inside)
        tl.store(scaled_ptr + place + second, scaled1.to(dtype), mask=inside)
        squares = tl.sum(x0 * x0, axis=1) + tl.sum(x1 * x1, axis=1)
        tl.store(squared_ptr + rows * tl.num_programs(0) + tl.program_id(0), squares, mask=rows < M)
    elif TAIL == "silu":
        silu = (y0 / (1 + tl.exp(-y0))).to(dtype).to(tl.float32)
        place = out_ptr + rows[:, None] * (O // 2) + (first + columns)[None, :]
        tl.store(place, (silu * y1).to(dtype), mask=inside)
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
def shrink_kernel(
    layer_ptr,  # int32 [1]
    x_ptr,  # [at least M, I]
    square_ptr,  # float32 [M, NS], if NORM
    a_ptr,  # [L, P, A, R, I]
    logit_ptr,  # float32 [at least M, O + N]: the gates' product from column O on, W columns a projection
    count_ptr, temperature_ptr, index_ptr, weight_ptr,
    trace_in, traced_in,
    h_ptr,  # float32 [HPARTS, M, P, C, R], written
    trace_ptr,  # int32 [L, M, projections of a layer, C], written where gates choose
    traced_ptr,  # float32, likewise
    M: tl.constexpr, I: tl.constexpr, O: tl.constexpr, N: tl.constexpr, P: tl.constexpr, A: tl.constexpr,
    AP: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, C: tl.constexpr, CP: tl.constexpr, W: tl.constexpr,
    GATES: tl.constexpr, CHOICE_ROW: tl.constexpr, CHOICE_P: tl.constexpr, CHOICE_LAYER: tl.constexpr,
    TRACE_ROW: tl.constexpr, TRACE_FIRST: tl.constexpr, NORM: tl.constexpr, EPS: tl.constexpr, NS: tl.constexpr,
    NSP: tl.constexpr, PART: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """The shrinks of a wide bank's chosen adapters, and the choice: a program a row, projection, choice and part."""
    layer = tl.load(layer_ptr).to(tl.int64)
    m = tl.program_id(0) // (P * C)
    p = tl.program_id(0) // C % P
    c = tl.program_id(0) % C
    part = tl.program_id(1)
    which = tl.arange(0, CP)
    row = m + tl.zeros((1,), tl.int32)
    factor = tl.full((1, 1), 1.0, tl.float32)
    if NORM:
        factor = rms_factor(square_ptr, row, M, I, NS, NSP, EPS)
    if GATES:
        logits = logit_ptr + O + p * W
        adapters, weights = choose(logits, count_ptr, temperature_ptr, row, M, A, AP, C, CP, O + N, 1, factor)
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
    h = tl.zeros((RP, BK), tl.float32)
    for k in tl.static_range(0, PART, BK):  # written out: all loads are under way before the first is needed
        ks = part * PART + k + tl.arange(0, BK)
        x = tl.load(x_ptr + m * I + ks)
        a = tl.load(a_ptr + ranks[:, None] * I + ks[None, :], mask=(ranks < R)[:, None] & real, other=0.0)
        h += a.to(tl.float32) * x.to(tl.float32)[None, :]
    total = tl.sum(h, axis=1) * tl.sum(factor)
    place = ((part * M + m) * P * C + p * C + c) * R
    tl.store(h_ptr + place + ranks, total, mask=ranks < R)
