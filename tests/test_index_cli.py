"""`meteora index`, `import encoder`, `train retriever` and `generate --index`: files in, figures and text out."""

import inspect
import io
import json
import os

import numpy as np
import pytest
from extent import parameters
from test_cli import refused, run
from test_encoder import sentence_folder
from test_retrieval import PROFILES, PROMPTS

import meteora_jax as mj
from meteora_jax.config import InputError
from meteora_jax.retriever import evaluation
from meteora_jax.retriever.evaluation import Query
from meteora_jax.retriever.features import ngrams
from meteora_jax.retriever.ranking import write_ranking


@pytest.fixture
def profiles(tmp_path):
    path = tmp_path / "profiles.json"
    path.write_text(json.dumps(PROFILES))
    return path


@pytest.fixture
def queries(tmp_path):
    path = tmp_path / "queries.json"
    texts = {
        "apple": "Translate to German: my garden grows",
        "birch": "Great fun. Is this positive or negative?",
        "cedar": "How many plums are 1 plums and 6 plums?",
        "daisy": "Write a poem about garden gnomes",
    }
    rows = [{"inputs": t, "task": n, "domain": "words" if n in ("apple", "daisy") else "x"} for n, t in texts.items()]
    path.write_text(json.dumps(rows))
    return path


def test_an_index_is_built_changed_asked_and_judged(tmp_path, capsys, profiles, queries):
    index, train, out = tmp_path / "index", tmp_path / "train.jsonl", tmp_path / "out.json"
    train.write_text("".join(json.dumps({"prompt": f"Sort these: {i}", "response": ""}) + "\n" for i in range(30)))
    build = ("index", "build", index, f"sorting={train}", "--profiles", profiles, "--json", out)
    assert run(capsys, *build, "--describe", "jokes=Tells a joke on request")[0] == 0
    sizes = {"apple": 2, "birch": 2, "cedar": 2, "daisy": 2, "sorting": 20, "jokes": 1}
    assert json.loads(out.read_text())["inputs"] == sizes
    assert run(capsys, "index", "remove", index, "jokes")[0] == 0
    assert run(capsys, "index", "add", index, "--describe", "rhymes=Finds rhymes")[0] == 0
    status, said, _ = run(capsys, "index", "query", index, "Sort these: 3 1 2", "--k", 2, "--json", out)
    assert status == 0
    found = json.loads(out.read_text())[0]
    assert found["names"][0] == "sorting"
    assert "sorting" in said
    assert run(capsys, "index", "query", index, "--exclude", "sorting", "Sort these: 3", "--json", out)[0] == 0
    assert "sorting" not in json.loads(out.read_text())[0]["names"]
    words = tmp_path / "words.json"
    words.write_text(json.dumps({n: ["Please: {text}", "{text}. Thanks!"] for n in PROFILES}))
    maps = ("--paraphrases", words, "--out", tmp_path / "maps", "--json", out)
    assert run(capsys, "index", "evaluate", index, queries, *maps)[0] == 0
    figures = json.loads(out.read_text())["wordings"]
    assert figures["own"]["iid"]["1"] == 100
    assert list(figures) == ["own", "removed", "paraphrased"]
    assert (tmp_path / "maps" / "similarity.png").read_bytes().startswith(b"\x89PNG")
    assert "</html>" in (tmp_path / "maps" / "similarity.html").read_text()
    status, said, _ = run(capsys, "inspect", index)
    assert status == 0
    assert "lexical" in said


def test_what_looks_like_markup_is_text(tmp_path, capsys, profiles):
    index, out = tmp_path / "in[/b]dex :x:", tmp_path / "out.json"
    words = ["jokes[/b]=[INST] Tell a joke [/INST]", "[bold]rhymes=Find [red]rhymes"]
    describe = [word for sentence in words for word in ("--describe", sentence)]
    status, said, _ = run(capsys, "index", "build", index, "--profiles", profiles, *describe)
    assert status == 0
    assert "in[/b]dex :x:" in said.replace("\n", "")
    texts = ["hello [/INST] there", "[bold]rhymes :x:"]
    status, said, _ = run(capsys, "index", "query", index, *texts, "--k", 1, "--json", out)
    assert status == 0
    assert all(text in said for text in texts)
    assert "[bold]rhymes 0" in said
    assert [row["text"] for row in json.loads(out.read_text())] == texts
    queries = tmp_path / "q.json"
    queries.write_text(json.dumps([{"inputs": "Tell a joke [/INST]", "task": "jokes[/b]", "domain": "x"}]))
    for command in (["index", "evaluate", index, queries], ["inspect", index]):
        status, said, _ = run(capsys, *command)
        assert status == 0
        assert "in[/b]dex :x:" in said.replace("\n", "")


