"""The epilogues of a decoding step's products: one kernel for q k v, one for gate and up, one for o and for down.

For NVIDIA GPUs; timed on an H100 and an H200 (docs/performance.md). `triton_gpu.py` launches them; what concerns
adapters is in `adapter_kernels.py`. A program computes two blocks of BH columns, y0 and y1, of BM rows: which two
follows from what is done with them. Grid: column blocks of 2 BH, row blocks. Arrays are dense, sizes constants.

Parameters of all three kernels:
    layer_ptr       int32 [1]
    product_ptr     float32 [at least M, ROW]: x W in the first columns, not yet times the norm's factor; or SPLITS
                    summands of it, [SPLITS, M, ROW]
    square_ptr      float32 [M, PARTS]: squares of the residual stream before the norm
    shrink_ptr      product_ptr again, whose last columns are logits and shrinks of the adapters; or, if compact,
                    float32 [parts, M, P, C, R], the factor in it; or, unless gather, `weigh_kernel`'s [M, P, KP]
    used_ptr        int32, what else that kernel writes, unless gather; then nothing of the routing is read or traced
    b_ptr           [L, A, R, O]
    scale_ptr       float32 [L, P, A]
    count_ptr, temperature_ptr      int32 and float32 [M], where gates choose
    index_ptr, weight_ptr           int32 and float32, a routing that was given; strides as ADAPTERS has them
    trace_in, trace_weight_in       the last two outputs before this launch
    trace_ptr, trace_weight_ptr     int32 and float32 [L, M, projections of a layer, C], this group's written where
                                    gates choose
    ADAPTERS        an `operands.AdapterLayout`, or None: no adapters, and none of their pointers is read
"""

# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false, reportAssignmentType=false
# pyright: reportMissingImports=false, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# (Triton is optional, and a kernel is not Python: constants are upper case, blocks are no plain values)

import triton
import triton.language as tl

from pallas_kernels.decode_step.adapter_kernels import (
    expand_chosen,
    expand_chosen_two,
    expand_weighed,
    load_sum,
    rms_factor,
    routing_of,
)


@triton.jit
def rotate(y0, y1, cos, sin):
    """Rotary embedding of the two halves of a head, float32 [BM, BH] each: of pair (y0, y1) by its angle."""
    return y0 * cos - y1 * sin, y1 * cos + y0 * sin


