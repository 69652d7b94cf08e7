"""Task preparation on a hand-made BIG-bench folder and on rows as the hub has them; nothing is downloaded."""

import hashlib
import json
import runpy
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_cli import refused, run

from meteora_jax.cli.prepare import Prepare
from meteora_jax.cli.prepare import prepare as run_prepare
from meteora_jax.config import InputError
from meteora_jax.evaluation.tasks import (
    METEORA_TASKS,
    SPLITS,
    SUBSTITUTES,
    Example,
    bigbench,
    hub,
    load_split,
    read_test_inputs,
    split_of,
    write_splits,
)
from meteora_jax.evaluation.tasks.bigbench import BIGBENCH_TASKS, COMPOSITE_10, prepare, verify

BIGBENCH = Path(__file__).parent / "fixtures" / "bigbench"
FIXTURE_TASKS = ("logical_deduction", "object_counting", "question_selection", "strategyqa", "winowhy")


@pytest.fixture
def tasks_dir(tmp_path):
    prepare(BIGBENCH, tmp_path / "tasks", FIXTURE_TASKS)
    return tmp_path / "tasks"


def all_examples(tasks_dir, task):
    return [example for split in SPLITS for example in load_split(tasks_dir, task, split)]


def digest(text):
    return hashlib.sha256(text.encode()).hexdigest()


def write_task(root, task, content):
    path = root / "bigbench" / "benchmark_tasks" / task / "task.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(content))


def test_there_are_22_bigbench_tasks_and_6_of_the_hub():
    assert len(METEORA_TASKS) == 28
    assert list(METEORA_TASKS) == sorted(METEORA_TASKS)
    assert len(BIGBENCH_TASKS) == 22
    assert {*BIGBENCH_TASKS, *hub.HUB_TASKS} == set(METEORA_TASKS)


def test_substitutes_are_prepared_when_asked_for(tmp_path):
    for task in SUBSTITUTES:
        write_task(tmp_path, task, {"examples": [{"input": f"{task}?", "target_scores": {"yes": 1, "no": 0}}]})
    assert [row.task for row in prepare(tmp_path, tmp_path / "tasks", SUBSTITUTES)] == list(SUBSTITUTES)
    (example,) = all_examples(tmp_path / "tasks", "navigate")
    assert example.response == "yes"
    with pytest.raises(InputError, match="--substitutes: expected BIG-bench as the source, found the hub"):
        run_prepare(Prepare(source="hub", dest=tmp_path / "tasks", substitutes=True))


# --- the text of prompts and answers ---


def test_prefixes_default_to_q_and_a_and_outer_whitespace_goes(tasks_dir):
    expected = Example("[INST] Q: Is ice cold?\nA: [/INST]\n", "Yes. It is frozen water.")
    assert expected in all_examples(tasks_dir, "strategyqa")


def test_exact_duplicates_count_once_and_differing_answers_stay(tasks_dir):
    assert len(all_examples(tasks_dir, "strategyqa")) == 3


def test_first_of_several_targets_is_the_answer(tasks_dir):
    (example,) = all_examples(tasks_dir, "object_counting")
    assert example == Example("[INST] Q: I have a flute and a drum. How many?\nA: [/INST]\n", "two")


def test_bigbench_choices_are_permuted_as_bigbench_does(tasks_dir):
    prompts = {example.prompt: example.response for example in all_examples(tasks_dir, "question_selection")}
    start = "[INST] Select the question.\n\nHere is the answer.\nShort Answer: "
    end = "\nChoose the question. [/INST]\n"
    assert prompts == {
        f"{start}8\n  choice: What is the second?\n  choice: An odd one?{end}": "What is the second?",
        f"{start}9\n  choice: b?\n  choice: d?\n  choice: a?\n  choice: c?{end}": "d?",
    }


def test_place_of_a_choice_does_not_tell_the_right_one():
    # The same choices in any order of the file, which may begin with the right one.
    assert bigbench.permuted(["d", "b", "a", "c"]) == bigbench.permuted(["a", "c", "d", "b"]) == ["b", "d", "a", "c"]


def test_append_choices_takes_the_truth_of_a_string_as_bigbench_does():
    sample = {"input": "x", "target_scores": {"a": 1, "b": 0}}
    assert "choice: a" in bigbench.format_prompt("winowhy", {"append_choices_to_input": "false"}, sample)
    assert "choice: a" not in bigbench.format_prompt("winowhy", {"append_choices_to_input": False}, sample)


def test_logical_deduction_gets_a_question_and_a_line_a_choice(tasks_dir):
    examples = all_examples(tasks_dir, "logical_deduction")
    assert len(examples) == 4
    prompt = (
        "[INST] A set of three objects.\n\nAna finished above Rob. Which choice is correct?\n"
        "choice: Rob is first.\nchoice: Ana is first.\n [/INST]\n"
    )
    assert Example(prompt, "Ana is first.") in examples


