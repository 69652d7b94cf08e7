"""Metrics by name, task.json, and what nobody named, by hand-made cases; refusals of metrics that do not fit."""

import json
import math

import pytest
from rouge_score import rouge_scorer

from meteora_jax.config import InputError
from meteora_jax.evaluation.metrics import meteora_metric, score, score_by, score_composite
from meteora_jax.evaluation.named_metrics import first_label, metric_for, named_metric
from meteora_jax.evaluation.problems import load_composites, load_problems, longest_response
from meteora_jax.evaluation.runner import Records, run
from meteora_jax.evaluation.table import markdown, tabulate
from meteora_jax.evaluation.tasks import write_splits
from meteora_jax.evaluation.tasks.settings import TaskSettings, read_settings
from meteora_jax.examples import Example

LABELS = ("yes", "no", "not sure")
CASES = [
    ("exact", " Two\n", "two", True),
    ("exact", "two.", "two", False),
    ("exact", "Caf\u00e9", "cafe\u0301", True),  # NFC, as Qwen's tokenizer has it, and NFD
    ("contains", "Im Cafe\u0301!", "caf\u00e9", True),
    ("contains", "It is Two.", "two", True),
    ("contains", "anything", "", False),
    ("choice", "Yes, no doubt.", "yes", True),
    ("choice", "No. Yes.", "yes", False),
    ("choice", "I am not sure, yes?", "not sure", True),
    ("choice", "Nothing", "no", False),  # whole words only
    ("choice", "", "no", False),
    ("number", "2 and 2 is 4", "The answer: 4.0", True),
    ("number", "four", "4", False),
    ("number", "2,5 Meter", "3,5", False),  # a decimal comma
    ("number", "2,50", "2.5", True),
    ("number", "1.234,5", "1,234.5", True),
    ("number", "9.234.567", "1.234.567", False),
    ("number", "2,500", "2500", True),
    ("number", "0,500", "0.5", True),
    ("number", "10,20,30", "30", True),
    ("number", "-10,20,30", "-30", False),
    ("number", "−5", "-5", True),  # a minus sign of Unicode's
    ("number", "−5", "5", False),
    ("number", "a loss of -$5", "-5", True),
    ("number", "it is .5", "0.5", True),
    ("number", "it is ...5", "5", True),
    ("number", "2e-5", "1E-5", False),
    ("number", "2.50e3", "2,500", True),
    ("number", "1e999999999", "5", False),
    (r"regex:#### (\d+)", "so\n#### 12", "because\n#### 12", True),
    (r"regex:#### (\d+)", "12", "#### 12", False),
    (r"regex:#### (\d+)", "#### 12", "12", True),  # a response without the pattern is meant whole
    (r"regex:^\w+", "Blue sky", "blue Sea", True),
    (r"regex:(a)|b", "b", "B", True),
    ("python:own_metric.near", "10.4", "10", 0.6),
]


