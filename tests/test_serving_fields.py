"""Fields as clients send them, and what their refusals name."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from served import serving
from test_serving import ASK, JSON

from meteora_jax.serving.schemas import ChatRequest, CompletionRequest, EmbeddingRequest


@pytest.fixture(scope="module")
def served(world):
    with serving(world["model"]) as found:
        yield found


def post(served: Any, path: str, **body: Any) -> httpx.Response:
    return httpx.post(f"{served.url}/v1/{path}", json=body, timeout=60)


CHAT, TEXT, VECTOR = {"model": "tiny", "messages": ASK}, {"model": "tiny", "prompt": "A"}, {"model": "e", "input": "A"}


KINDS = [(ChatRequest, CHAT), (CompletionRequest, TEXT), (EmbeddingRequest, VECTOR)]


@pytest.mark.parametrize(("kind", "given"), KINDS)
def test_a_null_is_a_field_that_is_absent(kind, given):
    fields = {name for name, field in kind.model_fields.items() if not field.is_required()}
    of_openai = {"stream", "n", "echo", "function_call", "functions", "reasoning_effort", "audio", "verbosity"}
    wanted = kind.model_validate(given)
    assert kind.model_validate(given | dict.fromkeys(fields | of_openai)) == wanted
    for name in ("model", next(name for name in given if name != "model")):
        with pytest.raises(ValueError, match=name):
            kind.model_validate(given | {name: None})


def test_nulls_and_defaults_that_clients_send_are_answered(served):
    options = {"include_usage": None, "include_obfuscation": False}
    asked = CHAT | dict(max_tokens=1, n=None, stream=True, stream_options=options, modalities=["text"], audio=None)
    got = post(served, "chat/completions", **asked, prompt_cache_retention="24h")
    assert got.status_code == 200
    assert got.text.endswith("data: [DONE]\n\n")
    assert post(served, "chat/completions", **CHAT, modalities=["text", "audio"]).status_code == 400


PART, PICTURE = {"type": "text", "text": "x"}, {"type": "image_url"}
PLACES = [
    ("completions", {"stop": {"a": 1}}, "stop"),
    ("completions", {"stop": ["a", 5]}, "stop"),
    ("completions", {"routing": "all"}, "routing"),
    ("completions", {"prompt": []}, "prompt"),
    ("completions", {"prompt": ["x", ["y"]]}, "prompt"),
    ("completions", {"router": {"apple": "x"}}, "router.apple"),
    ("completions", {"temprature": 1}, "temprature"),
    ("chat/completions", {"messages": [{"content": "x"}]}, "messages.0.role"),
    ("chat/completions", {"messages": [{"role": "user", "content": [PART, PICTURE]}]}, "messages.0.content"),
    ("chat/completions", {"tools": [{"type": "function", "function": {}}]}, "tools.0.function.name"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "wrong", "place"), PLACES)
def test_a_refusal_names_the_field_as_it_was_sent(served, path, wrong, place):
    asked = (CHAT if path.startswith("chat") else TEXT) | wrong
    got = post(served, path, **asked)
    error = got.json()["error"]
    assert (got.status_code, error["param"]) == (400, place)
    assert error["message"].startswith(f"{place}: ")
    for word in ("constrained", "list[", "union", ".str", ".bool", "literal"):
        assert word not in error["message"]


MUCH = "many words " * 200
TOO_LONG = [
    ("completions", {"prompt": ["A", MUCH]}, "prompt", "prompt 1: expected at most 256 tokens"),
    ("completions", {"prompt": "A", "max_tokens": 999}, "prompt", "found 1 of the prompt and 999 of the response"),
    ("chat/completions", {"messages": [{"role": "user", "content": MUCH}]}, "messages", "1 of the response at least"),
    ("chat/completions", {"max_tokens": 999}, "messages", "and 999 of the response"),
]


@pytest.mark.parametrize(("path", "wrong", "place", "said"), TOO_LONG)
def test_what_the_context_does_not_hold_has_openai_s_code(served, path, wrong, place, said):
    asked = (CHAT if path.startswith("chat") else TEXT) | wrong
    error = post(served, path, **asked).json()["error"]
    assert (error["code"], error["param"]) == ("context_length_exceeded", place)
    assert said in error["message"]


def test_a_prompt_that_fills_the_context_can_be_scored(served):
    asked = dict(model="tiny", prompt=[5] * 256, echo=True, logprobs=1, max_tokens=0)
    (choice,) = post(served, "completions", **asked).json()["choices"]
    assert len(choice["logprobs"]["token_logprobs"]) == 256
    error = post(served, "completions", **asked | {"max_tokens": 1}).json()["error"]
    assert error["code"] == "context_length_exceeded"


@pytest.mark.parametrize(("prompt", "number"), [(["A", ""], 1), ([[5], [6], [999]], 2), (["A", "\ud800"], 1)])
def test_a_prompt_is_named_by_its_number(served, prompt, number):
    got = httpx.post(f"{served.url}/v1/completions", content=json.dumps(TEXT | {"prompt": prompt}), headers=JSON)
    error = got.json()["error"]
    assert error["message"].startswith(f"prompt {number}: ")
    assert error["param"] == "prompt"


def test_a_template_s_refusal_is_of_the_messages(served):
    wrong = json.dumps(CHAT | {"messages": [{"role": "user", "content": "\ud800"}]})
    error = httpx.post(f"{served.url}/v1/chat/completions", content=wrong, headers=JSON).json()["error"]
    assert error["param"] == "messages"


ADDRESSES = [
    ("POST", "/v1/responses", 404), ("POST", "/v1/embeddings", 404), ("DELETE", "/nothing", 404), ("GET", "/v1/x", 404),
    ("POST", "/v1/models", 405), ("PUT", "/v1/completions", 405), ("POST", "/", 405), ("DELETE", "/health", 405),
    ("HEAD", "/health", 200), ("HEAD", "/v1/models", 200), ("HEAD", "/metrics", 200), ("HEAD", "/", 200),
    ("HEAD", "/v1/models/x", 404), ("HEAD", "/nothing", 404),
]  # fmt: skip


@pytest.mark.parametrize(("method", "address", "status"), ADDRESSES)
def test_an_address_that_there_is_not_is_not_found_and_heads_are_those_of_gets(served, method, address, status):
    got = httpx.request(method, served.url + address)
    assert got.status_code == status
    if method == "HEAD":
        want = httpx.get(served.url + address)
        assert (got.content, got.headers["content-type"]) == (b"", want.headers["content-type"])
    else:
        assert got.json()["error"]["message"]
