"""Rows, systems and tables without a model: composites, LoraRetriever's queries, what is not defined."""

import collections
import dataclasses
import io
import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from meteora_jax.cli.comparison import read_systems
from meteora_jax.cli.report import print_tables
from meteora_jax.config import InputError
from meteora_jax.evaluation.charts import accuracies, write_bars, write_radar
from meteora_jax.evaluation.composite import COMPOSITES, read_composites
from meteora_jax.evaluation.metrics import METRICS, loraretriever_metric, score, score_composite
from meteora_jax.evaluation.named_metrics import named_metric
from meteora_jax.evaluation.problems import Problem, load_composites, load_queries
from meteora_jax.evaluation.runner import Records, run
from meteora_jax.evaluation.systems import Given, check_routes, make_system, skipped
from meteora_jax.evaluation.table import markdown, tabulate
from meteora_jax.evaluation.tasks import Example, bigbench, load_split
from meteora_jax.routing.fixed import Fixed
from meteora_jax.routing.gates import Gates

TASKS = ("object_counting", "strategyqa")


def composite(i, tasks=TASKS, answers=("3", "Yes. It is so.")):
    return Problem(f"pair/test/{i}", "pair", f"prompt {i}", "@@@@\n".join(answers), tuple(tasks), tuple(answers))


def single(i, task="object_counting", target="3"):
    return Problem(f"{task}/test/{i}", task, f"{task} {'so ' * i}", target)


def plain(text):
    """A table without its intervals."""
    return re.sub(r" \[[^]]*\]", "", text)


# --- systems ---


@pytest.fixture
def given():
    gates = SimpleNamespace(temperature=2.0)
    model = SimpleNamespace(adapter_names=("object_counting", "strategyqa"), gates=gates)
    other = SimpleNamespace(adapter_names=("everything",), gates=None)
    return Given(model, {"lora-b": other})


def test_a_system_is_a_name_and_a_router_for_each_problem(given):
    plain, pair = single(0), composite(0)
    routers = {name: make_system(name, given).route(plain) for name in ("base", "oracle", "gates-top2", "strategyqa")}
    assert routers == {
        "base": None,
        "oracle": Fixed("object_counting"),
        "gates-top2": Gates(2, 2.0),
        "strategyqa": Fixed("strategyqa"),
    }
    other = make_system("lora-b", given)
    assert (other.model, other.route(plain)) == (given.others["lora-b"], Fixed("everything"))
    assert make_system("base", given).route(pair) is None


@pytest.mark.parametrize(("n", "temperature"), [(3, 15.0), (5, 20.0), (10, 30.0)])
def test_gates_are_warmer_on_composites(given, n, temperature):
    problem = composite(0, COMPOSITES[n], ["a"] * n)
    assert make_system("gates-top2", given).route(problem) == Gates(2, temperature)
    assert make_system("gates-top1-t7", given).route(problem) == Gates(1, 7.0)
    assert make_system("gates-top1-t0.5", given).route(single(0)) == Gates(1, 0.5)
    assert make_system("gates-top1", given).route(single(0)) == Gates(1, 2.0)
    assert problem.stop == (f"\n{n + 1}.",)
    assert single(0).stop == ()


