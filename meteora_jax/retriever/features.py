"""What texts are compared by: hashed n-grams and an encoder's vectors, computed once and kept with the texts."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol, cast, runtime_checkable

import numpy as np

from meteora_jax.config import InputError
from meteora_jax.retriever.wording import NO_FRAME, Frame

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix as SparseRows
else:  # scipy is optional
    SparseRows = Any

WIDTH = 2**20  # buckets of the hashed n-grams: a text of a thousand characters fills about three thousand of them
SKETCH = 2**12  # buckets of a sketch, where a pool is too large for more
EDGE = 150  # characters at each end of a text, where instructions stand


@runtime_checkable
class Encoder(Protocol):
    """Text -> vector; `meteora_jax.retriever.encoder.TextEncoder` is one."""

    def encode(self, texts: Sequence[str], instruction: str) -> np.ndarray:
        """float32 [N, D] of N texts, each behind the instruction."""
        ...

    def cut(self, texts: Sequence[str], instruction: str) -> list[int]:
        """Places of the texts that are longer than what is read of one."""
        ...

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes what `TextEncoder.load` reads."""
        ...


def sklearn(module: str) -> ModuleType:
    """A module of scikit-learn; its absence is one line that names the extra to install."""
    import importlib

    try:
        return importlib.import_module(f"sklearn.{module}")
    except ImportError:
        raise InputError("scikit-learn: expected it for lexical retrieval, found none (extra 'retrieve')") from None


@functools.cache
def _hasher(kind: str) -> Any:
    shared: dict[str, Any] = dict(n_features=WIDTH, alternate_sign=True, norm=None)
    vectorizer = sklearn("feature_extraction.text").HashingVectorizer
    if kind == "characters":
        return vectorizer(analyzer="char", ngram_range=(2, 5), lowercase=False, **shared)
    # punctuation marks are words: templates differ by "????" or "- yes" alone
    return vectorizer(ngram_range=(1, 3), token_pattern=r"\w+|[^\w\s]", **shared)


def count_ngrams(texts: Sequence[str], kind: str) -> SparseRows:
    """Hashed n-grams, scipy CSR int32 [N, WIDTH]: how often each occurs, with the sign that its hash gives it.

    kind: "words" (1 to 3 in a row), "edges" (the same of a text's first and last 150 characters) or "characters"
    (2 to 5).
    """
    if kind == "edges":
        texts = [f"{text[:EDGE]} \x01 {text[-EDGE:]}" for text in texts]
    return _hasher(kind).transform(texts).tocsr().astype(np.int32)


def damp(counts: np.ndarray) -> np.ndarray:
    """float64, 1 + log(count) with the count's sign; from a table: equal counts give equal bits wherever they stand."""
    magnitudes = np.abs(counts.astype(np.int32))  # in a narrow type the most negative number has no positive
    table = 1 + np.log(np.maximum(np.arange(int(magnitudes.max(initial=0)) + 1), 1))
    return np.sign(counts) * table[magnitudes]


def row_lengths(counts: SparseRows) -> np.ndarray:
    """float64 [N]: what the rows of damped counts are divided by."""
    squares = counts.astype(np.float64)
    squares.data = damp(counts.data) ** 2
    return np.maximum(np.sqrt(np.asarray(squares.sum(axis=1)).ravel()), 1e-12)


def weigh(counts: SparseRows) -> SparseRows:
    """Damped counts, scipy CSR float64 [N, WIDTH], each row of length 1 (of 0 for an empty text).

    No document frequencies: they would change with every adapter that comes or goes, and in cross-validation over
    profiles the regressions were no better for them.
    """
    rows = counts.astype(np.float64)
    rows.data = damp(counts.data) / np.repeat(row_lengths(counts), np.diff(counts.indptr))
    return cast("SparseRows", rows)


def ngrams(texts: Sequence[str], kind: str) -> SparseRows:
    """`weigh(count_ngrams(texts, kind))`."""
    return weigh(count_ngrams(texts, kind))


def sketch(texts: Features, kinds: Mapping[str, float]) -> np.ndarray:
    """float32 [N, SKETCH]: n-grams of several kinds folded into few buckets.

    The inner product of two rows is the sum over `kinds` of weight times the n-grams' own, give or take 1/sqrt(SKETCH):
    a count sketch (Charikar et al., 2002), the hash that has placed and signed the n-grams taken modulo SKETCH.
    """
    from scipy.sparse import csr_matrix

    total = np.zeros((len(texts), SKETCH), np.float32)
    for kind, weight in kinds.items():
        rows = ngrams(texts.insides, kind)  # not kept: they are large, and a sketch is computed once
        folded = csr_matrix((rows.data, rows.indices % SKETCH, rows.indptr), shape=total.shape)
        total += (np.sqrt(weight) * folded).toarray().astype(np.float32)
    return total


def unit(rows: np.ndarray) -> np.ndarray:
    """Rows scaled to length 1; a row of zeros stays one."""
    return rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-12)


class Features:
    """Some texts with what has been computed from them so far.

    `vectors` (float32 [N, D]) may be given, as they were saved; otherwise the encoder makes them when asked for, of the
    whole texts. Words and characters are those of `insides`: the texts without the frame.
    """

    def __init__(
        self, texts: Sequence[str], encoder: Encoder | None, instruction: str = "", vectors: np.ndarray | None = None,
        frame: Frame = NO_FRAME,
    ):  # fmt: skip
        self.texts, self._frame = tuple(texts), frame
        self.computed_vectors = vectors
        self._encoder, self._instruction = encoder, instruction
        self._counts: dict[str, SparseRows] = {}

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def insides(self) -> tuple[str, ...]:
        """What of the texts is compared by its words."""
        return tuple(map(self._frame.inside, self.texts))

    def part(self, at: Sequence[int]) -> Features:
        """Those at these places, with what is known of them."""
        rows, vectors = list(at), self.computed_vectors
        known = None if vectors is None else vectors[rows]
        part = Features([self.texts[i] for i in rows], self._encoder, self._instruction, known, self._frame)
        part._counts = {kind: cast("SparseRows", counts[rows]) for kind, counts in self._counts.items()}
        return part

    def counts(self, kind: str) -> SparseRows:
        """See `count_ngrams`."""
        if kind not in self._counts:
            self._counts[kind] = count_ngrams(self.insides, kind)
        return self._counts[kind]

    def vectors(self) -> np.ndarray:
        """float32 [N, D] as the encoder gives them, each text behind the instruction."""
        if self.computed_vectors is None:
            if self._encoder is None:
                raise InputError("index: expected an encoder for this scoring, found an index without one")
            self.computed_vectors = self._encoder.encode(self.texts, self._instruction)
        return self.computed_vectors
