"""The similarity below which a request is no adapter's: found by leaving inputs out, kept with the index, obeyed."""

import json
import logging
import runpy
from pathlib import Path

import numpy as np
import pytest
from index_profiles import PROFILES, Letters
from test_cli import run
from test_retrieval import PROFILES as BANK_PROFILES
from test_retrieval import PROMPTS

import meteora_jax as mj
from meteora_jax.config import InputError
from meteora_jax.retriever import calibration
from meteora_jax.retriever.wording import Frame, shared_frame
from meteora_jax.routing import NO_ADAPTER

POOL = {
    name: [text.format(word) for word in ("sea", "old house", "grey cat", "winter", "quick fox")]
    for name, text in {"ask": "Why is the {} so?", "tell": "Zzyzx {} zzyzx", "sum": "00 11 {} 22 33"}.items()
}


APART = {"low": ["aab", "abb", "aaab", "abbb", "ab"], "high": ["xxy", "xyy", "xz", "xyz", "xyzz"]}


@pytest.mark.parametrize("given", [POOL, APART])
def test_the_threshold_lies_between_inputs_left_out_and_what_they_are_to_others(given):
    """By NumPy: every input against the means of the others."""
    index = mj.Index.build(given, "cosine", Letters())
    vectors = {name: Letters().encode(texts, "").astype(np.float64) for name, texts in given.items()}
    best, others = [], []
    for left in range(5):
        means = [np.delete(rows, left, axis=0).mean(axis=0) for rows in vectors.values()]
        means = [m / np.linalg.norm(m) for m in means]
        for own, rows in enumerate(vectors.values()):
            scores = [rows[left] @ m / np.linalg.norm(rows[left]) for m in means]
            best.append(max(scores))
            others.append(max(scores[:own] + scores[own + 1 :]))
    assert (max(others) < min(best)) == (given is APART)  # 1 % of so few is the least, and the most
    expected = (min(best) + max(others)) / 2 if given is APART else min(best)
    assert index.threshold == pytest.approx(expected, abs=1e-6)
    pool = list(index._profiles.values())
    found = calibration.left_out(pool, lambda: mj.Index("cosine", Letters())._scoring, index._profile)
    np.testing.assert_allclose(found, np.stack([best, others], 1), atol=1e-6)


def test_more_inputs_than_fits_allow_are_spread(monkeypatch):
    monkeypatch.setattr(calibration, "FITTED", 30)  # two fits of fifteen
    index = mj.Index.build(POOL, "cosine", Letters())
    pool = list(index._profiles.values())
    assert len(calibration.left_out(pool, lambda: mj.Index("cosine", Letters())._scoring, index._profile)) == 6


@pytest.mark.parametrize("scoring", ["lexical", "bm25", "hybrid"])
def test_every_scoring_has_one_of_its_own_and_an_index_keeps_it(tmp_path, scoring, monkeypatch):
    if scoring == "hybrid":
        monkeypatch.setattr(Letters, "save", lambda self, folder: folder.mkdir())
        monkeypatch.setattr("meteora_jax.retriever.encoder.TextEncoder.load", lambda folder: Letters())
    index = mj.Index.build(POOL, scoring, Letters() if scoring == "hybrid" else None)
    index.save(tmp_path / "index")
    monkeypatch.setattr("meteora_jax.retriever.index.calibrate", None)  # not again
    kept = mj.Index.load(tmp_path / "index")
    assert kept.threshold == pytest.approx(index.threshold)
    assert kept.scores(["Why is the winter so?"]).max() > kept.threshold
    assert kept.scores(["qqq 77 ÄÖ"]).max() < kept.threshold


def test_it_follows_the_pool():
    index = mj.Index.build(POOL)
    before = index.threshold
    index.remove(["tell"])
    index.add({"tell": POOL["tell"][:3]})
    assert index.threshold not in (None, before)
    index.add({"described": ["Counts the apples of a shop"]})
    assert index.threshold is None  # nothing is left of it to compare its input with
    index.remove(["described"])
    assert index.threshold is not None