@triton.jit
def qkv_epilogue_kernel(
    layer_ptr, product_ptr, square_ptr, shrink_ptr, used_ptr, b_ptr, scale_ptr, count_ptr, temperature_ptr, index_ptr,
    weight_ptr,
    cos_ptr,  # float32 [M, H / 2]
    sin_ptr,  # float32 [M, H / 2]
    slot_ptr,  # int32 [M], each token's slot in the first layer's blocks, negative for none
    pages_in,  # the cache before this launch
    trace_in, trace_weight_in,
    query_ptr,  # [M, Q], written
    pages_ptr,  # [L * blocks, Bs, 2 K, H], a slot of each token written: k0 v0 k1 v1 ..
    trace_ptr, trace_weight_ptr,
    M: tl.constexpr, I: tl.constexpr, Q: tl.constexpr, KV: tl.constexpr, H: tl.constexpr, SLOTS: tl.constexpr,
    ROW: tl.constexpr, SPLITS: tl.constexpr, EPS: tl.constexpr, PARTS: tl.constexpr, ADAPTERS: tl.constexpr,
    BM: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """Queries, keys and values: norm's factor, adapters, rotary embedding; keys and values go into the cache.

    Columns: Q of queries, KV of keys, KV of values, heads of H. y0 and y1 are of the two halves of a head. SLOTS: of a
    layer.
    """
    O: tl.constexpr = Q + 2 * KV
    dtype = query_ptr.dtype.element_ty
    layer = tl.load(layer_ptr).to(tl.int64)
    block = tl.program_id(0)
    first = block // (H // 2 // BH) * H + block % (H // 2 // BH) * BH
    second = first + H // 2
    rows = tl.program_id(1) * BM + tl.arange(0, BM)
    columns = tl.arange(0, BH)
    inside = (rows < M)[:, None] & (columns < BH)[None, :]
    # what waits for nothing is asked for first
    product = product_ptr + rows[:, None] * ROW + columns[None, :]
    y0 = load_sum(product + first, inside, M, ROW, SPLITS)
    y1 = load_sum(product + second, inside, M, ROW, SPLITS)
    factor = rms_factor(square_ptr, rows, M, I, PARTS, EPS)
    y0 *= factor
    y1 *= factor
    if ADAPTERS is not None:
        p = (first >= Q).to(tl.int32) + (first >= Q + KV).to(tl.int32)
        start = tl.where(first >= Q + KV, Q + KV, tl.where(first >= Q, Q, 0))
        b_ptr += layer * (ADAPTERS.A * ADAPTERS.R * O)
        if ADAPTERS.gather:
            shrink_ptr += ADAPTERS.start + p * ADAPTERS.projection
            adapters, weights, scales = routing_of(
                shrink_ptr, factor, scale_ptr, count_ptr, temperature_ptr, index_ptr, weight_ptr, trace_ptr,
                trace_weight_ptr, layer, p, rows, first == start, M, 3, ADAPTERS, BM,
            )  # fmt: skip
            weights *= scales
            if not ADAPTERS.compact:
                weights *= factor
            shrink_ptr += ADAPTERS.first_shrink
            y0, y1 = expand_chosen(
                y0, y1, shrink_ptr, b_ptr, adapters, weights, rows, first, second, M, O, ADAPTERS, BH
            )
        else:
            y0, y1 = expand_weighed(
                y0, y1, shrink_ptr, used_ptr, b_ptr, p, p, tl.program_id(1), first, second, M, O, 3, ADAPTERS, BM, BH,
                False,
            )  # fmt: skip
    y0 = y0.to(dtype).to(tl.float32)
    y1 = y1.to(dtype).to(tl.float32)
    if first < Q + KV:
        angle = rows[:, None] * (H // 2) + (first % H + columns)[None, :]
        cos = tl.load(cos_ptr + angle, mask=inside, other=1.0)
        sin = tl.load(sin_ptr + angle, mask=inside, other=0.0)
        y0, y1 = rotate(y0, y1, cos, sin)
    if first < Q:
        query = query_ptr + rows[:, None] * Q + (first + columns)[None, :]
        tl.store(query, y0.to(dtype), mask=inside)
        tl.store(query + H // 2, y1.to(dtype), mask=inside)
    else:
        slot = tl.load(slot_ptr + rows, mask=rows < M, other=-1).to(tl.int64)
        own = (first - Q) % KV  # the column among the keys, or among the values
        head = 2 * (own // H) + (first >= Q + KV).to(tl.int32)
        place = pages_ptr + (layer * SLOTS + slot)[:, None] * (2 * KV) + (head * H + own % H + columns)[None, :]
        written = inside & (slot >= 0)[:, None]
        tl.store(place, y0.to(dtype), mask=written)
        tl.store(place + H // 2, y1.to(dtype), mask=written)


@triton.jit
def silu_epilogue_kernel(
    layer_ptr, product_ptr, square_ptr, shrink_ptr, used_ptr, b_ptr, scale_ptr, count_ptr, temperature_ptr, index_ptr,
    weight_ptr, trace_in, trace_weight_in,
    hidden_ptr,  # [at least M, F], written
    trace_ptr, trace_weight_ptr,
    M: tl.constexpr, I: tl.constexpr, F: tl.constexpr, ROW: tl.constexpr, SPLITS: tl.constexpr, EPS: tl.constexpr,
    PARTS: tl.constexpr, ADAPTERS: tl.constexpr, BM: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """silu(gate) * up: norm's factor, adapters, activation. y0 are columns of gate, y1 the same columns of up."""
    O: tl.constexpr = 2 * F
    dtype = hidden_ptr.dtype.element_ty
    layer = tl.load(layer_ptr).to(tl.int64)
    first = tl.program_id(0) * BH
    second = F + first
    rows = tl.program_id(1) * BM + tl.arange(0, BM)
    columns = tl.arange(0, BH)
    inside = (rows < M)[:, None] & (columns < BH)[None, :]
    # what waits for nothing is asked for first
    product = product_ptr + rows[:, None] * ROW + columns[None, :]
    y0 = load_sum(product + first, inside, M, ROW, SPLITS)
    y1 = load_sum(product + second, inside, M, ROW, SPLITS)
    factor = rms_factor(square_ptr, rows, M, I, PARTS, EPS)
    y0 *= factor
    y1 *= factor
    if ADAPTERS is not None:
        b_ptr += layer * (ADAPTERS.A * ADAPTERS.R * O)
        if ADAPTERS.gather:
            shrink0_ptr = shrink_ptr + ADAPTERS.start
            shrink1_ptr = shrink0_ptr + ADAPTERS.projection
            adapters0, weights0, scales0 = routing_of(
                shrink0_ptr, factor, scale_ptr, count_ptr, temperature_ptr, index_ptr, weight_ptr, trace_ptr,
                trace_weight_ptr, layer, 0, rows, first == 0, M, 2, ADAPTERS, BM,
            )  # fmt: skip
            adapters1, weights1, scales1 = routing_of(
                shrink1_ptr, factor, scale_ptr, count_ptr, temperature_ptr, index_ptr, weight_ptr, trace_ptr,
                trace_weight_ptr, layer, 1, rows, first == 0, M, 2, ADAPTERS, BM,
            )  # fmt: skip
            weights0 *= scales0
            weights1 *= scales1
            if not ADAPTERS.compact:
                weights0 *= factor
                weights1 *= factor
            y0, y1 = expand_chosen_two(
                y0, y1, shrink0_ptr + ADAPTERS.first_shrink, shrink1_ptr + ADAPTERS.first_shrink, b_ptr,
                adapters0, weights0, adapters1, weights1, rows, first, second, M, O, ADAPTERS, BH,
            )  # fmt: skip
        else:
            y0, y1 = expand_weighed(
                y0, y1, shrink_ptr, used_ptr, b_ptr, 0, 1, tl.program_id(1), first, second, M, O, 2, ADAPTERS, BM, BH,
                True,
            )  # fmt: skip
    y0 = y0.to(dtype).to(tl.float32)
    y1 = y1.to(dtype).to(tl.float32)
    silu = (y0 / (1 + tl.exp(-y0))).to(dtype).to(tl.float32)
    hidden = hidden_ptr + rows[:, None] * F + (first + columns)[None, :]
    tl.store(hidden, (silu * y1).to(dtype), mask=inside)


@triton.jit
def residual_epilogue_kernel(
    layer_ptr, product_ptr, shrink_ptr, used_ptr, b_ptr, scale_ptr, count_ptr, temperature_ptr, index_ptr, weight_ptr,
    next_scale_ptr,  # [L, O]: the scale of the norm that follows
    residual_ptr,  # [M, O], the residual stream before this launch
    trace_in, trace_weight_in,
    scaled_ptr,  # [at least M, O], the new residual stream times the next norm's scale, written
    squared_ptr,  # float32 [M, column blocks], squares of the new residual stream, written
    x_ptr,  # [M, O], the new residual stream, written
    trace_ptr, trace_weight_ptr,
    M: tl.constexpr, O: tl.constexpr, L: tl.constexpr, NEXT: tl.constexpr, ROW: tl.constexpr, SPLITS: tl.constexpr,
    ADAPTERS: tl.constexpr, BM: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """The sum with the residual stream: adapters, sum, and what the next norm (NEXT layers on) needs of it.

    There is no norm before o and down, so no factor and no square_ptr. y0 and y1 are neighbouring columns.
    """
    dtype = x_ptr.dtype.element_ty
    layer = tl.load(layer_ptr).to(tl.int64)
    first = tl.program_id(0) * 2 * BH
    second = first + BH
    rows = tl.program_id(1) * BM + tl.arange(0, BM)
    columns = tl.arange(0, BH)
    inside = (rows < M)[:, None] & (columns < BH)[None, :]
    # what waits for nothing is asked for first
    product = product_ptr + rows[:, None] * ROW + columns[None, :]
    y0 = load_sum(product + first, inside, M, ROW, SPLITS)
    y1 = load_sum(product + second, inside, M, ROW, SPLITS)
    place = rows[:, None] * O + columns[None, :]
    x0 = tl.load(residual_ptr + place + first, mask=inside, other=0.0).to(tl.float32)
    x1 = tl.load(residual_ptr + place + second, mask=inside, other=0.0).to(tl.float32)
    if ADAPTERS is not None:
        b_ptr += layer * (ADAPTERS.A * ADAPTERS.R * O)
        if ADAPTERS.gather:
            factor = tl.full((BM, 1), 1.0, tl.float32)
            shrink_ptr += ADAPTERS.start
            adapters, weights, scales = routing_of(
                shrink_ptr, factor, scale_ptr, count_ptr, temperature_ptr, index_ptr, weight_ptr, trace_ptr,
                trace_weight_ptr, layer, 0, rows, first == 0, M, 1, ADAPTERS, BM,
            )  # fmt: skip
            shrink_ptr += ADAPTERS.first_shrink
            y0, y1 = expand_chosen(
                y0, y1, shrink_ptr, b_ptr, adapters, weights * scales, rows, first, second, M, O, ADAPTERS, BH
            )
        else:
            y0, y1 = expand_weighed(
                y0, y1, shrink_ptr, used_ptr, b_ptr, 0, 0, tl.program_id(1), first, second, M, O, 1, ADAPTERS, BM, BH,
                False,
            )  # fmt: skip
    y0 = y0.to(dtype).to(tl.float32)
    y1 = y1.to(dtype).to(tl.float32)
    x0 = (x0 + y0).to(dtype)
    x1 = (x1 + y1).to(dtype)
    tl.store(x_ptr + place + first, x0, mask=inside)
    tl.store(x_ptr + place + second, x1, mask=inside)
    x0 = x0.to(tl.float32)
    x1 = x1.to(tl.float32)
    next_scale = next_scale_ptr + tl.minimum(layer + NEXT, L - 1) * O + columns
    scaled0 = x0 * tl.load(next_scale + first).to(tl.float32)[None, :]
    scaled1 = x1 * tl.load(next_scale + second).to(tl.float32)[None, :]
    tl.store(scaled_ptr + place + first, scaled0.to(dtype), mask=inside)
    tl.store(scaled_ptr + place + second, scaled1.to(dtype), mask=inside)
    squares = tl.sum(x0 * x0, axis=1) + tl.sum(x1 * x1, axis=1)
    tl.store(squared_ptr + rows * tl.num_programs(0) + tl.program_id(0), squares, mask=rows < M)
