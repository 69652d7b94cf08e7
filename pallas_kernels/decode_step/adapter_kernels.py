"""Adapters in a decoding step: device functions that its kernels share, and two kernels that run before an epilogue:
`weigh_kernel` for steps of many rows, `shrink_kernel` for wide banks.

For NVIDIA GPUs; timed on an H100 and an H200 (docs/performance.md). `triton_gpu.py` launches the kernels. Weights and
routing traces are whole stacks of layers: a kernel is given the layer as one int32 in device memory and adds its
offset, so that nothing copies a layer out of a stack. Sums are float32 in a fixed order.

Parameters that recur: rows int32 [BM], a program's rows of M; p, the projection within its group, of P; O, the group's
columns; ADAPTERS, an `operands.AdapterLayout`; factor float32 [BM, 1], 1 / rms of the rows.
"""

# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false, reportAssignmentType=false
# pyright: reportMissingImports=false, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# (Triton is optional, and a kernel is not Python: constants are upper case, blocks are no plain values)

import triton
import triton.language as tl

from pallas_kernels.topk_gating.triton_kernels import column, top_k_softmax


@triton.jit
def rms_factor(square_ptr, rows, M: tl.constexpr, I: tl.constexpr, PARTS: tl.constexpr, EPS: tl.constexpr):
    """[BM, 1]: 1 / rms of rows of I values. square_ptr: float32 [M, PARTS], whose sums are those of the squares."""
    part = tl.arange(0, triton.next_power_of_2(PARTS))
    inside = (rows < M)[:, None] & (part < PARTS)[None, :]
    squares = tl.load(square_ptr + rows[:, None] * PARTS + part[None, :], mask=inside, other=0.0)
    return tl.rsqrt(tl.sum(squares, axis=1) / I + EPS)[:, None]


@triton.jit
def load_sum(place, inside, M: tl.constexpr, ROW: tl.constexpr, SPLITS: tl.constexpr):
    """The sum of a block of the product's SPLITS summands, of M rows of ROW elements each."""
    y = tl.load(place, mask=inside, other=0.0)
    for split in tl.static_range(1, SPLITS):
        y += tl.load(place + split * M * ROW, mask=inside, other=0.0)
    return y


