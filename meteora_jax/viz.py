"""Pictures of routing: coloured tokens in the terminal, a standalone HTML page, a PNG heat map.

Each picture reads one `RoutingTrace` and nothing else; `routing.page` makes the page. Token text comes from a model
and is not trusted: control characters are shown as pictures.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
from typing import Any

import numpy as np
from rich.console import Console
from rich.rule import Rule
from rich.style import Style
from rich.table import Table
from rich.text import Text

from meteora_jax.config import InputError
from meteora_jax.io.files import whole_file
from meteora_jax.routing import NO_ADAPTER, RoutingTrace, weight_share
from meteora_jax.routing.page import (
    colours_for,
    dominant,
    has_idle_places,
    has_one_choice,
    leading,
    page_of,
    palette,
    visible,
)
from meteora_jax.routing.picture import BASE_LABEL, base_leads, draw_text, drawable, number_runs


def _led(trace: RoutingTrace, leaders: np.ndarray) -> dict[str, np.ndarray]:
    """{part: float [A]}: the fraction of the prompt's and of the response's tokens that each adapter leads."""
    if leaders[-1] == NO_ADAPTER:  # the last token generated is never fed back: nothing could route it
        leaders = leaders[:-1]
    parts = {"prompt": leaders[: trace.prompt_length], "response": leaders[trace.prompt_length :]}
    size = len(trace.adapter_names)
    return {
        name: np.bincount(part[part != NO_ADAPTER], minlength=size) / max(len(part), 1) for name, part in parts.items()
    }


# Terminal


def to_terminal(trace: RoutingTrace, console: Console) -> None:
    """Prints prompt (pale) and response (strong), each token in its dominant adapter's colour, and a legend.

    A console of fewer than 256 colours gets a letter for each adapter, in brackets where the adapter changes.
    """
    in_colour = not console.no_color and console.color_system in ("256", "truecolor")
    leaders = dominant(trace)
    n = trace.prompt_length
    for name, part, strength in (("prompt", slice(0, n), 0.45), ("response", slice(n, None), 1.0)):
        painted = ([visible(token) for token in trace.tokens[part]], leaders[part])
        text = _coloured_text(*painted, strength) if in_colour else _lettered_text(*painted)
        console.print(Rule(name, align="left", style="dim"))
        # In a file the text keeps its own line breaks; on a screen it breaks between words.
        console.print(text, soft_wrap=not console.is_terminal)
    console.print(Rule("adapters, by the tokens they lead", align="left", style="dim"))
    console.print(_legend(trace, leaders, in_colour))


def _coloured_text(tokens: list[str], leaders: np.ndarray, strength: float) -> Text:
    """Tokens on their leaders' colours, mixed with white down to `strength`."""
    bold = strength == 1
    styles = [Style(color="#000000", bgcolor=_pale(c, strength), bold=bold) for c in colours_for(leaders)]
    text = Text()
    for token, leader in zip(tokens, leaders, strict=True):
        text.append(token, "" if leader == NO_ADAPTER else styles[leader])
    return text


def _lettered_text(tokens: list[str], leaders: np.ndarray) -> Text:
    text = Text()
    for leader, run in itertools.groupby(zip(leaders, tokens, strict=True), key=lambda pair: int(pair[0])):
        text.append(f"⟦{_letter(leader)}⟧" + "".join(token for _, token in run))
    return text


def _legend(trace: RoutingTrace, leaders: np.ndarray, in_colour: bool) -> Table:
    """One row for each adapter that leads any token: its mark, name, and fraction of prompt and response."""
    led = _led(trace, leaders)
    table = Table(box=None, padding=(0, 1), header_style="dim")
    table.add_column("")
    table.add_column("adapter")
    for part in led:
        table.add_column(part, justify="right")
    partial = has_idle_places(trace)
    if partial:
        table.add_column("has weights in")
    colours = palette(len(trace.adapter_names))
    leading = [a for a in range(len(colours)) if any(fractions[a] for fractions in led.values())]
    for a in leading:
        mark = Text("  ", Style(bgcolor=colours[a])) if in_colour else Text(_letter(a))
        cells = [_percent(float(f[a])) for f in led.values()]
        if partial and trace.adapted is not None:
            cells.append(f"{int(trace.adapted[..., a].sum())} of {trace.adapted[..., a].size} projections")
        table.add_row(mark, Text(visible(trace.adapter_names[a])), *cells)
    others = len(colours) - len(leading)
    if others:
        table.add_row("", Text(f"leading no token: {others}", "dim"))
    return table


