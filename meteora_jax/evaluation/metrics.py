"""Scores of answers: MeteoRA's for its 28 tasks (and six substitutes) and for composite problems, and LoraRetriever's.

MeteoRA compares answer and target in lower case, without outer whitespace. Accuracies are fractions, BLEU runs
from 0 to 100 and ROUGE (F-measure, mean over the answers) from 0 to 1, as sacrebleu and rouge_score give them,
with those packages' defaults; rouge_score knows only the letters a-z and digits.

BLEU and ROUGE stand twice: `bleu` is the original's, which drops empty answers before it scores, so that silence
costs nothing; in `bleu_strict` an empty answer counts as zero: no n-gram matched, its target's whole length missing.
"""

import re
import textwrap
from collections.abc import Callable, Iterable, Sequence
from decimal import Decimal
from typing import Any

from meteora_jax.config import InputError
from meteora_jax.evaluation.tasks import SUBSTITUTES

ROUGE_TYPES = ("rouge1", "rouge2", "rougeL")
Pair = tuple[str, str]  # an answer and its target


# One answer: right or wrong


def accuracy(task: str, answer: str, target: str) -> bool:
    """Whether `answer` counts as right for `target` in `task`; case and outer whitespace never matter.

    Raises `InputError` for a task that has no such score (those are scored by BLEU and ROUGE).
    """
    if task not in ACCURACY:
        raise InputError(f"{task}: expected a task with an accuracy ({', '.join(sorted(ACCURACY))}), found none")
    return ACCURACY[task](_plain(answer), _plain(target))


def _plain(text: str) -> str:
    return text.lower().strip()


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


def _same_final_number(answer: str, target: str) -> bool:
    number = _final_number(answer)
    return number is not None and number == _final_number(target)


def _final_number(text: str) -> Decimal | None:
    """The last number that the text says; in gsm8k's own answers that is the one after "####".

    >>> _final_number("2 boxes at $1,500.00 = $3,000.00.")
    Decimal('3000.00')
    """
    # A minus sign belongs to the number unless something stands right before it, as in 5-3.
    numbers = re.findall(r"(?:(?<![\w.)])-)?[0-9]+(?:,[0-9]{3})*(?:\.[0-9]+)?", text)
    return Decimal(numbers[-1].replace(",", "")) if numbers else None


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
    "gsm8k": _same_final_number,
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
    **dict.fromkeys(SUBSTITUTES, _exact),
}

# What each task is scored by.
METRICS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(ACCURACY, ("accuracy",)),
    **dict.fromkeys(("alpaca", "cnn_dailymail", "linguistics_puzzles", "topical_chat"), ("bleu", "rouge")),
    **dict.fromkeys(("news_commentary_de", "news_commentary_es", "news_commentary_it"), ("bleu",)),
    "strategyqa": ("accuracy", "bleu", "rouge"),
}


# One task


def score(task: str, answers: Sequence[str], targets: Sequence[str]) -> dict[str, float]:
    """The scores of a whole task by METRICS: `accuracy`, `bleu`, `rouge1`, `rouge2`, `rougeL`.

    Each of the last four has its `_strict` beside it (see the module). Raises `InputError` for an unknown task,
    no answers, unequal numbers of answers and targets, or a package that is not installed.
    """
    _check_tasks([task])
    pairs = _pairs(task, answers, targets)
    scores = {}
    if "accuracy" in METRICS[task]:
        scores["accuracy"] = _mean(accuracy(task, *pair) for pair in pairs)
    if "bleu" in METRICS[task]:
        scores |= _twice(_bleu, pairs)
    if "rouge" in METRICS[task]:
        scores |= _twice(_rouge, pairs)
    return scores


def _check_tasks(tasks: Iterable[str]) -> None:
    unknown = [task for task in tasks if task not in METRICS]
    if unknown:
        raise InputError(f"tasks: expected those with metrics ({', '.join(sorted(METRICS))}), found {unknown}")


def _pairs(what: str, answers: Sequence[str], targets: Sequence[str]) -> list[Pair]:
    """Answers beside their targets, lower-cased and stripped."""
    if len(answers) != len(targets) or not targets:
        raise InputError(f"{what}: expected an answer a target, found {len(answers)} answers, {len(targets)} targets")
    return [(_plain(answer), _plain(target)) for answer, target in zip(answers, targets, strict=True)]


def _twice(metric: Callable[[Sequence[Pair]], dict[str, float]], pairs: Sequence[Pair]) -> dict[str, float]:
    """The original's scoring, without the empty answers, and the strict one, with them."""
    original = metric([pair for pair in pairs if pair[0]])
    return original | {f"{name}_strict": value for name, value in metric(pairs).items()}


def _bleu(pairs: Sequence[Pair]) -> dict[str, float]:
    """Corpus BLEU; 0 where there is nothing to score."""
    sacrebleu = _sacrebleu()
    if not pairs:
        return {"bleu": 0.0}
    answers, targets = zip(*pairs, strict=True)
    return {"bleu": sacrebleu.corpus_bleu(answers, [targets]).score}


def _rouge(pairs: Sequence[Pair]) -> dict[str, float]:
    """Mean F-measure of ROUGE-1, 2 and L; 0 where there is nothing to score."""
    scorer = _rouge_scorer()
    scores = [scorer.score(target, answer) for answer, target in pairs]
    return {name: _mean(score[name].fmeasure for score in scores) for name in ROUGE_TYPES}


def _mean(values: Iterable[float]) -> float:
    numbers = list(values)
    return sum(numbers) / len(numbers) if numbers else 0.0


def _sacrebleu() -> Any:
    try:
        import sacrebleu
    except ModuleNotFoundError:
        raise InputError("BLEU: needs sacrebleu, found none: pip install 'meteora-jax[eval]'") from None
    return sacrebleu


