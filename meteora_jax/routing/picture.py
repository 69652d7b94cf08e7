"""A request's text with the adapters that acted on it, drawn by matplotlib: a row of choices, and below it the tokens.

For routers that choose once a token. Adapters have numbers, so that nobody needs to tell colours apart.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from meteora_jax.routing import NO_ADAPTER, RoutingTrace, adapter_share, null_share
from meteora_jax.routing.page import leading, palette, visible

BASE_LABEL = "no adapter"

WIDTH = 9.5  # inches
FONT = 9  # points
CHARACTER = 0.602 * FONT / 72  # inches that a character of DejaVu Sans Mono takes
LINE = 0.27  # inches: a number, the text, the underline
MARGIN = 0.18
COLUMNS = int((WIDTH - 2 * MARGIN) / CHARACTER)


class Piece(NamedTuple):
    """A token's text, or what of it fits into a line, and where it begins."""

    line: int
    column: int
    text: str
    token: int


def draw_text(figure: Any, trace: RoutingTrace, title: str) -> None:
    """Draws the row of choices, prompt and response, and a legend; sets the figure's size."""
    share = adapter_share(trace)
    acting = [int(a) for a in np.argsort(-share.sum(axis=0), kind="stable") if share[:, a].any()]
    n = trace.prompt_length
    parts = [
        (name, list(_laid_out(trace, r))) for name, r in (("prompt", range(n)), ("response", range(n, len(share))))
    ]
    lines = [1 + max((piece.line for piece in pieces), default=0) for _, pieces in parts]
    legend = _legend_rows(trace, acting)
    row, heading = 0.34, 0.26
    heights = [0.34, row, 0.3, *(h for count in lines for h in (heading, count * LINE)), 0.12, legend * 0.2 + 0.12]
    total = sum(heights) + MARGIN
    figure.set_size_inches(WIDTH, total)
    tops = np.cumsum([0.0, *heights])

    def axes_at(top: float, height: float) -> Any:
        axes = figure.add_axes((MARGIN / WIDTH, 1 - (top + height) / total, 1 - 2 * MARGIN / WIDTH, height / total))
        axes.set_axis_off()
        return axes

    figure.text(MARGIN / WIDTH, 1 - 0.24 / total, title, fontsize=12, parse_math=False)
    _draw_row(axes_at(tops[1], row), trace, share)
    for i, (name, pieces) in enumerate(parts):
        top = tops[3 + 2 * i]
        figure.text(MARGIN / WIDTH, 1 - (top + 0.19) / total, name, fontsize=8, color="0.4")
        axes = axes_at(top + heading, lines[i] * LINE)
        axes.set(xlim=(0, (WIDTH - 2 * MARGIN) / CHARACTER), ylim=(lines[i], 0))
        _draw_tokens(axes, pieces, trace, share)
    draw_legend(figure, trace, acting, _legend_columns(trace, acting), MARGIN / WIDTH, 1 - tops[-2] / total)


def _laid_out(trace: RoutingTrace, tokens: range) -> Iterator[Piece]:
    """Tokens one after another in lines of COLUMNS characters; a line ends where the text's own does."""
    line = column = 0
    for t in tokens:
        for part in drawable(trace.tokens[t].replace("\t", " ")).replace("\n", "↵\n").splitlines(keepends=True):
            text = part.removesuffix("\n")
            while text:
                room = COLUMNS - column
                if len(text) > room and (room < 4 or len(text) <= COLUMNS):
                    line, column = line + 1, 0
                    continue
                yield Piece(line, column, text[:room], t)
                column, text = column + len(text[:room]), text[room:]
            if part.endswith("\n"):
                line, column = line + 1, 0


def _draw_row(axes: Any, trace: RoutingTrace, share: np.ndarray) -> None:
    """A bar for each token, divided among its adapters by their shares, with positions below."""
    colours, starts = palette(share.shape[1]), np.arange(len(share))
    bottom = np.zeros(len(share))
    for place in range(min(share.shape[1], trace.indices.shape[3])):
        ranked = np.argsort(-share, axis=1, kind="stable")[:, place]
        heights = share[starts, ranked]
        axes.bar(starts, heights, 1.0, bottom, color=[colours[a] for a in ranked], align="edge", linewidth=0)
        bottom += heights
    axes.set(xlim=(0, max(len(share), 1)), ylim=(1, 0))
    number_runs(axes, leading(share), (WIDTH - 2 * MARGIN) / max(len(share), 1), 0.5)
    axes.axvline(trace.prompt_length, color="black", linewidth=1.2)
    step = next((s for s in (5, 10, 20, 50, 100, 200, 500) if len(share) / s <= 16), 1000)
    for at in range(0, len(share), step):
        axes.text(at, 1.12, str(at), fontsize=7, color="0.4", va="top", ha="left")
    axes.text(trace.prompt_length, -0.08, " response →", fontsize=7, color="0.2", va="bottom")


