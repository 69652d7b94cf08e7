"""The engine on random schedules against the same requests one by one, each in an engine of its own."""

from __future__ import annotations

import collections
import dataclasses
import functools
from typing import Any

import numpy as np
import pytest
from extent import examples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_token_router import FORM, arrays_of
from worlds import NAMES

import meteora_jax as mj
from meteora_jax.config import InputError
from meteora_jax.engine import EngineCore, EngineSize, Handle, Request, Sampling
from meteora_jax.engine.step import StepRows, new_state, run_steps
from meteora_jax.gate_config import GateConfig
from meteora_jax.generation import routing_of
from meteora_jax.io.gates import save_gates
from meteora_jax.routing.retrieval import Composed

ROUTERS = (None, mj.Fixed("cedar"), mj.Gates(2))
SMALL = EngineSize(rows=4, tokens=36, blocks=16, block_size=8)


def request(model: mj.Meteora, prompt: list[int], router: Any, most: int, **options: Any) -> Request:
    drawn = {k: options.pop(k) for k in ("temperature", "seed", "top_k") if k in options}
    return model.request(prompt, router, most, Sampling(**drawn), **options)


def engine(model: mj.Meteora, size: EngineSize = SMALL, **options: Any) -> EngineCore:
    made = EngineCore(model.graph, model.weights, model.config, size, decode=model.decode, **options)
    made.row_sizes, made.table_sizes = made.row_sizes[-1:], made.table_sizes[-1:]  # few programs are compiled
    return made


class OneByOne:
    """What each request gets alone, computed once."""

    def __init__(self, model: mj.Meteora):
        self.engine = engine(model, EngineSize(1, 200, 32, 8), prefix_cache=False)
        self.known: dict[Any, tuple[list[int], str | None]] = {}

    def __call__(self, asked: Request, name: Any) -> tuple[list[int], str | None]:
        key = asked.prompt, name, asked.max_new_tokens, asked.stop, asked.sampling
        if key not in self.known:
            done = self.engine.submit(asked).wait()
            self.known[key] = done.tokens, done.finish_reason
        return self.known[key]


@pytest.fixture(scope="module")
def alone(world):
    return OneByOne(world["model"])


