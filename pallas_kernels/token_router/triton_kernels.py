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
def times(x, w_ptr, rows, columns, STRIDE: tl.constexpr):
    """x [rows] w [rows, columns], float32."""
    w = tl.load(w_ptr + rows[:, None] * STRIDE + columns[None, :])
    return tl.sum(x[:, None] * w.to(tl.float32), axis=0)


@triton.jit
def times_turned(x, w_ptr, rows, columns, STRIDE: tl.constexpr):
    """x [columns] w^T [columns, rows], float32."""
    w = tl.load(w_ptr + rows[:, None] * STRIDE + columns[None, :])
    return tl.sum(x[None, :] * w.to(tl.float32), axis=1)


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
    h = rounded(unit(u, E), qkv_ptr)
    q1 = rounded(tl.load(read_ptr + first) + times(h, qkv_ptr, column, first, 3 * E), qkv_ptr)
    q2 = rounded(tl.load(read_ptr + second) + times(h, qkv_ptr, column, second, 3 * E), qkv_ptr)
    k1 = rounded(tl.load(read_ptr + E + first) + times(h, qkv_ptr + E, column, first, 3 * E), qkv_ptr)
    k2 = rounded(tl.load(read_ptr + E + second) + times(h, qkv_ptr + E, column, second, 3 * E), qkv_ptr)
    v = rounded(tl.load(read_ptr + 2 * E + column) + times(h, qkv_ptr + 2 * E, column, column, 3 * E), qkv_ptr)
    y = attend(
        rounded(q1 * cos - q2 * sin, qkv_ptr), rounded(q2 * cos + q1 * sin, qkv_ptr),
        rounded(k1 * cos - k2 * sin, qkv_ptr), rounded(k2 * cos + k1 * sin, qkv_ptr), v,
        f * blocks, pages_ptr, table_ptr, row, position, E, H, W, BLOCK, BS, STAGES,
    )  # fmt: skip
    u += times(y, o_ptr + f * (E * E), column, column, E)
    h = rounded(unit(u, E), qkv_ptr)
    gate_up_ptr += f * (4 * E * E)
    for part in range(2):  # of the 2 E units
        gate = times(h, gate_up_ptr + part * E, column, column, 4 * E)
        up = times(h, gate_up_ptr + 2 * E + part * E, column, column, 4 * E)
        act = rounded(gate / (1 + tl.exp(-gate)) * up, qkv_ptr)
        u += times(act, down_ptr + (2 * f + part) * (E * E), column, column, E)
    return u


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
    task_units, before_units, segment_units = task_ptr + E * AP, before_ptr + E * BP, segment_ptr + E * S
    h = rounded(unit(u, E), task_ptr)
    own = times(h, task_ptr, column, task, AP)
    p = rounded(softmax(times(h, before_ptr, column, before, BP), before, A + 1), task_ptr)
    s = rounded(softmax(times(h, segment_ptr, column, segment, S), segment, S), task_ptr)
    k1 = times_turned(p, before_units, first, before, BP) + times_turned(s, segment_units, first, segment, S)
    k2 = times_turned(p, before_units, second, before, BP) + times_turned(s, segment_units, second, segment, S)
    k1 = rounded(k1, task_ptr)
    k2 = rounded(k2, task_ptr)
    v = rounded(times_turned(rounded(softmax(own, task, A), task_ptr), task_units, column, task, AP), task_ptr)
    sharpness = rounded(tl.load(lookup_ptr) * E**0.5, task_ptr)
    read = attend(
        rounded(k1 * sharpness, task_ptr), rounded(k2 * sharpness, task_ptr), k1, k2, v,
        hop * blocks, pages_ptr, table_ptr, row, position, E, E, W, BLOCK, BS, STAGES,
    )  # fmt: skip
    return own + tl.load(lookup_ptr + 1) * times(read, task_units, column, task, AP)


@triton.jit
def shifted(
    z, hop, w_ptr, shifts_ptr, blocks, table_ptr, row, position, E: tl.constexpr, SHIFTS: tl.constexpr,
    W: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What z [E] of the SHIFTS tokens before gives a token by w [SHIFTS, E, E]; keeps its own z, rounded."""
    column = tl.arange(0, E)
    y = tl.zeros((E,), tl.float32)
    for n in range(SHIFTS + 1):
        at = tl.maximum(position - n, 0)
        block = tl.load(table_ptr + row * W + at // BLOCK)
        place = shifts_ptr + (((block + hop * blocks).to(tl.int64)) * BLOCK + at % BLOCK) * E + column
        if n == 0:
            tl.store(place, z.to(shifts_ptr.dtype.element_ty), mask=position >= 0)
        else:
            before = tl.load(place, mask=position >= n, other=0.0).to(tl.float32)
            y += times(before, w_ptr + (n - 1) * (E * E), column, column, E)
    return y


@triton.jit
def token_router_kernel(
    read_ptr,  # float32 [M, (1 + 3 F) E]: of the embedding, into the stream, and q, k, v of every layer
    cos_ptr, sin_ptr,  # float32 [M, H / 2]
    position_ptr,  # int32 [M], negative for no token
    table_ptr,  # int32 [M, W]
    shift_ptr,  # [SHIFTS, E, E]
    qkv_ptr,  # [F, E, 3 E]
    o_ptr,  # [F, E, E]
    gate_up_ptr,  # [F, E, 4 E]
    down_ptr,  # [F, 2 E, E]
    hop_ptr,  # [1 + SHIFTS, E, E]
    task_ptr,  # [2, E, AP], of which A columns count: as they are, and of length 1; so the next two
    before_ptr,  # [2, E, BP], A + 1
    segment_ptr,  # [2, E, S]
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
            p = rounded(softmax(logits, task, A), task_ptr)
            found = rounded(times_turned(p, task_ptr + E * AP, column, task, AP), task_ptr)
            u += times(found, hop_ptr, column, column, E)
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
