"""The server as OpenAI's own client sees it, against the model itself.

Programs take most of the time: one way of asking (log probabilities, traces, sampling) serves several tests.
"""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import openai
import pytest
from extent import parameters
from served import PROFILES, Alone, Served, make_core, serving, settled

import meteora_jax as mj
from meteora_jax.config import InputError
from meteora_jax.routing import adapter_share
from meteora_jax.serving import replies
from meteora_jax.serving.models import Fleet, resolve

ROOT = Path(__file__).parents[1]
JSON = {"content-type": "application/json"}
ASK = [{"role": "user", "content": "How many apples?"}]
LIKELY = dict(logprobs=True, top_logprobs=3)
TRACED = {"routing": True}


@pytest.fixture(scope="module")
def model(world):
    return world["model"]


@pytest.fixture(scope="module")
def index():
    return mj.Index.build(PROFILES)


@pytest.fixture(scope="module")
def served(model, index):
    with serving(model, index=index) as found:
        yield found


@pytest.fixture(scope="module")
def client(served: Served):
    return served.client()


@pytest.fixture(scope="module")
def alone(model):
    return Alone(model, make_core(Fleet(model, None, "tiny")))


BANK_ALONE = ["arrow", "spectr", "lag", "logo", "uniform"]  # no adapter of this bank has a gate of its own


def test_a_chat_answers_as_the_model_does(client, alone):
    want = alone(ASK, None)
    got = client.chat.completions.create(model="tiny", messages=ASK, temperature=0, max_completion_tokens=12)
    assert got.choices[0].message.content == want.text
    assert got.choices[0].finish_reason == ("stop" if want.finish_reason == "end" else want.finish_reason)
    assert got.usage.completion_tokens == len(want.token_ids)
    assert got.usage.prompt_tokens == want.prompt_length
    assert got.model == "tiny"


def test_an_adapter_by_its_name_with_log_probabilities(client, model, alone):
    want = alone(ASK, mj.Fixed("cedar"), logprobs=5)
    how = dict(model="cedar", messages=ASK, temperature=0, max_tokens=12, **LIKELY)
    answer = client.chat.completions.create(**how).choices[0]
    assert answer.message.content == want.text
    got = answer.logprobs.content
    assert b"".join(bytes(entry.bytes) for entry in got).decode(errors="replace") == want.text
    ids = model.encode(ASK) + want.token_ids
    logits = np.asarray(model.logits([ids], mj.Fixed("cedar")))[0, want.prompt_length - 1 : len(ids) - 1]
    logprobs = logits - np.log(np.exp(logits.astype(np.float64)).sum(axis=1, keepdims=True))
    for entry, token, row in zip(got, want.token_ids, logprobs, strict=True):
        assert entry.logprob == pytest.approx(row[token], abs=1e-4)
        assert [t.logprob for t in entry.top_logprobs] == pytest.approx(np.sort(row)[::-1][:3], abs=1e-4)
    streamed = client.chat.completions.create(**how, stream=True)
    parts = [e for chunk in streamed if chunk.choices[0].logprobs for e in chunk.choices[0].logprobs.content]
    assert [e.logprob for e in parts] == pytest.approx([e.logprob for e in got], abs=1e-5)


@pytest.mark.parametrize(
    "name", parameters(["retrieve:2", "gates-within:3", "retrieve"], ["retrieve:2"], "other programs, the same path")
)
def test_what_was_retrieved_acts_and_is_named(client, index, alone, name):
    k = int(name.partition(":")[2] or 1)  # the best alone where nobody says how many
    router = mj.GatesWithin(index, k, 2, 1.0) if name.startswith("gates") else mj.Retrieval(index, k)
    want = alone(ASK, router, trace=True)
    how = dict(model=name, messages=ASK, temperature=0, max_tokens=12)
    got = client.chat.completions.create(**how, extra_body=TRACED)
    assert got.choices[0].message.content == want.text
    found = got.choices[0].meteora["retrieved"]
    assert [one["adapter"] for one in found] == [name for name, _ in want.routing.retrieved]
    assert np.allclose([one["similarity"] for one in found], [like for _, like in want.routing.retrieved])


