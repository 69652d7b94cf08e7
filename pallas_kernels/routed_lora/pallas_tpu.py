"""TPUs: Pallas kernels whose blocks follow the routing.

They are compiled for TPU topologies (v5e, v5p, v6e) and have never been timed on a TPU: no rule picks them yet.

    tpu_dense      many tokens, few adapters: x A^T of all adapters at once, masked in VMEM, through every B.
    tpu_gathered   few tokens, or one routing a request: the prefetched indices say which blocks of A and B are
                   fetched, so bytes follow the choices; NO_ADAPTER fetches nothing new and multiplies nothing.

Both run in two phases over one grid axis: first the steps that shrink, into scratch, then the steps that expand,
one tile of output columns each. While a phase runs, the other's blocks stay where they are and cost nothing.
A tile of columns lies in one projection; widths that no tile divides are padded, which copies b and base.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int32

from pallas_kernels.routed_lora.reference import columns
from pallas_kernels.routed_lora.xla import spread

LANES = 128
MAX_COLUMNS = 1024  # of an output tile
MAX_DEPTH = 4096  # columns of x in a step of the gathered kernel
DENSE_DEPTH = 512  # and of the dense one, which holds every A of the group
MAX_INNER = 1024  # A * R that the dense kernel holds in VMEM
MAX_CHOICES = 32_768  # indices that fit in scalar memory beside everything else


def tile_of(sizes: tuple[int, ...], largest: int) -> int:
    """The largest multiple of 128 up to `largest` that divides all sizes; 0 if none does."""
    common = math.gcd(*sizes)
    return max((t for t in range(LANES, min(largest, common) + 1, LANES) if common % t == 0), default=0)


def pad_axis(array: jax.Array, axis: int, multiple: int) -> jax.Array:
    """Zeros behind an axis until its size is a multiple."""
    missing = -array.shape[axis] % multiple
    if missing == 0:
        return array
    return jnp.pad(array, [(0, missing if i == axis % array.ndim else 0) for i in range(array.ndim)])


def pad_columns(array: jax.Array, splits: tuple[int, ...]) -> jax.Array:
    """Each projection's columns padded to whole lanes."""
    return jnp.concatenate([pad_axis(array[..., i:j], -1, LANES) for i, j in columns(splits)], axis=-1)


def cut_columns(array: jax.Array, splits: tuple[int, ...], padded: tuple[int, ...]) -> jax.Array:
    """Undoes `pad_columns`."""
    starts = [i for i, _ in columns(padded)]
    return jnp.concatenate([array[..., i : i + o] for i, o in zip(starts, splits, strict=True)], axis=-1)


