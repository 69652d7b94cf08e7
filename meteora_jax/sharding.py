"""The mesh, and which dimension of which array is split over which of its axes: the only file that knows their names.

A mesh has three axes, any of which may be 1:

    data     batches are split, weights repeated
    fsdp     batches are split, and weights too: each device gathers a layer's weights when it comes to them
    tensor   each projection's work is split: columns of q k v gate up, rows of o and down (Megatron's layout)

A parameter or activation names its dimensions by meaning (the keys of LOGICAL_AXES); this file says what that
means on a mesh. Whatever the mesh does not divide stays whole on every device.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec, Sharding
from jax.typing import DTypeLike

from meteora_jax.config import InputError

T = TypeVar("T")  # a pytree
Params = Any  # parameters, gradients, moments: an nnx.State (which beartype cannot read) or any other pytree

MESH_AXES = ("data", "fsdp", "tensor")

# meaning of a dimension -> the mesh axes that split it; a dimension named None stays whole
LOGICAL_AXES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "model": ("fsdp",),  # D of a weight; the residual stream itself is split by batch only
    "inner": ("tensor",),  # the side of a projection, of its adapters and of its gate that faces the heads or F
    "heads": ("tensor",),
    "vocab": ("tensor",),
}


def shard_order(widths: Sequence[int], shards: int) -> np.ndarray:
    """Where the columns of matrices that lie side by side come from, int [sum of widths], when each of `shards` parts
    of equal width is to hold its share of every matrix: [q | k | v] becomes [q0 k0 v0 | q1 k1 v1 | ...].

    A device that holds such a part cuts it into projections without asking another. Each width is a multiple of
    `shards`.
    """
    starts = np.cumsum([0, *widths[:-1]])
    parts = [start + np.arange(width).reshape(shards, -1) for start, width in zip(starts, widths, strict=True)]
    return np.concatenate(parts, axis=1).reshape(-1)


def tensor_shards(mesh: Mesh | None) -> int:
    """How many devices share a projection's work."""
    return 1 if mesh is None else mesh.shape["tensor"]


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh over all devices (of all hosts) or those given; one axis may be -1 and takes what the others leave.

    Raises:
        InputError: the axes do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    asked = "x".join(str(n) for n in sizes.values())
    open_axes = [name for name, n in sizes.items() if n == -1]
    rest = math.prod(n for n in sizes.values() if n != -1)
    if len(open_axes) > 1 or any(n < 1 for n in sizes.values() if n != -1):
        raise InputError(f"mesh: expected axes of at least 1, one of them perhaps -1, found {asked}")
    if open_axes:
        sizes[open_axes[0]] = len(devices) // rest
    if math.prod(sizes.values()) != len(devices):
        raise InputError(f"mesh: expected axes that multiply to the {len(devices)} devices, found {asked}")
    return jax.make_mesh(tuple(sizes.values()), MESH_AXES, (AxisType.Auto,) * 3, devices=devices)


def data_parts(mesh: Mesh) -> tuple[Mesh, ...]:
    """The meshes of data axis 1 that a mesh consists of, each of which holds all weights; none where hosts share it,
    since all of them run the same programs."""
    if mesh.is_multi_process:
        return ()
    return tuple(Mesh(part[None], MESH_AXES, axis_types=(AxisType.Auto,) * 3) for part in mesh.devices)


def initialize_distributed(
    coordinator: str | None = None, processes: int | None = None, index: int | None = None
) -> None:
    """Joins this process to the others of a run over several hosts; must come before the first use of a device.

    Args:
        coordinator: HOST:PORT of process 0. On TPU pods and under Slurm or MPI all three may be left out.
        processes: how many there are. index: which one this is, from 0.
    """
    jax.distributed.initialize(coordinator, processes, index)


def spec(axes: Sequence[str | None], shape: Sequence[int], sizes: Mapping[str, int]) -> PartitionSpec:
    """Where an array goes on a mesh of these axis sizes; a dimension that they do not divide stays whole.

    `axes` names the last dimensions of `shape`; those before them (stacked layers) stay whole.
    """
    names = [None] * (len(shape) - len(axes)) + list(axes)
    parts = []
    for name, size in zip(names, shape, strict=True):
        over = () if name is None else tuple(a for a in LOGICAL_AXES[name] if sizes[a] > 1)
        parts.append(over if over and size % math.prod(sizes[a] for a in over) == 0 else None)
    return PartitionSpec(*parts)


def sharding(mesh: Mesh, axes: Sequence[str | None], shape: Sequence[int]) -> NamedSharding:
    """`spec` on a real mesh."""
    return NamedSharding(mesh, spec(axes, shape, mesh.shape))


def replicated(mesh: Mesh) -> NamedSharding:
    """Whole on every device."""
    return NamedSharding(mesh, PartitionSpec())


def place(value: Any, where: Sharding, dtype: DTypeLike | None = None) -> jax.Array:
    """A host array as a device array; every host can read all of `value` and hands over its own devices' parts."""
    dtype = value.dtype if dtype is None else dtype
    return jax.make_array_from_callback(value.shape, where, lambda part: np.asarray(value[part], dtype))


def place_rows(tree: T, mesh: Mesh | None) -> T:
    """Arrays whose first dimension is the batch, put on the mesh (on the default device without one).

    Every host passes the whole batch; its size must be a multiple of `rows_multiple`.
    """
    if mesh is None:
        return jax.tree.map(jnp.asarray, tree)

    def put(x: Any) -> jax.Array:
        x = np.asarray(x)
        return place(x, sharding(mesh, ("batch",) + (None,) * (x.ndim - 1), x.shape))

    return jax.tree.map(put, tree)