def test_a_ranked_index_retrieves_by_tasks_unless_a_number_is_named(model, index):
    ranking = {name: (name, "apple") for name in index.names[:-1]}
    fleet = Fleet(model, index, "tiny", ranking)
    found = resolve(fleet, "retrieve")
    assert isinstance(found, mj.TaskRetrieval)
    assert found.ranking == ranking | {index.names[-1]: (index.names[-1],)}, "who joined later serves its own task"
    ways = (fleet, "retrieve:2", 2), (Fleet(model, index, "tiny"), "retrieve", 1)
    for these, name, k in ways:
        found = resolve(these, name)
        assert isinstance(found, mj.Retrieval)
        assert found.k == k
    with pytest.raises(InputError, match=r"expected ranking\.json of the bank's adapters alone, found elder"):
        Fleet(model, index, "tiny", {"apple": ("elder",)}).checked()
    tasks = mj.Index.build(PROFILES | {"sums": ["How many are 3 and 4?", "How many are 2 and 9?"]})
    with pytest.raises(InputError, match="expected profiles of the bank's adapters alone, found sums"):
        Fleet(model, tasks, "tiny").checked()
    fleet = Fleet(model, tasks, "tiny", {"sums": ("cedar", "apple")}).checked()
    found, named = resolve(fleet, "retrieve"), resolve(fleet, "retrieve:2")
    assert found.router((("sums", 1e3),)).adapters == (("cedar", 1.0),)
    assert (named.exclude, found.hidden) == (("sums",), ())
    model = dataclasses.replace(model)
    tasks.remove(["cedar"])  # ranked, and no name of the index
    fleet = Fleet(model, tasks, "tiny", {"sums": ("cedar", "apple"), tasks.names[0]: ("cedar",)}).checked()
    model.remove_adapter("cedar")
    found = resolve(fleet, "retrieve")
    assert found.router((("sums", 1e3),)).adapters == (("apple", 1.0),), "the next best of those that are loaded"
    assert found.hidden == (), "a task whose own adapter is loaded, though the ranking does not have it"
    assert found.router(((tasks.names[0], 1e3),)).adapters == ((tasks.names[0], 1.0),)


def test_routers_of_the_bank_alone_are_models(client, alone):
    for name, router in (("arrow", mj.Arrow(3)), ("logo", mj.Logo())):
        got = client.chat.completions.create(model=name, messages=ASK, temperature=0, max_tokens=12)
        want = alone(ASK, router)
        assert got.choices[0].message.content == want.text


def test_a_mixture_by_weights(client, alone):
    weights = {"apple": 0.75, "daisy": 0.5}
    want = alone(ASK, mj.Fixed(weights), trace=True)
    how = dict(model="tiny", messages=ASK, temperature=0, max_tokens=12)
    got = client.chat.completions.create(**how, extra_body={"router": weights, **TRACED}).choices[0]
    assert got.message.content == want.text
    assert {tuple(name for name, _ in token["weights"]) for token in got.meteora["tokens"]} == {("apple", "daisy")}
    assert got.meteora["led"] == [{"adapter": "apple", "share": 1.0}]
    assert want.text != alone(ASK, None).text


def test_a_stream_is_the_answer_in_pieces(client):
    how = dict(model="gates", messages=ASK, temperature=0, max_tokens=20, n=2, extra_body=TRACED)
    whole = client.chat.completions.create(**how)
    chunks = list(client.chat.completions.create(**how, stream=True, stream_options={"include_usage": True}))
    for i in range(2):
        own = [chunk.choices[0] for chunk in chunks if chunk.choices and chunk.choices[0].index == i]
        assert own[0].delta.role == "assistant"
        assert "".join(choice.delta.content or "" for choice in own) == whole.choices[i].message.content
        assert [choice.finish_reason for choice in own if choice.finish_reason] == [whole.choices[i].finish_reason]
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_who_led_each_token_of_a_stream(client, alone):
    """The pass that drew a token is the one that read the token before it, whose routing the model records."""
    want = alone(ASK, "gates", 20, trace=True)
    how = dict(model="gates", messages=ASK, temperature=0, max_tokens=20, extra_body=TRACED)
    chunks = list(client.chat.completions.create(**how, stream=True))
    tokens = [t for chunk in chunks for t in (getattr(chunk.choices[0], "meteora", None) or {}).get("tokens", [])]
    names, shares = want.routing.adapter_names, adapter_share(want.routing)[want.prompt_length - 1 :]
    assert len(tokens) == len(want.token_ids)
    for token, share in zip(tokens, shares, strict=False):
        assert token["adapter"] == names[share.argmax()]
        assert token["weights"][0] == [names[share.argmax()], pytest.approx(share.max(), abs=1e-4)]
    led = chunks[-1].choices[0].meteora["led"]
    counted = {name: sum(t["adapter"] == name for t in tokens) / len(tokens) for name in {t["adapter"] for t in tokens}}
    assert {one["adapter"]: pytest.approx(one["share"]) for one in led} == counted


