"""The token router's part of a decoding step in Triton: every sequence's next token, whose program does all of it.

For NVIDIA GPUs. `triton_gpu.py` launches the kernel; `meteora_jax.routing.token_router` has the mathematics, and its
names: a token of one sequence asks nothing of another's, so that a program goes through all layers and look-ups of its
token without waiting for anybody. Sums are float32; what is rounded there is rounded here.

A vector of E that is turned by the rotary embedding, or multiplied with such keys, is two of E / 2: of each head its
first half, and its second.
"""

# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false, reportAssignmentType=false
# pyright: reportMissingImports=false, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# (Triton is optional, and a kernel is not Python: constants are upper case, blocks are no plain values)

import triton
import triton.language as tl

from pallas_kernels.paged_attention.triton_kernels import online_softmax, over_total, slot_places


@triton.jit
def rounded(x, like_ptr):
    """x float32 as the type of what `like_ptr` points to has it, in float32."""
    return x.to(like_ptr.dtype.element_ty).to(tl.float32)


@triton.jit
def unit(u, E: tl.constexpr):
    """u float32 [E] over its root mean square."""
    return u * tl.rsqrt(tl.sum(u * u, axis=0) / E + 1e-6)


@triton.jit
def softmax(x, columns, COLUMNS: tl.constexpr):
    """Of the first COLUMNS of x float32 [N], 0 behind them; columns: 0, 1, .. N - 1."""
    x = tl.where(columns < COLUMNS, x, float("-inf"))
    x = tl.exp(x - tl.max(x, axis=0))
    return x / tl.sum(x, axis=0)


@triton.jit
def tile(w_ptr, rows, columns, STRIDE: tl.constexpr):
    """[rows, columns] of w [.., STRIDE]. Asked for well before it is needed, so that no step of the chain waits."""
    return tl.load(w_ptr + rows[:, None] * STRIDE + columns[None, :])


@triton.jit
def product(w, x):
    """float32 [N], w [N, M] times x float32 [M]: sums within a warp, as a warp holds whole rows."""
    return tl.sum(w.to(tl.float32) * x[None, :], axis=1)


