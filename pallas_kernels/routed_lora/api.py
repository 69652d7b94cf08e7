"""The routed LoRA product of a projection group: checks its input, picks an implementation, differentiates it.

    y_p = base_p + sum_c weight_c * scale[p, a_c] * (x A[p, a_c]^T) B[a_c, :, columns of p]

A routing names, for every token and projection, C adapters a_c and their weights. `reference.py` says what that
means; every other implementation computes the same and differs in what it reads.
"""

from __future__ import annotations

import functools
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.routed_lora import reference
from pallas_kernels.routed_lora.gathered import gathered_lora
from pallas_kernels.routed_lora.gradients import dense_gradients, grouped_gradients
from pallas_kernels.routed_lora.grouped import grouped_lora

NO_ADAPTER = -1

Implementation = Literal[
    "reference",  # XLA; every adapter for every token, masked
    "gathered",  # XLA; the chosen adapters of every token or request are read
    "grouped",  # XLA; tokens sorted by adapter
    "tpu_gathered",  # TPU; the chosen adapters, few tokens or requests
    "tpu_dense",  # TPU; every adapter, masked
]


class Shape(NamedTuple):
    """What the choice of an implementation depends on."""

    groups: int  # G: routings
    tokens: int  # S: tokens that share each of them, 1 if every token has its own
    adapters: int  # A
    rank: int  # R
    choices: int  # C


class Rule(NamedTuple):
    """`implementation` serves shapes within all of its limits."""

    implementation: Implementation
    max_rows: float = math.inf  # G * S
    max_width: float = math.inf  # A * R
    min_tokens: int = 1  # S


# The first rule that fits decides. Measured with `scripts/bench.py --what kernel`; the TPU kernels enter here when they
# have been timed on their hardware, and not before.
ACCELERATOR = (
    Rule("gathered", min_tokens=2),  # one routing a request
    Rule(
        "gathered", max_rows=32
    ),  # H200, 28 adapters of rank 8, a decoding step: 7.8 to 10.0 ms; reference 8.6 to 12.9
    Rule("reference", max_width=512),
    Rule("grouped"),
)
RULES: dict[str, tuple[Rule, ...]] = {"cpu": (Rule("reference"),), "gpu": ACCELERATOR, "tpu": ACCELERATOR}

# The backward pass has two forms; A * R up to which it multiplies with every adapter.
DENSE_GRADIENTS_WIDTH = 512


def choose(platform: str, shape: Shape) -> Implementation:
    """The implementation for a shape on "cpu", "gpu" or "tpu"."""
    if shape.adapters <= shape.choices:  # every adapter is chosen: nothing to leave out
        return "reference"
    rows, width = shape.groups * shape.tokens, shape.adapters * shape.rank
    return next(
        rule.implementation
        for rule in RULES[platform]
        if rows <= rule.max_rows and width <= rule.max_width and shape.tokens >= rule.min_tokens
    )


def add_routed_lora(
    x: Float[Array, "*L I"],
    a: Float[Array, "P A R I"],
    b: Float[Array, "A R O"],
    indices: Int32[Array, "*K P1 C"],
    weights: Float[Array, "*K P1 C"],
    scale: Float[Array, "P A"],
    base: Float[Array, "*L O"],
    splits: tuple[int, ...],
    *,
    implementation: Implementation | None = None,
) -> Float[Array, "*L O"]:
    """base + the update of a projection group; differentiable in x, a, b, weights, scale and base.

    Args:
        x: the group's input; float32, bfloat16 or float16, as are a and b.
        a: A of every adapter as rows (PEFT's lora_A), zero-padded to a common rank R.
        b: B of every adapter; the columns of the P projections side by side.
        indices: the chosen adapters; NO_ADAPTER, or any index outside 0..A-1, adds nothing. An adapter named
            twice counts twice. K is L, or has 1 where tokens share a routing (one a request: [B, 1, P, C]);
            P1 is P, or 1 where the projections share one.
        weights: float32, of each choice.
        scale: float32, of each adapter at each projection.
        base: what the update is added to: the product of x and the base kernel. Sums are float32, rounded
            once to base's dtype; the weighted shrink is rounded to x's dtype before it meets b.
        splits: the width of each projection in O.
        implementation: None lets the table decide. One device; under a mesh, call inside `jax.shard_map`
            (the XLA implementations may also be left to the partitioner).

    Raises:
        ValueError: shapes or dtypes that do not fit together, all of them at once.
        NotImplementedError: an `implementation` that does not serve this shape, dtype or platform.
    """
    _check(x, a, b, indices, weights, scale, base, splits)
    shape, x_flat, base_flat, named, given = _flatten(x, a, indices, weights, base)
    name = implementation or choose(jax.default_backend(), shape)
    if name == "reference":
        return _reference(x, a, b, indices, weights, scale, base, splits)
    real = (named >= 0) & (named < shape.adapters)
    own = jnp.arange(len(splits), dtype=jnp.int32)[None, :, None]
    chosen = jnp.where(real, named, NO_ADAPTER)
    scaled = jnp.where(real, given * scale[own, jnp.maximum(chosen, 0)], 0.0)
    y: Any = _routed(x_flat, a, b, chosen, scaled, base_flat, splits, name)
    return y.reshape(base.shape)


