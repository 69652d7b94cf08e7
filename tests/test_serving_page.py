"""The page at `/`: what is served without a browser, and in headless Chromium what a user sees of the tiny server."""

from __future__ import annotations

import itertools
import re
import shutil
import time
from collections.abc import Iterator
from importlib import resources
from typing import Any

import httpx
import numpy as np
import pytest
from served import PROFILES, Served, make_slow, serving

import meteora_jax as mj
from meteora_jax.serving.app import CSP
from meteora_jax.serving.models import most_k
from meteora_jax.serving.settings import Settings

FOLDER = resources.files("meteora_jax.serving") / "page"
TYPES = {"index.html": "text/html", "page.js": "text/javascript", "style.css": "text/css"}
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def served(world) -> Iterator[Served]:
    index: Any = mj.Index.build(PROFILES)
    with serving(world["model"], Settings(grace=2, max_body=20_000), make_slow, index) as found:
        yield found


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("no chromium on the path")
    with api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def page(browser, served) -> Iterator[Any]:
    """The page once it knows the models; what its console and its policy complained of fails the test."""
    context = browser.new_context(viewport={"width": 1200, "height": 900})
    found, said = context.new_page(), []
    found.on("console", lambda message: said.append(message.text) if message.type in ("error", "warning") else None)
    found.on("pageerror", lambda error: said.append(str(error)))
    found.set_default_timeout(120_000)  # programs compile within the first answers
    found.expected_complaints = said
    found.goto(served.url)
    found.locator("#status", has_text="ready").wait_for()
    yield found
    context.close()
    assert said == []


def ask(page: Any, text: str, most: int = 12) -> Any:
    """Sends a message; its turn, once it is there."""
    before = page.locator(".turn").count()
    page.locator("#most").fill(str(most))
    page.locator("#prompt").fill(text)
    page.locator("#prompt").press("Enter")
    turn = page.locator(".turn").nth(before)
    turn.wait_for()
    return turn


def answered(page: Any) -> None:
    page.locator("#status", has_text="ready").wait_for()


@pytest.mark.parametrize("name", TYPES)
def test_files_are_served_under_the_policy(served, name):
    for path in [name] + ([""] if name == "index.html" else []):
        reply = httpx.get(f"{served.url}/{path}")
        assert reply.status_code == 200
        assert reply.text == (FOLDER / name).read_text(encoding="utf-8")
        assert reply.headers["content-type"].partition(";")[0] == TYPES[name]
        assert reply.headers["content-security-policy"] == CSP
        assert reply.headers["x-content-type-options"] == "nosniff"
    assert "unsafe" not in CSP


def test_nothing_comes_from_elsewhere_and_nothing_is_inline():
    assert sorted(path.name for path in FOLDER.iterdir()) == sorted(TYPES)
    text = {name: (FOLDER / name).read_text(encoding="utf-8") for name in TYPES}
    for content in text.values():
        assert not re.search(r"(?i)https?:|//[a-z0-9-]+\.|@import|url\(", content)
    assert not re.search(r"(?i)<style|\sstyle=|\son[a-z]+=|javascript:|<script(?![^>]*\ssrc=)", text["index.html"])
    sinks = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function|DOMParser|setHTML"
    assert not re.search(sinks, text["page.js"])


# What protanopes, deuteranopes and tritanopes see of linear RGB: Machado, Oliveira and Fernandes 2009, severity 1.
VISIONS = (
    np.eye(3),
    [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
)


def linear(colour: str) -> np.ndarray:
    c = np.array(list(bytes.fromhex(colour[1:]))) / 255
    return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)


def lab(rgb: np.ndarray) -> np.ndarray:
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ rgb
    f = np.cbrt(np.maximum(xyz / (0.9505, 1, 1.089), 0.008856))
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def test_colours_stay_apart_for_the_colour_blind():
    """Every two of a theme's colours differ by 25 of CIELAB in every vision, and by 3:1 from the page (WCAG 1.4.11)."""
    css = (FOLDER / "style.css").read_text(encoding="utf-8")
    pairs = re.findall(r"--(\w+): light-dark\((#[0-9a-f]{6}), (#[0-9a-f]{6})\);", css)
    assert len(pairs) == 15
    for theme in ({name: colours[i] for name, *colours in pairs} for i in range(2)):
        colours = [linear(theme[f"c{i}"]) for i in range(7)]
        for vision in VISIONS:
            seen = [lab(np.clip(np.array(vision) @ colour, 0, 1)) for colour in colours]
            assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2)) > 25
        for colour in colours:
            light = sorted([float(np.dot(c, (0.2126, 0.7152, 0.0722))) for c in (colour, linear(theme["card"]))])
            assert (light[1] + 0.05) / (light[0] + 0.05) >= 3