@triton.jit
def attend(
    q1, q2, k1, k2, v, first, pages_ptr, table_ptr, row, position, E: tl.constexpr, H: tl.constexpr, W: tl.constexpr,
    BLOCK: tl.constexpr, BS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Attention of a token's query, float32 in halves, over the tokens before it, which are in `pages`, and over
    itself, k1, k2 and v; writes its key and value to its slot. H: width of a head. first: of the layer's blocks.

    Returns float32 [E], rounded.
    """
    factor = 1.4426950408889634 / H**0.5  # exponentials are of base 2
    half = tl.arange(0, E // 2)
    column = tl.arange(0, E)
    first_key = half // (H // 2) * (2 * H) + half % (H // 2)
    value = column // H * (2 * H) + H + column % H
    head = tl.arange(0, 16)[:, None]
    own_head = head == half[None, :] // (H // 2)
    q1 = tl.where(own_head, q1[None, :], 0.0)
    q2 = tl.where(own_head, q2[None, :], 0.0)
    largest = tl.sum(q1 * k1[None, :] + q2 * k2[None, :], axis=1) * factor
    q1 = q1.to(pages_ptr.dtype.element_ty)
    q2 = q2.to(pages_ptr.dtype.element_ty)
    total = tl.full((16,), 1.0, tl.float32)
    y = tl.zeros((16, E), tl.float32) + v[None, :]
    for s in tl.range(0, position, BS, num_stages=STAGES):
        slots = s + tl.arange(0, BS)
        seen = slots < position
        place = slot_places(first, table_ptr, row, slots, position, W, BLOCK, 2 * E)
        keys = pages_ptr + place[None, :] + first_key[:, None]
        scores = tl.dot(q1, tl.load(keys, mask=seen[None, :], other=0.0), input_precision="ieee")
        scores = tl.dot(q2, tl.load(keys + H // 2, mask=seen[None, :], other=0.0), scores, input_precision="ieee")
        weights, rescale, largest, total = online_softmax(scores * factor, seen[None, :], largest, total)
        values = tl.load(pages_ptr + place[:, None] + value[None, :], mask=seen[:, None], other=0.0)
        y = tl.dot(weights.to(values.dtype), values, y * rescale[:, None], input_precision="ieee")
    y = tl.sum(tl.where(head == column[None, :] // H, over_total(y, total[:, None]), 0.0), axis=0)
    there = position >= 0
    at = tl.maximum(position, 0)
    block = tl.load(table_ptr + row * W + at // BLOCK)
    slot = pages_ptr + ((block + first).to(tl.int64) * BLOCK + at % BLOCK) * (2 * E)
    tl.store(slot + first_key, k1.to(pages_ptr.dtype.element_ty), mask=there)
    tl.store(slot + first_key + H // 2, k2.to(pages_ptr.dtype.element_ty), mask=there)
    tl.store(slot + value, v.to(pages_ptr.dtype.element_ty), mask=there)
    return rounded(y, pages_ptr)


@triton.jit
def run_layer(
    u, f, read_ptr, cos, sin, qkv_ptr, o_ptr, gate_up_ptr, down_ptr, pages_ptr, blocks, table_ptr, row, position,
    E: tl.constexpr, H: tl.constexpr, W: tl.constexpr, BLOCK: tl.constexpr, BS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The stream u [E] behind layer f. read_ptr: float32, what the embedding gives q, k and v of all layers."""
    column = tl.arange(0, E)
    half = tl.arange(0, E // 2)
    first = half // (H // 2) * H + half % (H // 2)
    second = first + H // 2
    read_ptr += f * (3 * E)
    qkv_ptr += f * (3 * E * E)
    w_q1 = tile(qkv_ptr, first, column, E)
    w_q2 = tile(qkv_ptr, second, column, E)
    w_k1 = tile(qkv_ptr, E + first, column, E)
    w_k2 = tile(qkv_ptr, E + second, column, E)
    w_v = tile(qkv_ptr, 2 * E + column, column, E)
    q1 = tl.load(read_ptr + first)
    q2 = tl.load(read_ptr + second)
    k1 = tl.load(read_ptr + E + first)
    k2 = tl.load(read_ptr + E + second)
    v = tl.load(read_ptr + 2 * E + column)
    h = rounded(unit(u, E), qkv_ptr)
    q1 = rounded(q1 + product(w_q1, h), qkv_ptr)
    q2 = rounded(q2 + product(w_q2, h), qkv_ptr)
    k1 = rounded(k1 + product(w_k1, h), qkv_ptr)
    k2 = rounded(k2 + product(w_k2, h), qkv_ptr)
    v = rounded(v + product(w_v, h), qkv_ptr)
    w_o = tile(o_ptr + f * (E * E), column, column, E)
    y = attend(
        rounded(q1 * cos - q2 * sin, qkv_ptr), rounded(q2 * cos + q1 * sin, qkv_ptr),
        rounded(k1 * cos - k2 * sin, qkv_ptr), rounded(k2 * cos + k1 * sin, qkv_ptr), v,
        f * blocks, pages_ptr, table_ptr, row, position, E, H, W, BLOCK, BS, STAGES,
    )  # fmt: skip
    gate_up_ptr += f * (4 * E * E)
    down_ptr += f * (2 * E * E)
    w_gate1 = tile(gate_up_ptr, column, column, E)
    w_up1 = tile(gate_up_ptr, 2 * E + column, column, E)
    u += product(w_o, y)
    w_gate2 = tile(gate_up_ptr, E + column, column, E)
    w_up2 = tile(gate_up_ptr, 3 * E + column, column, E)
    h = rounded(unit(u, E), qkv_ptr)
    act1 = unit_of(product(w_gate1, h), product(w_up1, h), qkv_ptr)
    w_down1 = tile(down_ptr, column, column, 2 * E)  # where registers are free again
    w_down2 = tile(down_ptr + E, column, column, 2 * E)
    act2 = unit_of(product(w_gate2, h), product(w_up2, h), qkv_ptr)
    return u + product(w_down1, act1) + product(w_down2, act2)


@triton.jit
def unit_of(gate, up, like_ptr):
    """silu(gate) up, rounded."""
    return rounded(gate / (1 + tl.exp(-gate)) * up, like_ptr)


@triton.jit
def look_up(
    u, hop, task_ptr, before_ptr, segment_ptr, lookup_ptr, pages_ptr, blocks, table_ptr, row, position,
    E: tl.constexpr, A: tl.constexpr, AP: tl.constexpr, BP: tl.constexpr, S: tl.constexpr, W: tl.constexpr,
    BLOCK: tl.constexpr, BS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Logits float32 [AP] of a token's task by one look-up, of which the first A count."""
    column = tl.arange(0, E)
    first = tl.arange(0, E // 2)
    second = first + E // 2
    task = tl.arange(0, AP)
    before = tl.arange(0, BP)
    segment = tl.arange(0, S)
    w_task = tile(task_ptr, task, column, E)
    w_before = tile(before_ptr, before, column, E)
    w_segment = tile(segment_ptr, segment, column, E)
    before1 = tile(before_ptr + E * BP, first, before, BP)
    before2 = tile(before_ptr + E * BP, second, before, BP)
    segment1 = tile(segment_ptr + E * S, first, segment, S)
    segment2 = tile(segment_ptr + E * S, second, segment, S)
    task_units = tile(task_ptr + E * AP, column, task, AP)
    sharpness = rounded(tl.load(lookup_ptr) * E**0.5, task_ptr)
    weight = tl.load(lookup_ptr + 1)
    h = rounded(unit(u, E), task_ptr)
    own = product(w_task, h)
    p = rounded(softmax(product(w_before, h), before, A + 1), task_ptr)
    s = rounded(softmax(product(w_segment, h), segment, S), task_ptr)
    k1 = rounded(product(before1, p) + product(segment1, s), task_ptr)
    k2 = rounded(product(before2, p) + product(segment2, s), task_ptr)
    v = rounded(product(task_units, rounded(softmax(own, task, A), task_ptr)), task_ptr)
    units_turned = tile(task_ptr + 2 * E * AP, task, column, E)
    read = attend(
        rounded(k1 * sharpness, task_ptr), rounded(k2 * sharpness, task_ptr), k1, k2, v,
        hop * blocks, pages_ptr, table_ptr, row, position, E, E, W, BLOCK, BS, STAGES,
    )  # fmt: skip
    return own + weight * product(units_turned, read)


@triton.jit
def shifted(
    z, hop, w_ptr, shifts_ptr, blocks, table_ptr, row, position, E: tl.constexpr, SHIFTS: tl.constexpr,
    W: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What z [E] of the SHIFTS tokens before gives a token by w [SHIFTS, E, E]; keeps its own z, rounded."""
    column = tl.arange(0, E)
    y = tl.zeros((E,), tl.float32)
    for n in tl.static_range(SHIFTS + 1):
        at = tl.maximum(position - n, 0)
        block = tl.load(table_ptr + row * W + at // BLOCK)
        place = shifts_ptr + (((block + hop * blocks).to(tl.int64)) * BLOCK + at % BLOCK) * E + column
        if n == 0:
            tl.store(place, z.to(shifts_ptr.dtype.element_ty), mask=position >= 0)
        else:
            w = tile(w_ptr + (n - 1) * (E * E), column, column, E)
            y += product(w, tl.load(place, mask=position >= n, other=0.0).to(tl.float32))
    return y


@triton.jit
def token_router_kernel(
    read_ptr,  # float32 [M, (1 + 3 F) E]: of the embedding, into the stream, and q, k, v of every layer
    cos_ptr, sin_ptr,  # float32 [M, H / 2]
    position_ptr,  # int32 [M], negative for no token
    table_ptr,  # int32 [M, W]
    shift_ptr,  # [SHIFTS, E, E]; this and all that follow have outputs first, then inputs
    qkv_ptr,  # [F, 3 E, E]
    o_ptr,  # [F, E, E]
    gate_up_ptr,  # [F, 4 E, E]
    down_ptr,  # [F, E, 2 E]
    hop_ptr,  # [1 + SHIFTS, E, E]
    task_ptr,  # logits' [AP, E], of which A count; [E, AP] of length 1, and these turned, [AP, E]
    before_ptr,  # the same with BP and A + 1
    segment_ptr,  # the same with S, all of which count
    lookup_ptr,  # float32 [2]
    layers_in, hops_in, shifts_in,  # the cache before this launch
    logits_ptr,  # float32 [M, A]
    layers_ptr,  # [F blocks, BLOCK, 2 E / H, H]
    hops_ptr,  # [2 blocks, BLOCK, 2, E]
    shifts_ptr,  # [2 blocks BLOCK, E]
    F: tl.constexpr, E: tl.constexpr, H: tl.constexpr, A: tl.constexpr, AP: tl.constexpr, BP: tl.constexpr,
    S: tl.constexpr, SHIFTS: tl.constexpr, W: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
    BS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Logits of each row's next token, and the cache with it. Programs: rows."""
    row = tl.program_id(0)
    position = tl.load(position_ptr + row)
    column = tl.arange(0, E)
    turn = tl.arange(0, E // 2) % (H // 2)
    cos = tl.load(cos_ptr + row * (H // 2) + turn)
    sin = tl.load(sin_ptr + row * (H // 2) + turn)
    read_ptr += row * ((1 + 3 * F) * E)
    u = tl.load(read_ptr + column)
    u += shifted(u, 0, shift_ptr, shifts_ptr, BLOCKS, table_ptr, row, position, E, SHIFTS, W, BLOCK)
    task = tl.arange(0, AP)
    logits = tl.zeros((AP,), tl.float32)
    for f in range(F):
        if f == F - 1:  # the last layer reads what the first look-up found
            logits = look_up(
                u, 0, task_ptr, before_ptr, segment_ptr, lookup_ptr, hops_ptr, BLOCKS, table_ptr, row, position,
                E, A, AP, BP, S, W, BLOCK, BS, STAGES,
            )  # fmt: skip
            task_units = tile(task_ptr + E * AP, column, task, AP)
            w_hop = tile(hop_ptr, column, column, E)
            found = product(task_units, rounded(softmax(logits, task, A), task_ptr))
            found = rounded(found, task_ptr)
            u += product(w_hop, found)
            u += shifted(
                found, 1, hop_ptr + E * E, shifts_ptr, BLOCKS, table_ptr, row, position, E, SHIFTS, W, BLOCK
            )  # fmt: skip
        u = run_layer(
            u, f, read_ptr + E, cos, sin, qkv_ptr, o_ptr, gate_up_ptr, down_ptr, layers_ptr, BLOCKS, table_ptr, row,
            position, E, H, W, BLOCK, BS, STAGES,
        )  # fmt: skip
    logits = look_up(
        u, 1, task_ptr, before_ptr, segment_ptr, lookup_ptr, hops_ptr, BLOCKS, table_ptr, row, position,
        E, A, AP, BP, S, W, BLOCK, BS, STAGES,
    )  # fmt: skip
    tl.store(logits_ptr + row * A + task, logits, mask=task < A)
