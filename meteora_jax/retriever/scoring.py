"""How well an adapter's profile fits a request: the scorings that an index may be built with, by name.

A scoring is fitted on a pool of profiles and gives every request a score for every adapter; larger is closer. Only
profiles are ever fitted on.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from meteora_jax.config import InputError
from meteora_jax.retriever.features import (
    EDGE,
    WIDTH,
    Features,
    count_ngrams,
    damp,
    row_lengths,
    sketch,
    sklearn,
    unit,
    weigh,
)

MOST_RIDGE_INPUTS = 12_000  # a dense system of that many unknowns takes about a minute of two cores and 3 GB


FIT_FORMAT = 1  # of what `Ridge.fitted` gives
COLUMN_PARTS = ("sizes", "inputs", "counts", "lengths")
PROBE = "Ends, in 2 wörter: don't stop?\n- yes"  # whatever counts its n-grams otherwise is no reader of a saved fit
BARE_WEIGHT = 0.3  # of an input without the wording that it shares with its adapter's others; an input weighs 1


@dataclasses.dataclass(eq=False)
class Profile:
    """One adapter's inputs, and the same without the wording that they share (empty ones left out).

    `sketch` float32 [SKETCH] is made when a pool is large, and saved with the index.
    """

    inputs: Features
    bare: Features
    sketch: np.ndarray | None = None


def is_large(pool: Sequence[Profile]) -> bool:
    """Whether a pool is too large for the regressions."""
    return sum(len(p.inputs) + len(p.bare) for p in pool) > MOST_RIDGE_INPUTS


class Scoring:
    """What an index asks of a scoring."""

    needs_encoder: bool
    uses_bare: bool  # reads the inputs without their shared wording

    def fit(self, pool: Sequence[Profile]) -> None:
        """Learns the pool; called again, with the same objects where nothing changed, when adapters come or go."""
        raise NotImplementedError

    def score(self, requests: Features) -> np.ndarray:
        """float32 [B, A], adapters in the pool's order."""
        raise NotImplementedError

    def fitted(self) -> dict[str, np.ndarray]:
        """Of what a fit learnt, that which is worth saving: nothing where fitting again is as quick as reading."""
        return {}

    def restore(self, pool: Sequence[Profile], saved: Mapping[str, np.ndarray]) -> bool:
        """Stands in for `fit` by what `fitted` gave; False, and nothing done, where that is not of this pool."""
        if saved:
            return False
        self.fit(pool)
        return True


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
    """Mean TF-IDF of words or characters, cosine; untrained, and still ahead of the paper's encoders."""

    needs_encoder, uses_bare = False, False

    def __init__(self, **options: Any):
        self._options = options

    def fit(self, pool: Sequence[Profile]) -> None:
        self._vectorizer = sklearn("feature_extraction.text").TfidfVectorizer(**self._options)
        rows = self._vectorizer.fit_transform([text for p in pool for text in p.inputs.texts])
        means = _averages(pool) @ rows
        lengths = np.sqrt(np.asarray(means.multiply(means).sum(axis=1)))
        self._means = means.multiply(1 / np.maximum(lengths, 1e-12)).tocsr()

    def score(self, requests: Features) -> np.ndarray:
        return (self._vectorizer.transform(requests.texts) @ self._means.T).toarray().astype(np.float32)


def _averages(pool: Sequence[Profile]) -> Any:
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
        self._engine.index(self._tokens(["\n".join(p.inputs.texts) for p in pool]), show_progress=False)
        self._known = set(self._engine.vocab_dict)

    def score(self, requests: Features) -> np.ndarray:
        known = [[w for w in words if w in self._known] for words in self._tokens(requests.texts)]
        count = self._engine.scores["num_docs"]
        return np.stack([self._engine.get_scores(w) if w else np.zeros(count, np.float32) for w in known])

    @staticmethod
    def _tokens(texts: Sequence[str]) -> list[list[str]]:
        return _bm25s().tokenize(list(texts), stopwords=None, return_ids=False, show_progress=False)


def _bm25s() -> Any:
    try:
        import bm25s
    except ImportError:
        raise InputError("bm25s: expected it for the scoring 'bm25', found none (extra 'retrieve')") from None
    return bm25s


