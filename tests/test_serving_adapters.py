"""Adapters that are loaded and unloaded while the server runs, tool calls, and embeddings."""

from __future__ import annotations

import base64
import copy
import dataclasses
import json
import shutil
import threading
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from served import PROFILES, Alone, make_core, serving, settled
from test_serving import ASK, BANK_ALONE
from tiny import tiny_peft

import meteora_jax as mj
from meteora_jax.config import InputError
from meteora_jax.likelihood import prompt_logprobs
from meteora_jax.serving.adapters import inside
from meteora_jax.serving.asking import Work
from meteora_jax.serving.errors import ApiError
from meteora_jax.serving.models import Fleet
from meteora_jax.serving.settings import Settings
from meteora_jax.serving.tools import notation_of, read_calls

HOW: dict[str, Any] = dict(messages=ASK, temperature=0, max_tokens=10)


@pytest.fixture(scope="module")
def root(world, tmp_path_factory):
    """A folder of adapters to load: elm, and another elm."""
    folder = tmp_path_factory.mktemp("root")
    for name, seed in (("elm", 7), ("elm2", 8)):
        shutil.copytree(tiny_peft(folder, world["hf_folder"], f"{name}-made", seed=seed, r=4), folder / name)
    return folder


def update(served: Any, what: str, **body: Any) -> httpx.Response:
    return httpx.post(f"{served.url}/v1/{what}_lora_adapter", json=body, timeout=60)


def said(served: Any, name: str, messages: Any = ASK) -> str:
    how = HOW | {"messages": messages}
    return served.client().chat.completions.create(model=name, **how).choices[0].message.content


def wanted(model: mj.Meteora, folder: Any) -> str:
    """What an adapter says in a model that has it from the beginning."""
    with_it = dataclasses.replace(model).add_adapter(folder, "elm")
    return Alone(with_it, make_core(Fleet(with_it, None, "tiny")))(ASK, mj.Fixed("elm"), 10).text


def test_adapters_come_and_go_in_slots_while_requests_run(world, root):
    model = mj.load(world["base"], world["bank"], dtype="float32", adapter_slots=2)
    settings = Settings(grace=2, adapter_root=root, adapter_updates=True)
    want = [wanted(world["model"], root / name) for name in ("elm", "elm2")]
    assert want[0] != want[1]
    index = mj.Index.build(PROFILES)
    with serving(model, settings, index=index) as served:
        first = {name: said(served, name) for name in ("apple", "birch", "cedar", "daisy")}
        assert len(set(first.values())) == 4
        end, wrong = threading.Event(), []

        def keep_asking() -> None:
            while not end.is_set():
                for name, text in first.items():
                    if said(served, name) != text:
                        wrong.append(name)

        asking = threading.Thread(target=keep_asking)
        asking.start()
        try:
            scored = served.client().completions.create(
                model="cedar", prompt="The quick", max_tokens=0, echo=True, logprobs=1
            )
            alone = prompt_logprobs(world["model"], world["model"].encode("The quick"), mj.Fixed("cedar"), 1)
            found = scored.choices[0].logprobs.token_logprobs
            assert found[0] is None
            assert found[1:] == pytest.approx([value for value, _ in alone], abs=1e-3)
            answer = update(served, "load", lora_name="elm", lora_path="elm", profiles=["Write a poem about elms"])
            assert answer.json() == {
                "status": "loaded", "lora_name": "elm", "version": 1, "reachable_by": ["name", "retrieve"],
            }  # fmt: skip
            assert said(served, "elm") == want[0]
            assert "elm" in [m.id for m in served.client().models.list()]
            assert update(served, "load", lora_name="elm", lora_path="elm2").json()["version"] == 2
            assert said(served, "elm") == want[1]
            loaded_while_read(served, root / "elm")
            assert said(served, "elm") == want[0]
            assert model.pool.version("elm") == 3
            poem = [{"role": "user", "content": "A poem about elms"}]
            found = said(served, "retrieve:1", poem)
            assert found == said(served, "elm", poem)
            assert update(served, "unload", lora_name="elm").status_code == 200
            with pytest.raises(openai.NotFoundError):
                said(served, "elm")
            assert said(served, "retrieve:1", poem) in {said(served, name, poem) for name in first} - {found}
        finally:
            end.set()
            asking.join()
        assert not wrong
        assert update(served, "unload", lora_name="elm").status_code == 404
        settled(served)


