"""The scorings that an index may be built with, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from meteora_jax.config import InputError
from meteora_jax.retriever.features import Features
from meteora_jax.retriever.ridge import Ridge
from meteora_jax.retriever.scoring import Profile, Scoring, is_large
from meteora_jax.retriever.similarity import Bm25, Means, Sketches, Tfidf, Whitened


class Lexical(Scoring):
    """The regression, or in a pool too large for it (`is_large`: 300 adapters of 20 inputs) its kernel's means."""

    needs_encoder, uses_bare = False, True

    def __init__(self, kinds: Mapping[str, float]):
        self._regression, self._means = Ridge(kinds), Sketches(kinds)
        self._now: Scoring = self._regression

    def fit(self, pool: Sequence[Profile]) -> None:
        self._now = self._means if is_large(pool) else self._regression
        self._now.fit(pool)

    def score(self, requests: Features) -> np.ndarray:
        return self._now.score(requests)

    def fitted(self) -> dict[str, np.ndarray]:
        return self._now.fitted()

    def restore(self, pool: Sequence[Profile], saved: Mapping[str, np.ndarray]) -> bool:
        self._now = self._means if is_large(pool) else self._regression
        return self._now.restore(pool, saved)


class Sum(Scoring):
    """Several scorings added: with `weights` as they are; without, each brought to mean 0 and deviation 1 a request."""

    def __init__(self, parts: Sequence[Scoring], weights: Sequence[float] | None = None):
        self._parts, self._weights = tuple(parts), weights
        self.needs_encoder = any(p.needs_encoder for p in parts)
        self.uses_bare = any(p.uses_bare for p in parts)

    def fit(self, pool: Sequence[Profile]) -> None:
        for part in self._parts:
            part.fit(pool)

    def fitted(self) -> dict[str, np.ndarray]:
        return {f"{i}.{key}": value for i, part in enumerate(self._parts) for key, value in part.fitted().items()}

    def restore(self, pool: Sequence[Profile], saved: Mapping[str, np.ndarray]) -> bool:
        own: list[dict[str, np.ndarray]] = [{} for _ in self._parts]
        for key, value in saved.items():
            i, _, name = key.partition(".")
            if not i.isdecimal() or int(i) >= len(own):
                return False
            own[int(i)][name] = value
        return all(part.restore(pool, kept) for part, kept in zip(self._parts, own, strict=True))

    def score(self, requests: Features) -> np.ndarray:
        scores = [part.score(requests) for part in self._parts]
        if self._weights is None:
            scores = [s - s.mean(axis=1, keepdims=True) for s in scores]
            scores = [s / np.maximum(s.std(axis=1, keepdims=True), 1e-12) for s in scores]
        weights = self._weights or [1.0] * len(scores)
        return np.sum([w * s for w, s in zip(weights, scores, strict=True)], axis=0).astype(np.float32)


LEXICAL = {"words": 1 / 3, "edges": 1 / 3, "characters": 1 / 3}
SCORINGS: dict[str, Callable[[], Scoring]] = {
    "cosine": Means,
    "inner-product": lambda: Means(cosine=False),
    "whitened": Whitened,
    "tfidf-words": Tfidf,
    "tfidf-characters": lambda: Tfidf(analyzer="char", ngram_range=(2, 5), sublinear_tf=True),
    "bm25": Bm25,
    "lexical": lambda: Lexical(LEXICAL),
    "dense": lambda: Ridge({"vectors": 1.0}),
    "hybrid": lambda: Sum([Lexical(LEXICAL), Whitened()], [1.0, 0.3]),
}


def make_scoring(name: str) -> Scoring:
    """A scoring by its name, or a sum of several by their names with "+" between them."""
    names = name.split("+")
    if unknown := [n for n in names if n not in SCORINGS]:
        raise InputError(f"scoring: expected {', '.join(SCORINGS)}, or a sum of them, found {unknown[0]!r}")
    return SCORINGS[name]() if len(names) == 1 else Sum([SCORINGS[n]() for n in names])
