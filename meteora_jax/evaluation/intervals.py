"""How far scores may be off: bootstrap over problems (Efron 1979), and paired between systems (Koehn 2004).

A row's problems are drawn again, with replacement, as many as there are; a score's interval holds the middle 95 % of
what the draws give. Systems are scored on the same draws, so their difference has an interval of its own, narrower than
two independent ones would have. Rows are drawn independently: a mean over tasks keeps its tasks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from meteora_jax.evaluation.metrics import (
    ROUGE_TYPES,
    Metric,
    bleu_counts,
    bleu_of_counts,
    exact_match,
    loraretriever_kind,
    plain,
    rouge_each,
    sentence_bleu,
)
from meteora_jax.evaluation.problems import Problem

DRAWS = 1000
LEVEL = 95  # per cent of the draws that an interval holds
_CELLS = 4_000_000  # numbers of a block of draws

Interval = tuple[float, float]
Draws = Mapping[str, np.ndarray]  # what each score of a system was, float64 [DRAWS]


@dataclass(frozen=True)
class Statistic:
    """A score as a function of sums over problems: `parts` float64 [P, S], `score` [R, S] -> [R]."""

    parts: np.ndarray
    score: Callable[[np.ndarray], np.ndarray]


def statistics(problems: Sequence[Problem], answers: Sequence[str], loraretriever: bool) -> dict[str, Statistic]:
    """The scores of one row's answers that a table shows, by name: those of `table.score_row`, `attempted` and
    `correct` as shares. loraretriever: by LoraRetriever's scoring."""
    first, targets = problems[0], [p.response for p in problems]
    if first.tasks:
        return {} if loraretriever else _composite(problems, answers)
    if first.asks:
        return {} if loraretriever else _turns(problems, answers)
    if loraretriever:
        return _loraretriever(first.metric or loraretriever_kind(first.scored_by[0]), answers, targets)
    return {} if first.metric else _single(first.scored_by[0], answers, targets)


