"""Token-level routing by trained gates (MeteoRA, arXiv 2405.13053, section 3), or by the token router's logits."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from meteora_jax.arguments import Arguments
from meteora_jax.config import InputError
from meteora_jax.routing import NO_ADAPTER, GateLogits, Routing, Score
from pallas_kernels.routed_lora.reference import KEPT, einsum_float32
from pallas_kernels.topk_gating import TopK, topk_gating

GATES: frozenset[Score] = frozenset({"gates"})


class GateParam(nnx.Param):
    """A weight of the gates, or of the token router."""


class LogitsAlone:
    """Who knows no score but the gates' logits."""

    def score(self, score: Score) -> jax.Array:
        """None."""
        raise NotImplementedError(f"{type(self).__name__}: no score {score!r}")

    def choose(
        self, score: Score, rule: TopK, allowed: jax.Array | None = None, candidates: jax.Array | None = None
    ) -> Routing:
        """Nobody."""
        raise NotImplementedError(f"{type(self).__name__}: no score {score!r}")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ProjectionGates(LogitsAlone):
    """The gates of a group's projections: weight float32 [I, P, A]; a null choice is a column more."""

    weight: Any

    def logits(self, x: jax.Array) -> jax.Array:
        """x @ Wg, float32 [B, T, P, A], of the group's input x [B, T, I]."""
        return checkpoint_name(einsum_float32(x.dtype, "bti,ipa->btpa", x, self.weight.astype(x.dtype)), KEPT)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KnownLogits(LogitsAlone):
    """Logits float32 [B, T, P or 1, A] that were computed before."""

    values: Any

    def logits(self, x: jax.Array) -> jax.Array:
        """These, whatever x is."""
        return self.values


def check_choice(given: Arguments, top_k: Any, temperature: Any) -> None:
    """How many adapters gates may choose, and how sharply."""
    given.whole("top_k", top_k)
    given.number("temperature", temperature, "a positive number", lambda t: t > 0)


@runtime_checkable
class Choosing(Protocol):
    """A router that chooses its `top_k` by a softmax, of the adapters `within`; None: of all."""

    @property
    def top_k(self) -> int: ...
    @property
    def temperature(self) -> float: ...
    @property
    def within(self) -> tuple[str, ...] | None: ...


def check_choosing(given: Arguments, router: Choosing) -> None:
    """What a caller has chosen by."""
    check_choice(given, router.top_k, router.temperature)
    if router.within is None:
        return
    given.texts("within", router.within)
    listed = isinstance(router.within, list | tuple | set | frozenset)
    if isinstance(router.top_k, int) and listed and len(set(router.within)) < router.top_k:
        given.refuse("within", f"at least {router.top_k} adapters (top_k)", router.within)


def bound_choice(routers: Sequence[Choosing | None], names: tuple[str, ...]) -> tuple[TopK, Any]:
    """The rule of a batch whose rows are routed by these, None by none of them; and bool [B, A], the adapters that each
    row may choose, None where all may choose all.

    Raises:
        InputError: more adapters than there are, or unknown ones.
    """
    kind = next(type(r).__name__ for r in routers if r is not None)
    counts = [r.top_k if r is not None else 0 for r in routers]
    if max(counts) > len(names):
        raise InputError(f"{kind}: top_k: expected at most {len(names)} (the bank's adapters), found {max(counts)}")
    temperatures = [r.temperature if r is not None else 1.0 for r in routers]
    named = [r.within if r is not None and r.within is not None else names for r in routers]
    if unknown := sorted({n for row in named for n in row} - set(names)):
        raise InputError([f"{kind}: within: expected one of {', '.join(names)}, found {n!r}" for n in unknown])
    allowed = None
    if any(row is not names for row in named):
        allowed = np.asarray([[n in row for n in names] for row in map(set, named)])
    return TopK(np.asarray(counts, np.int32), np.asarray(temperatures, np.float32), max(counts)), allowed


