"""Scores of answers: MeteoRA's for its 28 tasks (and six substitutes) and for composite problems, and LoraRetriever's.

MeteoRA compares answer and target in lower case, without outer whitespace. Accuracies are fractions, BLEU runs
from 0 to 100 and ROUGE (F-measure, mean over the answers) from 0 to 1, as sacrebleu and rouge_score give them,
with those packages' defaults; rouge_score knows only the letters a-z and digits.

BLEU and ROUGE stand twice: `bleu` is the original's, which drops empty answers before it scores, so that silence
costs nothing; in `bleu_strict` an empty answer counts as zero: no n-gram matched, its target's whole length missing.
"""

import functools
import re
import textwrap
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import numpy as np

from meteora_jax.config import InputError
from meteora_jax.evaluation.tasks import SUBSTITUTES

ROUGE_TYPES = ("rouge1", "rouge2", "rougeL")
Pair = tuple[str, str]  # an answer and its target


@dataclass(frozen=True)
class Metric:
    """What scores the answers of a task.

    scores: what it gives, of accuracy, bleu, rouge and rougeL. right: how right one answer is for its target, from 0 to
    1, where it gives an accuracy. name: as a user writes it, "" for MeteoRA's own. because: why, where nobody chose it.
    """

    scores: tuple[str, ...]
    right: Callable[[str, str], bool | float] | None = None
    name: str = ""
    because: str = ""


# One answer: right or wrong


def accuracy(task: str, answer: str, target: str) -> bool:
    """Whether `answer` counts as right for `target` in `task`; case and outer whitespace never matter.

    Raises `InputError` for a task that has no such score (those are scored by BLEU and ROUGE).
    """
    if task not in ACCURACY:
        raise InputError(f"{task}: expected a task with an accuracy ({', '.join(sorted(ACCURACY))}), found none")
    return ACCURACY[task](plain(answer), plain(target))


def plain(text: str) -> str:
    """A text as it is compared: in lower case, without outer whitespace, composed (NFC), as some tokenizers write."""
    return unicodedata.normalize("NFC", text.lower().strip())


def _exact(answer: str, target: str) -> bool:
    return answer == target


def contains(answer: str, target: str) -> bool:
    """Whether the answer says the target somewhere."""
    # An empty target is contained in everything, which is no evidence.
    return target != "" and target in answer


def _same_validity(answer: str, target: str) -> bool:
    return _validity(answer) == _validity(target)


def _validity(text: str) -> str:
    """The first of the words valid and invalid that the text says, else the text itself."""
    verdict = re.search(r"\b(?:in)?valid\b", text)
    return verdict[0] if verdict else text


def same_final_number(answer: str, target: str) -> bool:
    """Whether the last number that each says is the same."""
    number = final_number(answer)
    return number is not None and number == final_number(target)


def final_number(text: str) -> Decimal | None:
    """The last number that the text says; in gsm8k's own answers that is the one after "####".

    >>> final_number("2 boxes at $1,500.00 = $3,000.00."), final_number("Das sind 1.234 m oder 2,5 km")
    (Decimal('3000.00'), Decimal('2.5'))
    """
    found = _NUMBER.findall(text)
    if not found:
        return None
    sign, digits, exponent = found[-1]
    if _DECIMAL_COMMA.fullmatch(digits):
        digits = digits.replace(".", "").replace(",", ".")
    # what is left with several marks is several numbers, as 10,20,30 or 3.5.2
    *before, last = re.findall(r"^\.[0-9]+|[0-9]+(?:,[0-9]{3})*(?:\.[0-9]+)?", digits)
    minus = "-" if sign and not before else ""
    return Decimal(minus + last.replace(",", "") + exponent)


# A minus sign belongs to the number unless something stands right before it, as in 5-3; so does the point of .5.
_NUMBER = re.compile(
    r"((?<![\w.)])[-−][$€£]?)?((?:(?<![\w.)])\.)?[0-9](?:[0-9.,]*[0-9])?)(e[+-]?[0-9]{1,3}(?!\w))?", re.IGNORECASE
)
# 2,5 or 1.234,5 or 1.234.567, but not 2,500
_DECIMAL_COMMA = re.compile(
    r"(?![1-9][0-9]{0,2},[0-9]{3}$)(?:[0-9]+|[1-9][0-9]{0,2}(?:\.[0-9]{3})+),[0-9]+|[1-9][0-9]{0,2}(?:\.[0-9]{3}){2,}"
)


