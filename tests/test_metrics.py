"""Scores against the packages called directly; accuracies and composite answers by hand-made cases, one a line."""

import sys

import pytest
import sacrebleu
from rouge_score import rouge_scorer

from meteora_jax.config import InputError
from meteora_jax.evaluation.metrics import (
    METRICS,
    accuracy,
    exact_match,
    read_composite,
    score,
    score_composite,
    score_loraretriever,
    sentence_bleu,
)
from meteora_jax.evaluation.tasks import METEORA_TASKS, SUBSTITUTES

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
    # gsm8k: the final number
    ("gsm8k", "She earns 2 x $9 = $18.\n#### 18", "9 * 2 = <<9*2=18>>18\n#### 18", True),
    ("gsm8k", "The answer is $1,500.00.", "#### 1500", True),
    ("gsm8k", "It is 5-3", "#### 3", True),
    ("gsm8k", "It falls to -3", "#### 3", False),
    ("gsm8k", "18 eggs, 2 a day", "#### 18", False),
    ("gsm8k", "eighteen", "#### 18", False),
    ("gsm8k", "", "#### 18", False),
]


@pytest.mark.parametrize(("task", "answer", "target", "right"), CASES)
def test_accuracy(task, answer, target, right):
    assert accuracy(task, answer, target) is right


def test_tasks_without_an_accuracy_are_refused():
    with pytest.raises(InputError, match=r"^linguistics_puzzles: expected a task with an accuracy"):
        accuracy("linguistics_puzzles", "woci", "woci")


# --- a whole task ---

ANSWERS = [
    "The big cats praise a small frog.",
    "",
    "Zwölf Boxkämpfer jagen Viktor über den Sylter Deich",
    "one line\nand another",
    " \n",
    "日本語 text",
]
TARGETS = [
    "the big cats praised a small frog",
    "a bird will see the fast dogs",
    "Zwölf Boxkämpfer jagen Eva quer über den großen Sylter Deich",
    "One line\nand then another",
    "no",
    "日本語 text",
]
LOWERED = [(a.lower().strip(), t.lower().strip()) for a, t in zip(ANSWERS, TARGETS, strict=True)]
KEPT = [pair for pair in LOWERED if pair[0]]


def package_bleu(pairs):
    return sacrebleu.corpus_bleu([a for a, _ in pairs], [[t for _, t in pairs]]).score


def package_rouge(pairs, name):
    scorer = rouge_scorer.RougeScorer([name])
    return sum(scorer.score(target=t, prediction=a)[name].fmeasure for a, t in pairs) / len(pairs)


def test_every_task_of_meteora_has_its_metrics():
    assert set(METRICS) == {*METEORA_TASKS, *SUBSTITUTES}
    assert {task for task, metrics in METRICS.items() if metrics != ("accuracy",)} == {
        *("alpaca", "cnn_dailymail", "linguistics_puzzles", "topical_chat", "strategyqa"),
        *("news_commentary_de", "news_commentary_es", "news_commentary_it"),
    }


def test_bleu_and_rouge_are_the_packages_own_with_and_without_empty_answers():
    scores = score("alpaca", ANSWERS, TARGETS)
    assert set(scores) == {name + end for name in ("bleu", "rouge1", "rouge2", "rougeL") for end in ("", "_strict")}
    assert scores["bleu"] == pytest.approx(package_bleu(KEPT))
    assert scores["bleu_strict"] == pytest.approx(package_bleu(LOWERED))
    for name in ("rouge1", "rouge2", "rougeL"):
        assert scores[name] == pytest.approx(package_rouge(KEPT, name))
        assert scores[f"{name}_strict"] == pytest.approx(package_rouge(LOWERED, name))
        assert scores[f"{name}_strict"] == pytest.approx(scores[name] * 4 / 6)
    assert 0 < scores["bleu_strict"] < scores["bleu"] < 100


def test_news_has_bleu_alone_and_case_never_counts():
    assert score("news_commentary_de", ["GERECHTIGKEIT IM TSCHAD HEUTE"], ["Gerechtigkeit im Tschad heute"]) == {
        "bleu": pytest.approx(100),
        "bleu_strict": pytest.approx(100),
    }


