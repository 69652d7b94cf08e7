"""What HTTP costs: first-token and inter-token latency and throughput of the server against its engine alone.

    python scripts/bench_serve.py --shape tiny --users 1 4 --prompt 32 --new 24           # any machine, a minute
    python scripts/bench_serve.py --shape llama-3-8b --json serve.json                    # the table of the docs

Weights are random, answers greedy, and nothing ends one early. So many users send one request after the other: to the
engine, whose steps this process takes by itself; then the same over HTTP, streamed, from processes of their own. Both
use the same compiled programs, and each is run once before it counts. first: from sending a request to its first
token. between: (last token - first token) / (tokens - 1) of a request; a dispatch's tokens arrive together. loop_us:
what the server's event loop takes of a core for a token, in microseconds. The ratio is HTTP's figure over the
engine's, of throughput the engine's over HTTP's.
"""

from __future__ import annotations

import contextlib
import cProfile
import dataclasses
import json
import logging
import os
import pstats
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from bench_clients import Answered
from bench_models import random_bank, random_model
from bench_programs import prepared, run_as
from bench_settings import llama
from bench_timing import console
from rich.table import Table

import meteora_jax as mj
from meteora_jax.config import InputError, LlamaConfig
from meteora_jax.engine import EngineCore, EngineSize, Handle, Request
from meteora_jax.engine.engine import Counters
from meteora_jax.engine.step import run_steps
from meteora_jax.execution import ExecutionConfig, default_dtype, platform
from meteora_jax.gate_config import FormName, GateConfig
from meteora_jax.serving.models import Fleet, resolve
from meteora_jax.serving.run import in_thread
from meteora_jax.serving.server import Server
from meteora_jax.serving.settings import Settings
from meteora_jax.training.recipes import RECIPES

BLOCK = 16
CLIENTS = Path(__file__).with_name("bench_clients.py")


@dataclasses.dataclass(frozen=True)
class BenchServe:
    """Times a server over HTTP and its engine alone, in one run."""

    shape: Literal["tiny", "smollm2-135m", "llama-3-8b"]
    """Shape of the base; its weights are random."""
    users: tuple[int, ...] = (1, 32, 128)
    """Requests under way at a time."""
    model: str = "gates"
    """What they ask for: gates, an adapter (adapter_0), or base."""
    gates: FormName = "token-router"
    """What routes, top-2."""
    prompt: int = 512
    """Words of a prompt, a token each."""
    new: int = 128
    """Tokens of a response in the mean: they have from half of it to three halves."""
    requests: int = 4
    """That each user sends, one after the other."""
    queued: bool = False
    """Each user sends all of its requests at once, so that the queue never runs dry and no row waits for its user's
    next one: what is left of the difference is what reading requests and writing answers costs."""
    adapters: int = 28
    """Adapters in the bank, of rank 8."""
    budget: int = 8192
    """Tokens of prompts in a step."""
    routing: bool = False
    """Ask for the routing of every token (`"routing": true`) over HTTP, and for its trace of the engine."""
    processes: int = 8
    """Client processes that the users are spread over, at most one a core beyond two."""
    profile: bool = False
    """Print the functions of the server's event loop that take longest."""
    layers: int | None = None
    """Layers of the model, all of the shape's unless given."""
    json: Path | None = None
    """Write the records here: a list with one object a measurement."""


