"""Request-level routing by task (LORAUTER, Dhasade et al., arXiv 2601.21795): the request's text finds tasks, and each
task brings the adapter that serves its examples best, whoever that adapter was trained for.
"""

from __future__ import annotations

import dataclasses
import os

import numpy as np

from meteora_jax.arguments import Arguments
from meteora_jax.config import InputError
from meteora_jax.retriever.index import Index
from meteora_jax.retriever.ranking import FILE, Ranking, read_ranking
from meteora_jax.routing.retrieval import NOBODY, Composed, Found, MinSimilarity, Reading, check_query, is_nobodys


@dataclasses.dataclass(frozen=True, eq=False)
class TaskRetrieval:
    """The k tasks most like the request, each by its best adapter, acting together as a mixture.

    Weights are the softmax of the tasks' similarities over a temperature; two tasks of one adapter add up. ranking: of
    every task of the index its adapters, best first. exclude: adapters that this request must not get: a task then
    brings its next best. min_similarity, read: as `Retrieval` has them.

    Raises:
        InputError: as `Retrieval`; a temperature that is not positive, a task of the index without adapters.

    Examples:
        >>> ranking = {"winowhy": ("winowhy", "strategyqa"), "strategyqa": ("strategyqa",)}
        >>> model.generate(["Would a stone sink?"], mj.TaskRetrieval(index, ranking, k=2), max_new_tokens=4)
    """

    index: Index
    ranking: Ranking
    k: int = 3
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
    def load(cls, folder: str | os.PathLike[str], k: int = 3) -> TaskRetrieval:
        """Of an INDEX folder that `meteora index rank` has ranked adapters for."""
        ranking = read_ranking(folder)
        if ranking is None:
            raise InputError(f"{folder}: expected a {FILE} of `meteora index rank`, found none")
        return cls(Index.load(folder), ranking, k)

    @property
    def hidden(self) -> tuple[str, ...]:
        """Tasks that the index must not find: none, as it is adapters that are excluded."""
        return ()

    def router(self, found: Found) -> Composed:
        """The router of a request for which these tasks were retrieved."""
        if is_nobodys(self.index, found, self.min_similarity):
            return NOBODY
        similarities = np.asarray([similarity for _, similarity in found]) / self.temperature
        shares = np.exp(similarities - similarities.max())
        adapters: dict[str, float] = {}
        for (task, _), share in zip(found, shares / shares.sum(), strict=True):
            best = next((name for name in self.ranking[task] if name not in self.exclude), None)
            if best is None:
                raise InputError(f"TaskRetrieval: exclude: expected an adapter of {task} that stays, found none")
            adapters[best] = adapters.get(best, 0.0) + float(share)
        return Composed(tuple(adapters.items()), False)