def test_accuracy_is_a_fraction_in_which_silence_is_wrong():
    assert score("winowhy", ["correct", "incorrect", " ", "Correct"], ["correct"] * 4) == {"accuracy": 0.5}


def test_strategyqa_has_all_three():
    scores = score("strategyqa", ["Yes. Ice floats on water.", ""], ["Yes. Ice floats on water.", "No. It sinks."])
    assert scores["accuracy"] == 0.5
    assert scores["bleu"] == pytest.approx(100)
    assert scores["rougeL"] == pytest.approx(1)
    assert scores["rougeL_strict"] == pytest.approx(0.5)


def test_nothing_but_silence_scores_zero():
    assert set(score("alpaca", ["", "\n"], ["a b c d", "e"]).values()) == {0.0}


def test_wrong_requests_are_refused():
    with pytest.raises(InputError, match=r"^tasks: expected those with metrics .* found \['kittens'\]"):
        score("kittens", ["a"], ["a"])
    with pytest.raises(InputError, match=r"^winowhy: expected an answer a target, found 1 answers, 2 targets"):
        score("winowhy", ["a"], ["a", "b"])
    with pytest.raises(InputError, match="found 0 answers, 0 targets"):
        score("winowhy", [], [])
    with pytest.raises(InputError, match="metric: expected em, bleu or rouge, found f1"):
        score_loraretriever("f1", ["a"], ["a"])


@pytest.mark.parametrize(
    ("package", "module"), [("sacrebleu", "sacrebleu"), ("rouge_score", "rouge_score.rouge_scorer")]
)
def test_a_missing_package_is_one_line_naming_the_extra(package, module, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InputError, match=rf"needs {package}, found none: pip install 'meteora-jax\[eval\]'"):
        score("alpaca", ["a"], ["a"])


# --- LoraRetriever ---


@pytest.mark.parametrize(
    ("answer", "target", "same"),
    [
        ("yes", "Yes.", True),
        (" It's impossible to say.\n", "it's impossible to say", True),
        ("Ja, ÄÖÜ .", "ja, äöü", True),
        ("yes, it is", "yes", False),
        ("yes..", "yes", False),
        ("", "yes", False),
    ],
)
def test_exact_match(answer, target, same):
    assert exact_match(answer, target) is same


def test_loraretriever_scores_are_the_packages_own():
    answers, targets = zip(*KEPT, strict=True)
    each = [sacrebleu.sentence_bleu(a, [t]).score for a, t in KEPT]
    assert [sentence_bleu(a, t) for a, t in KEPT] == each
    assert score_loraretriever("bleu", answers, targets) == {"bleu": pytest.approx(sum(each) / len(each))}
    rouge = {name: pytest.approx(package_rouge(LOWERED, name)) for name in ("rouge1", "rouge2", "rougeL")}
    assert score_loraretriever("rouge", ANSWERS, TARGETS) == rouge
    assert score_loraretriever("em", ["Yes", "no"], ["yes.", "yes."]) == {"exact_match": 0.5}
    assert score_loraretriever("bleu", ["", "a b c d"], ["a b c d"] * 2) == {"bleu": pytest.approx(50)}


# --- composite problems ---