def test_a_query_of_a_small_index_finds_all_there_is(tmp_path, capsys, profiles, monkeypatch):
    index, out = tmp_path / "index", tmp_path / "out.json"
    assert run(capsys, "index", "build", index, "--profiles", profiles, "--only", "apple", "--only", "birch")[0] == 0
    status, _, noted = run(capsys, "index", "query", index, "Translate this", "--json", out)
    assert (status, noted) == (0, "")
    assert sorted(json.loads(out.read_text())[0]["names"]) == ["apple", "birch"]
    status, _, noted = run(capsys, "index", "query", index, "Translate this", "--k", 5)
    assert status == 0
    assert "--k 5: found all adapters that there are to find, 2" in noted
    words = ["--exclude", "apple", "--k", 2, "--json", out]
    status, _, noted = run(capsys, "index", "query", index, "Translate this", "Count that", *words)
    assert status == 0
    assert "--k 2: found all adapters that there are to find, 1" in noted
    assert [(row["names"], len(row["similarities"])) for row in json.loads(out.read_text())] == [(["birch"], 1)] * 2
    found = mj.Index.load(index).query(["a", "b"], 2, [["apple"], []])
    assert [len(names) for names in found.names] == [1, 2]
    said = refused(capsys, "index", "query", index, "x", "--exclude", "apple", "--exclude", "birch")
    assert "exclude: expected an adapter that text 0 may have, found all excluded" in said
    assert "query: text 0: expected a text, found ''" in refused(capsys, "index", "query", index, "")
    assert "word 1: expected text that UTF-8 can hold" in refused(capsys, "index", "query", index, "x", "y \udcff")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"hi \xff"), encoding="utf-8"))
    assert "standard input: expected UTF-8 text, found byte 0xff" in refused(capsys, "index", "query", index)


@pytest.mark.parametrize("key", ["inputs", "task", "domain"])
def test_half_characters_in_queries_are_refused(tmp_path, key):
    file = tmp_path / "queries.json"
    file.write_text(json.dumps([{"inputs": "x", "task": "t"}, {"inputs": "x", "task": "t", key: "hi \ud83d"}]))
    with pytest.raises(InputError, match=rf"queries\.json: query 1: {key}: expected text that UTF-8 can hold"):
        evaluation.read_queries(file)
    file.write_text(json.dumps([{"inputs": " ", "task": "t"}]))
    with pytest.raises(InputError, match=r"queries\.json: query 0: inputs: expected a text, found ' '"):
        evaluation.read_queries(file)


@pytest.mark.exhaustive("trains an encoder by the command line; test_retriever_training has the training")
def test_encoder_training_and_an_index_with_vectors(tmp_path, capsys, profiles):
    sentence_folder(tmp_path / "hf", "bert")
    encoder, trained, index = tmp_path / "encoder", tmp_path / "trained", tmp_path / "index"
    assert run(capsys, "import", "encoder", tmp_path / "hf", encoder)[0] == 0
    settings = ("--share", 0.5, "--steps", 2, "--batch-size", 2, "--json", tmp_path / "out.json")
    train = ("train", "retriever", trained, "--encoder", encoder, "--profiles", profiles, *settings)
    assert run(capsys, *train)[0] == 0
    assert len(json.loads((tmp_path / "out.json").read_text())["trained"]) == 2
    assert (trained / "training.png").exists()
    assert "holds files" in refused(capsys, *train)
    build = ("index", "build", index, "--profiles", profiles, "--encoder", trained)
    assert run(capsys, *build)[0] == 0
    assert mj.Index.load(index).scoring == "hybrid"
    assert run(capsys, "inspect", trained)[0] == 0


