"""Kernel ridge regression from a request to its adapter."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import cast

import numpy as np

from meteora_jax.config import InputError
from meteora_jax.retriever import scoring
from meteora_jax.retriever.features import (
    EDGE,
    WIDTH,
    Features,
    SparseRows,
    count_ngrams,
    damp,
    row_lengths,
    unit,
    weigh,
)
from meteora_jax.retriever.scoring import BARE_WEIGHT, Profile, Scoring

FIT_FORMAT = 1  # of what `Ridge.fitted` gives
COLUMN_PARTS = ("sizes", "inputs", "counts", "lengths")
PROBE = "Ends, in 2 wörter: don't stop?\n- yes"  # whatever counts its n-grams otherwise is no reader of a saved fit


class Ridge(Scoring):
    """Discriminative: kernel ridge regression from an input to its adapter, one target an adapter.

    The kernel is a weighted sum of cosines: n-grams of words, of a text's first and last words and of characters, or
    vectors. Every adapter weighs the same, however many inputs it has. With n-grams each input is learnt a second time
    without the wording it shares with its adapter's others, at `bare_weight`: templates are then not all that is known.
    Weights and penalty were chosen by cross-validation over profiles (docs/lab-notes.md).
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
        if (total := sum(sizes)) > scoring.MOST_RIDGE_INPUTS:
            raise InputError(
                f"index: expected at most {scoring.MOST_RIDGE_INPUTS} inputs (with their bare forms) for a regression, "
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
            starts = np.concatenate([[0], np.cumsum(sizes, dtype=np.int32)])
            columns[kind] = csr_matrix(
                (damp(counts) / lengths[inputs], inputs.astype(np.int32), starts), (WIDTH, total)
            )
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
        digest.update(json.dumps([settings, [f.insides for f in texts]]).encode())
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

    def _rows(self, texts: Sequence[Features], part: str) -> np.ndarray | SparseRows:
        if part == "vectors":
            return np.concatenate([unit(f.vectors()) for f in texts if len(f)]).astype(np.float64)
        return weigh(_counts(texts, part))

    def _update(self, texts: list[Features], penalties: np.ndarray) -> None:
        """The kernel between all inputs, and the Cholesky factor (lower) of kernel + diag(penalties).

        Inputs that came at the end only lengthen the factor, O(N^2) each; where some went it is computed anew, O(N^3).
        """
        from scipy.linalg import cholesky, solve_triangular

        old = len(self._factor) if texts[: len(self._texts)] == self._texts else 0
        factor, self._factor = self._factor, np.zeros((0, 0))
        self._gram, self._texts = self._update_gram(texts), texts
        corner = self._gram[old:, old:] + np.diag(penalties[old:])
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


def _counts(texts: Sequence[Features], kind: str) -> SparseRows:
    from scipy.sparse import vstack

    return cast("SparseRows", vstack([f.counts(kind) for f in texts if len(f)]).tocsr())


def _narrow(whole: np.ndarray) -> np.ndarray:
    """The same numbers in the smallest integer type that holds them."""
    range_of = (int(whole.min(initial=0)), int(whole.max(initial=0)))
    return whole.astype(np.result_type(*map(np.min_scalar_type, range_of)))


def _columns(rows: np.ndarray | SparseRows) -> np.ndarray | SparseRows:
    """The transpose; a sparse one is sorted by row again, once, or every product with it would do so."""
    return rows.T if isinstance(rows, np.ndarray) else rows.T.tocsr()


def _dense(product: np.ndarray | SparseRows) -> np.ndarray:
    return product if isinstance(product, np.ndarray) else product.toarray()
