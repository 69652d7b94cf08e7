"""What a client may ask for by name: the base, its adapters, and the routers that are loaded."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal

from meteora_jax.api import Meteora
from meteora_jax.config import InputError
from meteora_jax.retriever.index import Index
from meteora_jax.retriever.ranking import Ranking
from meteora_jax.routing import RouterArgument
from meteora_jax.routing.fixed import Fixed
from meteora_jax.routing.gates import Gates
from meteora_jax.routing.named import BY_TOKEN, NAMED, gate_options, named_router
from meteora_jax.routing.retrieval import RETRIEVED, GatesWithin, Retrieval
from meteora_jax.routing.task_retrieval import default_retrieval
from meteora_jax.serving.driver import Named
from meteora_jax.serving.errors import ApiError, unknown_model


@dataclasses.dataclass(frozen=True)
class Fleet:
    """What is served: a model, and the index of its adapters if one is loaded. base: the name of the bare base.
    ranking: of the index's tasks, if it has one, the adapters that serve each best, whatever their names."""

    model: Meteora
    index: Index | None
    base: str
    ranking: Ranking | None = None

    def checked(self) -> Fleet:
        """Itself, as it is loaded; adapters that are unloaded later stay in the index.

        Raises:
            InputError: the index or its ranking names adapters that the bank does not have.
        """
        unranked = set(self.index.names) - set(self.ranking or ()) if self.index else set()
        for what, named in (("profiles", unranked), ("ranking.json", self.ranked)):
            if strangers := named - set(self.model.adapter_names):
                found = ", ".join(sorted(strangers)[:5])
                raise InputError(f"--index: expected {what} of the bank's adapters alone, found {found}")
        return self

    @functools.cached_property
    def ranked(self) -> frozenset[str]:
        """The adapters that the ranking names."""
        return frozenset(name for own in (self.ranking or {}).values() for name in own)


def named(fleet: Fleet) -> Named:
    """Who a trace of the fleet's engine speaks of: places in the bank, or with slots numbers of versions."""
    if fleet.model.pool is not None:
        return fleet.model.pool.versions.named_choices
    known = fleet.model.adapter_names
    return lambda numbers: (known, numbers)


def _absent(fleet: Fleet) -> tuple[str, ...]:
    """What the index knows and is no loaded adapter: one that was unloaded, or a task without its own."""
    assert fleet.index is not None
    known = set(fleet.model.adapter_names)
    return tuple(name for name in fleet.index.names if name not in known)


def _gates(fleet: Fleet, k: int | None) -> RouterArgument:
    assert fleet.model.gates is not None
    return Gates(*gate_options(fleet.model.gates, None, None))


def _retrieval(fleet: Fleet, k: int | None) -> RouterArgument:
    assert fleet.index is not None
    gone, pool = _absent(fleet), fleet.model.pool
    router: Any
    if k is None:
        gone = (*gone, *fleet.ranked.difference(gone, fleet.model.adapter_names))  # ranked, and unloaded since
        most = pool.table.count if pool else RETRIEVED
        router = default_retrieval(fleet.index, fleet.ranking, gone, most, fleet.model.adapter_names)
    else:
        router = Retrieval(fleet.index, k, exclude=gone)
    return router


def _gates_within(fleet: Fleet, k: int | None) -> RouterArgument:
    assert fleet.index is not None
    k = max(1, min(RETRIEVED, len(fleet.index.names), _room(fleet))) if k is None else k
    assert fleet.model.gates is not None
    top_k, temperature = gate_options(fleet.model.gates, None, None)
    router: Any = GatesWithin(fleet.index, k, top_k, temperature, exclude=_absent(fleet))
    return router


def _has_gates(fleet: Fleet) -> bool:
    return fleet.model.gates is not None


def _has_index(fleet: Fleet) -> bool:
    return fleet.index is not None


def _has_both(fleet: Fleet) -> bool:
    return _has_gates(fleet) and _has_index(fleet)


