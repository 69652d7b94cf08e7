"""The op on several devices: a projection group's product and update in one `jax.shard_map`, one all-reduce at most.

    y = x W + update(x)      W [I, O], A [P, A, R, I], B [A, R, O]

Any of three dimensions may lie along an axis of the mesh. O: every device has its columns, nothing crosses. I (the
group's input is split, as attention's output is): product and shrink are partial sums; the routing is known, so both go
on through B, and the sums of y are added up once. A (adapters are split): a device adds what its own adapters give.
Sums over devices are of float32.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, PartitionSpec
from jaxtyping import Array, Float

from pallas_kernels.routed_lora.api import Choices, Implementation, LoraBank, routed_lora
from pallas_kernels.topk_gating import NO_ADAPTER


class Given(NamedTuple):
    """A device's part of a routing."""

    indices: jax.Array
    weights: jax.Array
    fused: None = None
    runs: None = None


def routed_product(
    x: Float[Array, "B T I"],
    kernel: Float[Array, "I O"],
    bank: LoraBank,
    routing: Choices,
    mesh: Mesh | AbstractMesh,
    *,
    rows: str | None = None,
    inputs: str | None = None,
    outputs: str | None = None,
    adapters: str | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "B T O"]:
    """x W + the update of `routed_lora`, in x's dtype; differentiable in the same arguments and kernel.

    Args:
        mesh: whose axes the following name. rows: the one that splits B. inputs: I. adapters: A.
        outputs: O; columns then lie in equal parts, each with its share of every projection, and the bank's
            `splits` are the widths of the whole.
        implementation: of every device's part; None lets the table decide.

    Raises:
        ValueError: a dimension that its axis does not divide, or one axis for two dimensions.
    """
    shards = {name: mesh.shape[axis] if axis else 1 for name, axis in
              (("B", rows), ("I", inputs), ("O", outputs), ("A", adapters))}  # fmt: skip
    sizes = {"B": x.shape[0], "I": x.shape[2], "A": bank.a.shape[1]}
    wrong = [f"{k}: expected a multiple of {shards[k]}, found {n}" for k, n in sizes.items() if n % shards[k]]
    wrong += [f"splits: expected multiples of {shards['O']}, found {o}" for o in bank.splits if o % shards["O"]]
    named = [axis for axis in (rows, inputs, outputs, adapters) if axis]
    if len(set(named)) < len(named):
        wrong.append(f"axes: expected a different one for every dimension, found {', '.join(named)}")
    if routing.fused is not None:
        wrong.append("routing: expected no fused request")
    if wrong:
        raise ValueError("routed_product: " + "; ".join(wrong))
    own = tuple(o // shards["O"] for o in bank.splits)
    summed = tuple(axis for axis in (inputs, adapters) if axis)

    places = (
        (rows, None, inputs), (inputs, outputs), (None, adapters, None, inputs), (adapters, None, outputs), (rows,),
        (rows,), (None, adapters),
    )  # fmt: skip

    def share(*parts: jax.Array) -> jax.Array:
        # one gradient rule serves them all, so all must count as different on every axis
        others = [tuple(axis for axis in named if axis not in place) for place in places]
        varying = [jax.lax.pcast(z, axes, to="varying") if axes else z for z, axes in zip(parts, others, strict=True)]
        x, kernel, a, b, indices, weights, scale = varying
        base = jnp.einsum("bti,io->bto", x, kernel, preferred_element_type=jnp.float32)
        if adapters:
            place = jax.lax.axis_index(adapters)
            base = jnp.where(place == 0, base, 0.0)  # of the devices that hold the same columns one adds the product
            mine = indices - place * scale.shape[1]
            indices = jnp.where((mine >= 0) & (mine < scale.shape[1]), mine, NO_ADAPTER)
        routing = Given(indices, weights)
        y = routed_lora(x, LoraBank(a, b, scale, own), routing, base, implementation=implementation)
        return (jax.lax.psum(y, summed) if summed else y).astype(x.dtype)

    where = jax.shard_map(
        share,
        mesh=mesh,
        in_specs=tuple(PartitionSpec(*place) for place in places),
        out_specs=PartitionSpec(rows, None, outputs),
    )
    return where(x, kernel, bank.a, bank.b, routing.indices, routing.weights, bank.scale)
