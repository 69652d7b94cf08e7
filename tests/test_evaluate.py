"""`meteora evaluate`: the same table in one go, in pieces, at any batch size; and refusals."""

import json
import re
import shutil
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from worlds import NAMES

import meteora_jax as mj
from meteora_jax.cli import main
from meteora_jax.cli.comparison import fingerprint
from meteora_jax.cli.evaluate import Evaluate, answering
from meteora_jax.config import InputError
from meteora_jax.evaluation import runner
from meteora_jax.evaluation.problems import Problem, load_problems
from meteora_jax.evaluation.systems import System
from meteora_jax.evaluation.table import markdown, tabulate
from meteora_jax.gate_config import GateConfig
from meteora_jax.io.gates import save_gates
from meteora_jax.routing.by_score import Arrow
from meteora_jax.routing.fixed import Fixed
from meteora_jax.routing.gates import Gates
from meteora_jax.routing.retrieval import Retrieval

TASKS = ("winowhy", "disfl_qa", "object_counting")


@pytest.fixture
def tasks(tmp_path):
    for task in TASKS:
        (tmp_path / "tasks" / task).mkdir(parents=True)
        lines = [{"prompt": f"{task} {'long ' * (i % 4)}{i}\n", "response": str(i % 3)} for i in range(7)]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / "tasks" / task / "test.jsonl").write_text(text)
    return tmp_path / "tasks"


def echo(asked):
    """A system that is right on every second problem, without a model."""
    problems = [p for _, p in asked]
    said = [p.response if int(p.id.split("/")[-1]) % 2 else "?" for p in problems]
    return list(enumerate({"answer": a, "tokens": 1} for a in said))


def no_progress(done, total, system):
    pass


SETTINGS = {"base": "x", "split": "test"}


def table_of(tasks, out, answer=echo):
    problems = load_problems(tasks, TASKS, "test", None)
    records = runner.Records(out, SETTINGS)
    runner.run(problems, {"echo": answer}, records, no_progress)
    return tabulate(problems, ["echo"], records.answers)


def test_table_counts_what_was_right(tmp_path, tasks):
    table = table_of(tasks, tmp_path / "run")
    assert all(np.isclose(row["echo"]["accuracy"], 3 / 7) for row in table["tasks"].values())
    assert np.isclose(table["mean accuracy"]["echo"], 3 / 7)
    text = markdown(table, ["echo"])
    assert text.count("| 7 | 42.9 [") == 3