def _has_bank(word: str, fleet: Fleet) -> bool:
    """Whether a router of `NAMED` can choose: among all of a bank, or by score among those that lie in slots."""
    bank = fleet.model.bank
    if bank is None or (fleet.model.pool is not None and word not in BY_TOKEN):
        return False
    return bool(bank.own_gates) if word == "phatgoose" else bool(bank.adapters)


def _of_bank(word: str, fleet: Fleet, k: int | None) -> RouterArgument:
    router: Any = named_router(word, fleet.model.adapter_names)
    return router


@dataclasses.dataclass(frozen=True)
class Virtual:
    """A router as a model: how it is made of a fleet, whether a fleet has what it needs, and whether ":K" may follow
    its name."""

    make: Callable[[Fleet, int | None], RouterArgument]
    loaded: Callable[[Fleet], bool]
    counts: bool = False


VIRTUAL: Mapping[str, Virtual] = {
    "gates": Virtual(_gates, _has_gates),
    "retrieve": Virtual(_retrieval, _has_index, counts=True),
    "gates-within": Virtual(_gates_within, _has_both, counts=True),
    **{word: Virtual(functools.partial(_of_bank, word), functools.partial(_has_bank, word)) for word in NAMED},
}


def names(fleet: Fleet) -> list[tuple[str, str | None]]:
    """(name, its base; None of the base itself) of everything that can be asked for; an adapter hides a router of the
    same name."""
    virtual = [name for name, router in VIRTUAL.items() if router.loaded(fleet)]
    return [(fleet.base, None), *((name, fleet.base) for name in dict.fromkeys([*fleet.model.adapter_names, *virtual]))]


def kind(fleet: Fleet, name: str) -> Literal["base", "adapter", "router"]:
    """What a name is, of those that `resolve` knows; an adapter goes before all else, as there."""
    return "adapter" if name in fleet.model.adapter_names else "base" if name == fleet.base else "router"


def most_k(fleet: Fleet, name: str) -> int | None:
    """The largest K of ":K" behind a router's name; None where none may follow."""
    counts = kind(fleet, name) == "router" and name in VIRTUAL and VIRTUAL[name].counts
    return _room(fleet) if counts else None


def _room(fleet: Fleet) -> int:
    """How many adapters a request may have at once: all, or as many as there are slots."""
    count, pool = len(fleet.model.adapter_names), fleet.model.pool
    return count if pool is None else min(count, pool.table.count)


def is_model(fleet: Fleet, name: str) -> bool:
    """Whether `resolve` knows a name."""
    try:
        resolve(fleet, name)
    except (ApiError, InputError):
        return False
    return True


def resolve(fleet: Fleet, name: str) -> RouterArgument:
    """The router of a model's name.

    Raises:
        ApiError: nothing of this name is loaded.
    """
    if name in fleet.model.adapter_names:
        return Fixed(name)
    if name == fleet.base:
        return None
    word, colon, count = name.partition(":")
    router = VIRTUAL.get(word)
    if router is None or not router.loaded(fleet) or (colon and not router.counts):
        raise unknown_model(name)
    if not colon:
        return router.make(fleet, None)
    # one spelling each: 01 would be another label of the metrics
    if not re.fullmatch("[1-9][0-9]{0,8}", count) or int(count) > _room(fleet):
        raise unknown_model(name)
    return router.make(fleet, int(count))


def mixture(fleet: Fleet, name: str, weights: Mapping[str, Any] | None) -> RouterArgument:
    """The router of a request: its model's, or beside the base's name a mixture {adapter: weight}."""
    if weights is None:
        return resolve(fleet, name)
    if name != fleet.base:
        resolve(fleet, name)
        raise ApiError(400, f"router: expected the model {fleet.base!r} beside it, found {name!r:.200}", param="router")
    if strangers := [n for n in weights if n not in fleet.model.adapter_names]:
        raise ApiError(
            404, f"router: no adapter is called {strangers[0]!r:.200}", code="model_not_found", param="router"
        )
    return Fixed(dict(weights))
