"""What is refused, noted and counted of a server's requests, as clients and those who watch its metrics see it."""

from __future__ import annotations

import dataclasses
import shutil
from collections import Counter
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import httpx
import pytest
from served import PROFILES, serving, settled
from test_serving import ASK
from tiny import tiny_peft

import meteora_jax as mj
from meteora_jax.serving.answers import Answer
from meteora_jax.serving.asking import Work
from meteora_jax.serving.driver import TokenShares
from meteora_jax.serving.errors import ApiError
from meteora_jax.serving.models import Fleet, mixture, most_k, resolve
from meteora_jax.serving.schemas import ChatRequest, Message
from meteora_jax.serving.server import usage_of
from meteora_jax.serving.settings import Settings


@pytest.fixture(scope="module")
def served(world, tmp_path_factory):
    root = tmp_path_factory.mktemp("root")
    shutil.copytree(tiny_peft(root, world["hf_folder"], "made", seed=7, r=4), root / "elm")
    settings = Settings(adapter_root=root, adapter_updates=True)
    with serving(world["model"], settings, index=mj.Index.build(PROFILES)) as found:
        yield found


def post(served: Any, path: str, **body: Any) -> httpx.Response:
    return httpx.post(f"{served.url}/v1/{path}", json=body, timeout=60)


@pytest.mark.parametrize("schema", ["x", ["x"], "", []])
def test_a_format_that_is_none_is_the_client_s_fault(served, schema):
    response = {"type": "json_schema", "json_schema": schema}
    got = post(served, "chat/completions", model="tiny", messages=ASK, response_format=response)
    assert got.status_code == 400
    assert "response_format.json_schema: expected an object" in got.json()["error"]["message"]
    assert got.json()["error"]["param"] == "response_format"


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("presence_penalty", 1.5, "expected 0 (not supported by this server), found 1.5"),
        ("frequency_penalty", -0.5, "expected 0 (not supported by this server), found -0.5"),
        ("logit_bias", {"5": 1, "6": 2}, "expected {} (not supported by this server), found one of length 2"),
        ("suffix", "end", "expected '' (not supported by this server), found one of length 3"),
    ],
)
def test_fields_that_are_not_served_are_said_to_be_so(served, field, value, said):
    got = post(served, "completions", model="tiny", prompt="A", max_tokens=1, **{field: value})
    assert got.status_code == 400
    assert got.json()["error"]["message"] == f"{field}: {said}"
    nothing = {str: "", dict: {}, float: 0}[type(value)]
    assert post(served, "completions", model="tiny", prompt="A", max_tokens=1, **{field: nothing}).status_code == 200


def test_a_body_that_is_no_json_is_told_where(served):
    kind = {"Content-Type": "application/json"}
    got = httpx.post(f"{served.url}/v1/completions", content=b'{"model": "tiny",', headers=kind, timeout=60)
    assert got.status_code == 400
    assert got.json()["error"]["message"] == "body: expected JSON, found none from character 17 on"


@pytest.mark.parametrize("stop", ["", [""], ["a", ""]])
def test_a_text_that_cannot_end_a_response_is_refused(served, stop):
    got = post(served, "completions", model="tiny", prompt="A", max_tokens=1, stop=stop)
    assert got.status_code == 400
    error = got.json()["error"]
    assert (error["message"], error["param"]) == ("stop: expected texts, found an empty one", "stop")


ADAPTERS = "apple, birch, cedar, daisy"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("retrieve", "expected a server with --index, found one without"),
        ("retrieve:2", "expected a server with --index, found one without"),
        ("gates-within", "expected a server with --gates and --index, found one without"),
        ("phatgoose", "expected a server with a bank of adapters with their own gates, found one without"),
        ("arrow:2", "expected nothing behind 'arrow', found ':2'"),
        ("aple", f"expected tiny, {ADAPTERS}, found none of them"),
    ],
)
def test_a_name_that_is_no_model_is_told_what_is_missing(world, name, said):
    fleet = Fleet(dataclasses.replace(world["model"], gates=None), None, "tiny")
    with pytest.raises(ApiError) as refusal:
        resolve(fleet, name)
    assert (refusal.value.status, refusal.value.message) == (404, f"the model {name!r} does not exist: {said}")


def test_a_number_of_adapters_that_there_are_not_is_told_the_most(world):
    fleet = Fleet(world["model"], mj.Index.build(PROFILES), "tiny")
    with pytest.raises(ApiError, match=r"expected retrieve:K with K from 1 to 4 \(the bank's adapters\), found '9'"):
        resolve(fleet, "retrieve:9")


def test_at_most_eight_names_are_listed():
    names = tuple(f"adapter{i}" for i in range(30))
    fleet = Fleet(Mock(spec=mj.Meteora, adapter_names=names), None, "tiny")
    said = f"tiny, {', '.join(names[:7])} or 23 others"
    with pytest.raises(ApiError, match=f"^the model 'other' does not exist: expected {said}, found none of them$"):
        resolve(fleet, "other")
    with pytest.raises(ApiError, match=rf"'other': expected names of the bank \({', '.join(names[:8])}\)$"):
        mixture(fleet, "tiny", {"adapter3": 1.0, "other": 1.0})


