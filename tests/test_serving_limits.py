"""What the server does with clients that leave, press or break rules, and with an engine that fails."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest
from served import make_slow, serving, settled

import meteora_jax as mj
from meteora_jax.cli import main
from meteora_jax.config import InputError
from meteora_jax.engine import EngineCore, EngineSize, Sampling
from meteora_jax.engine.step import run_steps
from meteora_jax.serving import driver, run
from meteora_jax.serving.limits import knows, read_keys
from meteora_jax.serving.models import Fleet
from meteora_jax.serving.server import EventStream, Server
from meteora_jax.serving.settings import Settings

LONG = dict(model="cedar", prompt="The quick brown fox", temperature=0, max_tokens=200)
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def served(world):
    settings = Settings(grace=2, max_waiting=1, max_body=10_000, read_timeout=0.5, timeout=60)
    with serving(world["model"], settings, make_slow) as found:
        found.client().completions.create(**LONG | {"max_tokens": 2})  # compiled
        yield found


def test_who_stops_reading_is_cancelled(served):
    stream = served.client().completions.create(**LONG, stream=True)
    next(iter(stream))
    assert served.server.driver.core.busy
    stream.close()
    settled(served, 1.0)
    assert served.server.driver.core.counters.new_tokens < 150


@pytest.mark.parametrize("wait", ["GATHER", "EACH"])
def test_tokens_behind_the_first_wait_for_each_other(served, monkeypatch, wait):
    monkeypatch.setattr(driver, wait, 3600.0)
    served.server.driver._handed_over = time.perf_counter()
    stream = served.client().completions.create(**LONG | {"max_tokens": 9}, stream=True)
    first, *others = [chunk.choices[0] for chunk in stream]
    assert first.text.strip()
    assert first.finish_reason is None
    assert [choice.finish_reason for choice in others] == ["length"]
    whole = served.client().completions.create(**LONG | {"max_tokens": 9}).choices[0].text
    assert first.text + others[0].text == whole
    assert len(others[0].text) > len(first.text)


def test_who_leaves_before_the_whole_answer_is_cancelled(served):
    before = served.server.driver.core.counters.new_tokens
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{served.url}/v1/completions", json=LONG, timeout=0.3)
    settled(served, 1.0)
    assert served.server.driver.core.counters.new_tokens - before < 150


def test_a_full_queue_says_when_to_come_again(served):
    client = served.client()
    stream = client.completions.create(**LONG, n=5, stream=True)
    next(iter(stream))
    with pytest.raises(openai.RateLimitError) as refused:
        client.completions.create(**LONG)
    assert int(refused.value.response.headers["retry-after"]) >= 1
    assert refused.value.code == "queue_full"
    metrics = httpx.get(f"{served.url}/metrics").text
    assert "vllm:num_requests_running 4.0" in metrics
    assert "vllm:num_requests_waiting 1.0" in metrics
    stream.close()
    settled(served, 2.0)
    assert client.completions.create(**LONG | {"max_tokens": 2}).choices[0].text


def test_who_asks_for_more_than_there_ever_is_room_for_is_not_told_to_wait(served):
    for asked in (LONG | {"n": 6}, LONG | {"prompt": ["a", "b", "c"], "n": 2}):
        with pytest.raises(openai.BadRequestError, match=r"at most 5 responses of one request .*, found 6"):
            served.client().completions.create(**asked)
    got = served.client().completions.create(**LONG | {"max_tokens": 1, "n": 5})
    assert len(got.choices) == 5


def test_bodies_have_a_size_and_come_in_time(served):
    url = f"{served.url}/v1/completions"
    large = json.dumps(LONG | {"prompt": "x" * 20_000}).encode()
    json_type = {"content-type": "application/json"}
    assert httpx.post(url, content=large, headers=json_type).status_code == 413
    pieces = httpx.post(url, content=(large[i : i + 1000] for i in range(0, len(large), 1000)), headers=json_type)
    assert pieces.status_code == 413
    host, port = served.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as slow:
        head = ["POST /v1/completions HTTP/1.1", "Host: x", "Content-Type: application/json", "Content-Length: 50"]
        slow.sendall("\r\n".join([*head, "", "{"]).encode())
        slow.settimeout(5)
        assert b" 408 " in slow.recv(1000).splitlines()[0]


def test_heads_have_a_size(served):
    host, port = served.url.removeprefix("http://").split(":")
    with httpx.Client(base_url=served.url) as client:
        for _ in range(2):  # each request has its own
            assert client.get("/health", headers={"x-long": "x" * 40_000}).status_code == 200
        body = json.dumps(LONG | {"max_tokens": 1, "user": "x" * 5000}).encode()
        json_type = {"content-type": "application/json"}
        assert client.post("/v1/completions", content=body, headers=json_type).status_code == 200

    def endless() -> None:
        with socket.create_connection((host, int(port)), timeout=5) as client:
            client.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nX-Long: ")
            for _ in range(100):
                client.sendall(b"x" * 100_000)
            client.recv(1)

    with pytest.raises(ConnectionError):  # closed by the server; what it takes for ever is a timeout
        endless()


def test_metrics_count_and_gateways_find_their_gauges(served):
    from prometheus_client.parser import text_string_to_metric_families

    client = served.client()
    client.completions.create(**LONG | {"max_tokens": 5})
    families = {f.name: f for f in text_string_to_metric_families(httpx.get(f"{served.url}/metrics").text)}
    (info,) = families["vllm:lora_requests_info"].samples
    assert set(info.labels) == {"max_lora", "running_lora_adapters", "waiting_lora_adapters"}
    assert info.labels["max_lora"] == "4"
    assert families["vllm:kv_cache_usage_perc"].samples[0].value == 0
    assert families["meteora_generation_tokens"].samples[0].value == served.server.driver.core.counters.new_tokens
    first = {s.name: s.value for s in families["meteora_time_to_first_token_seconds"].samples}
    assert first["meteora_time_to_first_token_seconds_count"] >= 3
    counted = {(s.labels["model"], s.labels["status"]) for s in families["meteora_requests"].samples}
    assert {("cedar", "200"), ("cedar", "429"), ("cedar", "499")} <= counted


def test_an_adapter_at_work_is_named_to_gateways(served):
    stream = served.client().completions.create(**LONG, stream=True)
    next(iter(stream))
    assert 'running_lora_adapters="cedar"' in httpx.get(f"{served.url}/metrics").text
    stream.close()
    settled(served, 2.0)


def test_a_request_may_not_take_for_ever(world):
    with serving(world["model"], Settings(grace=1, timeout=0.4), make_slow) as served:
        with pytest.raises(openai.InternalServerError) as refused:
            served.client().completions.create(**LONG)
        assert refused.value.status_code == 504
        settled(served, 1.0)


def test_keys_are_asked_for_and_compared(world, tmp_path):
    digest = hashlib.sha256(b"secret").hexdigest()
    (tmp_path / "keys").write_text(f"{'0' * 64}  other\n# none\n{digest}  -\n")
    keys = read_keys(tmp_path / "keys")
    assert knows(keys, b"Bearer secret")
    assert not any(knows(keys, h) for h in (b"", b"Bearer", b"Bearer Secret", b"Basic secret", b"secret"))
    with serving(world["model"], Settings(keys=keys, grace=1)) as served:
        assert next(iter(served.client(api_key="secret").models.list())).id == "tiny"
        with pytest.raises(openai.AuthenticationError):
            served.client(api_key="wrong").models.list()
        for route in ("/v1/chat/completions", "/tokenize", "/v1/load_lora_adapter"):
            assert httpx.post(served.url + route, json={}).status_code == 401
        assert httpx.get(f"{served.url}/health").json() == {"status": "ok"}
        assert "access-control-allow-origin" not in httpx.get(served.url, headers={"origin": "http://x"}).headers


def test_a_key_file_with_keys_in_it_is_refused_and_not_repeated(tmp_path, capsys):
    (tmp_path / "keys").write_text("my-secret\n")
    with pytest.raises(InputError, match="keys:1: expected a SHA-256 digest") as refused:
        read_keys(tmp_path / "keys")
    assert "my-secret" not in str(refused.value)
    with pytest.raises(SystemExit) as ended:
        main(["serve", "--base", "nowhere", "--port", "0", "--api-key-file", str(tmp_path / "keys")])
    assert ended.value.code == 1
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("arguments", [[], ["--max-body", "0"], ["--grace", "-1"], ["--allow-adapter-updates"]])
def test_bad_folders_and_numbers_are_one_line(tmp_path, capsys, arguments):
    with pytest.raises(SystemExit) as ended:
        main(["serve", "--base", str(tmp_path / "none"), "--port", "0", *arguments])
    assert ended.value.code == 1
    said = capsys.readouterr().err.splitlines()
    assert len([line for line in said if line.startswith("error: ")]) == 1


def test_an_engine_that_fails_is_replaced_once(world, caplog):
    with serving(world["model"], make=make_slow) as served:
        client, driver = served.client(), served.server.driver
        want = client.completions.create(**LONG | {"max_tokens": 4}).choices[0].text

        def broken() -> bool:
            raise RuntimeError("the device is on fire at /a/secret/path")

        def breaking() -> list[int]:
            with ThreadPoolExecutor() as pool:
                asked = [
                    pool.submit(httpx.post, f"{served.url}/v1/completions", json=LONG, timeout=20) for _ in range(3)
                ]
                while len(driver._watched) < 3:
                    time.sleep(0.005)
                driver.core.step = broken
                answers = [one.result() for one in asked]
            assert all("secret" not in a.text and "Traceback" not in a.text for a in answers)
            return [a.status_code for a in answers]

        assert breaking() == [500] * 3
        assert client.completions.create(**LONG | {"max_tokens": 4}).choices[0].text == want
        assert driver.restarts == 1
        settled(served)
        assert breaking() == [500] * 3
        assert driver.dead
        with pytest.raises(openai.APIError):
            client.completions.create(**LONG | {"max_tokens": 4})
        end = time.monotonic() + 10
        while time.monotonic() < end:  # the listener ends by itself
            try:
                assert httpx.get(f"{served.url}/health").status_code == 503
            except httpx.TransportError:
                break
        assert time.monotonic() < end


def test_a_client_that_takes_nothing_is_dropped(world):
    """A stream whose `send` never returns ends after the write timeout, and its connection is aborted."""
    server = Server.__new__(Server)
    server.settings = Settings(write_timeout=0.1)
    dropped, ended = [], []
    server.abort = dropped.append

    async def events():
        try:
            for _ in range(5):
                yield b"data: {}\n\n"
        finally:
            ended.append(True)

    async def play():
        sent = 0

        async def send(message):
            nonlocal sent
            sent += 1
            if sent == 3:
                await asyncio.Event().wait()

        scope = {"type": "http", "client": ("127.0.0.1", 5)}
        await EventStream(server, events())(scope, asyncio.Event().wait, send)

    asyncio.run(asyncio.wait_for(play(), 5))
    assert dropped == [{"type": "http", "client": ("127.0.0.1", 5)}]
    assert ended == [True]


def test_a_warm_server_compiles_no_more(world):
    fleet = Fleet(mj.load(world["base"], dtype="float32"), None, "tiny")
    size = EngineSize(rows=2, tokens=66, blocks=8)
    model = fleet.model
    server = Server(fleet, lambda _: EngineCore(model.graph, model.weights, model.config, size), Settings())
    run.warm_up(server, [2], lambda *_: None)
    programs, core = run_steps._cache_size(), server.driver.core
    for most, temperature in ((2, 0.0), (5, 0.7), (30, 0.0), (30, 0.7)):
        for count in (2, 1):  # programs of one row, too
            for _ in range(count):
                core.submit(model.request([7, 8, 9], None, most, Sampling(temperature)))
            core.drain()
    assert run_steps._cache_size() == programs


def test_sigterm_lets_what_is_under_way_finish(world):
    command = [sys.executable, str(ROOT / "tests/command.py"), "serve", "--base", str(world["base"]), "--name", "tiny"]
    command += ["--port", "0", "--max-rows", "1", "--max-tokens", "64", "--warm-up"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "METEORA_CACHE": ""}
    asked = LONG | {"model": "tiny", "stream": True}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stderr is not None
            said = iter(process.stderr.readline, "")
            url = next(m[1] for line in said if (m := re.search(r"serving (http://[\d.:]+)", line)))
            got: list[str] = []
            with httpx.stream("POST", f"{url}/v1/completions", json=asked, timeout=60) as answer:
                for line in answer.iter_lines():
                    if not got:
                        process.send_signal(signal.SIGTERM)
                    got.append(line)
            assert "data: [DONE]" in got
            assert any('"finish_reason":"length"' in line or '"finish_reason":"stop"' in line for line in got)
            assert process.wait(20) == 0
            with pytest.raises(httpx.ConnectError):
                httpx.get(f"{url}/health")
            assert "Traceback" not in process.stderr.read()
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
