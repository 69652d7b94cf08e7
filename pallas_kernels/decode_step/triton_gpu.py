"""NVIDIA GPUs: projections and attention of a layer for one token a row, by cuBLAS and Triton (the extra `gpu`).

Timed on an H100 and an H200 (docs/performance.md). A group of projections is a product and one launch behind it, its
epilogue. The product is XLA's (cuBLAS reads the layer where it is stacked; gates and A's are packed behind the base's
rows), or, of a quantised base, another launch (`quantized_matmul.triton_gpu`):

    qkv_step       q k v         norm's factor, adapters, rotary embedding, keys and values into the cache
    silu_step      gate and up   norm's factor, adapters, silu(gate) * up
    residual_step  o; down       adapters, sum with the residual stream, what the next norm needs

Between the two stands `weigh_kernel` in steps of many rows, `shrink_kernel` with a wide bank. Tiles follow from the
shapes; nothing is tuned at run time.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Hashable, Mapping
from types import MappingProxyType
from typing import Literal

import jax
import jax.numpy as jnp

from pallas_kernels.decode_step.choosing import Chooser, ask
from pallas_kernels.decode_step.operands import (
    LEAST_ROWS,
    WEIGHED_ROWS,
    AdapterLayout,
    Choice,
    Group,
    ResidualStream,
    StepState,
)
from pallas_kernels.launch import launch
from pallas_kernels.paged_attention import StepTokens
from pallas_kernels.paged_attention import triton_gpu as paged_gpu
from pallas_kernels.quantized_matmul import QuantizedWeight
from pallas_kernels.quantized_matmul import triton_gpu as quantized_gpu
from pallas_kernels.routed_lora.triton_gpu import power

Epilogue = Literal["qkv", "silu", "residual"]
KERNELS: Mapping[Epilogue, str] = MappingProxyType(
    {"qkv": "qkv_epilogue_kernel", "silu": "silu_epilogue_kernel", "residual": "residual_epilogue_kernel"}
)
EPILOGUE_MODULE = "pallas_kernels.decode_step.epilogue_kernels"
ADAPTER_MODULE = "pallas_kernels.decode_step.adapter_kernels"
MAX_ROWS = 512
PROGRAMS = 128  # of an H200's 132 multiprocessors
WIDEST = 128  # columns of a block
ONE_WARP = 1024  # values of B in a block of one warp
WRITTEN_OUT = 8  # choices of a row that a program goes through one by one, at most: of many the compiler takes long
shape = jax.ShapeDtypeStruct


@dataclasses.dataclass(frozen=True)
class StepLimits:
    """Which decoding steps the kernels serve, and how.

    rows: a step of at most so many.
    gather: a row reads its own adapters' rows of B while there are at most so many times those of all; beyond, with
        more than WRITTEN_OUT choices, and where matrices are averaged, tiles of rows read the B's that they use once
        each, behind `weigh_kernel`. One H200, 64 rows of two adapters among 28 each: a step takes 7.2 ms gathered, 7.6
        weighed.
    programs: epilogues of chosen rows have so many at most, as far as blocks of WIDEST columns go: half of what a chip
        holds of one warp each. Beyond that a second wave waits for the whole chip again. One H200, a token router, 32
        rows: a step takes 6.20 ms so, 6.27 with twice as many; 8 rows: 5.30 and 5.33. 64 rows were timed so alone.
    """

    rows: int = MAX_ROWS
    gather: int = 8
    programs: int = 16 * PROGRAMS


def divisor(total: int, *candidates: int) -> int:
    """The first candidate that divides `total`; 0 if none does."""
    return next((c for c in candidates if total % c == 0), 0)


def tiles(
    rows: int,
    columns: int,
    epilogue: Epilogue,
    head_dim: int,
    gather: bool | None,
    rank: int = 1,
    programs: int = StepLimits.programs,
    most_rows: int = 64,
) -> dict[str, int]:
    """Tiles of an epilogue over a group's columns: BM rows, two blocks of BH columns.

    gather: of `AdapterLayout`, None without adapters. rank: of these. programs: of `StepLimits`. most_rows: BM of
    matrix products at most.

    Raises:
        NotImplementedError: no tile divides the columns.
    """
    block = head_dim // 2 if epilogue == "qkv" else columns // 2
    bh = divisor(block, *((16,) if epilogue == "residual" else (32, 16)))
    if not bh:
        raise NotImplementedError(
            f"decode_step: expected columns of {epilogue} in blocks of 16, found {columns} ({head_dim} a head)"
        )
    if gather is False:  # matrix products: of 16 rows at least; blocks widen as long as programs fill the chip
        bm = min(most_rows, max(WEIGHED_ROWS, power(rows)))
        while math.ceil(rows / bm) * columns > 4 * bh * PROGRAMS and block % (2 * bh) == 0 and 2 * bh <= bm:
            bh *= 2
        return dict(BM=bm, BH=bh)
    bm = min(8, power(rows)) if gather is None else 1  # chosen rows of B are read by a program for each row
    widest = min(WIDEST, ONE_WARP // rank)
    while gather and rows * columns > 2 * bh * programs and block % (2 * bh) == 0 and 2 * bh <= widest:
        bh *= 2
    return dict(BM=bm, BH=bh)


def qkv_step(
    layer: int,
    stream: ResidualStream,
    group: Group,
    state: StepState,
    choice: Choice | Chooser | None = None,
    limits: StepLimits = StepLimits(),
    *,
    angles: tuple[jax.Array, jax.Array],
    slots: jax.Array,
    head_dim: int,
) -> tuple[jax.Array, StepState]:
    """Queries, keys and values of one layer, with rotary embedding; keys and values go into the cache.

    Args:
        choice: None adds no adapters. A Chooser is asked by XLA, between product and epilogue.
        angles: cosines and sines, float32 [M, H/2]. slots: int32 [M], `StepTokens.slots`.

    Returns:
        (queries [M, N H], the state with the slots and the trace written).

    Raises:
        NotImplementedError: a shape that no tile serves.
    """
    rows, queries = stream.x.shape[0], group.splits[0]
    product, choice, state = _product(layer, rows, stream.scaled, stream.squares, group, state, choice)
    layout = adapter_layout(group, rows, state, choice, limits)
    size = _tiles("qkv", group, rows, layout, limits, head_dim)
    (q, pages), state = _epilogue(
        "qkv", layer, rows, stream.scaled, product, group, state, choice, layout, size, squares=stream.squares,
        inputs=(*angles, slots), outputs=(shape((rows, queries), stream.x.dtype),), in_place=(state.pages,),
        Q=queries, KV=group.splits[1], H=head_dim, SLOTS=state.blocks * state.pages.shape[1],
    )  # fmt: skip
    return q, dataclasses.replace(state, pages=pages)


def silu_step(
    layer: int,
    stream: ResidualStream,
    group: Group,
    state: StepState,
    choice: Choice | Chooser | None = None,
    limits: StepLimits = StepLimits(),
) -> tuple[jax.Array, StepState]:
    """(silu(gate) * up [at least M, F] of one layer, the state with the trace written); otherwise as `qkv_step`."""
    rows, hidden = stream.x.shape[0], group.splits[0]
    product, choice, state = _product(layer, rows, stream.scaled, stream.squares, group, state, choice)
    layout = adapter_layout(group, rows, state, choice, limits)
    size = _tiles("silu", group, rows, layout, limits)
    (y,), state = _epilogue(
        "silu", layer, rows, stream.scaled, product, group, state, choice, layout, size, squares=stream.squares,
        outputs=(shape((max(rows, LEAST_ROWS), hidden), stream.x.dtype),), F=hidden,
    )  # fmt: skip
    return y, state


def residual_step(
    layer: int,
    x: jax.Array,
    group: Group,
    state: StepState,
    choice: Choice | Chooser | None = None,
    limits: StepLimits = StepLimits(),
    *,
    residual: jax.Array,
    next_scale: jax.Array,
    next_layer: int,
) -> tuple[ResidualStream, StepState]:
    """The residual stream plus a projection, o or down, of one layer; otherwise as `qkv_step`.

    Args:
        x: [at least M and at least LEAST_ROWS, I], the projection's input; rows behind M are not used.
        residual: [M, O]. next_scale: [L, O], the scales of the norm that follows, which is the one next_layer on.

    Returns:
        (the stream, the state with the trace written).
    """
    rows, columns = residual.shape[0], group.columns
    product, choice, state = _product(layer, rows, x, None, group, state, choice)
    layout = adapter_layout(group, rows, state, choice, limits)
    size = _tiles("residual", group, rows, layout, limits)
    scaled = shape((max(rows, LEAST_ROWS), columns), x.dtype)
    squares = shape((rows, columns // (2 * size["BH"])), jnp.float32)
    (scaled, squares, y), state = _epilogue(
        "residual", layer, rows, x, product, group, state, choice, layout, size, inputs=(next_scale,),
        outputs=(scaled, squares), in_place=(residual,),  # a program reads the columns that it writes
        O=columns, L=group.depth, NEXT=next_layer,
    )  # fmt: skip
    return ResidualStream(y, scaled, squares), state


def adapter_layout(
    group: Group, rows: int, state: StepState, choice: Choice | None, limits: StepLimits
) -> AdapterLayout | None:
    """Where an epilogue finds the group's adapters, shrinks and routing; None without adapters.

    Raises:
        NotImplementedError: more than MAX_ROWS rows, gates or A's that are not where a kernel reads them, or matrices
            to be averaged of a bank too wide for that.
    """
    if rows > MAX_ROWS:
        raise NotImplementedError(f"decode_step: expected at most {MAX_ROWS} rows, found {rows}")
    if choice is None:
        return None
    gates, compact = choice.counts is not None, group.a is not None
    if not group.packed and (gates or not compact):
        raise NotImplementedError("decode_step: expected gates and A's behind the kernel's rows, found none")
    if compact and choice.fused is not None:
        raise NotImplementedError("decode_step: expected adapters of a wide bank one by one, found fused ones")
    assert group.b is not None
    adapters, rank = group.b.shape[1:3]
    c, p = choice.top_k, len(group.splits)
    if compact:
        place = dict(start=0, projection=c * rank, row=p * c * rank, first_shrink=0)
    else:
        row = group.columns + p * group.packed
        place = dict(start=group.columns, projection=group.packed, row=row, first_shrink=group.first_shrink)
    traced = state.indices.shape[2] * c if gates else 0  # a row's, of all projections
    each = choice.indices is not None and choice.indices.ndim == 3  # a routing of its own for each projection
    return AdapterLayout(
        A=adapters, G=group.gates, R=rank, C=c, gates=gates and not compact,
        gather=compact or (choice.fused is None and c <= WRITTEN_OUT and rows * c <= limits.gather * adapters),
        fused=choice.fused is not None, splits=quantized_gpu.summands(group.w, rows), compact=compact,
        parts=shrink_parts(group, rows, c), **place,
        routing_layer=rows * traced, routing_row=traced or (p * c if each else c),
        routing_projection=c if gates or each else 0,
        routing_first=group.first_projection * c if gates else 0,
    )  # fmt: skip


def shrink_parts(group: Group, rows: int, choices: int) -> int:
    """Into how many parts a wide bank's shrink over I is cut, so that its programs fill the chip; 1 without such."""
    if group.a is None:
        return 1
    width, programs = group.a.shape[-1], rows * choices * len(group.splits)
    return next(p for p in (16, 8, 4, 2, 1) if p == 1 or (width % (p * 128) == 0 and p * programs <= 8 * PROGRAMS))