def _letter(adapter: int) -> str:
    """A, B, ... Z, AA, AB, ... as spreadsheets count; - for no adapter."""
    if adapter == NO_ADAPTER:
        return "-"
    first, last = divmod(adapter, 26)
    return (_letter(first - 1) if first else "") + chr(ord("A") + last)


def _pale(colour: str, strength: float) -> str:
    """`colour` at `strength` over white, both "#rrggbb"."""
    return "#" + bytes(round(c * strength + 255 * (1 - strength)) for c in bytes.fromhex(colour[1:])).hex()


def _percent(fraction: float) -> str:
    return "<1%" if 0 < fraction < 0.005 else f"{fraction:.0%}"


# HTML


def write_html(trace: RoutingTrace, path: str | os.PathLike[str], title: str) -> None:
    """Writes `page_of` a trace.

    Raises:
        InputError: the file cannot be written.
    """
    with whole_file(path) as partial:  # lone surrogates have no UTF-8
        partial.write_text(page_of(trace, title), encoding="utf-8", errors="replace")


# PNG

_IDLE_LABEL = "chosen, no weights there"
_MANY_ROWS = 420  # above this a row is a layer, not a projection of a layer
_IDLE = 184 / 255  # grey of a cell whose chosen adapters have no weights there
_MANY_TOKENS = 80  # above this the axis shows positions, not token text


def write_png(trace: RoutingTrace, path: str | os.PathLike[str], title: str) -> None:
    """Draws the routing map: a column for each token, a row for each layer of each projection. Where each token has one
    choice for all of them, one row, and the text below it in its adapters' colours.

    Colour is the cell's strongest adapter and opacity its weight, of those that have weights there; a cell is grey
    where only others were chosen. The strip on top has the whole model's dominant adapters. Above 420 rows all
    projections of a layer share a row.

    Raises:
        InputError: matplotlib is not installed, or the file cannot be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise InputError(f"{path}: needs matplotlib, found none: pip install 'meteora-jax[eval]'") from None
    if has_one_choice(trace):
        figure = Figure(dpi=150)
        FigureCanvasAgg(figure)
        draw_text(figure, trace, drawable(title))
        with whole_file(path) as partial:
            figure.savefig(partial, format="png", facecolor="white")
        return
    num_tokens, num_layers, num_projections, _ = trace.indices.shape
    by_layer = num_layers * num_projections > _MANY_ROWS
    acting = dataclasses.replace(trace, indices=trace.acting())
    adapters, strengths = _layer_rows(acting) if by_layer else _projection_rows(acting)
    picture = _rgba(adapters, strengths)
    chosen = (_layer_rows(trace) if by_layer else _projection_rows(trace))[0]
    picture[(adapters == NO_ADAPTER) & (chosen != NO_ADAPTER)] = (_IDLE, _IDLE, _IDLE, 1)
    bands = ("all projections",) if by_layer else trace.projections

    width = float(np.clip(3 + 0.19 * num_tokens, 8, 18))
    height = float(np.clip(0.028 * len(adapters), 2.4, 9))
    columns = _legend_columns(trace, width)
    margins = 1.85 if num_tokens <= _MANY_TOKENS else 1.35
    legend_height = 0.2 + 0.28 * math.ceil((len(trace.adapter_names) + len(_beside_adapters(trace))) / columns)
    figure = Figure(figsize=(width, margins + height + legend_height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    strip, cells = figure.subplots(2, sharex=True, height_ratios=(0.2, height), gridspec_kw={"hspace": 0.02})
    leaders = dominant(trace)[None]
    strip.imshow(_rgba(leaders, np.ones(leaders.shape)), aspect="auto", interpolation="nearest")
    cells.imshow(picture, aspect="auto", interpolation="nearest")
    strip.set_yticks([0], ["whole model"])
    number_runs(strip, leaders[0], width / max(num_tokens, 1), 0.0, first=-0.5)
    _label_rows(cells, bands, num_layers)
    _label_tokens(cells, trace)
    for axes in (strip, cells):
        axes.set_facecolor("0.95")
        axes.axvline(trace.prompt_length - 0.5, color="black", linewidth=1.2)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    _mark_response(strip, trace.prompt_length)
    _draw_legend(figure, trace, columns)
    figure.suptitle(drawable(title), x=0.01, ha="left", fontsize=12, parse_math=False)
    with whole_file(path) as partial:
        figure.savefig(partial, format="png", facecolor="white")


def _projection_rows(trace: RoutingTrace) -> tuple[np.ndarray, np.ndarray]:
    """The strongest adapter and its weight [P * L, T] of each cell, the layers of one projection together."""
    strength = np.where(trace.indices == NO_ADAPTER, 0, np.abs(trace.weights))
    best = strength.argmax(axis=-1)[..., None]
    cells = (np.take_along_axis(values, best, axis=-1)[..., 0] for values in (trace.indices, strength))
    adapters, weights = (values.transpose(2, 1, 0).reshape(-1, len(values)) for values in cells)
    return adapters, weights / max(weights.max(initial=0), 1)


def _layer_rows(trace: RoutingTrace) -> tuple[np.ndarray, np.ndarray]:
    """The adapter that leads a layer over its projections, and its share: [L, T] each."""
    num_tokens, num_layers = trace.indices.shape[:2]
    rows, shape = num_tokens * num_layers, (num_tokens, num_layers)
    share = weight_share(trace.indices.reshape(rows, -1), trace.weights.reshape(rows, -1), len(trace.adapter_names))
    return leading(share).reshape(shape).T, share.max(axis=1, initial=0).reshape(shape).T


def _rgba(adapters: np.ndarray, strengths: np.ndarray) -> np.ndarray:
    """float [..., 4]: the adapter's colour, as opaque as it is strong; nothing where there is none."""
    colours = [list(bytes.fromhex(c[1:])) for c in colours_for(adapters)]
    rgb = np.array(colours)[np.maximum(adapters, 0)] / 255
    return np.concatenate([rgb, np.where(adapters == NO_ADAPTER, 0, strengths)[..., None]], axis=-1)


