"""`meteora evaluate` with an index: unseen tasks, what is found beside what is answered, clusters, throughput."""

import dataclasses
import json
import shutil

import jax
import pytest
from tiny import edit_json
from worlds import NAMES

import converters
import meteora_jax as mj
from meteora_jax.cli import main
from meteora_jax.config import InputError
from meteora_jax.evaluation.problems import Problem
from meteora_jax.evaluation.systems import Given, check_routes, default_systems, make_system
from meteora_jax.evaluation.tasks import Example, write_splits
from meteora_jax.evaluation.throughput import choose_prompts, measure, throughput_markdown, time_generation
from meteora_jax.generation import Engines
from meteora_jax.retriever.evaluation import Query, judge
from meteora_jax.retriever.ranking import write_ranking
from meteora_jax.routing.gates import Gates

CLUSTERS = {"apple": "fruit", "birch": "trees", "cedar": "trees", "daisy": "fruit"}
METRICS = {"apple": "em", "birch": "rouge", "cedar": "rouge", "daisy": "em"}
INDEX = {name: [f"so it is about the {name}", f"{name} once more"] for name in NAMES}


@pytest.fixture(scope="module")
def folders(world, tmp_path_factory):
    root = tmp_path_factory.mktemp("retrieval")
    index = mj.Index.build(INDEX)
    index.save(root / "index")
    queries = [
        {"inputs": f"about the {name}, {'so ' * i}what?", "targets": f"{name} is {i}", "task": name,
         "metric": METRICS[name], "domain": CLUSTERS[name]}
        for name in NAMES for i in range(2)
    ]  # fmt: skip
    (root / "queries.json").write_text(json.dumps(queries))
    return {**world, "root": root, "queries": queries, "index": index}


def evaluate(folders, out, *options, command="evaluate"):
    given = [w for k in ("base", "bank", "gates") for w in (f"--{k}", str(folders[k]))]
    given += ["--tasks", str(folders["root"]), "--only", str(folders["root"] / "queries.json")]
    given += ["--index", str(folders["root"] / "index"), "--max-new-tokens", "4"]
    main([command, *given, "--out", str(out), *options])


@pytest.fixture(scope="module")
def run(folders):
    out = folders["root"] / "run"
    kinds = ("retrieval-mixture-k1", "retrieval-mixture", "gates-top2", "gates-within-top2")
    systems = ",".join(kind + hides for kind in kinds for hides in ("", "-unseen"))
    evaluate(folders, out, "--systems", systems)
    return out


def records_of(out):
    return {(r["system"], r["id"]): r for r in map(json.loads, (out / "records.jsonl").read_text().splitlines())}


@pytest.mark.exhaustive("a whole evaluation more")
def test_an_unseen_task_has_no_adapter_of_its_own(folders, run):
    """Gates without the task's column answer as gates told to choose within the others."""
    records = records_of(run)
    model = folders["model"]
    kinds = ("retrieval-mixture-k1", "retrieval-mixture", "gates-top2", "gates-within-top2")
    assert {s for s, _ in records} == {kind + end for kind in kinds for end in ("", "-unseen")}
    used = {False: set(), True: set()}
    for (system, _), record in records.items():
        used[system.endswith("-unseen")].add(record["task"] in record["routing"])
        if system == "gates-top2-unseen":
            others = tuple(n for n in NAMES if n != record["task"])
            router = Gates(2, model.gates.temperature, others)
            assert record["answer"] == model.generate([record["prompt"]], router, max_new_tokens=4)[0].text
    assert True in used[False]
    assert used[True] == {False}


def test_all_tasks_of_a_composite_problem_are_hidden(folders):
    given = Given(folders["model"], index=folders["index"])
    pair = Problem("pair/0", "pair", "p", "a@@@@\nb", ("apple", "cedar"), ("a", "b"))
    assert make_system("gates-top2-t5-unseen", given).route(pair) == Gates(2, 5.0, ("birch", "daisy"))
    assert make_system("retrieval-fusion-k2-unseen", given).route(pair).exclude == ("apple", "cedar")
    strange = Problem("elm/0", "elm", "p", "a")  # no adapter is its own: nothing to hide
    assert make_system("gates-top2-unseen", given).route(strange) == Gates(2, folders["model"].gates.temperature)
    assert make_system("retrieval-selection-k5-unseen", given).kind == "retrieval-selection-unseen"
    assert make_system("gates-within-top2-k4-t5-unseen", given).kind == "gates-within-top2-t5-unseen"
    with pytest.raises(InputError, match="retrieval-mixture-k3-unseen: expected to retrieve at most 2, found 3"):
        check_routes([make_system("retrieval-mixture-k3-unseen", given)], [pair])
    with pytest.raises(InputError, match="within: expected at least 3 adapters"):
        check_routes([make_system("gates-top3-t5-unseen", given)], [pair])