def number_runs(axes: Any, leaders: np.ndarray, inches: float, y: float, first: float = 0.0) -> None:
    """Writes each adapter's number into its runs of tokens that are wide enough. inches: of a token. first: where the
    first begins."""
    at = first
    for leader, run in itertools.groupby(leaders.tolist()):
        length = len(list(run))
        if leader != NO_ADAPTER and length * inches > 0.09 * len(str(leader + 1)):
            axes.text(at + length / 2, y, str(leader + 1), fontsize=7, ha="center", va="center")
        at += length


def _draw_tokens(axes: Any, pieces: list[Piece], trace: RoutingTrace, share: np.ndarray) -> None:
    """Text on its leader's colour, as strong as the leader's share; all shares below; above, where an adapter begins,
    its number."""
    colours, leaders = palette(share.shape[1]), leading(share)
    before, free = NO_ADAPTER, (0, 0.0)
    for line, group in itertools.groupby(pieces, key=lambda piece: piece.line):
        backs, backs_colours, unders, under_colours = [], [], [], []
        for piece in group:
            leader, width = int(leaders[piece.token]), len(piece.text)
            axes.text(piece.column, line + 0.8, piece.text, fontsize=FONT, family="DejaVu Sans Mono", parse_math=False)
            if leader != NO_ADAPTER:
                backs.append((piece.column, width))
                backs_colours.append((colours[leader], 0.15 + 0.35 * float(share[piece.token, leader])))
                at = float(piece.column)
                for a in np.argsort(-share[piece.token], kind="stable"):
                    if not share[piece.token, a]:
                        break
                    unders.append((at, width * float(share[piece.token, a])))
                    under_colours.append(colours[a])
                    at += width * float(share[piece.token, a])
            begins = leader != before or piece.column == 0
            if begins and leader != NO_ADAPTER and (line, piece.column) >= free:
                axes.text(piece.column, line + 0.27, str(leader + 1), fontsize=5.5, color="0.25")
                free = line, piece.column + 1 + len(str(leader + 1))
            before = leader
        axes.broken_barh(backs, (line + 0.28, 0.66), facecolors=backs_colours, linewidth=0)
        axes.broken_barh(unders, (line + 0.88, 0.1), facecolors=under_colours, linewidth=0)


def _legend_columns(trace: RoutingTrace, acting: list[int]) -> int:
    longest = max((len(trace.adapter_names[a]) for a in acting), default=1) + 3
    return max(int((WIDTH - MARGIN) / (0.42 + 0.072 * longest)), 1)


def _legend_rows(trace: RoutingTrace, acting: list[int]) -> int:
    return math.ceil((len(acting) + 1 + base_leads(trace)) / _legend_columns(trace, acting))


def base_leads(trace: RoutingTrace) -> bool:
    """Whether the null choice has most of any token, which then has no colour."""
    return bool((null_share(trace) > 0.5).any())


def draw_legend(figure: Any, trace: RoutingTrace, acting: list[int], columns: int, x: float, top: float) -> None:
    """The adapters that act, with their numbers, and how many do not."""
    from matplotlib.patches import Patch

    colours = palette(len(trace.adapter_names))
    patches = [Patch(color=colours[a], label=f"{a + 1} {drawable(trace.adapter_names[a])}") for a in acting]
    if base_leads(trace):
        patches.append(Patch(facecolor="white", edgecolor="0.7", label=BASE_LABEL))
    if others := len(trace.adapter_names) - len(acting):
        patches.append(Patch(alpha=0, label=f"{others} more act nowhere"))
    place: dict[str, Any] = dict(loc="upper left", bbox_to_anchor=(x, top), borderaxespad=0, borderpad=0)
    legend = figure.legend(handles=patches, ncols=columns, frameon=False, fontsize=8, handlelength=1.2, **place)
    for text in legend.get_texts():
        text.set_parse_math(False)


def drawable(text: str) -> str:
    """`text` with characters that matplotlib's own fonts lack as �; they would be boxes and warnings."""
    known = _known_characters()
    return "".join(c if ord(c) in known or c == "\n" else "\ufffd" for c in visible(text))


@functools.cache
def _known_characters() -> frozenset[int]:
    from matplotlib.font_manager import FontProperties, findfont, get_font

    kinds = ("DejaVu Sans", "DejaVu Sans Mono")
    return frozenset.intersection(
        *(frozenset(get_font(findfont(FontProperties(family=k))).get_charmap()) for k in kinds)
    )