@dataclasses.dataclass(frozen=True)
class Gates:
    """Every projection's own gate picks its `top_k` adapters for every token.

    g = x @ Wg; s, idx = top_k(g, C); w = softmax(s / temperature); w = 1 when C = 1.
    Gates trained with a null choice have a column for no adapter, which counts as one of the C: what it weighs of a
    token is the base's alone.
    `within`: only these adapters may be chosen (their gates, and any null choice's, enter the top-k); None: all.

    Raises:
        InputError: top_k below 1 or above the adapters', a temperature that is not positive; by a model without gates.

    Examples:
        >>> model.generate(["Name a fruit."], mj.Gates(top_k=1), max_new_tokens=4)
    """

    top_k: int = 2
    temperature: float = 1.0
    within: tuple[str, ...] | None = None
    needs_gates = True

    def __post_init__(self):
        with Arguments("Gates") as given:
            check_choosing(given, self)

    def named(self) -> tuple[str, ...] | int:
        """Those that may be chosen; its top_k of any where it names none."""
        return self.top_k if self.within is None else tuple(dict.fromkeys(self.within))

    def bind(self, routers: Sequence[Gates | None], names: tuple[str, ...]) -> BoundGates:
        rule, allowed = bound_choice(routers, names)
        return BoundGates(rule, len(names), allowed)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BoundGates:
    """Gates for a batch.

    rule: each prompt its own C (0: not routed by gates) and temperature. adapters: A; logits of more columns have a
    null choice. allowed: bool [B, A], the adapters that each prompt may choose; None: all. columns: int32 [B, ..], of
    each adapter (and of the null choice, behind them) its column in logits that have more; None: they are alike.
    parts: int32 [B, A, n], where the ranks of each that may be chosen lie, NO_ADAPTER behind them; None: all in itself.
    """

    rule: TopK
    adapters: int = dataclasses.field(metadata={"static": True})
    allowed: Any = None
    columns: Any = None
    parts: Any = None

    def moved(self, where: np.ndarray, count: int, columns: np.ndarray | None) -> BoundGates:
        """See `Movable`; a slot that is not the first in a row of `where` is never chosen, but all of that row act."""
        rows = len(self.rule.counts)
        allowed = np.zeros((rows, count), bool)
        allowed[:, where[:, 0]] = True if self.allowed is None else np.asarray(self.allowed)
        if columns is not None:
            columns = np.broadcast_to(columns, (rows, len(columns)))
        parts = None
        if where.shape[1] > 1:
            parts = np.full((rows, count, where.shape[1]), NO_ADAPTER, np.int32)
            parts[:, where[:, 0]] = where
        return dataclasses.replace(self, adapters=count, allowed=allowed, columns=columns, parts=parts)

    @property
    def gating(self) -> TopK | None:
        """Its rule, where every adapter may be chosen."""
        return self.rule if self.allowed is None else None

    @property
    def asks(self) -> frozenset[Score]:
        """The gates' logits."""
        return GATES

    def after_gates(self, x: jax.Array, gates: GateLogits) -> Routing:
        """The token router's choice, without a projection's axis."""
        routing, lead = self.route(x, gates), x.shape[:2]
        indices, weights = (jnp.broadcast_to(z, (*lead, *z.shape[2:])) for z in (routing.indices, routing.weights))
        return Routing(indices, weights, routing.logits)

    def known(self, positions: jax.Array | None) -> None:
        """Nothing: every token is chosen for."""

    def route(self, x: jax.Array, gates: GateLogits) -> Routing:
        """x [B, T, I] -> Routing [B, T, P, C], with its logits."""
        logits = gates.logits(x)
        if self.columns is not None:
            logits = jnp.take_along_axis(logits, self.columns[:, None, None], axis=-1)
        indices, weights = topk_gating(logits, self.rule, self.allowed, self.adapters)
        return Routing(*in_parts(indices, weights, self.parts), logits)


def in_parts(indices: jax.Array, weights: jax.Array, parts: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Choices int32 and float32 [B, T, P, C] of adapters whose ranks lie in several places, as choices of all these
    [B, T, P, C n]. parts: int32 [B, A, n]; None: each is whole. A null choice keeps its weight, once."""
    if parts is None:
        return indices, weights
    chosen = jax.vmap(lambda own, at: own[at])(parts, jnp.maximum(indices, 0))
    none = (indices == NO_ADAPTER)[..., None]
    chosen = jnp.where(none, NO_ADAPTER, chosen)
    first = jax.lax.broadcasted_iota(jnp.int32, chosen.shape, chosen.ndim - 1) == 0
    shares = jnp.where((chosen != NO_ADAPTER) | (none & first), weights[..., None], 0.0)
    shape = *indices.shape[:-1], -1
    return chosen.reshape(shape), jnp.reshape(shares, shape)