def _reference(x, a, b, indices, weights, scale, base, splits) -> jax.Array:
    """The specification on x's own axes: [.., T, I], the leading ones flattened to B."""
    *lead, tokens, width = x.shape
    indices, weights = (jnp.broadcast_to(r, (*lead, *r.shape[-3:])) for r in (indices, weights))
    routing = (math.prod(lead), *indices.shape[-3:])
    combine = reference.dense_weights(indices.reshape(routing), weights.reshape(routing), a.shape[1])
    update = reference.routed_lora(x.reshape(-1, tokens, width), a, b, combine * scale[None, None], splits)
    return (base.astype(jnp.float32) + update.reshape(base.shape)).astype(base.dtype)


def _check(x, a, b, indices, weights, scale, base, splits) -> None:
    """Everything that jaxtyping's annotations say, and what they cannot, without it."""
    problems = []

    def expect(what: str, expected: Any, found: Any) -> None:
        if expected != found:
            problems.append(f"{what}: expected {expected}, found {found}")

    projections, adapters, rank, width = a.shape
    total = sum(splits)
    expect("number of splits", projections, len(splits))
    expect("x's last axis", width, x.shape[-1])
    expect("b's shape", (adapters, rank, total), b.shape)
    expect("scale's shape", (projections, adapters), scale.shape)
    expect("base's shape", (*x.shape[:-1], total), base.shape)
    expect("weights' shape", indices.shape, weights.shape)
    if indices.ndim != x.ndim + 1:
        problems.append(f"indices: expected {x.ndim + 1} axes (x's leading ones, P, C), found {indices.ndim}")
    else:
        for axis, (own, full) in enumerate(zip(indices.shape[:-1], (*x.shape[:-1], projections), strict=True)):
            if own not in (1, full):
                problems.append(f"indices' axis {axis}: expected {full} or 1, found {own}")
    for name, array in (("a", a), ("b", b)):
        expect(f"{name}'s dtype", x.dtype.name, array.dtype.name)
    if x.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        problems.append(f"x's dtype: expected float32, bfloat16 or float16, found {x.dtype.name}")
    if not jnp.issubdtype(indices.dtype, jnp.integer):
        problems.append(f"indices' dtype: expected an integer, found {indices.dtype.name}")
    if problems:
        raise ValueError("add_routed_lora: " + "; ".join(problems))


def _flatten(x, a, indices, weights, base) -> tuple[Shape, jax.Array, jax.Array, jax.Array, jax.Array]:
    """x and base as [G, S, ..], the routing as [G, P, C]: S tokens share each of G routings."""
    projections, adapters, rank, _ = a.shape
    lead, own = x.shape[:-1], indices.shape[:-2]
    shared = len(own)
    while shared > 0 and own[shared - 1] == 1:
        shared -= 1
    if own[:shared] != lead[:shared]:  # an axis that shares before one that does not: no token shares then
        own = lead
        shared = len(own)
    groups, choices = math.prod(own), indices.shape[-1]
    tokens = math.prod(lead[shared:])
    spread = lambda r: jnp.broadcast_to(r, (*own, projections, choices)).reshape(groups, projections, choices)  # noqa: E731
    shape = Shape(groups, tokens, adapters, rank, choices)
    flat = lambda y: y.reshape(groups, tokens, y.shape[-1])  # noqa: E731
    return shape, flat(x), flat(base), spread(indices), spread(weights)


def _forward(x, a, b, indices, weights, base, splits: tuple[int, ...], name: str) -> jax.Array:
    if name == "gathered":
        implementation = gathered_lora
    elif name == "grouped":
        implementation = grouped_lora
    elif name.startswith("tpu_"):
        from pallas_kernels.routed_lora import pallas_tpu

        implementation = pallas_tpu.IMPLEMENTATIONS[name]
    else:
        raise NotImplementedError(f"add_routed_lora has no implementation {name!r}")
    return implementation(x, a, b, indices, weights, base, splits)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def _routed(x, a, b, indices, weights, base, splits: tuple[int, ...], name: str) -> jax.Array:
    """The implementations on flat arrays; the weights include the scale and are 0 for NO_ADAPTER."""
    return _forward(x, a, b, indices, weights, base, splits, name)


def _routed_forward(x, a, b, indices, weights, base, splits, name):
    return _forward(x, a, b, indices, weights, base, splits, name), (x, a, b, indices, weights)


def _routed_backward(splits, name, kept, dy):
    x, a, b, indices, weights = kept
    dense = a.shape[1] * a.shape[2] <= DENSE_GRADIENTS_WIDTH
    dx, da, db, dweights = (dense_gradients if dense else grouped_gradients)(x, a, b, indices, weights, dy, splits)
    return dx, da, db, None, dweights, dy


_routed.defvjp(_routed_forward, _routed_backward)
