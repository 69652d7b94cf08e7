"""Attention over blocks in Triton: of tokens that are decoded, one a sequence, and of runs of prompt tokens.

For NVIDIA GPUs. `triton_gpu.py` launches the kernels. Nothing is compiled for a context's length: a program reads how
far its tokens see. Exponentials are of base 2, so FACTOR, what the products of query and key are times, has log2(e).

Parameters of both kernels:
    first_ptr       int32 [1], what is added to the blocks in the tables
    q_ptr           [M, N H]
    pages_ptr       [X, Bs, 2 K, H], k0 v0 k1 v1 .. in a slot
    position_ptr    int32 [M], EMPTY (negative) for no token
    table_ptr       int32 [R, W]
"""

# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false, reportAssignmentType=false
# pyright: reportMissingImports=false, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# (Triton is optional, and a kernel is not Python: constants are upper case, blocks are no plain values)

import triton
import triton.language as tl


@triton.jit
def online_softmax(scores, seen, largest, total):
    """A running softmax after one more block of scores float32 [Q, BS], of which those `seen` count.

    largest, total: float32 [Q], the maximum so far and the sum of 2^(score - maximum).

    Returns (the block's 2^(score - maximum) [Q, BS], what earlier sums are times [Q], maximum, total).
    """
    scores = tl.where(seen, scores, -1e30)
    maximum = tl.maximum(largest, tl.max(scores, axis=1))
    weights = tl.where(seen, tl.exp2(scores - maximum[:, None]), 0.0)
    rescale = tl.exp2(largest - maximum)
    return weights, rescale, maximum, total * rescale + tl.sum(weights, axis=1)


@triton.jit
def over_total(y, total):
    """y divided by a softmax's total; 0 where nothing was seen."""
    return y / tl.where(total > 0, total, 1.0)


