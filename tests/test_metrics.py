"""Accuracies by task: hand-made answers, one line a case."""

import pytest

from meteora_jax.config import InputError
from meteora_jax.evaluation.metrics import accuracy

CASES = [
    # exact: nothing but case and outer whitespace may differ
    ("winowhy", " Correct\n", "correct", True),
    ("winowhy", "incorrect", "correct", False),
    ("winowhy", "correct.", "correct", False),
    ("winowhy", "", "correct", False),
    ("tracking_shuffled_objects", "Pink ball.", "pink ball.", True),
    ("paragraph_segmentation", "0 1 0\n", "0 1 0", True),
    # fuzzy: the target within the answer
    ("object_counting", "There are three.", "Three", True),
    ("object_counting", "3", "three", False),
    ("disfl_qa", "it is unknown", "unknown", True),
    ("disfl_qa", "", "unknown", False),
    ("disfl_qa", "anything", "", False),
    ("language_identification", "Das ist ÄÖÜ", "äöü", True),
    ("goal_step_wikihow", "Buy\nBurger Patties", "Buy Burger Patties", False),
    # formal fallacies: reduced to valid or invalid
    ("formal_fallacies_syllogisms_negation", "The argument is valid.", "valid", True),
    ("formal_fallacies_syllogisms_negation", "Invalid!", "invalid", True),
    ("formal_fallacies_syllogisms_negation", "The argument is invalid.", "valid", False),
    ("formal_fallacies_syllogisms_negation", "", "valid", False),
    # strategyqa: yes or no within the first five characters of both
    ("strategyqa", "Yes, since it floats.", "Yes. Ice floats.", True),
    ("strategyqa", " no", "No. Ice is solid.", True),
    ("strategyqa", "Well, yes", "Yes.", False),
    ("strategyqa", "A: yes", "Yes.", False),
    ("strategyqa", "", "Yes.", False),
    ("strategyqa", "perhaps", "it depends", False),
]


@pytest.mark.parametrize(("task", "answer", "target", "right"), CASES)
def test_accuracy(task, answer, target, right):
    assert accuracy(task, answer, target) is right


def test_tasks_without_an_accuracy_are_refused():
    with pytest.raises(InputError, match=r"^linguistics_puzzles: expected a task with an accuracy"):
        accuracy("linguistics_puzzles", "woci", "woci")
