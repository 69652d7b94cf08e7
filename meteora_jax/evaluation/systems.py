"""What is judged: a system is a name and a function from a problem to the router that answers it.

A family of systems is one entry of FAMILIES; a new way to route needs an entry and nothing else. A name is its
family's, as `gates-top2`, and suffixes in this order: -kN, how many adapters it retrieves; -tN, the temperature of its
gates; -unseen.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast, runtime_checkable

from meteora_jax.config import BankConfig, InputError, LlamaConfig
from meteora_jax.engine import Request
from meteora_jax.engine.request import Trace
from meteora_jax.evaluation.problems import Problem
from meteora_jax.gate_config import GateConfig
from meteora_jax.prompts import Prompt
from meteora_jax.retriever.index import Index
from meteora_jax.retriever.ranking import Ranking
from meteora_jax.routing import AnyRouter, RoutingTrace
from meteora_jax.routing.fixed import Fixed
from meteora_jax.routing.gates import Choosing, Gates
from meteora_jax.routing.logo import Logo
from meteora_jax.routing.named import BY_TOKEN, named_router
from meteora_jax.routing.retrieval import COMPOSITIONS, RETRIEVED, Compose, GatesWithin, Retrieval
from meteora_jax.routing.task_retrieval import TaskRetrieval

Route = Callable[[Problem], AnyRouter | None]  # a problem -> the router of its answer

# Temperature of the gates on MeteoRA's composite-n problems, by n.
COMPOSITE_TEMPERATURES = {3: 15.0, 5: 20.0, 10: 30.0}

UNSEEN = "-unseen"  # ends the name of a system that gets no adapter of a problem's own tasks
_SUFFIXES = {
    "-kN": r"(?:-k(?P<found>[1-9]\d*))?",
    "-tN": r"(?:-t(?P<temperature>(?=[\d.]*[1-9])\d+(?:\.\d+)?))?",
    UNSEEN: rf"(?P<unseen>{UNSEEN})?",
}


@runtime_checkable
class Response(Protocol):
    """What a model said to one prompt; `api.Completion` is one."""

    @property
    def text(self) -> str: ...
    @property
    def token_ids(self) -> list[int]: ...
    @property
    def finish_reason(self) -> str: ...
    @property
    def routing(self) -> RoutingTrace | None: ...


@runtime_checkable
class Model(Protocol):
    """A base with its bank and gates, as systems use it; `api.Meteora` is one."""

    @property
    def adapter_names(self) -> tuple[str, ...]: ...
    @property
    def bank(self) -> BankConfig | None: ...
    @property
    def config(self) -> LlamaConfig: ...
    @property
    def gates(self) -> GateConfig | None: ...
    @property
    def graph(self) -> Any: ...  # flax's definition and state of the modules, and the mesh: what an engine takes
    @property
    def weights(self) -> Any: ...
    @property
    def mesh(self) -> Any: ...

    @property
    def tokenizer(self) -> Any: ...

    def encode(self, prompt: Prompt) -> list[int]: ...
    def request(self, token_ids: Sequence[int], router: Any, max_new_tokens: int) -> Request: ...
    def completions(
        self,
        prompts: Sequence[Prompt],
        router: Any,
        *,
        max_new_tokens: Sequence[int],
        stop: Sequence[Sequence[str]],
        routing: Trace,
    ) -> Iterator[tuple[int, Response]]: ...


@dataclass(frozen=True)
class System:
    """A name, the model that answers, and the router of each problem.

    `composites` is False where no one router is right for several tasks in one prompt; such a system is not asked.
    `retrieves` is how many adapters it finds for a problem, None for a system that retrieves none.
    """

    name: str
    model: Model
    route: Route
    composites: bool = True
    retrieves: int | None = None

    @property
    def kind(self) -> str:
        """The name without how many adapters it retrieves: systems of one kind differ in that alone."""
        return re.sub(rf"-k\d+(?=(-t[\d.]+)?({UNSEEN})?$)", "", self.name)


@dataclass(frozen=True)
class Given:
    """What systems are made of: the model, other models over the same base by name, and an index of the adapters, or of
    tasks with the adapters ranked for each.

    Each of `others` holds one adapter, which its system uses for every problem.
    """

    model: Model
    others: Mapping[str, Model] = field(default_factory=dict)
    index: Index | None = None
    ranking: Ranking | None = None


@dataclass(frozen=True)
class Family:
    """Systems whose names are `stem`, a pattern, and some of `suffixes`; `spelled` is how a message names them."""

    spelled: str
    stem: str
    make: Callable[[re.Match[str], Given], Route]
    suffixes: tuple[str, ...] = ()
    composites: bool = True

    @property
    def pattern(self) -> str:
        """Of whole names."""
        return self.stem + "".join(_SUFFIXES[suffix] for suffix in self.suffixes)

    def refusal(self, name: str) -> str | None:
        """What is wrong with a name of this family whose suffixes are none of its own; None for any other name."""
        match = re.fullmatch(rf"(?P<stem>{self.stem})(?P<rest>-.*)", name)
        if match is None:
            return None
        allowed = f"{', '.join(self.suffixes)} (in this order, N above 0)" if self.suffixes else "nothing"
        return f"--systems: {name}: expected {allowed} after {match['stem']}, found {match['rest']}"


def _base(name: re.Match[str], given: Given) -> Route:
    return _always(None)


def _oracle(name: re.Match[str], given: Given) -> Route:
    """The adapter named like the task, or a turn's: one a prompt. For several tasks in one prompt there is none."""

    def route(problem: Problem) -> Fixed:
        return Fixed(problem.own_tasks[0])

    return route


