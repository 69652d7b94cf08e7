"""Task preparation on a hand-made BIG-bench folder; nothing is downloaded."""

import json
import tarfile

import pytest
from task_files import BIGBENCH, FIXTURE_TASKS, all_examples, composite_problem, digest

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
    load_splits,
    read_test_inputs,
    split_of,
    write_splits,
)
from meteora_jax.evaluation.tasks.bigbench import BIGBENCH_TASKS, prepare, verify


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

SOUND = {"examples": [{"input": "x", "target_scores": {"a": 1, "b": 0}}]}


def sample(**fields):
    """A task file with one example."""
    return {"examples": [{"input": "x", **fields}]}


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
        ({"examples": None}, "winowhy/task.json: examples: expected a list, found NoneType"),
        ({"examples": [{"input": 5, "target": "a"}]}, "example 0: input: expected a string, found int"),
        ({"task_prefix": None, **SOUND}, "winowhy/task.json: task_prefix: expected a string, found NoneType"),
        ({"example_input_prefix": 5, **SOUND}, "example_input_prefix: expected a string, found int"),
        ({"example_output_prefix": ["A: "], **SOUND}, "example_output_prefix: expected a string, found list"),
        ({"choice_prefix": None, **SOUND}, "choice_prefix: expected a string, found NoneType"),
        (sample(target=None), "example 0: target: expected a string or a list of strings, found NoneType"),
        (sample(target={"a": 1}), "example 0: target: expected a string or a list of strings, found dict"),
        (sample(target=[None, "a"]), "target: expected a string or a list of strings, found a list with NoneType"),
        (sample(target_scores=None), "example 0: target_scores: expected a JSON object, found NoneType"),
        (sample(target="a", target_scores=None), "target_scores: expected a JSON object, found NoneType"),
        (sample(target="a", target_scores=5), "target_scores: expected a JSON object, found int"),
        (sample(target_scores={"a": 1, "b": None}), "expected a number for each choice, found NoneType for 'b'"),
        (sample(target_scores={"a": "1"}), "target_scores: expected a number for each choice, found str for 'a'"),
        (sample(target_scores={"a": float("nan")}), "expected a number for each choice, found NaN for 'a'"),
    ],
)
def test_malformed_task_files_are_refused(tmp_path, content, message):
    write_task(tmp_path, "winowhy", content)
    with pytest.raises(InputError, match=message):
        prepare(tmp_path, tmp_path / "tasks", ["winowhy"])


def test_all_that_is_wrong_with_an_example_is_said_at_once(tmp_path):
    write_task(tmp_path, "winowhy", {"examples": [{"input": None, "target": 0.5, "target_scores": 1}]})
    with pytest.raises(InputError) as refusal:
        prepare(tmp_path, tmp_path / "tasks", ["winowhy"])
    assert [line.split(": ")[2] for line in refusal.value.problems] == ["input", "target_scores"]


def test_a_number_is_a_target_as_it_is_written(tmp_path):
    asked = {"1 + 1": 2, "0 / 1": [0], "1 - 1": 0}
    examples = [{"input": text, "target": target} for text, target in asked.items()]
    write_task(tmp_path, "winowhy", {"examples": examples})
    prepare(tmp_path, tmp_path / "tasks", ["winowhy"])
    assert sorted(example.response for example in all_examples(tmp_path / "tasks", "winowhy")) == ["0", "0", "2"]


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


@pytest.mark.parametrize("found", ["no such folder", "a file"])
def test_a_folder_that_is_missing_is_named_once(tmp_path, found):
    folder = tmp_path / "nowhere"
    if found == "a file":
        folder.touch()
    for load in (lambda: load_splits(folder, ["winowhy", "strategyqa"], "test"), lambda: load_split(folder, "a", "b")):
        with pytest.raises(InputError) as refusal:
            load()
        assert refusal.value.problems == (f"{folder}: expected a TASKS folder, found {found}",)


# --- the hub's six tasks ---
