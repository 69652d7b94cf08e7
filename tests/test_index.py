"""The index: scorings against their formulas, adapters that come and go, folders that are whole or refused."""

import json
import time

import numpy as np
import pytest
from index_profiles import PROFILES, QUERIES, Letters
from safetensors.numpy import load_file, save_file
from sklearn.feature_extraction.text import HashingVectorizer

import meteora_jax as mj
from meteora_jax.config import InputError
from meteora_jax.retriever.index import Index, spread, text_problems, top
from meteora_jax.retriever.named_scorings import SCORINGS, Lexical
from meteora_jax.retriever.profiles import read_profiles, read_training_file


@pytest.mark.parametrize("scoring", ["cosine", "lexical", "hybrid", "bm25", "whitened"])
def test_adapters_come_and_go_as_if_built_so(scoring):
    encoder = Letters()
    index = Index.build({k: PROFILES[k] for k in ("sentiment", "translate")}, scoring, encoder)
    index.query(QUERIES, k=1)
    index.add({"count": PROFILES["count"]})
    whole = Index.build({k: PROFILES[k] for k in index.names}, scoring, Letters())
    assert np.allclose(index.scores(QUERIES), whole.scores(QUERIES), atol=1e-5)
    index.remove(["sentiment"])
    after = index.scores(QUERIES)
    fresh = Index.build({k: PROFILES[k] for k in ("translate", "count")}, scoring, Letters())
    assert index.names == fresh.names
    assert np.allclose(after, fresh.scores(QUERIES), atol=1e-5)


def test_adding_encodes_only_what_is_new():
    encoder = Letters()
    index = Index.build(PROFILES, "cosine", encoder)
    index.fit()
    before = encoder.calls
    index.add({"more": ["Something else"]})
    index.fit()
    assert encoder.calls == before + 1


def test_excluded_adapters_are_not_found():
    index = Index.build(PROFILES)
    found = index.query(QUERIES, k=2, exclude=[["translate"], [], ["sentiment"]])
    free = index.query(QUERIES, k=3)
    assert "translate" not in found.names[0]
    assert found.names[1] == free.names[1][:2]
    assert found.names[0] == tuple(n for n in free.names[0] if n != "translate")
    assert "sentiment" not in found.names[2]


def test_ties_go_to_the_adapter_added_first():
    found = top(np.asarray([[0.5, 0.7, 0.7, 0.1]], np.float32), "abcd", 3)
    assert found.names == [("b", "c", "a")]


def test_a_saved_index_answers_the_same(tmp_path):
    index = Index.build(PROFILES)
    index.save(tmp_path / "index")
    index.add({"more": ["Something else altogether"]})
    index.save(tmp_path / "index")  # replaces
    loaded = mj.Index.load(tmp_path / "index")
    assert loaded.names == index.names
    assert loaded.profiles == index.profiles
    assert np.array_equal(loaded.scores(QUERIES), index.scores(QUERIES))
    assert [p.name for p in tmp_path.iterdir()] == ["index"]


def spoil_fit(monkeypatch):
    """From here on a regression that is fitted is a failure."""
    monkeypatch.setattr("meteora_jax.retriever.ridge.Ridge.fit", lambda *_: 1 / 0)


@pytest.mark.parametrize("scoring", ["lexical", "hybrid", "dense", "cosine+lexical"])
def test_a_saved_fit_is_read_and_not_made_again(tmp_path, monkeypatch, caplog, scoring):
    """The same bits, from the index that was fitted, the folder it was saved in and the folder that one is saved in."""
    many = {f"{n}{i}": [f"{t} {i} {'very ' * 300 * i}" for t in own] for n, own in PROFILES.items() for i in range(2)}
    monkeypatch.setattr(Letters, "save", lambda self, folder: folder.mkdir())
    monkeypatch.setattr("meteora_jax.retriever.encoder.TextEncoder.load", lambda folder: Letters())
    index = Index.build(many, scoring, Letters())
    want = index.scores(QUERIES)
    index.save(tmp_path / "index")
    spoil_fit(monkeypatch)
    loaded = Index.load(tmp_path / "index")
    assert np.array_equal(loaded.scores(QUERIES), want)
    loaded.save(tmp_path / "again")
    assert (tmp_path / "again" / "fit.safetensors").read_bytes() == (
        tmp_path / "index" / "fit.safetensors"
    ).read_bytes()
    assert np.array_equal(Index.load(tmp_path / "again").scores(QUERIES), want)
    assert not caplog.records