def word_tokenizer(vocabulary: int) -> Any:
    """One word a token: w0 w1 w2 ..."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({f"w{i}": i for i in range(vocabulary)}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def random_fleet(settings: BenchServe, config: LlamaConfig) -> Fleet:
    """A model as `mj.load` would make it, of random weights."""
    dtype, form = jnp.dtype(default_dtype()), RECIPES[settings.gates].form
    model, names = random_model(config, settings.adapters, 8, dtype, form)
    execution = ExecutionConfig.here(dtype)
    packed = platform() == "gpu" and dtype.itemsize == 2
    ready = prepared(model, execution) if packed else run_as(model, execution)
    weights = ready()
    model.free()
    gates, bank = GateConfig(names, 2, 1.0, form), random_bank(config, settings.adapters, 8)
    loaded = mj.Meteora(config, bank, gates, word_tokenizer(config.vocab_size), ready.graph, weights)
    return Fleet(loaded, None, "base")


def longest(settings: BenchServe) -> int:
    """Tokens of the longest response."""
    return settings.new + settings.new // 2


def make_engine(settings: BenchServe, fleet: Fleet, rows: int) -> EngineCore:
    """An engine of few programs: one number of rows, three of prompt tokens. Prompts are read anew every time."""
    model, positions = fleet.model, settings.prompt + longest(settings)
    size = EngineSize(rows, settings.budget + rows, rows * -(-positions // BLOCK) + rows, BLOCK)
    core = EngineCore(
        model.graph, model.weights, model.config, size, decode=model.decode_tokens, prefix_cache=False, pool=model.pool
    )
    one = -(-settings.prompt // BLOCK) * BLOCK
    sizes = tuple(sorted({n for n in (one, 4 * one) if n < core.prompt_sizes[-1]} | {core.prompt_sizes[-1]}))
    core.row_sizes, core.prompt_sizes, core.table_sizes = (rows,), sizes, (-(-positions // BLOCK) + 1,)
    core.scheduler.limits = dataclasses.replace(core.scheduler.limits, prompt_sizes=sizes)
    return core


def warm(core: EngineCore, requests: Sequence[Request]) -> None:
    """Compiles all programs of an engine: prompts of each size, and decoding steps, one and several at a time."""
    one = len(requests[0].prompt)
    for size in core.prompt_sizes:
        for request in requests[: max(1, size // one)]:
            core.submit(
                dataclasses.replace(
                    request, max_new_tokens=min(core.scheduler.limits.steps + 2, request.max_new_tokens)
                )
            )
        core.drain()


def bodies(settings: BenchServe, users: int, vocabulary: int) -> list[list[dict[str, Any]]]:
    """What every user sends, one after the other."""
    draw = np.random.default_rng(0)

    def body() -> dict[str, Any]:
        words = " ".join(f"w{i}" for i in draw.integers(0, vocabulary, settings.prompt))
        return dict(
            model=settings.model, prompt=words, max_tokens=int(draw.integers(settings.new // 2, longest(settings) + 1)),
            temperature=0, stream=True,
            stream_options={"include_usage": True}, routing=settings.routing,
        )  # fmt: skip

    sent = [[body() for _ in range(settings.requests)] for _ in range(users)]
    return [[one] for own in sent for one in own] if settings.queued else sent


def play_engine(core: EngineCore, asked: Sequence[Sequence[Request]]) -> list[Answered]:
    """The users' requests by the engine alone: each user's next one comes with the end of the one before."""
    left, found = [list(own) for own in asked], []
    live: dict[int, tuple[Handle, float, float]] = {}  # user -> request, when it was sent, its first token
    for user, own in enumerate(left):
        live[user] = core.submit(own.pop(0)), time.perf_counter(), 0.0
    while live:
        core.step()
        now = time.perf_counter()
        for user, (handle, sent, first) in list(live.items()):
            if not handle.progress.tokens:
                continue
            live[user] = handle, sent, first or now
            if handle.done:
                found.append(Answered(sent, first or now, now, len(handle.progress.tokens)))
                del live[user]
                if left[user]:
                    live[user] = core.submit(left[user].pop(0)), time.perf_counter(), 0.0
    return found


def play_http(url: str, asked: Sequence[Sequence[dict[str, Any]]], processes: int) -> list[Answered]:
    """The same over HTTP.

    Raises:
        RuntimeError: a client failed; it says how on standard error.
    """
    host, _, port = url.removeprefix("http://").partition(":")
    count = max(1, min(processes, len(asked), (os.cpu_count() or 1) - 2))
    with contextlib.ExitStack() as stack:
        clients = []
        for i in range(count):
            command = [sys.executable, str(CLIENTS)]
            own = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
            stack.callback(own.wait)
            stack.callback(own.kill)
            given = {"host": host, "port": int(port), "users": asked[i::count]}
            assert own.stdin is not None
            assert own.stdout is not None
            own.stdin.write(json.dumps(given) + "\n")
            clients.append((own.stdin, own.stdout))
        for _, said in clients:
            said.readline()
        for told, _ in clients:
            told.write("\n")
        answers = [said.readline() for _, said in clients]
    if not all(answers):
        raise RuntimeError("a client ended without its figures")
    return [Answered(*one) for text in answers for one in json.loads(text)]


def figures(answered: Sequence[Answered]) -> dict[str, float]:
    """Of one run: milliseconds and tokens a second."""
    first = [1e3 * (a.first - a.sent) for a in answered]
    between = [1e3 * (a.last - a.first) / max(1, a.tokens - 1) for a in answered]
    tokens = sum(a.tokens for a in answered)
    seconds = max(a.last for a in answered) - min(a.sent for a in answered)
    both = {"first_ms": first, "between_ms": between}
    found = {f"{name}_{p}": float(np.percentile(z, p)) for name, z in both.items() for p in (50, 99)}
    return {**found, "tokens": float(tokens), "seconds": seconds, "tokens_per_s": tokens / seconds}


def since(before: Counters, core: EngineCore) -> dict[str, float]:
    """Steps and dispatches of an engine since then."""
    return {k: float(getattr(core.counters, k) - getattr(before, k)) for k in ("steps", "dispatches")}


def measure(settings: BenchServe, fleet: Fleet, users: int) -> list[dict[str, Any]]:
    """The engine alone and the server, each with an engine of its own and the second of two runs."""
    model, vocabulary = fleet.model, fleet.model.config.vocab_size
    asked = bodies(settings, users, vocabulary)
    router: Any = resolve(fleet, settings.model)
    found, _ = model.look_up(router, 1, lambda: [""])
    own: Any = found[0] if isinstance(found, list) else found
    requests = [
        [model.request(model.encode(b["prompt"]), own, b["max_tokens"], trace=settings.routing) for b in bs]
        for bs in asked
    ]
    case: dict[str, Any] = dict(
        users=users, **{k: getattr(settings, k) for k in ("shape", "model", "routing", "queued")}
    )
    core = make_engine(settings, fleet, users)
    warm(core, [own[0] for own in requests])
    play_engine(core, requests)
    began = dataclasses.replace(core.counters)
    alone = figures(play_engine(core, requests)) | since(began, core)
    del core
    server = Server(fleet, lambda fleet: make_engine(settings, fleet, users), Settings(grace=1, timeout=3600))
    with in_thread(server) as url:
        play_http(url, asked, settings.processes)
        known = run_steps._cache_size()
        (loop,) = [thread.ident for thread in threading.enumerate() if thread.name == "http"]
        clock = time.pthread_getcpuclockid(loop or 0)
        before = time.clock_gettime(clock)
        core = server.driver.core
        began = dataclasses.replace(core.counters)
        with profiled(server, settings.profile):
            served = figures(play_http(url, asked, settings.processes)) | since(began, core)
        case["loop_us"] = 1e6 * (time.clock_gettime(clock) - before) / served["tokens"]
        case["compiled"] = run_steps._cache_size() - known  # 0, or the figures are not of serving alone
    ratios = {f"{k}_ratio": served[k] / alone[k] for k in served if k.endswith(("_50", "_99"))}
    ratios["tokens_per_s_ratio"] = alone["tokens_per_s"] / served["tokens_per_s"]
    return [{"what": "engine", **case, **alone}, {"what": "http", **case, **served, **ratios}]


@contextlib.contextmanager
def profiled(server: Server, wanted: bool) -> Any:
    """Profiles the server's event loop meanwhile, and prints what takes longest in it."""
    if not wanted:
        yield
        return
    loop, profile = server.driver.loop, cProfile.Profile()
    assert loop is not None
    loop.call_soon_threadsafe(profile.enable)
    try:
        yield
    finally:
        loop.call_soon_threadsafe(profile.disable)
        time.sleep(0.2)
        pstats.Stats(profile).sort_stats("tottime").print_stats(30)


