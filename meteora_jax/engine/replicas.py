"""Engines of one model, one for each place on a mesh's data axis, that share the list of requests alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding

from meteora_jax.engine.engine import EngineCore, EngineSize
from meteora_jax.engine.handle import Handle
from meteora_jax.engine.request import Request
from meteora_jax.sharding import Params


def part_of(tree: Params, part: Mesh) -> Params:
    """Arrays of a mesh as one of `sharding.data_parts` holds them: its devices' own shards, nothing is copied."""
    place = {device: i for i, device in enumerate(part.devices.flat)}

    def own(x: Any) -> Any:
        if not isinstance(x, jax.Array) or not isinstance(x.sharding, NamedSharding):
            return x
        shards = sorted((s for s in x.addressable_shards if s.device in place), key=lambda s: place[s.device])
        where = NamedSharding(part, x.sharding.spec)
        return jax.make_array_from_single_device_arrays(x.shape, where, [s.data for s in shards])

    return jax.tree.map(own, tree)


class Replicas:
    """Serves requests by several engines, as one would. A request is given to the engine that was given fewest tokens.

    One thread moves all of them on: a device has two dispatches before it while the host reads another's results.
    """

    def __init__(self, parts: Sequence[Mesh], make: Callable[[Params, Mesh], EngineCore], weights: Params):
        """make: an engine of weights that lie on one of the parts. weights: on the whole mesh."""
        self._parts = tuple(parts)
        self.engines = tuple(make(part_of(weights, part), part) for part in parts)
        self._given = [0] * len(parts)

    def refresh(self, weights: Params) -> None:
        """Takes the arrays that the model has now: what routers read of adapters alone is filled in when it is asked
        for."""
        for engine, part in zip(self.engines, self._parts, strict=True):
            engine.weights = part_of(weights, part)

    @property
    def size(self) -> EngineSize:
        """Of each of them."""
        return self.engines[0].size

    @property
    def busy(self) -> bool:
        """Whether a request is not done."""
        return any(engine.busy for engine in self.engines)

    @property
    def serving(self) -> bool:
        """Whether somebody waits for a result."""
        return any(engine.serving for engine in self.engines)

    @property
    def failed(self) -> bool:
        """Whether a device raised an error."""
        return any(engine.failed for engine in self.engines)

    def submit(self, request: Request) -> Handle:
        """As `EngineCore.submit`."""
        if not self.serving:
            self._given = [0] * len(self.engines)
        least = self._given.index(min(self._given))
        handle = self.engines[least].submit(request)
        self._given[least] += len(request.prompt) + request.max_new_tokens
        return handle

    def warm(self, requests: Sequence[Request]) -> None:
        """As `EngineCore.warm`, of equal requests: each engine is given its share."""
        for i, engine in enumerate(self.engines[: len(requests)]):
            engine.warm(requests[i :: len(self.engines)])

    def advance(self, handle: Handle) -> None:
        """One round of every engine for the sake of a request."""
        for engine in self.engines:
            if engine.busy:
                engine.advance(handle if handle.engine is engine else None)

    def step(self) -> bool:
        """One round of every engine. False: there was nothing at all."""
        return sum(engine.step() for engine in self.engines) > 0  # `any` would stop at the first

    def drain(self) -> None:
        """Serves until no request is left."""
        while self.busy:
            self.step()