def test_what_was_found_stands_beside_what_was_answered(folders, run):
    table = json.loads((run / "table.json").read_text())
    queries = [Query(q["inputs"], q["task"], q["domain"]) for q in folders["queries"]]
    want = judge(folders["index"], queries)
    counts = table["retrieval"].pop("counts")
    assert counts["iid"] == sum(counts["adapters"].values()) == sum(counts["clusters"].values()) == len(queries)
    assert table["retrieval"] == json.loads(json.dumps(want))
    assert want["iid"][1] == 100
    assert set(want["ood"]) == {1, 3}
    text = (run / "table.md").read_text()
    assert "| % found among the first | 1 | 3 |" in text
    assert "| all | 100.0 [100.0, 100.0] |" in text
    assert "| all, own adapter hidden: one of its cluster |" in text
    assert "| cluster trees, ROUGE-L | 4 |" in text
    for picture in ("k.png", "similarity.png"):
        assert (run / picture).read_bytes().startswith(b"\x89PNG")
    assert "trees" in (run / "similarity.html").read_text()


@pytest.mark.exhaustive("a whole evaluation more")
def test_tasks_without_clusters_and_an_index_of_other_adapters(folders, tmp_path):
    """MeteoRA's tasks have no clusters; problems whose adapter the index lacks are left out of what was found."""
    bank = dict(zip(("winowhy", "birch"), NAMES[:2], strict=True))
    edit = tmp_path / "base"
    edit.symlink_to(folders["base"])
    converters.import_adapters(tmp_path / "bank", edit, {n: folders["peft"][p] for n, p in bank.items()})
    mj.Index.build({"winowhy": ["why, oh why"], "birch": ["a tree"]}).save(tmp_path / "index")
    for task in ("winowhy", "object_counting"):
        write_splits(tmp_path / "tasks" / task, {"test": [Example(f"{task[:4]} {i}? ", "a") for i in range(2)]})
    main(
        ["evaluate", "--base", str(edit), "--bank", str(tmp_path / "bank"), "--index", str(tmp_path / "index"),
         "--tasks", str(tmp_path / "tasks"), "--only", "winowhy,object_counting", "--out", str(tmp_path / "run"),
         "--systems", "retrieval-selection-k1", "--max-new-tokens", "2"]
    )  # fmt: skip
    found = json.loads((tmp_path / "run" / "table.json").read_text())["retrieval"]
    assert (found["queries"], found["ood"], found["clusters"], list(found["adapters"])) == (2, {}, {}, ["winowhy"])


