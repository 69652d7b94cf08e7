"""Request-level routing by task (after LORAUTER, Dhasade et al., arXiv 2601.21795): the request's text finds tasks. A
task's own adapter answers alone; for a task without one, tasks bring the adapters that serve their examples best.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Collection

import numpy as np

from meteora_jax.arguments import Arguments
from meteora_jax.config import InputError
from meteora_jax.retriever.index import Index
from meteora_jax.retriever.ranking import FILE, Ranking, read_ranking
from meteora_jax.routing.retrieval import (
    NOBODY,
    RETRIEVED,
    Composed,
    Found,
    MinSimilarity,
    Reading,
    Retrieval,
    check_query,
    is_nobodys,
)


@dataclasses.dataclass(frozen=True, eq=False)
class TaskRetrieval:
    """The adapter of the task most like the request, if it has its own; else the k tasks most like it, each by its best
    adapter, acting together as a mixture.

    A task's own adapter has the task's name. LORAUTER mixes in both cases, which loses a point where the task has its
    own (docs/results.md). Weights are the softmax of the tasks' similarities over a temperature; two tasks of one
    adapter add up. ranking: of every task of the index its adapters, best first. exclude: adapters that this request
    must not get: a task then brings its next best, and one that has no other is not found. min_similarity, read: as
    `Retrieval` has them.

    Raises:
        InputError: as `Retrieval`; a temperature that is not positive, a task of the index without adapters.

    Examples:
        >>> ranking = {"winowhy": ("winowhy", "strategyqa"), "strategyqa": ("strategyqa",)}
        >>> model.generate(["Would a stone sink?"], mj.TaskRetrieval(index, ranking, k=2), max_new_tokens=4)
    """

    index: Index
    ranking: Ranking
    k: int = RETRIEVED
    temperature: float = 0.2
    exclude: tuple[str, ...] = ()
    min_similarity: MinSimilarity = "calibrated"
    read: Reading = "last"

    def __post_init__(self):
        with Arguments("TaskRetrieval") as given:
            check_query(given, self.index, self.k, self.exclude, self.min_similarity, self.read)
            given.number("temperature", self.temperature, "a positive number", lambda t: t > 0)
        if missing := [task for task in self.index.names if task not in self.ranking]:
            raise InputError(f"TaskRetrieval: ranking: expected adapters of every task, found none of {missing[0]}")

    @classmethod
    def load(cls, folder: str | os.PathLike[str], k: int = RETRIEVED) -> TaskRetrieval:
        """Of an INDEX folder that `meteora index rank` has ranked adapters for."""
        ranking = read_ranking(folder)
        if ranking is None:
            raise InputError(f"{folder}: expected a {FILE} of `meteora index rank`, found none")
        return cls(Index.load(folder), ranking, k)

    @property
    def hidden(self) -> tuple[str, ...]:
        """Tasks that the index must not find: those whose adapters are all excluded."""
        gone = frozenset(self.exclude)
        return tuple(task for task in self.index.names if all(name in gone for name in self.ranking[task]))

    def router(self, found: Found) -> Composed:
        """The router of a request for which these tasks were retrieved."""
        if is_nobodys(self.index, found, self.min_similarity):
            return NOBODY
        first = found[0][0]
        if first in self.ranking[first] and first not in self.exclude:
            return Composed(((first, 1.0),), False)
        similarities = np.asarray([similarity for _, similarity in found]) / self.temperature
        shares = np.exp(similarities - similarities.max())
        adapters: dict[str, float] = {}
        for (task, _), share in zip(found, shares / shares.sum(), strict=True):
            best = next(name for name in self.ranking[task] if name not in self.exclude)
            adapters[best] = adapters.get(best, 0.0) + float(share)
        return Composed(tuple(adapters.items()), False)


def default_retrieval(
    index: Index,
    ranking: Ranking | None,
    exclude: tuple[str, ...] = (),
    most: int = RETRIEVED,
    names: Collection[str] = (),
) -> Retrieval | TaskRetrieval:
    """What retrieves where nobody says how, by the table of docs/results.md: with a ranking tasks, which helps
    those that have no adapter of their own; else the best adapter alone.

    Args:
        ranking: of the index's tasks; one that it does not have, as it joined later, is the adapter's of its name.
        names: of the adapters that there are: a task whose own joined after the ranking has it as its best.
        exclude: adapters that no request gets. most: adapters that there is room for, as in slots.
    """
    if ranking is None:
        return Retrieval(index, 1, exclude=exclude)
    known, whole = frozenset(names), {}
    for task in index.names:
        best = ranking.get(task, (task,))
        whole[task] = (task, *best) if task in known and task not in best else best
    return TaskRetrieval(index, whole, min(RETRIEVED, most, len(whole)), exclude=exclude)
