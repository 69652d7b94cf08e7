"""Scores of single answers, as MeteoRA's evaluation assigns them to its tasks."""

import re
from collections.abc import Callable

from meteora_jax.config import InputError


def accuracy(task: str, answer: str, target: str) -> bool:
    """Whether `answer` counts as right for `target` in `task`; case and outer whitespace never matter.

    Raises `InputError` for a task that has no such score (those are scored by BLEU and ROUGE).
    """
    if task not in ACCURACY:
        raise InputError(f"{task}: expected a task with an accuracy ({', '.join(sorted(ACCURACY))}), found none")
    return ACCURACY[task](answer.lower().strip(), target.lower().strip())


def _exact(answer: str, target: str) -> bool:
    return answer == target


def _fuzzy(answer: str, target: str) -> bool:
    # An empty target is contained in everything, which is no evidence.
    return target != "" and target in answer


def _same_validity(answer: str, target: str) -> bool:
    return _validity(answer) == _validity(target)


def _validity(text: str) -> str:
    """The first of the words valid and invalid that the text says, else the text itself."""
    verdict = re.search(r"\b(?:in)?valid\b", text)
    return verdict[0] if verdict else text


def _same_yes_or_no(answer: str, target: str) -> bool:
    verdict = _yes_or_no(answer)
    return verdict is not None and verdict == _yes_or_no(target)


def _yes_or_no(text: str) -> str | None:
    head = text[:5]
    return next((verdict for verdict in ("yes", "no") if verdict in head), None)


ACCURACY: dict[str, Callable[[str, str], bool]] = {
    "abstract_narrative_understanding": _fuzzy,
    "contextual_parametric_knowledge_conflicts": _fuzzy,
    "cs_algorithms": _exact,
    "disfl_qa": _fuzzy,
    "elementary_math_qa": _exact,
    "epistemic_reasoning": _exact,
    "formal_fallacies_syllogisms_negation": _same_validity,
    "goal_step_wikihow": _fuzzy,
    "language_identification": _fuzzy,
    "logical_deduction": _fuzzy,
    "object_counting": _fuzzy,
    "paragraph_segmentation": _exact,
    "play_dialog_same_or_different": _fuzzy,
    "question_selection": _fuzzy,
    "reasoning_about_colored_objects": _fuzzy,
    "strategyqa": _same_yes_or_no,
    "tracking_shuffled_objects": _exact,
    "unit_conversion": _exact,
    "vitaminc_fact_verification": _fuzzy,
    "winowhy": _exact,
}
