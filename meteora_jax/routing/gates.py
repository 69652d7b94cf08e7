"""Token-level routing by trained gates (MeteoRA, arXiv 2405.13053, section 3), or by the token router's logits."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from meteora_jax.arguments import Arguments
from meteora_jax.config import InputError
from meteora_jax.routing import NO_ADAPTER, Routing
from pallas_kernels.routed_lora.reference import KEPT, einsum_float32


class GateParam(nnx.Param):
    """A weight of the gates, or of the token router."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ProjectionGates:
    """The gates of a group's projections: weight float32 [I, P, A]."""

    weight: Any

    def logits(self, x: jax.Array) -> jax.Array:
        """x @ Wg, float32 [B, T, P, A], of the group's input x [B, T, I]."""
        return checkpoint_name(einsum_float32(x.dtype, "bti,ipa->btpa", x, self.weight.astype(x.dtype)), KEPT)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenLogits:
    """Logits float32 [B, T, 1, A] that are there already, the same for all layers and projections."""

    values: Any

    def logits(self, x: jax.Array) -> jax.Array:
        """These, whatever x is."""
        return self.values


def top_k(logits: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """The k largest of the last axis, largest first; ties go to the lowest index.

    k rounds of max: with a handful of choices among tens of adapters this beats a sort, and unlike
    `lax.top_k` it stays elementwise enough for XLA to fuse with its neighbours.

    Args: logits float32 [.., A]. Returns: values [.., k] and indices int32 [.., k].
    """
    columns = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    values, indices, rest = [], [], logits
    for _ in range(k):
        index = jnp.argmax(rest, axis=-1).astype(jnp.int32)
        values.append(jnp.max(rest, axis=-1))
        indices.append(index)
        rest = jnp.where(columns == index[..., None], -jnp.inf, rest)
    return jnp.stack(values, -1), jnp.stack(indices, -1)


def check_choice(given: Arguments, top_k: Any, temperature: Any) -> None:
    """How many adapters gates may choose, and how sharply."""
    given.whole("top_k", top_k)
    given.number("temperature", temperature, "a positive number", lambda t: t > 0)


@dataclasses.dataclass(frozen=True)
class Gates:
    """Every projection's own gate picks its `top_k` adapters for every token.

    g = x @ Wg; s, idx = top_k(g, C); w = softmax(s / temperature); w = 1 when C = 1.
    `within`: only these adapters may be chosen (their gates alone enter the top-k); None: all.
    """

    top_k: int = 2
    temperature: float = 1.0
    within: tuple[str, ...] | None = None
    needs_gates = True

    def __post_init__(self):
        with Arguments("Gates") as given:
            check_choice(given, self.top_k, self.temperature)
            if self.within is not None:
                given.texts("within", self.within)
        if self.within is not None and len(set(self.within)) < self.top_k:
            raise InputError(f"Gates: within: expected at least {self.top_k} adapters (top_k), found {self.within}")

    def bind(self, routers: Sequence[Gates | None], names: tuple[str, ...]) -> BoundGates:
        counts = [r.top_k if r is not None else 0 for r in routers]
        if max(counts) > len(names):
            raise InputError(f"Gates: top_k: expected at most {len(names)} (the bank's adapters), found {max(counts)}")
        temperatures = [r.temperature if r is not None else 1.0 for r in routers]
        named = [r.within if r is not None and r.within is not None else names for r in routers]
        if unknown := sorted({n for row in named for n in row} - set(names)):
            raise InputError([f"Gates: within: expected one of {', '.join(names)}, found {n!r}" for n in unknown])
        allowed = None
        if any(row is not names for row in named):
            allowed = jnp.asarray([[n in row for n in names] for row in map(set, named)])
        return BoundGates(
            jnp.asarray(counts, jnp.int32), jnp.asarray(temperatures, jnp.float32), allowed, max_k=max(counts)
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BoundGates:
    """Gates for a batch: each prompt its own C (0: not routed by gates) and temperature, both [B].

    allowed: bool [B, A], the adapters that each prompt may choose; None: all.
    """

    counts: Any
    temperatures: Any
    allowed: Any
    max_k: int = dataclasses.field(metadata={"static": True})

    def route(self, x: jax.Array, gate: ProjectionGates | TokenLogits) -> Routing:
        """x [B, T, I] -> Routing [B, T, P, max_k], with its logits."""
        eligible = logits = gate.logits(x)
        if self.allowed is not None:
            eligible = jnp.where(self.allowed[:, None, None, :], logits, -jnp.inf)
        values, indices = top_k(eligible, self.max_k)
        taken = jnp.arange(self.max_k)[None, :] < self.counts[:, None]  # [B, C]
        taken = taken[:, None, None, :]
        values = jnp.where(taken, values / self.temperatures[:, None, None, None], -jnp.inf)
        # a prompt with C = 0 has no finite value; its weights are zero, not the softmax's NaN
        weights = jnp.where(taken, jax.nn.softmax(jnp.where(taken, values, -1e30), axis=-1), 0.0)
        return Routing(jnp.where(taken, indices, NO_ADAPTER), weights, logits)
