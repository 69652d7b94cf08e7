"""What is judged: a system is a name and a function from a problem to the router that answers it.

A family of systems is one entry of FAMILIES; a new way to route needs an entry and nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from meteora_jax.config import InputError
from meteora_jax.evaluation.problems import Problem
from meteora_jax.retriever.index import Index
from meteora_jax.routing.fixed import Fixed
from meteora_jax.routing.gates import Gates
from meteora_jax.routing.retrieval import COMPOSITIONS, GatesWithin, Retrieval

Route = Callable[[Problem], Any]  # a problem -> what `Meteora.generate` takes as its router

# Temperature of the gates on MeteoRA's composite-n problems, by n.
COMPOSITE_TEMPERATURES = {3: 15.0, 5: 20.0, 10: 30.0}


@dataclass(frozen=True)
class System:
    """A name, the model that answers, and the router of each problem.

    `composites` is False where no one router is right for several tasks in one prompt; such a system is not asked.
    """

    name: str
    model: Any
    route: Route
    composites: bool = True


@dataclass(frozen=True)
class Given:
    """What systems are made of: the model, other models over the same base by name, and the caller's options.

    Each of `others` holds one adapter, which its system uses for every problem. `index` finds `retrieve` adapters for
    a problem, with `unseen` never those of the problem's own tasks.
    """

    model: Any
    others: Mapping[str, Any] = field(default_factory=dict)
    composite_temperature: float | None = None
    index: Index | None = None
    retrieve: int = 3
    unseen: bool = False


@dataclass(frozen=True)
class Family:
    """Systems whose names match `pattern`; `spelled` is how a message names them."""

    spelled: str
    pattern: str
    make: Callable[[re.Match[str], Given], Route]
    composites: bool = True


def _gates(name: re.Match[str], given: Given) -> Route:
    if given.model.gates is None:
        raise InputError(f"--systems: {name[0]}: expected --gates, found none")
    top_k = int(name["k"])

    def temperature(problem: Problem) -> float:
        if not problem.tasks:
            return given.model.gates.temperature
        found = given.composite_temperature or COMPOSITE_TEMPERATURES.get(problem.parts)
        if found is None:
            raise InputError(
                f"{problem.task}: {name[0]}: expected --composite-temperature, as MeteoRA has none for "
                f"{problem.parts} tasks in a prompt, found none"
            )
        return found

    if not name["within"]:
        return lambda problem: Gates(top_k, temperature(problem))
    index = _index(name[0], given)
    return lambda problem: GatesWithin(index, given.retrieve, top_k, temperature(problem), _hidden(problem, given))


def _retrieval(name: re.Match[str], given: Given) -> Route:
    index = _index(name[0], given)
    compose: Any = name[1]
    return lambda problem: Retrieval(index, given.retrieve, compose, exclude=_hidden(problem, given))


def _index(name: str, given: Given) -> Index:
    if given.index is None:
        raise InputError(f"--systems: {name}: expected --index, found none")
    if strange := sorted(set(given.index.names) - set(given.model.adapter_names)):
        raise InputError(f"--index: expected adapters of the bank, found {', '.join(strange)}")
    return given.index


def _hidden(problem: Problem, given: Given) -> tuple[str, ...]:
    if not given.unseen or given.index is None:
        return ()
    return tuple(t for t in (problem.tasks or (problem.task,)) if t in given.index.names)


FAMILIES = [
    Family("base", "base", lambda name, given: lambda problem: None),
    # The adapter named like the task: one a prompt. For several tasks in one prompt there is no such adapter.
    Family("oracle", "oracle", lambda name, given: lambda problem: Fixed(problem.task), composites=False),
    Family("gates-topK, gates-within-topK", r"gates-(?P<within>within-)?top(?P<k>[1-9]\d*)", _gates),
    Family("retrieval-" + "|".join(COMPOSITIONS), f"retrieval-({'|'.join(COMPOSITIONS)})", _retrieval),
]


def make_system(name: str, given: Given) -> System:
    """The system of that name: of a family, of another bank, or an adapter's of the model's own bank.

    Raises:
        InputError: there is no such system for what is given.
    """
    for family in FAMILIES:
        if match := re.fullmatch(family.pattern, name):
            return System(name, given.model, family.make(match, given), family.composites)
    if other := given.others.get(name):
        (alone,) = other.adapter_names
        return System(name, other, lambda problem: Fixed(alone))
    if name in given.model.adapter_names:
        return System(name, given.model, lambda problem: Fixed(name))
    known = ", ".join((*(f.spelled for f in FAMILIES), *given.others, *given.model.adapter_names))
    raise InputError(f"--systems: expected some of {known}, found {name!r}")


def skipped(systems: Sequence[System], problems: Sequence[Problem]) -> set[tuple[str, str]]:
    """The (system, row) that are not asked: composite problems of systems that are not defined on them."""
    rows = {p.task for p in problems if p.tasks}
    return {(s.name, row) for s in systems for row in rows if not s.composites}


def check_routes(systems: Sequence[System], problems: Sequence[Problem]) -> None:
    """Makes a router for a problem of every row, so that what is missing is said before anything runs.

    Raises:
        InputError: oracle has no adapter for a row, or gates no temperature for a composite.
    """
    rows = {p.task: p for p in problems}
    leave = skipped(systems, problems)
    wrong: list[str] = []
    for system in systems:
        alone = []
        for row, problem in rows.items():
            if (system.name, row) in leave:
                continue
            router = system.route(problem)
            if isinstance(router, Fixed) and not set(router.weights()) <= set(system.model.adapter_names):
                alone.append(row)
            if isinstance(router, Gates | GatesWithin) and router.top_k > len(system.model.adapter_names):
                most = len(system.model.adapter_names)
                wrong.append(f"--systems: {system.name}: expected at most {most} (the bank's adapters) for top-k")
                break
        if alone:
            rest = ", ".join(alone)
            wrong.append(f"--systems: {system.name}: expected an adapter for every task, found none for {rest}")
    if wrong:
        raise InputError(wrong)