def test_an_index_of_before_says_that_it_has_none(tmp_path, caplog):
    mj.Index.build(POOL).save(tmp_path / "index")
    raw = json.loads((tmp_path / "index/index.json").read_text())
    (tmp_path / "index/index.json").write_text(json.dumps({k: v for k, v in raw.items() if k != "threshold"}))
    with caplog.at_level(logging.WARNING):
        index = mj.Index.load(tmp_path / "index")
    assert index.threshold is None
    assert "no threshold" in caplog.text
    found = (("ask", -100.0),)
    assert mj.Retrieval(index).router(found).adapters == (("ask", 1.0),)
    (tmp_path / "index/index.json").write_text(json.dumps({**raw, "threshold": "much"}))
    with pytest.raises(InputError, match="malformed"):
        mj.Index.load(tmp_path / "index")


def test_a_request_that_is_nobody_s_goes_to_the_base_alone(world):
    model, index = world["model"], mj.Index.build(BANK_PROFILES)
    similarity = float(index.scores(PROMPTS[:1]).max())
    routers = [
        mj.Retrieval(index, k=2, min_similarity=similarity + 0.01),
        mj.Retrieval(index, k=2, min_similarity=similarity - 0.01),
        mj.Retrieval(index, k=2, min_similarity=None), mj.GatesWithin(index, 2, min_similarity=similarity + 0.01),
        mj.GatesWithin(index, 2, min_similarity=similarity - 0.01), None,
    ]  # fmt: skip
    done = model.generate(PROMPTS[:1] * len(routers), routers, max_new_tokens=4)
    acts = [c.routing is not None and bool((c.routing.indices != NO_ADAPTER).any()) for c in done]
    assert acts == [False, True, True, False, True, False]
    assert done[0].token_ids == done[3].token_ids == done[5].token_ids
    assert done[0].routing.retrieved == done[1].routing.retrieved  # what was found is told all the same
    assert index.threshold is not None
    calibrated = mj.Retrieval(index).router((("apple", index.threshold - 1e-3),))
    assert calibrated.adapters == ()
    assert mj.Retrieval(index).router((("apple", index.threshold),)).adapters == (("apple", 1.0),)


@pytest.mark.parametrize("router", [mj.Retrieval, mj.GatesWithin])
def test_what_is_no_similarity_is_refused(router):
    for wrong in ("most", float("nan"), True):
        with pytest.raises(InputError, match="min_similarity: expected"):
            router(mj.Index.build(PROFILES), min_similarity=wrong)


def test_the_command_line_writes_and_shows_it(tmp_path, capsys):
    (tmp_path / "profiles.json").write_text(json.dumps(POOL))
    status, _, _ = run(capsys, "index", "build", tmp_path / "index", "--profiles", tmp_path / "profiles.json")
    assert status == 0
    built = json.loads((tmp_path / "index/index.json").read_text())["threshold"]
    assert run(capsys, "index", "remove", tmp_path / "index", "sum")[0] == 0
    removed = json.loads((tmp_path / "index/index.json").read_text())["threshold"]
    assert built != removed
    status, out, _ = run(capsys, "inspect", tmp_path / "index")
    assert status == 0
    assert f"{removed:.4f}".rstrip("0") in out


FRAMED = {name: [f"[INST] {text}. [/INST]\n" for text in texts] for name, texts in POOL.items()}


@pytest.mark.parametrize("scoring", ["lexical", "bm25", "tfidf-words", "tfidf-characters"])
def test_the_frame_of_all_inputs_makes_no_request_like_an_adapter_s(scoring):
    """In the frame or without it, a request is as much like each adapter, and the threshold the same."""
    bare = mj.Index.build({name: [f"{text}." for text in texts] for name, texts in POOL.items()}, scoring)
    index = mj.Index.build(FRAMED, scoring)
    assert index.profiles == {name: tuple(texts) for name, texts in FRAMED.items()}
    asked = ["Why is the grey sea so", "Tell me about beekeeping in Peru", "00 11 cat 22 33"]
    framed = index.scores([f"[INST] {text} [/INST]\n" for text in asked])
    assert np.array_equal(framed, bare.scores(asked))
    assert np.array_equal(framed, index.scores(asked))
    assert index.threshold == bare.threshold


