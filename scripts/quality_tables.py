"""The tables of `quality.py`: a record of every figure that was judged, and what people read."""

from __future__ import annotations

import json
import shlex
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from meteora_jax.evaluation.table import retrieval_markdown

if TYPE_CHECKING:
    from quality import Quality

BASELINES = ("lora-f", "lora-b")  # one LoRA on all data as it comes; on a balanced mixture
SHARES = ("accuracy", "exact_match", "rouge1", "rouge2", "rougeL")  # from 0 to 1 in table.json, percent in records


@dataclass(frozen=True)
class Job:
    """A command; `makes` is there once it is done, `after` names the jobs that it needs, gpus is how many it takes (0:
    it runs on the CPU, beside everything else)."""

    name: str
    arguments: tuple[str, ...]
    makes: Path
    after: tuple[str, ...] = ()
    gpus: int = 1
    shares: bool = False  # its GPU, with others of its kind


def collect(q: Quality, jobs: list[Job], adapters: int) -> list[dict[str, Any]]:
    """A record for every figure of every evaluation that is there; of a system that two of them judged on a row, the
    first one's."""
    records, known = [], set()
    for job in jobs:
        if job.arguments[0] != "evaluate" or not job.makes.is_file():
            continue
        option = dict(zip(job.arguments, job.arguments[1:], strict=False))
        gates, warm = Path(option.get("--gates", "gates")).name, option.get("--composite-temperature", "1")
        common = {
            "split": "test", "base": q.base.name, "adapters": adapters, "device": q.device,
            "date": time.strftime("%Y-%m-%d", time.gmtime(job.makes.stat().st_mtime)),
            "command": shlex.join(["meteora", *job.arguments]),
        }  # fmt: skip
        for task, cells in json.loads(job.makes.read_text(encoding="utf-8"))["tasks"].items():
            for system, cell in cells.items():
                named = system.replace("gates", gates, 1) if system.startswith("gates-") else system
                named += f" at temperature {warm}" if warm != "1" else ""
                if (named, task) in known:
                    continue
                known.add((named, task))
                for metric, value in cell.items():
                    if isinstance(value, int | float) and metric != "problems":
                        value = round(100 * value, 2) if metric in SHARES else value
                        record = {"system": named, "task": task, "metric": metric, "value": value}
                        records.append({**record, "n": cell["problems"], **common})
    return records


def tell(q: Quality, jobs: list[Job], records: list[dict[str, Any]]) -> None:
    """Writes records.json, and table.md: each system's means and composites, every task, what the index found."""
    (q.out / "records.json").write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
    tables = [means_table(records), tasks_table(records)]
    for job in jobs:
        if job.name == "evaluate retrieval" and job.makes.is_file():
            found = json.loads(job.makes.read_text(encoding="utf-8")).get("retrieval")
            tables.append(retrieval_markdown(found) if found else "")
    (q.out / "table.md").write_text("\n".join(t for t in tables if t), encoding="utf-8")


def means_table(records: list[dict[str, Any]]) -> str:
    """Each system's mean accuracy over the tasks that have one, and its composite problems."""
    accuracies: dict[str, list[float]] = {}
    composites: dict[str, dict[str, str]] = {}
    for r in records:
        if r["metric"] == "accuracy":
            accuracies.setdefault(r["system"], []).append(r["value"])
        if r["metric"] in ("attempted", "correct"):
            composites.setdefault(r["system"], {})[f"{r['task']}, {r['metric']}"] = f"{r['value']:g}"
    columns = sorted({c for row in composites.values() for c in row})
    lines = [
        "| system | " + " | ".join(["tasks", "mean accuracy", *columns]) + " |",
        "| --- " * (len(columns) + 3) + "|",
    ]
    for system in dict.fromkeys([*accuracies, *composites]):
        own, row = accuracies.get(system), composites.get(system, {})
        mean = [str(len(own)), f"{sum(own) / len(own):.1f}"] if own else ["", ""]
        lines.append("| " + " | ".join([system, *mean, *(row.get(c, "") for c in columns)]) + " |")
    return "\n".join(lines) + "\n"


def tasks_table(records: list[dict[str, Any]]) -> str:
    """Every task by base, oracle, gates and baselines: its accuracy, or ROUGE-L where it has none; and the means."""
    cells: dict[str, dict[tuple[str, str], dict[str, Any]]] = {}
    for r in records:
        cells.setdefault(r["task"], {})[r["system"], r["metric"]] = r
    wanted = ("base", "oracle", "gates-top1", "gates-top2")
    present = list(dict.fromkeys(r["system"] for r in records))
    systems = [*(s for s in wanted if s in present), *(s for s in present if s.startswith(BASELINES))]
    lines = ["| task | problems | " + " | ".join(systems) + " |", "| --- " * (len(systems) + 2) + "|"]
    sums: dict[str, list[float]] = {}
    for task, row in cells.items():
        metric = next((m for m in ("accuracy", "rougeL") if any((s, m) in row for s in systems)), None)
        if metric is None or any(m == "attempted" for _, m in row):  # composites have columns in the other table
            continue
        found = {s: row[s, metric] for s in systems if (s, metric) in row}
        if metric == "accuracy":
            for s, r in found.items():
                sums.setdefault(s, []).append(r["value"])
        label = task if metric == "accuracy" else f"{task}, ROUGE-L"
        texts = [f"{found[s]['value']:.1f}" if s in found else "" for s in systems]
        lines.append(f"| {label} | {next(iter(found.values()))['n']} | " + " | ".join(texts) + " |")
    means = [f"{sum(sums[s]) / len(sums[s]):.1f}" if s in sums else "" for s in systems]
    lines.append("| mean accuracy | | " + " | ".join(means) + " |")
    return "\n".join(lines) + "\n" if systems else ""