def _always(router: Fixed | None) -> Route:
    """The same router for every problem."""

    def route(problem: Problem) -> Fixed | None:
        return router

    return route


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

    def route(problem: Problem) -> GatesWithin:
        return GatesWithin(index, k, top_k, temperature(problem), hidden(problem))

    return route


def _gate_options(name: re.Match[str], given: Given) -> tuple[int, Callable[[Problem], float]]:
    """The gates' top-k, and their temperature on a problem: the name's, else as trained or MeteoRA's of composites."""
    gates = given.model.gates
    if gates is None:
        raise InputError(f"--systems: {name[0]}: expected --gates, found none")

    def temperature(problem: Problem) -> float:
        if name["temperature"]:
            return float(name["temperature"])
        if not problem.tasks or not problem.numbered:
            return gates.temperature
        found = COMPOSITE_TEMPERATURES.get(problem.parts)
        if found is None:
            raise InputError(
                f"{problem.task}: {name[0]}: expected a temperature (-tN, as gates-top2-t15), as MeteoRA has none for "
                f"{problem.parts} tasks in a prompt, found none"
            )
        return found

    return int(name["top"]), temperature


def _retrieval(name: re.Match[str], given: Given) -> Route:
    index, k = _index(name, given)
    compose = cast(Compose, name["compose"])
    hidden = _hidden(name, index.names)

    def route(problem: Problem) -> Retrieval:
        return Retrieval(index, k, compose, exclude=hidden(problem))

    return route


def _named(name: re.Match[str], given: Given) -> Route:
    """A router of `routing.named`: of each prompt alone, by the adapters' matrices or own gates."""
    options = name.groupdict()
    word, top, temperature = options["word"], options.get("top"), options.get("temperature")
    names = given.model.adapter_names
    hidden = _hidden(name, names)

    def route(problem: Problem) -> AnyRouter | None:
        gone = hidden(problem)
        within = [n for n in names if n not in gone] if gone else None
        return named_router(word, names, int(top) if top else None, float(temperature) if temperature else None, within)

    return route


def _task_retrieval(name: re.Match[str], given: Given) -> Route:
    if given.index is None or given.ranking is None:
        raise InputError(f"--systems: {name[0]}: expected --index with the ranking of `meteora index rank`, found none")
    index, ranking, k = given.index, given.ranking, _count(name, given)
    hidden = _hidden(name, given.model.adapter_names)

    def route(problem: Problem) -> TaskRetrieval:
        return TaskRetrieval(index, ranking, k, exclude=hidden(problem))

    return route


def _index(name: re.Match[str], given: Given) -> tuple[Index, int]:
    """The index, and how many adapters it is to find."""
    if given.index is None:
        raise InputError(f"--systems: {name[0]}: expected --index, found none")
    if strange := sorted(set(given.index.names) - set(given.model.adapter_names)):
        raise InputError(f"--index: expected adapters of the bank, found {', '.join(strange)}")
    return given.index, _count(name, given)


def _hidden(name: re.Match[str], names: Sequence[str]) -> Callable[[Problem], tuple[str, ...]]:
    """Which of `names` a problem must not get: of an unseen system, those of the problem's own tasks."""

    def hidden(problem: Problem) -> tuple[str, ...]:
        return tuple(t for t in problem.own_tasks if t in names) if name["unseen"] else ()

    return hidden


_WORDS = "|".join(BY_TOKEN)
_TOP, _COMPOSE = r"top(?P<top>[1-9]\d*)", "|".join(COMPOSITIONS)

FAMILIES = [
    Family("base", "base", _base),
    Family("oracle", "oracle", _oracle, composites=False),
    Family("gates-topN", f"gates-{_TOP}", _gates, ("-tN", UNSEEN)),
    Family("gates-within-topN", f"gates-within-{_TOP}", _gates_within, ("-kN", "-tN", UNSEEN)),
    Family(f"{_WORDS}-topN", f"(?P<word>{_WORDS})-{_TOP}", _named, ("-tN", UNSEEN)),
    Family("logo-kN", r"(?P<word>logo)-k(?P<top>[1-9]\d*)", _named, (UNSEEN,)),
    Family("uniform", "(?P<word>uniform)", _named, (UNSEEN,)),
    Family("task-retrieval", "task-retrieval", _task_retrieval, ("-kN", UNSEEN)),
    Family(f"retrieval-{_COMPOSE}", f"retrieval-(?P<compose>{_COMPOSE})", _retrieval, ("-kN", UNSEEN)),
]


