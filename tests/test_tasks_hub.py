"""Tasks of the hub from rows as it has them, and the command that prepares tasks; nothing is downloaded."""

import json
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from task_files import BIGBENCH, all_examples, composite_problem, digest
from test_cli import refused, run

from meteora_jax.config import InputError
from meteora_jax.evaluation.tasks import (
    SPLITS,
    hub,
    load_split,
    split_of,
)


def translation(language, foreign, english):
    return {"id": "0", "translation": {language: foreign, "en": english}}


ALPACA_ROW = {"instruction": "Remove the duplicates.", "input": "[3, 7, 3]", "output": " [3, 7]\n", "text": "unused"}
ROWS = {  # as `datasets` gives them: a data set's splits, each with its rows
    ("tatsu-lab/alpaca", "default"): {
        "train": [ALPACA_ROW, {"instruction": "Greet.", "input": "", "output": "Hello."}]
    },
    ("abisee/cnn_dailymail", "3.0.0"): {
        "train": [{"id": "1", "article": "A cat sat.", "highlights": "Cat sits ."}],
        "validation": [],
        "test": [],
    },
    ("openai/gsm8k", "main"): {
        "train": [{"question": "1 + 1?", "answer": "It is <<1+1=2>>2.\n#### 2"}],
        "test": [],
    },
    ("Helsinki-NLP/news_commentary", "de-en"): {"train": [translation("de", "Recht im Tschad", "Justice in Chad")]},
    ("Helsinki-NLP/news_commentary", "en-es"): {"train": [translation("es", "La paz {es}", "Peace {es}")]},
    ("Helsinki-NLP/news_commentary", "en-it"): {"train": [translation("it", "La pace", "Peace")]},
}


def read_rows(dataset, config):
    return ROWS[dataset, config]


SUMMARIZE = "Generate a summarization of the news article."
PROBLEMS = {
    # A line break even without an input, as in composite-10.
    "alpaca": {"Remove the duplicates.\n[3, 7, 3]": "[3, 7]", "Greet.\n": "Hello."},
    "cnn_dailymail": {f"{SUMMARIZE}\nA cat sat.": "Cat sits ."},
    "gsm8k": {"1 + 1?": "It is <<1+1=2>>2.\n#### 2"},
    "news_commentary_de": {"Den folgenden Text ins Englische übersetzen.\nRecht im Tschad": "Justice in Chad"},
    "news_commentary_es": {"Traducir las siguientes frases al inglés.\nLa paz {es}": "Peace {es}"},
    "news_commentary_it": {"Tradurre le seguenti frasi in inglese.\nLa pace": "Peace"},
}


@pytest.mark.parametrize("task", hub.HUB_TASKS)
def test_prompts_of_the_hub(tmp_path, task):
    hub.prepare(tmp_path, [task], read_rows=read_rows)
    expected = {f"[INST] {inputs} [/INST]\n": answer for inputs, answer in PROBLEMS[task].items()}
    assert {example.prompt: example.response for example in all_examples(tmp_path, task)} == expected


def prompts_by_split(tasks_dir, task):
    return {split: {example.prompt for example in load_split(tasks_dir, task, split)} for split in SPLITS}


@pytest.mark.parametrize("task", ["alpaca", "news_commentary_de"])
def test_hub_rows_are_split_by_their_own_input(tmp_path, task):
    if task == "alpaca":
        texts = [f"Summarise.\ntext {i}" for i in range(60)]
        rows = [{"instruction": "Summarise.", "input": f"text {i}", "output": "A text."} for i in range(60)]
    else:
        texts = [f"Satz {i}" for i in range(60)]
        rows = [translation("de", f" {text} ", "A sentence.") for text in texts]
    listed = {task: frozenset(digest(text) for text in texts[:7])}
    (counts,) = hub.prepare(tmp_path, [task], listed, lambda *_: {"train": rows})
    found = prompts_by_split(tmp_path, task)
    for i, text in enumerate(texts):
        split = "test" if i < 7 else split_of(text)
        assert any(f"{text} " in prompt for prompt in found[split])
    assert (counts.pinned, counts.listed) == (7, 7)
    assert sum(map(len, found.values())) == counts.train + counts.test + counts.holdout == 60


def test_a_test_split_of_its_own_stays_the_test_split(tmp_path):
    def row(i):
        return {"question": f"{i}?", "answer": f"#### {i}"}

    rows = {"train": [row(i) for i in range(100)], "test": [row(i) for i in range(99, 140)]}
    listed = frozenset({digest("0?")})
    (counts,) = hub.prepare(tmp_path, ["gsm8k"], {"gsm8k": listed}, lambda *_: rows)
    found = prompts_by_split(tmp_path, "gsm8k")
    asked = {i: f"[INST] {i}? [/INST]\n" for i in range(140)}
    assert found["test"] == {asked[i] for i in (0, *range(99, 140))}  # 99 is in both
    assert found["holdout"] == {asked[i] for i in range(1, 99) if split_of(f"{i}?") == "holdout"} != set()
    assert counts.test == 43


