"""The routed LoRA product of a projection group: checks its input, picks an implementation, differentiates it.

    y_p = base_p + sum_c weight_c * scale[p, a_c] * (x A[p, a_c]^T) B[a_c, :, columns of p]

A routing names, for every token and projection, C adapters a_c and their weights. `reference.py` says what that
means; every other implementation computes the same and differs in what it reads.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.routed_lora import reference, xla
from pallas_kernels.routed_lora.gradients import dense_gradients, grouped_gradients
from pallas_kernels.topk_gating import NO_ADAPTER

Implementation = Literal[
    "reference",  # XLA; every adapter for every token, masked
    "masked",  # XLA; the same with one product of 16-bit operands through all B's
    "gathered",  # XLA; the chosen adapters of every token or request are read
    "grouped",  # XLA; tokens sorted by adapter
    "tpu_gathered",  # TPU; the chosen adapters, few tokens or requests
    "tpu_dense",  # TPU; every adapter, masked
]

# The backward pass of what is not differentiated by JAX has two forms; A * R up to which it multiplies with every
# adapter.
DENSE_GRADIENTS_WIDTH = 512
GATHERED = 1 << 28  # bytes of chosen adapters that are read at a time where every token has its own
GATHERED_TOKENS = 32  # H200, 28 adapters of rank 8, a decoding step: 7.8 to 10.0 ms gathered, 8.6 to 12.9 masked


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LoraBank:
    """The adapters of a projection group.

    a [P, A, R, I]: A of every adapter as rows (PEFT's lora_A), zero-padded to a common rank R. b [A, R, O]: B of every
    adapter; the columns of the P projections side by side. scale float32 [P, A]: of each adapter at each projection.
    splits: the width of each projection in O.
    """

    a: Any
    b: Any
    scale: Any
    splits: tuple[int, ...] = dataclasses.field(metadata={"static": True})


@runtime_checkable
class Choices(Protocol):
    """What the product reads of a routing.

    indices int32 [*K, P1, C], the chosen adapters; NO_ADAPTER, or any index outside 0..A-1, adds nothing. An adapter
    named twice counts twice. weights float32 [*W, P1, C]. K and W are x's leading axes, or have 1 where tokens share
    (one choice a request: [B, 1, 1, C]); P1 is P, or 1 where the projections share. fused: bool [B] over x's first
    axis, whose chosen matrices are averaged by the weights of their first token's choice; None: nobody's. runs: int32
    [B] of these, so many choices side by side are parts of one adapter: the first of each are averaged, the second,
    and so on; None: 1.
    """

    @property
    def indices(self) -> Any: ...
    @property
    def weights(self) -> Any: ...
    @property
    def fused(self) -> Any: ...
    @property
    def runs(self) -> Any: ...


class Shape(NamedTuple):
    """What the choice of an implementation depends on."""

    groups: int  # G: routings
    tokens: int  # S: tokens that share each of them, 1 if every token has its own
    adapters: int  # A
    choices: int  # C
    projections: int  # P
    shared: bool  # one routing for all tokens and projections of a request
    half: bool  # 16-bit operands and result


def choose(platform: str, shape: Shape) -> Implementation:
    """The implementation for a shape on "cpu", "gpu" or "tpu".

    The TPU kernels enter here when they have been timed on their hardware, and not before. With
    `scripts/bench.py --what kernel` the others were.
    """
    if shape.shared and shape.groups * shape.choices < shape.adapters:  # nothing may grow with the bank
        return "gathered"
    few = shape.groups * shape.tokens <= xla.FEW_ROWS and shape.projections > 1
    return "masked" if shape.half and (platform == "gpu" or few) else "reference"


def choose_for_wide_bank(tokens: int) -> Implementation:
    """For a bank of hundreds of adapters times ranks on one device, where every token has its own routing."""
    return "gathered" if tokens <= GATHERED_TOKENS else "grouped"


def routed_lora(
    x: Float[Array, "*L I"],
    bank: LoraBank,
    routing: Choices,
    base: Float[Array, "*L O"],
    *,
    shrink: Float[Array, "*L P A R"] | None = None,
    implementation: Implementation | None = None,
    platform: str | None = None,
) -> Float[Array, "*L O"]:
    """base + the update of a projection group; differentiable in x, the bank, the weights and base.

    Args:
        x: the group's input; float32, bfloat16 or float16, as the bank is.
        base: what the update is added to: the product of x and the base kernel. Sums are float32, rounded
            once to base's dtype; the weighted shrink is rounded to x's dtype before it meets b.
        shrink: x through every A, float32, where a packed weight's product gave it.
        implementation: None lets `choose` decide. One device; under a mesh, call inside `jax.shard_map`
            (reference, masked and gathered may also be left to the partitioner).
        platform: what the program will run on; None: the default backend.

    Raises:
        ValueError: shapes or dtypes that do not fit together, all of them at once.
        NotImplementedError: an `implementation` that does not serve this shape, dtype or platform.
    """
    indices, weights, fused = routing.indices, routing.weights, routing.fused
    _check(x, bank, indices, weights, base, shrink)
    shared = indices.ndim > 2 and indices.shape[-3] == indices.shape[-2] == 1
    if fused is not None and not shared:  # a batch of several kinds of request
        own = fused.reshape(-1, *(1,) * (base.ndim - 1))
        first = indices[:, :1, :1], weights[..., :1, :]
        others = jnp.where(own[..., None], 0.0, weights)
        fusion = _gathered(x, bank, *first, fused, base, routing.runs)
        return jnp.where(own, fusion, _update(x, bank, indices, others, base, shrink, implementation, platform))
    if fused is not None:
        return _gathered(x, bank, indices, weights, fused, base, routing.runs)
    return _update(x, bank, indices, weights, base, shrink, implementation, platform)


def _update(x, bank: LoraBank, indices, weights, base, shrink, implementation, platform) -> jax.Array:
    """`routed_lora` where no request is fused."""
    projections, adapters = bank.scale.shape
    grouping = _grouping(x, indices)
    half = x.dtype != jnp.float32 and base.dtype != jnp.float32
    shared = indices.ndim > 2 and indices.shape[-3] == indices.shape[-2] == 1 and shrink is None
    shape = Shape(*grouping, adapters, indices.shape[-1], projections, shared, half)
    name = implementation or choose(platform or jax.default_backend(), shape)
    if name in ("reference", "masked"):
        return _dense(x, bank, indices, weights, base, shrink, name)
    if shrink is not None:
        raise NotImplementedError(f"routed_lora: {name} shrinks by itself")
    if weights.shape[:-2] != indices.shape[:-2]:  # of tokens that share their choice
        if name == "gathered":
            return _gathered(x, bank, indices, weights, None, base)
        grouping = math.prod(x.shape[:-1]), 1
    groups, tokens = grouping
    chosen, given = (_flat_routing(z, x, groups, tokens) for z in (indices, weights))
    chosen, given = jnp.broadcast_arrays(chosen[:, 0], given[:, 0])
    real, scale = _scale(bank, chosen)
    chosen, scaled = jnp.where(real, chosen, NO_ADAPTER), jnp.where(real, given, 0.0) * scale
    x, flat = x.reshape(groups, tokens, -1), base.reshape(groups, tokens, -1)
    y: Any = _routed(x, bank.a, bank.b, chosen, scaled, flat, (bank.splits, name))
    return y.reshape(base.shape)


def _dense(x, bank: LoraBank, indices, weights, base, shrink, name: str) -> jax.Array:
    """Every adapter for every token, on x's own axes [.., T, I], the leading ones flattened to B."""
    *lead, tokens, width = x.shape
    indices, weights = (jnp.broadcast_to(z, (*lead, *z.shape[-3:])) for z in (indices, weights))
    indices, weights = (z.reshape(math.prod(lead), *z.shape[-3:]) for z in (indices, weights))
    combine = reference.dense_weights(indices, weights, bank.scale.shape[1]) * bank.scale[None, None]
    x = x.reshape(-1, tokens, width)
    h = reference.shrink(x, bank.a) if shrink is None else shrink.reshape(*x.shape[:2], *shrink.shape[-3:])
    h = (h * combine[..., None].astype(jnp.float32)).astype(x.dtype)
    if name == "masked":
        y = xla.masked_expand(h.reshape(-1, *h.shape[2:]), bank.b, base.reshape(-1, base.shape[-1]), bank.splits)
    else:
        y = reference.expand(h, bank.b, base.reshape(*x.shape[:2], -1), bank.splits)
    return y.reshape(base.shape)


def _gathered(x, bank: LoraBank, indices, weights, fused, base, runs=None) -> jax.Array:
    """The chosen adapters alone, where weights differ by token or matrices are averaged; differentiated by JAX."""
    groups, tokens = _grouping(x, indices)
    chosen, given = (_flat_routing(z, x, groups, tokens) for z in (indices, weights))
    chosen = chosen[:, 0]
    real, scale = _scale(bank, chosen)
    chosen, given = jnp.where(real, chosen, 0), jnp.where(real[:, None], given, 0.0)
    adapter = bank.a.shape[0] * math.prod(bank.a.shape[2:]) + math.prod(bank.b.shape[1:])
    together = max(1, GATHERED // (chosen.shape[-1] * adapter * bank.a.dtype.itemsize))

    def some(x, chosen, given, scale, fused, base, runs):
        h = xla.gathered_shrink(x, bank.a, chosen)
        return xla.gathered_expand(h, bank.b, chosen, given, scale, fused, base, bank.splits, runs)

    def one(arrays):
        return some(*jax.tree.map(lambda z: z[None], arrays))[0]

    arrays = x.reshape(groups, tokens, -1), chosen, given, scale, fused, base.reshape(groups, tokens, -1), runs
    y = some(*arrays) if groups <= together else jax.lax.map(one, arrays, batch_size=together)
    return y.reshape(base.shape)


def _scale(bank: LoraBank, chosen: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Which of the choices [G, P1, C] are adapters, and float32 [G, P, C], their scales."""
    projections, adapters = bank.scale.shape
    own = jnp.arange(projections, dtype=jnp.int32)[None, :, None]
    real = (chosen >= 0) & (chosen < adapters)
    return real, bank.scale[own, jnp.where(real, chosen, 0)]


def _grouping(x: jax.Array, indices: jax.Array) -> tuple[int, int]:
    """G routings, and the S tokens that share each of them."""
    lead, own = x.shape[:-1], indices.shape[:-2]
    shared = len(own)
    while shared > 0 and own[shared - 1] == 1:
        shared -= 1
    if own[:shared] != lead[:shared]:  # an axis that shares before one that does not: no token shares then
        shared = len(own)
    return math.prod(lead[:shared]), math.prod(lead[shared:])


def _flat_routing(z: jax.Array, x: jax.Array, groups: int, tokens: int) -> jax.Array:
    """[*K, P1, C] as [G, 1 or S, P1, C]."""
    lead, end = x.shape[:-1], z.shape[-2:]
    if math.prod(z.shape[:-2]) == groups:
        return z.reshape(groups, 1, *end)
    return jnp.broadcast_to(z, (*lead, *end)).reshape(groups, tokens, *end)


def _check(x, bank: LoraBank, indices, weights, base, shrink) -> None:
    """Everything that jaxtyping's annotations say, and what they cannot, without it."""
    problems = []

    def expect(what: str, expected: Any, found: Any) -> None:
        if expected != found:
            problems.append(f"{what}: expected {expected}, found {found}")

    projections, adapters, rank, width = bank.a.shape
    total = sum(bank.splits)
    expect("number of splits", projections, len(bank.splits))
    expect("x's last axis", width, x.shape[-1])
    expect("b's shape", (adapters, rank, total), bank.b.shape)
    expect("scale's shape", (projections, adapters), bank.scale.shape)
    expect("base's shape", (*x.shape[:-1], total), base.shape)
    expect("weights' choices", indices.shape[-1], weights.shape[-1])
    if shrink is not None:
        expect("shrink's shape", (*x.shape[:-1], projections, adapters, rank), shrink.shape)
    for name, array in (("indices", indices), ("weights", weights)):
        if array.ndim != x.ndim + 1:
            problems.append(f"{name}: expected {x.ndim + 1} axes (x's leading ones, P, C), found {array.ndim}")
            continue
        for axis, (own, full) in enumerate(zip(array.shape[:-1], (*x.shape[:-1], projections), strict=True)):
            if own not in (1, full):
                problems.append(f"{name}' axis {axis}: expected {full} or 1, found {own}")
    for name, array in (("a", bank.a), ("b", bank.b)):
        expect(f"{name}'s dtype", x.dtype.name, array.dtype.name)
    if x.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        problems.append(f"x's dtype: expected float32, bfloat16 or float16, found {x.dtype.name}")
    if not jnp.issubdtype(indices.dtype, jnp.integer):
        problems.append(f"indices' dtype: expected an integer, found {indices.dtype.name}")
    if problems:
        raise ValueError("routed_lora: " + "; ".join(problems))


def _forward(x, a, b, indices, weights, base, how: tuple[tuple[int, ...], str]) -> jax.Array:
    splits, name = how
    if name == "gathered":
        return xla.gathered_lora(x, a, b, indices, weights, base, splits)
    indices = jnp.broadcast_to(indices, weights.shape)
    if name == "grouped":
        return xla.grouped_lora(x, a, b, indices, weights, base, splits)
    if name.startswith("tpu_"):
        from pallas_kernels.routed_lora import pallas_tpu

        return pallas_tpu.IMPLEMENTATIONS[name](x, a, b, indices, weights, base, splits)
    raise NotImplementedError(f"routed_lora has no implementation {name!r}")


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _routed(x, a, b, indices, weights, base, how: tuple[tuple[int, ...], str]) -> jax.Array:
    """x, base [G, S, ..], indices [G, P1, C], weights [G, P, C], which include the scale and are 0 for NO_ADAPTER; how:
    splits and implementation."""
    return _forward(x, a, b, indices, weights, base, how)


def _routed_forward(x, a, b, indices, weights, base, how):
    return _forward(x, a, b, indices, weights, base, how), (x, a, b, indices, weights)


def _routed_backward(how, kept, dy):
    x, a, b, indices, weights = kept
    gradients = dense_gradients if a.shape[1] * a.shape[2] <= DENSE_GRADIENTS_WIDTH else grouped_gradients
    indices = jnp.broadcast_to(indices, weights.shape)
    dx, da, db, dweights = gradients(x, a, b, indices, weights, dy, how[0])
    return dx, da, db, None, dweights, dy


_routed.defvjp(_routed_forward, _routed_backward)