ASKED = {
    "the best alone": ((), lambda index: mj.Retrieval(index, 1)),
    "mixture": (("--compose", "mixture"), lambda index: mj.Retrieval(index, 3)),
    "fusion": (("--compose", "fusion", "--retrieve", 2), lambda index: mj.Retrieval(index, 2, "fusion")),
    "gates": (("--gates", "GATES"), lambda index: mj.GatesWithin(index, 3)),
}


@pytest.mark.parametrize(
    "asked", parameters(ASKED, ["the best alone", "fusion", "gates"], "the default of what fusion is given")
)
def test_generate_by_retrieval(tmp_path, capsys, world, profiles, asked):
    index = tmp_path / "index"
    assert run(capsys, "index", "build", index, "--profiles", profiles)[0] == 0
    folders = ("--base", world["base"], "--bank", world["bank"], "--index", index, "--json", tmp_path / "out.json")
    loaded, model = mj.Index.load(index), world["model"]
    extra, router = ASKED[asked]
    extra = [world["gates"] if word == "GATES" else word for word in extra]
    assert run(capsys, "generate", *PROMPTS[:2], *folders, *extra, "--max-new-tokens", 4)[0] == 0
    want = model.generate(PROMPTS[:2], router(loaded), max_new_tokens=4)
    written = json.loads((tmp_path / "out.json").read_text())
    assert [w["token_ids"] for w in written] == [c.token_ids for c in want]
    assert [w["retrieved"] for w in written] == [dict(c.routing.retrieved) for c in want]
    base = ("generate", "x", "--base", world["base"], "--bank", world["bank"], "--router")
    assert "expected --index" in refused(capsys, *base, "retrieval")


def test_figures_are_what_they_say():
    """Four adapters, three queries, scores by hand."""

    class Index:
        names = ("a", "b", "c", "d")

        def scores(self, texts):
            return np.asarray([[3, 2, 1, 0], [3, 2, 1, 0], [0, 1, 2, 3]], np.float32)

    queries = [Query("x", "a", "one"), Query("y", "b", "one"), Query("z", "b", "one")]
    judged = inspect.unwrap(evaluation.judge)(Index(), queries, (1, 2, 3, 4))  # a stand-in for an index
    assert judged["iid"] == {1: 33.33, 2: 66.67, 3: 100.0}  # own adapter at places 1, 2 and 3
    # masked: a's kin b is first; b's kin a is first; then b's kin a is last of c, d, a
    assert judged["ood"] == {1: 66.67, 2: 66.67, 3: 100.0}
    assert judged["clusters"] == {"one": judged["iid"]}


def test_queries_of_a_tasks_folder(tmp_path, capsys):
    """Profiles from the train splits, queries from the test splits; the same prompt twice is one query."""
    for task, word in (("winowhy", "why"), ("disfl_qa", "uh")):
        (tmp_path / "tasks" / task).mkdir(parents=True)
        for split in ("train", "test"):
            lines = [{"prompt": f"{split} {word} {i // 2}", "response": str(i)} for i in range(6)]
            (tmp_path / "tasks" / task / f"{split}.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    index, out = tmp_path / "index", tmp_path / "out.json"
    assert run(capsys, "index", "build", index, "--tasks", tmp_path / "tasks")[0] == 0
    for limit, count in (((), 6), (("--limit", 2), 4)):
        status, said, _ = run(capsys, "index", "evaluate", index, tmp_path / "tasks", *limit, "--json", out)
        assert status == 0
        own = json.loads(out.read_text())["wordings"]["own"]
        assert (own["queries"], own["iid"], own["ood"]) == (count, {"1": 100.0}, {})
        assert "own adapter" in said
        assert "masked" not in said  # tasks have no clusters
    (tmp_path / "tasks" / "winowhy" / "test.jsonl").unlink()
    assert "expected the test split of winowhy" in refused(capsys, "index", "evaluate", index, tmp_path / "tasks")


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        ({}, "expected a list of queries, found dict"),
        ([], "expected a list of queries, found an empty one"),
        (["x"], "query 0: expected an object, found str"),
        ([{"inputs": "x", "task": "apple"}, {"inputs": "x"}], "query 1: task: expected a text, found None"),
        ([{"inputs": 3, "task": "apple"}], "query 0: inputs: expected a text, found 3"),
        ([{"inputs": "x", "task": "apple", "domain": None}], "query 0: domain: expected a text, found None"),
        ([{"inputs": "x", "task": "elm"}], "expected adapters of the index, found 'elm'"),
    ],
)
def test_queries_of_another_kind_are_one_line(tmp_path, capsys, profiles, raw, said):
    assert run(capsys, "index", "build", tmp_path / "index", "--profiles", profiles)[0] == 0
    (tmp_path / "q.json").write_text(json.dumps(raw))
    assert said in refused(capsys, "index", "evaluate", tmp_path / "index", tmp_path / "q.json")
    if said.startswith("query 1"):  # a domain may be missing
        (tmp_path / "q.json").write_text(json.dumps(raw[:1]))
        assert run(capsys, "index", "evaluate", tmp_path / "index", tmp_path / "q.json")[0] == 0