def main(settings: BenchServe) -> None:
    """Measures, prints and writes the records; each is written at once."""
    config = llama(settings.shape)
    if settings.layers is not None:
        config = dataclasses.replace(config, num_layers=settings.layers)
    if settings.new < 2:
        raise InputError(f"--new: expected at least 2, found {settings.new}")
    if (positions := settings.prompt + longest(settings)) > (most := config.max_position_embeddings):
        raise InputError(f"--prompt, --new: expected at most {most} in --prompt and 1.5 times --new, found {positions}")
    logging.getLogger("meteora_jax").setLevel(logging.WARNING)
    console.print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {os.cpu_count()} cores")
    fleet, records = random_fleet(settings, config), list[dict[str, Any]]()
    for users in settings.users:
        try:
            records += measure(settings, fleet, users)
        except Exception as e:  # the others are worth their time on the device
            records.append({"what": "failed", "users": users, "error": f"{type(e).__name__}: {e}"[:300]})
        if settings.json:
            settings.json.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
        console.print(f"[dim]{records[-1]}", highlight=False)
    show(records)


def show(records: Sequence[dict[str, Any]]) -> None:
    """The table: milliseconds, and of HTTP their ratio to the engine alone."""
    columns = ("first_ms_50", "first_ms_99", "between_ms_50", "between_ms_99", "tokens_per_s")
    table = Table("users", "", "first p50", "p99", "between p50", "p99", "tokens/s")
    for r in records:
        cells = [f"{r[k]:.4g}" + (f" ({r[k + '_ratio']:.3f})" if k + "_ratio" in r else "") for k in columns if k in r]
        table.add_row(str(r["users"]), r["what"], *(cells or [r["error"]]))
    console.print(table)


if __name__ == "__main__":
    try:
        main(tyro.cli(BenchServe, description=__doc__))
    except InputError as e:
        sys.exit(f"error: {e}")