@triton.jit
def route_by_gates(
    logit_ptr, factor, count_ptr, temperature_ptr, trace_ptr, trace_weight_ptr, layer, p, rows, traces,
    M: tl.constexpr, ROW: tl.constexpr, ADAPTERS: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """(adapters int32, weights float32), [BM, CP]: the choice of projection p's gates, also traced where `traces`.

    logit_ptr: float32 [M, G], rows ROW elements apart, not yet times the factor; its summands M rows apart.
    """
    which = tl.arange(0, ADAPTERS.CP)
    adapters, weights = top_k_softmax(
        logit_ptr, count_ptr, temperature_ptr, rows, M, ADAPTERS.A, ADAPTERS.G, ADAPTERS.GP, ADAPTERS.C, ADAPTERS.CP,
        ROW, BM, factor, ADAPTERS.splits,
    )  # fmt: skip
    start = layer * ADAPTERS.routing_layer + ADAPTERS.routing_first
    place = rows[:, None] * ADAPTERS.routing_row + p * ADAPTERS.routing_projection + which[None, :]
    inside = (rows < M)[:, None] & (which < ADAPTERS.C)[None, :] & traces
    tl.store(trace_ptr + start + place, adapters, mask=inside)
    tl.store(trace_weight_ptr + start + place, weights, mask=inside)
    return adapters, weights


@triton.jit
def routing_of(
    shrink_ptr, factor, scale_ptr, count_ptr, temperature_ptr, index_ptr, weight_ptr, trace_ptr, trace_weight_ptr,
    layer, p, rows, traces, M: tl.constexpr, P: tl.constexpr, ADAPTERS: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """(adapters int32, weights and scales float32), [BM, CP], of projection p: by its gates, or as they were given.

    shrink_ptr: projection p's logits, if gates choose. The weights are 0 where no adapter acts.
    """
    if ADAPTERS.gates:
        adapters, weights = route_by_gates(
            shrink_ptr, factor, count_ptr, temperature_ptr, trace_ptr, trace_weight_ptr, layer, p, rows, traces,
            M, ADAPTERS.row, ADAPTERS, BM,
        )  # fmt: skip
    else:
        which = tl.arange(0, ADAPTERS.CP)
        inside = (rows < M)[:, None] & (which < ADAPTERS.C)[None, :]
        start = layer * ADAPTERS.routing_layer + ADAPTERS.routing_first
        place = rows[:, None] * ADAPTERS.routing_row + p * ADAPTERS.routing_projection + which[None, :]
        adapters = tl.load(index_ptr + start + place, mask=inside, other=-1)
        weights = tl.load(weight_ptr + start + place, mask=inside, other=0.0)
    real = (adapters >= 0) & (adapters < ADAPTERS.A)
    scale_ptr += layer * (P * ADAPTERS.A)
    scales = tl.load(scale_ptr + p * ADAPTERS.A + tl.where(real, adapters, 0))
    return adapters, tl.where(real, weights, 0.0), scales


@triton.jit
def adapter_rows(adapters, weights, c: tl.constexpr, ADAPTERS: tl.constexpr):
    """Of one row's choice c: its weight; int32 [RP], its adapter's rows of B [A * R, O]; bool [RP], which are real."""
    adapter = tl.sum(column(adapters, c, ADAPTERS.CP), axis=0)
    weight = tl.sum(column(weights, c, ADAPTERS.CP), axis=0)
    ranks = tl.arange(0, ADAPTERS.RP)
    real = (ranks < ADAPTERS.R) & (adapter >= 0) & (adapter < ADAPTERS.A)
    return weight, tl.where(real, adapter * ADAPTERS.R + ranks, 0), real


@triton.jit
def load_b(b_ptr, source, real, first, O: tl.constexpr, BH: tl.constexpr):
    """[RP, BH]: rows `source` of a layer's B [A * R, O], BH columns from `first` on; 0 where they are not real."""
    columns = tl.arange(0, BH)
    place = b_ptr + source[:, None] * O + columns[None, :]
    return tl.load(place + first, mask=real[:, None] & (columns < BH)[None, :], other=0.0)


@triton.jit
def load_shrink(
    shrink_ptr, source, real, row, c: tl.constexpr, weight, M: tl.constexpr, ADAPTERS: tl.constexpr,
):  # fmt: skip
    """float32 [RP, 1]: one row's shrink by its choice c, whose rows of B are `source`, times its weight.

    shrink_ptr: float32 [M, A R], or of the choices alone and in parts to be added (compact), [parts, M, C R].
    """
    if ADAPTERS.compact:
        parts = tl.arange(0, ADAPTERS.parts)  # a power of two
        ranks = tl.arange(0, ADAPTERS.RP)
        place = (parts * M + row)[:, None] * ADAPTERS.row + (c * ADAPTERS.R + ranks)[None, :]
        h = tl.sum(tl.load(shrink_ptr + place, mask=real[None, :] & (parts >= 0)[:, None], other=0.0), axis=0)
    else:
        h = load_sum(shrink_ptr + row * ADAPTERS.row + source, real, M, ADAPTERS.row, ADAPTERS.splits)
    return (h * weight)[:, None]


@triton.jit
def expand_chosen(
    y0, y1, shrink_ptr, b_ptr, adapters, weights, rows, first, second, M: tl.constexpr, O: tl.constexpr,
    ADAPTERS: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """y0, y1 float32 [1, BH], columns of one projection from `first` and `second` on, plus one row's update.

    b_ptr: a layer's [A * R, O], of which the rows of the chosen adapters are read. weights: times the scales.
    """
    C: tl.constexpr = ADAPTERS.C
    row = tl.sum(rows, axis=0)  # there is one
    for c in tl.static_range(C):
        weight, source, real = adapter_rows(adapters, weights, c, ADAPTERS)
        b0 = load_b(b_ptr, source.to(tl.int64), real, first, O, BH)
        b1 = load_b(b_ptr, source.to(tl.int64), real, second, O, BH)
        h = load_shrink(shrink_ptr, source, real, row, c, weight, M, ADAPTERS)
        y0 += tl.sum(h * b0.to(tl.float32), axis=0)[None, :]
        y1 += tl.sum(h * b1.to(tl.float32), axis=0)[None, :]
    return y0, y1


@triton.jit
def expand_chosen_two(
    y0, y1, shrink0_ptr, shrink1_ptr, b_ptr, adapters0, weights0, adapters1, weights1, rows, first, second,
    M: tl.constexpr, O: tl.constexpr, ADAPTERS: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """As `expand_chosen`, where y0 and y1 are of two projections, each with shrinks and a routing of its own."""
    C: tl.constexpr = ADAPTERS.C
    row = tl.sum(rows, axis=0)  # there is one
    for c in tl.static_range(C):
        weight, source, real = adapter_rows(adapters0, weights0, c, ADAPTERS)
        b0 = load_b(b_ptr, source.to(tl.int64), real, first, O, BH)
        h = load_shrink(shrink0_ptr, source, real, row, c, weight, M, ADAPTERS)
        y0 += tl.sum(h * b0.to(tl.float32), axis=0)[None, :]
        weight, source, real = adapter_rows(adapters1, weights1, c, ADAPTERS)
        b1 = load_b(b_ptr, source.to(tl.int64), real, second, O, BH)
        h = load_shrink(shrink1_ptr, source, real, row, c, weight, M, ADAPTERS)
        y1 += tl.sum(h * b1.to(tl.float32), axis=0)[None, :]
    return y0, y1


@triton.jit
def expand_weighed(
    y0, y1, h_ptr, used_ptr, b_ptr, p0, p1, tile, first, second, M: tl.constexpr, O: tl.constexpr, P: tl.constexpr,
    ADAPTERS: tl.constexpr, BM: tl.constexpr, BH: tl.constexpr, TWO: tl.constexpr,
):  # fmt: skip
    """y0, y1 float32 [BM, BH], columns of projections p0 and p1 from `first` and `second` on, plus the rows' update.

    h_ptr, used_ptr: what `weigh_kernel` wrote. b_ptr: a layer's [A * R, O]; of a routing that was given no more is read
    than the tile's rows use (gates spread over all, and nothing need wait for `used_ptr`). tile: of BM rows. TWO: p0
    and p1 differ.
    """
    K: tl.constexpr = ADAPTERS.A * ADAPTERS.R
    KP: tl.constexpr = ADAPTERS.KP
    BK: tl.constexpr = ADAPTERS.BK
    rows = tile * BM + tl.arange(0, BM)
    h_ptr += rows[:, None] * (P * KP)
    used0 = 0
    used1 = 0
    if not ADAPTERS.gates:
        used0 = used_blocks(used_ptr, p0, tile, M, ADAPTERS, BM)
        used1 = used0
        if TWO:
            used1 = used_blocks(used_ptr, p1, tile, M, ADAPTERS, BM)
    for k in tl.range(0, KP, BK, num_stages=3):
        ks = k + tl.arange(0, BK)
        real0 = ks < K
        real1 = real0
        inside0 = (rows < M)[:, None]
        inside1 = inside0
        if not ADAPTERS.gates:
            own = tl.arange(0, ADAPTERS.KBP) == k // BK
            here0 = tl.max(tl.where(own, used0, 0), axis=0) > 0
            here1 = tl.max(tl.where(own, used1, 0), axis=0) > 0
            real0 = real0 & here0
            real1 = real1 & here1
            inside0 = inside0 & here0
            inside1 = inside1 & here1
        b0 = load_b(b_ptr, ks, real0, first, O, BH)
        b1 = load_b(b_ptr, ks, real1, second, O, BH)
        h0 = tl.load(h_ptr + p0 * KP + ks[None, :], mask=inside0, other=0.0)
        h1 = h0
        if TWO:
            h1 = tl.load(h_ptr + p1 * KP + ks[None, :], mask=inside1, other=0.0)
        y0 = tl.dot(h0, b0, y0, input_precision="ieee")
        y1 = tl.dot(h1, b1, y1, input_precision="ieee")
    return y0, y1


@triton.jit
def used_blocks(used_ptr, p, tile, M: tl.constexpr, ADAPTERS: tl.constexpr, BM: tl.constexpr):
    """int32 [KBP]: which blocks of BK rows of B any row of a tile of BM uses; used_ptr: see `weigh_kernel`."""
    WM: tl.constexpr = ADAPTERS.WM
    TILES: tl.constexpr = (M + WM - 1) // WM
    KB: tl.constexpr = ADAPTERS.KP // ADAPTERS.BK
    tiles = tile * (BM // WM) + tl.arange(0, BM // WM)
    block = tl.arange(0, ADAPTERS.KBP)
    inside = (tiles < TILES)[:, None] & (block < KB)[None, :]
    place = (p * TILES + tiles)[:, None] * KB + block[None, :]
    return tl.max(tl.load(used_ptr + place, mask=inside, other=0), axis=0)


@triton.jit
def weigh_kernel(
    layer_ptr,  # int32 [1]
    product_ptr,  # float32 [at least M, ROW], logits and shrinks in its last columns
    square_ptr,  # float32 [M, PARTS], squares of the residual stream before the norm, if NORM
    scale_ptr,  # float32 [L, P, A]
    count_ptr,  # int32 [M], if gates choose
    temperature_ptr,  # float32 [M], if gates choose
    index_ptr,  # int32, the routing that was given
    weight_ptr,  # float32, likewise
    fused_ptr,  # int32 [M], not 0 for rows whose adapters act as one, if ADAPTERS.fused
    trace_in, trace_weight_in,  # the last two outputs before this launch
    h_ptr,  # [M, P, KP], written
    used_ptr,  # int32 [P, tiles of rows, KP / BK], written where a routing was given
    trace_ptr,  # int32 [L, M, projections of a layer, C], this group's written, if gates choose
    trace_weight_ptr,  # float32, likewise
    M: tl.constexpr, I: tl.constexpr, P: tl.constexpr, NORM: tl.constexpr, EPS: tl.constexpr, PARTS: tl.constexpr,
    ADAPTERS: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """The shrinks that a step of many rows multiplies all B's with: weighted where an adapter was chosen, else 0.

    h, as `xla.gathered_expand` has it, columns a R + r: w_a s_a h_ar; of a fused row w_a s_a sum_c w_c h_cr. used: 1
    where one of a tile's rows chose an adapter of that block of columns. Grid: tiles of BM rows, P, blocks of BK.
    """
    C: tl.constexpr = ADAPTERS.C
    R: tl.constexpr = ADAPTERS.R
    K: tl.constexpr = ADAPTERS.A * R
    KP: tl.constexpr = ADAPTERS.KP
    BK: tl.constexpr = ADAPTERS.BK
    layer = tl.load(layer_ptr).to(tl.int64)
    tile = tl.program_id(0)
    p = tl.program_id(1)
    block = tl.program_id(2)
    rows = tile * BM + tl.arange(0, BM)
    ks = block * BK + tl.arange(0, BK)
    product_ptr += ADAPTERS.start + p * ADAPTERS.projection
    shrink_ptr = product_ptr + ADAPTERS.first_shrink + rows[:, None] * ADAPTERS.row
    # what waits for no choice is asked for first
    inside = (rows < M)[:, None] & (ks < K)[None, :]
    h = load_sum(shrink_ptr + ks[None, :], inside, M, ADAPTERS.row, ADAPTERS.splits)
    factor = tl.full((BM, 1), 1.0, tl.float32)
    if NORM:
        factor = rms_factor(square_ptr, rows, M, I, PARTS, EPS)
    adapters, weights, scales = routing_of(
        product_ptr, factor, scale_ptr, count_ptr, temperature_ptr, index_ptr, weight_ptr, trace_ptr, trace_weight_ptr,
        layer, p, rows, block == 0, M, P, ADAPTERS, BM,
    )  # fmt: skip
    if ADAPTERS.fused:
        fused = tl.load(fused_ptr + rows, mask=rows < M, other=0) != 0
        mean = tl.zeros((BM, BK), tl.float32)
        for c in tl.static_range(C):
            w = column(weights, c, ADAPTERS.CP)[:, None]
            adapter = column(adapters, c, ADAPTERS.CP)[:, None]
            real = (adapter >= 0) & (adapter < ADAPTERS.A) & (rows < M)[:, None]
            place = shrink_ptr + adapter * R + (ks % R)[None, :]
            mean += w * load_sum(place, real, M, ADAPTERS.row, ADAPTERS.splits)
        h = tl.where(fused[:, None], mean, h)
    weights *= scales
    weight = tl.zeros((BM, BK), tl.float32)
    for c in tl.static_range(C):
        own = (ks // R)[None, :] == column(adapters, c, ADAPTERS.CP)[:, None]
        weight += tl.where(own, column(weights, c, ADAPTERS.CP)[:, None], 0.0)
    weight = tl.where((ks < K)[None, :], weight, 0.0)  # null choices are columns behind the last adapter's
    place = rows[:, None] * (P * KP) + p * KP + ks[None, :]
    tl.store(h_ptr + place, (h * weight * factor).to(h_ptr.dtype.element_ty), mask=(rows < M)[:, None])
    if not ADAPTERS.gates:
        used = tl.max(tl.max((weight != 0).to(tl.int32), axis=1), axis=0)
        tl.store(used_ptr + (p * tl.num_programs(0) + tile) * (KP // BK) + block, used)


@triton.jit
def shrink_kernel(
    layer_ptr,  # int32 [1]
    x_ptr,  # [at least M, I], the product's input
    square_ptr,  # float32 [M, PARTS], squares of the residual stream before the norm, if NORM
    a_ptr,  # [L, P, A, R, I]
    product_ptr,  # float32 [at least M, ROW], gates' logits of projection p in columns O + p * GATES on, if GATES
    count_ptr,  # int32 [M], if GATES
    temperature_ptr,  # float32 [M], if GATES
    index_ptr,  # int32 [M, C], the routing that was given, if not GATES
    trace_in, trace_weight_in,  # the last two outputs before this launch
    shrink_ptr,  # float32 [ADAPTERS.parts, M, P, C, R], written
    trace_ptr,  # int32 [L, M, projections of a layer, C], this group's written, if GATES
    trace_weight_ptr,  # float32, likewise
    M: tl.constexpr, I: tl.constexpr, O: tl.constexpr, P: tl.constexpr, ROW: tl.constexpr, GATES: tl.constexpr,
    NORM: tl.constexpr, EPS: tl.constexpr, PARTS: tl.constexpr, ADAPTERS: tl.constexpr, PART: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
    """The chosen adapters' shrinks alone, where a bank is too wide for all; with gates, the choice, which is traced.

    Programs: rows times projections times choices; parts of PART of the I values, in blocks of BK.
    GATES: columns of logits a projection, 0 where the routing was given.
    """
    C: tl.constexpr = ADAPTERS.C
    R: tl.constexpr = ADAPTERS.R
    RP: tl.constexpr = ADAPTERS.RP
    layer = tl.load(layer_ptr).to(tl.int64)
    m = tl.program_id(0) // (P * C)
    p = tl.program_id(0) // C % P
    c = tl.program_id(0) % C
    part = tl.program_id(1)
    row = m + tl.zeros((1,), tl.int32)
    factor = tl.full((1, 1), 1.0, tl.float32)
    if NORM:
        factor = rms_factor(square_ptr, row, M, I, PARTS, EPS)
    if GATES > 0:
        adapters, _ = route_by_gates(
            product_ptr + O + p * GATES, factor, count_ptr, temperature_ptr, trace_ptr, trace_weight_ptr, layer, p, row,
            (c == 0) & (part == 0), M, ROW, ADAPTERS, 1,
        )  # fmt: skip
        adapter = tl.sum(tl.where((tl.arange(0, ADAPTERS.CP) == c)[None, :], adapters, 0))
    else:
        start = layer * ADAPTERS.routing_layer + ADAPTERS.routing_first
        adapter = tl.load(index_ptr + start + m * ADAPTERS.routing_row + p * ADAPTERS.routing_projection + c)
    ranks = tl.arange(0, RP)
    real = (adapter >= 0) & (adapter < ADAPTERS.A)
    a_ptr += layer * (P * ADAPTERS.A * R * I) + (p * ADAPTERS.A + tl.where(real, adapter, 0)).to(tl.int64) * (R * I)
    h = tl.zeros((RP, BK), tl.float32)
    for k in tl.static_range(0, PART, BK):  # written out: all loads are under way before the first is needed
        ks = part * PART + k + tl.arange(0, BK)
        x = tl.load(x_ptr + m * I + ks)
        a = tl.load(a_ptr + ranks[:, None] * I + ks[None, :], mask=(ranks < R)[:, None] & real, other=0.0)
        h += a.to(tl.float32) * x.to(tl.float32)[None, :]
    total = tl.sum(h, axis=1) * tl.sum(factor)
    place = ((part * M + m) * P * C + p * C + c) * R
    tl.store(shrink_ptr + place + ranks, total, mask=ranks < R)
