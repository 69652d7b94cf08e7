"""What a run of `meteora evaluate` leaves in its folder: table.md, table.json and pictures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meteora_jax.evaluation import charts
from meteora_jax.evaluation.problems import Problem
from meteora_jax.evaluation.systems import System
from meteora_jax.evaluation.table import Table, markdown, mean_shares, retrieval_markdown, scoring_of, tabulate
from meteora_jax.io.files import write_json
from meteora_jax.retriever.evaluation import KS, MOST_DRAWN, Query, judge, write_heat_map
from meteora_jax.retriever.index import Index


@dataclass(frozen=True)
class Report:
    """The table, its text as Markdown, and remarks on what could not be drawn."""

    table: Table
    text: str
    remarks: tuple[str, ...] = ()


def write_report(
    out: Path,
    problems: Sequence[Problem],
    systems: Sequence[System],
    answers: Mapping[tuple[str, str], str],
    skipped: Collection[tuple[str, str]],
    index: Index | None,
) -> Report:
    """Writes table.md, table.json (both scorings), bars.png and radar.png, with an index k.png and the similarity map.

    Args:
        answers: by (system, problem id). skipped: the (system, row) that were not asked.
    """
    names, scoring = [s.name for s in systems], scoring_of(problems)
    table = tabulate(problems, names, answers, skipped)
    text, remarks = markdown(table, names, scoring), ()
    if index is not None:
        remarks = write_similarities(out, problems, index)
        table["retrieval"] = found = write_retrieval(out, problems, systems, table, index)
        text += "\n" + retrieval_markdown(found) if found else ""
    (out / "table.md").write_text(text, encoding="utf-8")
    write_json(out / "table.json", table)
    charts.write_bars(table, names, out / "bars.png", scoring)
    charts.write_radar(table, names, out / "radar.png", scoring)
    return Report(table, text, remarks)


def own_queries(problems: Sequence[Problem], index: Index) -> list[Query]:
    """The problems of one task each whose own adapter the index knows."""
    single = [(p, p.own_tasks[0]) for p in problems if not p.tasks]
    return [Query(p.request, task, p.cluster) for p, task in single if task in index.names]


def write_similarities(out: Path, problems: Sequence[Problem], index: Index) -> tuple[str, ...]:
    """Writes similarity.png and similarity.html, of all adapters by cluster; a remark where there are too many."""
    if len(index.names) > MOST_DRAWN:
        return (f"similarity.png: not drawn, {len(index.names)} adapters are more than {MOST_DRAWN}",)
    write_heat_map(index, own_queries(problems, index), out)
    return ()


def write_retrieval(
    out: Path, problems: Sequence[Problem], systems: Sequence[System], table: Table, index: Index
) -> dict[str, Any]:
    """What the index finds for the problems whose own adapter it knows, and in k.png the answers' accuracy against k.

    Returns:
        as `retriever.evaluation.judge`; nothing if no problem's own adapter is in the index.
    """
    queries = own_queries(problems, index)
    if not queries or len(index.names) < 2:
        return {}
    curve = judge(index, queries, range(1, min(len(index.names), 20) + 1))
    means = mean_shares(table, scoring_of(problems))
    answered: dict[str, dict[int, float]] = {}
    for system in sorted(systems, key=lambda s: s.retrieves or 0):
        if system.retrieves is not None and system.name in means:
            answered.setdefault(system.kind, {})[system.retrieves] = 100 * means[system.name]
    panels = {
        "own adapter among the first k": {"own adapter": curve["iid"], "own hidden: one of its cluster": curve["ood"]},
        "mean accuracy of the answers": {kind: ks for kind, ks in answered.items() if len(ks) > 1},
    }
    panels = {title: {line: v for line, v in lines.items() if v} for title, lines in panels.items()}
    charts.write_against_k(panels, out / "k.png")
    return judge(index, queries, KS) | {"counts": query_counts(queries)}


def query_counts(queries: Sequence[Query]) -> dict[str, Any]:
    """The queries that each figure of `judge` is of: iid, ood (those whose cluster has another adapter), by adapter and
    by cluster."""
    kin: dict[str, set[str]] = {}
    for q in queries:
        kin.setdefault(q.cluster, set()).add(q.adapter)
    return {
        "iid": len(queries),
        "ood": sum(bool(q.cluster) and len(kin[q.cluster]) > 1 for q in queries),
        "adapters": Counter(q.adapter for q in queries),
        "clusters": Counter(q.cluster for q in queries),
    }
