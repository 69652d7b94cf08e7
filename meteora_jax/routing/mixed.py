"""Several kinds of router in one batch."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from meteora_jax.routing import NO_ADAPTER, NOTHING, BoundRouter, GateLogits, Routing, Score


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mixed:
    """Several kinds of router in one batch: each prompt takes the routing of its own kind.

    which: int32 [B], index into `routers`. Every kind routes the whole batch, with NO_ADAPTER in rows
    that are not its own, so a batch costs as many gate evaluations as it has kinds, never prompts.
    """

    which: Any
    routers: tuple[BoundRouter, ...]

    @property
    def gating(self) -> None:
        """Rows choose by different rules."""

    @property
    def asks(self) -> frozenset[Score]:
        """What any of them asks for."""
        return NOTHING.union(*(router.asks for router in self.routers))

    def known(self, positions: jax.Array | None) -> Routing | None:
        """Of all kinds, if each knows its own."""
        found = [router.known(positions) for router in self.routers]
        routings = [routing for routing in found if routing is not None]
        return self._joint(routings) if len(routings) == len(found) else None

    def after_gates(self, x: jax.Array, gates: GateLogits) -> Mixed:
        """Each after the token router."""
        return Mixed(self.which, tuple(r.after_gates(x, gates) for r in self.routers))

    def route(self, x: jax.Array, gates: GateLogits) -> Routing:
        """Each row by its own kind of router."""
        return self._joint([r.route(x, gates) for r in self.routers])

    def _joint(self, routings: list[Routing]) -> Routing:
        shape = jnp.broadcast_shapes(*(r.indices.shape[:-1] for r in routings))
        width = max(r.indices.shape[-1] for r in routings)
        indices = jnp.full((*shape, width), NO_ADAPTER, jnp.int32)
        weights = jnp.zeros((*shape, width), jnp.float32)
        for kind, routing in enumerate(routings):
            own = (self.which == kind)[:, None, None, None]
            pad = [(0, 0)] * len(shape) + [(0, width - routing.indices.shape[-1])]
            padded = jnp.pad(routing.indices, pad, constant_values=NO_ADAPTER)
            indices = jnp.where(own, padded, indices)
            weights = jnp.where(own, jnp.pad(routing.weights, pad), weights)
        logits = next((r.logits for r in routings if r.logits is not None), None)
        fused = None
        for kind, routing in enumerate(routings):
            if routing.fused is not None:
                own = (self.which == kind) & routing.fused
                fused = own if fused is None else fused | own
        runs = None
        for kind, routing in enumerate(routings):
            if routing.runs is not None:
                runs = jnp.where(self.which == kind, routing.runs, 1 if runs is None else runs)
        return Routing(indices, weights, logits, fused, runs)