def test_an_adapter_to_unload_that_there_is_not_is_told_which_there_are(served):
    got = post(served, "unload_lora_adapter", lora_name="fig")
    assert got.status_code == 404
    message = f"the adapter 'fig' does not exist: expected one of the bank's ({ADAPTERS})"
    assert got.json()["error"]["message"] == message


def test_shares_that_round_to_nothing_are_left_out():
    answer = Mock(spec=Answer, led=Counter(), _metrics=Mock(), model=Mock())
    shares = TokenShares((("disfl_qa", 4e-5), ("winowhy", 1e-9)), 0.99996)
    assert Answer._led(answer, 5, shares)["weights"] == []
    shares = TokenShares((("disfl_qa", 0.75), ("winowhy", 6e-5), ("other", 4e-5)), 0.2)
    assert Answer._led(answer, 5, shares)["weights"] == [["disfl_qa", 0.75], ["winowhy", 0.0001]]
    assert answer.led == {None: 1, "disfl_qa": 1}


def test_refusals_are_counted_as_such_and_unknown_names_are_no_labels(served):
    assert post(served, "completions", model="tiny", prompt="").status_code == 400
    assert post(served, "completions", model="arbitrary-1", prompt=[99_999_999]).status_code in (400, 404)
    text = httpx.get(f"{served.url}/metrics", timeout=60).text
    counted = [line for line in text.splitlines() if line.startswith("meteora_requests_total{")]
    assert any('model="tiny"' in line and 'status="400"' in line for line in counted)
    assert not any('status="499"' in line or "arbitrary" in line for line in counted)


def test_a_stream_that_fails_is_no_client_that_left(served, monkeypatch):
    take = Answer.take

    def fail(answer: Answer, piece: Any) -> str:
        if answer.tokens:
            raise ValueError("a fault of the server")
        return take(answer, piece)

    monkeypatch.setattr(Answer, "take", fail)
    asked = dict(model="birch", prompt="A", stream=True, max_tokens=40, temperature=0)
    with pytest.raises(httpx.RemoteProtocolError):
        post(served, "completions", **asked)
    text = httpx.get(f"{served.url}/metrics", timeout=60).text
    (counted,) = [line for line in text.splitlines() if line.startswith("meteora_requests_total{") and "birch" in line]
    assert 'status="500"' in counted
    settled(served)


def test_a_load_with_a_bad_profile_loads_nothing(served):
    got = post(served, "load_lora_adapter", lora_name="elm", lora_path="elm", profiles=["  "])
    assert got.status_code == 400
    assert "input 0: expected a text" in got.json()["error"]["message"]
    assert "elm" not in [m["id"] for m in httpx.get(f"{served.url}/v1/models", timeout=60).json()["data"]]


def test_cached_tokens_are_of_the_prompt_once(served):
    for n in (1, 3):
        asked = dict(model="tiny", messages=ASK, max_tokens=4, n=n, temperature=1.0)
        usage = post(served, "chat/completions", **asked).json()["usage"]
        settled(served)
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    assert 0 < cached <= usage["prompt_tokens"]


def test_what_a_preemption_read_again_is_not_the_prompt_s():
    answers = []
    for skipped in (9, 16):
        progress = SimpleNamespace(skipped=skipped)
        answers.append(Mock(spec=Answer, tokens=[1], stream=SimpleNamespace(progress=progress)))
    work = Mock(spec=Work, prompts=[(1,) * 5, (2,) * 20], owner=lambda i: i)
    assert usage_of(work, answers)["prompt_tokens_details"]["cached_tokens"] == 5 + 16


def test_no_more_adapters_a_request_than_there_are_slots(world):
    model = mj.load(world["base"], world["bank"], world["gates"], dtype="float32", adapter_slots=2)
    fleet = Fleet(model, mj.Index.build(PROFILES), "tiny")
    assert most_k(fleet, "retrieve") == 2
    assert resolve(fleet, "retrieve:2").k == 2
    for name in ("retrieve:3", "retrieve:01", "retrieve:0000000019"):
        with pytest.raises(Exception, match=f"{name}' does not exist"):
            resolve(fleet, name)
    assert resolve(fleet, "gates-within").k == 2


def test_templates_read_the_arguments_of_earlier_calls_as_objects():
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"n": 3}'}}
    texts = ["no json", "[1]", '{"a":' * 10**5]
    odd = [{"id": "2", "type": "function", "function": {"name": "f", "arguments": text}} for text in texts]
    message = Message(role="assistant", tool_calls=[call, *odd]).plain()
    assert [c["function"]["arguments"] for c in message["tool_calls"]] == [{"n": 3}, *texts]
    assert call["function"]["arguments"] == '{"n": 3}'


def test_one_call_where_no_parallel_ones_are_wanted(monkeypatch):
    from meteora_jax.serving import completing

    monkeypatch.setattr(completing, "read_calls", lambda *_: ("so", [{"id": "1"}, {"id": "2"}]))
    for wanted, count in ((None, 2), (True, 2), (False, 1)):
        body = ChatRequest(model="tiny", messages=ASK, parallel_tool_calls=wanted)
        chat = Mock(spec=completing.Chat, body=body, names=set())
        answer = Mock(spec=Answer, text=SimpleNamespace(text=""))
        assert completing.Chat._calls(chat, answer, "tags") == ("so", [{"id": "1"}, {"id": "2"}][:count])