def draw(row: str, systems: Mapping[str, Mapping[str, Statistic]]) -> dict[str, dict[str, np.ndarray]]:
    """Each system's scores on the same draws of a row's problems; the row's name seeds them."""
    flat = [(system, name, s) for system, scores in systems.items() for name, s in scores.items()]
    if not flat:
        return {system: {} for system in systems}
    parts = np.concatenate([s.parts for _, _, s in flat], axis=1)
    count = len(parts)
    random = np.random.default_rng(int.from_bytes(hashlib.sha256(row.encode()).digest()[:8], "big"))
    block = max(1, _CELLS // count)
    sums = []
    for start in range(0, DRAWS, block):
        drawn = random.multinomial(count, np.full(count, 1 / count), size=min(block, DRAWS - start))
        sums.append(drawn.astype(np.float64) @ parts)
    whole, at = np.concatenate(sums), 0
    found: dict[str, dict[str, np.ndarray]] = {system: {} for system in systems}
    for system, name, s in flat:
        width = s.parts.shape[1]
        found[system][name] = s.score(whole[:, at : at + width])
        at += width
    return found


def interval(drawn: np.ndarray) -> Interval:
    """The middle `LEVEL` per cent of draws."""
    rest = (100 - LEVEL) / 2
    low, high = np.percentile(drawn, [rest, 100 - rest])
    return float(low), float(high)


def share_interval(share: float, count: int) -> Interval:
    """The interval of a share of `count` problems, from 0 to 1: to draw problems again is to draw from a binomial."""
    random = np.random.default_rng(count)
    return interval(random.binomial(count, share, DRAWS) / count)


# A row's scores as sums over its problems


def _ratio(sums: np.ndarray) -> np.ndarray:
    return sums[:, 0] / np.where(sums[:, 1] > 0, sums[:, 1], 1)


def _mean(values: Sequence[int | float], weights: Sequence[int] | None = None) -> Statistic:
    """The mean of values, one a problem; of sums of values and of weights where a problem has several."""
    one = np.ones(len(values)) if weights is None else np.asarray(weights, np.float64)
    return Statistic(np.stack([np.asarray(values, np.float64), one], axis=1), _ratio)


def _bleu_score(sums: np.ndarray) -> np.ndarray:
    return np.asarray([bleu_of_counts(row) for row in sums])


def _texts(names: Sequence[str], answers: Sequence[str], targets: Sequence[str]) -> dict[str, np.ndarray]:
    """BLEU's and ROUGE's parts of each answer [P, S], those of an empty one zero."""
    pairs = [(plain(answer), plain(target)) for answer, target in zip(answers, targets, strict=True)]
    parts: dict[str, np.ndarray] = {}
    if "bleu" in names:
        parts["bleu"] = np.asarray([bleu_counts(*pair) if pair[0] else np.zeros(10) for pair in pairs], np.float64)
    types = [t for t in ROUGE_TYPES if "rouge" in names or t in names]
    if types:
        each, said = rouge_each(pairs), np.asarray([pair[0] != "" for pair in pairs], np.float64)
        for t in types:
            parts[t] = np.stack([np.asarray([e[t] for e in each]) * said, said], axis=1)
    return parts


def _named(parts: Mapping[str, np.ndarray]) -> dict[str, Statistic]:
    return {name: Statistic(own, _bleu_score if name == "bleu" else _ratio) for name, own in parts.items()}


def _single(metric: Metric, answers: Sequence[str], targets: Sequence[str]) -> dict[str, Statistic]:
    found: dict[str, Statistic] = {}
    if metric.right is not None:
        found["accuracy"] = _mean([metric.right(a, t) for a, t in zip(answers, targets, strict=True)])
    return found | _named(_texts(metric.scores, answers, targets))


def _loraretriever(kind: str, answers: Sequence[str], targets: Sequence[str]) -> dict[str, Statistic]:
    pairs = list(zip(answers, targets, strict=True))
    if kind == "em":
        return {"exact_match": _mean([exact_match(*pair) for pair in pairs])}
    if kind == "bleu":
        return {"bleu": _mean([sentence_bleu(*pair) for pair in pairs])}
    each = rouge_each([(plain(answer), plain(target)) for answer, target in pairs])
    return {t: _mean([e[t] for e in each]) for t in ROUGE_TYPES}


def _turns(problems: Sequence[Problem], answers: Sequence[str]) -> dict[str, Statistic]:
    """Turns of conversations, each by its own task's metric: a score's mean is over those that have it."""
    metrics, targets = [p.scored_by[0] for p in problems], [p.response for p in problems]
    scored = list(zip(metrics, answers, targets, strict=True))
    right = [0.0 if metric.right is None else metric.right(answer, target) for metric, answer, target in scored]
    found = {
        "attempted": _mean([answer.strip() != "" for answer in answers]),
        "correct": _mean(right, [metric.right is not None for metric in metrics]),
    }
    sums: dict[str, np.ndarray] = {}
    for scores in {metric.scores for metric in metrics}:
        rows = [i for i, metric in enumerate(metrics) if metric.scores == scores]
        names = ["rouge" if name == "rougeL" else name for name in scores]
        for name, parts in _texts(names, [answers[i] for i in rows], [targets[i] for i in rows]).items():
            whole = sums.setdefault(name, np.zeros((len(problems), parts.shape[1])))
            whole[rows] = parts
    return found | _named(sums)


def _composite(problems: Sequence[Problem], answers: Sequence[str]) -> dict[str, Statistic]:
    metrics = problems[0].scored_by
    said = [p.answers_in(answer) for p, answer in zip(problems, answers, strict=True)]
    columns = list(zip(metrics, zip(*said, strict=True), zip(*(p.answers for p in problems), strict=True), strict=True))
    attempted = [sum(answer.strip() != "" for answer in row) for row in said]
    found = {"attempted": _mean(attempted, [len(metrics)] * len(said))}
    right = np.zeros(len(said))
    for metric, own, wanted in columns:
        if metric.right is not None:
            right += [metric.right(a, t) for a, t in zip(own, wanted, strict=True)]
    found["correct"] = _mean(right.tolist(), [sum(m.right is not None for m in metrics)] * len(said))
    sums: dict[str, np.ndarray] = {}
    for metric, own, wanted in columns:
        names = ["rouge" if name == "rougeL" else name for name in metric.scores]
        for name, parts in _texts(names, own, wanted).items():
            sums[name] = sums.get(name, 0) + parts
    return found | _named(sums)
