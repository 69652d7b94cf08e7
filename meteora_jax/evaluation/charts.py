"""Pictures of an evaluation's table: bars a task, and a radar of all tasks."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from meteora_jax.config import InputError
from meteora_jax.evaluation.table import Scoring, Table, shown
from meteora_jax.io.files import whole_file
from meteora_jax.routing.page import palette
from meteora_jax.routing.picture import drawable


def accuracies(table: Table, systems: Sequence[str], scoring: Scoring = "meteora") -> dict[str, list[float]]:
    """{row: share of right answers of each system, in percent, NaN where it was not asked}.

    Of a composite row it is the share of correct answers among the graded sub-questions; rows that are scored by
    BLEU or ROUGE alone are left out.
    """

    def share(cell: Mapping[str, Any] | None) -> float:
        cell = shown(cell, scoring) if cell is not None else {}
        if cell.get("graded"):
            return 100 * cell["correct"] / cell["graded"]
        right = cell.get("accuracy", cell.get("exact_match"))
        return math.nan if right is None else 100 * right

    rows = {row: [share(cells.get(s)) for s in systems] for row, cells in table["tasks"].items()}
    return {row: shares for row, shares in rows.items() if not all(map(math.isnan, shares))}


def write_bars(table: Table, systems: Sequence[str], path: Path, scoring: Scoring = "meteora") -> None:
    """A group of horizontal bars a row."""

    def draw(figure: Any) -> None:
        shares = accuracies(table, systems, scoring)
        figure.set_size_inches(9, 1.2 + 0.22 * len(shares) * (len(systems) + 1))
        axes = figure.add_subplot()
        height = 0.85 / len(systems)
        for i, system in enumerate(systems):
            places = [row + i * height for row in range(len(shares))]
            axes.barh(
                places,
                [values[i] for values in shares.values()],
                height=0.9 * height,
                label=drawable(system),
                color=palette(i + 1)[i],
            )
        axes.set_yticks([row + 0.425 - height / 2 for row in range(len(shares))], [drawable(row) for row in shares])
        axes.invert_yaxis()
        axes.set(xlim=(0, 100), xlabel="accuracy, %")
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(y=0.01)
        axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1.0), ncols=3, fontsize=8)  # above the bars

    save_picture(draw, path)


def write_radar(table: Table, systems: Sequence[str], path: Path, scoring: Scoring = "meteora") -> None:
    """A polygon a system over all rows; with fewer than three rows there is none to draw, and an earlier one goes."""
    shares = accuracies(table, systems, scoring)
    if len(shares) < 3:
        path.unlink(missing_ok=True)
        return

    def draw(figure: Any) -> None:
        figure.set_size_inches(9, 8)
        axes = figure.add_subplot(projection="polar")
        angles = [2 * math.pi * i / len(shares) for i in range(len(shares))]
        for i, system in enumerate(systems):
            values = [v[i] for v in shares.values()]
            colour = palette(i + 1)[i]
            style = ("-", "--", ":", "-.")[i % 4]  # lines are told apart without their colours, too
            axes.plot([*angles, angles[0]], [*values, values[0]], style, label=drawable(system), color=colour)
            axes.fill(angles, values, alpha=0.06, color=colour)
        axes.set_xticks(angles, [drawable(row) for row in shares], fontsize=8)
        for angle, label in zip(angles, axes.get_xticklabels(), strict=True):  # outwards, not over the circle
            side = math.cos(angle)
            label.set_horizontalalignment("left" if side > 0.1 else "right" if side < -0.1 else "center")
        axes.set_ylim(0, 100)
        axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.25, 1.1))

    save_picture(draw, path)


def write_against_k(panels: Mapping[str, Mapping[str, Mapping[int, float]]], path: Path) -> None:
    """Per cent against the number of retrieved adapters: {panel: {line: {k: %}}}; empty panels are left out."""
    panels = {title: lines for title, lines in panels.items() if lines}

    def draw(figure: Any) -> None:
        figure.set_size_inches(5.5 * len(panels), 4.2)
        for axes, (title, lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
            for i, (label, values) in enumerate(lines.items()):
                how: dict[str, Any] = dict(marker="osD^v"[i % 5], markersize=4, color=palette(i + 1)[i])
                axes.plot(list(values), list(values.values()), label=drawable(label), **how)
            ks = sorted({k for values in lines.values() for k in values})
            if len(ks) <= 12:
                axes.set_xticks(ks)
            axes.set(title=title, xlabel="k, retrieved adapters", ylabel="%", ylim=(0, 102))
            axes.spines[["top", "right"]].set_visible(False)
            axes.legend(frameon=False, fontsize=8)

    save_picture(draw, path)


def save_picture(draw: Callable[[Any], None], path: Path) -> None:
    """Draws on a new figure and writes it as PNG, whole or not at all; a $ in a text is a character like others."""
    try:
        from matplotlib import rc_context
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError(f"{path}: expected matplotlib to draw it, found none: install meteora-jax[eval]") from None
    figure = Figure(dpi=130)
    FigureCanvasAgg(figure)
    with rc_context({"text.parse_math": False}), whole_file(path) as partial:
        draw(figure)
        figure.savefig(partial, format="png", bbox_inches="tight")
