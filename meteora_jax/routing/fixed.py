"""Request-level routing that the caller names: one adapter, or a weighted mixture of some."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from meteora_jax.config import InputError
from meteora_jax.routing import NO_ADAPTER, Routing


@dataclasses.dataclass(frozen=True)
class Fixed:
    """The same adapters for every token and projection: `Fixed("a")` or `Fixed({"a": 0.5, "b": 0.5})`."""

    adapters: str | Mapping[str, float]
    needs_gates = False

    def weights(self) -> dict[str, float]:
        """{adapter name: weight}."""
        return {self.adapters: 1.0} if isinstance(self.adapters, str) else dict(self.adapters)

    def bind(self, routers: Sequence[Fixed | None], names: tuple[str, ...]) -> BoundRequests:
        rows = [r.weights() if r is not None else {} for r in routers]
        problems = []
        for name, weight in sorted({item for row in rows for item in row.items()}):
            if name not in names:
                problems.append(f"Fixed: adapter: expected one of {', '.join(names)}, found {name!r}")
            if not math.isfinite(weight):
                problems.append(f"Fixed: {name}: expected a finite weight, found {weight}")
        if problems:
            raise InputError(problems)
        width = max(1, *(len(row) for row in rows))
        indices = np.full((len(rows), width), NO_ADAPTER, np.int32)
        weights = np.zeros((len(rows), width), np.float32)
        for b, row in enumerate(rows):
            for c, (name, weight) in enumerate(row.items()):
                indices[b, c], weights[b, c] = names.index(name), weight
        return BoundRequests(jnp.asarray(indices), jnp.asarray(weights))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BoundRequests:
    """One routing a request, known beforehand: indices int32 [B, C], weights float32 [B, C], fused bool [B] or None."""

    indices: Any
    weights: Any
    fused: Any = None
    per_request = True

    def route(self, x: jax.Array, gate: Any) -> Routing:
        """Routing [B, 1, 1, C], which broadcasts over tokens and projections; x and gate are not read."""
        del x, gate
        return Routing(self.indices[:, None, None, :], self.weights[:, None, None, :], fused=self.fused)
