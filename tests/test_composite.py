"""Composite problems drawn from small made-up tasks: their layout, and what is drawn how often."""

import json
import re

import pytest

from meteora_jax.config import InputError
from meteora_jax.evaluation.composite import (
    COMPOSITES,
    default_path,
    draw_composites,
    generate_composites,
)
from meteora_jax.evaluation.metrics import read_composite
from meteora_jax.evaluation.tasks import METEORA_TASKS, Example, load_split, write_splits
from meteora_jax.evaluation.wordings import format_prompt

TASKS = ("birds", "cars")

# Laid out as the release's composite-10 file: the spaces, the empty lines and the ends of parts are its own.
TWO_SHOT = """
Example 1:

[INST] Q: Which?
choice: a
choice: b
[/INST]

[INST] Two
parts [/INST]

1. a
2. yes. it  is

\n\
Example 2:

[INST] Again? [/INST]

[INST] Sure? [/INST]

1. b
2. one line only

\n\
Following the example above, generate answers to the questions below:

[INST] Now?
  choice: c
 [/INST]

\n\
[INST] And? [/INST]

"""


def example(text, response="so"):
    return Example(f"[INST] {text} [/INST]\n", response)


@pytest.fixture
def tasks_dir(tmp_path):
    for task, size in (("birds", 6), ("cars", 9)):
        splits = {
            split: [example(f"{task} {split} {i}?", f"{task} {split} answer {i}") for i in range(size)]
            for split in ("train", "test")
        }
        write_splits(tmp_path / task, splits)
    return tmp_path


def draw(tasks_dir, tasks=TASKS, *, seed=0, count=6, shots=2, **options):
    return draw_composites(tasks_dir, tasks, seed=seed, count=count, shots=shots, **options)


def questions(problem):
    return re.findall(r"\[INST\] .*?\[/INST\]\n", problem.prompt, flags=re.DOTALL)[-len(problem.tasks) :]


# --- the layout ---


def test_two_shot_layout_is_the_originals():
    shots = [
        (example("Q: Which?\n  choice: a\n  choice: b\n", "a"), example("Two\n\tparts", "yes. it  is ")),
        (example("Again?", "b"), example("Sure?", "one line\n \nonly")),
    ]
    assert format_prompt([example("Now?\n  choice: c\n"), example("And?")], shots) == TWO_SHOT


def test_zero_shot_layout_is_the_questions_and_their_numbers():
    prompt = format_prompt([example("Now?"), example("And?")])
    assert prompt == "[INST] Now? [/INST]\n(1)\n\n[INST] And? [/INST]\n(2)\n\n"


def test_meteoras_composites():
    assert {n: len(set(tasks)) for n, tasks in COMPOSITES.items()} == {3: 3, 5: 5, 10: 10}
    assert all(set(tasks) <= set(METEORA_TASKS) for tasks in COMPOSITES.values())
    assert [COMPOSITES[10].index(task) for task in COMPOSITES[5]] == [0, 1, 2, 3, 5]


# --- what is drawn ---


@pytest.mark.parametrize("shots", [0, 1, 2, 3])
def test_questions_come_from_test_and_worked_examples_from_train(tasks_dir, shots):
    for problem in draw(tasks_dir, shots=shots):
        *worked, first, second = re.findall(r"\[INST\] (\w+) (\w+) (\d)\? \[/INST\]", problem.prompt)
        assert (first[:2], second[:2]) == (("birds", "test"), ("cars", "test"))
        assert [part[:2] for part in worked] == [("birds", "train"), ("cars", "train")] * shots
        assert len(set(worked)) == len(worked)
        assert problem.tasks == TASKS
        assert problem.answers == (f"birds test answer {first[2]}", f"cars test answer {second[2]}")
        assert problem.response == "@@@@\n".join(problem.answers)
        header = re.search(r"\nExample 1:\n\n.*?\[/INST\]\n\n(1\. .*?)\n\n\n", problem.prompt, flags=re.DOTALL)
        assert (header is not None) == (shots > 0)
        if header:
            answers = [f"{task} train answer {i}" for task, _, i in worked[:2]]
            assert read_composite(header[1].rsplit("[/INST]\n\n")[-1], 2) == answers


def test_a_seed_decides_everything_and_the_questions_whatever_the_shots(tasks_dir):
    assert draw(tasks_dir) == draw(tasks_dir)
    assert draw(tasks_dir) != draw(tasks_dir, seed=1)
    few, zero = draw(tasks_dir), draw(tasks_dir, shots=0)
    assert list(map(questions, few)) == list(map(questions, zero))


def test_no_question_comes_twice_while_there_are_enough(tasks_dir):
    birds, cars = zip(*map(questions, draw(tasks_dir, count=9)), strict=True)
    assert len(set(cars)) == 9
    assert len(set(birds)) == len(set(birds[:6])) == 6
    assert len(set(birds[6:])) == 3


def test_every_possible_problem_can_be_drawn_but_none_twice(tasks_dir):
    problems = draw(tasks_dir, count=54)
    assert len({tuple(questions(problem)) for problem in problems}) == 54
    with pytest.raises(InputError, match="expected tests for 55 different problems, found 54"):
        draw(tasks_dir, count=55)