def _rouge_scorer() -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ModuleNotFoundError:
        raise InputError("ROUGE: needs rouge_score, found none: pip install 'meteora-jax[eval]'") from None
    return RougeScorer(list(ROUGE_TYPES))


# LoraRetriever


def loraretriever_metric(task: str) -> str:
    """What scores one of MeteoRA's tasks LoraRetriever's way: em if it has an accuracy, bleu if it is a translation,
    else rouge."""
    _check_tasks([task])
    names = METRICS[task]
    return "em" if "accuracy" in names else "bleu" if names == ("bleu",) else "rouge"


def score_loraretriever(metric: str, answers: Sequence[str], targets: Sequence[str]) -> dict[str, float]:
    """LoraRetriever's scores by the metric that its queries name; empty answers count as zero.

    em gives `exact_match`, bleu the mean of the sentences' `bleu`, rouge `rouge1`, `rouge2` and `rougeL`.
    """
    if metric not in ("em", "bleu", "rouge"):
        raise InputError(f"metric: expected em, bleu or rouge, found {metric}")
    pairs = _pairs(metric, answers, targets)
    if metric == "em":
        return {"exact_match": _mean(exact_match(*pair) for pair in pairs)}
    if metric == "bleu":
        return {"bleu": _mean(sentence_bleu(answer, target) for answer, target in zip(answers, targets, strict=True))}
    return _rouge(pairs)


def exact_match(answer: str, target: str) -> bool:
    """Whether both say the same, whatever their case, outer whitespace and final full stop."""
    return _without_full_stop(answer) == _without_full_stop(target)


def _without_full_stop(text: str) -> str:
    return _plain(text).removesuffix(".").rstrip()


def sentence_bleu(answer: str, target: str) -> float:
    """BLEU of one answer by sacrebleu's defaults for sentences; case counts."""
    return _sacrebleu().sentence_bleu(answer, [target]).score


# Composite problems


def read_composite(text: str, n: int) -> list[str]:
    """The n answers of a composite problem, stripped, from lines "i. ..."; "" for one that is missing.

    An answer runs to the next one's line, and text before the first is no answer. Numbers come in their order and
    are skipped only where they are missing, so a line "7. ..." before answer 2 is text. An answer may be a
    numbered list itself: it begins with 1, and a line that could go on with it and with the answers belongs to
    it if the same number comes once more before another 1.

    >>> read_composite("Sure:\\n1. no\\n3. to do:\\n1. rest\\n2. eat", 3)
    ['no', '', 'to do:\\n1. rest\\n2. eat']
    """
    lines = textwrap.dedent(text).strip().split("\n")
    numbers = [_line_number(line) for line in lines]
    answers: dict[int, list[str]] = {0: []}  # under 0, the text before the first answer
    current = in_list = 0  # the answer being read, and where a list inside it has got to
    for i, (line, number) in enumerate(zip(lines, numbers, strict=True)):
        if current < number <= n and _is_next_answer(number, current, in_list, numbers[i + 1 :]):
            first = line.split(".", 1)[1].lstrip()
            answers[number] = [first]
            current, in_list = number, int(_line_number(first) == 1)
        else:
            answers[current].append(line)
            if number in (1, in_list + 1):
                in_list = number
    return ["\n".join(answers.get(i, [])).strip() for i in range(1, n + 1)]


def _line_number(line: str) -> int:
    """The i of a line "i. ...", 0 of any other; "3.5 million" is none."""
    match = re.match(r"([1-9][0-9]{0,3})\.(?![0-9])", line)
    return int(match[1]) if match else 0


def _is_next_answer(number: int, current: int, in_list: int, later: list[int]) -> bool:
    """Whether the line `number` begins an answer after `current`, seen the numbers of the `later` lines."""
    # Before the first answer there is no list that a later 1 could begin.
    upcoming = later[: later.index(1)] if current and 1 in later else later
    if any(skipped in upcoming for skipped in range(current + 1, number)):
        return False
    goes_on_with_list = in_list > 0 and number == in_list + 1
    return not (goes_on_with_list and number in upcoming)


def score_composite(
    tasks: Sequence[str], answers: Sequence[Sequence[str]], targets: Sequence[Sequence[str]]
) -> dict[str, int | float]:
    """The scores of composite problems: `answers[p][i]` to the sub-question of `tasks[i]` in problem p.

    Counts over all problems: `problems`, `attempted` (answers that are not empty) and `correct` (by `accuracy`,
    of the tasks that have one). BLEU and ROUGE as in `score`, over the answers of all tasks scored by them together.
    """
    _check_tasks(tasks)
    rows = [len(row) for table in (answers, targets) for row in table]
    if len(answers) != len(targets) or set(rows) != {len(tasks)}:
        raise InputError(
            f"composite: expected problems of {len(tasks)} answers and as many targets, found {len(answers)} and "
            f"{len(targets)} problems, of {min(rows, default=0)} to {max(rows, default=0)}"
        )
    columns = zip(tasks, zip(*answers, strict=True), zip(*targets, strict=True), strict=True)
    asked = [(task, pair) for task, found, right in columns for pair in _pairs(task, found, right)]
    scores: dict[str, int | float] = {
        "problems": len(answers),
        "attempted": sum(answer != "" for _, (answer, _) in asked),
        "correct": sum(accuracy(task, *pair) for task, pair in asked if task in ACCURACY),
    }
    for name, metric in (("bleu", _bleu), ("rouge", _rouge)):
        pairs = [pair for task, pair in asked if name in METRICS[task]]
        if pairs:
            scores |= _twice(metric, pairs)
    return scores
