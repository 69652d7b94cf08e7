"""One request's routing as a standalone page. Token text comes from a model and is not trusted: control characters are
shown as pictures, and whatever goes into the page is escaped.
"""

from __future__ import annotations

import base64
import html
import itertools
import json
import re
from importlib import resources

import numpy as np

from meteora_jax.routing import NO_ADAPTER, RoutingTrace, adapter_share

# Ten picked by hand, then the candidate furthest from all before it (Oklab distance, the least of normal,
# deuteranope and protanope sight). Luminance stays between 0.16 and 0.56: black text reads on every one, and
# every one stands out from a white and from a black page.
_PALETTE = (
    "#4888f0", "#f0a030", "#d84888", "#20c8b8", "#a86028", "#b898f0", "#609838",
    "#f07058", "#1880a0", "#c8c850", "#98c8f0", "#8058d0", "#60a0b8", "#e0a098",
    "#108060", "#b860c8", "#c88098", "#f8a0d0", "#e0c090", "#b85060", "#d07010",
    "#88a070", "#e870d0", "#b8b068", "#c89810", "#98d0b0", "#8890e8", "#5880c0",
)  # fmt: skip


def palette(n: int) -> tuple[str, ...]:
    """`n` colours, "#rrggbb", by adapter index: distinct up to 28, then they repeat; none depends on n."""
    return tuple(itertools.islice(itertools.cycle(_PALETTE), n))


def colours_for(adapters: np.ndarray) -> tuple[str, ...]:
    """Colours enough to index with any of `adapters`, and never none."""
    return palette(int(adapters.max(initial=0)) + 1)


# What a trace says about its tokens


def dominant(trace: RoutingTrace) -> np.ndarray:
    """int32 [T]: the adapter with the largest share, the first of equals; NO_ADAPTER where none acted."""
    return leading(adapter_share(trace))


def leading(share: np.ndarray) -> np.ndarray:
    """int32 [rows]: argmax over adapters and what is left for none of them; a row of zeros has no leader."""
    left = np.where(share.any(axis=1, keepdims=True), 1 - share.sum(axis=1, keepdims=True), 1)
    no_adapter_first = np.concatenate([np.where(left > 1e-6, left, 0), share], axis=1)
    return (no_adapter_first.argmax(axis=1) + NO_ADAPTER).astype(np.int32)


def visible(token: str) -> str:
    """The token with control characters (all but newline and tab) as their pictures: ESC becomes ␛."""

    def picture(match: re.Match[str]) -> str:
        code = ord(match[0])
        return "␡" if code == 0x7F else chr(0x2400 + code) if code < 0x20 else "\ufffd"

    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", picture, token)


def has_idle_places(trace: RoutingTrace) -> bool:
    """Whether any adapter lacks weights somewhere, as far as the trace says."""
    return trace.adapted is not None and not trace.adapted.all()


def has_one_choice(trace: RoutingTrace) -> bool:
    """Whether each token has one choice for all layers and projections, of adapters that have weights in all of them.

    So choose token routers, retrievals and callers.
    """
    same = all((z == z[:, :1, :1]).all() for z in (trace.indices, trace.weights))
    return bool(same) and not has_idle_places(trace)


ONE_CHOICE = "One choice a token serves all layers and projections."
MAP = "A column for each token; colour is the strongest adapter, opacity its weight."
IDLE = "Grey: what was chosen has no weights there and changes nothing."


def page_of(trace: RoutingTrace, title: str) -> str:
    """A standalone page: the coloured text, what routed the token in focus, the whole routing map."""
    share = adapter_share(trace)
    colours = palette(len(trace.adapter_names))
    styles = [
        f' style="--c:{colours[leader]};--s:{strength:.2f}"' if leader != NO_ADAPTER else ""
        for leader, strength in zip(leading(share), share.max(axis=1, initial=0), strict=True)
    ]
    tokens = list(map(_token_html, trace.tokens, styles))
    fill = {
        "title": html.escape(visible(title)),
        "summary": html.escape(_summary(trace)),
        "legend": "".join(map(_legend_html, trace.adapter_names, colours)),
        "prompt": "".join(tokens[: trace.prompt_length]),
        "response": "".join(tokens[trace.prompt_length :]),
        "what": "A column for each token; heights are the adapters' weights." if has_one_choice(trace) else MAP,
        "idle": f" {IDLE}" if has_idle_places(trace) else "",
        "trace": _page_data(trace, colours),
    }
    template = resources.files("meteora_jax").joinpath("routing_page.html").read_text(encoding="utf-8")
    # One pass: text that happens to hold {{...}} is never taken for a slot.
    return re.sub(r"\{\{(\w+)\}\}", lambda slot: fill[slot[1]], template)


def cell_of(trace: RoutingTrace) -> str:
    """The page as a notebook's cell shows it: in a frame of its own, which neither reads nor styles the notebook."""
    page = html.escape(page_of(trace, "routing"), quote=True)
    how = 'sandbox="allow-scripts" style="width: 100%; height: 640px; border: 0"'
    return f'<iframe srcdoc="{page}" {how}></iframe>'


def _token_html(token: str, style: str) -> str:
    kind = "token newline" if "\n" in token else "token"
    return f'<span class="{kind}" role="option" tabindex="-1"{style}>{html.escape(visible(token))}</span>'


def _legend_html(name: str, colour: str) -> str:
    return (
        f'<button type="button" class="adapter" aria-pressed="false" style="--c:{colour}">'
        f'<i></i><b>{html.escape(visible(name))}</b><span class="led"></span></button>'
    )


def _summary(trace: RoutingTrace) -> str:
    layers, projections, chosen = trace.indices.shape[1:]
    response = len(trace.tokens) - trace.prompt_length
    one = f". {ONE_CHOICE}" if has_one_choice(trace) else ""
    return (
        f"{len(trace.adapter_names)} adapters, {layers} layers × {projections} projections, "
        f"top {chosen}; {trace.prompt_length} prompt and {response} response tokens{one}"
    )


def _page_data(trace: RoutingTrace, colours: tuple[str, ...]) -> str:
    """The routing as JSON: indices in the smallest unsigned type (its largest value is none), weights int16."""
    index_type = np.dtype("uint8" if len(trace.adapter_names) < 256 else "<u2")
    none = np.iinfo(index_type).max
    one = has_one_choice(trace)
    indices, weights = (z[:, :1, :1] if one else z for z in (trace.indices, trace.weights))
    weight_step = max(float(np.abs(trace.weights).max(initial=0)), 1.0) / np.iinfo(np.int16).max
    data = {
        "adapters": [visible(name) for name in trace.adapter_names],
        "colours": colours,
        "projections": ("all",) if one else trace.projections,
        "promptLength": trace.prompt_length,
        "shape": indices.shape,
        "oneChoice": one,
        "indices": _base64(np.where(indices == NO_ADAPTER, none, indices).astype(index_type)),
        "indexBytes": index_type.itemsize,
        "none": none,
        "weights": _base64(np.rint(weights / weight_step).astype("<i2")),
        "weightStep": weight_step,
        "adapted": _base64(trace.adapted.astype("uint8")) if trace.adapted is not None and not one else None,
    }
    # Inside <script> only "<" can end or change the element.
    return json.dumps(data, default=int, separators=(",", ":")).replace("<", "\\u003c")


def _base64(array: np.ndarray) -> str:
    return base64.b64encode(array.tobytes()).decode("ascii")
