"""Intervals against other packages: scores as sums, bootstrapped proportions, BLEU and paired differences."""

import numpy as np
import pytest
import sacrebleu
from scipy import stats

from meteora_jax.evaluation.intervals import DRAWS, draw, interval, statistics
from meteora_jax.evaluation.problems import Problem
from meteora_jax.evaluation.table import markdown, tabulate

RANDOM = np.random.default_rng(0)
WORDS = ("the", "cat", "sat", "on", "a", "mat", "dog", "ran")


def some_text():
    return " ".join(RANDOM.choice(WORDS, RANDOM.integers(3, 9)))


def answered(task, count=40, **more):
    """Problems of a task, and answers of which some are empty and some right."""
    problems = [Problem(f"{task}/test/{i}", task, f"{i}", some_text(), **more) for i in range(count)]
    kinds = RANDOM.integers(0, 4, count)
    return problems, [("", p.response, some_text(), p.response)[k] for k, p in zip(kinds, problems, strict=True)]


def composites(count=30):
    tasks = ("object_counting", "alpaca", "news_commentary_de")
    problems = []
    for i in range(count):
        answers = (str(i % 5), some_text(), some_text())
        problems.append(Problem(f"c/test/{i}", "c", f"{i}", "@@@@\n".join(answers), tasks, answers))
    said = [f"1. {i % 4}\n2. {p.answers[1] if i % 3 else some_text()}\n" for i, p in enumerate(problems)]
    return problems, said


@pytest.mark.parametrize("rows", [answered("alpaca"), answered("winowhy"), answered("strategyqa"), composites()])
def test_the_sums_give_the_scores_of_the_table(rows):
    problems, answers = rows
    cell = tabulate(problems, ["s"], {("s", p.id): a for p, a in zip(problems, answers, strict=True)})["tasks"]
    (cell,) = (row["s"] for row in cell.values())
    found = statistics(problems, answers, False)
    assert found
    for name, statistic in found.items():
        among = {"correct": "graded", "attempted": "asked"}.get(name)
        want = cell[name] / cell[among] if among else cell[name]
        assert float(statistic.score(statistic.parts.sum(0, keepdims=True))[0]) == pytest.approx(want, rel=1e-9), name
    if not problems[0].tasks:
        for name, statistic in statistics(problems, answers, True).items():
            want = cell["loraretriever"][name]
            assert float(statistic.score(statistic.parts.sum(0, keepdims=True))[0]) == pytest.approx(want, rel=1e-9)


def test_a_draw_of_bleu_is_sacrebleu_s_of_the_problems_drawn():
    problems, answers = answered("news_commentary_de", 12)
    statistic = statistics(problems, answers, False)["bleu"]
    drawn = RANDOM.integers(0, 12, 12)
    pairs = [(answers[i], problems[i].response) for i in drawn if answers[i]]
    said, wanted = zip(*pairs, strict=True)
    want = sacrebleu.corpus_bleu(said, [wanted]).score
    assert float(statistic.score(statistic.parts[drawn].sum(0, keepdims=True))[0]) == pytest.approx(want, rel=1e-9)


def test_an_accuracy_s_interval_is_the_binomial_s():
    problems = [Problem(f"winowhy/test/{i}", "winowhy", f"{i}", "yes") for i in range(100)]
    answers = ["yes"] * 70 + ["no"] * 30
    drawn = draw("winowhy", {"s": statistics(problems, answers, False)})["s"]["accuracy"]
    assert len(drawn) == DRAWS
    low, high = stats.binom.ppf([0.025, 0.975], 100, 0.7) / 100
    assert interval(drawn) == pytest.approx((low, high), abs=0.021)
    assert abs(drawn.mean() - 0.7) < 0.005