def test_models_say_what_they_are(served):
    cards = {card["id"]: card for card in httpx.get(f"{served.url}/v1/models").json()["data"]}
    adapters = served.server.fleet.model.adapter_names
    assert {name for name, card in cards.items() if card["kind"] == "adapter"} == set(adapters)
    assert [name for name, card in cards.items() if card["kind"] == "base"] == ["tiny"]
    assert cards["gates"]["kind"] == cards["retrieve"]["kind"] == "router"
    assert {name for name, card in cards.items() if card["most_k"]} == {"retrieve", "gates-within"}
    assert cards["retrieve"]["most_k"] == len(adapters) == most_k(served.server.fleet, "retrieve")
    two = httpx.get(f"{served.url}/v1/models/retrieve:2").json()
    assert (two["kind"], two["most_k"]) == ("router", None)


def test_a_chat_colours_its_tokens_by_who_led_them(page, served):
    turn = ask(page, "How many apples?")
    answered(page)
    how = dict(model="gates", messages=[{"role": "user", "content": "How many apples?"}], temperature=0, max_tokens=12)
    want = served.client().chat.completions.create(**how, extra_body={"routing": True}).choices[0]
    tokens = turn.locator(".token")
    texts = [text for text in tokens.all_text_contents() if text != "∎"]
    assert "".join(texts) == want.message.content
    assert turn.locator(".state").inner_text() == f"cut at the most tokens, {len(want.meteora['tokens'])} tokens"
    # Each span has the class of its leader's place among the models, and a letter where the leader changes.
    names = served.server.fleet.model.adapter_names
    spans = tokens.evaluate_all("all => all.map((s) => [s.className, s.dataset.tag ?? '', s.routing])")
    assert sum(len(routing) for *_, routing in spans) == len(want.meteora["tokens"])
    assert [token for *_, routing in spans for token in routing] == want.meteora["tokens"]
    before = None
    for classes, tag, routing in spans:
        leader = routing[0]["adapter"]
        assert f"c{names.index(leader) % 7}" in classes.split()
        assert tag == ("" if leader == before else "ABCDEFGH"[names.index(leader)])
        before = leader
    shares = {one["adapter"]: one["share"] for one in want.meteora["led"]}
    assert turn.locator(".acted li").count() == len(shares)
    for name, share in shares.items():
        assert f"{name} {round(100 * share)} %" in turn.locator(".bar").get_attribute("aria-label")
    painted = tokens.first.evaluate("s => getComputedStyle(s).textDecorationColor")
    assert painted == page.locator(f".swatch.{spans[0][0].split()[1]}").first.evaluate(
        "s => getComputedStyle(s).textDecorationColor"
    )


def test_weights_of_a_token_by_pointer_and_by_keys(page):
    turn = ask(page, "How many apples?")
    answered(page)
    tip, tokens = page.locator("#tip"), turn.locator(".token")
    assert not tip.is_visible()
    tokens.nth(2).hover()
    (token,) = tokens.nth(2).evaluate("s => s.routing")
    for name, share in token["weights"]:
        assert f"{name}\n{round(100 * share)} %" in tip.inner_text()
    page.locator("h1").hover()
    assert not tip.is_visible()
    tokens.first.focus()
    page.keyboard.press("ArrowRight")
    assert tokens.nth(1).evaluate("s => s === document.activeElement")
    assert tokens.nth(1).get_attribute("aria-describedby") == "tip"
    assert tip.is_visible()
    page.keyboard.press("Escape")
    assert not tip.is_visible()
    page.keyboard.press("End")
    assert tokens.last.evaluate("s => s === document.activeElement")
    page.keyboard.press("Tab")  # all of an answer is one stop
    assert page.evaluate("document.activeElement.closest('.turn') === null")