@pytest.fixture(autouse=True)
def own_module(tmp_path, monkeypatch):
    (tmp_path / "own_metric.py").write_text(
        "def near(answer, response):\n    return max(0.0, 1 - abs(float(answer or 'inf') - float(response)))\n"
        "def long(answer, response):\n    return len(answer)\n"
        "def none(answer, response):\n    return None\n"
        "value = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "own_metric", raising=False)


@pytest.mark.parametrize(("name", "answer", "target", "right"), CASES)
def test_one_answer(name, answer, target, right):
    metric = named_metric(name, LABELS, "here")
    assert metric.right is not None
    assert math.isclose(metric.right(answer, target), right)
    assert math.isclose(score_by(metric, [answer, answer], [target, target])["accuracy"], right)


def test_corpus_metrics_are_the_packages():
    answers, targets = ["the cat sat", "", "dogs"], ["the cat sat down", "a bird", "dogs"]
    assert score_by(named_metric("bleu", (), ""), answers, targets) == {
        key: value for key, value in score("alpaca", answers, targets).items() if key.startswith("bleu")
    }
    scorer = rouge_scorer.RougeScorer(["rougeL"])
    each = [scorer.score(t, a)["rougeL"].fmeasure for a, t in zip(answers, targets, strict=True)]
    (plain, strict) = score_by(named_metric("rougeL", (), ""), answers, targets).items()
    assert plain == ("rougeL", pytest.approx((each[0] + each[2]) / 2))
    assert strict == ("rougeL_strict", pytest.approx(sum(each) / 3))
    assert len(score_by(named_metric("rouge", (), ""), answers, targets)) == 6


def test_the_label_said_first_counts_and_of_two_there_the_longer():
    assert first_label(["no", "no idea"], "No idea.") == "no idea"
    assert first_label(["c++", "c"], "in C++, not C") == "c++"
    assert first_label(["a"], "banana") is None


LETTERS = ["a", "b", "c", "d"]


@pytest.mark.parametrize(
    ("labels", "answer", "said"),
    [
        (LETTERS, "I'd say B.", "b"),
        (LETTERS, "It’d be (c).", "c"),
        (LETTERS, "'b' it is", "b"),
        (["t", "f"], "That isn't so: F", "f"),
        (["1", "2"], "2.5", None),
        (["1", "2"], "1,000", None),
        (["1", "2"], "2.", "2"),
        (["1", "2"], "No.2", "2"),
        (LETTERS, "1.B", "b"),
        (["1", "2"], "option 2, not 1", "2"),
        (["1", "2"], "-1", None),
        (["-1", "1"], "-1", "-1"),
        (["1", "2"], "3-1", "1"),
        (["", "yes"], "(yes)", "yes"),  # of no text
        (["", "yes"], "...", None),
        (["", "yes"], " \n", ""),
    ],
)
def test_a_label_inside_another_word_or_number_is_not_said(labels, answer, said):
    assert first_label(labels, answer) == said


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("acuracy", "here: expected exact, contains, choice, number, bleu, rouge, rougeL, regex:PATTERN or python:"),
        ("exact:x", "found 'exact:x'"),
        ("regex:", "found 'regex:'"),
        ("regex:(", "here: expected a regular expression, found one that does not compile (missing ), unterminated"),
        ("python:near", "here: expected python:MODULE.FUNCTION, found 'near'"),
        ("python:nowhere.near", "here: expected a module nowhere, found none that imports (No module named 'nowhere')"),
        ("python:own_metric.far", "here: expected a function far in own_metric, found None"),
        ("python:own_metric.value", "here: expected a function value in own_metric, found 3"),
    ],
)
def test_a_name_of_no_metric_is_refused(name, said):
    with pytest.raises(InputError) as refused:
        named_metric(name, LABELS, "here")
    assert said in str(refused.value)


def write(tmp_path, task="birds", responses=("yes", "no", "yes"), settings=None, **splits):
    examples = [Example(f"{task} {i}?", response) for i, response in enumerate(responses)]
    write_splits(tmp_path / task, {"train": examples, "test": examples, **splits})
    if settings is not None:
        (tmp_path / task / "task.json").write_text(json.dumps(settings))
    return load(tmp_path, task)


def load(tmp_path, task):
    from meteora_jax.evaluation.tasks import load_split

    return load_split(tmp_path, task, "test")