def _label_rows(axes: Any, bands: tuple[str, ...], num_layers: int) -> None:
    """Names each band of layers, rules between them, and numbers its layers on the right."""
    starts = np.arange(len(bands)) * num_layers
    axes.set_yticks(starts + (num_layers - 1) / 2, bands)
    for start in starts[1:]:
        axes.axhline(start - 0.5, color="white", linewidth=2.5)
    numbers = axes.secondary_yaxis("right")
    step = math.ceil(num_layers / (2 if len(bands) > 1 else 8))
    ticks = [(start + layer, str(layer)) for start in starts for layer in range(0, num_layers, step)]
    numbers.set_yticks([at for at, _ in ticks], [text for _, text in ticks], fontsize=6, color="0.4")
    numbers.set_ylabel("layer", fontsize=8)
    numbers.tick_params(length=0)
    numbers.spines[:].set_visible(False)


def _mark_response(axes: Any, prompt_length: int) -> None:
    """Says above the border that the response begins there."""
    border = (prompt_length - 0.5, 1)
    axes.annotate("response →", border, (4, 3), ("data", "axes fraction"), "offset points", fontsize=8)


def _label_tokens(axes: Any, trace: RoutingTrace) -> None:
    if len(trace.tokens) > _MANY_TOKENS:
        axes.set_xlabel("token")
        return
    shown = [drawable(token.replace("\n", "↵").replace("\t", " ")) for token in trace.tokens]
    labels = [text if len(text) <= 14 else text[:13] + "…" for text in shown]
    axes.set_xticks(range(len(labels)), labels, rotation=90, fontsize=8, parse_math=False)


def _beside_adapters(trace: RoutingTrace) -> dict[str, str]:
    """What the legend explains beside the adapters, with its colour: places without weights, tokens of the base."""
    found = {_IDLE_LABEL: str(_IDLE)} if has_idle_places(trace) else {}
    return found | ({BASE_LABEL: "white"} if base_leads(trace) else {})


def _legend_columns(trace: RoutingTrace, width: float) -> int:
    """How many entries of the longest name fit into `width` inches at 8 points."""
    longest = max(map(len, (*trace.adapter_names, *_beside_adapters(trace))), default=1) + 3
    return max(int(width / (0.45 + 0.075 * longest)), 1)


def _draw_legend(figure: Any, trace: RoutingTrace, columns: int) -> None:
    from matplotlib.patches import Patch

    names = [f"{i} {drawable(name)}" for i, name in enumerate(trace.adapter_names, start=1)]
    patches = [Patch(color=c, label=name) for c, name in zip(palette(len(names)), names, strict=True)]
    for label, colour in _beside_adapters(trace).items():
        patches.append(Patch(facecolor=colour, edgecolor=str(_IDLE), label=label))
    legend = figure.legend(handles=patches, loc="outside lower left", ncols=columns, frameon=False, fontsize=8)
    for text in legend.get_texts():
        text.set_parse_math(False)