def test_what_no_system_can_do_is_said_at_once(given):
    systems = [make_system(name, given) for name in ("oracle", "gates-top2", "lora-b")]
    assert skipped(systems, [composite(0), single(0)]) == {("oracle", "pair")}
    check_routes(systems[:1], [composite(0), single(0)])
    with pytest.raises(InputError, match="oracle: expected an adapter for every task, found none for winowhy, gsm8k"):
        check_routes(systems, [single(0, "winowhy"), single(0, "gsm8k")])
    with pytest.raises(InputError, match=r"pair: gates-top2: expected a temperature \(-tN"):
        check_routes(systems, [composite(0)])
    with pytest.raises(InputError, match="gates-top3: expected at most 2"):
        check_routes([make_system("gates-top3", given)], [single(0)])
    for name in ("gates-top0", "gates-top", "elm"):
        with pytest.raises(InputError, match=r"some of base, oracle, gates-topN, .*, lora-b, object_counting"):
            make_system(name, given)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("gates-top2-t0", r"expected -tN, -unseen \(in this order, N above 0\) after gates-top2, found -t0"),
        ("gates-top2-t0.0", "after gates-top2, found -t0.0"),
        ("gates-top2-t", "after gates-top2, found -t"),
        ("gates-top2-k3", "after gates-top2, found -k3"),
        ("gates-top2-unseen-t3", "after gates-top2, found -unseen-t3"),
        ("gates-within-top2-t3-k3", r"expected -kN, -tN, -unseen \(in .*\) after gates-within-top2, found -t3-k3"),
        ("retrieval-mixture-k0", r"expected -kN, -unseen \(in .*\) after retrieval-mixture, found -k0"),
        ("retrieval-mixture-t2", "after retrieval-mixture, found -t2"),
        ("oracle-unseen", "expected nothing after oracle, found -unseen"),
    ],
)
def test_a_suffix_that_a_system_does_not_have_is_named(given, name, said):
    with pytest.raises(InputError, match=f"^--systems: {name}: .*{said}$"):
        make_system(name, given)


def test_a_name_of_its_own_may_look_like_a_suffix(given):
    other = Given(given.model, {"base-v2": given.others["lora-b"]})
    assert make_system("base-v2", other).route(single(0)) == Fixed("everything")


def test_systems_are_read_in_their_order():
    names, folders = read_systems("lora=runs/a=b,base,gates-top2-t1,base", ["apple"])
    assert names == ["lora", "base", "gates-top2-t1"]
    assert folders == {"lora": Path("runs/a=b")}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("lora=", "expected NAME=FOLDER, found 'lora='"),
        ("=runs/a", "expected NAME=FOLDER, found '=runs/a'"),
        ("lora=a,lora=b", "lora=b: expected a NAME that no other system has, found lora"),
        ("lora=a,lora", "lora=a: expected a NAME that no other system has, found lora"),
        ("apple=a", "apple=a: expected a NAME that no other system has, found apple"),
        ("gates-top2-t3=a", "gates-top2-t3=a: expected a NAME that no other system has, found gates-top2-t3"),
        (",", "expected at least one system, found none"),
    ],
)
def test_systems_that_cannot_be_read_are_refused(text, said):
    with pytest.raises(InputError, match=f"^--systems: {said}"):
        read_systems(text, ["apple"])


# --- what is asked ---


def test_the_releases_lines_are_read_by_their_number_of_answers(tmp_path):
    file = tmp_path / "composite_3.jsonl"
    lines = [{"prompt": f"p{i}", "response": "a@@@@\nb@@@@\nc"} for i in range(2)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    problems = load_composites(file, "composite_3", None, tmp_path)
    assert [p.id for p in problems] == ["composite_3/composite_3/0", "composite_3/composite_3/1"]
    assert {(p.tasks, p.answers, p.parts) for p in problems} == {(COMPOSITES[3], ("a", "b", "c"), 3)}
    assert len(load_composites(file, "composite_3", 1, tmp_path)) == 1


GOOD = {"prompt": "p", "response": "a@@@@\nb", "tasks": TASKS, "answers": ["a", "b"]}


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([], "expected composite problems, found none"),
        ([{"prompt": "p", "response": "a"}], ":1: response: expected 3, 5, 10 answers where no tasks stand, found 1"),
        ([{**GOOD, "answers": ["a"]}], r":1: answers: expected one a task \(2\), found 1"),
        ([{**GOOD, "tasks": "ab"}], ":1: tasks: expected a list of texts, found ab"),
        ([{**GOOD, "answers": ["a", "\ud83d"]}], ":1: answers: 1: expected text that UTF-8 can hold"),
        ([{**GOOD, "tasks": ["a", "\ud83d"]}], ":1: tasks: 1: expected text that UTF-8 can hold"),
        ([GOOD, {**GOOD, "prompt": "\ud83d"}], ":2: prompt: expected text that UTF-8 can hold"),
        ([GOOD, {**GOOD, "tasks": TASKS[::-1]}], ":2: tasks: expected those of line 1"),
    ],
)
def test_other_files_are_refused(tmp_path, lines, said):
    file = tmp_path / "problems.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(InputError, match=said):
        read_composites(file)