@pytest.mark.parametrize("cut", [1, 40, None])
def test_a_killed_run_goes_on_and_redoes_nothing(tmp_path, tasks, cut, monkeypatch):
    monkeypatch.setattr(runner, "KEPT", 2)
    want = table_of(tasks, tmp_path / "whole")
    asked = []

    def dies(problems):
        for place, said in echo(problems):
            if place == 8:
                raise KeyboardInterrupt
            yield place, said

    with pytest.raises(KeyboardInterrupt):
        table_of(tasks, tmp_path / "run", answer=dies)
    file = tmp_path / "run" / runner.RECORDS
    assert len(file.read_bytes().splitlines()) == 8
    if cut:  # the kill came while the last line was written: its problem is asked again
        file.write_bytes(file.read_bytes()[:-cut])
    kept = [json.loads(line) for line in file.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
    assert len(kept) == 8 - bool(cut)

    def answer(problems):
        asked.extend(p.id for _, p in problems)
        return reversed(echo(problems))  # whoever ends first is recorded first

    assert table_of(tasks, tmp_path / "run", answer=answer) == want
    every = sorted(p.id for p in load_problems(tasks, TASKS, "test", None))
    assert sorted([*asked, *(r["id"] for r in kept)]) == every
    records = [json.loads(line) for line in file.read_text().splitlines()]
    assert records[: len(kept)] == kept
    assert sorted(r["id"] for r in records) == every


def test_other_settings_and_damaged_records_are_refused(tmp_path, tasks):
    table_of(tasks, tmp_path / "run")
    with pytest.raises(InputError, match=r"run\.json: base: expected 'y' to resume, found 'x'"):
        runner.Records(tmp_path / "run", {**SETTINGS, "base": "y"})
    file = tmp_path / "run" / runner.RECORDS
    whole = file.read_text()
    twice = whole.partition("\n")[0][:-1] + ', "id": [1]}'
    for bad in ("not a record", '{"system": "echo", "id": "winowhy/test/0"}', twice):
        file.write_text(f"{bad}\n{whole}")
        with pytest.raises(InputError, match=f"expected a record a line, found b'{re.escape(bad[:12])}"):
            runner.Records(tmp_path / "run", SETTINGS)
    file.write_text(whole.replace('"answer": "?"', '"answer": null', 1))
    with pytest.raises(InputError, match="expected a record a line"):
        runner.Records(tmp_path / "run", SETTINGS)


def test_a_resumed_run_refuses_other_problems_and_other_weights(tmp_path, tasks, world):
    table_of(tasks, tmp_path / "run")
    file = tasks / "winowhy" / "test.jsonl"
    file.write_text(file.read_text().replace('"prompt": "winowhy ', '"prompt": "another '))
    with pytest.raises(InputError, match="expected the problem of the task's file"):
        table_of(tasks, tmp_path / "run")
    config, arrays = GateConfig(NAMES, 2, 1.0), world["gate_arrays"]
    save_gates(tmp_path / "same", config, arrays)
    save_gates(tmp_path / "retrained", config, {p: g + 1 for p, g in arrays.items()})  # same names, same size
    assert fingerprint(tmp_path / "same") == fingerprint(world["gates"]) != fingerprint(tmp_path / "retrained")


def test_limit_chooses_by_hash_and_grows(tasks):
    few, many = (load_problems(tasks, TASKS, "test", n) for n in (2, 4))
    assert len(few) == 6
    assert {p.id for p in few} < {p.id for p in many}


@pytest.mark.exhaustive(
    "answers are compared below and in test_evaluate_model; test_evaluation_rows draws the pictures"
)
def test_command_writes_records_table_and_pictures(tmp_path, tasks, world, capsys):
    for name, task in zip(NAMES, TASKS, strict=False):
        (tasks / task).rename(tasks / name)
    folders = [w for k in ("base", "bank", "gates") for w in (f"--{k}", str(world[k]))]
    options = ["--tasks", str(tasks), "--out", str(tmp_path / "run"), "--max-new-tokens", "3", "--limit", "3"]
    for name, task in zip(NAMES, TASKS, strict=False):
        (tasks / name).rename(tasks / task)
    systems = "base,gates-top1,gates-top2,cedar"
    for _ in range(2):  # the second time everything is there
        main(["evaluate", *folders, *options, "--only", ",".join(TASKS), "--systems", systems])
    records = [json.loads(line) for line in (tmp_path / "run" / "records.jsonl").read_text().splitlines()]
    mine = [r for r in records if r["system"] in systems.split(",") and r["task"] in TASKS]
    assert len(mine) == 4 * 9
    model = world["model"]
    for r in [r for r in mine if r["system"] == "base"][:6]:
        assert r["answer"] == model.generate([r["prompt"]], None, max_new_tokens=3)[0].text
    assert all(abs(sum(r["routing"].values()) - 1) < 0.01 for r in mine if r["system"] != "base")
    table = json.loads((tmp_path / "run" / "table.json").read_text())
    assert set(table["tasks"]) == set(TASKS)
    for picture in ("bars.png", "radar.png"):
        assert (tmp_path / "run" / picture).read_bytes().startswith(b"\x89PNG")
    assert "winowhy" in (tmp_path / "run" / "table.md").read_text()


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        (["--systems", "oracle"], "oracle: expected an adapter for every task, found none for winowhy"),
        (["--systems", "elm"], "found 'elm'"),
        (["--systems", "base", "--split", "train"], "train.jsonl: expected the train split"),
    ],
)
def test_refusals(tmp_path, tasks, world, capsys, extra, said):
    folders = [w for k in ("base", "bank", "gates") for w in (f"--{k}", str(world[k]))]
    with pytest.raises(SystemExit) as refusal:
        main(["evaluate", *folders, "--tasks", str(tasks), "--out", str(tmp_path / "run"), "--only", "winowhy", *extra])
    assert refusal.value.code == 1
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("command", "most"), [("evaluate", 18), ("throughput", 19)])
def test_few_options(capsys, command, most):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    options = set(re.findall(r"^[│ ] (--[a-z-]+)", capsys.readouterr().out, re.MULTILINE))
    assert {"--base", "--systems", "--distributed", "--mesh", "--json"} < options
    assert len(options) <= most, sorted(options)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["winowhy"], "--metric: expected TASK=METRIC, found 'winowhy'"),
        (["winowhy=exact", "winowhy=bleu"], "--metric: expected one of winowhy, found 2"),
        (["disfl_qa=exact"], "--metric: expected tasks that are asked, found disfl_qa"),
        (["winowhy=f1"], "--metric winowhy=f1: expected exact, contains, choice, number, bleu, rouge, rougeL, regex:"),
        (["winowhy=regex:(0"], "--metric winowhy=regex:(0: expected a regular expression, found one that does not"),
    ],
)
def test_metrics_that_do_not_fit_are_refused_before_anything_runs(tmp_path, tasks, world, capsys, words, said):
    options = ["--tasks", str(tasks), "--out", str(tmp_path / "run"), "--only", "winowhy", "--systems", "base"]
    with pytest.raises(SystemExit) as refusal:
        main(["evaluate", "--base", str(world["base"]), *options, *(w for m in words for w in ("--metric", m))])
    assert refusal.value.code == 1
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_own_tasks_in_any_form_are_answered_and_scored_by_the_metric_asked_for(tmp_path, world):
    """Text and conversations, one task that may say less than the others, in batches of both systems."""
    talk = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "How many apples?"}]
    answered = {"messages": [*talk, {"role": "assistant", "content": "3 apples"}]}
    for i, lines in enumerate(([answered] * 3, [{"prompt": "Which?", "response": "a"}])):
        (tmp_path / "tasks" / NAMES[i]).mkdir(parents=True)
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / "tasks" / NAMES[i] / "test.jsonl").write_text(text)
    (tmp_path / "tasks" / "birch" / "task.json").write_text('{"max_new_tokens": 2}')
    folders = [w for k in ("base", "bank", "gates") for w in (f"--{k}", str(world[k]))]
    options = ["--tasks", str(tmp_path / "tasks"), "--out", str(tmp_path / "run"), "--max-new-tokens", "4"]
    asked = ["--only", "apple,birch", "--systems", "base,oracle", "--metric", r"apple=regex:\d", "--json"]
    main(["evaluate", *folders, *options, *asked, str(tmp_path / "table.json")])
    records = [json.loads(line) for line in (tmp_path / "run" / "records.jsonl").read_text().splitlines()]
    assert len(records) == 8
    model = world["model"]
    for r in records:
        router = Fixed(r["task"]) if r["system"] == "oracle" else None
        tokens = 4 if r["task"] == "apple" else 2
        (said,) = model.generate([talk if r["task"] == "apple" else "Which?"], router, max_new_tokens=tokens)
        assert (r["answer"], r["tokens"]) == (said.text, len(said.token_ids))
    table = json.loads((tmp_path / "table.json").read_text())
    assert table["metrics"]["apple"] == {"name": r"regex:\d", "because": ""}
    assert table["metrics"]["birch"]["name"] == "exact"
    assert json.loads((tmp_path / "run" / "run.json").read_text())["new_tokens"] == {"apple": 4, "birch": 2}


