"""The table of an evaluation: what every system scored on every row, as JSON and as Markdown.

A row is a task or a set of composite problems; a system that a row does not suit has no cell there.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from meteora_jax.evaluation.intervals import DRAWS, LEVEL, Draws, draw, interval, share_interval, statistics
from meteora_jax.evaluation.metrics import (
    loraretriever_kind,
    score_by,
    score_composite,
    score_loraretriever,
    score_parts,
)
from meteora_jax.evaluation.problems import Problem

Scoring = Literal["meteora", "loraretriever"]
Cell = dict[str, Any]  # a system's scores in one row
Table = dict[str, Any]  # as `tabulate` returns it: what table.json holds

UNDEFINED = "not defined"
NOTE = (
    "Accuracies, BLEU and ROUGE run from 0 to 100; in round brackets where an empty answer counts as zero, in square "
    f"ones the {LEVEL} % interval of a bootstrap over problems ({DRAWS:,} draws).\n"
)

_LABELS = {
    "accuracy": "", "exact_match": "", "bleu": ", BLEU", "rouge1": ", ROUGE-1", "rouge2": ", ROUGE-2",
    "rougeL": ", ROUGE-L",
}  # fmt: skip
_SHARES = {"accuracy", "exact_match", "rouge1", "rouge2", "rougeL", "attempted", "correct"}  # from 0 to 1
_FIRST = ("accuracy", "exact_match", "correct", "rougeL", "bleu")  # a row's differences are of the first that it has
_COLUMNS = 5  # tasks that a table of differences has beside their mean
_MEANS: dict[Scoring, str] = {"meteora": "accuracy", "loraretriever": "exact_match"}


def score_row(problems: Sequence[Problem], answers: Sequence[str]) -> Cell:
    """The scores of one row's answers; `problems` are all of one kind.

    A task has MeteoRA's metrics and under "loraretriever" LoraRetriever's; a query of LoraRetriever's only those.
    Composite problems have `score_composite`'s counts, `asked` sub-questions and `graded` ones, which `correct`
    counts among. Turns of conversations have the same, each by its own task's metric, and in `turns` what is correct
    and graded of every place in a conversation.
    """
    first, count = problems[0], {"problems": len(problems)}
    targets = [p.response for p in problems]
    if first.tasks:
        parsed = [p.answers_in(answer) for p, answer in zip(problems, answers, strict=True)]
        graded = len(problems) * sum(metric.right is not None for metric in first.scored_by)
        scores = score_composite(first.tasks, parsed, [p.answers for p in problems], first.scored_by)
        return {**scores, **count, "asked": len(problems) * first.parts, "graded": graded}
    if first.asks:
        return {**_score_turns(problems, answers), **count}
    if first.metric:
        return {"loraretriever": score_loraretriever(first.metric, answers, targets), **count}
    (metric,) = first.scored_by
    other = score_loraretriever(loraretriever_kind(metric), answers, targets)
    return {**score_by(metric, answers, targets), "loraretriever": other, **count}


def _score_turns(problems: Sequence[Problem], answers: Sequence[str]) -> Cell:
    parts = [(p.scored_by[0], answer, p.response) for p, answer in zip(problems, answers, strict=True)]
    places: dict[str, list[float]] = {}
    for p, (metric, answer, target) in sorted(zip(problems, parts, strict=True), key=_turn):
        if metric.right is not None:
            place = places.setdefault(str(p.turn), [0, 0])
            place[0] += metric.right(answer, target)
            place[1] += 1
    graded = sum(metric.right is not None for metric, _, _ in parts)
    return {**score_parts(parts), "asked": len(parts), "graded": graded, "turns": places}


def _turn(scored: tuple[Problem, Any]) -> int:
    return scored[0].turn


def tabulate(
    problems: Sequence[Problem],
    systems: Sequence[str],
    answers: Mapping[tuple[str, str], str],
    skipped: Collection[tuple[str, str]] = (),
) -> Table:
    """The table from the answers by (system, problem id); `skipped` are the (system, row) that were not asked.

    Returns:
        {"tasks": {row: {system: scores}}, "clusters": {cluster: {system: the mean of its tasks' scores}},
        "mean accuracy": {system: over the tasks that have one}, "mean exact_match": likewise, by LoraRetriever's
        scoring, "scoring": the one that is shown, "metrics": {task: name and reason, of tasks of one's own},
        "intervals": as `_intervals`, "differences": as `_differences`}.
    """
    rows: dict[str, list[Problem]] = {}
    for p in problems:
        rows.setdefault(p.task, []).append(p)
    table: dict[str, dict[str, Cell]] = {}
    for row, own in rows.items():
        asked = [s for s in systems if (s, row) not in skipped]
        table[row] = {s: score_row(own, [answers[s, p.id] for p in own]) for s in asked}
    means = {f"mean {name}": _means(table, systems, name, scoring) for scoring, name in _MEANS.items()}
    clusters: dict[str, list[str]] = {}
    for row, own in rows.items():
        clusters.setdefault(own[0].cluster, []).append(row)
    clusters.pop("", None)  # tasks of none
    scoring = scoring_of(problems)
    drawn: dict[str, dict[str, dict[str, np.ndarray]]] = {}
    for row, own in rows.items():
        said = {s: [answers[s, p.id] for p in own] for s in table[row]}
        drawn[row] = draw(row, {s: statistics(own, texts, scoring == "loraretriever") for s, texts in said.items()})
    named = {t: m for p in problems for t, m in zip(p.own_tasks, p.metrics, strict=False) if m.name}
    return {
        "tasks": table,
        "clusters": {c: _cluster([table[row] for row in members]) for c, members in clusters.items()},
        **means,
        "scoring": scoring,
        "metrics": {task: {"name": m.name, "because": m.because} for task, m in named.items()},
        "intervals": _intervals(drawn, systems, clusters, scoring),
        "differences": _differences(table, drawn, systems, scoring),
    }


def scoring_of(problems: Sequence[Problem]) -> Scoring:
    """By whose metrics a table and its pictures are: LoraRetriever's where a query of its release is asked."""
    return "loraretriever" if any(p.metric for p in problems) else "meteora"


def _intervals(
    drawn: Mapping[str, Mapping[str, Draws]],
    systems: Sequence[str],
    clusters: Mapping[str, Sequence[str]],
    scoring: Scoring,
) -> dict[str, dict[str, Any]]:
    """{"tasks": {row: {system: {score: [low, high]}}}, "clusters": likewise, "mean": {system: [low, high]}}."""

    def of(row: Mapping[str, Draws]) -> dict[str, dict[str, list[float]]]:
        return {s: {name: list(interval(d)) for name, d in scores.items()} for s, scores in row.items()}

    means = {s: _mean_draws(drawn, _MEANS[scoring], [s]) for s in systems}
    return {
        "tasks": {row: of(cells) for row, cells in drawn.items()},
        "clusters": {c: of(_cluster_draws([drawn[row] for row in members])) for c, members in clusters.items()},
        "mean": {s: list(interval(found[0])) for s, found in means.items() if found},
    }


def _cluster_draws(rows: Sequence[Mapping[str, Draws]]) -> dict[str, dict[str, np.ndarray]]:
    cells: dict[str, dict[str, np.ndarray]] = {}
    for system in rows[0]:
        names = dict.fromkeys(name for row in rows for name in row[system])
        cells[system] = {n: np.mean([row[system][n] for row in rows if n in row[system]], axis=0) for n in names}
    return cells


def _mean_draws(drawn: Mapping[str, Mapping[str, Draws]], name: str, systems: Sequence[str]) -> list[np.ndarray]:
    """Each system's mean over the rows that have this score of all of them; nothing where there is no such row."""
    rows = [row for row in drawn.values() if all(name in row.get(s, {}) for s in systems)]
    return [np.mean([row[s][name] for row in rows], axis=0) for s in systems] if rows else []


def _differences(
    table: Mapping[str, Mapping[str, Cell]],
    drawn: Mapping[str, Mapping[str, Draws]],
    systems: Sequence[str],
    scoring: Scoring,
) -> list[dict[str, Any]]:
    """Every two systems' paired differences, the second's score less the first's, in points: of each row, and of the
    mean accuracy over the rows that both have (row "")."""
    found: list[dict[str, Any]] = []
    for a, b in itertools.combinations(systems, 2):
        common = [row for row, cells in table.items() if a in cells and b in cells]
        name = _MEANS[scoring]
        shared = [row for row in common if name in drawn[row][a] and name in drawn[row][b]]
        if len(shared) > 1:
            exact = np.mean(
                [_share(table[row][b], name, scoring) - _share(table[row][a], name, scoring) for row in shared]
            )
            first, second = _mean_draws({row: drawn[row] for row in shared}, name, [a, b])
            found.append(_difference((a, b), "", name, float(exact), second - first))
        for row in common:
            known = drawn[row][a].keys() & drawn[row][b].keys()
            if not table[row][a].get("graded", 1):  # several tasks of which none has an accuracy
                known -= {"correct"}
            score = next((n for n in _FIRST if n in known), None)
            if score is not None:
                exact = _share(table[row][b], score, scoring) - _share(table[row][a], score, scoring)
                found.append(_difference((a, b), row, score, exact, drawn[row][b][score] - drawn[row][a][score]))
    return found


def _difference(systems: tuple[str, str], row: str, score: str, exact: float, draws: np.ndarray) -> dict[str, Any]:
    factor = _factor(score)
    bounds = [factor * bound for bound in interval(draws)]
    return {"systems": list(systems), "row": row, "score": score, "difference": factor * exact, "interval": bounds}


def _share(cell: Cell, name: str, scoring: Scoring) -> float:
    """A score as its draws are: `correct` among those that are graded."""
    scores = shown(cell, scoring)
    return scores[name] / max(scores["graded"], 1) if name == "correct" else scores[name]


def _cluster(rows: Sequence[Mapping[str, Cell]]) -> dict[str, Cell]:
    """Each system's mean scores over the rows of a cluster, every task weighing the same; problems are counted."""
    cells: dict[str, Cell] = {}
    for system in rows[0]:
        own = [row[system]["loraretriever"] for row in rows]
        names = dict.fromkeys(name for scores in own for name in scores)
        found = {name: [scores[name] for scores in own if name in scores] for name in names}
        means = {name: sum(values) / len(values) for name, values in found.items()}
        cells[system] = {"loraretriever": means, "problems": sum(row[system]["problems"] for row in rows)}
    return cells


def _means(table: Mapping[str, Mapping[str, Cell]], systems: Sequence[str], name: str, scoring: Scoring) -> dict:
    columns = {s: [shown(row[s], scoring).get(name) for row in table.values() if s in row] for s in systems}
    values = {s: [v for v in column if v is not None] for s, column in columns.items()}
    return {s: sum(v) / len(v) for s, v in values.items() if v}


def shown(cell: Mapping[str, Any], scoring: Scoring) -> Mapping[str, Any]:
    """The part of a system's scores that a scoring shows: for LoraRetriever's, its own or nothing."""
    return cell if scoring == "meteora" else cell.get("loraretriever", {})


def mean_shares(table: Table, scoring: Scoring = "meteora") -> dict[str, float]:
    """{system: its mean accuracy over the tasks that have one, from 0 to 1}."""
    return table[f"mean {_MEANS[scoring]}"]


def markdown(table: Table, systems: Sequence[str], scoring: Scoring = "meteora") -> str:
    """The table by one scoring: a line a task with its accuracy, or a line a metric where it has none."""
    lines = ["| task | problems | " + " | ".join(map(escaped, systems)) + " |", "| --- " * (len(systems) + 2) + "|"]
    known = table["intervals"] if table["scoring"] == scoring else {"tasks": {}, "clusters": {}, "mean": {}}
    groups = [(row, cells, known["tasks"].get(row, {})) for row, cells in table["tasks"].items()]
    groups += [(f"cluster {c}", cells, known["clusters"].get(c, {})) for c, cells in table["clusters"].items()]
    for row, cells, bounds in groups:
        count = next(iter(cells.values()))["problems"] if cells else 0
        metric = table["metrics"].get(row, {}).get("name", "").partition(":")[0] if scoring == "meteora" else ""
        for label, texts in _lines(row, cells, bounds, metric, scoring):
            scores = " | ".join(texts.get(s, UNDEFINED) for s in systems)
            lines.append(f"| {escaped(label)} | {count} | {scores} |")
    name = _MEANS[scoring]
    if means := mean_shares(table, scoring):
        texts = [f"{100 * means[s]:.1f}{_bounds(known['mean'], s, 100)}" if s in means else UNDEFINED for s in systems]
        lines.append(f"| mean {name.replace('_', ' ')} | | " + " | ".join(texts) + " |")
    parts = ["\n".join(lines) + "\n", NOTE]
    if scoring == "meteora":
        parts += metric_notes(table["metrics"])
    if table["scoring"] == scoring and table["differences"]:
        parts.append(differences_markdown(table["differences"]))
    return "\n".join(parts)


def metric_notes(metrics: Mapping[str, Mapping[str, str]]) -> list[str]:
    """A sentence on what scores the tasks of one's own, those of one metric and reason together."""
    groups: dict[tuple[str, str], list[str]] = {}
    for row, metric in metrics.items():
        groups.setdefault((metric["name"], metric["because"]), []).append(row)
    said = [f"{', '.join(rows)}: {name}{because and ', ' + because}" for (name, because), rows in groups.items()]
    return [escaped(f"Scored by: {'; '.join(said)}.\n")] if said else []


def differences_markdown(differences: Sequence[Mapping[str, Any]]) -> str:
    """Every two systems' paired differences: of the mean, of the rows that are not in it, of all where they are few."""
    rows = list(dict.fromkeys(d["row"] for d in differences))
    in_mean = [d["row"] for d in differences if d["score"] in _MEANS.values() and d["row"]]
    if "" in rows and len(set(in_mean)) > _COLUMNS:
        rows = [row for row in rows if row not in in_mean]
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for d in differences:
        low, high = d["interval"]
        cells.setdefault(tuple(d["systems"]), {})[d["row"]] = f"{d['difference']:+.1f} [{low:+.1f}, {high:+.1f}]"
    mean = next((f"mean {d['score'].replace('_', ' ')}" for d in differences if not d["row"]), "")
    lines = ["| paired difference | " + " | ".join(escaped(row) or mean for row in rows) + " |"]
    lines.append("| --- " * (len(rows) + 1) + "|")
    for (first, second), texts in cells.items():
        pair = escaped(f"{second} less {first}")
        lines.append(f"| {pair} | " + " | ".join(texts.get(row, UNDEFINED) for row in rows) + " |")
    return "\n".join(lines) + f"\n\nIn points, with the {LEVEL} % interval of a paired bootstrap over the same draws.\n"


def retrieval_markdown(found: Mapping[str, Any]) -> str:
    """How often an index finds the own adapter of a problem among the first k, from `report.write_retrieval`."""
    ks = list(found["iid"])
    lines = ["| % found among the first | " + " | ".join(map(str, ks)) + " |", "| --- " * (len(ks) + 1) + "|"]
    counts = found["counts"]
    rows = [("all", found["iid"], counts["iid"])]
    rows += [(name, row, counts["adapters"][name]) for name, row in found["adapters"].items()]
    rows += [(f"cluster {name}", row, counts["clusters"][name]) for name, row in found["clusters"].items()]
    if found["ood"]:
        rows.append(("all, own adapter hidden: one of its cluster", found["ood"], counts["ood"]))
    for label, row, count in rows:
        bounds = {k: share_interval(row[k] / 100, count) for k in ks}
        texts = " | ".join(f"{row[k]:.1f}{_bounds(bounds, k, 100)}" for k in ks)
        lines.append(f"| {escaped(label)} | {texts} |")
    return "\n".join(lines) + "\n"


def escaped(name: str) -> str:
    """A name as a cell of a table: a bar of its own would end the cell."""
    return name.replace("|", "\\|")


def _bounds(known: Mapping[Any, Sequence[float]], name: object, factor: int, digits: int = 1) -> str:
    """An interval behind its score; nothing where none is known."""
    return "" if name not in known else " [" + ", ".join(f"{factor * bound:.{digits}f}" for bound in known[name]) + "]"


def _lines(
    row: str,
    cells: Mapping[str, Cell],
    bounds: Mapping[str, Mapping[str, Sequence[float]]],
    metric: str,
    scoring: Scoring,
) -> Iterator[tuple[str, dict[str, str]]]:
    """A row's lines: their labels, and each system's text. metric: of a task of one's own."""
    visible = {s: shown(cell, scoring) for s, cell in cells.items()}
    sample = next(iter(visible.values()), {})
    if "attempted" in sample:
        for name, among in (("attempted", "asked"), ("correct", "graded")):
            texts = {s: f"{v[name]:g} of {v[among]}" for s, v in visible.items()}
            yield (
                f"{row}, {name}",
                {s: t + _bounds(bounds.get(s, {}), name, visible[s][among], 0) for s, t in texts.items()},
            )
    for turn in sample.get("turns", {}):
        texts = {s: f"{v['turns'][turn][0]:g} of {v['turns'][turn][1]}" for s, v in visible.items()}
        yield f"{row}, turn {turn}", texts
    names = [name for name in _LABELS if name in sample]
    # an accuracy stands for its task alone; what strategyqa has beside it is in the JSON
    for name in names[:1] if names[:1] == ["accuracy"] else names:
        label = _LABELS[name] or (f", {metric}" if metric else "")
        yield (
            row + label,
            {s: _text(v, name) + _bounds(bounds.get(s, {}), name, _factor(name)) for s, v in visible.items()},
        )
    if not sample:
        yield row, {}


def _text(scores: Mapping[str, Any], name: str) -> str:
    factor = _factor(name)
    strict = scores.get(f"{name}_strict")
    return f"{factor * scores[name]:.1f}" + (f" ({factor * strict:.1f})" if strict is not None else "")


def _factor(name: str) -> int:
    return 100 if name in _SHARES else 1