def _tiles(
    epilogue: Epilogue, group: Group, rows: int, layout: AdapterLayout | None, limits: StepLimits, head_dim: int = 0
) -> dict[str, int]:
    """`tiles` of a group."""
    adapters = (None, 1) if layout is None else (layout.gather, layout.RP)
    # float32 has no tensor cores: what is in no register is spilt
    most = 16 if group.b is not None and group.b.dtype.itemsize == 4 else 64
    return tiles(rows, group.columns, epilogue, head_dim, *adapters, limits.programs, most)


def _product(
    layer: int, rows: int, x: jax.Array, squares: jax.Array | None, group: Group, state: StepState,
    choice: Choice | Chooser | None,
) -> tuple[jax.Array, Choice | None, StepState]:  # fmt: skip
    """x W of a layer, read where it is stacked, float32 [at least M, O + P packed], a quantised base's as summands
    below each other; what acts behind it: the choice, as a Chooser made it of the product; the state with that traced.
    """
    if isinstance(group.w, QuantizedWeight):
        summands = quantized_gpu.product(layer, x, group.w, group.behind, rows)
        product = summands.reshape(-1, summands.shape[-1])
    else:
        form = "mi,oi->mo" if group.packed else "mi,io->mo"
        product = group.whole(jnp.einsum(form, x, group.w[layer], preferred_element_type=jnp.float32))
    if choice is None or isinstance(choice, Choice):
        return product, choice, state
    return product, *ask(choice, layer, rows, x, product, squares, group, state)