def test_two_routers_side_by_side(page):
    page.locator("#compare").check()
    page.locator(".side").nth(1).locator("select").select_option("cedar")
    turn = ask(page, "How many apples?")
    answered(page)
    answers = turn.locator(".answer")
    assert answers.count() == 2
    assert answers.nth(0).get_attribute("aria-label") == "Answer of gates"
    assert answers.nth(1).locator(".acted").inner_text().replace("\n", " ").endswith("cedar 100 %")
    left, right = answers.nth(0).bounding_box(), answers.nth(1).bounding_box()
    assert left["y"] == right["y"]
    assert left["x"] + left["width"] <= right["x"]
    spoken = page.locator("#spoken").inner_text()
    assert "gates: " in spoken
    assert "cedar: " in spoken


def test_a_conversation_goes_on_and_begins_anew(page):
    bodies: list[Any] = []
    page.on("request", lambda request: bodies.append(request.post_data_json) if request.method == "POST" else None)
    first = ask(page, "How many apples?", 6)
    answered(page)
    ask(page, "And pears?", 4)
    answered(page)
    page.locator("#clear").click()
    assert page.locator(".turn").count() == 0
    ask(page, "Again", 4)
    answered(page)
    assert [[m["role"] for m in body["messages"]] for body in bodies] == [
        ["user"], ["user", "assistant", "user"], ["user"],
    ]  # fmt: skip
    assert first.count() == 1
    assert bodies[1]["messages"][1]["content"]


def test_retrieval_and_mixtures_are_asked_as_chosen(page):
    select, side = page.locator(".model").first, page.locator(".side").first
    select.select_option("retrieve")
    side.locator(".k input").fill("2")
    turn = ask(page, "How many apples are three apples?")
    answered(page)
    assert turn.locator("h2").inner_text().startswith("retrieve:2")
    assert re.fullmatch(r"Retrieved: apple \(\d\.\d\d\), \w+ \(\d\.\d\d\)", turn.locator(".note").inner_text())
    select.select_option(label="mixture by weights")
    page.locator("#prompt").fill("How many?")
    page.locator("#prompt").press("Enter")
    assert "at least one adapter" in page.locator("#problem").inner_text()
    side.get_by_role("spinbutton", name="apple").fill("0.75")
    side.get_by_role("spinbutton", name="daisy").fill("0.5")
    turn = ask(page, "How many?")
    answered(page)
    tip = page.locator("#tip")
    turn.locator(".token").first.hover()
    assert "apple\n60 %" in tip.inner_text()
    assert "daisy\n40 %" in tip.inner_text()


def test_stop_ends_the_answer_and_the_request(page, served):
    before = served.server.driver.core.counters.new_tokens
    turn = ask(page, "The quick brown fox", 200)
    turn.locator(".token").nth(2).wait_for()
    page.locator("#stop").click()
    answered(page)
    assert turn.locator(".state").inner_text().startswith("stopped, ")
    end = time.monotonic() + 5
    while served.server.driver.core.busy and time.monotonic() < end:
        time.sleep(0.02)
    assert not served.server.driver.core.busy
    assert served.server.driver.core.counters.new_tokens - before < 150
    assert page.locator("#prompt").evaluate("s => s === document.activeElement")


def test_errors_are_shown_in_the_servers_words(page):
    turn = ask(page, "word " * 6000)
    answered(page)
    page.locator(".turn [role=alert]").wait_for()
    assert "at most 20000 bytes" in turn.locator(".problem").inner_text()
    assert page.locator("#prompt").input_value().startswith("word word")
    page.expected_complaints[:] = [text for text in page.expected_complaints if "status of 413" not in text]


