"""Request-level routing that the caller names: one adapter, or a weighted mixture of some."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from meteora_jax.arguments import Arguments
from meteora_jax.config import InputError
from meteora_jax.routing import NO_ADAPTER, Routing

LARGEST = float(np.finfo(np.float32).max)


@dataclasses.dataclass(frozen=True)
class Fixed:
    """The same adapters for every token and projection: `Fixed("a")` or `Fixed({"a": 0.5, "b": 0.5})`.

    adapters: a name, or {name: weight}; weights multiply the adapters' outputs and need not sum to one.

    Raises:
        InputError: no names, weights that are not finite; by the model, names that the bank has not.

    Examples:
        >>> model.generate(["Name a fruit."], mj.Fixed({"winowhy": 0.5, "strategyqa": 0.5}), max_new_tokens=4)
    """

    adapters: str | Mapping[str, float]
    needs_gates = False

    def __post_init__(self):
        if isinstance(self.adapters, str):
            return
        with Arguments("Fixed") as given:
            if not isinstance(self.adapters, Mapping) or not self.adapters:
                given.refuse("adapters", "a name or {name: weight}", self.adapters)
                return
            for name, weight in self.adapters.items():
                if not isinstance(name, str):
                    given.refuse("adapters", "names", name)
                given.number(f"{name}", weight, "a finite weight", lambda w: abs(w) <= LARGEST)

    def weights(self) -> dict[str, float]:
        """{adapter name: weight}."""
        if isinstance(self.adapters, str):
            return {self.adapters: 1.0}
        return {name: float(weight) for name, weight in self.adapters.items()}

    def named(self) -> tuple[str, ...]:
        """Those that act."""
        return tuple(self.weights())

    def bind(self, routers: Sequence[Fixed | None], names: tuple[str, ...]) -> Routing:
        rows = [r.weights() if r is not None else {} for r in routers]
        if unknown := sorted({name for row in rows for name in row} - set(names)):
            raise InputError([f"Fixed: adapter: expected one of {', '.join(names)}, found {n!r}" for n in unknown])
        return request_routing([tuple(row.items()) for row in rows], names)


def request_routing(
    rows: Sequence[Sequence[tuple[str, float]]], names: tuple[str, ...], fused: Sequence[bool] | None = None
) -> Routing:
    """One choice a request, known beforehand: Routing [B, 1, 1, C].

    rows: of each request its adapters, of `names`, and their weights. fused: which requests' adapters act as one.
    """
    width, places = max(1, *map(len, rows)), {name: i for i, name in enumerate(names)}
    indices = np.full((len(rows), 1, 1, width), NO_ADAPTER, np.int32)
    weights = np.zeros(indices.shape, np.float32)
    for b, row in enumerate(rows):
        for c, (name, weight) in enumerate(row):
            indices[b, 0, 0, c], weights[b, 0, 0, c] = places[name], weight
    acting = np.asarray(fused, bool) if fused is not None and any(fused) else None
    return Routing(indices, weights, fused=acting)