def test_a_paired_difference_is_scipy_s_and_narrower_than_two_apart():
    count = 80
    problems = [Problem(f"winowhy/test/{i}", "winowhy", f"{i}", "yes") for i in range(count)]
    first = np.arange(count) % 2 == 0
    second = first | (np.arange(count) % 8 == 1)  # right wherever the first is
    said = {s: ["yes" if r else "no" for r in right] for s, right in (("a", first), ("b", second))}
    answers = {(s, p.id): text for s, texts in said.items() for p, text in zip(problems, texts, strict=True)}
    table = tabulate(problems, ["a", "b"], answers)
    (found,) = table["differences"]
    assert (found["systems"], found["row"], found["score"]) == (["a", "b"], "winowhy", "accuracy")
    assert found["difference"] == pytest.approx(100 * (second.mean() - first.mean()))
    other = stats.bootstrap(
        (second.astype(float), first.astype(float)), lambda x, y, axis: x.mean(axis) - y.mean(axis), paired=True,
        n_resamples=5000, method="percentile", rng=1,
    ).confidence_interval  # fmt: skip
    assert found["interval"] == pytest.approx([100 * other.low, 100 * other.high], abs=1.6)
    apart = [table["intervals"]["tasks"]["winowhy"][s]["accuracy"] for s in "ab"]
    assert found["interval"][1] - found["interval"][0] < 100 * (apart[1][1] - apart[1][0])
    text = markdown(table, ["a", "b"])
    assert f"| winowhy | 80 | 50.0 [{100 * apart[0][0]:.1f}, {100 * apart[0][1]:.1f}] | 62.5 [" in text
    assert f"| b less a | +12.5 [{found['interval'][0]:+.1f}, " in text
    assert table == tabulate(problems, ["a", "b"], answers)  # the same draws every time


def test_the_mean_keeps_its_tasks_and_an_undefined_system_stays_undefined():
    problems, answers = [], {}
    for task in ("winowhy", "navigate", "hyperbaton"):
        own = [Problem(f"{task}/test/{i}", task, f"{i}", "yes") for i in range(25)]
        problems += own
        for s, right in (("a", 5), ("b", 20), ("c", 10)):
            answers |= {(s, p.id): "yes" if i < right else "no" for i, p in enumerate(own)}
    table = tabulate(problems, ["a", "b", "c"], answers, {("c", "navigate")})
    low, high = table["intervals"]["mean"]["b"]
    expected = 1.96 * np.sqrt(0.8 * 0.2 / 25 / 3)  # of a mean of three independent proportions
    assert (low, high) == (pytest.approx(0.8 - expected, abs=0.02), pytest.approx(0.8 + expected, abs=0.02))
    mean = {tuple(d["systems"]): d["difference"] for d in table["differences"] if d["row"] == ""}
    assert mean == {("a", "b"): pytest.approx(60), ("a", "c"): pytest.approx(20), ("b", "c"): pytest.approx(-40)}
    text = markdown(table, ["a", "b", "c"])
    assert "| paired difference | mean accuracy | winowhy | navigate | hyperbaton |" in text
    assert "| c less b | -40.0 [" in text
    assert " | not defined | -40.0 [" in text


def test_several_tasks_without_an_accuracy_differ_by_their_wording():
    """That of none of them is right cannot differ."""
    problems = [Problem(f"c/test/{i}", "c", f"{i}", "a b@@@@\nc d", ("alpaca",), ("a b",)) for i in range(4)]
    answers = {(s, p.id): said for p in problems for s, said in (("good", "1. a b"), ("bad", "1. z"))}
    (found,) = tabulate(problems, ["bad", "good"], answers)["differences"]
    assert (found["score"], found["difference"]) == ("rougeL", pytest.approx(100))


def test_a_mean_of_exact_matches_is_called_so():
    problems = [Problem(f"{t}/q/{i}", t, f"{i}", "yes", metric="em") for t in "ab" for i in range(3)]
    answers = {(s, p.id): s for p in problems for s in ("yes", "no")}
    text = markdown(tabulate(problems, ["no", "yes"], answers), ["no", "yes"], "loraretriever")
    assert "| mean exact match | | 0.0" in text
    assert "| paired difference | mean exact match | a | b |" in text