def test_what_nobody_named_follows_from_the_task(tmp_path):
    short = write(tmp_path)
    assert metric_for(tmp_path, "birds", short).name == "exact"
    assert metric_for(tmp_path, "birds", short).because == "as most responses have at most 40 characters"
    assert metric_for(tmp_path, "birds", short, "contains").name == "contains"
    assert metric_for(tmp_path, "birds", short, "contains").because == ""
    long = write(tmp_path, "cats", ["short"] * 4 + ["x" * 41])
    found = metric_for(tmp_path, "cats", long)
    assert (found.name, found.because) == ("rougeL", "as many responses have more than 40 characters")
    assert metric_for(tmp_path, "winowhy", write(tmp_path, "winowhy")).name == meteora_metric("winowhy").name == ""
    labelled = write(tmp_path, "dogs", settings={"labels": ["Yes", "No"]})
    assert metric_for(tmp_path, "dogs", labelled).name == "choice"
    stated = write(tmp_path, "elks", settings={"labels": ["Yes", "No"], "metric": "exact"})
    assert metric_for(tmp_path, "elks", stated).name == "exact"
    # without labels a choice is among the task's responses, those of train too
    test = write(tmp_path, "frogs", train=[Example("?", "not sure")])
    choice = metric_for(tmp_path, "frogs", test, "choice")
    right = score_by(choice, ["not sure: no", "no, not sure"], ["no", "no"])
    assert right == {"accuracy": 0.5}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ([], "task.json: expected a JSON object, found list"),
        ({"metrics": "exact"}, "task.json: metrics: expected one of metric, labels, max_new_tokens, found another key"),
        ({"metric": 3}, "task.json: metric: expected a metric's name, found 3"),
        ({"labels": "yes"}, "task.json: labels: expected a list of texts, found 'yes'"),
        ({"labels": ["Yes", "yes "]}, "task.json: labels: expected each once, whatever its case"),
        ({"max_new_tokens": True}, "task.json: max_new_tokens: expected a whole number from 1 on, found True"),
        ({"max_new_tokens": 0}, "task.json: max_new_tokens: expected a whole number from 1 on, found 0"),
        ({"metric": "f1"}, "birds/task.json: metric: expected exact, contains, "),
        ({"metric": "number"}, "birds/test.jsonl:1: response: expected a number for"),
        ({"metric": "python:own_metric.long"}, "found 3"),
        ({"metric": "python:own_metric.none"}, "expected a number from 0 to 1 for the answer 'yes', found None"),
        ({"metric": "python:own_metric.near"}, "found its refusal (ValueError: could not convert string to float"),
        ({"labels": ["yes", "no", "maybe"]}, "labels: expected responses of birds, found 'maybe', which none is"),
        ({"labels": ["yes"]}, "birds/test.jsonl:2: response: expected one of task.json's labels, found 'no'"),
    ],
)
def test_a_task_json_that_does_not_fit_is_refused(tmp_path, settings, said):
    examples = write(tmp_path, settings=settings)
    with pytest.raises(InputError) as refused:
        metric_for(tmp_path, "birds", examples)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_pattern_that_finds_no_text_is_refused(tmp_path):
    """What it finds in nearly any answer, nothing, is what it finds in these responses: all would be right."""
    examples = [Example("?", response, where=f"f:{i}") for i, response in enumerate(("It is 5", "5", ""))]
    with pytest.raises(InputError) as refused:
        metric_for(tmp_path, "birds", examples, r"regex:\d*")
    said = r"f:0: response: expected text that the pattern finds for --metric birds=regex:\d*, found none in 'It is 5'"
    assert [problem.startswith(said) for problem in refused.value.problems] == [True]
    assert metric_for(tmp_path, "birds", examples, r"regex:\d+").name


def test_everything_wrong_is_said_together(tmp_path):
    write(tmp_path, settings={"metric": 1, "labels": [], "max_new_tokens": "9", "label": []})
    with pytest.raises(InputError) as refused:
        read_settings(tmp_path, "birds")
    assert len(refused.value.problems) == 4
    write(tmp_path, "cats", settings={"metric": "f1"})
    with pytest.raises(InputError) as refused:
        load_problems(tmp_path, ["birds", "cats"], "test", None, {})
    assert len(refused.value.problems) == 5
    assert read_settings(tmp_path, "nobody") == TaskSettings()