def whole_lanes(implementation: Any) -> Any:
    """Makes widths of I and of each projection fit: an implementation sees only what its tiles divide."""

    @functools.wraps(implementation)
    def padded(x, a, b, indices, weights, base, splits, *, interpret: bool = False):
        if x.dtype == jnp.float16:
            raise NotImplementedError("TPU kernels: expected bfloat16 or float32, found float16, which TPUs lack")
        if x.shape[-1] > DENSE_DEPTH:
            x, a = pad_axis(x, -1, DENSE_DEPTH), pad_axis(a, -1, DENSE_DEPTH)
        if tile_of(splits, MAX_COLUMNS):
            return implementation(x, a, b, indices, weights, base, splits, interpret)
        wide = tuple(-(-o // LANES) * LANES for o in splits)
        b, base = pad_columns(b, splits), pad_columns(base, splits)
        return cut_columns(implementation(x, a, b, indices, weights, base, wide, interpret), splits, wide)

    return padded


def product(left: jax.Array, right: jax.Array, contract: tuple[int, int]) -> jax.Array:
    """float32 product over one axis of each."""
    precision = jax.lax.Precision.HIGHEST if left.dtype == jnp.float32 else None
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(left, right, dimensions, precision=precision, preferred_element_type=jnp.float32)


def projection_of_tiles(splits: tuple[int, ...], tile: int) -> jax.Array:
    """int32: which projection each tile of columns belongs to."""
    return jnp.asarray([p for p, o in enumerate(splits) for _ in range(o // tile)], jnp.int32)


def gathered_kernel(index, weight, projection, x, a, b, base, y, h, total, *, depth, shrinks, choices):
    """index, weight [G*P*C] and projection [tiles] in SMEM; h [P*C, S, R] and total [S, O tile] float32 scratch."""
    step = pl.program_id(2)
    routed = pl.program_id(0) * h.shape[0]

    @pl.when(step < shrinks)
    def shrink():
        choice = step // depth

        @pl.when(step % depth == 0)
        def start():
            h[choice] = jnp.zeros(h.shape[1:], jnp.float32)

        @pl.when(index[routed + choice] >= 0)
        def add():
            h[choice] += product(x[0], a[0, 0], (1, 1))

    @pl.when(step >= shrinks)
    def expand():
        tile, c = (step - shrinks) // choices, (step - shrinks) % choices
        choice = projection[tile] * choices + c

        @pl.when(c == 0)
        def start():
            total[...] = base[0].astype(jnp.float32)

        @pl.when(index[routed + choice] >= 0)
        def add():
            total[...] += product((h[choice] * weight[routed + choice]).astype(x.dtype), b[0], (1, 0))

        @pl.when(c == choices - 1)
        def finish():
            y[0] = total[...].astype(y.dtype)


@whole_lanes
def gathered_lora(
    x: Float[Array, "G S I"],
    a: Float[Array, "P A R I"],
    b: Float[Array, "A R O"],
    indices: Int32[Array, "G P C"],
    weights: Float[Array, "G P C"],
    base: Float[Array, "G S O"],
    splits: tuple[int, ...],
    interpret: bool = False,
) -> Float[Array, "G S O"]:
    """base + update, fetching the adapters that are chosen; see `api.routed_lora`."""
    groups, tokens, width = x.shape
    projections, _, rank, _ = a.shape
    choices = indices.shape[2]
    if indices.size > MAX_CHOICES:
        raise NotImplementedError(f"tpu_gathered: expected at most {MAX_CHOICES} choices, found {indices.size}")
    columns = tile_of(splits, MAX_COLUMNS if tokens <= 16 else 512)
    deep = width if width <= DENSE_DEPTH else tile_of((width,), MAX_DEPTH if tokens <= 16 else 1024)
    rows = tokens if tokens <= 256 else 256
    x, base = pad_axis(x, 1, rows), pad_axis(base, 1, rows)
    depth, tiles, per_group = width // deep, b.shape[2] // columns, projections * choices
    shrinks = per_group * depth

    def shrinking(g, step, index):
        """(choice, block of I, adapter) of a step; the last ones once the shrink is over."""
        step = jnp.minimum(step, shrinks - 1)
        choice = step // depth
        return choice, step % depth, index[g * per_group + choice]

    def block_of_a(g, s, step, index, weight, projection):
        choice, k, adapter = shrinking(g, step, index)
        return choice // choices, jnp.maximum(adapter, 0), 0, jnp.where(adapter >= 0, k, 0)

    def block_of_x(g, s, step, index, weight, projection):
        return g, s, shrinking(g, step, index)[1]

    def tile_at(step):
        return jnp.maximum(step - shrinks, 0) // choices

    def block_of_b(g, s, step, index, weight, projection):
        tile, c = tile_at(step), jnp.maximum(step - shrinks, 0) % choices
        adapter = index[g * per_group + projection[tile] * choices + c]
        return jnp.maximum(adapter, 0), 0, jnp.where(adapter >= 0, tile, 0)

    def block_of_y(g, s, step, index, weight, projection):
        return g, s, tile_at(step)

    y_spec = pl.BlockSpec((1, rows, columns), block_of_y)
    y = pl.pallas_call(
        functools.partial(gathered_kernel, depth=depth, shrinks=shrinks, choices=choices),
        out_shape=jax.ShapeDtypeStruct(base.shape, base.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(groups, x.shape[1] // rows, shrinks + tiles * choices),
            in_specs=[
                pl.BlockSpec((1, rows, deep), block_of_x),
                pl.BlockSpec((1, 1, rank, deep), block_of_a),
                pl.BlockSpec((1, rank, columns), block_of_b),
                y_spec,
            ],
            out_specs=y_spec,
            scratch_shapes=[
                pltpu.VMEM((per_group, rows, rank), jnp.float32),
                pltpu.VMEM((rows, columns), jnp.float32),
            ],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=interpret,
        name="routed_lora_gathered",
    )(indices.reshape(-1), weights.reshape(-1), projection_of_tiles(splits, columns), x, a, b, base)
    return y[:, :tokens]


def dense_kernel(projection, index, weight, x, a, b, base, y, h, masked, *, depth, rank):
    """index, weight [M, P*C] blocks; h float32 and masked (x's dtype) scratch [P, M, A*R]."""
    step = pl.program_id(1)
    choices = index.shape[1] // h.shape[0]

    @pl.when(step == 0)
    def start():
        h[...] = jnp.zeros(h.shape, jnp.float32)

    @pl.when(step < depth)
    def shrink():
        for p in range(h.shape[0]):
            h[p] += product(x[...], a[p], (1, 1))

    @pl.when(step == depth - 1)
    def mask():
        adapter = jax.lax.broadcasted_iota(jnp.int32, h.shape[1:], 1) // rank
        for p in range(h.shape[0]):
            combine = jnp.zeros(h.shape[1:], jnp.float32)
            for c in range(p * choices, (p + 1) * choices):
                combine += jnp.where(adapter == index[:, c : c + 1], weight[:, c : c + 1], 0.0)
            masked[p] = (h[p] * combine).astype(masked.dtype)

    @pl.when(step >= depth)
    def expand():
        update = product(masked[projection[step - depth]], b[...], (1, 0))
        y[...] = (base[...].astype(jnp.float32) + update).astype(y.dtype)


@whole_lanes
def dense_lora(
    x: Float[Array, "G S I"],
    a: Float[Array, "P A R I"],
    b: Float[Array, "A R O"],
    indices: Int32[Array, "G P C"],
    weights: Float[Array, "G P C"],
    base: Float[Array, "G S O"],
    splits: tuple[int, ...],
    interpret: bool = False,
) -> Float[Array, "G S O"]:
    """base + update through products with every adapter; see `api.routed_lora`."""
    groups, tokens, width = x.shape
    projections, adapters, rank, _ = a.shape
    inner, total = adapters * rank, b.shape[2]
    if inner > MAX_INNER:
        raise NotImplementedError(f"tpu_dense: expected A * R of at most {MAX_INNER}, found {inner}")
    indices, weights = spread(indices, weights, tokens)
    count = groups * tokens
    rows = count if count <= 256 else 256

    def flat(array: jax.Array) -> jax.Array:
        return pad_axis(array.reshape(count, -1), 0, rows)

    columns = tile_of(splits, 512)
    deep = width if width <= DENSE_DEPTH else DENSE_DEPTH
    depth = width // deep
    x, base_rows, routing = flat(x), flat(base), (flat(indices), flat(weights))
    chosen = pl.BlockSpec((rows, routing[0].shape[1]), lambda m, step, projection: (m, 0))
    y_spec = pl.BlockSpec((rows, columns), lambda m, step, projection: (m, jnp.maximum(step - depth, 0)))
    y = pl.pallas_call(
        functools.partial(dense_kernel, depth=depth, rank=rank),
        out_shape=jax.ShapeDtypeStruct(base_rows.shape, base.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(x.shape[0] // rows, depth + total // columns),
            in_specs=[
                chosen,
                chosen,
                pl.BlockSpec((rows, deep), lambda m, step, projection: (m, jnp.minimum(step, depth - 1))),
                pl.BlockSpec(
                    (projections, inner, deep), lambda m, step, projection: (0, 0, jnp.minimum(step, depth - 1))
                ),
                pl.BlockSpec((inner, columns), lambda m, step, projection: (0, jnp.maximum(step - depth, 0))),
                y_spec,
            ],
            out_specs=y_spec,
            scratch_shapes=[
                pltpu.VMEM((projections, rows, inner), jnp.float32),
                pltpu.VMEM((projections, rows, inner), x.dtype),
            ],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=interpret,
        name="routed_lora_dense",
    )(
        projection_of_tiles(splits, columns),
        *routing,
        x,
        a.reshape(projections, inner, width),
        b.reshape(inner, total),
        base_rows,
    )
    return y[:count].reshape(base.shape)


IMPLEMENTATIONS = {"tpu_gathered": gathered_lora, "tpu_dense": dense_lora}