def test_the_full_trace_on_request(client, alone):
    want = alone(ASK, "gates", trace=True)
    how = dict(model="gates", messages=ASK, temperature=0, max_tokens=12)
    got = client.chat.completions.create(**how, extra_body={"routing": "full"}).choices[0]
    assert got.message.content == want.text
    trace = got.meteora["trace"]
    assert np.array_equal(np.asarray(trace["indices"]), want.routing.indices)
    assert np.allclose(np.asarray(trace["weights"]), want.routing.weights, atol=1e-4)
    assert trace["prompt_length"] == want.prompt_length


def test_seeds_temperatures_and_choices(client):
    how = dict(model="cedar", messages=ASK, temperature=1.5, top_p=0.9, max_tokens=12, n=3)
    first, again, other = (
        [c.message.content for c in client.chat.completions.create(**how, seed=seed).choices] for seed in (7, 7, 2**40)
    )
    assert first == again
    assert first != other
    assert len(set(first)) == 3


def test_stop_texts_end_an_answer(client, alone):
    whole = alone(ASK, None, 20).text
    stop = whole[3:5]
    got = client.chat.completions.create(model="tiny", messages=ASK, temperature=0, max_tokens=20, stop=[stop])
    assert got.choices[0].message.content == whole[: whole.index(stop)]
    assert got.choices[0].finish_reason == "stop"


def test_text_completions_echo_and_several_prompts(client, model, alone):
    prompts = ["The quick brown", "A gate picks"]
    want = [alone(prompt, mj.Fixed("apple"), 5, logprobs=5).text for prompt in prompts]
    how = dict(model="apple", temperature=0, max_tokens=5, logprobs=5)
    assert [c.text for c in client.completions.create(prompt=prompts, **how).choices] == want
    ids = [model.encode(p) for p in prompts]
    assert [c.text for c in client.completions.create(prompt=ids, **how).choices] == want
    streamed = client.completions.create(prompt=ids[0], stream=True, **how)
    assert "".join(chunk.choices[0].text for chunk in streamed) == want[0]
    scored = client.completions.create(model="apple", prompt=prompts[0], max_tokens=0, echo=True, logprobs=1)
    logits = np.asarray(model.logits([ids[0]], mj.Fixed("apple")))[0].astype(np.float64)
    rows = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    found = scored.choices[0].logprobs
    assert scored.choices[0].text == prompts[0]
    assert found.token_logprobs[0] is None
    assert found.token_logprobs[1:] == pytest.approx([rows[i, t] for i, t in enumerate(ids[0][1:])], abs=1e-4)
    assert "".join(found.tokens) == prompts[0]


def test_parts_of_text_are_a_text(client):
    parts = [{"role": "user", "content": [{"type": "text", "text": "How many "}, {"type": "text", "text": "apples?"}]}]
    how = dict(model="tiny", temperature=0, max_tokens=8)
    one, other = (client.chat.completions.create(messages=m, **how).choices[0].message.content for m in (parts, ASK))
    assert one == other