def test_own_tasks_are_asked_recorded_and_scored_again_by_another_metric(tmp_path):
    write(tmp_path, settings={"max_new_tokens": 5})
    talk = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Blue?"}]
    write_splits(tmp_path / "cats", {"test": [Example("Blue?", "yes", messages=tuple(talk))]})
    problems = load_problems(tmp_path, ["birds", "cats"], "test", None)
    assert [p.new_tokens(64) for p in problems] == [5, 5, 5, 64]
    assert problems[3].asked == talk

    def say(asked):
        return enumerate({"answer": "Yes, it is."} for _ in asked)

    def scored(problems):
        records = Records(tmp_path / "run", {})
        run(problems, {"parrot": say}, records, lambda *_: None)
        return tabulate(problems, ["parrot"], records.answers)

    table = scored(problems)
    assert [row["parrot"]["accuracy"] for row in table["tasks"].values()] == [0, 0]
    lines = [json.loads(line) for line in (tmp_path / "run" / "records.jsonl").read_text().splitlines()]
    assert [line["metric"] for line in lines] == ["exact"] * 4
    assert [line.get("messages") for line in lines].count(talk) == 1
    text = markdown(table, ["parrot"])
    assert "| birds, exact | 3 | 0.0" in text
    assert "birds, cats: exact, as most responses have at most 40 characters" in text
    again = load_problems(tmp_path, ["birds", "cats"], "test", None, {"birds": "contains"})
    table = scored(again)
    assert table["tasks"]["birds"]["parrot"]["accuracy"] == 2 / 3
    assert "| birds, contains | 3 | 66.7" in markdown(table, ["parrot"])
    assert len((tmp_path / "run" / "records.jsonl").read_text().splitlines()) == 4
    other = [{**talk[0], "content": "Be long."}, talk[1]]
    write_splits(tmp_path / "cats", {"test": [Example("Blue?", "yes", messages=tuple(other))]})
    with pytest.raises(InputError, match="expected the problem of the task's file, found another one"):
        scored(load_problems(tmp_path, ["birds", "cats"], "test", None))


def test_an_answer_that_a_function_refuses_is_kept_and_said(tmp_path):
    write(tmp_path, responses=("1", "2"))
    problems = load_problems(tmp_path, ["birds"], "test", None, {"birds": "python:own_metric.near"})
    records = Records(tmp_path / "run", {})
    run(problems, {"s": lambda asked: enumerate({"answer": "many"} for _ in asked)}, records, lambda *_: None)
    assert set(records.answers.values()) == {"many"}
    with pytest.raises(InputError, match=r"^python:own_metric\.near: expected a number from 0 to 1 for .*'many'"):
        tabulate(problems, ["s"], records.answers)
    problems = load_problems(tmp_path, ["birds"], "test", None, {"birds": "exact"})
    assert tabulate(problems, ["s"], records.answers)["tasks"]["birds"]["s"]["accuracy"] == 0


def test_composites_of_own_tasks_are_scored_by_their_tasks_metrics(tmp_path):
    write(tmp_path, settings={"max_new_tokens": 5, "labels": ["yes", "no"]})
    write(tmp_path, "cats", ["a long sentence " * 5] * 3)
    file = tmp_path / "pair.jsonl"
    answers = ["yes", "one two"]
    line = {"prompt": "p", "response": "@@@@\n".join(answers), "tasks": ["birds", "cats"], "answers": answers}
    file.write_text(json.dumps(line) + "\n")
    (problem,) = load_composites(file, "pair", None, tmp_path, {"cats": "rouge"}, 64)
    assert [m.name for m in problem.metrics] == ["choice", "rouge"]
    assert problem.new_tokens(64) == longest_response(tmp_path, ["birds", "cats"], 64) == 69
    cell = tabulate([problem], ["s"], {("s", "pair/pair/0"): "1. Yes!\n2. one two"})["tasks"]["pair"]["s"]
    assert (cell["correct"], cell["graded"], cell["rougeL"]) == (1, 1, 1.0)
    assert score_composite(["birds", "cats"], [["no", ""]], [answers], problem.metrics)["correct"] == 0
    # nobody names one: what fits the tasks' own test splits, though the composites have other responses
    write(tmp_path, "birds", ["yes"] * 19 + ["a long sentence " * 5])
    write(tmp_path, "cats", ["no"] * 2)
    line |= {"answers": ["a long sentence " * 5, "no"]}
    file.write_text(json.dumps(line) + "\n")
    (tmp_path / "birds" / "task.json").unlink()
    problems = load_problems(tmp_path, ["birds"], "test", 2) + load_composites(file, "pair", None, tmp_path)
    assert {m.name for p in problems for m in p.metrics} == {"exact"}
    found = tabulate(problems, ["s"], {("s", p.id): "yes" for p in problems})
    assert found["metrics"]["birds"]["name"] == "exact"
    write(tmp_path, settings={"max_new_tokens": 5, "labels": ["yes", "no"]})
    write(tmp_path, settings={"metric": "number"})
    with pytest.raises(InputError, match=r"pair\.jsonl:1: response: expected a number for .*birds/task\.json: metric"):
        load_composites(file, "pair", None, tmp_path)
