"""The groups of a layer for one token a row, and its attention: cuBLAS and Triton launches (the extra `gpu`).

A group is a product by XLA (cuBLAS reads the layer where it is stacked; the gates and A's are its last rows), then
`tail_kernel`: norm, choice and update of the adapters, and what follows, which is rotary embedding and cache,
silu(gate) up, or the sum with the residual stream. With a wide bank `shrink_kernel` stands between them. A norm's
1 / rms commutes with the product: the tail before it multiplies by the norm's scale, the one behind it by that factor.

Tiles follow from the shapes; nothing is tuned at run time.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp

from pallas_kernels.launch import launch
from pallas_kernels.routed_lora.triton_gpu import power

KERNELS = "pallas_kernels.decode_step.triton_kernels"
ATTENTION = "pallas_kernels.decode_step.attention_kernels"
Tail = Literal["rope", "silu", "residual"]
EMPTY = -1  # position of a slot that holds no token
MAX_ROWS = 64
LEAST_ROWS = 8  # of a product's input: XLA takes a single row for a sum and copies W for it
PROGRAMS = 128  # of an H200's 132 multiprocessors
WIDEST = 128  # columns of a block
ONE_WARP = 1024  # values of B in a block of one warp


@dataclasses.dataclass(frozen=True)
class StepLimits:
    """Which decoding steps the kernels serve, and how.

    rows: a step of at most so many.
    gather: a row reads its own adapters' rows of B while there are at most so many times those of all; beyond, every B
        is read once and masked. On an H200 gathering 64 of 28 takes 3 % off a step, 96 of 28 7 %.
    programs: epilogues of chosen rows have so many at most, as far as blocks of WIDEST columns go: a chip holds 32 of
        one warp a multiprocessor, and a second wave waits for the whole chain again. One H100, 32 rows: an epilogue
        takes 8.9 us with narrow blocks, 6.5 so, and 6.1 with half as many, which no requests were timed with.
    """

    rows: int = MAX_ROWS
    gather: int = 4
    programs: int = 32 * PROGRAMS


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["w", "a", "b", "scale"],
    meta_fields=["splits", "eps", "columns", "first"],
)
@dataclasses.dataclass(frozen=True)
class Group:
    """A projection group's weights, stacked over layers.

    w [L, I, O], or rows [L, O + N, I]: behind the O rows N / P a projection, its gates, and its A's from row `first` on
    (or gates alone beside a [L, P, A, R, I]); b [L, A, R, O]; scale float32 [L, P, A]. None: has none. eps: of the norm
    before it, None without one. columns: N / P, of the product. N = 0: w is [L, I, O].
    """

    w: Any
    a: Any
    b: Any
    scale: Any
    splits: tuple[int, ...]
    eps: float | None
    columns: int
    first: int

    @property
    def rows_behind(self) -> int:
        return self.columns * len(self.splits)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["counts", "temperatures", "indices", "weights"],
    meta_fields=["top_k"],
)
@dataclasses.dataclass(frozen=True)
class Choice:
    """Who acts: gates, with int32 [M] counts and float32 [M] temperatures; or indices and weights given, [M, C]."""

    top_k: int
    counts: Any = None
    temperatures: Any = None
    indices: Any = None
    weights: Any = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Carried:
    """What launches change in place: keys and values [L, M, S, K H]; the gates' choices int32 and float32
    [L, M, projections of a layer, C] (one element each where no gates choose)."""

    keys: Any
    values: Any
    indices: Any
    weights: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Stream:
    """The residual stream x [M, D]; scaled [at least M, D], x times the next norm's scale; squares float32 [M, parts],
    whose sum is that of x's squares."""

    x: Any
    scaled: Any
    squares: Any

    @classmethod
    def begin(cls, x: jax.Array, scale: jax.Array) -> Stream:
        """x [M, D] before the first layer, whose norm has that scale [D]."""
        wide = x.astype(jnp.float32)
        scaled = (wide * scale.astype(jnp.float32)[None]).astype(x.dtype)
        return cls(x, at_least(scaled, LEAST_ROWS), jnp.sum(wide * wide, axis=1, keepdims=True))


def at_least(x: jax.Array, rows: int) -> jax.Array:
    """x [M, I] with rows of zeros up to so many."""
    return jnp.pad(x, ((0, max(0, rows - x.shape[0])), (0, 0)))