@pytest.mark.parametrize("change", ["input", "order", "setting", "hash", "part", "none", "format"])
def test_a_fit_of_something_else_is_made_again_and_said(tmp_path, monkeypatch, caplog, change):
    folder = tmp_path / "index"
    Index.build(PROFILES).save(folder)
    path, fit = folder / "index.json", folder / "fit.safetensors"
    raw = json.loads(path.read_text())
    if change == "input":
        raw["adapters"][0]["inputs"][0] += "?"
    elif change == "order":
        raw["adapters"].reverse()
    elif change == "setting":
        monkeypatch.setitem(SCORINGS, "lexical", lambda: Lexical({"words": 0.5, "edges": 0.25, "characters": 0.25}))
    elif change == "hash":  # as another version of the library that hashes might
        monkeypatch.setattr("meteora_jax.retriever.features._hasher", lambda kind: HashingVectorizer(norm=None))
    elif change == "format":
        monkeypatch.setattr("meteora_jax.retriever.ridge.FIT_FORMAT", 2)
    elif change == "part":
        kept = load_file(fit)
        del kept["edges.lengths"]
        save_file(kept, fit)
    else:
        fit.unlink()
    path.write_text(json.dumps(raw))
    inputs = {a["name"]: a["inputs"] for a in raw["adapters"]}
    loaded = Index.load(folder)
    scores = loaded.scores(QUERIES)
    assert len(caplog.records) == 1
    said = "found none" if change == "none" else "found that of others"
    assert f"fit.safetensors: expected the fit of these profiles, {said}: fitting again" in caplog.text
    if change == "input":  # what its adapter's inputs share was settled when it joined
        assert not np.array_equal(scores, Index.build(PROFILES).scores(QUERIES))
    else:
        assert np.array_equal(scores, Index.build(inputs).scores(QUERIES))
    caplog.clear()
    loaded.save(folder)
    spoil_fit(monkeypatch)
    assert np.array_equal(Index.load(folder).scores(QUERIES), scores)
    assert not caplog.records


def test_adapters_join_and_leave_a_saved_fit(tmp_path, caplog):
    """In a loaded index nothing of the saved fit stays, and nothing is said: it was its own."""
    Index.build(PROFILES).save(tmp_path / "index")
    index = Index.load(tmp_path / "index")
    index.scores(QUERIES)
    index.add({"poem": ["Write a poem about the sea", "Write a poem about tea"]})
    index.remove(["count"])
    left = {n: PROFILES[n] for n in ("translate", "sentiment")}
    fresh = Index.build({**left, "poem": index.profiles["poem"]})
    assert np.allclose(index.scores(QUERIES), fresh.scores(QUERIES), atol=1e-6)
    index.save(tmp_path / "index")
    assert np.array_equal(Index.load(tmp_path / "index").scores(QUERIES), index.scores(QUERIES))
    (tmp_path / "index" / "fit.safetensors").write_bytes(b"\x08\x00")
    with pytest.raises(InputError, match=r"fit\.safetensors: expected a complete safetensors file"):
        Index.load(tmp_path / "index")
    assert not caplog.records


