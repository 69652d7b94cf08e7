"""x of few rows through a matrix in 8 or 4 bits, and through 16-bit rows behind it, in one launch.

For NVIDIA GPUs; `triton_gpu.py` launches it. Few rows wait for memory, so a matrix is read as it is stored, in words of
32 bits (`weight` says which inputs share one), and becomes bfloat16 in registers, as the left operand of W x^T: what is
converted by one warp is multiplied by it. Values at one place in their words are multiplied with inputs that lie side
by side, so that nothing is put into order on the way.
"""

# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false, reportAssignmentType=false
# pyright: reportMissingImports=false, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# (Triton is optional, and a kernel is not Python: constants are upper case, blocks are no plain values)

import triton
import triton.language as tl

# A byte of each of two words, of place %s, is put into both bytes of its half of a word.
_PAIR = """{
    .reg .b32 a, b, c;
    prmt.b32 a, $1, $2, %s;
"""
# e4m3: its exponent lies where bfloat16 has its lowest bits then, which is the value times 2^-120. Triton's own
# conversion goes by float16 and float32.
_E4M3 = """
    and.b32 b, a, 0x80008000;
    shr.u32 a, a, 4;
    lop3.b32 a, a, 0x07f007f0, b, 0xea;
    mov.b32 b, 0x7b807b80;
    mov.b32 c, 0x80008000;
    fma.rn.bf16x2 $0, a, b, c;
}"""
# Signed: behind the bits of 128 the lower seven are 128 + (v mod 128), the sign's is 128 or 256; v is the difference.
_INT8 = """
    mov.b32 c, 0x43004300;
    lop3.b32 b, a, 0x00800080, c, 0xea;
    lop3.b32 a, a, 0x007f007f, c, 0xea;
    mov.b32 c, 0xbf80bf80;
    fma.rn.bf16x2 $0, b, c, a;
}"""
# A half becomes 128 + q (q are the last bits of a bfloat16 of that size), less $3: 128 and the zero.
_HALF = """
    mov.b32 c, 0x43004300;
    lop3.b32 a, a, 0x000f000f, c, 0xea;
    mov.b32 c, 0xbf80bf80;
    fma.rn.bf16x2 $0, $3, c, a;
}"""
_PLACES = "0x4400", "0x5511", "0x6622", "0x7733"
FROM_E4M3 = tl.constexpr(tuple(_PAIR % place + _E4M3 for place in _PLACES))
FROM_INT8 = tl.constexpr(tuple(_PAIR % place + _INT8 for place in _PLACES))
FROM_HALVES = tl.constexpr(
    tuple(_PAIR % place + shift + _HALF for place in _PLACES for shift in ("", "    shr.u32 a, a, 4;"))
)


@triton.jit
def value(w, PLACE: tl.constexpr, E4M3: tl.constexpr, dtype: tl.constexpr, ASM: tl.constexpr):
    """The 8-bit values at one place of words int32, in dtype."""
    if ASM:
        TEXT: tl.constexpr = FROM_E4M3[PLACE] if E4M3 else FROM_INT8[PLACE]
        return tl.inline_asm_elementwise(TEXT, "=r,r,r", [w], dtype=tl.bfloat16, is_pure=True, pack=2)
    byte = (w >> (8 * PLACE)).to(tl.int8)
    if E4M3:
        return byte.to(tl.float8e4nv, bitcast=True).to(dtype)
    return byte.to(dtype)


@triton.jit
def half(w, zero, PLACE: tl.constexpr, dtype: tl.constexpr, ASM: tl.constexpr):
    """The halves of bytes at one place of words int32 [BN, J] less zero int32 [BN], in dtype."""
    if ASM:
        less = tl.broadcast_to((zero | 0x4300).to(tl.int16).to(tl.bfloat16, bitcast=True)[:, None], w.shape)
        return tl.inline_asm_elementwise(
            FROM_HALVES[PLACE], "=r,r,r,r", [w, less], dtype=tl.bfloat16, is_pure=True, pack=2
        )
    return (((w >> (4 * PLACE)) & 15) - zero[:, None]).to(dtype)