def test_models_are_listed_and_unknown_ones_are_not_found(client):
    names = [m.id for m in client.models.list()]
    assert names == ["tiny", "apple", "birch", "cedar", "daisy", "gates", "retrieve", "gates-within", *BANK_ALONE]
    assert client.models.retrieve("retrieve:2").id == "retrieve:2"
    for name in ("elder", "gates:2", "retrieve:0", "retrieve:99", "retrieve:x", "other", "Tiny"):
        with pytest.raises(openai.NotFoundError) as refused:
            client.chat.completions.create(model=name, messages=ASK)
        assert refused.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="tiny", messages=ASK, extra_body={"router": {"elder": 1.0}})


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        ({"temperature": -1}, "temperature"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "content"),
        ({"max_tokens": 10**6}, "context"),
        ({"messages": [{"role": "user", "content": "many words " * 200}]}, "context"),
        ({"presence_penalty": 1.0}, "presence_penalty"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"repetition_penalty": 1.2}, "repetition_penalty"),
        ({"top_logprobs": 3}, "logprobs"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": "regex", "regex": "(("}}, "response_format"),
        ({"router": {}}, "router"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "surrogate"),
        ({"model": "gates", "router": {"apple": 1.0}}, "router"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(served, body, complaint):
    given = {"model": "tiny", "messages": ASK} | body
    answer = httpx.post(f"{served.url}/v1/chat/completions", content=json.dumps(given), headers=JSON, timeout=60)
    assert answer.status_code == 400
    error = replies.Error.model_validate(answer.json()).error
    assert error.type == "invalid_request_error"
    assert complaint in error.message
    assert "\n" not in error.message


@pytest.mark.parametrize("content", [b"{", b"[" * 100_000, b"\xff", b"null", b'{"model": NaN}', b""])
def test_no_json_is_a_refusal(served, content):
    answer = httpx.post(f"{served.url}/v1/completions", content=content, headers=JSON)
    assert answer.status_code == 400
    assert replies.Error.model_validate(answer.json()).error.message


def test_replies_are_as_documented(client):
    create, how = client.chat.completions.with_raw_response.create, dict(max_tokens=3, temperature=0)
    chat = create(model="gates", messages=ASK, **how, extra_body={"routing": "full"})
    replies.ChatCompletion.model_validate(json.loads(chat.text))
    text = client.completions.with_raw_response.create(model="apple", prompt="A", logprobs=5, **how)
    replies.TextCompletion.model_validate(json.loads(text.text))
    replies.ModelList.model_validate(json.loads(client.models.with_raw_response.list().text))


def test_tokens_and_text(served, model):
    answer = httpx.post(f"{served.url}/tokenize", json={"prompt": "apples"}).json()
    assert answer["tokens"] == model.encode("apples")
    assert httpx.post(f"{served.url}/tokenize", json={"messages": ASK}).json()["tokens"] == model.encode(ASK)
    assert httpx.post(f"{served.url}/detokenize", json={"tokens": answer["tokens"]}).json() == {"prompt": "apples"}
    assert httpx.post(f"{served.url}/detokenize", json={"tokens": [10**6]}).status_code == 400


def test_the_page_may_load_nothing_from_elsewhere(served):
    answer = httpx.get(served.url)
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/html")
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert httpx.get(f"{served.url}/../app.py").status_code == 404


def test_a_schema_is_followed(client):
    schema = {
        "type": "object", "additionalProperties": False, "required": ["name", "count"],
        "properties": {"name": {"enum": ["apple", "pear"]}, "count": {"type": "integer", "minimum": 0, "maximum": 99}},
    }  # fmt: skip
    form = {"type": "json_schema", "json_schema": {"name": "fruit", "schema": schema}}
    how = dict(model="tiny", messages=ASK, max_tokens=60, response_format=form, temperature=1.5, seed=3)
    got = client.chat.completions.create(**how, n=4).choices
    for choice in got:
        value = json.loads(choice.message.content)
        assert set(value) == {"name", "count"}
        assert value["name"] in ("apple", "pear")
        assert choice.finish_reason == "stop"
    assert len({choice.message.content for choice in got}) > 1
    streamed = client.chat.completions.create(**how, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed) == got[0].message.content


def test_an_expression_is_followed_and_others_beside_it_are_not_bound(client, alone):
    how = dict(model="tiny", messages=ASK)
    form = {"response_format": {"type": "regex", "regex": r"[0-9]{3}-[a-f]{2}"}}
    with ThreadPoolExecutor() as pool:
        bound = pool.submit(client.chat.completions.create, **how, max_tokens=30, temperature=1.5, extra_body=form)
        beside = pool.submit(client.chat.completions.create, **how, max_tokens=30, temperature=0)
        assert re.fullmatch(r"[0-9]{3}-[a-f]{2}", bound.result().choices[0].message.content)
        assert beside.result().choices[0].message.content == alone(ASK, None, 30).text


def test_the_page_s_lines_work(served):
    """Its curl commands, with this server's address and an adapter's name of this model."""
    text = (ROOT / "docs" / "serve.md").read_text(encoding="utf-8").partition("\n## Ask\n")[2].partition("\n## ")[0]
    lines = re.findall(r"^curl .*(?:\n    .*)*", text, re.MULTILINE)
    assert len(lines) == 3
    lines = [line.replace("http://127.0.0.1:8000", served.url).replace("winowhy", "apple") for line in lines]
    models, stream, text = (
        subprocess.run(["bash", "-c", line], check=True, capture_output=True, text=True, timeout=60).stdout
        for line in lines
    )
    assert [m["id"] for m in json.loads(models)["data"]][:2] == ["tiny", "apple"]
    events = [json.loads(line.removeprefix("data: ")) for line in stream.splitlines() if line.startswith("data: {")]
    assert stream.strip().endswith("data: [DONE]")
    assert any(token["adapter"] for e in events for token in e["choices"][0].get("meteora", {}).get("tokens", []))
    assert json.loads(text)["choices"][0]["text"]


def test_the_dashboard_asks_for_metrics_that_there_are(served):
    dashboard = json.loads((ROOT / "docs" / "grafana.json").read_text(encoding="utf-8"))
    asked = {t["expr"] for panel in dashboard["panels"] for t in panel["targets"]}
    names = {name for expr in asked for name in re.findall(r"(?:vllm:|meteora_)\w+", expr)}
    there = set(re.findall(r"^((?:vllm:|meteora_)\w+)", httpx.get(f"{served.url}/metrics").text, re.MULTILINE))
    assert len(names) > 12
    assert names - there == {"meteora_adapters_resident"}  # with slots only


def test_nothing_is_left_behind(served):
    settled(served)
