"""The index's scorings against their formulas and scikit-learn's own."""

import numpy as np
import pytest
from index_profiles import PROFILES, QUERIES, Letters
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.kernel_ridge import KernelRidge

from meteora_jax.config import InputError
from meteora_jax.retriever.features import Features, damp, ngrams
from meteora_jax.retriever.index import Index
from meteora_jax.retriever.named_scorings import SCORINGS
from meteora_jax.retriever.wording import Wording


@pytest.mark.parametrize("scoring", [*SCORINGS, "tfidf-words+cosine"])
def test_every_scoring_finds_the_obvious(scoring):
    index = Index.build(PROFILES, scoring, Letters())
    found = index.query(QUERIES, k=3)
    assert found.similarities.shape == (3, 3)
    assert (np.diff(found.similarities, axis=1) <= 0).all()
    assert all(sorted(row) == sorted(PROFILES) for row in found.names)
    lexical = not SCORINGS[scoring.split("+")[0]]().needs_encoder
    if lexical:  # counting letters is no way to tell tasks apart
        assert [row[0] for row in found.names] == ["translate", "count", "sentiment"]


def test_the_papers_scorings_equal_their_formula():
    def encode(texts):
        return Letters().encode(texts, "").astype(np.float64)

    means = np.stack([encode(inputs).mean(0) for inputs in PROFILES.values()])
    q = encode(QUERIES)
    inner = Index.build(PROFILES, "inner-product", Letters()).scores(QUERIES)
    assert np.allclose(inner, q @ means.T, rtol=1e-5)
    cosine = Index.build(PROFILES, "cosine", Letters()).scores(QUERIES)
    norms = np.linalg.norm(q, axis=1)[:, None] * np.linalg.norm(means, axis=1)
    assert np.allclose(cosine, q @ means.T / norms, atol=1e-6)


def test_the_instruction_stands_before_every_text():
    plain = Index.build(PROFILES, "inner-product", Letters()).scores(QUERIES)
    marked = Index.build(PROFILES, "inner-product", Letters(), "zzzzz ").scores(QUERIES)
    assert np.allclose(marked, plain + 25, rtol=1e-5)  # five z in the query times five in the profile


def test_tfidf_equals_scikit_learn():
    texts = [t for inputs in PROFILES.values() for t in inputs]
    vectorizer = TfidfVectorizer().fit(texts)
    means = np.stack([vectorizer.transform(i).toarray().mean(0) for i in PROFILES.values()])
    want = vectorizer.transform(QUERIES).toarray() @ (means / np.linalg.norm(means, axis=1, keepdims=True)).T
    assert np.allclose(Index.build(PROFILES, "tfidf-words").scores(QUERIES), want, atol=1e-6)


def test_the_regression_equals_scikit_learns_kernel_ridge():
    """The dense kernel alone, no input without its shared wording, three inputs an adapter: KernelRidge's formula."""
    from meteora_jax.retriever.ridge import Ridge
    from meteora_jax.retriever.scoring import Profile

    pool = [list(inputs)[:2] for inputs in PROFILES.values()]
    ridge = Ridge({"words": 0.5, "characters": 0.5}, penalty=0.3)
    ridge.fit([Profile(Features(i, None), Features([], None)) for i in pool])
    texts = [t for inputs in pool for t in inputs]

    def gram(a, b):
        return sum(0.5 * (ngrams(a, k) @ ngrams(b, k).T).toarray() for k in ("words", "characters"))

    model = KernelRidge(alpha=0.3 * 2 / 20, kernel="precomputed").fit(gram(texts, texts), np.repeat(np.eye(3), 2, 0))
    want = model.predict(gram(QUERIES, texts))
    assert np.allclose(ridge.score(Features(QUERIES, None)), want, atol=1e-5)


def test_a_pool_too_large_for_the_regression_is_scored_by_means(tmp_path, monkeypatch):
    """The kernel's means, but for what folding n-grams into few buckets costs; kept with the index; no cliff."""
    monkeypatch.setattr("meteora_jax.retriever.scoring.MOST_RIDGE_INPUTS", 14)
    many = {**PROFILES, "poem": ["Write a poem about the sea", "Write a poem about tea"]}
    small = Index.build(PROFILES)
    assert (small.large, sum(len(t) for t in PROFILES.values())) == (False, 7)
    index = Index.build(PROFILES)
    index.query(QUERIES)
    index.add({"poem": many["poem"]})
    assert index.large
    kinds, mean = ("words", "edges", "characters"), {}
    for name, inputs in many.items():
        wording = Wording(inputs, least=2)
        texts = [(1.0, t) for t in inputs] + [(0.3, t) for t in map(wording.remove, inputs) if t]
        parts = [sum(w * ngrams([t], kind).toarray()[0] for w, t in texts) for kind in kinds]
        mean[name] = np.concatenate(parts)
    rows = [
        np.concatenate([ngrams([q], kind).toarray()[0] for kind in ("words", "edges", "characters")]) for q in QUERIES
    ]

    def cosine(a, b):
        return a @ b / np.linalg.norm(a) / np.linalg.norm(b)

    want = [[cosine(row, m) for m in mean.values()] for row in rows]
    assert np.abs(index.scores(QUERIES) - want).max() < 3 / 64  # 1/sqrt(4096), three deviations
    assert [n[0] for n in index.query(QUERIES, 1).names] == ["translate", "count", "sentiment"]
    index.save(tmp_path / "index")
    loaded = Index.load(tmp_path / "index")
    assert all(p.sketch is not None for p in loaded._profiles.values())
    assert np.array_equal(loaded.scores(QUERIES), index.scores(QUERIES))
    loaded.remove(["poem"])
    assert not loaded.large
    assert np.allclose(loaded.scores(QUERIES), small.scores(QUERIES), atol=1e-6)
    with pytest.raises(InputError, match="expected at most 14 inputs"):
        Index.build({n: [*i, *"abcdefg"] for n, i in many.items()}, "dense", Letters()).fit()


def test_ngrams_are_cosines_of_what_they_say():
    a, b = ngrams(["ab", "abc"], "characters").toarray()
    assert np.isclose(a @ b, 1 / np.sqrt(3))  # {ab} and {ab, bc, abc}
    c, d = ngrams(["yes, no", "yes no"], "words").toarray()
    assert np.isclose(c @ d, 2 / np.sqrt(6 * 3))  # "," is a word: yes no are shared, their pair is not


def test_counts_beyond_a_narrow_type_keep_their_sign():
    assert np.allclose(damp(np.asarray([-128, 127, 0, 1], np.int8)), [-1 - np.log(128), 1 + np.log(127), 0, 1])


def test_shared_wording_is_removed_and_content_stays():
    texts = [
        "Is the following sentence true or false?\nCats bark.\nOPTIONS:\n- no\n- yes",
        "Is the following sentence true or false?\nWater is wet and the sea salty.\nOPTIONS:\n- no\n- yes",
        "Pick one, the following sentence true or false?\nSnow\nOPTIONS:\n- black snow\n- yes",
    ]
    wording = Wording(texts, least=2)
    assert wording.remove(texts[0]) == "Cats bark."
    assert wording.remove(texts[1]) == "Water is wet and the sea salty."
    assert wording.remove(texts[2]) == "Pick one, \nSnow\n- black snow"
    assert wording.remove("Is the following sentence true or false?") == ""
    strict = Wording(["the sea salty"], least=1)
    assert strict.remove("Water is wet and the sea salty.") == "Water is wet and ."
