"""Many streams at once, cut short at random, while adapters are loaded, loaded anew and unloaded: nobody's answer
changes, and nothing is left."""

from __future__ import annotations

import asyncio
import gc
import json
import random
import shutil
import time
from collections import Counter
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import httpx
import numpy as np
import psutil
import pytest
from served import Served, serving, settled
from test_engine import engine, request
from tiny import tiny_peft

import meteora_jax as mj
from meteora_jax.engine import EngineSize, Handle, Progress, Request
from meteora_jax.serving.driver import AT_ONCE, Driver, Stream, TokenShares, Watch
from meteora_jax.serving.settings import Settings

PROMPTS = ("The quick brown fox jumps over the lazy dog, and 24 dogs", "A gate", "How many apples, pears and plums")
STAY = ("apple", "birch", "cedar", "daisy")
COMES = "elm"  # in two versions, and at times not there
Answers = dict[tuple[str, str], set[str]]


@pytest.fixture(scope="module")
def served(world, tmp_path_factory):
    """Three slots for five adapters."""
    root = tmp_path_factory.mktemp("root")
    for name, seed in (("one", 7), ("two", 8)):
        shutil.copytree(tiny_peft(root, world["hf_folder"], f"{name}-made", seed=seed, r=4), root / name)
    model = mj.load(world["base"], world["bank"], dtype="float32", adapter_slots=3)
    settings = Settings(grace=2, max_waiting=300, adapter_root=root, adapter_updates=True)
    with serving(model, settings) as found:
        yield found


async def update(client: httpx.AsyncClient, what: str, **body: Any) -> None:
    answer = await client.post(f"/v1/{what}_lora_adapter", json={"lora_name": COMES, **body})
    assert answer.status_code == 200, answer.text


async def stream(client: httpx.AsyncClient, name: str, prompt: str, pieces: int | None) -> tuple[int, str, bool]:
    """The status, what came, and whether it came to its end; pieces: after how many the client leaves."""
    body = dict(model=name, prompt=prompt, temperature=0, max_tokens=40, stream=True)
    got = ""
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        if answer.status_code != 200:
            return answer.status_code, (await answer.aread()).decode(), False
        async for line in answer.aiter_lines():
            if pieces is not None and pieces <= 0:
                break
            if line == "data: [DONE]":
                return 200, got, True
            if line:
                got += json.loads(line.removeprefix("data: "))["choices"][0]["text"]
                pieces = None if pieces is None else pieces - 1
    return 200, got, False


async def alone(served: Served) -> Answers:
    """What each request says when nobody else is there."""
    found: Answers = {}
    async with httpx.AsyncClient(base_url=served.url, timeout=120) as client:
        for name, folders in (*((name, (None,)) for name in STAY), (COMES, ("one", "two"))):
            for folder in folders:
                if folder is not None:
                    await update(client, "load", lora_path=folder)
                for prompt in PROMPTS:
                    status, text, done = await stream(client, name, prompt, None)
                    assert (status, done) == (200, True)
                    found.setdefault((name, prompt), set()).add(text)
        await update(client, "unload")
    assert all(len(texts) == (2 if name == COMES else 1) for (name, _), texts in found.items())
    return found


async def crowd(served: Served, answers: Answers, seconds: float, streams: int) -> Counter[str]:
    """Streams that come and go for so long, and on a slow machine until each has had its answer once; two fifths of
    them are cut short."""
    seen, end = Counter[str](), time.monotonic() + seconds

    def going() -> bool:
        return time.monotonic() < end or seen["whole"] <= streams

    async def one(number: int) -> None:
        draw = random.Random(number)
        async with httpx.AsyncClient(base_url=served.url, timeout=120) as client:
            while going():
                (name, prompt), wanted = draw.choice(list(answers.items()))
                status, got, done = await stream(client, name, prompt, draw.choice([None, None, None, 0, 1]))
                if status == 404 and name == COMES:
                    assert json.loads(got)["error"]["code"] == "model_not_found"
                    seen["absent"] += 1
                    continue
                assert status == 200, (name, got)
                assert got in wanted if done else any(want.startswith(got) for want in wanted)
                seen["whole" if done else "cut"] += 1
                seen["coming"] += done and name == COMES

    async def change() -> None:
        draw = random.Random(-1)
        async with httpx.AsyncClient(base_url=served.url, timeout=120) as client:
            while going():
                for folder in ("one", "two"):
                    await update(client, "load", lora_path=folder)
                    seen["loads"] += 1
                    await asyncio.sleep(draw.uniform(0, 0.5))
                await update(client, "unload")
                await asyncio.sleep(draw.uniform(0, 0.3))

    await asyncio.gather(change(), *(one(i) for i in range(streams)))
    return seen