def test_line_ends_of_windows_and_blank_lines_at_the_end_are_fine(tmp_path):
    path = tmp_path / "winowhy" / "test.jsonl"
    path.parent.mkdir()
    line = '{"prompt": "a\u2028\x85", "response": "b"}'.encode()
    for end in (b"", b"\n", b"\r\n", b"\r\n\r\n \n"):
        path.write_bytes(line + b"\r\n" + line + end)
        assert load_split(tmp_path, "winowhy", "test") == [Example("a\u2028\x85", "b")] * 2
    path.write_bytes(line + b'\n{"prompt": "\xff", "response": "b"}')
    with pytest.raises(InputError, match=r"test.jsonl:2: expected a JSON object, found .*can't decode byte 0xff"):
        load_split(tmp_path, "winowhy", "test")


def test_half_a_character_in_a_source_is_refused(tmp_path):
    task = tmp_path / "bigbench" / "benchmark_tasks" / "winowhy" / "task.json"
    task.parent.mkdir(parents=True)
    task.write_text(r'{"examples": [{"input": "hi \ud83d", "target": "x"}]}')
    with pytest.raises(InputError, match=r"winowhy/task.json: example 0: input: expected text that UTF-8 can hold"):
        bigbench.prepare(tmp_path, tmp_path / "tasks", ("winowhy",))


def test_queries_have_their_own_metric(tmp_path):
    file = tmp_path / "queries.json"
    queries = [
        {"inputs": f"q{i}", "targets": "Yes", "task": task, "metric": metric, "domain": "x"}
        for i, (task, metric) in enumerate([("nli", "em"), ("wmt", "bleu"), ("nli", "em")])
    ]
    file.write_text(json.dumps(queries))
    problems = load_queries(file, None)
    assert [(p.id, p.metric) for p in problems] == [
        ("nli/queries/0", "em"), ("nli/queries/2", "em"), ("wmt/queries/1", "bleu"),
    ]  # fmt: skip
    answers = {("s", p.id): "yes." for p in problems}
    table = tabulate(problems, ["s"], answers)
    assert table["tasks"]["nli"]["s"] == {"loraretriever": {"exact_match": 1.0}, "problems": 2}
    assert table["mean exact_match"] == {"s": 1.0}
    assert "| nli | 2 | 100.0 |\n| wmt, BLEU | 1 | " in plain(markdown(table, ["s"], "loraretriever"))
    assert list(table["clusters"]) == ["x"]
    for change, said in (
        ({"metric": "f1"}, "metric: expected em or bleu or rouge, found 'f1'"),
        ({"task": "wmt"}, "metric: expected em, found 'bleu'|metric: expected bleu, found 'em'"),
        ({"inputs": "\ud83d"}, "1: inputs: expected text that UTF-8 can hold"),
        ({"targets": "\ud83d"}, "1: targets: expected text that UTF-8 can hold"),
        ({"inputs": 3}, "expected texts task, inputs, targets and metric"),
        ({"domain": ["x"]}, r"1: domain: expected a text, found \['x'\]"),
        ({"task": ""}, "1: task: expected a name, found none"),
    ):
        file.write_text(json.dumps([queries[1], {**queries[0], **change}]))
        with pytest.raises(InputError, match=said):
            load_queries(file, None)
    file.write_text(json.dumps([{**queries[0], "domain": None}]))
    assert load_queries(file, None)[0].cluster == ""


# --- what is scored ---


