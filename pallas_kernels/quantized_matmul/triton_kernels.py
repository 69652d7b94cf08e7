"""x of few rows through a matrix in 8 or 4 bits, and through 16-bit rows behind it, in one launch.

For NVIDIA GPUs; `triton_gpu.py` launches it. Few rows wait for memory, so a matrix is read as it is stored, a row of
inputs at a time, and becomes bfloat16 in registers, as the left operand of W x^T: what is converted by one warp is
multiplied by it. PARTS groups of warps share a program's inputs, so that narrow matrices fill the chip as well.
"""

# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false, reportAssignmentType=false
# pyright: reportMissingImports=false, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# (Triton is optional, and a kernel is not Python: constants are upper case, blocks are no plain values)

import triton
import triton.language as tl

# Four bytes of e4m3 become bfloat16 times 2^-120: their exponents lie where bfloat16 has its lowest bits. Triton's own
# conversion goes by float16 and float32.
FROM_E4M3 = tl.constexpr(
    """{
    .reg .b32 a, b;
    prmt.b32 a, $2, 0, 0x1404;
    prmt.b32 b, $2, 0, 0x3424;
    and.b32 $0, a, 0x80008000;
    and.b32 $1, b, 0x80008000;
    shr.u32 a, a, 4;
    shr.u32 b, b, 4;
    lop3.b32 $0, a, 0x07f007f0, $0, 0xea;
    lop3.b32 $1, b, 0x07f007f0, $1, 0xea;
    }"""
)
# The lower, or the upper, halves of four bytes become 128 + q: q are the last bits of a bfloat16 of that size.
FROM_LOW = tl.constexpr(
    """{
    .reg .b32 a;
    and.b32 a, $2, 0x0f0f0f0f;
    prmt.b32 $0, a, 0x43434343, 0x4140;
    prmt.b32 $1, a, 0x43434343, 0x4342;
    }"""
)
FROM_HIGH = tl.constexpr(
    """{
    .reg .b32 a;
    shr.u32 a, $2, 4;
    and.b32 a, a, 0x0f0f0f0f;
    prmt.b32 $0, a, 0x43434343, 0x4140;
    prmt.b32 $1, a, 0x43434343, 0x4342;
    }"""
)


@triton.jit
def four(w, ASM: tl.constexpr):
    """Values of 8 bits as bfloat16, by a program of four a time."""
    return tl.inline_asm_elementwise(ASM, "=r,=r,r", [w], dtype=tl.bfloat16, is_pure=True, pack=4)


@triton.jit
def load_x(x_ptr, rows, ks, M: tl.constexpr, I: tl.constexpr):
    """[PARTS, BK, BM]: inputs ks [PARTS, BK] of x [M, I]."""
    return tl.load(x_ptr + rows[None, None, :] * I + ks[:, :, None], mask=(rows < M)[None, None, :], other=0.0)


@triton.jit
def dot(w, x, acc, PARTS: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr):
    """acc + w x, blocks of PARTS products."""
    if PARTS == 1:
        K: tl.constexpr = w.shape[2]
        part = tl.dot(w.reshape([BN, K]), x.reshape([K, BM]), acc.reshape([BN, BM]), input_precision="ieee")
        return part.reshape([1, BN, BM])
    return tl.dot(w, x, acc, input_precision="ieee")