def test_one_prompt_counts_once_however_often_a_file_has_it(tasks_dir):
    write_splits(tasks_dir / "birds", {"test": [example("same?", "first"), example("same?", "second")]})
    (problem,) = draw(tasks_dir, ("birds",), count=1)
    assert problem.answers == ("first",)
    with pytest.raises(InputError, match="found 1"):
        draw(tasks_dir, ("birds",), count=2)


# --- truncation ---


def test_what_is_too_long_is_drawn_anew(tasks_dir):
    long = [example(f"long {i} " + "x" * 500) for i in range(3)]
    for split in ("train", "test"):
        write_splits(tasks_dir / "birds", {split: load_split(tasks_dir, "birds", split) + long})
    assert max(len(problem.prompt) for problem in draw(tasks_dir, count=9)) > 500
    problems = draw(tasks_dir, count=9, max_tokens=400, count_tokens=len)
    assert max(len(problem.prompt) for problem in problems) <= 400
    birds, cars = zip(*map(questions, problems), strict=True)
    assert len(set(birds[:6])) == 6
    assert len(set(cars)) == 9, "a question whose companion was too long is still used"


def test_tokens_are_counted_by_the_callers_tokenizer(tasks_dir):
    def count_words(text):
        return len(text.split())

    longest = max(count_words(problem.prompt) for problem in draw(tasks_dir))
    assert draw(tasks_dir, max_tokens=longest, count_tokens=count_words) == draw(tasks_dir)


def test_a_limit_that_nothing_keeps_is_refused(tasks_dir):
    with pytest.raises(InputError, match=r"cars: expected test examples short enough for max_tokens, found none"):
        draw(tasks_dir, ("cars",), max_tokens=10, count_tokens=len)


# --- the file ---


def test_the_file_is_read_like_any_tasks(tasks_dir):
    for task in COMPOSITES[3]:
        write_splits(tasks_dir / task, {s: [example(f"{task} {s} {i} ü") for i in range(4)] for s in ("train", "test")})
    path = generate_composites(tasks_dir, COMPOSITES[3], seed=3, count=4)
    assert path == tasks_dir / "composite_3_seed_3_count_4" / "test.jsonl"
    assert [file.name for file in path.parent.iterdir()] == ["test.jsonl"]
    problems = draw(tasks_dir, COMPOSITES[3], seed=3, count=4)
    assert load_split(tasks_dir, path.parent.name, "test") == [Example(p.prompt, p.response) for p in problems]
    record = json.loads(path.read_text(encoding="utf-8").split("\n")[0])
    assert list(record) == ["prompt", "response", "tasks", "answers"]
    assert record["tasks"] == list(COMPOSITES[3])
    assert record["answers"] == list(problems[0].answers)
    zero_shot = generate_composites(tasks_dir, COMPOSITES[3], seed=3, count=4, shots=0)
    assert zero_shot == tasks_dir / "composite_3_0_shot_seed_3_count_4" / "test.jsonl"
    usual = {"seed": 0, "count": 200, "shots": 2}
    assert default_path(tasks_dir, COMPOSITES[3], **usual) == tasks_dir / "composite_3" / "test.jsonl"


def test_a_list_of_ones_own_does_not_pass_for_meteora_s(tasks_dir):
    paths = [generate_composites(tasks_dir, tasks, seed=0, count=2) for tasks in (TASKS, TASKS[::-1])]
    assert all(re.fullmatch(r"composite_2_of_[0-9a-f]{8}_count_2", path.parent.name) for path in paths)
    assert paths[0] != paths[1]
    with pytest.raises(InputError, match=r"expected a name that ends in \.jsonl"):
        generate_composites(tasks_dir, TASKS, seed=0, count=2, dest=tasks_dir / "mine.json")
    dest = tasks_dir / "mine" / "both.jsonl"
    assert generate_composites(tasks_dir, TASKS, seed=0, count=2, dest=dest) == dest
    assert len(dest.read_text(encoding="utf-8").splitlines()) == 2


def test_wrong_input_is_refused_at_once(tasks_dir):
    with pytest.raises(InputError) as refused:
        draw(tasks_dir, ("birds", "birds"), seed=-1, count=0, shots=-2, max_tokens=5)
    assert [problem.split(":")[0] for problem in refused.value.problems] == [
        *("tasks", "seed", "count", "shots", "max_tokens"),
    ]
    with pytest.raises(InputError) as refused:
        draw(tasks_dir, ("birds", f"../{tasks_dir.name}/trees"), seed=2**32, max_tokens=-3, count_tokens=len)
    assert list(refused.value.problems) == [
        f"tasks: expected names of folders in TASKS, found '../{tasks_dir.name}/trees'",
        "seed: expected less than 2**32, found 4294967296",
        "max_tokens: expected room for a prompt beside its response, found -3",
    ]
    with pytest.raises(InputError, match=r"birds/train\.jsonl: expected 7 or more different prompts, found 6"):
        draw(tasks_dir, shots=7)
