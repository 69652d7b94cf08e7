"""Top-k gating in Triton: what a kernel calls that has gate logits at hand. No launch of its own.

For NVIDIA GPUs; timed inside its callers (`routed_lora`, `decode_step`) on an H100 and an H200.
"""

# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false, reportMissingImports=false
# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# (Triton is optional, and a kernel is not Python: constants are upper case, blocks are no plain values)

import triton
import triton.language as tl


@triton.jit
def top_k_softmax(
    logit_ptr, count_ptr, temperature_ptr, rows, M: tl.constexpr, A: tl.constexpr, G: tl.constexpr, GP: tl.constexpr,
    C: tl.constexpr, CP: tl.constexpr, ROW: tl.constexpr, BM: tl.constexpr, factor=1.0,
    SPLITS: tl.constexpr = 1,
):  # fmt: skip
    """The C largest of each row's G logits (ties to the lowest index) and their softmax.

    logit_ptr: float32 [M, G], rows ROW elements apart, or SPLITS summands of it, M rows apart; of the columns the first
    A are adapters', the others null.
    count_ptr: int32 [M], how many adapters a row takes, at most C.
    temperature_ptr: float32 [M]. rows: int32 [BM]. GP, CP: G and C, rounded up to powers of two.
    factor: what the logits are times before they are compared, [BM, 1] or a number.

    Returns (adapters int32, weights float32), each [BM, CP]; from a row's count on, -1 and 0. A null choice is -1 with
    its weight.
    """
    columns = tl.arange(0, GP)
    inside = (rows < M)[:, None] & (columns < G)[None, :]
    place = rows[:, None] * ROW + columns[None, :]
    logits = tl.load(logit_ptr + place, mask=inside, other=0.0, cache_modifier=".cg")
    for split in tl.static_range(1, SPLITS):
        logits += tl.load(logit_ptr + split * M * ROW + place, mask=inside, other=0.0, cache_modifier=".cg")
    logits *= factor
    logits = tl.where((columns < G)[None, :], logits, float("-inf"))
    count = tl.load(count_ptr + rows, mask=rows < M, other=0)
    temperature = tl.load(temperature_ptr + rows, mask=rows < M, other=1.0)
    return softmax_of_largest(logits, count, temperature, A, GP, C, CP, BM)


@triton.jit
def softmax_of_largest(
    logits, count, temperature, A: tl.constexpr, GP: tl.constexpr, C: tl.constexpr, CP: tl.constexpr, BM: tl.constexpr
):
    """The same of logits float32 [BM, GP], -inf behind the G; count int32 and temperature float32 [BM]."""
    columns = tl.arange(0, GP)
    which = tl.arange(0, CP)
    adapters = tl.full((BM, CP), -1, tl.int32)
    values = tl.full((BM, CP), float("-inf"), tl.float32)
    best = tl.max(logits, axis=1)
    for c in tl.static_range(C):
        value = tl.max(logits, axis=1)
        adapter = tl.min(tl.where(logits == value[:, None], columns[None, :], GP), axis=1)
        logits = tl.where(columns[None, :] == adapter[:, None], float("-inf"), logits)
        here = (which == c)[None, :] & (count > c)[:, None]
        adapters = tl.where(here & (adapter < A)[:, None], adapter[:, None], adapters)
        values = tl.where(here, ((value - best) / temperature)[:, None], values)
    weights = tl.exp(values)
    total = tl.sum(weights, axis=1)
    return adapters, weights / tl.where(total > 0, total, 1.0)[:, None]


@triton.jit
def column(block, c: tl.constexpr, CP: tl.constexpr):
    """[BM]: column c of a block [BM, CP], such as the c-th adapter of every row."""
    return tl.sum(tl.where((tl.arange(0, CP) == c)[None, :], block, 0), axis=1)
