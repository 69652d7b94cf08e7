"""Other wordings of the composite layout: the same questions, other answer lines."""

from __future__ import annotations

import json

import pytest
from test_composite import TASKS, draw, example, questions, tasks_dir  # noqa: F401 (a fixture)

from meteora_jax.cli import main
from meteora_jax.config import InputError
from meteora_jax.evaluation.composite import read_composites
from meteora_jax.evaluation.problems import load_composites
from meteora_jax.evaluation.wordings import format_prompt, read_answers

SHOT = (example("Sky?", "blue"), example("Sure?", "yes.\nof course"))
ASKED = [example("Now?"), example("And?")]


def test_lettered_answers_stand_on_lettered_lines():
    prompt = format_prompt(ASKED, [SHOT], "lettered")
    assert prompt == format_prompt(ASKED, [SHOT]).replace("\n1. blue\n2. ", "\na. blue\nb. ")
    assert format_prompt(ASKED, (), "lettered").endswith("[INST] And? [/INST]\n(b)\n\n")


def test_reversed_answers_come_last_question_first():
    prompt = format_prompt(ASKED, [SHOT], "reversed")
    plain = format_prompt(ASKED, [SHOT]).replace("1. blue\n2. yes. of course\n", "2. yes. of course\n1. blue\n")
    assert prompt == plain.replace("questions below:", "questions below, the last one first:")


@pytest.mark.parametrize(
    ("wording", "text", "answers"),
    [
        ("numbered", "1. blue\n2. yes", ["blue", "yes"]),
        ("lettered", "Sure.\na. blue\n or so\nb. yes", ["blue\n or so", "yes"]),
        ("lettered", "b. yes\nc. no", ["", "yes\nc. no"]),
        ("lettered", "a. 5 steps:\n2. turn left\nb. no", ["5 steps:\n2. turn left", "no"]),
        ("lettered", "1. blue\n2. yes", ["blue", "yes"]),  # the letters' order tells, whatever their look
        ("lettered", "A. blue\nB. yes", ["blue", "yes"]),  # and so do capitals
        ("lettered", "a. A. Lincoln\nB. Franklin\nb. yes", ["A. Lincoln\nB. Franklin", "yes"]),
        ("lettered", "a. one of\nb. no\na. x\nb. y", ["one of", "no\na. x\nb. y"]),  # as they stand
        ("lettered", "a. list:\na. x\nb. y\nb. no", ["list:\na. x\nb. y", "no"]),
        ("lettered", "a. blue\r\nb. yes\r\n", ["blue", "yes"]),
        ("lettered", "a.\n\n b. yes", ["", "yes"]),
        ("reversed", "Sure.\n2. yes\n and so on\n1. blue", ["blue", "yes\n and so on"]),
        ("reversed", "1. blue\n2. yes", ["blue\n2. yes", ""]),
        ("reversed", "3. no\n2. 3.5 million", ["", "3.5 million"]),
    ],
)
def test_answers_are_read_as_they_were_asked_for(wording, text, answers):
    assert read_answers(text, 2, wording) == answers


@pytest.mark.parametrize("wording", ["lettered", "reversed"])
def test_problems_are_the_numbered_ones_in_other_words(tasks_dir, wording):  # noqa: F811
    assert [questions(p) for p in draw(tasks_dir, wording=wording)] == [questions(p) for p in draw(tasks_dir)]
    main(["compose", str(tasks_dir), "+".join(TASKS), "--count", "3", "--wording", wording])
    (path,) = tasks_dir.glob(f"composite_2_of_*_{wording}_count_3/test.jsonl")
    assert {p.wording for p in read_composites(path)} == {wording}
    problem = load_composites(path, "row", None, tasks_dir)[0]
    said = "b. two\na. one" if wording == "lettered" else "2. two\n1. one"
    assert problem.answers_in(said) == (["one", ""] if wording == "lettered" else ["one", "two"])
    assert problem.stop == (("\nc.",) if wording == "lettered" else ("\n3.", "\n0."))


def test_what_cannot_be_asked_so_is_refused(tasks_dir):  # noqa: F811
    with pytest.raises(InputError, match="expected worked examples"):
        draw(tasks_dir, shots=0, wording="reversed")


def test_more_lettered_questions_than_letters_are_refused_in_a_file(tmp_path):
    file, many = tmp_path / "many.jsonl", ["task"] * 28
    line = {"prompt": "p", "response": "r", "tasks": many, "answers": many, "wording": "lettered"}
    file.write_text(json.dumps(line))
    with pytest.raises(InputError, match=r"many\.jsonl:1: wording: expected at most 26 lettered questions, found 28"):
        read_composites(file)