def test_a_failed_save_leaves_the_old_index(tmp_path, monkeypatch):
    Index.build(PROFILES).save(tmp_path / "index")
    monkeypatch.setattr("meteora_jax.retriever.index.write_json", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        Index.build({"other": ["x y z"]}).save(tmp_path / "index")
    assert Index.load(tmp_path / "index").names == tuple(PROFILES)
    assert [p.name for p in tmp_path.iterdir()] == ["index"]


def test_save_refuses_somebody_s_folder(tmp_path, monkeypatch):
    folder, index = tmp_path / "folder", Index.build(PROFILES)
    folder.mkdir()
    (folder / "thesis.tex").write_text("precious")
    with pytest.raises(InputError, match=r"expected index\.json in what is replaced, found thesis\.tex and no index"):
        index.save(folder)
    (folder / "index.json").write_text("{}")
    monkeypatch.setattr(Index, "fit", lambda self: 1 / 0)  # refused before any work
    with pytest.raises(InputError, match=r"expected nothing but index\.json, .*ranking\.json in .*, found thesis\.tex"):
        index.save(folder)
    assert (folder / "thesis.tex").read_text() == "precious"
    monkeypatch.undo()
    (folder / "thesis.tex").unlink()
    (folder / "ranking.json").write_text("{}")
    index.save(folder)
    assert sorted(p.name for p in folder.iterdir()) == ["fit.safetensors", "index.json"]


def test_ten_thousand_adapters_cost_one_matmul():
    """Exact, and no slower than ten times the product and the sort that it cannot do without."""
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((10_001, 384)).astype(np.float32)

    class Given:
        def encode(self, texts, instruction):
            return vectors[[int(t) for t in texts]]

        def cut(self, texts, instruction):
            return []

        def save(self, folder):
            raise NotImplementedError

    index = Index.build({f"a{i}": [str(i)] for i in range(10_000)}, "cosine", Given())
    rows = vectors[:10_000] / np.linalg.norm(vectors[:10_000], axis=1, keepdims=True)
    query = vectors[10_000:]

    def timed(call):
        start = time.perf_counter()
        return call(), time.perf_counter() - start

    index.fit()
    ours, bare, found, order = [], [], None, np.zeros((1, 0), int)
    for _ in range(7):  # side by side, so that a busy machine slows both
        found, seconds = timed(lambda: index.query(["10000"], k=3))
        ours.append(seconds)
        order, seconds = timed(lambda: np.argsort(-(query @ rows.T), axis=1, kind="stable"))
        bare.append(seconds)
    assert list(found.names[0]) == [f"a{i}" for i in order[0, :3]]
    assert min(ours) < 10 * min(bare) + 0.02


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: Index.build({"a": []}), "profile 'a': expected 1 to 20 inputs, found 0"),
        (lambda: Index.build({"a": ["x"] * 21}), "found 21"),
        (lambda: Index.build({"a": "text"}), "found a single text"),
        (lambda: Index.build({"a": ["fine", " "], "": ["x"]}), "input 1: expected a text"),
        (lambda: Index.build(PROFILES, "cosine"), "scoring 'cosine': expected an encoder"),
        (lambda: Index.build(PROFILES, "magic"), "found 'magic'"),
        (lambda: Index.build(PROFILES).add({"count": ["x"]}), "expected a new adapter"),
        (lambda: Index.build(PROFILES).remove(["nobody"]), "found 'nobody'"),
        (lambda: Index.build(PROFILES).query(QUERIES, k=0), "k: expected at least 1"),
        (lambda: Index.build(PROFILES).query("text"), "found a single text"),
        (lambda: Index.build(PROFILES).query("text", exclude=["count"]), "found a single text"),
        (lambda: Index.build(PROFILES).query(["x"], exclude=["count"]), "exclude: expected a collection of names"),
        (lambda: Index.build(PROFILES).query(["x"], exclude=[list(PROFILES)]), "expected an adapter that text 0 may"),
        (lambda: Index.build(PROFILES).query([" \n"]), "query: text 0: expected a text, found ' \\n'"),
        (lambda: Index.build(PROFILES).query(["hi \ud83d"]), "query: text 0: expected text that UTF-8 can hold"),
        (lambda: Index.build(PROFILES).remove("count"), "found the single text 'count'"),
        (lambda: Index.build({"a": ["x", "\udcff"]}), "profile 'a': input 1: expected text that UTF-8 can hold"),
        (lambda: Index.build({"a\ud83d": ["x"]}), "name: expected text that UTF-8 can hold"),
        (lambda: Index(instruction="\ud83d"), "instruction: expected text that UTF-8 can hold"),
        (lambda: Index.build(PROFILES).query(["x"], 1, exclude=[["nobody"]]), "found 'nobody'"),
        (lambda: Index.build(PROFILES).query(["x"], 1, exclude=[]), "expected 1 collections"),
        (lambda: Index().query(["x"]), "expected at least one adapter"),
    ],
)
def test_bad_input_is_refused(call, said):
    with pytest.raises(InputError, match="expected") as refusal:
        call()
    assert said in str(refusal.value)


def test_what_is_no_text_is_refused_by_its_place():
    assert text_problems(["x", 5, None], lambda i: f"text {i}") == [
        "text 1: expected a text, found 5", "text 2: expected a text, found None",
    ]  # fmt: skip