def loaded_while_read(served: Any, folder: Any) -> None:
    """Loads elm anew as soon as a request for it was read, before the engine has it."""
    server = served.server
    read, pool = server.read, server.fleet.model.pool

    async def read_and_load(work: Any) -> Any:
        found = await read(work)
        if isinstance(found, Work) and any(pool.versions[n].name == "elm" for n in found.requests[0].adapters.versions):
            server.read = read
            await read(lambda: pool.load(folder, "elm"))
        return found

    server.read = read_and_load


def test_without_slots_another_engine_takes_over(world, root):
    settings = Settings(grace=2, adapter_root=root, adapter_updates=True)
    want = [wanted(world["model"], root / name) for name in ("elm", "elm2")]
    with serving(world["model"], settings, index=mj.Index.build(PROFILES)) as served:
        before = served.server.driver.core
        answer = update(served, "load", lora_name="elm", lora_path="elm", profiles=["Write a poem about elms"]).json()
        assert answer["reachable_by"] == ["name", "retrieve"]
        assert "extend" in answer["note"][0]
        assert served.server.driver.core is not before
        assert said(served, "elm") == want[0]
        assert update(served, "load", lora_name="elm", lora_path="elm2").status_code == 200
        assert said(served, "elm") == want[1]
        poem = [{"role": "user", "content": "A poem about elms"}]
        assert said(served, "retrieve", poem) == said(served, "elm", poem)
        assert update(served, "unload", lora_name="elm").status_code == 200  # its profile stays, and is not found
        with pytest.raises(openai.NotFoundError):
            said(served, "elm")
        assert said(served, "retrieve", poem)
        settled(served)


@pytest.mark.parametrize("path", ["..", "../..", "/etc", "elm/adapter_config.json", "none", "link", "\0"])
def test_adapters_come_from_below_the_root_alone(root, path):
    if not (root / "link").is_symlink():
        (root / "link").symlink_to("/usr")
    with pytest.raises(ApiError, match="below the server's adapter root"):
        inside(root, path)
    assert inside(root, "elm") == (root / "elm").resolve()


def test_bad_adapters_are_refused_and_say_no_folder(world, root):
    (root / "bad").mkdir(exist_ok=True)
    (root / "bad" / "adapter_config.json").write_text("{}")
    with serving(world["model"], Settings(adapter_root=root, adapter_updates=True)) as served:
        answer = update(served, "load", lora_name="bad", lora_path="bad")
        assert answer.status_code == 400
        assert str(root) not in answer.text
        for name in ("tiny", "retrieve", "gates"):
            assert update(served, "load", lora_name=name, lora_path="elm").status_code == 400
        assert update(served, "load", lora_name="new", lora_path="elm", profiles=["x"]).status_code == 400  # no index
        assert said_models(served) == ["tiny", "apple", "birch", "cedar", "daisy", "gates", *BANK_ALONE]
    with serving(world["model"]) as served:
        for verb in ("load", "unload"):
            answer = update(served, verb, lora_name="elm")
            assert answer.status_code == 405
            assert answer.json()["error"]["message"] == (
                f"/v1/{verb}_lora_adapter: expected a server started with --allow-adapter-updates, found one without"
            )
    with pytest.raises(InputError, match="adapter-root"):
        Settings(adapter_updates=True)


def said_models(served: Any) -> list[str]:
    return [m.id for m in served.client().models.list()]