def test_blank_rows_are_counted_and_left_out(tmp_path):
    rows = [translation("it", "La pace", "Peace"), translation("it", " ", "x"), translation("it", "La pace", "\n")]
    (counts,) = hub.prepare(tmp_path, ["news_commentary_it"], read_rows=lambda *_: {"train": rows})
    assert counts.blank == 2
    assert counts.train + counts.test + counts.holdout == 1


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"instruction": "x", "output": "y"},
            "input: expected a string, found only the fields .'instruction', 'output'.",
        ),
        ({"instruction": "x", "input": None, "output": "y"}, "input: expected a string, found NoneType"),
        ({"translation": "x"}, "translation: expected an object, found str"),
    ],
)
def test_malformed_hub_rows_are_refused(tmp_path, row, message):
    where = r"tatsu-lab/alpaca \(default\), train, row 1: "
    with pytest.raises(InputError, match=where + message):
        hub.prepare(tmp_path, ["alpaca"], read_rows=lambda *_: {"train": [ALPACA_ROW, row]})
    assert not list(tmp_path.iterdir())


# --- the command ---


@pytest.fixture
def fake_hub(monkeypatch):
    """`datasets`, whose hub has ROWS and nothing else; the test may change what it does."""

    def load_dataset(dataset, config):
        if (dataset, config) not in ROWS:
            raise ConnectionError(f"Couldn't reach {dataset!r} on the Hub\n(retried)")
        return ROWS[dataset, config]

    module = SimpleNamespace(load_dataset=load_dataset)
    monkeypatch.setitem(sys.modules, "datasets", module)
    return module


def test_command_writes_bigbench_tasks_and_its_report(tmp_path, capsys, tasks_dir):
    listing, report = tmp_path / "listing", tmp_path / "report.json"
    listing.write_text(f"{digest('Ana finished above Rob.')} logical_deduction\n")
    status, out, _ = run(
        capsys, "prepare", BIGBENCH, tmp_path / "out", "--tasks", "logical_deduction", "winowhy",
        "--test-inputs", listing, "--json", report,
    )  # fmt: skip
    assert status == 0
    assert "logical_deduction" in out
    assert "1/1" in out
    assert [row["task"] for row in json.loads(report.read_text())["tasks"]] == ["logical_deduction", "winowhy"]
    for split in SPLITS:
        name = f"winowhy/{split}.jsonl"
        assert (tmp_path / "out" / name).read_bytes() == (tasks_dir / name).read_bytes()


@pytest.mark.usefixtures("fake_hub")
def test_command_writes_the_six_of_the_hub(tmp_path, capsys):
    assert run(capsys, "prepare", "hub", tmp_path)[0] == 0
    assert {path.name for path in tmp_path.iterdir()} == set(hub.HUB_TASKS)
    assert "expected tasks of the hub" in refused(capsys, "prepare", "hub", tmp_path, "--tasks", "winowhy")


def test_command_says_what_it_did_not_reproduce(tmp_path, capsys, tasks_dir):
    reference, report = tmp_path / "composite.jsonl", tmp_path / "report.json"
    arguments = ["prepare", BIGBENCH, tmp_path / "out", "--tasks", "strategyqa", "--verify", reference]
    known = all_examples(tasks_dir, "strategyqa")[0]
    reference.write_text(json.dumps(composite_problem(strategyqa=(known.prompt, known.response))) + "\n")
    status, out, _ = run(capsys, *arguments)
    assert status == 0
    assert "1/1" in out
    foreign = "[INST] Q: Is ice warm?\nA: [/INST]\n"
    reference.write_text(json.dumps(composite_problem(strategyqa=(foreign, "No."))) + "\n")
    said = refused(capsys, *arguments, "--json", report)
    assert said.endswith("composite.jsonl: expected every question among the prompts, found strategyqa without 1")
    assert json.loads(report.read_text())["reproduction"][0]["different"] == [foreign, foreign]


def test_command_without_datasets_names_the_extra(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "pip install 'meteora-jax[eval]'" in refused(capsys, "prepare", "hub", tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [ConnectionError("Couldn't reach it\n(offline)"), TimeoutError(), ValueError("none")])
def test_command_without_the_hub_is_refused(tmp_path, capsys, fake_hub, error):
    def load_dataset(dataset, config):
        raise error

    fake_hub.load_dataset = load_dataset
    said = refused(capsys, "prepare", "hub", tmp_path, "--tasks", "gsm8k")
    assert "openai/gsm8k (main): expected the Hugging Face hub to have it, found: " in said
    assert said.endswith(" ".join(str(error).split()) or "TimeoutError")


def test_script_takes_the_same_arguments(tmp_path, monkeypatch):
    script = Path(__file__).parents[1] / "scripts" / "prepare_tasks.py"
    arguments = [str(script), str(BIGBENCH), str(tmp_path / "tasks"), "--tasks", "winowhy"]
    monkeypatch.setattr(sys, "argv", arguments)
    runpy.run_path(str(script), run_name="__main__")
    assert all_examples(tmp_path / "tasks", "winowhy")