def test_similarity_of_adapters_is_of_their_means(tmp_path, capsys, monkeypatch, profiles, queries):
    index = mj.Index.build(PROFILES)
    means = np.stack([ngrams(inputs, "words").toarray().mean(axis=0) for inputs in PROFILES.values()])
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    assert np.abs(evaluation.adapter_similarity(index) - means @ means.T).max() < 1e-6
    monkeypatch.setattr(evaluation, "MOST_DRAWN", 3)
    assert run(capsys, "index", "build", tmp_path / "index", "--profiles", profiles)[0] == 0
    line = refused(capsys, "index", "evaluate", tmp_path / "index", queries, "--out", tmp_path / "maps")
    assert "expected at most 3 adapters in a similarity map, found 4" in line
    assert not (tmp_path / "maps").exists()


def test_rewording(tmp_path):
    index = mj.Index.build(PROFILES)
    queries = [Query("Translate to German: my garden grows", "apple", "x"), Query("Write a poem about", "daisy", "x")]
    words = {"apple": ["Bring over: {text}"], "daisy": ["{text}?"]}
    removed = evaluation.reword(queries, index, "removed")
    assert [q.text for q in removed] == ["my garden grows"]  # nothing is left of the other
    assert [q.text for q in evaluation.reword(queries, index, "paraphrased", words)] == ["Bring over: my garden grows"]
    assert evaluation.reword(queries, index, "own") == queries
    with pytest.raises(InputError, match="daisy: expected templates"):
        evaluation.reword(queries, index, "paraphrased", {"apple": ["{text}"]})
    path = tmp_path / "words.json"
    path.write_text('{"a": ["no place for it"]}')
    with pytest.raises(InputError, match=r"words\.json: a: expected texts that hold \{text\}"):
        evaluation.read_paraphrases(path)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("index", "build", "OUT"), "expected NAME=FILE, --profiles, --tasks or --describe"),
        (("index", "build", "OUT", "name"), "expected NAME=FILE, found 'name'"),
        (("index", "build", "OUT", "a=missing.jsonl"), "missing.jsonl"),
        (("index", "build", "OUT", "--describe", "a=b", "--describe", "a=c"), "expected once, found twice"),
        (("index", "build", "OUT", "--describe", "a=b", "--scoring", "cosine"), "expected an encoder"),
        (("index", "build", "OUT", "--tasks", "no_such"), "--tasks: no_such: expected a folder of TASK/train.jsonl"),
        (("index", "build", "OUT", "--tasks", "no_such"), "found no such folder"),
        (("index", "build", "OUT", "a=missing.jsonl", "--tasks", "HERE"), "found a folder without one"),
        (("index", "query", "OUT", "text"), "expected a file, found none"),
        (("import", "encoder", "OUT", "ELSE"), "modules.json"),
    ],
)
def test_refusals_are_one_line(tmp_path, capsys, arguments, said):
    places = {"OUT": str(tmp_path / "OUT"), "ELSE": str(tmp_path / "ELSE"), "HERE": str(tmp_path)}
    line = refused(capsys, *(places.get(a, a) for a in arguments))
    assert said in line
    assert not (tmp_path / "OUT").exists()


