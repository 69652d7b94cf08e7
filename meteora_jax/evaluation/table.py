"""The table of an evaluation: what every system scored on every row, as JSON and as Markdown.

A row is a task or a set of composite problems; a system that a row does not suit has no cell there.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Literal

from meteora_jax.evaluation.metrics import (
    ACCURACY,
    loraretriever_metric,
    read_composite,
    score,
    score_composite,
    score_loraretriever,
)
from meteora_jax.evaluation.problems import Problem

Scoring = Literal["meteora", "loraretriever"]
Cell = dict[str, Any]  # a system's scores in one row
Table = dict[str, Any]  # as `tabulate` returns it: what table.json holds

UNDEFINED = "not defined"
NOTE = "Accuracies, BLEU and ROUGE run from 0 to 100; in brackets where an empty answer counts as zero.\n"

_LABELS = {
    "accuracy": "", "exact_match": "", "bleu": ", BLEU", "rouge1": ", ROUGE-1", "rouge2": ", ROUGE-2",
    "rougeL": ", ROUGE-L",
}  # fmt: skip
_SHARES = {"accuracy", "exact_match", "rouge1", "rouge2", "rougeL"}  # from 0 to 1
_MEANS: dict[Scoring, str] = {"meteora": "accuracy", "loraretriever": "exact_match"}


def score_row(problems: Sequence[Problem], answers: Sequence[str]) -> Cell:
    """The scores of one row's answers; `problems` are all of one kind.

    A task has MeteoRA's metrics and under "loraretriever" LoraRetriever's; a query of LoraRetriever's only those.
    Composite problems have `score_composite`'s counts, `asked` sub-questions and `graded` ones, which `correct`
    counts among.
    """
    first, count = problems[0], {"problems": len(problems)}
    targets = [p.response for p in problems]
    if first.tasks:
        parsed = [read_composite(answer, first.parts) for answer in answers]
        graded = len(problems) * sum(task in ACCURACY for task in first.tasks)
        scores = score_composite(first.tasks, parsed, [p.answers for p in problems])
        return {**scores, **count, "asked": len(problems) * first.parts, "graded": graded}
    other = score_loraretriever(first.metric or loraretriever_metric(first.task), answers, targets)
    own = {} if first.metric else score(first.task, answers, targets)
    return {**own, "loraretriever": other, **count}


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
        scoring}.
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
    return {
        "tasks": table,
        "clusters": {c: _cluster([table[row] for row in members]) for c, members in clusters.items() if c},
        **means,
    }


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
    lines = ["| task | problems | " + " | ".join(systems) + " |", "| --- " * (len(systems) + 2) + "|"]
    groups = {**table["tasks"], **{f"cluster {name}": cells for name, cells in table["clusters"].items()}}
    for row, cells in groups.items():
        count = next(iter(cells.values()))["problems"] if cells else 0
        for label, texts in _lines(row, cells, scoring):
            lines.append(f"| {label} | {count} | " + " | ".join(texts.get(s, UNDEFINED) for s in systems) + " |")
    name = _MEANS[scoring]
    if means := mean_shares(table, scoring):
        texts = [f"{100 * means[s]:.1f}" if s in means else UNDEFINED for s in systems]
        lines.append(f"| mean {name.replace('_', ' ')} | | " + " | ".join(texts) + " |")
    return "\n".join(lines) + "\n\n" + NOTE


def retrieval_markdown(found: Mapping[str, Any]) -> str:
    """How often an index finds the own adapter of a problem among the first k, from `retriever.evaluation.judge`."""
    ks = list(found["iid"])
    lines = ["| % found among the first | " + " | ".join(map(str, ks)) + " |", "| --- " * (len(ks) + 1) + "|"]
    rows = {"all": found["iid"], **found["adapters"], **{f"cluster {c}": row for c, row in found["clusters"].items()}}
    if found["ood"]:
        rows["all, own adapter hidden: one of its cluster"] = found["ood"]
    lines += [f"| {label} | " + " | ".join(f"{row[k]:.1f}" for k in ks) + " |" for label, row in rows.items()]
    return "\n".join(lines) + "\n"


def _lines(row: str, cells: Mapping[str, Cell], scoring: Scoring) -> Iterator[tuple[str, dict[str, str]]]:
    """A row's lines: their labels, and each system's text."""
    visible = {s: shown(cell, scoring) for s, cell in cells.items()}
    sample = next(iter(visible.values()), {})
    if "attempted" in sample:
        for name, among in (("attempted", "asked"), ("correct", "graded")):
            yield f"{row}, {name}", {s: f"{v[name]} of {v[among]}" for s, v in visible.items()}
    names = [name for name in _LABELS if name in sample]
    # an accuracy stands for its task alone; what strategyqa has beside it is in the JSON
    for name in names[:1] if names[:1] == ["accuracy"] else names:
        yield row + _LABELS[name], {s: _text(v, name) for s, v in visible.items()}
    if not sample:
        yield row, {}


def _text(scores: Mapping[str, Any], name: str) -> str:
    factor = 100 if name in _SHARES else 1
    strict = scores.get(f"{name}_strict")
    return f"{factor * scores[name]:.1f}" + (f" ({factor * strict:.1f})" if strict is not None else "")
