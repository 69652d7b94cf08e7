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

UNSEEN = "-unseen"  # ends the name of a system that gets no adapter of a problem's own tasks

# Temperature of the gates on MeteoRA's composite-n problems, by n.
COMPOSITE_TEMPERATURES = {3: 15.0, 5: 20.0, 10: 30.0}


@dataclass(frozen=True)
class System:
    """A name, the model that answers, and the router of each problem.

    `composites` is False where no one router is right for several tasks in one prompt; such a system is not asked.
    `retrieves` is how many adapters it finds for a problem, None for a system that retrieves none.
    """

    name: str
    model: Any
    route: Route
    composites: bool = True
    retrieves: int | None = None

    @property
    def kind(self) -> str:
        """The name without how many adapters it retrieves: systems of one kind differ in that alone."""
        return re.sub(rf"-k\d+(?=$|{UNSEEN}$)", "", self.name)


@dataclass(frozen=True)
class Given:
    """What systems are made of: the model, other models over the same base by name, and the caller's options.

    Each of `others` holds one adapter, which its system uses for every problem. `index` finds `retrieve` adapters for
    a problem, unless the system's name says how many.
    """

    model: Any
    others: Mapping[str, Any] = field(default_factory=dict)
    composite_temperature: float | None = None
    index: Index | None = None
    retrieve: int = 3


@dataclass(frozen=True)
class Family:
    """Systems whose names match `pattern`; `spelled` is how a message names them."""

    spelled: str
    pattern: str
    make: Callable[[re.Match[str], Given], Route]
    composites: bool = True


def _gates(name: re.Match[str], given: Given) -> Route:
    top_k, temperature = _gate_options(name, given)
    names = given.model.adapter_names
    hidden = _hidden(name, names)

    def route(problem: Problem) -> Gates:
        gone = hidden(problem)
        return Gates(top_k, temperature(problem), tuple(n for n in names if n not in gone) if gone else None)

    return route


def _gates_within(name: re.Match[str], given: Given) -> Route:
    top_k, temperature = _gate_options(name, given)
    index, k = _index(name, given)
    hidden = _hidden(name, index.names)
    return lambda problem: GatesWithin(index, k, top_k, temperature(problem), hidden(problem))


def _gate_options(name: re.Match[str], given: Given) -> tuple[int, Callable[[Problem], float]]:
    """The gates' top-k, and their temperature on a problem."""
    if given.model.gates is None:
        raise InputError(f"--systems: {name[0]}: expected --gates, found none")

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

    return int(name["top"]), temperature


def _retrieval(name: re.Match[str], given: Given) -> Route:
    index, k = _index(name, given)
    compose: Any = name["compose"]
    hidden = _hidden(name, index.names)
    return lambda problem: Retrieval(index, k, compose, exclude=hidden(problem))


def _index(name: re.Match[str], given: Given) -> tuple[Index, int]:
    """The index, and how many adapters it is to find."""
    if given.index is None:
        raise InputError(f"--systems: {name[0]}: expected --index, found none")
    if strange := sorted(set(given.index.names) - set(given.model.adapter_names)):
        raise InputError(f"--index: expected adapters of the bank, found {', '.join(strange)}")
    return given.index, int(name["found"] or given.retrieve)


def _hidden(name: re.Match[str], names: Sequence[str]) -> Callable[[Problem], tuple[str, ...]]:
    """Which of `names` a problem must not get: of an unseen system, those of the problem's own tasks."""
    if not name["unseen"]:
        return lambda problem: ()
    return lambda problem: tuple(t for t in problem.own_tasks if t in names)


_HIDES, _FINDS = rf"(?P<unseen>{UNSEEN})?", r"(-k(?P<found>[1-9]\d*))?"
_TOP, _COMPOSE = r"top(?P<top>[1-9]\d*)", "|".join(COMPOSITIONS)

FAMILIES = [
    Family("base", "base", lambda name, given: lambda problem: None),
    # The adapter named like the task: one a prompt. For several tasks in one prompt there is no such adapter.
    Family("oracle", "oracle", lambda name, given: lambda problem: Fixed(problem.task), composites=False),
    Family("gates-topN", f"gates-{_TOP}{_HIDES}", _gates),
    Family("gates-within-topN", f"gates-within-{_TOP}{_FINDS}{_HIDES}", _gates_within),
    Family(f"retrieval-{_COMPOSE}", f"retrieval-(?P<compose>{_COMPOSE}){_FINDS}{_HIDES}", _retrieval),
]


def with_unseen(names: Sequence[str]) -> list[str]:
    """The names, each followed by its unseen system where its family has them."""
    can_hide = {name: any(re.fullmatch(f.pattern, name + UNSEEN) for f in FAMILIES) for name in names}
    return list(dict.fromkeys(n for name in names for n in (name, *[name + UNSEEN] * can_hide[name])))


def make_system(name: str, given: Given) -> System:
    """The system of that name: of a family, of another bank, or an adapter's of the model's own bank.

    Raises:
        InputError: there is no such system for what is given.
    """
    for family in FAMILIES:
        if match := re.fullmatch(family.pattern, name):
            route, groups = family.make(match, given), match.groupdict()
            k = int(groups["found"] or given.retrieve) if "found" in groups else None
            return System(name, given.model, route, family.composites, k)
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
            if isinstance(router, Retrieval | GatesWithin):
                left = len(router.index.names) - len(router.exclude)
                if router.k > left:
                    wrong.append(f"--systems: {system.name}: expected to retrieve at most {left}, found {router.k}")
                    break
            if isinstance(router, Gates | GatesWithin) and router.top_k > len(system.model.adapter_names):
                most = len(system.model.adapter_names)
                wrong.append(f"--systems: {system.name}: expected at most {most} (the bank's adapters) for top-k")
                break
        if alone:
            rest = ", ".join(alone)
            wrong.append(f"--systems: {system.name}: expected an adapter for every task, found none for {rest}")
    if wrong:
        raise InputError(wrong)