def play(served: Served, answers: Answers, seconds: float, streams: int) -> Counter[str]:
    """A crowd, and what is left of it: no request, block, slot, version of an adapter or task."""
    server, pool = served.server, served.server.fleet.model.pool
    before = tasks(served)
    seen = asyncio.run(crowd(served, answers, seconds, streams))
    assert seen["cut"] > streams / 4
    assert seen["loads"] >= 2
    settled(served)
    assert pool is not None
    pool.table.check()
    assert not any(pool.table.pins)
    assert set(pool.versions._held) == {version.number for version in pool.versions.find(STAY)}
    assert server._reserved == 0
    end = time.monotonic() + 5
    while tasks(served) > before and time.monotonic() < end:  # connections that are closed
        time.sleep(0.05)
    assert tasks(served) <= before
    return seen


def tasks(served: Served) -> int:
    """Of the server's event loop."""
    loop = served.server.driver.loop
    assert loop is not None

    async def count() -> int:
        return len(asyncio.all_tasks()) - 1

    return asyncio.run_coroutine_threadsafe(count(), loop).result(10)


def test_streams_cut_short_among_adapters_that_come_and_go(served):
    play(served, asyncio.run(alone(served)), 5, 24)


@pytest.mark.exhaustive("the same for two minutes and with 64 streams; memory stays flat")
def test_so_for_two_minutes(served):
    answers, process = asyncio.run(alone(served)), psutil.Process()
    play(served, answers, 20, 64)
    gc.collect()
    before = process.memory_info().rss
    seen = play(served, answers, 100, 64)
    gc.collect()
    grown = process.memory_info().rss - before
    print(dict(seen), f"{grown >> 20} MiB more")
    assert seen["coming"] > 10
    assert seen["absent"] > 10
    assert grown < 64 << 20


def test_first_tokens_and_ends_go_before_the_rest_which_lets_requests_in_between():
    clients, told = 40, list[int | str]()

    class Noted(asyncio.Event):
        def __init__(self, number: int):
            super().__init__()
            self.number = number

        def set(self) -> None:
            told.append(self.number)
            super().set()

    def nobody(numbers):
        return (), numbers

    async def play() -> None:
        driver = Driver(lambda: SimpleNamespace(size=None), nobody, list)
        driver.loop = asyncio.get_running_loop()
        for i in range(clients):
            request, handle = Request((1,), 9), object.__new__(Handle)
            handle.progress = Progress(request, i, [1])
            stream = Stream(request, None, driver, Noted(i))
            driver._watched[stream] = watch = Watch(stream, handle, nobody)
            if i != clients - 2:
                handle.progress.tokens += [5]
                watch.news()
            handle.progress.tokens += [6]
        list(driver._watched.values())[-1].handle.progress.finish_reason = "length"
        driver._hand_over()
        driver.loop.call_soon(told.append, "request")
        while len(told) <= clients:
            await asyncio.sleep(0)

    asyncio.run(play())
    first, last = clients - 2, clients - 1
    assert told[:2] == [first, last]
    assert told.index("request") == 2 + AT_ONCE
    assert [n for n in told[2:] if n != "request"] == list(range(first))


@pytest.mark.parametrize("every", [2, 3])
def test_who_drew_a_token_is_told_of_a_request_that_was_preempted_too(world, every):
    """Five requests on few blocks, told of every few rounds alone, against the same with room for all."""
    model = world["model"]

    def ask(blocks: int, rounds: int) -> tuple[int, list[list[TokenShares]]]:
        core = engine(model, EngineSize(rows=4, tokens=36, blocks=blocks, block_size=8))
        texts = [np.random.default_rng(i).integers(3, 300, 30).tolist() for i in range(5)]
        handles = [core.submit(request(model, text, mj.Gates(2), 40, trace=True)) for text in texts]
        watches = [Watch(Mock(), handle, lambda numbers: (model.adapter_names, numbers)) for handle in handles]
        told: list[list[TokenShares]] = [[] for _ in handles]
        at = 0
        while core.busy:
            core.step()
            at += 1
            for shares, watch in zip(told, watches, strict=True):
                if at % rounds == 0 or watch.pressing:
                    piece: Any = watch.news()
                    shares += [] if piece is None else piece.shares
        return core.scheduler.preemptions, told

    preemptions, told = ask(16, every)
    assert preemptions > 0
    none, right = ask(64, 1)
    assert none == 0
    for shares, wanted in zip(told, right, strict=True):
        assert [dict(s.largest) for s in shares] == [pytest.approx(dict(s.largest), abs=1e-4) for s in wanted]