def test_a_frame_is_that_of_the_pool_as_it_is_and_is_kept(tmp_path):
    index = mj.Index.build(FRAMED)
    index.save(tmp_path / "index")
    kept = mj.Index.load(tmp_path / "index")
    asked = ["[INST] Why is the sea so. [/INST]\n", "Zzyzx"]
    assert np.array_equal(kept.scores(asked), index.scores(asked))
    raw = json.loads((tmp_path / "index/index.json").read_text())
    assert raw["frame"] == ["[INST] ", " [/INST]\n"]
    # one that has none of it: what stands around the others' inputs tells them from it
    kept.add({"other": ["Nothing around this", "Nor around that"]})
    fresh = mj.Index.build({**FRAMED, "other": ["Nothing around this", "Nor around that"]})
    assert np.array_equal(kept.scores(asked), fresh.scores(asked))
    kept.remove(["other"])
    assert np.array_equal(kept.scores(asked), index.scores(asked))
    # a folder of before is read as it was written
    del raw["frame"]
    (tmp_path / "index/index.json").write_text(json.dumps(raw))
    assert mj.Index.load(tmp_path / "index").threshold == pytest.approx(index.threshold)
    (tmp_path / "index/index.json").write_text(json.dumps({**raw, "frame": ["a"]}))
    with pytest.raises(InputError, match="malformed"):
        mj.Index.load(tmp_path / "index")


def test_a_frame_is_what_most_texts_of_every_source_have():
    def shared(*sources):
        return tuple(shared_frame(sources))

    assert shared(["<s>a? [/I]", "<s>b? [/I]"], ["<s>c? [/I]", "<s>d? [/I]"]) == ("<s>", " [/I]")  # "?" is no frame's
    assert shared(["A: x", "A: y", "z"], ["A: v", "A: w"]) == ("A: ", "")
    assert shared(["A: x", "A: y", "z", "u"], ["A: v", "A: w"]) == ("", "")  # half is not most
    assert shared(["same"], ["same"]) == ("", "")  # something stands inside
    assert shared(["A: x", "A: y"]) == ("", "")  # may be the adapter's own
    frame = Frame("<s>", "</s>")
    assert [frame.inside(t) for t in ("<s>a</s>", "<s>a", "<s></s>", "a")] == ["a", "<s>a", "<s></s>", "a"]
    assert [frame.around(t) for t in (" a\n", "<s>a</s>")] == ["<s>a</s>", "<s>a</s>"]


def test_what_a_threshold_tells_apart(tmp_path, monkeypatch, capsys):
    """scripts/paper/similarities.py, against the index asked one text at a time."""
    tasks, names = tmp_path / "tasks", sorted(POOL)
    for name in names:
        (tasks / name).mkdir(parents=True)
        for split, texts in (("train", POOL[name][:3]), ("test", POOL[name][3:])):
            lines = [json.dumps({"prompt": text, "response": "so"}) for text in texts]
            (tasks / name / f"{split}.jsonl").write_text("\n".join(lines))
    (tmp_path / "general.txt").write_text("Why not?\nA 22 tells nothing\n")
    assert run(capsys, "index", "build", tmp_path / "index", "--tasks", tasks)[0] == 0
    index = mj.Index.load(tmp_path / "index")
    asked = [(name, text) for name in names for text in POOL[name][3:]]
    scores = {text: index.scores([text])[0] for _, text in asked}
    general = [index.scores([text])[0].max() for text in ("Why not?", "A 22 tells nothing")]
    hidden = [np.delete(scores[text], index.names.index(name)).max() for name, text in asked]
    more = np.mean([[(h > g) + (h == g) / 2 for g in general] for h in hidden])
    refused = np.mean([scores[text].max() < index.threshold for _, text in asked])
    file = Path(__file__).parents[1] / "scripts/paper/similarities.py"
    monkeypatch.setattr(
        "sys.argv",
        [str(file), str(tmp_path / "index"), "--tasks", str(tasks), "--general", str(tmp_path / "general.txt")],
    )
    runpy.run_path(str(file), run_name="__main__")
    said = capsys.readouterr().out
    assert f"own adapter hidden: more similar than a general request {more:.3f}" in said
    assert f"below the threshold: {refused:.2%} of the problems" in said
    assert "6 problems, 2 general requests" in said