READINGS = [
    ("1. a\n2. b\n3. c\n", ["a", "b", "c"]),
    ("", ["", "", ""]),
    ("no numbers at all", ["", "", ""]),
    # multi-line answers, empty lines in them, numbers in them
    ("1. a\n\nmore\n2. b\n3. 3.5 million\n4. d", ["a\n\nmore", "b", "3.5 million\n4. d"]),
    ("1. a\n2.5 litres\n1984. It was\n2. b\n3. c", ["a\n2.5 litres\n1984. It was", "b", "c"]),
    ("1. in 2. place\n2. 3. place\n3. c", ["in 2. place", "3. place", "c"]),
    # one missing, or empty, or the rest
    ("1. a\n2. b\n4. d", ["a", "b", "", "d"]),
    ("1. a\n2.\n3. c", ["a", "", "c"]),
    ("2. b\n3. c", ["", "b", "c"]),
    ("1. a", ["a", "", ""]),
    # text before the first, even with numbers
    ("Here are 3 answers:\n\n1. a\n2. b\n3. c", ["a", "b", "c"]),
    ("2. is harder.\n1. a\n2. b\n3. c", ["a", "b", "c"]),
    # a number out of turn
    ("1. a\n3. Oktober\n2. b\n3. c", ["a\n3. Oktober", "b", "c"]),
    # an answer that is a list: after its number, below its number, and with nothing left to confuse
    ("1. a\n2. 1. x\n2. y\n3. z\n3. c\n4. d", ["a", "1. x\n2. y\n3. z", "c", "d"]),
    ("1. To do:\n1. x\n2. y\n3. z\n2. b\n3. c", ["To do:\n1. x\n2. y\n3. z", "b", "c"]),
    ("1. a\n2. b\n3. list:\n1. x\n2. y\n3. z", ["a", "b", "list:\n1. x\n2. y\n3. z"]),
    ("1. a\n2. b\n4. d:\n1. x\n2. y\n3. z", ["a", "b", "", "d:\n1. x\n2. y\n3. z"]),
    # unicode, indentation of the whole, no space, line ends of another system
    ("  1. ÄÖÜ\n  2. 日本\u2028語\n  3. 🙂", ["ÄÖÜ", "日本\u2028語", "🙂"]),
    ("1.Yes\n2.No\n3.c", ["Yes", "No", "c"]),
    ("1. a\r\n2. b\r\n3. c\r\n", ["a", "b", "c"]),
]


@pytest.mark.parametrize(("text", "answers"), READINGS)
def test_composite_answers_are_read_from_their_lines(text, answers):
    assert read_composite(text, len(answers)) == answers


def test_ten_answers_are_read():
    assert read_composite("".join(f"{i}. answer {i}\n" for i in range(1, 11)), 10) == [
        f"answer {i}" for i in range(1, 11)
    ]


COMPOSITE_3 = ("logical_deduction", "question_selection", "strategyqa")


def test_composite_scores_count_answers_and_pool_the_texts():
    answers = [["the cat is first.", "", "Yes. Cats can swim well."], ["no idea", "which one?", ""]]
    targets = [["The cat is first.", "Who?", "Yes. Cats do swim well."], ["Joe.", "Which one?", "No. Too big."]]
    scores = score_composite(COMPOSITE_3, answers, targets)
    assert (scores["problems"], scores["attempted"], scores["correct"]) == (2, 4, 3)
    texts = [("yes. cats can swim well.", "yes. cats do swim well."), ("", "no. too big.")]
    assert scores["bleu"] == pytest.approx(package_bleu(texts[:1]))
    assert scores["bleu_strict"] == pytest.approx(package_bleu(texts))
    assert scores["rouge2"] == pytest.approx(package_rouge(texts[:1], "rouge2"))
    assert scores["rouge2_strict"] == pytest.approx(package_rouge(texts, "rouge2"))


def test_composite_bleu_and_rouge_hold_only_the_tasks_that_have_them():
    tasks = ("winowhy", "news_commentary_de", "alpaca")
    scores = score_composite(tasks, [["correct", "A b c d e", "f g h i"]], [["correct", "a b c d x", "f g h i"]])
    assert scores["correct"] == 1
    assert scores["bleu"] == pytest.approx(package_bleu([("a b c d e", "a b c d x"), ("f g h i", "f g h i")]))
    assert scores["rouge1"] == pytest.approx(1)
    alone = score_composite(("winowhy",), [["correct"]], [["incorrect"]])
    assert alone == {"problems": 1, "attempted": 1, "correct": 0}


@pytest.mark.parametrize("answers", [[], [["a", "b"]], [["a", "b", "c"], ["a", "b", "c"]]])
def test_composite_answers_that_do_not_fit_are_refused(answers):
    with pytest.raises(InputError, match=r"^composite: expected problems of 3 answers and as many targets"):
        score_composite(COMPOSITE_3, answers, [["a", "b", "c"]])
