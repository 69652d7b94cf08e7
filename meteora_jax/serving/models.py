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

SHOWN = 8  # names that a message lists


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


def _lacks_gates(fleet: Fleet) -> list[str]:
    return ["--gates"] if fleet.model.gates is None else []


def _lacks_index(fleet: Fleet) -> list[str]:
    return ["--index"] if fleet.index is None else []


def _lacks_either(fleet: Fleet) -> list[str]:
    return _lacks_gates(fleet) + _lacks_index(fleet)


def _lacks_bank(word: str, fleet: Fleet) -> list[str]:
    """What a router of `NAMED` lacks: it chooses among all of a bank, or by score among those that lie in slots."""
    bank = fleet.model.bank
    if bank is None or not bank.adapters:
        return ["--bank"]
    if fleet.model.pool is not None and word not in BY_TOKEN:
        return ["all adapters on the device (no --adapter-slots)"]
    return ["a bank of adapters with their own gates"] if word == "phatgoose" and not bank.own_gates else []


def _of_bank(word: str, fleet: Fleet, k: int | None) -> RouterArgument:
    router: Any = named_router(word, fleet.model.adapter_names)
    return router


@dataclasses.dataclass(frozen=True)
class Virtual:
    """A router as a model: how it is made of a fleet, what it needs and a fleet does not have, and whether ":K" may
    follow its name."""

    make: Callable[[Fleet, int | None], RouterArgument]
    missing: Callable[[Fleet], list[str]]
    counts: bool = False


VIRTUAL: Mapping[str, Virtual] = {
    "gates": Virtual(_gates, _lacks_gates),
    "retrieve": Virtual(_retrieval, _lacks_index, counts=True),
    "gates-within": Virtual(_gates_within, _lacks_either, counts=True),
    **{word: Virtual(functools.partial(_of_bank, word), functools.partial(_lacks_bank, word)) for word in NAMED},
}


def names(fleet: Fleet) -> list[tuple[str, str | None]]:
    """(name, its base; None of the base itself) of everything that can be asked for; an adapter hides a router of the
    same name."""
    virtual = [name for name, router in VIRTUAL.items() if not router.missing(fleet)]
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
    if router is None:
        raise unknown_model(name, f"expected {first_names(fleet)}, found none of them")
    if missing := router.missing(fleet):
        raise unknown_model(name, f"expected a server with {' and '.join(missing)}, found one without")
    if colon and not router.counts:
        raise unknown_model(name, f"expected nothing behind {word!r}, found {colon + count!r:.50}")
    if not colon:
        return router.make(fleet, None)
    # one spelling each: 01 would be another label of the metrics
    if not re.fullmatch("[1-9][0-9]{0,8}", count) or int(count) > _room(fleet):
        most, of = _room(fleet), "the bank's adapters" if fleet.model.pool is None else "adapters at a time"
        raise unknown_model(name, f"expected {word}:K with K from 1 to {most} ({of}), found {count!r:.50}")
    return router.make(fleet, int(count))


def first_names(fleet: Fleet) -> str:
    """The base and the first adapters, as messages list them."""
    listed = list(dict.fromkeys((fleet.base, *fleet.model.adapter_names)))
    return ", ".join(listed[:SHOWN]) + (f" or {len(listed) - SHOWN} others" if len(listed) > SHOWN else "")


def mixture(fleet: Fleet, name: str, weights: Mapping[str, Any] | None) -> RouterArgument:
    """The router of a request: its model's, or beside the base's name a mixture {adapter: weight}."""
    if weights is None:
        return resolve(fleet, name)
    if name != fleet.base:
        resolve(fleet, name)
        raise ApiError(400, f"router: expected the model {fleet.base!r} beside it, found {name!r:.200}", param="router")
    if strangers := [n for n in weights if n not in fleet.model.adapter_names]:
        known = ", ".join(fleet.model.adapter_names[:SHOWN]) or "none, as the server has no --bank"
        said = f"router: no adapter is called {strangers[0]!r:.200}: expected names of the bank ({known})"
        raise ApiError(404, said, code="model_not_found", param="router")
    return Fixed(dict(weights))
