"""Scorings that compare a request with one vector of each adapter: means of vectors or n-grams, TF-IDF, BM25."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import numpy as np

from meteora_jax.config import InputError
from meteora_jax.retriever.features import Features, SparseRows, sketch, sklearn, unit
from meteora_jax.retriever.scoring import BARE_WEIGHT, Profile, Scoring


class Means(Scoring):
    """An adapter is the mean of its inputs' vectors; cosine, or the bare inner product as in the paper's baseline."""

    needs_encoder, uses_bare = True, False

    def __init__(self, cosine: bool = True):
        self._cosine, self._kept = cosine, {}

    def fit(self, pool: Sequence[Profile]) -> None:
        # an adapter's mean outlives the others' coming and going
        self._kept = {p: self._kept[p] if p in self._kept else p.inputs.vectors().mean(axis=0) for p in pool}
        means = np.stack(list(self._kept.values()))
        self._means = unit(means) if self._cosine else means

    def score(self, requests: Features) -> np.ndarray:
        vectors = requests.vectors()
        return (unit(vectors) if self._cosine else vectors) @ self._means.T


class Whitened(Scoring):
    """Means after whitening with the covariance within adapters: what varies inside a task counts less."""

    needs_encoder, uses_bare = True, False
    SHRINKAGE = 0.1  # share of the identity (times the mean variance) in the covariance

    def fit(self, pool: Sequence[Profile]) -> None:
        rows = [unit(p.inputs.vectors()).astype(np.float64) for p in pool]
        means = np.stack([r.mean(axis=0) for r in rows])
        deviations = np.concatenate([r - m for r, m in zip(rows, means, strict=True)])
        covariance = deviations.T @ deviations / len(deviations)
        width = len(covariance)
        shrunk = (1 - self.SHRINKAGE) * covariance + np.eye(width) * (
            self.SHRINKAGE * np.trace(covariance) / width + 1e-9
        )
        values, axes = np.linalg.eigh(shrunk)
        self._whiten = axes / np.sqrt(values)
        self._centre = means.mean(axis=0)
        self._means = unit((means - self._centre) @ self._whiten)

    def score(self, requests: Features) -> np.ndarray:
        vectors = unit(requests.vectors()).astype(np.float64)
        return (unit((vectors - self._centre) @ self._whiten) @ self._means.T).astype(np.float32)


class Tfidf(Scoring):
    """Mean TF-IDF of words or characters, cosine; untrained, and better than the paper's encoders."""

    needs_encoder, uses_bare = False, False

    def __init__(self, **options: Any):
        self._options = options

    def fit(self, pool: Sequence[Profile]) -> None:
        self._vectorizer = sklearn("feature_extraction.text").TfidfVectorizer(**self._options)
        rows = self._vectorizer.fit_transform([text for p in pool for text in p.inputs.insides])
        means = _averages(pool) @ rows
        lengths = np.sqrt(np.asarray(means.multiply(means).sum(axis=1)))
        self._means = means.multiply(1 / np.maximum(lengths, 1e-12)).tocsr()

    def score(self, requests: Features) -> np.ndarray:
        return (self._vectorizer.transform(requests.insides) @ self._means.T).toarray().astype(np.float32)


def _averages(pool: Sequence[Profile]) -> SparseRows:
    """Sparse [A, N]: row a averages adapter a's inputs."""
    from scipy.sparse import csr_matrix

    counts = [len(p.inputs) for p in pool]
    owner = np.repeat(np.arange(len(pool)), counts)
    values = np.repeat([1 / n for n in counts], counts)
    return csr_matrix((values, (owner, np.arange(len(owner)))), shape=(len(pool), len(owner)))


class Bm25(Scoring):
    """BM25 (Robertson et al.) over words; an adapter is one document, its inputs in a row."""

    needs_encoder, uses_bare = False, False

    def fit(self, pool: Sequence[Profile]) -> None:
        self._engine = _bm25s().BM25()
        self._engine.index(self._tokens(["\n".join(p.inputs.insides) for p in pool]), show_progress=False)
        self._known = set(self._engine.vocab_dict)

    def score(self, requests: Features) -> np.ndarray:
        known = [[w for w in words if w in self._known] for words in self._tokens(requests.insides)]
        count = self._engine.scores["num_docs"]
        return np.stack([self._engine.get_scores(w) if w else np.zeros(count, np.float32) for w in known])

    @staticmethod
    def _tokens(texts: Sequence[str]) -> list[list[str]]:
        return _bm25s().tokenize(list(texts), stopwords=None, return_ids=False, show_progress=False)


def _bm25s() -> ModuleType:
    try:
        import bm25s
    except ImportError:
        raise InputError("bm25s: expected it for the scoring 'bm25', found none (extra 'retrieve')") from None
    return bm25s


class Sketches(Scoring):
    """An adapter is the mean of its inputs' n-grams, bare inputs at a lower weight, folded; cosine.

    The regression's kernel without the regression: one matrix product a query, nothing to learn from the pool.
    """

    needs_encoder, uses_bare = False, True

    def __init__(self, kinds: Mapping[str, float]):
        self._kinds = kinds

    def fit(self, pool: Sequence[Profile]) -> None:
        for p in pool:
            if p.sketch is None:
                whole, bare = (sketch(texts, self._kinds).sum(axis=0) for texts in (p.inputs, p.bare))
                p.sketch = unit(whole + BARE_WEIGHT * bare)
        self._means = np.stack([p.sketch for p in pool if p.sketch is not None])

    def score(self, requests: Features) -> np.ndarray:
        return unit(sketch(requests, self._kinds)) @ self._means.T