@pytest.mark.exhaustive("times programs, three of them")
def test_throughput_is_of_equal_work(folders, tmp_path):
    evaluate(
        folders, tmp_path / "run", "--batch-sizes", "1", "3", "--repeats", "2", "--max-new-tokens", "5",
        "--systems", "apple,retrieval-mixture", "--json", str(tmp_path / "copy.json"), command="throughput",
    )  # fmt: skip
    report = json.loads((tmp_path / "run" / "throughput.json").read_text())
    assert json.loads((tmp_path / "copy.json").read_text()) == report
    assert [(r["system"], r["batch"]) for r in report["records"]] == [
        (s, n) for n in (1, 3) for s in ("apple", "retrieval-mixture")
    ]
    for r in report["records"]:
        assert r["tokens_per_s"] == pytest.approx(5 * r["batch"] / (r["prefill_s"] + r["decoding_s"]))
        assert r["decoding_tokens_per_s"] == pytest.approx(4 * r["batch"] / r["decoding_s"])
        assert r["retrieval_s"] > 0
    assert (tmp_path / "run" / "throughput.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "run" / "records.jsonl").exists()
    text = throughput_markdown(report["records"])
    assert text.splitlines()[0] == "| new tokens a second | batch 1 | batch 3 |"
    assert text.count("(1.00)") >= 4


@pytest.mark.exhaustive("times programs, three of them")
def test_throughput_is_warm_in_turns_and_a_median(folders, monkeypatch, caplog):
    """One untimed run a system and batch size compiles; none of the others does, and they alternate."""
    problems = [Problem(f"{n}/0", n, f"about the {n}", "") for n in NAMES]
    names = ["base", "apple", "retrieval-selection-k1", "retrieval-fusion", "retrieval-mixture"]
    systems = [make_system(name, Given(folders["model"], index=folders["index"])) for name in names]
    calls, compiled = [], []

    def timed(system, chosen, new_tokens):
        caplog.clear()
        spent = time_generation(system, chosen, new_tokens)
        compiled.append(len([r for r in caplog.records if r.getMessage().startswith("Compiling")]))
        calls.append((len(chosen), system.name))
        turn = calls.count(calls[-1])  # 1: the untimed one, an hour; then 1, 2 and 9 seconds
        return {part: [3600.0, 1.0, 2.0, 9.0][turn - 1] for part in spent}

    monkeypatch.setattr("meteora_jax.evaluation.throughput.time_generation", timed)
    with jax.log_compiles():
        records = measure(systems, problems, [1, 3], 7, 3)
    assert calls == [(size, name) for size in (1, 3) for _ in range(4) for name in names]
    warm = [count for i, count in enumerate(compiled) if i % 20 >= len(names)]
    assert sum(compiled) > 0
    assert sum(warm) == 0
    for record in records:
        assert (record["retrieval_s"], record["prefill_s"], record["decoding_s"]) == (2, 2, 2)
        assert record["tokens_per_s"] == record["batch"] * 7 / 4


@pytest.mark.exhaustive("times programs, three of them")
def test_what_is_timed_is_the_system(folders, monkeypatch):
    """A system named like an adapter is that adapter for every request; the others compose what each request finds."""
    model = folders["model"]
    model = dataclasses.replace(model, config=dataclasses.replace(model.config, eos_token_ids=()))
    problems, generated = [Problem(f"{n}/0", n, f"about the {n}", "") for n in NAMES], []

    class Kept(Engines):
        def holding(self, requests):
            engine = super().holding(requests)
            submit = engine.submit
            engine.submit = lambda request: generated.append(submit(request)) or generated[-1]
            return engine

    monkeypatch.setattr("meteora_jax.evaluation.throughput.Engines", Kept)
    index, prompts = folders["index"], [p.prompt for p in problems]
    routers = {"base": None, "apple": mj.Fixed("apple")}
    routers |= {f"retrieval-{how}-k2": mj.Retrieval(index, 2, how) for how in ("selection", "fusion", "mixture")}
    answers = set()
    for name, router in routers.items():
        time_generation(make_system(name, Given(model, index=index)), problems, 9)
        want = model.generate(prompts, router, max_new_tokens=9)
        timed = [h.progress.tokens for h in generated[-len(want) :]]
        assert timed == [c.token_ids for c in want]
        answers.add(str(timed))
    assert len(answers) == len(routers)  # no two of them are the same work


def test_end_tokens_do_not_end_a_measurement(folders):
    """Every token an end token: the responses are as long as asked for all the same."""
    model = folders["model"]
    stopping = dataclasses.replace(
        model, config=dataclasses.replace(model.config, eos_token_ids=tuple(range(model.config.vocab_size)))
    )
    (record,) = measure([make_system("base", Given(stopping))], [Problem("a/0", "a", "so?", "")], [2], 6, 1)
    assert record["new_tokens"] == 6


def test_prompts_are_those_of_middling_length():
    problems = [Problem(f"a/{n}", "a", "x" * n, "") for n in (9, 1, 5, 7, 3)]
    assert [len(p.prompt) for p in choose_prompts(problems, 3)] == [3, 5, 7]
    assert [len(p.prompt) for p in choose_prompts(problems, 7)] == [1, 3, 5, 7, 9, 1, 3]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--batch-sizes", "1", "0"], "--batch-sizes: expected batch sizes of 1 or more, found 1 0"),
        (["--max-new-tokens", "1"], "--max-new-tokens: expected 2 or more, found 1"),
        (["--repeats", "0"], "--repeats: expected 1 or more, found 0"),
        (["--max-new-tokens", "5000"], "apple/queries/0: expected at most 0 tokens"),
    ],
)
def test_refusals_of_throughput(folders, tmp_path, capsys, options, said):
    with pytest.raises(SystemExit) as refusal:
        evaluate(folders, tmp_path / "run", *options, "--systems", "base", command="throughput")
    assert refusal.value.code == 1
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--systems", "retrieval-mixture-k9"], "retrieval-mixture-k9: expected to retrieve at most 4, found 9"),
        (["--systems", "oracle-unseen"], "--systems: oracle-unseen: expected nothing after oracle, found -unseen"),
        (["--only", "nowhere.json"], "nowhere.json: expected a file, found none"),
        (["--only", "{queries},{queries}"], "expected each name once, found twice: apple, birch, cedar, daisy"),
    ],
)
def test_refusals(folders, tmp_path, capsys, options, said):
    options = [word.format(queries=folders["root"] / "queries.json") for word in options]
    with pytest.raises(SystemExit) as refusal:
        evaluate(folders, tmp_path / "run", *options)
    assert refusal.value.code == 1
    error = capsys.readouterr().err
    assert said in error
    assert not (tmp_path / "run").exists()