def test_a_cluster_has_the_means_of_its_tasks():
    """Every task weighs the same, however many problems it has; a metric's mean is over the tasks scored by it."""
    rows = {"a": ("em", 3), "b": ("em", 1), "c": ("bleu", 1), "d": ("em", 1)}
    problems = [
        Problem(f"{task}/{i}", task, "", "some right words here", metric=metric, cluster="x" if task != "d" else "")
        for task, (metric, n) in rows.items()
        for i in range(n)
    ]
    answers = {("s", p.id): "some right words here" if p.id in ("a/0", "b/0", "c/0") else "" for p in problems}
    table = tabulate(problems, ["s"], answers)
    cell = table["clusters"]["x"]["s"]
    assert cell["loraretriever"]["exact_match"] == pytest.approx((1 / 3 + 1) / 2)
    assert cell["loraretriever"]["bleu"] == pytest.approx(100)
    assert (cell["problems"], list(table["clusters"])) == (5, ["x"])
    assert "| cluster x | 5 | 66.7 |\n| cluster x, BLEU | 5 | 100.0 |" in plain(markdown(table, ["s"], "loraretriever"))


def test_loraretrievers_metric_of_meteoras_tasks():
    assert {loraretriever_metric(t) for t in METRICS if t.startswith("news")} == {"bleu"}
    assert [loraretriever_metric(t) for t in ("alpaca", "strategyqa", "gsm8k")] == ["rouge", "em", "em"]


def test_every_row_has_its_cells_and_an_undefined_one_says_so(tmp_path):
    problems = [composite(i) for i in range(3)] + [single(i) for i in range(3)] + [single(0, "alpaca", "some words")]
    texts = {
        "right": {"pair": "1. 3\n2. Yes. It is so.", "object_counting": "3", "alpaca": "some words"},
        "silent": {"pair": "", "object_counting": "", "alpaca": ""},
        "oracle": {"object_counting": "3.", "alpaca": "words"},
    }
    answers = {(s, p.id): texts[s][p.task] for s in texts for p in problems if p.task in texts[s]}
    table = tabulate(problems, list(texts), answers, {("oracle", "pair")})
    cells = table["tasks"]["pair"]
    right = score_composite(TASKS, [["3", "Yes. It is so."]] * 3, [p.answers for p in problems[:3]])
    assert cells["right"] == {**right, "asked": 6, "graded": 6}
    assert (cells["silent"]["attempted"], cells["silent"]["correct"], "oracle" in cells) == (0, 0, False)
    assert table["tasks"]["alpaca"]["oracle"] == {
        **score("alpaca", ["words"], ["some words"]),
        "loraretriever": {k: v for k, v in score("alpaca", ["words"], ["some words"]).items() if k in
                          ("rouge1", "rouge2", "rougeL")},
        "problems": 1,
    }  # fmt: skip
    assert "| pair, correct | 3 | 6 of 6 [6, 6] | 0 of 6 [0, 0] | not defined |" in markdown(table, list(texts))
    text = plain(markdown(table, list(texts)))
    assert "| pair, attempted | 3 | 6 of 6 | 0 of 6 | not defined |" in text
    assert "| pair, correct | 3 | 6 of 6 | 0 of 6 | not defined |" in text
    assert "| pair, ROUGE-L | 3 | 100.0 (100.0) | 0.0 (0.0) | not defined |" in text
    assert "| object_counting | 3 | 100.0 | 0.0 | 100.0 |" in text
    assert "| mean accuracy | | 100.0 | 0.0 | 100.0 |" in text
    other = markdown(table, list(texts), "loraretriever")
    assert "| pair | 3 | not defined | not defined | not defined |" in other
    assert "| object_counting | 3 | 100.0 | 0.0 | 100.0 |" in other
    shares = accuracies(table, list(texts))
    assert list(shares) == ["pair", "object_counting"]
    assert shares["pair"][:2] == [100.0, 0.0]
    assert math.isnan(shares["pair"][2])
    for scoring in ("meteora", "loraretriever"):
        write_bars(table, list(texts), tmp_path / f"{scoring}.png", scoring)
        assert (tmp_path / f"{scoring}.png").stat().st_size > 1000
    table["tasks"]["another"] = table["tasks"]["object_counting"]
    write_radar(table, list(texts), tmp_path / "radar.png")  # an undefined corner is left open
    assert (tmp_path / "radar.png").stat().st_size > 1000


