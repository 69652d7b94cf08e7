"""Request-level routing by retrieval (LoraRetriever, arXiv 2402.09997): the request's text finds its adapters.

`Retrieval`, `GatesWithin` and `TaskRetrieval` say how; `look_up` asks the index once a batch's texts are known, and
puts for every prompt a router in their place that needs no text any more: `Composed`, or `Gates` within what was found.
Routers are looked up anew for every prompt, so that each turn of a conversation gets its own.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np

from meteora_jax.arguments import Arguments
from meteora_jax.config import InputError
from meteora_jax.retriever.index import Index, top
from meteora_jax.routing import RequestRouter, Routing
from meteora_jax.routing.fixed import request_routing
from meteora_jax.routing.gates import Gates, check_choice

Compose = Literal["selection", "mixture", "fusion"]
COMPOSITIONS: tuple[Compose, ...] = ("selection", "mixture", "fusion")
MinSimilarity = float | Literal["calibrated"] | None
Reading = Literal["last", "all", "weighted"]
READINGS: tuple[Reading, ...] = ("last", "all", "weighted")
RETRIEVED = 3  # adapters or tasks, where nobody says how many
FADING = 0.5  # what the message before weighs of the next, where all are weighted
Found = tuple[tuple[str, float], ...]  # (adapter, similarity), best first
Said = str | Sequence[str]  # a request: its text, or the user's messages of a conversation one by one


def check_query(given: Arguments, index: Any, k: Any, exclude: Any, min_similarity: Any, read: Any) -> None:
    """What an index is asked for: how many adapters, which it must not find, how similar the best must be, and what is
    read of a conversation."""
    given.choice("read", read, READINGS)
    if not isinstance(index, Index):
        given.refuse("index", "an Index", index)
    given.whole("k", k)
    given.texts("exclude", exclude)
    if isinstance(min_similarity, str) and min_similarity != "calibrated":
        given.refuse("min_similarity", "a number, 'calibrated' or None", min_similarity)
    elif min_similarity is not None and min_similarity != "calibrated":
        given.number("min_similarity", min_similarity, "a finite number", math.isfinite)


def read_texts(said: Said, read: Reading) -> list[tuple[str, float]]:
    """What is looked up for a request, by the rule of `Retrieval`: texts with their weights."""
    if isinstance(said, str):
        return [(said, 1.0)]
    if read != "weighted" or not said:
        return [("\n".join(said if read == "all" else said[-1:]), 1.0)]
    weights = FADING ** np.arange(len(said))[::-1]
    return list(zip(said, weights.tolist(), strict=True))


def is_nobodys(index: Index, found: Found, min_similarity: MinSimilarity) -> bool:
    """Whether the best of what was found is less similar to the request than it must be."""
    if min_similarity == "calibrated":
        min_similarity = index.threshold
    return min_similarity is not None and found[0][1] < min_similarity


@dataclasses.dataclass(frozen=True, eq=False)
class Retrieval:
    """The k adapters whose profiles are most like the request, acting together.

    Three are LoraRetriever's default. On 28 tasks the best one alone, k=1, is level with each task's own adapter named,
    and three lose a quarter of its accuracy (docs/results.md). So the server's `retrieve` and `meteora generate
    --router retrieval` are not this but `task_retrieval.default_retrieval`.

    selection: the best one alone. mixture: their outputs averaged. fusion: their matrices averaged, so that one
    adapter's A meets another's B. weights "uniform" is the paper's; "similarity" divides one among the retrieved in
    proportion to their similarities, those below zero counting as zero (uniform where all are).
    exclude: adapters that this request must not get.
    min_similarity: a request whose best adapter is less similar gets none, and the base answers alone. "calibrated":
    what the index found on its own profiles (`Index.threshold`; where it has none, None); None: each request gets some.
    read: what is looked up of a conversation; blank messages are passed over, and a prompt that is text is looked up as
    it is. last: the user's last message. all: the user's messages in one text, a line end between. weighted: each of
    them by itself; an adapter's similarity is the sum of those, the last message weighing 1 and each earlier one half
    of the next: up to twice a single look-up's, so that min_similarity is met more easily.

    Raises:
        InputError: k below 1, an unknown composition, no Index; by the model, adapters that the bank has not.

    Examples:
        >>> index = mj.Index.build({"winowhy": ["Who does he mean?"], "strategyqa": ["Would a pear sink?"]})
        >>> by_text = mj.Retrieval(index, k=2, compose="fusion", min_similarity=None)
        >>> model.generate(["Would a stone sink?"], by_text, max_new_tokens=4)
    """

    index: Index
    k: int = RETRIEVED
    compose: Compose = "mixture"
    weights: Literal["uniform", "similarity"] = "uniform"
    exclude: tuple[str, ...] = ()
    min_similarity: MinSimilarity = "calibrated"
    read: Reading = "last"

    def __post_init__(self):
        with Arguments("Retrieval") as given:
            check_query(given, self.index, self.k, self.exclude, self.min_similarity, self.read)
            given.choice("compose", self.compose, COMPOSITIONS)
            given.choice("weights", self.weights, ("uniform", "similarity"))

    @property
    def hidden(self) -> tuple[str, ...]:
        """What the index must not find."""
        return self.exclude

    def router(self, found: Found) -> Composed:
        """The router of a request for which `found` was retrieved."""
        if is_nobodys(self.index, found, self.min_similarity):
            return NOBODY
        if self.compose == "selection":
            return Composed(((found[0][0], 1.0),), False)
        shares = np.ones(len(found))
        if self.weights == "similarity":
            shares = np.maximum([similarity for _, similarity in found], 0.0)
            shares = shares if shares.sum() > 0 else np.ones(len(found))
        named = [(name, float(w)) for (name, _), w in zip(found, shares / shares.sum(), strict=True)]
        return Composed(tuple(named), self.compose == "fusion")


@dataclasses.dataclass(frozen=True, eq=False)
class GatesWithin:
    """Retrieval narrows the bank to k adapters, and the gates choose among those for every token.

    min_similarity, read: as `Retrieval` has them.

    Raises:
        InputError: as `Retrieval` and `Gates`; k below top_k.

    Examples:
        >>> model.generate(["Would a stone sink?"], mj.GatesWithin(index, k=2, top_k=1), max_new_tokens=4)
    """

    index: Index
    k: int = RETRIEVED
    top_k: int = 2
    temperature: float = 1.0
    exclude: tuple[str, ...] = ()
    min_similarity: MinSimilarity = "calibrated"
    read: Reading = "last"

    def __post_init__(self):
        with Arguments("GatesWithin") as given:
            check_choice(given, self.top_k, self.temperature)
            check_query(given, self.index, self.k, self.exclude, self.min_similarity, self.read)
        if self.k < self.top_k:
            raise InputError(f"GatesWithin: k: expected at least {self.top_k} (top_k), found {self.k}")

    @property
    def hidden(self) -> tuple[str, ...]:
        """What the index must not find."""
        return self.exclude

    def router(self, found: Found) -> Gates | Composed:
        """The router of a request for which `found` was retrieved."""
        if is_nobodys(self.index, found, self.min_similarity):
            return dataclasses.replace(NOBODY, needs_gates=True)  # a model without gates is refused whatever is asked
        return Gates(self.top_k, self.temperature, within=tuple(name for name, _ in found))


@dataclasses.dataclass(frozen=True)
class Composed:
    """Adapters of one request with their weights, as a mixture or fused; none: the base answers alone."""

    adapters: tuple[tuple[str, float], ...]
    fused: bool
    needs_gates: bool = False

    def named(self) -> tuple[str, ...]:
        """Those that act."""
        return tuple(dict.fromkeys(name for name, _ in self.adapters))

    def bind(self, routers: Sequence[Composed | None], names: tuple[str, ...]) -> Routing:
        rows = [r.adapters if r is not None else () for r in routers]
        if unknown := sorted({name for row in rows for name, _ in row} - set(names)):
            raise InputError([f"retrieval: expected adapters of the bank, found {name!r}" for name in unknown])
        return request_routing(rows, names, [r is not None and r.fused for r in routers])


NOBODY = Composed((), False)


def look_up(router: Any, batch: int, texts: Callable[[], Sequence[Said]]) -> tuple[Any, list[Found]]:
    """Replaces every `RequestRouter` of a caller's `router=` by what their indices found.

    Args:
        router: one router, a list of one a prompt, or None; others pass through untouched.
        texts: gives the requests' texts, of conversations the user's messages; only called when there is something to
            retrieve.

    Returns:
        the routers, and for every prompt what was retrieved (nothing where nothing was asked for).
    """
    per_prompt = list(router) if isinstance(router, list | tuple) else [router] * batch
    asking = [b for b, r in enumerate(per_prompt) if isinstance(r, RequestRouter)]
    found: list[Found] = [()] * batch
    if not asking or len(per_prompt) != batch:
        return router, found  # another length is refused when the routers are bound
    requests = texts()
    groups: dict[tuple[int, int], list[int]] = {}
    for b in asking:
        groups.setdefault((id(per_prompt[b].index), per_prompt[b].k), []).append(b)
    for rows in groups.values():
        first = per_prompt[rows[0]]
        exclude = [per_prompt[b].hidden for b in rows]
        scores = _scores(first.index, [read_texts(requests[b], per_prompt[b].read) for b in rows])
        result = top(scores, first.index.names, first.k, exclude if any(exclude) else None)
        for b, names, similarities in zip(rows, *result, strict=True):
            found[b] = tuple(zip(names, similarities[: len(names)].tolist(), strict=True))
            per_prompt[b] = per_prompt[b].router(found[b])
    return per_prompt, found


def _scores(index: Index, requests: Sequence[Sequence[tuple[str, float]]]) -> np.ndarray:
    """float32 [B, A]: of each request the sum of its texts' similarities by their weights."""
    each = index.scores([text for request in requests for text, _ in request])
    sums, at = [], 0
    for request in requests:
        weights = np.asarray([weight for _, weight in request], np.float32)
        sums.append(weights @ each[at : at + len(request)])
        at += len(request)
    return np.stack(sums)