@triton.jit
def product_kernel(
    layer_ptr,  # int32 [1]
    x_ptr,  # [at least M, I]
    w_ptr,  # [L, O, I] int8 or float8e4nv; or uint8 [L, O, I / 2], if S; in words
    scale_ptr,  # float32 [L, O], or [L, I / S, O]
    zero_ptr,  # uint8 [L, O, 4 I / B], if S
    behind_ptr,  # [L, N, I], in x's type, if N
    y_ptr,  # float32 [SPLITS, M, O + N], written
    M: tl.constexpr, I: tl.constexpr, O: tl.constexpr, N: tl.constexpr, S: tl.constexpr, B: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, J: tl.constexpr, SPLITS: tl.constexpr, BEHIND: tl.constexpr,
    STAGES: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """The SPLITS summands of y = x [W | behind], each of its share of the inputs.

    S: inputs of a group in 4 bit; 0 in 8 bit. B: of a block of words. J: words that are read at a time. BEHIND: rows of
    a block of what is behind, whose blocks come first: the matrix's last blocks then end together. ASM: conversions by
    inline assembly.
    Grid: N / BEHIND + O / BN, blocks of BM rows, SPLITS.
    """
    layer = tl.load(layer_ptr).to(tl.int64)
    first = N // BEHIND
    block = tl.program_id(0)
    rows = tl.program_id(1) * BM + tl.arange(0, BM)
    split = tl.program_id(2)
    y_ptr += split * M * (O + N)
    if block >= first:
        columns = (block - first) * BN + tl.arange(0, BN)
        if S == 0:
            words = w_ptr.to(tl.pointer_type(tl.int32), bitcast=True) + layer * (O * (I // 4))
            E4M3: tl.constexpr = w_ptr.dtype.element_ty == tl.float8e4nv
            y = eight_bit(x_ptr, words, rows, columns, split, M, I, B, BM, BN, J, SPLITS, STAGES, E4M3, ASM)
            y *= tl.load(scale_ptr + layer * O + columns)[:, None]
        else:
            words = w_ptr.to(tl.pointer_type(tl.int32), bitcast=True) + layer * (O * (I // 8))
            zeros = zero_ptr.to(tl.pointer_type(tl.int32), bitcast=True) + layer * (O * (I // B))
            y = four_bit(
                x_ptr, words, scale_ptr + layer * (I // S) * O, zeros, rows, columns, split, M, I, O, S, B, BM, BN, J,
                SPLITS, STAGES, ASM,
            )  # fmt: skip
        store(y_ptr, y, rows, columns, M, O + N)
    elif N > 0:
        behind = block * BEHIND + tl.arange(0, BEHIND)
        behind_ptr += layer * N * I
        if BEHIND == 64:
            z = plain(x_ptr, behind_ptr, rows, behind, split, M, I, I // SPLITS, BM, BEHIND, 64, STAGES)
        else:
            PARTS: tl.constexpr = 64 // BEHIND
            parts = plain_in_parts(
                x_ptr, behind_ptr, rows, behind, split, M, I, I // SPLITS, PARTS, BM, BEHIND, 64, STAGES
            )
            z = tl.sum(parts, axis=0)
        store(y_ptr, z, rows, O + behind, M, O + N)


@triton.jit
def store(y_ptr, y, rows, columns, M: tl.constexpr, ROW: tl.constexpr):
    """y [BN, BM] goes to y_ptr [M, ROW]."""
    tl.store(y_ptr + rows[None, :] * ROW + columns[:, None], y, mask=(rows < M)[None, :])


@triton.jit
def plain(
    x_ptr, w_ptr, rows, columns, split, M: tl.constexpr, I: tl.constexpr, SHARE: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """float32 [BN, BM]: a split's SHARE of x's inputs through rows of w [N, I] in its own type."""
    ks = tl.arange(0, BK)
    place = w_ptr + split * SHARE + columns[:, None] * I + ks[None, :]
    x_place = x_ptr + split * SHARE + rows[None, :] * I + ks[:, None]
    acc = tl.zeros((BN, BM), tl.float32)
    for k in tl.range(0, SHARE, BK, num_stages=STAGES):
        w = tl.load(place + k, mask=(ks + k < SHARE)[None, :], other=0.0)
        x = tl.load(x_place + k, mask=(rows < M)[None, :] & (ks + k < SHARE)[:, None], other=0.0)
        acc = tl.dot(w, x, acc, input_precision="ieee")
    return acc


@triton.jit
def plain_in_parts(
    x_ptr, w_ptr, rows, columns, split, M: tl.constexpr, I: tl.constexpr, SHARE: tl.constexpr, PARTS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """float32 [PARTS, BN, BM], whose sum is `plain`: groups of warps share the inputs once more, so that few columns
    keep a program's warps busy."""
    x_ptr += split * SHARE
    w_ptr += split * SHARE
    ks = tl.arange(0, PARTS)[:, None] * BK + tl.arange(0, BK)[None, :]
    place = w_ptr + columns[None, :, None] * I + ks[:, None, :]
    acc = tl.zeros((PARTS, BN, BM), tl.float32)
    for k in tl.range(0, SHARE, PARTS * BK, num_stages=STAGES):
        w = tl.load(place + k, mask=(ks + k < SHARE)[:, None, :], other=0.0)
        x = tl.load(
            x_ptr + rows[None, None, :] * I + (ks + k)[:, :, None],
            mask=(rows < M)[None, None, :] & (ks + k < SHARE)[:, :, None], other=0.0,
        )  # fmt: skip
        acc = tl.dot(w, x, acc, input_precision="ieee")
    return acc


@triton.jit
def eight_bit(
    x_ptr, w_ptr, rows, columns, split, M: tl.constexpr, I: tl.constexpr, B: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, J: tl.constexpr, SPLITS: tl.constexpr, STAGES: tl.constexpr, E4M3: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """float32 [BN, BM]: a split's inputs of x through columns of words int32 [O, I / 4], without their scale."""
    js = tl.arange(0, J)
    place = w_ptr + columns[:, None] * (I // 4) + js[None, :]
    x_place = x_ptr + rows[None, :] * I + js[:, None]
    mask = (rows < M)[None, :]
    acc = tl.zeros((BN, BM), tl.float32)
    STEPS: tl.constexpr = I // 4 // J // SPLITS
    EACH: tl.constexpr = B // 4 // J  # steps of a block
    for step in tl.range(split * STEPS, (split + 1) * STEPS, num_stages=STAGES):
        w = tl.load(place + step * J)
        k = step // EACH * B + step % EACH * J
        for p in tl.static_range(4):
            x = tl.load(x_place + k + p * (B // 4), mask=mask, other=0.0)
            acc = tl.dot(value(w, p, E4M3, x.dtype, ASM), x, acc, input_precision="ieee")
    return acc


@triton.jit
def four_bit(
    x_ptr, w_ptr, scale_ptr, zero_ptr, rows, columns, split, M: tl.constexpr, I: tl.constexpr, O: tl.constexpr,
    S: tl.constexpr, B: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, J: tl.constexpr, SPLITS: tl.constexpr,
    STAGES: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """As `eight_bit` of words int32 [O, I / 8], a group's sum times its scale; zeros int32 [O, I / B]."""
    js = tl.arange(0, J)
    place = w_ptr + columns[:, None] * (I // 8) + js[None, :]
    x_place = x_ptr + rows[None, :] * I + js[:, None]
    mask = (rows < M)[None, :]
    acc = tl.zeros((BN, BM), tl.float32)
    STEPS: tl.constexpr = I // 8 // J // SPLITS
    EACH: tl.constexpr = B // 8 // J
    GROUPS: tl.constexpr = max(1, B // S)  # that a block's places lie in
    PLACES: tl.constexpr = 8 // GROUPS
    for step in tl.range(split * STEPS, (split + 1) * STEPS, num_stages=STAGES):
        w = tl.load(place + step * J)
        k = step // EACH * B
        zeros = tl.load(zero_ptr + columns * (I // B) + step // EACH)
        for g in tl.static_range(GROUPS):
            group = k // S + g
            scale = tl.load(scale_ptr + group * O + columns)
            zero = (zeros >> (8 * g)) & 15
            own = tl.zeros((BN, BM), tl.float32)
            for i in tl.static_range(PLACES):
                x = tl.load(x_place + k + step % EACH * J + (g * PLACES + i) * (B // 8), mask=mask, other=0.0)
                own = tl.dot(half(w, zero, g * PLACES + i, x.dtype, ASM), x, own, input_precision="ieee")
            acc += scale[:, None] * own
    return acc