def test_bars_and_dollars_in_names_stand_as_they_are(tmp_path):
    names, rows = ["b|c", "$\\frac$"], ["a|b", "$\\frac$", "$x^", "日本"]
    exact = (named_metric("exact", (), ""),)
    problems = [dataclasses.replace(single(0), id=f"{row}/test/0", task=row, metrics=exact) for row in rows]
    table = tabulate(problems, names, {(s, p.id): "3" for s in names for p in problems})
    lines = [line for line in markdown(table, names).splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", line)) - 1 for line in lines} == {4, 6}  # scores, differences
    shown = io.StringIO()
    print_tables(markdown(table, names), Console(file=shown, force_terminal=True, width=200))
    assert {"a|b,", "b|c"} <= set(shown.getvalue().split())
    for write in (write_bars, write_radar):
        write(table, names, tmp_path / "picture.png")
        assert (tmp_path / "picture.png").stat().st_size > 1000
    del table["tasks"]["a|b"], table["tasks"]["$x^"]
    write_radar(table, names, tmp_path / "picture.png")  # none of two rows, and none that an earlier table had
    assert not (tmp_path / "picture.png").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_records_on_a_full_disk_are_one_line(tmp_path):
    records = Records(tmp_path, {})
    records.path.unlink(missing_ok=True)
    records.path.symlink_to("/dev/full")
    with pytest.raises(InputError, match=rf"{records.path}: cannot be written \(No space left on device\)"):
        records.add([{"system": "a", "id": "b", "answer": "c"}])
    assert not records.done


def test_a_record_has_its_scores(tmp_path):
    problems = [single(3), composite(0), single(1), composite(1), single(2)]
    records = Records(tmp_path, {})

    calls = []

    def say(asked):
        calls.append(len(asked))
        return enumerate({"answer": "1. 3\n" if p.tasks else "4"} for _, p in asked)

    counts = []
    systems = {"a": say, "oracle": say}
    run(problems, systems, records, lambda *seen: counts.append(seen), {("oracle", "pair")})
    assert counts[-1][:2] == (8, 8)
    assert collections.Counter(system for *_, system in counts) == {"a": 5, "oracle": 3}
    assert calls == [8], "systems with one answer are asked together"
    lines = [json.loads(line) for line in (tmp_path / "records.jsonl").read_text().splitlines()]
    assert len(lines) == 8
    pair = next(r for r in lines if r["id"] == "pair/test/1")
    assert (pair["answers"], pair["scores"]["attempted"], pair["scores"]["correct"]) == (["3", ""], 1, 1)
    plain = next(r for r in lines if r["id"] == "object_counting/test/1")
    assert plain["scores"] == {"accuracy": 0.0, "loraretriever": {"exact_match": 0.0}}


def test_settings_that_are_none_are_refused(tmp_path):
    (tmp_path / "run.json").write_text("[1]")
    with pytest.raises(InputError, match=r"run\.json: expected a run's settings, found list"):
        Records(tmp_path, {})


def test_more_banks_may_join_a_run_but_not_others(tmp_path):
    Records(tmp_path, {"split": "test", "system banks": {"lora-b": "1"}})
    Records(tmp_path, {"split": "test", "system banks": {"lora-f": "2"}})
    assert json.loads((tmp_path / "run.json").read_text())["system banks"] == {"lora-b": "1", "lora-f": "2"}
    Records(tmp_path, {"split": "test", "system banks": {}, "files": {"bank.json": "1"}})  # of a later version
    with pytest.raises(InputError, match=r"files: bank\.json: expected '2' to resume, found '1'"):
        Records(tmp_path, {"split": "test", "system banks": {}, "files": {"bank.json": "2"}})
    with pytest.raises(InputError, match="system banks: lora-b: expected '3' to resume, found '1'"):
        Records(tmp_path, {"split": "test", "system banks": {"lora-b": "3"}})
    with pytest.raises(InputError, match="max_new_tokens: expected 4 to resume, found None"):
        Records(tmp_path, {"split": "test", "system banks": {}, "max_new_tokens": 4})
