"""The groups of a layer for one token a row, and its attention, as Triton launches (the extra `gpu`).

A group is norm, product, update of the adapters, and what follows: rotary embedding and cache, silu(gate) up, or the
sum with the residual stream. Two forms of it:

    two launches   `product_kernel`, `tail_kernel`; with a wide bank `shrink_kernel` between them
    one launch     `whole_kernel`: its programs stream W and meet the slim product only behind it

Weights are whole stacks of layers, read where they lie. Tiles follow from the shapes; nothing is tuned at run time.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp

from pallas_kernels.routed_lora.triton_gpu import power
from pallas_kernels.triton_launch import launch

KERNELS = "pallas_kernels.decode_step.triton_kernels"
ATTENTION = "pallas_kernels.decode_step.attention_kernels"
Tail = Literal["plain", "rope", "silu", "residual"]
EMPTY = -1  # position of a slot that holds no token
MAX_ROWS = 64
STAGE_BYTES = 96 * 1024  # shared memory for the loads in flight: two programs fit on a multiprocessor
PROGRAMS = 128  # of an H200's 132 multiprocessors
POLLS = 1 << 21  # looks at a flag, about a second, before a program gives up


@dataclasses.dataclass(frozen=True)
class Form:
    """How a step is launched. `whole`: a group is one launch where it can be; `captured`: by CUDA graphs' entry."""

    whole: bool = False
    captured: bool = False


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["w", "norm", "slim", "a", "b", "scale"],
    meta_fields=["splits", "eps", "first"],
)
@dataclasses.dataclass(frozen=True)
class Group:
    """A projection group's weights, stacked over layers.

    w [L, I, O]; norm [L, I], the scale of the RMS norm before it; slim [L, P, W, I], gates and A's as rows, A's from
    row `first` on, or gates alone beside a [L, P, A, R, I]; b [L, A, R, O]; scale float32 [L, P, A]. None: has none.
    """

    w: Any
    norm: Any
    slim: Any
    a: Any
    b: Any
    scale: Any
    splits: tuple[int, ...]
    eps: float
    first: int


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
    [L, M, projections of a layer, C] (one element each where no gates choose); flags int32 [2], 0 between launches."""

    keys: Any
    values: Any
    indices: Any
    weights: Any
    flags: Any


def divisor(total: int, *candidates: int) -> int:
    """The first candidate that divides `total`; 0 if none does."""
    return next((c for c in candidates if total % c == 0), 0)


def tiles(rows: int, width: int, total: int, tail: Tail, head: int, itemsize: int, whole: bool) -> dict[str, Any]:
    """Tiles of a product [rows, width] x [width, total]: BM rows, two blocks of BH columns, BK deep, PARTS of the sum.

    Raises:
        NotImplementedError: no tile divides the columns or the depth.
    """
    bm = max(16, power(rows))
    if tail == "rope":
        bh = divisor(head // 2, 32, 16)
    elif tail == "silu":
        bh = divisor(total // 2, 64, 32, 16)
    elif tail == "residual" and (whole or rows <= 16):
        bh = divisor(total // 2, 16)
    else:
        bh = divisor(total // 2, 64, 32, 16)
    if not bh:
        raise NotImplementedError(
            f"decode_step: expected columns of {tail} in blocks of 16, found {total} ({head} a head)"
        )
    blocks = total // (2 * bh)
    parts = 1
    if tail == "residual" and not whole:
        parts = next(p for p in (4, 2, 1) if p == 1 or (blocks * p <= 2 * PROGRAMS and width % (p * 64) == 0))
        parts = parts if blocks < PROGRAMS else 1
    bk = divisor(width // parts, *((128, 64, 32, 16) if bh < 64 and itemsize == 2 else (64, 32, 16)))
    if not bk:
        raise NotImplementedError(f"decode_step: expected an input width divisible by 16, found {width}")
    stage = bk * (2 * bh + bm) * itemsize
    return dict(BM=bm, BH=bh, BK=bk, PARTS=parts, STAGES=max(2, min(6, STAGE_BYTES // stage)))


def group_step(
    layer: jax.Array,
    x: jax.Array,
    group: Group,
    tail: Tail,
    carried: Carried,
    choice: Choice | None = None,
    *,
    head: int = 0,
    first_projection: int = 0,
    residual: jax.Array | None = None,
    angles: tuple[jax.Array, jax.Array] | None = None,
    slot: jax.Array | None = None,
    form: Form = Form(),
) -> tuple[jax.Array, Carried]:
    """A group of one layer.

    Args:
        layer: int32 [1]. x: [M, I], at most 64 rows.
        tail: what follows. "rope": queries turned, keys turned and values written into slot `slot` (int32 [1]) of the
            cache, `angles` the cosines and sines float32 [M, H/2] of heads of `head`; "silu"; "residual": + `residual`.
        choice: None adds no adapters.
        first_projection: of the group, in the traced choices.

    Returns:
        (the queries [M, N H], silu(gate) up [M, O/2], or the residual stream [M, O], in x's dtype; what was changed).

    Raises:
        NotImplementedError: a shape that no tile serves.
    """
    rows, width = x.shape
    if rows > MAX_ROWS:
        raise NotImplementedError(f"decode_step: expected at most {MAX_ROWS} rows, found {rows}")
    total = group.w.shape[-1]
    adapt = choice is not None
    wide = adapt and group.a is not None
    if adapt and not wide and group.slim is None:
        raise NotImplementedError(
            "decode_step: expected gates and A's as one slim matrix, or A's of a wide bank, found neither"
        )
    whole = form.whole and not wide
    size = tiles(rows, width, total, tail, head, x.dtype.itemsize, whole)
    parts, bm, bh = size.pop("PARTS"), size["BM"], size["BH"]
    gates = choice is not None and choice.counts is not None
    slim_rows = (
        0 if not adapt or group.slim is None or (wide and not gates) else group.slim.shape[1] * group.slim.shape[2]
    )
    block = 16 if whole else 32
    call: Any = functools.partial(launch, KERNELS, capturable=form.captured)
    shape, none = jax.ShapeDtypeStruct, layer  # a parameter that is not looked at
    norm = dict(NORM=group.norm is not None, EPS=group.eps)
    product = dict(M=rows, I=width, O=total, N=slim_rows, H=head, TAIL=tail, BN=block, **norm, **size)
    streams = (x, none if group.norm is None else group.norm, group.w, group.slim if slim_rows else x)
    programs = total // (2 * bh)

    routed, sizes = _adapters(none, group, choice, carried, rows, total, slim_rows, whole, parts, first_projection)
    out = shape((rows, {"rope": group.splits[0], "silu": total // 2}.get(tail, total)), x.dtype)
    held = (carried.keys, carried.values) if tail == "rope" else (none, none)
    traces = (carried.indices, carried.weights) if gates and not wide else (none, none)
    changed = (*held, *traces)
    changed_shapes = tuple(shape(z.shape, z.dtype) for z in changed)
    cos, sin = angles or (none, none)
    slots = carried.keys.shape[2] if tail == "rope" else 1
    rest = dict(S=slots, SPLITS=group.splits, BE=sizes.pop("BE"), **sizes)

    if whole:
        inputs = (
            layer, *streams, *routed, none if residual is None else residual, cos, sin, none if slot is None else slot,
            *changed, carried.flags,
        )  # fmt: skip
        start = len(inputs) - 5
        in_place = {11: 0} if residual is not None else {}  # a program reads the columns that it writes
        y, *new, flags, _ = call(
            "whole_kernel", *inputs,
            out=(out, *changed_shapes, shape((2,), jnp.int32), shape((rows, max(1, slim_rows)), jnp.float32)),
            aliases=in_place | {start + 4: 5} | {start + i: 1 + i for i, z in enumerate(changed) if z is not none},
            grid=(programs + slim_rows // block,), POLLS=POLLS, **product, **rest,
        )  # fmt: skip
        carried = dataclasses.replace(carried, flags=flags)
    else:
        sums = call(
            "product_kernel", layer, *streams, out=shape((parts, rows, total + slim_rows), jnp.float32),
            grid=(programs + slim_rows // block, parts), PART=width // parts, **product,
        )  # fmt: skip
        h = sums
        if wide:
            h, carried = _shrink(layer, x, group, choice, carried, sums, norm, sizes, slim_rows, call)
            if gates:
                routed = (*routed[:4], carried.indices, carried.weights)
        inputs = (
            layer, sums, h, *routed, none if residual is None else residual, cos, sin, none if slot is None else slot,
            *changed,
        )  # fmt: skip
        start = len(inputs) - 4
        in_place = {9: 0} if residual is not None else {}
        y, *new = call(
            "tail_kernel", *inputs, out=(out, *changed_shapes),
            aliases=in_place | {start + i: 1 + i for i, z in enumerate(changed) if z is not none},
            grid=(programs,), M=rows, O=total, N=slim_rows, PARTS=parts, H=head, TAIL=tail, BM=bm, BH=bh, **rest,
        )  # fmt: skip
    if tail == "rope":
        carried = dataclasses.replace(carried, keys=new[0], values=new[1])
    if gates and not wide:
        carried = dataclasses.replace(carried, indices=new[2], weights=new[3])
    return y, carried


def _adapters(
    none: jax.Array, group: Group, choice: Choice | None, carried: Carried, rows: int, total: int, slim_rows: int,
    whole: bool, parts: int, first_projection: int,
) -> tuple[tuple[Any, ...], dict[str, Any]]:  # fmt: skip
    """(b, scale, counts, temperatures, indices, weights) and the constants that say how they are read."""
    if choice is None:
        constants = dict.fromkeys(
            ("A", "AP", "R", "C", "CP", "ROW", "HPARTS", "CHOICE_ROW", "CHOICE_P", "CHOICE_LAYER", "TRACE_ROW"), 1
        )
        constants |= dict.fromkeys(("W", "FIRST", "CHOICE_FIRST", "TRACE_FIRST"), 0) | dict(BE=16)
        return (none,) * 6, dict(ADAPT=False, GATES=False, GATHER=False, COMPACT=False, **constants)
    adapters, rank = group.b.shape[1:3]
    gates, wide = choice.counts is not None, group.a is not None
    c, projections = choice.top_k, len(group.splits)
    gather = wide or rows * c <= adapters  # the chosen rows of B are no more than all
    row = carried.indices.shape[2] * c if gates else 1
    deep = power(rows * rank) if gather else power(adapters * rank)
    constants = dict(
        ADAPT=True, GATES=gates and not wide, GATHER=gather, COMPACT=wide, A=adapters, AP=power(adapters), R=rank, C=c,
        CP=power(c), TRACE_ROW=row, TRACE_FIRST=first_projection * c, BE=max(16, min(64, deep)),
    )  # fmt: skip
    if wide:
        shrinks = c * rank
        constants |= dict(W=shrinks, FIRST=0, ROW=projections * shrinks, HPARTS=shrink_parts(group, rows, c))
    else:
        constants |= dict(
            W=slim_rows // projections, FIRST=group.first, ROW=slim_rows if whole else total + slim_rows,
            HPARTS=1 if whole else parts,
        )  # fmt: skip
    if gates:
        layer = rows * row
        constants |= dict(CHOICE_ROW=row, CHOICE_P=c, CHOICE_LAYER=layer, CHOICE_FIRST=first_projection * c)
        return (group.b, group.scale, choice.counts, choice.temperatures, none, none), constants
    constants |= dict(CHOICE_ROW=c, CHOICE_P=0, CHOICE_LAYER=0, CHOICE_FIRST=0)
    return (group.b, group.scale, none, none, choice.indices, choice.weights), constants


def shrink_parts(group: Group, rows: int, choices: int) -> int:
    """Into how many parts a wide bank's shrink over I is cut, so that its programs fill the chip."""
    width = group.w.shape[1]
    return next(p for p in (8, 4, 2, 1) if p == 1 or (width % (p * 128) == 0 and p * rows * choices <= 4 * PROGRAMS))


def _shrink(
    layer: jax.Array, x: jax.Array, group: Group, choice: Any, carried: Carried, sums: jax.Array, norm: dict[str, Any],
    sizes: dict[str, Any], slim_rows: int, call: Any,
) -> tuple[jax.Array, Carried]:  # fmt: skip
    """The shrinks of the chosen adapters of a wide bank, float32 [HPARTS, M, P, C, R]; the choice is traced."""
    rows, width = x.shape
    projections, rank, c, parts = len(group.splits), sizes["R"], choice.top_k, sizes["HPARTS"]
    gates = choice.counts is not None
    traces = (carried.indices, carried.weights) if gates else (layer, layer)
    given = (
        (choice.counts, choice.temperatures, layer, layer) if gates else (layer, layer, choice.indices, choice.weights)
    )
    inputs = (layer, x, layer if group.norm is None else group.norm, group.a, sums, *given, *traces)
    shape = jax.ShapeDtypeStruct
    h, indices, weights = call(
        "shrink_kernel", *inputs,
        out=(
            shape((parts, rows, projections, c, rank), jnp.float32),
            *(shape(z.shape, z.dtype) for z in traces),
        ),
        aliases={len(inputs) - 2: 1, len(inputs) - 1: 2} if gates else None,
        grid=(rows * projections * c, parts), M=rows, I=width, O=sums.shape[2] - slim_rows, N=slim_rows, P=projections,
        RP=power(rank), W=slim_rows // projections, PARTS=sums.shape[0], GATES=gates, PART=width // parts,
        BK=divisor(width // parts, *(k for k in (256, 128, 64, 32, 16) if k * rank <= 4096), 16),
        **norm, **{k: sizes[k] for k in ("A", "AP", "R", "C", "CP", "CHOICE_ROW", "CHOICE_P", "CHOICE_LAYER",
                                         "TRACE_ROW", "TRACE_FIRST")},
    )  # fmt: skip
    return h, dataclasses.replace(carried, indices=indices, weights=weights) if gates else carried


def head_logits(x: jax.Array, w: jax.Array, form: Form = Form()) -> jax.Array:
    """float32 [M, V]: x W for x [M, D], w [D, V]."""
    rows, width = x.shape
    size = tiles(rows, width, w.shape[1], "plain", 0, x.dtype.itemsize, True)
    del size["PARTS"]
    first = jnp.zeros((1,), jnp.int32)
    return launch(
        KERNELS, "product_kernel", first, x, x, w, x, capturable=form.captured,
        out=jax.ShapeDtypeStruct((1, rows, w.shape[1]), jnp.float32), grid=(w.shape[1] // (2 * size["BH"]), 1),
        M=rows, I=width, O=w.shape[1], N=0, H=0, TAIL="plain", NORM=False, EPS=0.0, PART=width, BN=32, **size,
    )[0]  # fmt: skip


def attend(
    layer: jax.Array,
    q: jax.Array,
    carried: Carried,
    own: jax.Array,
    positions: jax.Array,
    used: jax.Array,
    heads: int,
    head: int,
    form: Form = Form(),
) -> jax.Array:
    """Attention of one token a row over its cache, [M, N H].

    Args:
        q: [M, N H], turned. own: int32 [M], the tokens' positions. positions: int32 [M, S], those of the slots,
            EMPTY for none. used: int32 [1], slots written. heads: N. head: H, a power of two.
    """
    rows, slots, kv = carried.keys.shape[1:]
    if head < 16 or head & (head - 1):
        raise NotImplementedError(f"decode_step: expected heads of a power of two, 16 or wider, found {head}")
    groups = kv // head
    # a part is long enough to be worth a program, and there are enough programs to fill the chip
    parts = max(1, min(slots // 128, math.ceil(PROGRAMS / (rows * groups))))
    block = 64 if head <= 128 else 32
    part = math.ceil(slots / (parts * block)) * block
    parts = math.ceil(slots / part)
    sizes = dict(M=rows, N=heads, H=head, PARTS=parts)
    shape = jax.ShapeDtypeStruct
    y = launch(
        ATTENTION, "attend_kernel", layer, q, carried.keys, carried.values, own, positions, used,
        out=shape((rows, heads * head), q.dtype) if parts == 1 else shape((parts, rows, heads, head + 2), jnp.float32),
        grid=(rows, groups, parts), capturable=form.captured, S=slots, KV=kv, G=heads // groups,
        GP=max(16, power(heads // groups)), PART=part, EMPTY=EMPTY, FACTOR=head**-0.5, BS=block, STAGES=3, **sizes,
    )  # fmt: skip
    if parts == 1:
        return y
    return launch(
        ATTENTION, "combine_kernel", y, out=shape((rows, heads * head), q.dtype), grid=(rows * heads,),
        capturable=form.captured, **sizes,
    )  # fmt: skip