@triton.jit
def slot_places(first, table_ptr, row, slots, end, W: tl.constexpr, BLOCK: tl.constexpr, SLOT: tl.constexpr):
    """int64 [BS]: where in the pages a sequence's slots begin, SLOT elements each; any for those from `end` on."""
    block = tl.load(table_ptr + row * W + slots // BLOCK, mask=slots < end, other=0)
    return ((block + first).to(tl.int64) * BLOCK + slots % BLOCK) * SLOT


@triton.jit
def part_of(length, PARTS: tl.constexpr, LEAST: tl.constexpr, BS: tl.constexpr):
    """Slots of a part, whole blocks of BS, at least LEAST: a sequence of `length` has at most PARTS of them."""
    return tl.maximum(LEAST, (length + PARTS * BS - 1) // (PARTS * BS) * BS)


@triton.jit
def decode_kernel(
    first_ptr, q_ptr, pages_ptr, position_ptr, table_ptr,
    y_in,  # y before this launch, if PARTS == 1
    y_ptr,  # [at least M, N H], R rows written; or float32 [PARTS, R, N, H + 2]: sums, then maximum and total
    R: tl.constexpr, N: tl.constexpr, K: tl.constexpr, H: tl.constexpr, G: tl.constexpr, GP: tl.constexpr,
    W: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr, LEAST: tl.constexpr, FACTOR: tl.constexpr,
    BS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The R tokens that are decoded. Programs: rows; key heads, G query heads each (GP: rounded up); parts of a row.

    A row's length, and with it its parts, follow from its token's position; parts that a row has not write nothing.
    """
    row = tl.program_id(0)
    head = tl.program_id(1)
    part = tl.program_id(2)
    length = tl.load(position_ptr + row) + 1
    size = part_of(length, PARTS, LEAST, BS)
    end = tl.minimum(length, part * size + size)
    first = tl.load(first_ptr)
    group = tl.arange(0, GP)
    inside = (group < G)[:, None]
    width = tl.arange(0, H)
    q = tl.load(q_ptr + row * (N * H) + (head * G + group)[:, None] * H + width[None, :], mask=inside, other=0.0)
    keys_ptr = pages_ptr + 2 * head * H
    largest = tl.full((GP,), -1e30, tl.float32)
    total = tl.zeros((GP,), tl.float32)
    y = tl.zeros((GP, H), tl.float32)
    for s in tl.range(part * size, end, BS, num_stages=STAGES):
        slots = s + tl.arange(0, BS)
        seen = slots < end
        place = slot_places(first, table_ptr, row, slots, end, W, BLOCK, 2 * K * H)
        k = tl.load(keys_ptr + place[None, :] + width[:, None], mask=seen[None, :], other=0.0)
        scores = tl.dot(q, k, input_precision="ieee") * FACTOR
        weights, rescale, largest, total = online_softmax(scores, seen[None, :], largest, total)
        v = tl.load(keys_ptr + H + place[:, None] + width[None, :], mask=seen[:, None], other=0.0)
        y = tl.dot(weights.to(v.dtype), v, y * rescale[:, None], input_precision="ieee")
    heads = head * G + group
    if PARTS == 1:
        y = over_total(y, total[:, None])
        place = y_ptr + row * (N * H) + heads[:, None] * H + width[None, :]
        tl.store(place, y.to(y_ptr.dtype.element_ty), mask=inside)
    elif part * size < length:
        place = y_ptr + ((part * R + row) * N + heads) * (H + 2)
        tl.store(place[:, None] + width[None, :], y, mask=inside)
        tl.store(place + H, largest, mask=group < G)
        tl.store(place + H + 1, total, mask=group < G)


@triton.jit
def combine_kernel(
    parts_ptr,  # float32 [PARTS, R, N, H + 2]
    position_ptr,
    y_in,  # y before this launch
    y_ptr,  # [at least M, N H], the first R rows written
    R: tl.constexpr, N: tl.constexpr, H: tl.constexpr, PARTS: tl.constexpr, LEAST: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """The sums of an attention's parts, each brought to the largest maximum and added. Programs: rows, heads."""
    row = tl.program_id(0)
    place = row * N + tl.program_id(1)
    width = tl.arange(0, H)
    length = tl.load(position_ptr + row) + 1
    size = part_of(length, PARTS, LEAST, BS)
    count = (length + size - 1) // size
    part = tl.arange(0, triton.next_power_of_2(PARTS))
    ends = parts_ptr + (part * (R * N) + place) * (H + 2) + H
    maxima = tl.load(ends, mask=part < count, other=-1e30)
    totals = tl.load(ends + 1, mask=part < count, other=0.0)
    weights = tl.where(part < count, tl.exp2(maxima - tl.max(maxima, axis=0)), 0.0)
    sums = parts_ptr + ((part * (R * N) + place) * (H + 2))[:, None] + width[None, :]
    y = tl.sum(weights[:, None] * tl.load(sums, mask=(part < count)[:, None], other=0.0), axis=0)
    y = over_total(y, tl.sum(weights * totals, axis=0))
    tl.store(y_ptr + place * H + width, y.to(y_ptr.dtype.element_ty))


@triton.jit
def runs_kernel(
    first_ptr, q_ptr, pages_ptr, position_ptr, table_ptr,
    run_ptr,  # int32 [COUNT], the sequence of each run
    y_ptr,  # [at least M, N H], written from row R on
    R: tl.constexpr, COUNT: tl.constexpr, N: tl.constexpr, K: tl.constexpr, H: tl.constexpr, G: tl.constexpr,
    GB: tl.constexpr, W: tl.constexpr, BLOCK: tl.constexpr, RUN: tl.constexpr, RUNS: tl.constexpr,
    FACTOR: tl.constexpr, BS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Prompt tokens behind the R that are decoded, in COUNT runs of RUN.

    Programs: RUNS runs, the last first, as they see most; GB heads of the G that share keys. Runs of one sequence that
    follow each other in a program read its keys once; a program of several sequences takes one after the other.
    """
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1) // ((G + GB - 1) // GB)
    queries = tl.arange(0, RUNS * RUN * GB)  # tokens times heads
    group = tl.program_id(1) % ((G + GB - 1) // GB) * GB + queries % GB
    run = program * RUNS + queries // (RUN * GB)
    row = tl.load(run_ptr + run, mask=run < COUNT, other=-1)
    before = tl.load(run_ptr + run - 1, mask=(run < COUNT) & (run > program * RUNS), other=-1)
    starts = (queries % (RUN * GB) == 0) & ((row != before) | (run == program * RUNS))
    piece = tl.cumsum(starts.to(tl.int32), axis=0)  # of runs of one sequence, from 1 on
    token = R + program * (RUNS * RUN) + queries // GB
    position = tl.load(position_ptr + token, mask=run < COUNT, other=-1)
    first = tl.load(first_ptr)
    inside = ((run < COUNT) & (group < G))[:, None]
    width = tl.arange(0, H)
    own = (token * N + head * G + group)[:, None] * H + width[None, :]
    q = tl.load(q_ptr + own, mask=inside, other=0.0)
    keys_ptr = pages_ptr + 2 * head * H
    largest = tl.full((RUNS * RUN * GB,), -1e30, tl.float32)
    total = tl.zeros((RUNS * RUN * GB,), tl.float32)
    y = tl.zeros((RUNS * RUN * GB, H), tl.float32)
    for i in range(1, tl.max(piece, axis=0) + 1):
        sees = tl.where(piece == i, position, -1)
        end = tl.max(sees, axis=0) + 1
        sequence = tl.max(tl.where(piece == i, row, -1), axis=0)
        for s in tl.range(0, end, BS, num_stages=STAGES):
            slots = s + tl.arange(0, BS)
            place = slot_places(first, table_ptr, sequence, slots, end, W, BLOCK, 2 * K * H)
            k = tl.load(keys_ptr + place[None, :] + width[:, None], mask=(slots < end)[None, :], other=0.0)
            scores = tl.dot(q, k, input_precision="ieee") * FACTOR
            seen = slots[None, :] <= sees[:, None]
            weights, rescale, largest, total = online_softmax(scores, seen, largest, total)
            v = tl.load(keys_ptr + H + place[:, None] + width[None, :], mask=(slots < end)[:, None], other=0.0)
            y = tl.dot(weights.to(v.dtype), v, y * rescale[:, None], input_precision="ieee")
    y = over_total(y, total[:, None])
    tl.store(y_ptr + own, y.to(y_ptr.dtype.element_ty), mask=inside)
