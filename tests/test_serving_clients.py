"""Clients by the dozen: the evaluation harness, LangChain, and requests made from the schema."""

from __future__ import annotations

import json
from typing import Any, Literal

import pytest
from extent import ALL, examples
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI
from pydantic import BaseModel, Field
from served import Alone, make_core, serving, settled

import meteora_jax as mj
from meteora_jax.harness import MeteoraLM
from meteora_jax.serving.models import Fleet
from meteora_jax.serving.settings import Settings

pytestmark = pytest.mark.filterwarnings("ignore")  # of the harness and of schemathesis; nothing of ours warns here

PAIRS = [
    ("A gate picks two adapters", " for every token"),
    ("Which of these sentences", " follows from the other?"),
    ("How many apples", " do I have"),
]
KEPT = ("messages", "prompt", "stop", "stream", "stream_options", "seed", "user", "input", "tokens")


@pytest.fixture(scope="module")
def served(world):
    with serving(world["model"], Settings(grace=2, max_waiting=300)) as found:
        yield found


def requests(kind: str, arguments: list[Any]) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=a, idx=i) for i, a in enumerate(arguments)]


def test_the_harness_scores_the_same_over_http(served, world):
    """lm_eval's local-completions, tokenizing by the server, against the model in this process."""
    ours = MeteoraLM(**{k: str(world[k]) for k in ("base", "bank", "gates")}, router="apple", batch_size=1)
    url = f"{served.url}/v1/completions"
    theirs = LocalCompletionsAPI(base_url=url, model="apple", batch_size=2, max_length=200)
    assert theirs.tokenizer_backend == "remote"
    wanted, got = (lm.loglikelihood(requests("loglikelihood", PAIRS)) for lm in (ours, theirs))
    for (want, greedy), (found, also) in zip(wanted, got, strict=True):
        assert found == pytest.approx(want, abs=1e-4)
        assert also == greedy
    until = [(context, {"until": ["\n"], "max_gen_toks": 6, "temperature": 0}) for context, _ in PAIRS]
    alone = Alone(world["model"], make_core(Fleet(world["model"], None, "tiny")))
    answers = [alone(context, mj.Fixed("apple"), 6).text.partition("\n")[0] for context, _ in PAIRS]
    assert theirs.generate_until(requests("generate_until", until)) == answers


def test_the_harness_talks_to_chats(served, world):
    lm = LocalChatCompletion(base_url=f"{served.url}/v1/chat/completions", model="apple", max_length=200)
    messages = [{"role": "user", "content": "How many apples?"}]
    asked = json.dumps(messages)
    from lm_eval.models.api_models import JsonChatStr

    until = [(JsonChatStr(asked), {"until": ["\n\n"], "max_gen_toks": 6, "temperature": 0})]
    (got,) = lm.generate_until(requests("generate_until", until))
    alone = Alone(world["model"], make_core(Fleet(world["model"], None, "tiny")))
    assert got == alone(messages, mj.Fixed("apple"), 6).text


class Fruit(BaseModel):
    """A fruit."""

    name: Literal["apple", "pear"]
    count: int = Field(ge=1, le=9)


def test_langchain_chats_streams_and_reads_objects(served, world):
    from langchain_openai import ChatOpenAI

    how: Any = dict(base_url=f"{served.url}/v1", api_key="none", model="apple", temperature=0, max_retries=0)
    chat = ChatOpenAI(**how, max_completion_tokens=6)
    alone = Alone(world["model"], make_core(Fleet(world["model"], None, "tiny")))
    want = alone([{"role": "user", "content": "How many apples?"}], mj.Fixed("apple"), 6)
    whole = chat.invoke("How many apples?")
    assert whole.content == want.text
    assert whole.usage_metadata["output_tokens"] == len(want.token_ids)
    chunks = list(chat.stream("How many apples?"))
    assert len(chunks) > 1
    assert "".join(chunk.content for chunk in chunks) == want.text
    fruit = ChatOpenAI(**how, max_completion_tokens=60).with_structured_output(Fruit, method="json_schema")
    assert isinstance(fruit.invoke("Which fruit?"), Fruit)


def test_no_request_of_the_schema_breaks_the_server(served):
    """Half of the bodies are turned to the model that is served, so that they get further than the check of its name;
    what would compile another program is left out of these."""
    import schemathesis

    schema = schemathesis.openapi.from_url(f"{served.url}/openapi.json")
    tried: set[str] = set()
    calm = {"suppress_health_check": list(HealthCheck), "deadline": None, "database": None}

    def try_operation(operation: Any) -> None:
        @settings(max_examples=examples(6, 100), phases=[Phase.generate], derandomize=not ALL, **calm)
        @given(case=operation.as_strategy(), turned=st.booleans())
        def try_one(case, turned):
            if turned and isinstance(case.body, dict) and "model" in case.body:
                case.body = {k: v for k, v in case.body.items() if k in KEPT} | {"model": "apple"}
                if "completions" in operation.path:
                    case.body |= {"max_tokens": 1, "n": 1, "temperature": 0}
            answer = case.call(timeout=60)
            assert answer.status_code < 500, (operation.path, answer.text)
            tried.add(operation.path)
            if answer.status_code >= 400:
                assert "message" in json.loads(answer.text)["error"]

        try_one()

    for result in schema.get_all_operations():
        try_operation(result.ok())
    assert {"/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize", "/v1/models"} <= tried
    settled(served)