def _count(name: re.Match[str], given: Given) -> int:
    """How many adapters a system retrieves: as its name says, or the usual number as far as there are so many."""
    if name["found"]:
        return int(name["found"])
    if given.index is None:
        return RETRIEVED
    hidden = 1 if name["unseen"] and not name[0].startswith("task-") else 0  # a task stays, with other adapters
    return max(1, min(RETRIEVED, len(given.index.names) - hidden))


def of_a_family(name: str) -> bool:
    """Whether a family has a system of this name."""
    return any(re.fullmatch(family.pattern, name) for family in FAMILIES)


def default_systems(given: Given) -> list[str]:
    """The names of the systems where nobody says any: those that what is given can have."""
    model, index = given.model, given.index
    found = ["base", "oracle"] if model.adapter_names else ["base"]
    if model.gates is not None:
        found += [f"gates-top{n}" for n in (1, 2) if n <= len(model.gates.names)]
    if index is not None:
        # the tasks of a ranked index may have no adapters of their own; of any other that is a mistake, which is said
        if given.ranking is None or set(index.names) <= set(model.adapter_names):
            found.append("retrieval-selection")
        if given.ranking is not None:
            found.append("task-retrieval")
    return found


def make_system(name: str, given: Given) -> System:
    """The system of that name: of a family, of another bank, or an adapter's of the model's own bank.

    Raises:
        InputError: there is no such system for what is given.
    """
    for family in FAMILIES:
        if match := re.fullmatch(family.pattern, name):
            k = _count(match, given) if "-kN" in family.suffixes else None
            return System(name, given.model, family.make(match, given), family.composites, k)
    if other := given.others.get(name):
        (alone,) = other.adapter_names
        return System(name, other, _always(Fixed(alone)))
    if name in given.model.adapter_names:
        return System(name, given.model, _always(Fixed(name)))
    for family in FAMILIES:
        if refusal := family.refusal(name):
            raise InputError(refusal)
    known = ", ".join((*(f.spelled for f in FAMILIES), *given.others, *given.model.adapter_names))
    raise InputError(f"--systems: expected some of {known}, or NAME=FOLDER, found {name!r}")


def routing_kind(system: System, problem: Problem) -> tuple[Any, ...]:
    """What systems have in common that are best asked together: how their routers choose, and among how many adapters.

    A batch with several kinds runs each of them for all of its rows, and by XLA: base, oracle, uniform, Arrow and two
    retrievals of 28 adapters in one answered 3 problems a second on a shared H200, where token routers answered 76.
    """
    router = system.route(problem)
    if isinstance(router, Retrieval):
        return ("given", 1 if router.compose == "selection" else (router.compose, router.k))
    if isinstance(router, TaskRetrieval | Logo):
        return (type(router).__name__, router.k)
    if router is None or isinstance(router, Fixed):
        return ("given", 1 if router is None else len(router.weights()))
    return (type(router).__name__,)


def skipped(systems: Sequence[System], problems: Sequence[Problem]) -> set[tuple[str, str]]:
    """The (system, row) that are not asked: composite problems of systems that are not defined on them."""
    rows = {p.task for p in problems if p.tasks}
    return {(s.name, row) for s in systems for row in rows if not s.composites}


def check_routes(systems: Sequence[System], problems: Sequence[Problem]) -> None:
    """Makes a router for a problem of every row, so that what is missing is said before anything runs.

    Raises:
        InputError: oracle has no adapter for a row, or gates no temperature for a composite.
    """
    rows = {(p.task, p.asks): p for p in problems}
    leave = skipped(systems, problems)
    wrong: list[str] = []
    for system in systems:
        alone = []
        for (row, _), problem in rows.items():
            if (system.name, row) in leave:
                continue
            router = system.route(problem)
            if isinstance(router, Fixed) and not set(router.weights()) <= set(system.model.adapter_names):
                alone.append(problem.own_tasks[0])
            if isinstance(router, Retrieval | GatesWithin | TaskRetrieval):
                left = len(router.index.names) - len(router.hidden)
                if not left:
                    wrong.append(f"--systems: {system.name}: expected adapters that {row} may have, found all hidden")
                    break
                if router.k > left and not isinstance(router, TaskRetrieval):
                    wrong.append(f"--systems: {system.name}: expected to retrieve at most {left}, found {router.k}")
                    break
            if isinstance(router, Choosing | GatesWithin) and router.top_k > len(system.model.adapter_names):
                most = len(system.model.adapter_names)
                wrong.append(f"--systems: {system.name}: expected at most {most} (the bank's adapters) for top-k")
                break
        if alone:
            rest = ", ".join(dict.fromkeys(alone))
            wrong.append(f"--systems: {system.name}: expected an adapter for every task, found none for {rest}")
    if wrong:
        raise InputError(wrong)