def test_a_run_goes_on_with_its_index_or_not_at_all(folders, tmp_path):
    out = tmp_path / "run"
    evaluate(folders, out, "--systems", "retrieval-selection-k1", "--limit", "1")
    edit_json(out / "run.json", index="another")
    with pytest.raises(SystemExit):
        evaluate(folders, out, "--systems", "retrieval-selection-k1", "--limit", "1")


def test_a_run_goes_on_with_its_ranking_or_not_at_all(folders, tmp_path, capsys):
    index, names = tmp_path / "index", folders["index"].names
    shutil.copytree(folders["root"] / "index", index)
    options = ["--systems", "task-retrieval-k1", "--limit", "1", "--index", str(index)]
    for loss in (0.5, 0.5, 0.25):
        write_ranking(index, {name: {name: loss} for name in names})
        if loss == 0.5:
            evaluate(folders, tmp_path / "run", *options)
    with pytest.raises(SystemExit):
        evaluate(folders, tmp_path / "run", *options)
    assert "ranking: expected" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["retrieval-selection-unseen", "task-retrieval-unseen"])
def test_an_unseen_task_s_only_adapter_leaves_none(world, name):
    index, ranking = mj.Index.build(dict(list(INDEX.items())[:1])), {NAMES[0]: NAMES[:1]}
    given = Given(dataclasses.replace(world["model"], gates=None), index=index, ranking=ranking)
    said = f"--systems: {name}: expected adapters that {NAMES[0]} may have, found all hidden"
    with pytest.raises(InputError, match=said):
        check_routes([make_system(name, given)], [Problem("a", NAMES[0], "", "")])


def test_systems_that_nobody_named_are_of_what_is_given(world, folders):
    model, index, ranking = world["model"], folders["index"], {name: (name,) for name in NAMES}
    alone = dataclasses.replace(model, gates=None)
    bare = dataclasses.replace(alone, bank=None)
    few, tasks = mj.Index.build(dict(list(INDEX.items())[:2])), mj.Index.build(INDEX | {"sums": ["3 and 4?"]})
    gates = ["gates-top1", "gates-top2"]
    for given, systems in (
        (Given(bare), ["base"]),
        (Given(alone), ["base", "oracle"]),
        (Given(model), ["base", "oracle", *gates]),
        (Given(model, index=index), ["base", "oracle", *gates, "retrieval-selection"]),
        (Given(alone, index=few), ["base", "oracle", "retrieval-selection"]),
        (Given(alone, index=index, ranking=ranking), ["base", "oracle", "retrieval-selection", "task-retrieval"]),
        (Given(alone, index=tasks, ranking=ranking | {"sums": NAMES}), ["base", "oracle", "task-retrieval"]),
    ):
        assert default_systems(given) == systems
        problems = [Problem("a", NAMES[0], "", "")]
        check_routes([make_system(name, given) for name in systems], problems)
    assert make_system("retrieval-mixture", Given(alone, index=few)).route(problems[0]).k == 2  # as many as there are
    unseen = make_system("retrieval-mixture-unseen", Given(alone, index=few))
    check_routes([unseen], problems)
    assert unseen.route(problems[0]).k == 1
    ranked = Given(alone, index=few, ranking={name: (name, "cedar") for name in few.names})
    assert make_system("task-retrieval-unseen", ranked).route(problems[0]).k == 2
    one = dataclasses.replace(model.gates, names=NAMES[:1])
    assert default_systems(Given(dataclasses.replace(model, gates=one))) == ["base", "oracle", "gates-top1"]


def test_a_bank_alone_is_evaluated_without_a_word_about_systems(folders, tmp_path):
    given = [w for k in ("base", "bank") for w in (f"--{k}", str(folders[k]))]
    given += ["--tasks", str(folders["root"]), "--only", str(folders["root"] / "queries.json"), "--limit", "1"]
    main(["evaluate", *given, "--max-new-tokens", "2", "--out", str(tmp_path / "run")])
    assert {r["system"] for r in records_of(tmp_path / "run").values()} == {"base", "oracle"}