def test_unit_conversion_without_choices_gets_no_choice_lines():
    content = {"example_input_prefix": "\n", "example_output_prefix": ""}
    prompt = bigbench.format_prompt("unit_conversion", content, {"input": "In grams, how much is 1mg?"})
    assert prompt == "[INST] In grams, how much is 1mg? [/INST]\n"


# --- splits ---


def test_split_follows_the_first_hex_digit_of_the_stripped_input():
    found = set()
    for i in range(200):
        text = f"input {i}"
        expected = {"d": "test", "e": "test", "f": "holdout"}.get(digest(text)[0], "train")
        assert split_of(f" {text}\n") == split_of(text) == expected
        found.add(expected)
    assert found == set(SPLITS)


def test_equal_inputs_share_a_split(tasks_dir):
    for split in SPLITS:
        swims = [example for example in load_split(tasks_dir, "strategyqa", split) if "swim" in example.prompt]
        assert len(swims) in (0, 2)


def test_listed_inputs_are_test(tmp_path):
    train_inputs = ["Ana finished above Rob.", "Amy finished above Eli."]
    listing = tmp_path / "test_inputs.sha256"
    listing.write_text("".join(f"{digest(text)} logical_deduction\n" for text in train_inputs))
    (counts,) = prepare(BIGBENCH, tmp_path / "tasks", ["logical_deduction"], read_test_inputs(listing))
    assert (counts.train, counts.test, counts.holdout) == (0, 4, 0)
    assert (counts.pinned, counts.listed) == (2, 2)


def test_listed_inputs_must_be_digests(tmp_path):
    listing = tmp_path / "test_inputs.sha256"
    listing.write_text(f"{'0' * 64} winowhy\nabc winowhy\n")
    with pytest.raises(match=r"test_inputs.sha256:2: expected 64 hex digits and a task, found 'abc"):
        read_test_inputs(listing)
    listing.write_text(f"{'0' * 64} winowhi\n")
    with pytest.raises(match=r"test_inputs.sha256:1: expected one of the 28 tasks, found 'winowhi'"):
        read_test_inputs(listing)
    listing.write_bytes(b"0" * 64 + b" \xff\n")
    with pytest.raises(InputError, match=r"test_inputs.sha256:1: expected one of the 28 tasks"):
        read_test_inputs(listing)


def test_archive_and_folder_give_the_same_files(tmp_path, tasks_dir):
    archive = tmp_path / "bigbench-1.0.0.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(BIGBENCH, arcname="bigbench-1.0.0")
    prepare(archive, tmp_path / "from_archive", FIXTURE_TASKS)
    for path in tasks_dir.rglob("*"):
        if path.is_file():
            assert (tmp_path / "from_archive" / path.relative_to(tasks_dir)).read_bytes() == path.read_bytes()


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tasks_dir):
    before = {path.name: path.read_bytes() for path in (tasks_dir / "winowhy").iterdir()}
    with pytest.raises(UnicodeEncodeError):
        write_splits(tasks_dir / "winowhy", {"test": [Example("x", "\ud800")]})
    assert {path.name: path.read_bytes() for path in (tasks_dir / "winowhy").iterdir()} == before


# --- refusals: one line each ---


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"examples": [{"target": "a"}]},
            "winowhy/task.json: example 0: input: expected a string, found NoneType",
        ),
        (
            {"examples": [{"input": "x"}]},
            "example 0: target: expected target or target_scores, found only .'input'.",
        ),
        ({"examples": {}}, "winowhy/task.json: examples: expected a list, found dict"),
        (
            {"examples": [{"input": "x", "target_scores": {"a": 0, "b": 0}}]},
            "example 0: target_scores: expected a choice above the others",
        ),
        ({"examples": ["x"]}, "winowhy/task.json: example 0: expected a JSON object, found str"),
        (
            {"examples": [{"input": "x", "target_scores": ["a"]}]},
            "example 0: target_scores: expected a JSON object, found list",
        ),
        (["x"], "winowhy/task.json: expected a JSON object, found list"),
    ],
)
def test_malformed_task_files_are_refused(tmp_path, content, message):
    write_task(tmp_path, "winowhy", content)
    with pytest.raises(InputError, match=message):
        prepare(tmp_path, tmp_path / "tasks", ["winowhy"])


@pytest.mark.parametrize("content", [b"{", b'"\xff"'])
def test_a_task_file_that_is_no_json_is_refused(tmp_path, content):
    write_task(tmp_path, "winowhy", {})
    (tmp_path / "bigbench/benchmark_tasks/winowhy/task.json").write_bytes(content)
    with pytest.raises(InputError, match=r"winowhy/task.json: expected a JSON object, found a file that is none"):
        prepare(tmp_path, tmp_path / "tasks", ["winowhy"])