class Ridge(Scoring):
    """Discriminative: kernel ridge regression from an input to its adapter, one target an adapter.

    The kernel is a weighted sum of cosines: n-grams of words, of both ends and of characters, or vectors. Every
    adapter weighs the same, however many inputs it has. With n-grams each input is learnt a second time without the
    wording it shares with its adapter's others, at `bare_weight`: templates are then not all that is known. Weights
    and penalty were chosen by cross-validation over profiles (docs/results.md).
    """

    def __init__(self, kernel: Mapping[str, float], bare_weight: float = BARE_WEIGHT, penalty: float = 0.3):
        self.needs_encoder = "vectors" in kernel
        self.uses_bare = not self.needs_encoder
        self._kernel, self._bare_weight, self._penalty = dict(kernel), bare_weight, penalty
        self._forget()
        self._saved: Mapping[str, np.ndarray] | None = None

    def _inputs(self, pool: Sequence[Profile]) -> list[Features]:
        """Two an adapter, the second of them its bare inputs."""
        nothing = Features([], None)
        return [f for p in pool for f in (p.inputs, p.bare if self.uses_bare else nothing)]

    def fit(self, pool: Sequence[Profile]) -> None:
        texts = self._inputs(pool)
        sizes = [len(f) for f in texts]
        if (total := sum(sizes)) > MOST_RIDGE_INPUTS:
            raise InputError(
                f"index: expected at most {MOST_RIDGE_INPUTS} inputs (with their bare forms) for a regression, "
                f"found {total}; lexical, hybrid and the scorings of means have no such limit"
            )
        targets = np.zeros((total, len(pool)))
        weights = np.zeros(total)
        start = 0
        for i, size in enumerate(sizes):
            profile = pool[i // 2]
            targets[start : start + size, i // 2] = 1
            weights[start : start + size] = (self._bare_weight if i % 2 else 1.0) * 20 / len(profile.inputs)
            start += size
        from scipy.linalg import cho_solve

        self._update(texts, self._penalty / weights)
        self._dual = cho_solve((self._factor, True), targets)
        self._columns = {part: _columns(self._rows(texts, part)) for part in self._kernel}
        self._saved = None

    def fitted(self) -> dict[str, np.ndarray]:
        """The dual coefficients float64 [N, A] and, for every kind of n-gram, those of the N inputs by column.

        The counts rather than their weights: three bytes an n-gram instead of twelve, and the same bits once weighed.
        """
        if self._saved is not None:
            return dict(self._saved)
        kept = {"digest": self._digest(self._texts), "dual": self._dual}
        for kind in self._kernel.keys() - {"vectors"}:
            rows = _counts(self._texts, kind)
            columns = rows.T.tocsr()
            kept |= {
                f"{kind}.sizes": _narrow(np.diff(columns.indptr)), f"{kind}.inputs": _narrow(columns.indices),
                f"{kind}.counts": _narrow(columns.data), f"{kind}.lengths": row_lengths(rows),
            }  # fmt: skip
        return kept

    def restore(self, pool: Sequence[Profile], saved: Mapping[str, np.ndarray]) -> bool:
        from scipy.sparse import csr_matrix

        texts = self._inputs(pool)
        kinds = self._kernel.keys() - {"vectors"}
        names = {"digest", "dual", *(f"{kind}.{part}" for kind in kinds for part in COLUMN_PARTS)}
        if saved.keys() != names or not np.array_equal(saved["digest"], self._digest(texts)):
            return False
        total, columns = sum(map(len, texts)), {}
        for kind in self._kernel:
            if kind == "vectors":
                columns[kind] = _columns(self._rows(texts, kind))
                continue
            sizes, inputs, counts, lengths = (saved[f"{kind}.{part}"] for part in COLUMN_PARTS)
            ends = np.concatenate([[0], np.cumsum(sizes, dtype=np.int32)])
            columns[kind] = csr_matrix((damp(counts) / lengths[inputs], inputs.astype(np.int32), ends), (WIDTH, total))
        self._dual, self._columns = saved["dual"], columns
        self._forget()
        self._saved = saved
        return True

    def _forget(self) -> None:
        self._texts: list[Features] = []
        self._gram = self._factor = np.zeros((0, 0))

    def _digest(self, texts: Sequence[Features]) -> np.ndarray:
        """uint8 [32], of all that a fit depends on: settings, inputs, and what this machine makes n-grams of."""
        digest = hashlib.sha256()
        settings = [FIT_FORMAT, sorted(self._kernel.items()), self._bare_weight, self._penalty, WIDTH, EDGE]
        digest.update(json.dumps([settings, [f.texts for f in texts]]).encode())
        for kind in sorted(self._kernel):
            if kind == "vectors":
                digest.update(np.concatenate([f.vectors() for f in texts if len(f)]).astype("<f4").tobytes())
            else:
                probe = count_ngrams([PROBE], kind)
                digest.update(np.stack([probe.indices, probe.data]).astype("<i4").tobytes())
        return np.frombuffer(digest.digest(), np.uint8)

    def score(self, requests: Features) -> np.ndarray:
        similarity = sum(
            weight * _dense(self._rows([requests], part) @ self._columns[part]) for part, weight in self._kernel.items()
        )
        return (similarity @ self._dual).astype(np.float32)

    def _rows(self, texts: Sequence[Features], part: str) -> Any:
        if part == "vectors":
            return np.concatenate([unit(f.vectors()) for f in texts if len(f)]).astype(np.float64)
        return weigh(_counts(texts, part))

    def _update(self, texts: list[Features], diagonal: np.ndarray) -> None:
        """The kernel between all inputs, and the Cholesky factor (lower) of kernel + diag(diagonal).

        Inputs that came at the end only lengthen the factor, O(N^2) each; where some went it is made anew, O(N^3).
        """
        from scipy.linalg import cholesky, solve_triangular

        old = len(self._factor) if texts[: len(self._texts)] == self._texts else 0
        factor, self._factor = self._factor, np.zeros((0, 0))
        self._gram, self._texts = self._update_gram(texts), texts
        corner = self._gram[old:, old:] + np.diag(diagonal[old:])
        if old == 0:
            self._factor = cholesky(corner, lower=True, overwrite_a=True)
        elif len(corner) == 0:
            self._factor = factor
        else:
            below = solve_triangular(factor, self._gram[:old, old:], lower=True).T
            corner = cholesky(corner - below @ below.T, lower=True)
            self._factor = np.block([[factor, np.zeros_like(below.T)], [below, corner]])

    def _update_gram(self, texts: Sequence[Features]) -> np.ndarray:
        """The kernel between all inputs; only rows and columns of inputs that were not there are computed."""
        places = np.cumsum([0, *(len(f) for f in self._texts)])
        known = {f: np.arange(a, b) for f, a, b in zip(self._texts, places, places[1:], strict=False)}
        old = np.concatenate([known.get(f, np.full(len(f), -1)) for f in texts]).astype(int)
        gram = np.zeros((len(old), len(old)))
        kept, new = np.flatnonzero(old >= 0), np.flatnonzero(old < 0)
        if np.array_equal(old[: len(self._gram)], np.arange(len(self._gram))):  # a copy, ten times as quick as a gather
            gram[: len(self._gram), : len(self._gram)] = self._gram
        else:
            gram[np.ix_(kept, kept)] = self._gram[np.ix_(old[kept], old[kept])]
        if len(new):
            rows = [f for f in texts if f not in known]
            for part, weight in self._kernel.items():
                block = weight * _dense(self._rows(rows, part) @ _columns(self._rows(texts, part)))
                gram[new] += block
                gram[np.ix_(kept, new)] += block[:, kept].T
        return gram


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
                total = sketch(p.inputs, self._kinds).sum(axis=0) + BARE_WEIGHT * sketch(p.bare, self._kinds).sum(
                    axis=0
                )
                p.sketch = unit(total)
        self._means = np.stack([p.sketch for p in pool if p.sketch is not None])

    def score(self, requests: Features) -> np.ndarray:
        return unit(sketch(requests, self._kinds)) @ self._means.T


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


def _counts(texts: Sequence[Features], kind: str) -> Any:
    from scipy.sparse import vstack

    return vstack([f.counts(kind) for f in texts if len(f)]).tocsr()


def _narrow(whole: np.ndarray) -> np.ndarray:
    """The same numbers in the smallest integer type that holds them."""
    ends = (int(whole.min(initial=0)), int(whole.max(initial=0)))
    return whole.astype(np.result_type(*map(np.min_scalar_type, ends)))


def _columns(rows: Any) -> Any:
    """The transpose; a sparse one is sorted by row again, once, or every product with it would do so."""
    return rows.T if isinstance(rows, np.ndarray) else rows.T.tocsr()


def _dense(product: Any) -> np.ndarray:
    return product if isinstance(product, np.ndarray) else product.toarray()


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
    """A scoring by its name, or by several names joined with "+"."""
    names = name.split("+")
    if unknown := [n for n in names if n not in SCORINGS]:
        raise InputError(f"scoring: expected {', '.join(SCORINGS)}, or a sum of them, found {unknown[0]!r}")
    return SCORINGS[name]() if len(names) == 1 else Sum([SCORINGS[n]() for n in names])