def _same_yes_or_no(answer: str, target: str) -> bool:
    verdict = _yes_or_no(answer)
    return verdict is not None and verdict == _yes_or_no(target)


def _yes_or_no(text: str) -> str | None:
    head = text[:5]
    return next((verdict for verdict in ("yes", "no") if verdict in head), None)


ACCURACY: dict[str, Callable[[str, str], bool]] = {
    "abstract_narrative_understanding": contains,
    "contextual_parametric_knowledge_conflicts": contains,
    "cs_algorithms": _exact,
    "disfl_qa": contains,
    "elementary_math_qa": _exact,
    "epistemic_reasoning": _exact,
    "formal_fallacies_syllogisms_negation": _same_validity,
    "goal_step_wikihow": contains,
    "gsm8k": same_final_number,
    "language_identification": contains,
    "logical_deduction": contains,
    "object_counting": contains,
    "paragraph_segmentation": _exact,
    "play_dialog_same_or_different": contains,
    "question_selection": contains,
    "reasoning_about_colored_objects": contains,
    "strategyqa": _same_yes_or_no,
    "tracking_shuffled_objects": _exact,
    "unit_conversion": _exact,
    "vitaminc_fact_verification": contains,
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
    return score_by(meteora_metric(task), answers, targets, task)


def score_by(metric: Metric, answers: Sequence[str], targets: Sequence[str], what: str = "answers") -> dict[str, float]:
    """As `score`, by any metric; `what` is scored, for messages about it."""
    pairs = _pairs(what, answers, targets)
    scores: dict[str, float] = {}
    if metric.right is not None:
        scores["accuracy"] = _mean(metric.right(*pair) for pair in zip(answers, targets, strict=True))
    if "bleu" in metric.scores:
        scores |= _twice(_bleu, pairs)
    if "rouge" in metric.scores:
        scores |= _twice(_rouge, pairs)
    if "rougeL" in metric.scores:
        scores |= _twice(_rouge_l, pairs)
    return scores


def meteora_metric(task: str) -> Metric:
    """What scores one of MeteoRA's tasks. Raises `InputError` for any other task."""
    _check_tasks([task])
    right = functools.partial(accuracy, task) if task in ACCURACY else None
    return Metric(METRICS[task], right)


def _check_tasks(tasks: Iterable[str]) -> None:
    unknown = [task for task in tasks if task not in METRICS]
    if unknown:
        raise InputError(f"tasks: expected those with metrics ({', '.join(sorted(METRICS))}), found {unknown}")


def _pairs(what: str, answers: Sequence[str], targets: Sequence[str]) -> list[Pair]:
    """Answers beside their targets, lower-cased and stripped."""
    if len(answers) != len(targets) or not targets:
        raise InputError(f"{what}: expected an answer a target, found {len(answers)} answers, {len(targets)} targets")
    return [(plain(answer), plain(target)) for answer, target in zip(answers, targets, strict=True)]


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
    scores = rouge_each(pairs)
    return {name: _mean(score[name] for score in scores) for name in ROUGE_TYPES}


def rouge_each(pairs: Sequence[Pair]) -> list[dict[str, float]]:
    """The F-measures of ROUGE-1, 2 and L of each answer."""
    scorer = _rouge_scorer()
    scores = [scorer.score(target, answer) for answer, target in pairs]
    return [{name: score[name].fmeasure for name in ROUGE_TYPES} for score in scores]


def bleu_counts(answer: str, target: str) -> list[int]:
    """What corpus BLEU adds up, of one answer: its length, the target's, and of n-grams of 1 to 4 words how many the
    target has and how many there are."""
    found = _sacrebleu().sentence_bleu(answer, [target])
    return [found.sys_len, found.ref_len, *found.counts, *found.totals]


def bleu_of_counts(counts: Sequence[float] | np.ndarray) -> float:
    """Corpus BLEU of the sums of `bleu_counts`; 0 where there is nothing to score."""
    length, wanted, *grams = (round(float(count)) for count in counts)
    if not length:
        return 0.0
    return _sacrebleu().BLEU.compute_bleu(grams[:4], grams[4:], length, wanted, smooth_method="exp").score


def _rouge_l(pairs: Sequence[Pair]) -> dict[str, float]:
    return {"rougeL": _rouge(pairs)["rougeL"]}


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
    return loraretriever_kind(meteora_metric(task))


def loraretriever_kind(metric: Metric) -> str:
    """As `loraretriever_metric`, of a task with that metric."""
    return "em" if "accuracy" in metric.scores else "bleu" if metric.scores == ("bleu",) else "rouge"


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
    return plain(text).removesuffix(".").rstrip()


def sentence_bleu(answer: str, target: str) -> float:
    """BLEU of one answer by sacrebleu's defaults for sentences; case counts."""
    return _sacrebleu().sentence_bleu(answer, [target]).score


# Composite problems


def read_composite(text: str, n: int, number_of: Callable[[str], int] | None = None) -> list[str]:
    """The n answers of a composite problem, stripped, from lines "i. ..."; "" for one that is missing.

    An answer runs to the next one's line, and text before the first is no answer. Numbers come in their order and
    are skipped only where they are missing, so a line "7. ..." before answer 2 is text. An answer may be a
    numbered list itself: it begins with 1, and a line that could go on with it and with the answers belongs to
    it if the same number comes once more before another 1. number_of: the i of other lines that begin an answer, 0 of
    any that does not.

    >>> read_composite("Sure:\\n1. no\\n3. to do:\\n1. rest\\n2. eat", 3)
    ['no', '', 'to do:\\n1. rest\\n2. eat']
    """
    number_of = number_of or _line_number
    lines = textwrap.dedent(text).strip().split("\n")
    numbers = [number_of(line) for line in lines]
    answers: dict[int, list[str]] = {0: []}  # under 0, the text before the first answer
    current = in_list = 0  # the answer being read, and where a list inside it has got to
    for i, (line, number) in enumerate(zip(lines, numbers, strict=True)):
        if current < number <= n and _is_next_answer(number, current, in_list, numbers[i + 1 :]):
            first = line.split(".", 1)[1].lstrip()
            answers[number] = [first]
            current, in_list = number, int(number_of(first) == 1)
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
    tasks: Sequence[str],
    answers: Sequence[Sequence[str]],
    targets: Sequence[Sequence[str]],
    metrics: Sequence[Metric] = (),
) -> dict[str, int | float]:
    """The scores of composite problems: `answers[p][i]` to the sub-question of `tasks[i]` in problem p.

    Counts over all problems: `problems`, `attempted` (answers that are not empty) and `correct` (by the accuracy of the
    tasks that have one). BLEU and ROUGE as in `score`, over the answers of all tasks scored by them together.
    `metrics` are the tasks', MeteoRA's unless given.
    """
    metrics = metrics or [meteora_metric(task) for task in tasks]
    rows = [len(row) for table in (answers, targets) for row in table]
    if len(answers) != len(targets) or set(rows) != {len(tasks)}:
        raise InputError(
            f"composite: expected problems of {len(tasks)} answers and as many targets, found {len(answers)} and "
            f"{len(targets)} problems, of {min(rows, default=0)} to {max(rows, default=0)}"
        )
    columns = list(zip(metrics, zip(*answers, strict=True), zip(*targets, strict=True), strict=True))
    parts = [(metric, *pair) for metric, found, wanted in columns for pair in zip(found, wanted, strict=True)]
    return {"problems": len(answers), **score_parts(parts)}


def score_parts(parts: Sequence[tuple[Metric, str, str]]) -> dict[str, int | float]:
    """The scores of answers of several tasks together, from (metric, answer, target): as `score_composite` has them."""
    scores: dict[str, int | float] = {
        "attempted": sum(answer.strip() != "" for _, answer, _ in parts),
        "correct": sum(metric.right(answer, target) for metric, answer, target in parts if metric.right is not None),
    }
    for names, corpus in ((("bleu",), _bleu), (("rouge", "rougeL"), _rouge)):
        chosen = [(answer, target) for metric, answer, target in parts if set(names) & set(metric.scores)]
        if chosen:
            scores |= _twice(corpus, _pairs("composite", *zip(*chosen, strict=True)))
    return scores
