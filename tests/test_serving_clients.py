"""Clients by the dozen: the evaluation harness, requests made from the schema, and many streams that are cut short."""

from __future__ import annotations

import asyncio
import json
import random
import time
from typing import Any

import httpx
import pytest
from extent import ALL, examples
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI
from served import Alone, Served, make_core, serving, settled

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


async def crowd(served: Served, answers: dict[tuple[str, str], str], seconds: float, streams: int) -> dict[str, int]:
    """Streams that come and go for so long, a third of them cut short; every one has the beginning of its answer, and
    all of it unless it was cut."""
    seen = {"whole": 0, "cut": 0}
    end = time.monotonic() + seconds
    limits = httpx.Limits(max_connections=None)

    async def one(number: int) -> None:
        draw = random.Random(number)
        async with httpx.AsyncClient(base_url=served.url, timeout=120, limits=limits) as client:
            while time.monotonic() < end:
                (name, prompt), want = draw.choice(list(answers.items()))
                pieces = draw.choice([None, None, 0, 1, 2])
                body = dict(model=name, prompt=prompt, temperature=0, max_tokens=40, logprobs=1, stream=True)
                got, done = "", False
                async with client.stream("POST", "/v1/completions", json=body) as answer:
                    assert answer.status_code == 200
                    async for line in answer.aiter_lines():
                        if pieces is not None and pieces <= 0:
                            break
                        if line == "data: [DONE]":
                            done = True
                        elif line:
                            got += json.loads(line.removeprefix("data: "))["choices"][0]["text"]
                            pieces = None if pieces is None else pieces - 1
                assert want.startswith(got)
                if done:
                    assert got == want
                seen["whole" if done else "cut"] += 1

    await asyncio.gather(*(one(i) for i in range(streams)))
    return seen


def play(served: Served, model: mj.Meteora, seconds: float, streams: int) -> None:
    alone = Alone(model, make_core(Fleet(model, None, "tiny")))
    prompts = ["The quick brown fox jumps over the lazy dog, and 24 dogs", "A gate", "How many apples, pears and plums"]
    asked = [(name, prompt) for name in ("apple", "birch", "cedar", "daisy") for prompt in prompts]
    answers = {(n, p): alone(p, mj.Fixed(n), 40, logprobs=1).text for n, p in asked}
    seen = asyncio.run(crowd(served, answers, seconds, streams))
    assert seen["whole"] > streams
    assert seen["cut"] > streams / 4
    settled(served)


def test_streams_that_are_cut_short_leave_nothing_and_change_nobodys_answer(served, world):
    play(served, world["model"], 5, 24)


@pytest.mark.exhaustive("the same for two minutes and with 64 streams")
def test_so_for_two_minutes(served, world):
    import psutil

    process = psutil.Process()
    play(served, world["model"], 20, 64)
    before = process.memory_info().rss
    play(served, world["model"], 100, 64)
    assert process.memory_info().rss - before < 64 << 20