def test_missing_task_and_missing_source_are_refused(tmp_path):
    with pytest.raises(match=r"expected bigbench/benchmark_tasks/<task>/task.json, found none for disfl_qa"):
        prepare(BIGBENCH, tmp_path, ["winowhy", "disfl_qa"])
    with pytest.raises(InputError, match=r"nowhere: expected a BIG-bench folder or sdist"):
        prepare(tmp_path / "nowhere", tmp_path, ["winowhy"])
    with pytest.raises(InputError, match=r"tasks: expected BIG-bench tasks .*, found alpaca$"):
        prepare(BIGBENCH, tmp_path, ["alpaca"])


def test_a_truncated_archive_is_refused(tmp_path):
    whole = tmp_path / "whole.tar.gz"
    with tarfile.open(whole, "w:gz") as tar:
        tar.add(BIGBENCH, arcname="bigbench-1.0.0")
    cut = tmp_path / "cut.tar.gz"
    cut.write_bytes(whole.read_bytes()[:-200])
    with pytest.raises(InputError, match=r"cut.tar.gz: expected a whole tar archive"):
        prepare(cut, tmp_path / "tasks", FIXTURE_TASKS)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "test.jsonl:2: expected a JSON object, found '{"),
        ('["a", "b"]', "test.jsonl:2: expected a JSON object, found "),
        ('{"prompt": "a"}', "test.jsonl:2: response: expected a string, found only the keys"),
        ('{"prompt": 1, "response": "b"}', "test.jsonl:2: prompt: expected a string, found 1$"),
        (r'{"prompt": "hi \ud83d", "response": "b"}', "test.jsonl:2: prompt: expected text that UTF-8 can hold, found"),
        (r'{"prompt": "a", "response": "\udc00"}', "test.jsonl:2: response: expected text that UTF-8 can hold, found"),
        ('\n{"prompt": "a", "response": "b"}', "test.jsonl:2: expected a JSON object, found a blank line"),
        ("[" * 100_000, "test.jsonl:2: expected a JSON object, found "),
    ],
)
def test_malformed_lines_are_refused(tmp_path, line, message):
    path = tmp_path / "winowhy" / "test.jsonl"
    path.parent.mkdir()
    path.write_text(f'{{"prompt": "a", "response": "b"}}\n{line}\n')
    with pytest.raises(InputError, match=message):
        load_split(tmp_path, "winowhy", "test")


def test_a_missing_split_is_refused(tmp_path):
    with pytest.raises(match=r"holdout.jsonl: expected the holdout split of winowhy, found no file"):
        load_split(tmp_path, "winowhy", "holdout")


# --- against a composite file ---


def composite_problem(**asked):
    """A composite-10 problem that asks `asked`, by task, in all three rounds; other questions are dots."""
    prompts = [asked.get(task, ("[INST] . [/INST]\n", ""))[0] for task in COMPOSITE_10]
    answers = [asked.get(task, ("", "."))[1] for task in COMPOSITE_10]
    round_of_ten = "\n".join(prompts)
    dedented = round_of_ten.replace("\n  choice", "\nchoice")
    return {"prompt": dedented + dedented + round_of_ten, "response": "@@@@\n".join(answers)}


def test_verify_counts_what_is_reproduced_and_names_what_is_not(tmp_path, tasks_dir):
    known = next(example for example in all_examples(tasks_dir, "question_selection") if "9" in example.prompt)
    foreign = "[INST] Q: Is ice warm?\nA: [/INST]\n"
    reference = tmp_path / "composite.jsonl"
    problem = composite_problem(question_selection=(known.prompt, "d?"), strategyqa=(foreign, "No."))
    reference.write_text(json.dumps(problem) + "\n")

    found, missed = verify(reference, tasks_dir, ("question_selection", "strategyqa"))
    assert (found.questions, found.questions_equal, found.answers_equal) == (1, 1, 1)
    assert (found.examples, found.examples_equal, found.different) == (1, 1, [])
    assert (missed.questions, missed.questions_equal, missed.answers_equal, missed.examples_equal) == (
        1,
        0,
        0,
        0,
    )
    assert missed.different == [foreign, foreign]


def test_verify_refuses_another_layout(tmp_path, tasks_dir):
    reference = tmp_path / "composite.jsonl"
    reference.write_text(json.dumps({"prompt": "[INST] x [/INST]\n", "response": "y"}) + "\n")
    with pytest.raises(match=r"composite.jsonl:1: expected 30 .INST. parts and 10 answers, found 1 and 1"):
        verify(reference, tasks_dir, ("strategyqa",))
    reference.write_text("[]\n")
    with pytest.raises(InputError, match=r"composite.jsonl:1: expected a JSON object, found \[\]"):
        verify(reference, tasks_dir, ("strategyqa",))


# --- the hub's six tasks ---


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