def divisor(total: int, *candidates: int) -> int:
    """The first candidate that divides `total`; 0 if none does."""
    return next((c for c in candidates if total % c == 0), 0)


def tiles(
    rows: int,
    total: int,
    tail: Tail,
    head: int,
    gather: bool | None,
    rank: int = 1,
    programs: int = StepLimits.programs,
) -> dict[str, int]:
    """Tiles of a tail over `total` columns: BM rows, two blocks of BH columns.

    gather: None without adapters. rank: of these. programs: of `StepLimits`.

    Raises:
        NotImplementedError: no tile divides the columns.
    """
    block = head // 2 if tail == "rope" else total // 2
    bh = divisor(block, *((16,) if tail == "residual" else (32, 16)))
    if not bh:
        raise NotImplementedError(
            f"decode_step: expected columns of {tail} in blocks of 16, found {total} ({head} a head)"
        )
    # chosen rows of B are read by a program for each row; every B by matrix products, which have 16 rows
    bm = min(8, power(rows)) if gather is None else 1 if gather else max(16, power(rows))
    widest = min(WIDEST, ONE_WARP // rank)
    while gather and rows * total > 2 * bh * programs and block % (2 * bh) == 0 and 2 * bh <= widest:
        bh *= 2
    return dict(BM=bm, BH=bh)


def product(x: jax.Array, group: Group, layer: int) -> jax.Array:
    """float32 [rows of x, O + N]: x W of a layer, read where it is stacked."""
    form = "mi,oi->mo" if group.rows_behind else "mi,io->mo"
    return jnp.einsum(form, x, group.w[layer], preferred_element_type=jnp.float32)


def group_step(
    layer: int,
    x: jax.Array,
    group: Group,
    tail: Tail,
    carried: Carried,
    choice: Choice | None = None,
    *,
    squares: jax.Array | None = None,
    head: int = 0,
    first_projection: int = 0,
    residual: jax.Array | None = None,
    following: tuple[jax.Array, int] | None = None,
    angles: tuple[jax.Array, jax.Array] | None = None,
    slot: jax.Array | None = None,
    limits: StepLimits = StepLimits(),
) -> tuple[Any, Carried]:
    """A group of one layer.

    Args:
        x: [at least M and at least LEAST_ROWS, I], M of at most 64; what stands in the rows behind M is not used.
            Where a norm is before the group, x is `Stream.scaled`, and squares `Stream.squares`.
        tail: what follows. "rope": queries turned, keys turned and values written into slot `slot` (int32 [1]) of the
            cache, `angles` the cosines and sines float32 [M, H/2] of heads of `head`; "silu"; "residual": + `residual`
            [M, O], and the norm that follows: its scales [L, O], and how many layers on it is.
        choice: None adds no adapters.
        first_projection: of the group, in the traced choices.
        limits: how chosen rows of B are read.

    Returns:
        (the queries [M, N H], silu(gate) up [at least M, O/2], or the `Stream`; what was changed).

    Raises:
        NotImplementedError: a shape that no tile serves.
    """
    rows = carried.keys.shape[1]
    if rows > MAX_ROWS:
        raise NotImplementedError(f"decode_step: expected at most {MAX_ROWS} rows, found {rows}")
    depth, width = group.w.shape[0], x.shape[1]
    total, extra = sum(group.splits), group.rows_behind
    wide = choice is not None and group.a is not None
    if choice is not None and not group.columns and (not wide or choice.counts is not None):
        raise NotImplementedError("decode_step: expected gates and A's behind the kernel's rows, found none")
    gates = choice is not None and choice.counts is not None
    gather = None if choice is None else wide or rows * choice.top_k <= limits.gather * group.b.shape[1]
    size = tiles(rows, total, tail, head, gather, 1 if choice is None else power(group.b.shape[2]), limits.programs)
    call: Any = functools.partial(launch, KERNELS)
    number = jnp.full((1,), layer, jnp.int32)
    shape, none = jax.ShapeDtypeStruct, number  # a parameter that is not looked at
    parts = 1 if squares is None else squares.shape[1]
    norm = dict(NORM=squares is not None, EPS=group.eps or 0.0, NS=parts, NSP=power(parts))
    squares = none if squares is None else squares

    sums = product(x, group, layer)
    routed, sizes = _adapters(none, group, choice, carried, rows, total + extra, first_projection, bool(gather))
    h = sums
    if wide:
        h, carried = _shrink(number, x, squares, group, choice, carried, sums, norm, sizes, call)
        if gates:
            routed = (*routed[:4], carried.indices, carried.weights)
    padded = max(rows, LEAST_ROWS)
    out = {"rope": (rows, group.splits[0]), "silu": (padded, total // 2), "residual": (rows, total)}[tail]
    programs = total // (2 * size["BH"])
    beside = (shape((1, 1), x.dtype), shape((1, 1), jnp.float32))
    if tail == "residual":
        beside = shape((padded, total), x.dtype), shape((rows, programs), jnp.float32)
    scales, following_layer = following or (none, 0)
    held = (carried.keys, carried.values) if tail == "rope" else (none, none)
    traces = (carried.indices, carried.weights) if gates and not wide else (none, none)
    changed = (*held, *traces)
    cos, sin = angles or (none, none)
    inputs = (
        number, sums, squares, h, *routed, none if residual is None else residual, scales, cos, sin,
        none if slot is None else slot, *changed,
    )  # fmt: skip
    start = len(inputs) - 4
    in_place = {10: 0} if residual is not None else {}  # a program reads the columns that it writes
    few = gather is None or (gather and sizes["RP"] * size["BH"] <= ONE_WARP)
    y, scaled, squared, *new = call(
        "tail_kernel", *inputs, out=(shape(out, x.dtype), *beside, *(shape(z.shape, z.dtype) for z in changed)),
        aliases=in_place | {start + i: 3 + i for i, z in enumerate(changed) if z is not none},
        grid=(programs, math.ceil(rows / size["BM"])), warps=1 if few and size["BM"] == 1 else 4,
        M=rows, I=width, O=total, N=extra, H=head, S=carried.keys.shape[2], L=depth, SPLITS=group.splits, TAIL=tail,
        NEXT=following_layer, STAGES=4, **norm, **sizes, **size,
    )  # fmt: skip
    if tail == "rope":
        carried = dataclasses.replace(carried, keys=new[0], values=new[1])
    if gates and not wide:
        carried = dataclasses.replace(carried, indices=new[2], weights=new[3])
    return Stream(y, scaled, squared) if tail == "residual" else y, carried


def _adapters(
    none: jax.Array,
    group: Group,
    choice: Choice | None,
    carried: Carried,
    rows: int,
    row: int,
    first_projection: int,
    gather: bool,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """(b, scale, counts, temperatures, indices, weights) and the constants that say how they are read."""
    if choice is None:
        constants = dict.fromkeys(
            ("A", "AP", "R", "RP", "C", "CP", "ROW", "HPARTS", "CHOICE_ROW", "CHOICE_P", "CHOICE_LAYER", "TRACE_ROW"), 1
        )
        constants |= dict.fromkeys(("W", "FIRST", "CHOICE_FIRST", "TRACE_FIRST"), 0) | dict(BE=16)
        return (none,) * 6, dict(ADAPT=False, GATES=False, GATHER=False, COMPACT=False, **constants)
    adapters, rank = group.b.shape[1:3]
    gates, wide = choice.counts is not None, group.a is not None
    c, projections = choice.top_k, len(group.splits)
    traced = carried.indices.shape[2] * c if gates else 1
    constants = dict(
        ADAPT=True, GATES=gates and not wide, GATHER=gather, COMPACT=wide, A=adapters,
        AP=power(adapters), R=rank, RP=power(rank), C=c, CP=power(c), TRACE_ROW=traced,
        TRACE_FIRST=first_projection * c, BE=max(16, min(64, power(adapters * rank))), HPARTS=1,
    )  # fmt: skip
    if wide:
        constants |= dict(W=c * rank, FIRST=0, ROW=projections * c * rank, HPARTS=shrink_parts(group, rows, c))
    else:
        constants |= dict(W=group.columns, FIRST=group.first, ROW=row)
    if gates:
        layer = rows * traced
        constants |= dict(CHOICE_ROW=traced, CHOICE_P=c, CHOICE_LAYER=layer, CHOICE_FIRST=first_projection * c)
        return (group.b, group.scale, choice.counts, choice.temperatures, none, none), constants
    constants |= dict(CHOICE_ROW=c, CHOICE_P=0, CHOICE_LAYER=0, CHOICE_FIRST=0)
    return (group.b, group.scale, none, none, choice.indices, choice.weights), constants


def shrink_parts(group: Group, rows: int, choices: int) -> int:
    """Into how many parts a wide bank's shrink over I is cut, so that its programs fill the chip."""
    width, programs = group.a.shape[-1], rows * choices * len(group.splits)
    return next(p for p in (16, 8, 4, 2, 1) if p == 1 or (width % (p * 128) == 0 and p * programs <= 8 * PROGRAMS))


def _shrink(
    layer: jax.Array, x: jax.Array, squares: jax.Array, group: Group, choice: Any, carried: Carried, sums: jax.Array,
    norm: dict[str, Any], sizes: dict[str, Any], call: Any,
) -> tuple[jax.Array, Carried]:  # fmt: skip
    """The shrinks of the chosen adapters of a wide bank, float32 [HPARTS, M, P, C, R]; the choice is traced."""
    rows, width = carried.keys.shape[1], x.shape[1]
    projections, rank, c, parts = len(group.splits), sizes["R"], choice.top_k, sizes["HPARTS"]
    gates, total = choice.counts is not None, sum(group.splits)
    traces = (carried.indices, carried.weights) if gates else (layer, layer)
    given = (
        (choice.counts, choice.temperatures, layer, layer) if gates else (layer, layer, choice.indices, choice.weights)
    )
    inputs = (layer, x, squares, group.a, sums, *given, *traces)
    shape = jax.ShapeDtypeStruct
    h, indices, weights = call(
        "shrink_kernel", *inputs,
        out=(
            shape((parts, rows, projections, c, rank), jnp.float32),
            *(shape(z.shape, z.dtype) for z in traces),
        ),
        aliases={len(inputs) - 2: 1, len(inputs) - 1: 2} if gates else None,
        grid=(rows * projections * c, parts), M=rows, I=width, O=total, N=sums.shape[1] - total, P=projections,
        W=group.columns, GATES=gates, PART=width // parts,
        BK=divisor(width // parts, *(k for k in (256, 128, 64, 32, 16) if k * rank <= 4096), 16),
        **norm, **{k: sizes[k] for k in ("A", "AP", "R", "RP", "C", "CP", "CHOICE_ROW", "CHOICE_P", "CHOICE_LAYER",
                                         "TRACE_ROW", "TRACE_FIRST")},
    )  # fmt: skip
    return h, dataclasses.replace(carried, indices=indices, weights=weights) if gates else carried


def attend(
    layer: int,
    q: jax.Array,
    carried: Carried,
    own: jax.Array,
    positions: jax.Array,
    used: jax.Array,
    heads: int,
    head: int,
) -> jax.Array:
    """Attention of one token a row over its cache, [at least M, N H]: the input of a product.

    Args:
        q: [M, N H], turned. own: int32 [M], the tokens' positions. positions: int32 [M, S], those of the slots,
            EMPTY for none. used: int32 [1], slots written. heads: N. head: H, a power of two.
    """
    rows, slots, kv = carried.keys.shape[1:]
    if head < 16 or head & (head - 1):
        raise NotImplementedError(f"decode_step: expected heads of a power of two, 16 or wider, found {head}")
    groups = kv // head
    # a part is long enough to be worth a program, and there are enough programs to fill the chip
    block = 64 if head <= 128 else 32
    parts = max(1, min(32, slots // block, math.ceil(4 * PROGRAMS / (rows * groups))))
    part = math.ceil(slots / (parts * block)) * block
    parts = math.ceil(slots / part)
    sizes = dict(M=rows, N=heads, H=head, PARTS=parts)
    shape = jax.ShapeDtypeStruct
    result = shape((max(rows, LEAST_ROWS), heads * head), q.dtype)
    number = jnp.full((1,), layer, jnp.int32)
    y = launch(
        ATTENTION, "attend_kernel", number, q, carried.keys, carried.values, own, positions, used,
        out=result if parts == 1 else shape((parts, rows, heads, head + 2), jnp.float32),
        grid=(rows, groups, parts), S=slots, KV=kv, G=heads // groups,
        GP=max(16, power(heads // groups)), PART=part, EMPTY=EMPTY, FACTOR=head**-0.5, BS=block, STAGES=3, **sizes,
    )  # fmt: skip
    if parts == 1:
        return y
    return launch(ATTENTION, "combine_kernel", y, out=result, grid=(rows * heads,), **sizes)