def test_a_change_that_ends_a_ranking_says_so(tmp_path, capsys, profiles):
    index = tmp_path / "index"
    assert run(capsys, "index", "build", index, "--profiles", profiles)[0] == 0
    for words in (["add", index, "--describe", "elm=Of trees"], ["remove", index, "elm"]):
        write_ranking(index, {name: {name: 0.5} for name in PROFILES})
        status, _, noted = run(capsys, "index", *words)
        assert status == 0
        assert "ranking.json: gone with the index before" in " ".join(noted.split())
        assert not (index / "ranking.json").exists()
    assert "ranking.json" not in run(capsys, "index", "remove", index, "apple")[2]


def test_a_pipe_in_a_folder_of_tasks_is_not_waited_for(tmp_path, capsys):
    for name, make in (("cards", os.mkfifo), ("dice", os.mkdir), ("elm", lambda path: path.symlink_to("nowhere"))):
        (tmp_path / "t" / name).mkdir(parents=True)
        make(tmp_path / "t" / name / "train.jsonl")
    said = refused(capsys, "index", "build", tmp_path / "index", "--tasks", tmp_path / "t")
    for name in ("cards", "dice", "elm"):
        assert f"--tasks: {tmp_path}/t/{name}/train.jsonl: expected a file, found none or another thing" in said


def test_names_are_those_that_there_are_and_each_is_one(tmp_path, capsys, profiles, queries):
    index = tmp_path / "index"
    assert run(capsys, "index", "build", index, "--profiles", profiles)[0] == 0
    said = refused(capsys, "index", "evaluate", index, queries, "--except-for", "elm")
    assert "--except-for: expected adapters of apple, birch, cedar, daisy, found elm" in said
    twice = [{"model_name": "apple", "sample": [{"inputs": text}]} for text in ("one", "two")]
    (tmp_path / "twice.json").write_text(json.dumps(twice))
    said = refused(capsys, "index", "build", tmp_path / "other", "--profiles", tmp_path / "twice.json")
    assert "twice.json: expected each model_name once, found twice: apple" in said
    (tmp_path / "twice.json").write_text('{"apple": ["one"], "birch": ["two"], "apple": ["three"]}')
    said = refused(capsys, "index", "build", tmp_path / "other", "--profiles", tmp_path / "twice.json")
    assert "twice.json: expected JSON, found something else (expected each key once, found twice: apple)" in said


def test_a_change_that_another_process_makes_meanwhile_is_not_lost(tmp_path, capsys, profiles, monkeypatch):
    index = tmp_path / "index"
    assert run(capsys, "index", "build", index, "--profiles", profiles)[0] == 0
    add = mj.Index.add

    def add_and_be_overtaken(self, new):
        add(self, new)
        monkeypatch.undo()
        line = refused(capsys, "index", "add", index, "--describe", "third=Counts")
        assert f"{index}: expected one change at a time" in line
        assert "expected one change at a time" in refused(capsys, "index", "remove", index, "apple")

    monkeypatch.setattr(mj.Index, "add", add_and_be_overtaken)
    assert run(capsys, "index", "add", index, "--describe", "second=Finds rhymes")[0] == 0
    assert run(capsys, "index", "add", index, "--describe", "third=Counts")[0] == 0
    assert mj.Index.load(index).names == (*PROFILES, "second", "third")


def test_queries_are_not_overwritten_by_their_figures(tmp_path, capsys, profiles, queries):
    index, before = tmp_path / "index", queries.read_bytes()
    assert run(capsys, "index", "build", index, "--profiles", profiles)[0] == 0
    line = refused(capsys, "index", "evaluate", index, queries, "--json", queries)
    assert line == f"error: --json: expected a file of its own, found {queries}, which is this command's queries"
    assert queries.read_bytes() == before
    line = refused(capsys, "index", "remove", index, "apple", "--json", index / "report.json")
    assert f"--json: expected a file outside of {index}" in line