def test_a_run_does_not_go_on_with_renamed_adapters_or_another_chat_template(tmp_path, world, capsys):
    """Their weights are the same, and the answers are not."""
    (tmp_path / "tasks" / "apple").mkdir(parents=True)
    line = {"prompt": "Which?", "response": "a"}
    (tmp_path / "tasks" / "apple" / "test.jsonl").write_text(json.dumps(line) + "\n")
    bank, base = (shutil.copytree(world[k], tmp_path / k) for k in ("bank", "base"))
    options = ["--tasks", str(tmp_path / "tasks"), "--out", str(tmp_path / "run"), "--max-new-tokens", "2"]
    command = ["evaluate", "--base", str(base), "--bank", str(bank), *options, "--only", "apple", "--systems", "oracle"]
    main(command)
    for old, new in (("apple", "third"), ("birch", "apple"), ("third", "birch")):
        main(["bank", "rename", str(bank), old, new])
    template = base / "chat_template.jinja"
    template.write_text("{{ messages[0].content }}")
    with pytest.raises(SystemExit):
        main(command)
    error = capsys.readouterr().err
    assert "run.json: files: bank/bank.json: expected '" in error
    assert "run.json: files: tokenizer: expected '" in error


def test_systems_that_choose_alike_are_asked_together():
    """One adapter a request, or none, however it is found; gates of any top-k; the others each by themselves."""
    index = mj.Index.build({name: [f"{name} {i}" for i in range(3)] for name in NAMES})
    several = Fixed(dict.fromkeys(NAMES[:3], 1 / 3))
    routers: dict[str, Any] = {
        "base": None, "oracle": Fixed(NAMES[0]), "uniform": several, "gates-top1": Gates(1), "gates-top2": Gates(2),
        "selection": Retrieval(index, k=1, compose="selection"), "mixture": Retrieval(index, k=2), "arrow": Arrow(2),
    }  # fmt: skip
    model: Any = SimpleNamespace(bank=None)
    systems = [System(name, model, lambda _, r=router: r, name != "oracle") for name, router in routers.items()]
    single, composite = Problem("a", "winowhy", "", ""), Problem("b", "both", "", "", tasks=("winowhy", "disfl_qa"))
    for problems in ([single], [composite, single]):
        answers = answering(systems, problems, {("oracle", "both")}, Evaluate.__new__(Evaluate))
        groups: dict[int, set[str]] = {}
        for name, answer in answers.items():
            groups.setdefault(id(answer), set()).add(name)
        alike = [{"base", "oracle", "selection"}, {"gates-top1", "gates-top2"}, {"uniform"}, {"mixture"}, {"arrow"}]
        assert sorted(groups.values(), key=sorted) == sorted(alike, key=sorted)