@pytest.fixture(scope="module")
def routed_world(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("routed") / "gates"
    save_gates(folder, GateConfig(NAMES, 2, 1.0, FORM), arrays_of(FORM, world["model"].config))
    return {"model": mj.load(world["base"], world["bank"], folder, dtype="float32")}


@pytest.fixture(scope="module")
def routed_alone(routed_world):
    return OneByOne(routed_world["model"])


asked = st.tuples(
    st.integers(0, 5),  # which text
    st.integers(1, 70),  # how much of it
    st.sampled_from(range(len(ROUTERS))), st.integers(1, 14),
    st.integers(0, 8),  # the round in which it comes
    st.sampled_from([None, None, None, 2, 5]),  # rounds until it is cancelled
)  # fmt: skip


def play(model: mj.Meteora, alone: OneByOne, asked: list[Any]) -> None:
    """Submits, cancels and serves as the schedule says; the same engine for every example, so that its cache is hit."""
    used = ENGINES.setdefault(id(model), engine(model))
    texts = [np.random.default_rng(i // 2).integers(3, 300, 70).tolist() for i in range(6)]
    requests = [
        request(model, texts[text][:length], ROUTERS[router], most, temperature=0.8, seed=3)
        for text, length, router, most, _, _ in asked
    ]
    handles: dict[int, Handle] = {}
    at = 0
    while len(handles) < len(asked) or used.busy:
        for i, (*_, arrival, _) in enumerate(asked):
            if arrival == at:
                handles[i] = used.submit(requests[i])
        used.step()
        for i, (*_, arrival, cancelled) in enumerate(asked):
            if cancelled is not None and at == arrival + cancelled:
                handles[i].cancel()
        at += 1
        used.scheduler.cache.pool.check()
    for i, handle in handles.items():
        tokens, reason = alone(requests[i], asked[i][2])
        if handle.progress.finish_reason == "cancelled":
            assert handle.progress.tokens == tokens[: len(handle.progress.tokens)]
        else:
            assert (handle.progress.tokens, handle.progress.finish_reason) == (tokens, reason)
    assert used.scheduler.cache.pool.available == SMALL.blocks
    used.scheduler.cache.pool.check()


ENGINES: dict[int, EngineCore] = {}
some = functools.partial(settings, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@some(max_examples=examples(12, 150))
@given(st.lists(asked, min_size=2, max_size=9))
def test_a_request_has_the_tokens_it_has_alone(world, alone, asked):
    play(world["model"], alone, asked)
    used = ENGINES[id(world["model"])]
    assert used.counters.dispatches > 0


@some(max_examples=examples(6, 80))
@given(st.lists(asked, min_size=2, max_size=9))
def test_so_it_is_with_a_token_router(routed_world, routed_alone, asked):
    play(routed_world["model"], routed_alone, asked)


def test_the_schedules_met_chunks_preemption_and_known_beginnings(world, alone):
    """Nine requests that need more than the sixteen blocks, all at once, then one of them again."""
    model = world["model"]
    texts = [np.random.default_rng(i).integers(3, 300, 30).tolist() for i in range(9)]
    used = engine(model)
    asked = [request(model, text, ROUTERS[i % 3], 40) for i, text in enumerate(texts)]
    handles = [used.submit(one) for one in asked]
    used.drain()
    for i, (one, handle) in enumerate(zip(asked, handles, strict=True)):
        assert handle.progress.tokens == alone(one, i % 3)[0]
    assert used.scheduler.preemptions > 0
    again = used.submit(asked[8])
    used.drain()
    assert again.progress.skipped >= 24
    assert again.progress.tokens == handles[8].progress.tokens


def test_a_conversation_reads_only_what_is_new(world):
    model = world["model"]
    used = engine(model)
    text = list(range(20, 57))
    first = used.submit(request(model, text, mj.Gates(2), 12)).wait()
    turn = [*text, *first.tokens, 9, 10, 11]
    second = used.submit(request(model, turn, mj.Gates(2), 4))
    used.drain()
    assert second.progress.skipped >= len(turn) - 3 - 8 - 1


def test_log_probabilities_are_those_of_the_logits(world):
    model = world["model"]
    used = engine(model)
    prompt = list(range(30, 50))
    done = used.submit(request(model, prompt, mj.Gates(2), 6, logprobs=3)).wait()
    beside = used.submit(request(model, prompt, None, 3)).wait()
    assert beside.logprobs == []
    logits = np.asarray(model.logits([prompt + done.tokens], mj.Gates(2)), np.float64)[0, len(prompt) - 1 : -1]
    normed = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    for token, (own, best), row in zip(done.tokens, done.logprobs, normed, strict=True):
        assert own == pytest.approx(row[token], abs=1e-4)
        assert [t for t, _ in best] == np.argsort(-row, kind="stable")[:3].tolist()
        assert [p for _, p in best] == pytest.approx(np.sort(row)[::-1][:3], abs=1e-4)


@pytest.mark.parametrize("trace", [True, "response"])
def test_a_trace_is_whole_after_a_preemption(trace, world):
    model = world["model"]
    used = engine(model)
    texts = [np.random.default_rng(i).integers(3, 300, 30).tolist() for i in range(5)]
    handles = [used.submit(request(model, text, mj.Gates(2), 40, trace=trace)) for text in texts]
    used.drain()
    assert used.scheduler.preemptions > 0
    for text, handle in zip(texts, handles, strict=True):
        (expected,) = model.generate([text], mj.Gates(2), max_new_tokens=40)
        found = routing_of(handle.progress)
        assert found is not None
        first = 0 if trace is True else len(text)
        assert found[0] == [*text, *expected.token_ids][first:]
        np.testing.assert_array_equal(found[1], expected.routing.indices[first:])
    _, again = (used.submit(request(model, texts[0], mj.Gates(2), 40, trace=trace)).wait() for _ in range(2))
    assert bool(again.skipped) == (trace == "response")  # of a whole trace everything is read again
    np.testing.assert_array_equal(routing_of(again)[1], routing_of(handles[0].progress)[1])


def test_stop_strings_end_a_request_and_give_its_row_back(world):
    model = world["model"]
    used = engine(model)
    whole = used.submit(request(model, [5, 6, 7, 8], None, 14)).wait()
    stop = model.decode(whole.tokens)[3:5]
    done = used.submit(request(model, [5, 6, 7, 8], None, 14, stop=(stop,))).wait()
    assert done.finish_reason == "stop"
    assert stop in model.decode(done.tokens)
    assert not used.scheduler.busy
    used.drain()
    assert used.scheduler.cache.pool.available == SMALL.blocks


def test_waiting_threads_share_one_engine(world):
    from concurrent.futures import ThreadPoolExecutor

    model = world["model"]
    used = engine(model)
    asked = [request(model, [5 + i, 6, 7], None, 9) for i in range(6)]

    def serve(one: Request) -> list[int]:
        return [t for piece in used.submit(one).tokens() for t in piece]

    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(serve, asked))
    for one, tokens in zip(asked, found, strict=True):
        assert tokens == used.submit(one).wait().tokens


def test_what_cannot_be_served_is_refused_at_once(world):
    model = world["model"]
    used = engine(model)
    with pytest.raises(InputError, match=r"^prompt: expected at most 128 tokens with its response .*, found 140$"):
        used.submit(request(model, [5] * 120, None, 20))
    with pytest.raises(InputError, match="expected at least one token"):
        used.submit(Request((), 4))
    with pytest.raises(InputError, match="tokens: expected at least 20"):
        EngineSize(4, 19, 16)


def test_a_failed_engine_says_so_to_everyone(world, monkeypatch):
    model = world["model"]
    used = engine(model)
    handle = used.submit(request(model, [5, 6], None, 4))

    def fail(*_: Any, **__: Any) -> Any:
        raise MemoryError("no room")

    monkeypatch.setattr("meteora_jax.engine.engine.run_steps", fail)
    with pytest.raises(MemoryError):
        handle.wait()
    with pytest.raises(RuntimeError, match="the engine has failed"):
        used.submit(request(model, [5, 6], None, 4)).wait()


def test_a_token_that_the_device_did_not_draw_is_an_error(world, monkeypatch):
    calls = []

    def lose(*args, **options):
        state, result = run_steps(*args, **options)
        calls.append(options["steps"])
        if len(calls) == 3:
            result = dataclasses.replace(result, tokens=0 * result.tokens - 1)
        return state, result

    monkeypatch.setattr("meteora_jax.engine.engine.run_steps", lose)
    used = engine(world["model"])
    used.submit(request(world["model"], [5, 6, 7], None, 30))
    steps = iter(range(100))  # it would be waited for without an end
    with pytest.raises(RuntimeError, match=r"expected \d+ tokens of a request in a step, found 0"):
        collections.deque((used.step() for _ in steps), maxlen=0)
    assert len(calls) >= 3


def test_fused_requests_and_others_in_one_batch(world):
    model = world["model"]
    prompt = list(range(50, 73))
    routers = [
        Composed((("apple", 0.5), ("birch", 0.5)), True),
        Composed((("apple", 0.5), ("birch", 0.5)), False),
        None,
    ]
    used = engine(model)
    handles = [used.submit(request(model, prompt, router, 8)) for router in routers]
    used.drain()
    alone = [model.generate([prompt], router, max_new_tokens=8)[0].token_ids for router in routers]
    assert [h.progress.tokens for h in handles] == alone
    assert alone[0] != alone[1]


def test_a_model_whose_engine_failed_makes_another(world, monkeypatch):
    model = dataclasses.replace(world["model"])
    before = model.generate([[5, 6]], None, max_new_tokens=3)

    def interrupt(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("meteora_jax.engine.engine.run_steps", interrupt)
        with pytest.raises(KeyboardInterrupt):
            model.generate([[5, 6]], None, max_new_tokens=3)
    assert model.generate([[5, 6]], None, max_new_tokens=3) == before
    kept = model._engines.holding([])
    assert not kept.failed
    assert kept is model._engines.holding([])  # and keeps it


def test_few_programs_serve_every_length(world):
    model = world["model"]
    used = engine(model)
    for n in (3, 20, 31):
        used.submit(request(model, list(range(5, 5 + n)), None, 9))
    used.drain()
    before = run_steps._cache_size()
    for n in (1, 7, 17, 25, 29):
        used.submit(request(model, list(range(5, 5 + n)), None, 3 + n % 5, temperature=0.0))
    used.drain()
    assert run_steps._cache_size() <= before + 2


@pytest.mark.parametrize("rows", [1, 2])
def test_a_step_copies_no_cache(world, rows):
    model, blocks = world["model"], 4096
    state = new_state(model.graph, model.weights, blocks, 8, rows)
    each, table = np.zeros((rows,), np.int32), np.zeros((rows, 4), np.int32)
    of_rows = StepRows(each, np.ones((rows,), bool), table, each, None, None)
    how = dict(steps=2, logprobs=None, trace=False)
    lowered = run_steps.lower(model.graph, model.weights, state, of_rows, None, None, np.asarray([-1], np.int32), **how)
    cache = state.cache.model if hasattr(state.cache, "model") else state.cache
    assert lowered.compile().memory_analysis().temp_size_in_bytes < cache.pages.nbytes / 2


def test_sampling_does_not_depend_on_neighbours(world):
    model = world["model"]
    used = engine(model)
    how = dict(temperature=1.0, seed=5, top_k=20)
    one = used.submit(request(model, [9, 8, 7], None, 10, **how)).wait().tokens
    mixed = [used.submit(request(model, [9, 8, 7], None, 10, **how)), used.submit(request(model, [4, 4], None, 10))]
    used.drain()
    assert mixed[0].progress.tokens == one
    assert Sampling(1.0, seed=5) != Sampling(1.0, seed=5, index=1)
