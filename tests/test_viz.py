"""The pictures of routing: what they say is what the trace holds, and no token's text gets out of its place."""

import base64
import dataclasses
import html
import io
import itertools
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from matplotlib.image import imread
from rich.console import Console
from worlds import NAMES, TARGETS

from meteora_jax import viz
from meteora_jax.config import PROJECTIONS, InputError
from meteora_jax.routing import NO_ADAPTER, RoutingTrace, adapter_share, picture
from meteora_jax.routing import page as page_module
from meteora_jax.routing.fixed import Fixed
from meteora_jax.routing.trace import adapted_places

ColourSystem = Literal["standard", "256", "truecolor"]
NASTY = ("</script><b>", "<!--", "{{trace}}", "&amp;", "$x_$", '"\\', "\x1b[31m", "漢字", "\ufffd", " two \n\n lines ")


def random_trace(
    num_tokens: int = 12, layers: int = 3, chosen: int = 2, adapters: int = 5, seed: int = 0
) -> RoutingTrace:
    """Distinct adapters in every cell, some cells empty, the last token unrouted, a third of it response."""
    random = np.random.default_rng(seed)
    shape = (num_tokens, layers, len(PROJECTIONS))
    indices = random.random((*shape, adapters)).argsort(-1)[..., :chosen].astype(np.int32)
    weights = random.dirichlet(np.ones(chosen), shape).astype(np.float32)
    empty = random.random(shape) < 0.2
    empty[-1] = True
    indices[empty], weights[empty] = NO_ADAPTER, 0
    tokens = tuple(f" word{t}" for t in range(num_tokens))
    names = tuple(f"adapter_{a}" for a in range(adapters))
    return RoutingTrace(names, PROJECTIONS, tokens, num_tokens * 2 // 3, indices, weights)


def led_trace(leaders: list[int], tokens: tuple[str, ...], prompt_length: int, adapters: int = 3) -> RoutingTrace:
    """Every layer and projection of a token uses the one adapter that `leaders` names for it."""
    shape = (len(leaders), 2, len(PROJECTIONS), 1)
    indices = np.broadcast_to(np.array(leaders, np.int32)[:, None, None, None], shape).copy()
    names = ("winowhy", "disfl_qa", "a<b>", *(f"more_{a}" for a in range(adapters)))[:adapters]
    weights = (indices != NO_ADAPTER).astype(np.float32)
    return RoutingTrace(names, PROJECTIONS, tokens, prompt_length, indices, weights)


def printed(trace: RoutingTrace, colour_system: ColourSystem | None, width: int = 100) -> str:
    out = io.StringIO()
    terminal = colour_system is not None
    console = Console(file=out, color_system=colour_system, force_terminal=terminal, width=width)
    viz.to_terminal(trace, console)
    return out.getvalue()


def page_of(trace: RoutingTrace, folder: Path, title: str = "a title") -> str:
    viz.write_html(trace, folder / "page.html", title)
    return (folder / "page.html").read_text(encoding="utf-8")


class Page(HTMLParser):
    """What a browser makes of the page: its elements, each with its text before the next tag."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None], list[str]]] = []
        self.inside = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs), []))
        self.inside = True

    def handle_endtag(self, tag: str) -> None:
        self.inside = False

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.elements[-1][2].append(data)

    def texts(self, tag: str, **attributes: str) -> list[str]:
        return [
            "".join(text)
            for name, attrs, text in self.elements
            if name == tag and all(value in (attrs.get(key) or "") for key, value in attributes.items())
        ]


@pytest.mark.parametrize(("chosen", "adapters"), [(1, 1), (2, 5), (3, 28)])
def test_shares_equal_a_slow_loop(chosen: int, adapters: int):
    trace = random_trace(chosen=chosen, adapters=adapters)
    expected = np.zeros((len(trace.tokens), adapters))
    for t, l, p, c in np.ndindex(*trace.indices.shape):
        if trace.indices[t, l, p, c] != NO_ADAPTER:
            expected[t, trace.indices[t, l, p, c]] += trace.weights[t, l, p, c]
    expected[:-1] /= expected[:-1].sum(axis=1, keepdims=True)
    share = adapter_share(trace)
    assert share.dtype == np.float32
    np.testing.assert_allclose(share, expected, atol=1e-6)
    np.testing.assert_array_equal(viz.dominant(trace), [*expected[:-1].argmax(axis=1), NO_ADAPTER])


def test_equal_shares_go_to_the_first_adapter():
    trace = random_trace(num_tokens=2, chosen=2)
    trace.indices[0], trace.weights[0] = [3, 1], 0.5
    assert viz.dominant(trace).tolist() == [1, NO_ADAPTER]


def test_palette_is_stable_distinct_and_readable():
    colours = viz.palette(28)
    assert viz.palette(5) == colours[:5]
    assert viz.palette(30) == colours + colours[:2]
    levels = np.array([list(bytes.fromhex(c[1:])) for c in colours]) / 255
    linear = np.where(levels <= 0.04045, levels / 12.92, ((levels + 0.055) / 1.055) ** 2.4)
    luminance = linear @ [0.2126, 0.7152, 0.0722]
    assert (luminance + 0.05).min() / 0.05 > 4  # black text on it
    assert 1.05 / (luminance + 0.05).max() > 1.6  # it on white
    apart = np.abs(levels[:, None] - levels[None]).sum(-1) + 9 * np.eye(28)
    assert apart.min() > 0.15


def test_terminal_without_colour_marks_each_run_with_the_legend_s_letter():
    trace = led_trace([0, 0, 1, 1, 0, -1], ("one", " two\n", "  three", "!", "four", "<end>"), 4)
    out = printed(trace, None)
    assert "\x1b" not in out
    assert "⟦A⟧one two\n⟦B⟧  three!\n" in out
    assert "⟦A⟧four⟦-⟧<end>\n" in out
    assert re.search(r"A +winowhy +50% +100%", out)  # the last token was never routed and does not count
    assert re.search(r"B +disfl_qa +50% +0%", out)
    assert "leading no token: 1" in out


def test_terminal_letters_go_on_after_z():
    trace = led_trace([25, 26, 27], ("a", "b", "c"), 2, adapters=28)
    assert "⟦Z⟧a⟦AA⟧b" in printed(trace, None)


def test_terminal_file_keeps_long_lines_and_spaces():
    text = "word " * 60 + "  end"
    assert f"⟦A⟧{text}\n" in printed(led_trace([0, 0], (text, "x"), 1), None, width=40)


@pytest.mark.parametrize("colour_system", ["truecolor", "256"])
def test_terminal_in_colour_sets_the_response_apart(colour_system: ColourSystem):
    out = printed(led_trace([0, 0], ("same", "same"), 1), colour_system)
    prompt, response = (line for line in out.splitlines() if "same" in line)
    assert prompt != response
    assert re.sub(r"\x1b\[[\d;]*m", "", prompt) == "same"
    assert "⟦" not in out
    assert "winowhy" in out


def test_sixteen_colours_are_too_few():
    assert "⟦A⟧same" in printed(led_trace([0, 0], ("same", "same"), 1), "standard")


def test_terminal_escapes_and_markup_of_tokens_stay_text():
    out = printed(led_trace([0, 1, 0], ("\x1b[2J", "[red]x[/red]", "\r\x9b"), 2), None)
    assert "⟦A⟧␛[2J⟦B⟧[red]x[/red]" in out
    assert "␍\ufffd" in out


def test_page_shows_nasty_tokens_as_text(tmp_path: Path):
    trace = led_trace([0] * len(NASTY), NASTY, 4)
    text = page_of(trace, tmp_path, title="</title><script>alert(1)</script>")
    page = Page(text)
    assert page.texts("span", role="option") == [t.replace("\x1b", "␛") for t in NASTY]
    assert page.texts("b") == ["winowhy", "disfl_qa", "a<b>"]  # the legend's names and nothing else
    assert page.texts("title") == ["</title><script>alert(1)</script>"]
    assert text.count("<script") == text.count("</script>") == 2
    assert json.loads(page.texts("script", id="trace")[0])["adapters"] == ["winowhy", "disfl_qa", "a<b>"]


def test_page_stands_alone(tmp_path: Path):
    text = page_of(random_trace(), tmp_path)
    assert not re.search(r"https?://|src=|<link|@import|url\(|fetch\(|{{", text)
    assert "default-src 'none'" in text


@pytest.mark.parametrize("adapters", [5, 300])
def test_page_holds_the_whole_routing(tmp_path: Path, adapters: int):
    trace = random_trace(adapters=adapters)
    data = json.loads(Page(page_of(trace, tmp_path)).texts("script", id="trace")[0])
    kind = {1: "u1", 2: "<u2"}[data["indexBytes"]]
    indices = np.frombuffer(base64.b64decode(data["indices"]), kind).astype(np.int32).reshape(data["shape"])
    weights = np.frombuffer(base64.b64decode(data["weights"]), "<i2").reshape(data["shape"])
    np.testing.assert_array_equal(np.where(indices == data["none"], NO_ADAPTER, indices), trace.indices)
    np.testing.assert_allclose(weights * data["weightStep"], trace.weights, atol=1e-4)
    assert data["promptLength"] == trace.prompt_length
    assert data["projections"] == list(PROJECTIONS)


def test_page_of_600_tokens_stays_small(tmp_path: Path):
    assert len(page_of(random_trace(num_tokens=600, layers=30, adapters=28), tmp_path).encode()) < 1_500_000


@pytest.mark.parametrize(("num_tokens", "layers", "adapters"), [(2, 1, 1), (20, 30, 8), (300, 4, 28), (40, 80, 8)])
def test_png_is_drawn_in_the_palette(tmp_path: Path, num_tokens: int, layers: int, adapters: int):
    path = tmp_path / "map.png"
    trace = random_trace(num_tokens, layers, min(2, adapters), adapters)
    viz.write_png(trace, path, "a title")
    pixels = np.rint(imread(path)[..., :3] * 255).astype(int)
    drawn = set(map(tuple, pixels.reshape(-1, 3)))
    leading = {viz.palette(adapters)[a] for a in viz.dominant(trace) if a != NO_ADAPTER}
    assert {tuple(bytes.fromhex(c[1:])) for c in leading} <= drawn
    assert 1000 < pixels.shape[1] <= 2800
    assert 400 < pixels.shape[0] <= 2000


def test_one_choice_a_token_is_a_row_and_the_text(tmp_path: Path):
    """Adapters that lead are drawn; a page of it holds each choice once; any cell that differs brings the map back."""
    trace = led_trace([0, 0, 1, 1, 0, -1], ("one", " two\n", "  three", "x" * 300, "four", "<end>"), 4)
    other = dataclasses.replace(trace, weights=trace.weights.copy())
    other.weights[0, 1, 2] = 0.5
    data, whole = (json.loads(Page(page_of(t, tmp_path)).texts("script", id="trace")[0]) for t in (trace, other))
    assert (data["shape"], data["projections"]) == ([6, 1, 1, 1], ["all"])
    assert whole["shape"] == [6, 2, 7, 1]
    assert page_module.ONE_CHOICE in page_of(trace, tmp_path)
    assert page_module.ONE_CHOICE not in page_of(other, tmp_path)
    viz.write_png(trace, tmp_path / "row.png", "a title")
    pixels = np.rint(imread(tmp_path / "row.png")[..., :3] * 255).astype(int).reshape(-1, 3)
    drawn = [(pixels == bytes_of(c)).all(-1).sum() for c in viz.palette(3)]
    assert min(drawn[:2]) > 1000
    assert drawn[2] == 0
    pieces = list(picture._laid_out(trace, range(6)))
    texts = ["".join(p.text for p in pieces if p.token == t) for t in range(6)]
    assert texts == [t.replace("\n", "↵") for t in trace.tokens]
    assert all(p.column >= 0 and p.column + len(p.text) <= picture.COLUMNS for p in pieces)
    spans = sorted((p.line, p.column, p.column + len(p.text)) for p in pieces)
    assert all(a[0] < b[0] or a[2] <= b[1] for a, b in itertools.pairwise(spans))  # nothing overlaps


def test_png_takes_any_token_and_title(tmp_path: Path):
    viz.write_png(led_trace([0] * len(NASTY), NASTY, 4), tmp_path / "map.png", "$\\frac 漢")
    assert (tmp_path / "map.png").stat().st_size > 5000


def test_a_trace_without_adapters_is_drawn_too(tmp_path: Path):
    trace = led_trace([-1, -1], ("a", "b"), 1, adapters=0)
    viz.write_png(trace, tmp_path / "map.png", "base only")
    assert "0 adapters" in page_of(trace, tmp_path)
    assert "⟦-⟧a" in printed(trace, None)


def test_png_without_matplotlib_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(InputError, match=r"needs matplotlib.*meteora-jax\[eval\]"):
        viz.write_png(random_trace(), tmp_path / "map.png", "a title")


@pytest.mark.parametrize("write", [viz.write_html, viz.write_png])
def test_what_cannot_be_written_is_refused_and_leaves_nothing(tmp_path: Path, write):
    (tmp_path / "taken").mkdir()
    for path in (tmp_path / "taken", tmp_path / "missing" / "page"):
        with pytest.raises(InputError, match=r"cannot be written|expected a file, found a folder"):
            write(random_trace(), path, "a title")
    assert [p.name for p in tmp_path.rglob("*")] == ["taken"]


# --- adapters that have no weights everywhere ---


def partial_trace() -> RoutingTrace:
    """Adapter 0 leads all tokens and has weights in v_proj of layer 1 alone; 1, in every cell the weaker
    choice of the second token, has them everywhere but in down_proj."""
    trace = led_trace([0, 0, 0], ("a", "b", "c"), 2, adapters=2)
    indices = np.concatenate([trace.indices, np.full_like(trace.indices, NO_ADAPTER)], -1)
    weights = np.concatenate([trace.weights, np.zeros_like(trace.weights)], -1)
    indices[1, ..., 1], weights[1] = 1, (0.75, 0.25)
    weights[2, 0, 0, 0] = 0.9  # not one choice for all places
    adapted = np.zeros((2, len(PROJECTIONS), 2), bool)
    adapted[1, PROJECTIONS.index("v_proj"), 0] = True
    adapted[:, :-1, 1] = True
    return dataclasses.replace(trace, indices=indices, weights=weights, adapted=adapted)


def test_a_choice_without_weights_does_not_act():
    trace = partial_trace()
    assert PROJECTIONS[-1] == "down_proj"
    acting = trace.acting()
    for t, l, p, c in np.ndindex(acting.shape):
        chosen = trace.indices[t, l, p, c]
        acts = (
            (chosen == 0 and (l, PROJECTIONS[p]) == (1, "v_proj")) or (chosen == 1 and PROJECTIONS[p] != "down_proj")
        )  # fmt: skip
        assert acting[t, l, p, c] == (chosen if acts else NO_ADAPTER)
    everywhere = dataclasses.replace(trace, adapted=None)
    assert np.array_equal(everywhere.acting(), trace.indices)


def test_pictures_tell_where_what_was_chosen_has_no_weights(tmp_path: Path):
    trace = partial_trace()
    plain = dataclasses.replace(trace, adapted=None)
    grey = tuple([round(viz._IDLE * 255)] * 3)
    colours = {}
    for name, each in (("partial", trace), ("plain", plain)):
        viz.write_png(each, tmp_path / f"{name}.png", "a title")
        pixels = np.rint(imread(tmp_path / f"{name}.png")[..., :3] * 255).astype(int).reshape(-1, 3)
        colours[name] = {c: (pixels == bytes_of(c)).all(-1).sum() for c in viz.palette(2)}
        colours[name]["grey"] = (pixels == grey).all(-1).sum()
    first = viz.palette(2)[0]
    assert colours["partial"]["grey"] > 3 * colours["plain"]["grey"] + 1000
    assert 0 < colours["partial"][first] < 0.5 * colours["plain"][first]
    page, whole = page_of(trace, tmp_path), page_of(plain, tmp_path)
    assert page_module.IDLE in page
    assert page_module.IDLE not in whole
    data = json.loads(Page(page).texts("script", id="trace")[0])
    held = np.frombuffer(base64.b64decode(data["adapted"]), np.uint8).reshape(trace.adapted.shape)
    assert np.array_equal(held, trace.adapted)
    assert json.loads(Page(whole).texts("script", id="trace")[0])["adapted"] is None
    said = printed(trace, None)
    assert re.search(r"A +winowhy +100% +100% +1 of 14 projections", said)
    assert "projections" not in printed(plain, None)


def bytes_of(colour: str) -> tuple[int, ...]:
    return tuple(bytes.fromhex(colour[1:]))


def test_a_model_knows_where_its_adapters_have_weights(world):
    places = adapted_places(world["model"].weights)
    assert places.shape == (3, len(PROJECTIONS), len(NAMES))
    for a, targets in enumerate(TARGETS):
        for p, projection in enumerate(PROJECTIONS):
            assert (places[:, p, a] == (projection in targets)).all()
    answer = world["model"].generate([[5, 6, 7]], router=Fixed(NAMES[0]), max_new_tokens=2)[0]
    assert np.array_equal(answer.routing.adapted, places)


def test_a_notebook_shows_the_page_in_a_frame():
    trace = random_trace()
    cell = trace._repr_html_()
    assert cell.startswith('<iframe srcdoc="')
    assert html.unescape(cell.partition('srcdoc="')[2].partition('"')[0]) == page_module.page_of(trace, "routing")


def test_the_legend_of_a_picture_explains_tokens_of_the_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from matplotlib.figure import Figure

    shown: list[list[str]] = []
    draw = Figure.legend

    def legend(figure: Figure, *, handles: list, **how: object):
        shown.append([str(h.get_label()) for h in handles])
        return draw(figure, handles=handles, **how)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(Figure, "legend", legend)
    indices, weights = np.zeros((3, 1, 1, 2), np.int32), np.full((3, 1, 1, 2), 0.5, np.float32)
    routed = RoutingTrace(("apple", "birch"), ("q_proj",), ("a", "b", "c"), 3, indices, weights)
    viz.write_png(routed, tmp_path / "routed.png", "routed")
    indices = indices.copy()
    indices[1] = NO_ADAPTER
    viz.write_png(dataclasses.replace(routed, indices=indices), tmp_path / "base.png", "base")
    several = np.repeat(indices, 2, axis=1)  # of two layers, the second otherwise: a row for each
    several[0, 1] = 1
    two = dataclasses.replace(routed, indices=several, weights=np.repeat(weights, 2, axis=1))
    viz.write_png(two, tmp_path / "two.png", "two")
    idle = "1 more act nowhere"
    assert shown == [["1 apple", idle], ["1 apple", "no adapter", idle], ["1 apple", "2 birch", "no adapter"]]