@triton.jit
def product_kernel(
    layer_ptr,  # int32 [1]
    x_ptr,  # [at least M, I]
    w_ptr,  # [L, O, I] int8 or float8e4nv; or uint8 [L, O, I / 2], in each group of S inputs j below j + S / 2
    scale_ptr,  # float32 [L, O], or [L, I / S, O]
    zero_ptr,  # uint8 [L, I / S, O], if S
    behind_ptr,  # [L, N, I], in x's type, if N
    y_ptr,  # float32 [SPLITS, M, O + N], written
    M: tl.constexpr, I: tl.constexpr, O: tl.constexpr, N: tl.constexpr, S: tl.constexpr, PARTS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SPLITS: tl.constexpr, BEHIND: tl.constexpr,
    STAGES: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """The SPLITS summands of y = x [W | behind], each of its share of the inputs; what is behind is whole in the first,
    and not written in the others.

    S: inputs of a group in 4 bit, then BK is S; 0 in 8 bit. ASM: conversions by inline assembly.
    BEHIND: rows of a block of what is behind, whose blocks come first: the matrix's last blocks then end together.
    Grid: N / BEHIND + O / BN, blocks of BM rows, SPLITS.
    """
    layer = tl.load(layer_ptr).to(tl.int64)
    first = N // BEHIND
    block = tl.program_id(0)
    rows = tl.program_id(1) * BM + tl.arange(0, BM)
    split = tl.program_id(2)
    begin = split * (I // SPLITS)
    if N == 0:
        matrix(
            x_ptr, w_ptr, scale_ptr, zero_ptr, y_ptr + split * M * O, layer, block, rows, begin, M, I, O, N, S, PARTS,
            BM, BN, BK, SPLITS, STAGES, ASM,
        )  # fmt: skip
    elif block >= first:
        matrix(
            x_ptr, w_ptr, scale_ptr, zero_ptr, y_ptr + split * M * (O + N), layer, block - first, rows, begin, M, I, O,
            N, S, PARTS, BM, BN, BK, SPLITS, STAGES, ASM,
        )  # fmt: skip
    elif split == 0:
        behind = block * BEHIND + tl.arange(0, BEHIND)
        z = plain(x_ptr, behind_ptr + layer * N * I, rows, behind, M, I, PARTS, BM, BEHIND, 256 // PARTS, STAGES)
        store(y_ptr, z, rows, O + behind, M, O + N)


@triton.jit
def matrix(
    x_ptr, w_ptr, scale_ptr, zero_ptr, y_ptr, layer, block, rows, begin, M: tl.constexpr, I: tl.constexpr,
    O: tl.constexpr, N: tl.constexpr, S: tl.constexpr, PARTS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, SPLITS: tl.constexpr, STAGES: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """A block of BN columns of the quantised matrix, of I / SPLITS inputs from `begin` on; else as `product_kernel`."""
    columns = block * BN + tl.arange(0, BN)
    if S == 0:
        w_ptr += layer * O * I + begin
        y = eight_bit(x_ptr + begin, w_ptr, rows, columns, M, I, PARTS, BM, BN, BK, SPLITS, STAGES, ASM)
        y *= tl.load(scale_ptr + layer * O + columns)[None, :, None]
    else:
        w_ptr += layer * O * (I // 2) + begin // 2
        group = layer * (I // S) * O + begin // S * O
        y = four_bit(
            x_ptr + begin, w_ptr, scale_ptr + group, zero_ptr + group, rows, columns, M, I, O, S, PARTS, BM, BN,
            SPLITS, STAGES, ASM,
        )  # fmt: skip
    store(y_ptr, y, rows, columns, M, O + N)


@triton.jit
def store(y_ptr, y, rows, columns, M: tl.constexpr, ROW: tl.constexpr):
    """The sum of y's parts [PARTS, BN, BM] goes to y_ptr [M, ROW]."""
    place = y_ptr + rows[None, :] * ROW + columns[:, None]
    tl.store(place, tl.sum(y, axis=0), mask=(rows < M)[None, :])


@triton.jit
def plain(
    x_ptr, w_ptr, rows, columns, M: tl.constexpr, I: tl.constexpr, PARTS: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """float32 [PARTS, BN, BM]: x through rows of w [N, I] in its own type, in parts to be added."""
    ks = tl.arange(0, PARTS)[:, None] * BK + tl.arange(0, BK)[None, :]
    place = w_ptr + columns[None, :, None] * I + ks[:, None, :]
    acc = tl.zeros((PARTS, BN, BM), tl.float32)
    for k in tl.range(0, I, PARTS * BK, num_stages=STAGES):
        w = tl.load(place + k, mask=(ks + k < I)[:, None, :], other=0.0)
        x = tl.load(
            x_ptr + rows[None, None, :] * I + (ks + k)[:, :, None],
            mask=(rows < M)[None, None, :] & (ks + k < I)[:, :, None], other=0.0,
        )  # fmt: skip
        acc = dot(w, x, acc, PARTS, BN, BM)
    return acc


@triton.jit
def eight_bit(
    x_ptr, w_ptr, rows, columns, M: tl.constexpr, I: tl.constexpr, PARTS: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, SPLITS: tl.constexpr, STAGES: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """As `plain`, of values in 8 bit without their scale, I / SPLITS inputs."""
    E4M3: tl.constexpr = w_ptr.dtype.element_ty == tl.float8e4nv
    ks = tl.arange(0, PARTS)[:, None] * BK + tl.arange(0, BK)[None, :]
    place = w_ptr + columns[None, :, None] * I + ks[:, None, :]
    acc = tl.zeros((PARTS, BN, BM), tl.float32)
    for k in tl.range(0, I // SPLITS, PARTS * BK, num_stages=STAGES):
        w = tl.load(place + k)
        x = load_x(x_ptr, rows, ks + k, M, I)
        if ASM and E4M3:
            x = (x.to(tl.float32) * 1.8446744073709552e19).to(x.dtype)  # 2^64: no product below float32's range
            w = four(w, FROM_E4M3)
        else:
            w = w.to(x.dtype)
        acc = dot(w, x, acc, PARTS, BN, BM)
    if ASM and E4M3:
        acc *= 7.205759403792794e16  # 2^56
    return acc


@triton.jit
def four_bit(
    x_ptr, w_ptr, scale_ptr, zero_ptr, rows, columns, M: tl.constexpr, I: tl.constexpr, O: tl.constexpr,
    S: tl.constexpr, PARTS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, SPLITS: tl.constexpr,
    STAGES: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """As `plain`, of I / SPLITS values in 4 bit: PARTS groups a time, each times its scale when it is summed."""
    H: tl.constexpr = S // 2
    parts = tl.arange(0, PARTS)
    inputs = tl.arange(0, H)
    place = w_ptr + columns[None, :, None] * (I // 2) + parts[:, None, None] * H + inputs[None, None, :]
    ks = parts[:, None] * S + inputs[None, :]
    groups = parts[:, None] * O + columns[None, :]
    acc = tl.zeros((PARTS, BN, BM), tl.float32)
    ahead = tl.load(zero_ptr + groups)
    for g in tl.range(0, I // S // SPLITS, PARTS, num_stages=STAGES):
        w = tl.load(place + g * H)
        x0 = load_x(x_ptr, rows, ks + g * S, M, I)
        x1 = load_x(x_ptr, rows, ks + g * S + H, M, I)
        scale = tl.load(scale_ptr + g * O + groups)
        zero = ahead.to(tl.float32)
        # single bytes are not copied asynchronously: the next ones are asked for before these are used
        last = tl.minimum(g + PARTS, I // S // SPLITS - PARTS)
        ahead = tl.load(zero_ptr + last * O + groups)
        if ASM:
            low = four(w, FROM_LOW)
            high = four(w, FROM_HIGH)
            zero += 128
        else:
            low = (w & 15).to(tl.int8).to(x0.dtype)
            high = (w >> 4).to(tl.int8).to(x0.dtype)
        own = dot(low, x0, tl.zeros((PARTS, BN, BM), tl.float32), PARTS, BN, BM)
        own = dot(high, x1, own, PARTS, BN, BM)
        total = tl.sum(x0.to(tl.float32) + x1.to(tl.float32), axis=1)
        acc += scale[:, :, None] * (own - zero[:, :, None] * total[:, None, :])
    return acc