def test_a_small_pool_gives_all_it_has():
    index = Index.build(PROFILES)
    free = index.query(QUERIES, k=3)
    found = index.query(QUERIES, k=9)
    assert found.names == free.names
    assert np.array_equal(found.similarities, free.similarities)
    one = Index.build({"count": PROFILES["count"]})
    assert one.query(QUERIES).names == [("count",)] * len(QUERIES)
    found = index.query(QUERIES[:2], k=3, exclude=[["translate"], []])
    assert found.names == [tuple(n for n in free.names[0] if n != "translate"), free.names[1]]
    assert np.isneginf(found.similarities[0, 2])
    assert np.isfinite(found.similarities[1]).all()


def test_profiles_and_training_files_are_read_as_any_lines_are(tmp_path):
    """Line ends of Windows, U+2028 inside a text, and blank lines at the end are fine."""
    train = tmp_path / "train.jsonl"
    train.write_bytes('{"prompt": "x\u2028y"}\r\n{"prompt": "z"}\r\n\r\n\n'.encode())
    assert read_training_file(train) == ["x\u2028y", "z"]
    for lines, said in (
        (b'{"prompt": "x"}\n\n{"prompt": "y"}\n', r"train\.jsonl:2: expected a JSON object, found a blank line"),
        (b'{"prompt": "x"}\n{"prompt": 3}\n', r"train\.jsonl:2: prompt: expected a string, found 3"),
        (b'{"prompt": "x"}\n{"prompt": "\\ud83d"}\n', r"train\.jsonl:2: prompt: expected text that UTF-8 can hold"),
        (b'{"prompt": "x"}\n{"prompt": "\xff"}\n', r"train\.jsonl:2: expected"),
    ):
        train.write_bytes(lines)
        with pytest.raises(InputError, match=said):
            read_training_file(train)
    profiles = tmp_path / "profiles.json"
    for text, said in (
        (r'{"a": ["x", "hi \ud83d"]}', r"profiles\.json: profile 'a': input 1: expected text that UTF-8 can hold"),
        (r'[{"model_name": "a", "sample": [{"inputs": "\ud83d"}]}]', r"profiles\.json: profile 'a': input 0: expected"),
        ('{"a": {"x": 1}}', r"profiles\.json: profile 'a': expected 1 to 20 inputs, found dict"),
    ):
        profiles.write_text(text)
        with pytest.raises(InputError, match=said):
            read_profiles(profiles)


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda d: d.update(format="other"), "expected 'meteora-index-1'"),
        (lambda d: d.pop("adapters"), "malformed"),
        (lambda d: d["adapters"].append(d["adapters"][0]), "found one twice"),
        (lambda d: d["adapters"][0].update(inputs=[]), "found 0"),
        (lambda d: d.update(scoring="magic"), "magic"),
    ],
)
def test_a_damaged_index_is_refused(tmp_path, edit, said):
    Index.build(PROFILES).save(tmp_path / "index")
    path = tmp_path / "index" / "index.json"
    raw = json.loads(path.read_text())
    edit(raw)
    path.write_text(json.dumps(raw))
    with pytest.raises(InputError, match="expected") as refusal:
        Index.load(tmp_path / "index")
    assert said in str(refusal.value)


def test_profiles_from_files(tmp_path):
    plain, release = tmp_path / "plain.json", tmp_path / "release.json"
    plain.write_text(json.dumps({"a": ["x", "y"]}))
    release.write_text(json.dumps([{"model_name": "a", "sample": [{"inputs": "x", "targets": "1"}, {"inputs": "y"}]}]))
    assert read_profiles(plain) == read_profiles(release) == {"a": ["x", "y"]}
    for wrong in ({"a": "text"}, [{"name": "a"}], {"a": []}, 3):
        plain.write_text(json.dumps(wrong))
        with pytest.raises(InputError, match=r"plain\.json"):
            read_profiles(plain)
    train = tmp_path / "train.jsonl"
    train.write_text("".join(json.dumps({"prompt": f"p{i % 50}", "response": "r"}) + "\n" for i in range(100)))
    inputs = read_training_file(train)
    assert len(inputs) == len(set(inputs)) == 20
    assert inputs == read_training_file(train) == spread([f"p{i}" for i in range(50)])
    train.write_text('{"prompt": "x"}\n{"question": "y"}\n')
    with pytest.raises(InputError, match=r"train\.jsonl:2"):
        read_training_file(train)