TOOLS = [{"type": "function", "function": {"name": "count", "parameters": {"type": "object"}}}]
WITH_TOOLS = (
    "{% if tools %}{% for tool in tools %}{{ tool | tojson }} answer in <tool_call>{% endfor %}{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_a_tool_call_is_one(world):
    """A grammar makes the random model write a call."""
    tokenizer = copy.deepcopy(world["model"].tokenizer)
    tokenizer.chat_template = WITH_TOOLS
    model = dataclasses.replace(world["model"], tokenizer=tokenizer)
    form = {"type": "regex", "regex": r'<tool_call>\{"name": "count", "arguments": \{"n": [1-9]\}\}</tool_call>'}
    messages = [*ASK, {"role": "assistant", "content": None, "tool_calls": []}, {"role": "tool", "content": "3"}]
    how = dict(model="tiny", messages=messages, temperature=0, max_tokens=90, tools=TOOLS)
    how["extra_body"] = {"response_format": form}
    with serving(model) as served:
        choice = served.client().chat.completions.create(**how).choices[0]
        assert choice.finish_reason == "tool_calls"
        (call,) = choice.message.tool_calls
        assert call.function.name == "count"
        assert 1 <= json.loads(call.function.arguments)["n"] <= 9
        chunks = list(served.client().chat.completions.create(**how, stream=True))
        (streamed,) = [c for chunk in chunks for c in chunk.choices[0].delta.tool_calls or []]
        assert streamed.function.arguments == call.function.arguments
        assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_notations_of_calls():
    names = {"f"}
    tagged = 'Well.<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
    text, (call,) = read_calls(tagged, "tags", names)
    assert (text, json.loads(call["function"]["arguments"])) == ("Well.", {"a": 1})
    text, (call,) = read_calls('<|python_tag|>{"name": "f", "parameters": {"a": [2]}}', "json", names)
    assert (text, json.loads(call["function"]["arguments"])) == ("", {"a": [2]})
    for nothing in ("", ', "arguments": null', ', "parameters": null'):
        _, (call,) = read_calls(f'{{"name": "f"{nothing}}}', "json", names)
        assert call["function"]["arguments"] == "{}"
    no_name = ('{"name": ["f"]}', '{"name": {"f": 1}}', '{"name": null}')
    no_json = ('{"name": "f", "parameters": {"a": NaN}}', '{"name": "f", "parameters": {"a": 1e999}}')
    for other in ('{"name": "g", "parameters": {}}', "f(1)", "[]", '{"name": "f"', "[" * 100_000, *no_name, *no_json):
        assert read_calls(other, "json", names) == (other, [])
    with pytest.raises(ApiError):
        notation_of("{{ messages }}")


class Letters:
    """An encoder that counts letters."""

    def encode(self, texts, instruction):
        rows = [[text.lower().count(chr(97 + i)) + 0.1 for i in range(26)] for text in texts]
        return np.asarray(rows, np.float32)

    def cut(self, texts, instruction):
        return []

    def save(self, folder):
        raise NotImplementedError


def test_embeddings_where_an_encoder_is_loaded(world):
    index = mj.Index.build(PROFILES, encoder=Letters())
    with serving(world["model"], index=index) as served:
        got = served.client().embeddings.create(model="encoder", input=["abba", "c"])
        assert np.allclose(got.data[0].embedding[:3], [2.1, 2.1, 0.1])
        plain = httpx.post(f"{served.url}/v1/embeddings", json={"model": "encoder", "input": "abba"}).json()
        assert np.allclose(plain["data"][0]["embedding"], got.data[0].embedding)
        coded = {"model": "encoder", "input": "abba", "encoding_format": "base64"}
        raw = httpx.post(f"{served.url}/v1/embeddings", json=coded).json()["data"][0]["embedding"]
        assert np.allclose(np.frombuffer(base64.b64decode(raw), "<f4"), got.data[0].embedding)
        with pytest.raises(openai.NotFoundError):
            served.client().embeddings.create(model="tiny", input="a")