def test_text_is_never_markup(page):
    """A server whose tokens are markup: they are seen as they are, and no element comes of them."""
    nasty = ["<img src=x onerror=alert(1)>", "<b>", "caf", "\ufffd", "\ufffd", "</b>"]
    said = ["<img src=x onerror=alert(1)>", "<b>", "caf", "", "é", "</b>"]
    events = "".join(
        "data: " + httpx.Response(200, json={"choices": [{
            "index": 0, "delta": {"content": text}, "finish_reason": "stop" if i == 5 else None,
            "meteora": {"tokens": [{"text": token, "adapter": "<i>odd</i>", "weights": [["<i>odd</i>", 1.0]]}]},
        }]}).text + "\n\n"
        for i, (token, text) in enumerate(zip(nasty, said, strict=True))
    )  # fmt: skip
    page.route(
        "**/v1/chat/completions",
        lambda route: route.fulfill(body=events + "data: [DONE]\n\n", content_type="text/event-stream"),
    )
    turn = ask(page, "<u>mine</u>")
    answered(page)
    assert turn.locator(".tokens").inner_text().endswith("</b>")
    assert "".join(turn.locator(".token").all_text_contents()) == "".join(said)
    assert turn.locator(".token").all_text_contents() == ["<img src=x onerror=alert(1)>", "<b>", "caf", "é", "</b>"]
    assert turn.locator("img, .token b, .token i, .asked u, .acted span i").count() == 0
    assert page.locator(".chip", has_text="<i>odd</i>").count() == 1


def test_twenty_eight_adapters_look_different(page):
    """Every pair of colour and underline once, as painted; and letters of their own, and in the list to choose from."""
    cards = [dict(id="tiny", kind="base", most_k=None, max_model_len=64)]
    cards += [dict(id=f"adapter {i}", kind="adapter", most_k=None, max_model_len=64) for i in range(28)]
    page.route("**/v1/models", lambda route: route.fulfill(json={"data": cards}))
    page.reload()
    page.locator("#status", has_text="ready").wait_for()
    marks = page.locator(".chip:not(.none) .swatch")
    painted = marks.evaluate_all(
        "all => all.map(getComputedStyle).map((s) => s.textDecorationColor + s.textDecorationStyle)"
    )
    assert len(set(painted)) == 28
    assert marks.all_text_contents() == [*"ABCDEFGHIJKLMNOPQRSTUVWXYZ", "AA", "AB"]
    assert page.locator(".model").first.locator("option", has_text="AB · adapter 27").count() == 1


def test_the_key_stays_in_the_tab(browser, world):
    import hashlib

    settings = Settings(grace=2, keys=(hashlib.sha256(b"secret").digest(),))
    with serving(world["model"], settings) as served:
        context = browser.new_context()
        page = context.new_page()
        page.goto(served.url)
        page.locator("#status", has_text="not connected").wait_for()
        assert "valid API key" in page.locator("#problem").inner_text()
        page.locator("#key").fill("secret")
        page.locator("#key").press("Tab")
        page.locator("#status", has_text="ready").wait_for()
        assert page.locator("#problem").is_hidden()
        assert page.evaluate("[Object.values(sessionStorage), Object.keys(localStorage), document.cookie]") == [
            ["secret"], [], "",
        ]  # fmt: skip
        page.reload()
        page.locator("#status", has_text="ready").wait_for()
        context.close()


def test_every_control_has_a_name(page):
    ask(page, "How many apples?")
    answered(page)
    page.locator("#compare").check()
    tree = page.locator("body").aria_snapshot()
    for control in ("textbox", "button", "combobox", "checkbox", "spinbutton"):
        assert re.search(rf'- {control} "', tree), control
        assert not re.search(rf"- {control}(:|$| \[)", tree, re.M), control
    assert page.locator("#spoken").get_attribute("aria-live") == "polite"
    assert page.locator("html").get_attribute("lang") == "en"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_readable_in_both_schemes(page, scheme):
    page.emulate_media(color_scheme=scheme)
    ink, ground = page.evaluate(
        "[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"
    )
    light = []
    for colour in (ink, ground):
        rgb = [int(n) for n in re.findall(r"\d+", colour)[:3]]
        light.append(float(np.dot(linear("#" + bytes(rgb).hex()), (0.2126, 0.7152, 0.0722))))
    assert (max(light) + 0.05) / (min(light) + 0.05) > 7
    assert (light[0] > light[1]) == (scheme == "dark")


def test_the_theme_is_the_systems_unless_somebody_chose(page):
    def shade() -> int:
        return page.evaluate("parseInt(getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0])")

    for scheme, dark in (("light", False), ("dark", True)):
        page.emulate_media(color_scheme=scheme)
        assert (shade() < 128) == dark
    page.locator("#theme").select_option("light")
    assert shade() > 128
    page.reload()
    page.locator("#status", has_text="ready").wait_for()
    assert shade() > 128
    page.locator("#theme").select_option("system")
    assert shade() < 128
