"""Gates of other forms than MeteoRA's: what a token's logits take beside its own input at its own layer.

    z[l, t] = x[l, t] Wg[l] + b[l]                                      one Wg for a group's projections if shared; none
                                                                        if the stream alone is read
              + 1/(t+1) sum_{s <= t} x[l, s] Wm[l]                      prefix-mean, over the token's own sequence
              + z[l-1, t]                                               carry, the same projection one layer before
              + rms(u[l, t]) Wu[l]                                      stream

The stream u [E] is a second, narrow residual stream that only gates read, with one attention head a layer:

    c = [x[l], rms(u[l-1])]                 x: what q k v read; E inputs more of the stream itself
    u[l] = u[l-1] + x[l] Ws + softmax(rot(c Wq) rot(c Wk)' / sqrt(E)) c Wv        causal, over the token's own sequence

so a gate can look up what stands elsewhere, such as which task an answer's number belongs to, which a frozen base need
not bring to the token that asks. It is a ladder side network (Sung et al., arXiv 2206.06522) as wide as one head.

The mean is taken of the products x Wm, which is the product of the mean: so what decoding carries along is a sum of A
numbers a projection, not of I.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from meteora_jax.config import GROUPS
from meteora_jax.gate_config import GateForm
from meteora_jax.routing import BoundRouter, Routing
from pallas_kernels.routed_lora.reference import KEPT, einsum_float32

STARTS = {g: sum(len(GROUPS[h]) for h in list(GROUPS)[:i]) for i, g in enumerate(GROUPS)}  # of the projections of each


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FormedGate:
    """A group's gate in another form: weight and mean float32 [I, P, A] (P = 1: shared), bias float32 [P or 1, A]; what
    the form has not is None, the weight of gates that read the stream alone, too. more: float32 [B, T, P, A], added to
    the logits."""

    weight: Any
    mean: Any
    bias: Any
    group: str = dataclasses.field(metadata={"static": True})
    more: Any = None

    def product(self, x: jax.Array, weight: jax.Array) -> jax.Array:
        """x [B, T, I] times a weight, float32 [B, T, P, A] for all projections of the group."""
        z = checkpoint_name(einsum_float32(x.dtype, "bti,ipa->btpa", x, weight.astype(x.dtype)), KEPT)
        return jnp.broadcast_to(z, (*z.shape[:2], len(GROUPS[self.group]), z.shape[3]))

    def logits(self, x: jax.Array) -> jax.Array:
        """float32 [B, T, P, A] of x [B, T, I]."""
        if self.weight is None:
            shape = (*x.shape[:2], len(GROUPS[self.group]), self.more.shape[-1])
            z = jnp.zeros(shape, jnp.float32)
        else:
            z = self.product(x, self.weight)
        if self.bias is not None:
            z = z + self.bias[None, None]
        return z if self.more is None else z + self.more


def prefix_sums(values: jax.Array, positions: jax.Array, before: jax.Array) -> jax.Array:
    """Sums float32 [B, T, ..] of each token's sequence up to it; a token at position 0 starts a sequence.

    Args: values float32 [B, T, ..], positions int32 [B, T] (negative for padding, which counts for nothing), before
    float32 [B, ..], the sum that the first tokens' sequences bring along.
    """
    wide = lambda x: x.reshape(*x.shape, *(1,) * (values.ndim - x.ndim))  # noqa: E731
    starts = wide(positions == 0)
    values = jnp.where(wide(positions < 0), 0.0, values)
    values = values.at[:, 0].add(jnp.where(starts[:, 0], 0.0, before))
    if values.shape[1] == 1:
        return values

    def add(left: tuple[jax.Array, jax.Array], right: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        return jnp.where(right[1], right[0], left[0] + right[0]), left[1] | right[1]

    # a tree of sums, each of one sequence's own tokens: nothing of a neighbour in the row is added and taken off again
    return jax.lax.associative_scan(add, (values, starts), axis=1)[0]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ChosenAhead:
    """What a router made of the logits of gates ahead of the layers, once for all layers and projections.

    indices int32 and weights float32 [B, T, 1, C], logits float32 [B, T, 1, A], fused bool [B] or None: `Routing`'s.
    """

    indices: Any
    weights: Any
    logits: Any
    fused: Any = None

    @classmethod
    def by(cls, router: BoundRouter, x: jax.Array, logits: jax.Array) -> ChosenAhead:
        """x: embeddings [B, T, D]. logits: float32 [B, T, A], from them."""
        routing = router.route(x, FormedGate(None, None, None, "o", more=logits[:, :, None]))
        indices, weights = (
            jnp.broadcast_to(z, (*logits.shape[:2], *z.shape[2:])) for z in (routing.indices, routing.weights)
        )
        return cls(indices, weights, routing.logits, routing.fused)

    def route(self, x: jax.Array, gate: FormedGate | None) -> Routing:
        """The same for every group's x: [B, T, P, C] for the P projections of the gate's group; P = 1 without one."""
        count = 1 if gate is None else len(GROUPS[gate.group])
        wide = lambda z: z if z is None else jnp.broadcast_to(z, (*z.shape[:2], count, z.shape[3]))  # noqa: E731
        return Routing(wide(self.indices), wide(self.weights), wide(self.logits), self.fused)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GateMemory:
    """What passes from layer to layer, and from call to call, beside the residual stream.

    positions: int32 [B, T]. carried: float32 [B, T, 7, A], the logits of the layer before, all projections side by
    side; None if nothing is carried. sums: float32 [L, B, 7, A], of the products with the means' weights over each
    sequence so far; None if no mean is read; the cache keeps them between calls, as it keeps the stream's keys and
    values. stream: float32 [B, T, E], u behind the layer at hand; None without one.
    """

    positions: Any
    carried: Any
    sums: Any
    stream: Any = None
    seen: Any = None  # float32 [B, T, 7, A], what the stream gives the logits of the layer at hand

    @classmethod
    def create(
        cls,
        form: GateForm,
        router: BoundRouter | None,
        positions: jax.Array,
        layers: int,
        adapters: int,
        sums: Any,
    ) -> GateMemory | None:
        """At the first layer of a call; sums: of an earlier call, None at the start. None where nothing is remembered:
        gates of MeteoRA's form or ahead of the layers, and routers that no gate takes part in."""
        if not form.remembers or form.is_ahead or router is None or getattr(router, "per_request", False):
            return None
        batch, length = positions.shape
        count = sum(map(len, GROUPS.values()))
        carried = jnp.zeros((batch, length, count, adapters), jnp.float32) if form.carry else None
        if form.input == "prefix-mean" and sums is None:
            sums = jnp.zeros((layers, batch, count, adapters), jnp.float32)
        stream = jnp.zeros((batch, length, form.stream), jnp.float32) if form.stream else None
        return cls(positions, carried, sums, stream)

    def at(self, layer: jax.Array, router: BoundRouter) -> Remembering:
        """The router for one layer."""
        sums = None if self.sums is None else jax.lax.dynamic_index_in_dim(self.sums, layer, keepdims=False)
        more = [z for z in (self.carried, self.seen) if z is not None]
        return Remembering(router, self.positions, functools.reduce(jnp.add, more) if more else None, sums)

    def after(self, layer: jax.Array, routings: tuple[Routing, ...]) -> GateMemory:
        """Once a layer has routed all its groups."""
        carried, sums = self.carried, self.sums
        if carried is not None:
            carried = jnp.concatenate([r.logits for r in routings], axis=2)
        if sums is not None:
            own = jnp.concatenate([r.sums for r in routings], axis=1)
            sums = jax.lax.dynamic_update_index_in_dim(sums, own, layer, 0)
        return dataclasses.replace(self, carried=carried, sums=sums, seen=None)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Remembering:
    """A router with what one layer's gates remember: more [B, T, 7, A] is added to the logits, sums [B, 7, A] are
    `GateMemory`'s."""

    router: Any
    positions: Any
    more: Any
    sums: Any

    def route(self, x: jax.Array, gate: FormedGate) -> Routing:
        """As the router's own; the Routing also has the sums behind the last token, float32 [B, P, A]."""
        start, stop = STARTS[gate.group], STARTS[gate.group] + len(GROUPS[gate.group])
        more, last = None, None
        if self.more is not None:
            more = self.more[:, :, start:stop]
        if self.sums is not None:
            sums = prefix_sums(gate.product(x, gate.mean), self.positions, self.sums[:, start:stop])
            last = sums[:, -1]
            count = jnp.maximum(self.positions + 1, 1).astype(jnp.float32)
            mean = sums / count[:, :, None, None]
            more = mean if more is None else more + mean
        routing = self.router.route(x, dataclasses.replace(gate, more=more))
        return dataclasses.replace(routing, sums=last)


def served_gates(router: BoundRouter | None, group: str) -> tuple[BoundRouter | None, jax.Array | None]:
    """The router beneath what is remembered, and what that adds to a group's logits, float32 [B, T, P, A] or None.
    For `GateForm.is_served`: nothing else is remembered."""
    if not isinstance(router, Remembering):
        return router, None
    assert router.sums is None
    start = STARTS[group]
    return router.router, router.more[:, :, start : start + len(GROUPS[group])]