def _epilogue(
    epilogue: Epilogue, layer: int, rows: int, x: jax.Array, product: jax.Array, group: Group, state: StepState,
    choice: Choice | None, layout: AdapterLayout | None, size: Mapping[str, int], *, squares: jax.Array | None = None,
    inputs: tuple[jax.Array, ...] = (), outputs: tuple[jax.ShapeDtypeStruct, ...] = (),
    in_place: tuple[jax.Array, ...] = (), **constants: Hashable,
) -> tuple[tuple[jax.Array, ...], StepState]:  # fmt: skip
    """The epilogue of one layer's group.

    Args:
        x, product: what `_product` was given, and gave.
        squares: of the residual stream; None where no norm is before the group.
        inputs, outputs, in_place, constants: the epilogue kernel's own, arrays in its order. in_place: inputs that
            are changed, and are its outputs behind `outputs`.

    Returns:
        (outputs and what was changed, the state with the trace written if gates chose).
    """
    number = jnp.full((1,), layer, jnp.int32)
    unused = number  # an array in the place of one that the kernel does not read
    norm = {} if squares is None else dict(I=x.shape[1], EPS=group.eps, PARTS=squares.shape[1])
    shrinks, used, adapters, traces = product, unused, (unused,) * 6, (unused, unused)
    if choice is not None and layout is not None:
        if layout.compact:
            shrinks, state = _shrink(number, rows, x, squares, group, state, choice, product, layout)
            if choice.counts is not None:  # what that launch chose
                choice = Choice(choice.top_k, indices=state.indices, weights=state.weights)
        elif not layout.gather:
            shrinks, used, state = _weigh(number, rows, x, squares, group, state, choice, product, layout)
        if layout.gates and layout.gather:
            traces = state.indices, state.weights
        routing = (choice.counts, choice.temperatures, choice.indices, choice.weights) if layout.gather else (None,) * 4
        adapters = tuple(unused if z is None else z for z in (group.b, group.scale, *routing))
    read = (number, product, *(() if squares is None else (squares,)), shrinks, used, *adapters, *inputs)
    changed = (*in_place, *traces)
    one_warp = layout is None or (layout.gather and layout.RP * size["BH"] <= ONE_WARP)
    results = launch(
        EPILOGUE_MODULE, KERNELS[epilogue], *read, *changed,
        out=(*outputs, *(shape(z.shape, z.dtype) for z in changed)),
        aliases={len(read) + i: len(outputs) + i for i, z in enumerate(changed) if z is not unused},
        grid=(group.columns // (2 * size["BH"]), math.ceil(rows / size["BM"])),
        warps=1 if one_warp and size["BM"] == 1 else 4,
        M=rows, ROW=product.shape[1], SPLITS=quantized_gpu.summands(group.w, rows), ADAPTERS=layout, **norm,
        **constants, **size,
    )  # fmt: skip
    if traces[0] is not unused:
        state = dataclasses.replace(state, indices=results[-2], weights=results[-1])
    return results[:-2], state


def _weigh(
    number: jax.Array, rows: int, x: jax.Array, squares: jax.Array | None, group: Group, state: StepState,
    choice: Choice, product: jax.Array, layout: AdapterLayout,
) -> tuple[jax.Array, jax.Array, StepState]:  # fmt: skip
    """What `weigh_kernel` makes of the shrinks behind the product [M, P, KP], which blocks of B its tiles use int32
    [P, tiles, KP / BK], and the state with the trace of what gates chose."""
    assert group.b is not None
    p, unused = len(group.splits), number
    traces = (state.indices, state.weights) if layout.gates else (unused, unused)
    fused = None if choice.fused is None else choice.fused.astype(jnp.int32)
    routing = (choice.counts, choice.temperatures, choice.indices, choice.weights, fused)
    given = (unused if z is None else z for z in (squares, group.scale, *routing))
    read = (number, product, *given)
    grid = math.ceil(rows / WEIGHED_ROWS), p, layout.KP // layout.BK
    h, used, indices, weights = launch(
        ADAPTER_MODULE, "weigh_kernel", *read, *traces,
        out=(
            shape((rows, p, layout.KP), group.b.dtype), shape((p, grid[0], grid[2]), jnp.int32),
            *(shape(z.shape, z.dtype) for z in traces),
        ),
        aliases={len(read): 2, len(read) + 1: 3} if layout.gates else {}, grid=grid,
        M=rows, I=x.shape[1], P=p, NORM=squares is not None, EPS=group.eps or 0.0,
        PARTS=1 if squares is None else squares.shape[1], ADAPTERS=layout, BM=WEIGHED_ROWS,
    )  # fmt: skip
    return h, used, dataclasses.replace(state, indices=indices, weights=weights) if layout.gates else state


def _shrink(
    number: jax.Array, rows: int, x: jax.Array, squares: jax.Array | None, group: Group, state: StepState,
    choice: Choice, product: jax.Array, layout: AdapterLayout,
) -> tuple[jax.Array, StepState]:  # fmt: skip
    """The shrinks of the chosen adapters of a wide bank, float32 [parts, M, P, C, R]; what gates choose is traced."""
    assert group.a is not None
    width, p, parts = x.shape[1], len(group.splits), layout.parts
    gates, unused = choice.counts is not None, number
    traces = (state.indices, state.weights) if gates else (unused, unused)
    routing = (unused if z is None else z for z in (choice.counts, choice.temperatures, choice.indices))
    read = (number, x, unused if squares is None else squares, group.a, product, *routing)
    shrinks, indices, weights = launch(
        ADAPTER_MODULE, "shrink_kernel", *read, *traces,
        out=(shape((parts, rows, p, layout.C, layout.R), jnp.float32), *(shape(z.shape, z.dtype) for z in traces)),
        aliases={len(read): 1, len(read) + 1: 2} if gates else {}, grid=(rows * p * layout.C, parts),
        M=rows, I=width, O=group.columns, P=p, ROW=product.shape[1], GATES=group.packed if gates else 0,
        NORM=squares is not None, EPS=group.eps or 0.0, PARTS=1 if squares is None else squares.shape[1],
        ADAPTERS=layout, PART=width // parts,
        BK=divisor(width // parts, *(k for k in (256, 128, 64, 32, 16) if k * layout.R <= 4096), 16),
    )  # fmt: skip
    shrinks = group.whole(shrinks)
    return shrinks, dataclasses.replace(state, indices=indices, weights=weights) if gates else state


def attend(layer: int, q: jax.Array, state: StepState, tokens: StepTokens, heads: int, head_dim: int) -> jax.Array:
    """Attention of the step's tokens, [at least M, N H]: the input of a product. q: [M, N H], with rotary embedding."""
    split = q.reshape(-1, heads, head_dim)
    return paged_gpu.paged_attention(split, state.pages, tokens, layer * state.blocks, None, LEAST_ROWS)