def place_whole(tree: T, mesh: Mesh | None) -> T:
    """Arrays that every device needs whole."""
    if mesh is None:
        return tree
    if not mesh.is_multi_process:  # all in one call
        return jax.device_put(tree, replicated(mesh))
    return jax.tree.map(lambda x: place(np.asarray(x), replicated(mesh)), tree)


def rows_multiple(mesh: Mesh | None) -> int:
    """What a batch's size must be a multiple of."""
    return 1 if mesh is None else math.prod(mesh.shape[a] for a in LOGICAL_AXES["batch"])


def local_rows(mesh: Mesh | None, rows: int) -> list[int]:
    """Which rows of a batch of `rows` lie on this host's devices."""
    if mesh is None:
        return list(range(rows))
    parts = sharding(mesh, ("batch",), (rows,)).addressable_devices_indices_map((rows,)).values()
    return sorted({row for part in parts if part is not None for row in range(rows)[part[0]]})


def pad_rows(tree: T, rows: int) -> T:
    """Repeats the last row of every leaf (its first dimension is the batch) until there are `rows`, on the host."""

    def pad(x: Any) -> np.ndarray:
        x = np.asarray(x)
        return np.pad(x, [(0, rows - x.shape[0])] + [(0, 0)] * (x.ndim - 1), mode="edge")

    return jax.tree.map(pad, tree)


def fetch(x: jax.Array) -> np.ndarray:
    """The whole array on this host, whichever hosts hold its parts; every host must call it."""
    if x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(x, tiled=True))


@contextlib.contextmanager
def use_mesh(mesh: Mesh | None) -> Iterator[None]:
    """Functions traced inside see the mesh (`constrain`); None leaves everything on one device."""
    if mesh is None:
        yield
        return
    with jax.set_mesh(mesh):
        yield


def partitioned_mesh() -> AbstractMesh | None:
    """The mesh of `use_mesh` where XLA splits the work; None without one, and where each device runs its own share."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.manual_axes else mesh


def partitions() -> bool:
    """Whether XLA splits what is traced now over several devices: a kernel it cannot split."""
    mesh = partitioned_mesh()
    return mesh is not None and mesh.size > 1


def splits_inner(width: int) -> bool:
    """Whether the mesh of `use_mesh` cuts an "inner" dimension of that width: sums over it cross devices."""
    mesh = partitioned_mesh()
    return mesh is not None and mesh.shape["tensor"] > 1 and width % mesh.shape["tensor"] == 0


def sum_shares(x: jax.Array) -> jax.Array:
    """Inside `jax.shard_map`: the sum of what the devices of the tensor axis hold, on each of them."""
    return jax.lax.psum(x, LOGICAL_AXES["inner"])


def join_shares(x: jax.Array, axis: int) -> jax.Array:
    """Inside `jax.shard_map`: what the devices of the tensor axis hold, side by side along an axis, on each of them."""
    return jax.lax.all_gather(x, LOGICAL_AXES["inner"], axis=axis, tiled=True)


def by_device(
    function: Callable[..., jax.Array],
    given: Sequence[tuple[jax.Array, Sequence[str | None]]],
    axes: Sequence[str | None],
    whole: tuple[str, int],
) -> jax.Array:
    """`function` of arrays and the names of their dimensions, on every device of `use_mesh`'s mesh with its own parts;
    the result is split as the first array and its dimensions are named `axes`. For what XLA cannot cut by itself.

    whole: a dimension's name and a size; where the mesh does not divide that, the dimension stays whole in all arrays.
    """
    mesh = partitioned_mesh()
    if mesh is None or mesh.size == 1:
        return function(*(x for x, _ in given))
    name, size = whole
    cut = size % math.prod(mesh.shape[a] for a in LOGICAL_AXES[name]) == 0

    def own(x: jax.Array, names: Sequence[str | None]) -> PartitionSpec:
        return spec([n if cut or n != name else None for n in names], x.shape, mesh.shape)

    arrays = tuple(x for x, _ in given)
    return on_each(function, tuple(own(x, names) for x, names in given), own(given[0][0], axes), *arrays)


def on_each(function: Callable[..., Any], in_specs: Any, out_specs: Any, *given: Any) -> Any:
    """`jax.shard_map` of a function of pytrees on `use_mesh`'s mesh, which there is; in_specs: a prefix of these.

    Arrays without elements are made on each device: XLA turns such an input into a constant, and Shardy of jaxlib
    0.11.2 takes the process down where an input of the function is one.
    """
    mesh = partitioned_mesh()
    assert mesh is not None
    arrays, form = jax.tree.flatten(given)
    specs = jax.tree.leaves(jax.tree.broadcast(in_specs, given))
    shapes = [NamedSharding(mesh, own).shard_shape(z.shape) for own, z in zip(specs, arrays, strict=True)]

    def own(full: Sequence[jax.Array]) -> Any:
        rest = iter(full)
        return function(
            *form.unflatten(
                next(rest) if z.size else jnp.zeros(shape, z.dtype) for z, shape in zip(arrays, shapes, strict=True)
            )
        )

    full = [(z, spec) for z, spec in zip(arrays, specs, strict=True) if z.size]
    sharded = jax.shard_map(own, in_specs=([spec for _, spec in full],), out_specs=out_specs, check_vma=False)
    return sharded([z for z, _ in full])


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Tells the compiler how an activation lies on the mesh of `use_mesh`; where there is nothing to tell, nothing."""
    mesh = partitioned_mesh()
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, spec(axes, x.shape, mesh.shape))


@jax.jit
def finite(params: Any) -> jax.Array:
    """Whether all values of a tree of arrays are finite numbers; bool [], the same on all devices."""
    return jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(params)]).all()
