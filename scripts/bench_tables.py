"""What `bench.py` shows of its records: a table, the fastest of each shape, a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

LABELS = ("what", "model", "setting", "group", "implementation")


def show(records: list[dict[str, Any]], console: Console) -> None:
    """The records as a table, and the fastest implementation of every shape."""
    table = Table("what", "shape", "tokens", "A x R", "ms", "bare", "ratio", "GB/s", "TFLOP/s", "roofline")
    for r in records:
        what = " ".join([*(str(r[k]) for k in LABELS if k in r), f"k={r['top_k']}"])
        numbers = (f"{r['ms']:.4g}", f"{r['ms_bare']:.4g}", f"{r['ratio']:.3f}", f"{r['gb_per_s']:.0f}",
                   f"{r['tflop_per_s']:.2f}", f"{r['roofline']:.0%}")  # fmt: skip
        table.add_row(what, r["shape"], f"{r['batch']}x{r['sequence']}", f"{r['adapters']}x{r['rank']}", *numbers)
    console.print(table)
    shape = ("batch", "sequence", "adapters", "rank", "top_k")
    for (group, *rest), rows in together([r for r in records if r["what"] == "kernel"], ("group", *shape)):
        best = sorted(rows, key=lambda r: r["ms"])[:3]
        ranking = ", ".join(f"{r['implementation']} {r['ratio']:.3f}" for r in best)
        console.print(f"fastest for {group} {in_words(*rest)}: {ranking}")
    for (what, *rest), rows in together([r for r in records if r.get("model") == "adapted"], ("what", *shape)):
        best = min(rows, key=lambda r: r["ms"])
        setting = best["setting"]
        console.print(
            f"{what} {in_words(*rest)}: fastest adapted by {setting}, {best['ms']:.4g} ms, "
            f"{best['ratio']:.3f} of the fastest bare",
            markup=False, soft_wrap=True,
        )  # fmt: skip


def together(
    records: list[dict[str, Any]], keys: tuple[str, ...]
) -> list[tuple[tuple[Any, ...], list[dict[str, Any]]]]:
    """The records that agree in `keys`, by what these are."""
    found: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for r in records:
        found.setdefault(tuple(r[k] for k in keys), []).append(r)
    return list(found.items())


def in_words(batch: int, sequence: int, adapters: int, rank: int, top_k: int) -> str:
    return f"{batch}x{sequence}, {adapters} of rank {rank}, top-{top_k}"


def draw(records: list[dict[str, Any]], path: Path) -> None:
    """Time over the bare model's, one bar a record."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1.2 + 0.24 * len(records)), layout="constrained")
    axes = figure.add_subplot()
    labels = [
        f"{' '.join(str(r[k]) for k in LABELS if k in r)} {r['batch']}x{r['sequence']} A={r['adapters']} R={r['rank']}"
        for r in records
    ]
    bars = axes.barh(range(len(records)), [r["ratio"] for r in records], color="#4878a8")
    axes.bar_label(bars, [f" {r['ratio']:.2f}  {r['ms']:.3g} ms" for r in records], fontsize=7)
    axes.set_yticks(range(len(records)), labels, fontsize=7)
    axes.invert_yaxis()
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set(xlabel="time / time of the bare model", title=f"{records[0]['shape']} on {records[0]['device']}")
    axes.margins(x=0.2)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
