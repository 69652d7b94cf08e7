"""Programs that are compiled ahead: which ones requests can meet, and that running them for nobody changes nothing."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import jax
import pytest
from meshes import mesh_of

import meteora_jax as mj
from meteora_jax.engine import EngineCore, EngineSize, Request
from meteora_jax.engine.ahead import AheadCompiler
from meteora_jax.engine.job import Job
from meteora_jax.engine.programs import Program, Sizes, programs
from meteora_jax.engine.step import run_steps

SIZES = Sizes.of((1, 8, 32), (64, 128, 256), (8, 32))


@pytest.mark.parametrize(
    ("count", "prompt", "most", "expected"),
    [
        # a row of 20 to 39 positions: 64 prompt tokens, one step, eight steps; blocks of 8: 3 to 5 columns
        (1, 20, 20, {(8, 64, 8, 1), (1, 0, 8, 1), (1, 0, 8, 8)}),
        # five tokens at most: no long dispatch
        (1, 20, 5, {(8, 64, 8, 1), (1, 0, 8, 1)}),
        # 60 to 79 positions are 8 to 10 columns
        (1, 60, 20, {(r, n, w, k) for r, n, k in ((8, 64, 1), (1, 0, 1), (1, 0, 8)) for w in (8, 32)}),
        # three, of which only one may be left, or be first to have its adapter: 32 tokens alone, 96 together
        (3, 20, 5, {(1, 0, 8, 1), (8, 64, 8, 1), (8, 128, 8, 1), (8, 0, 8, 1)}),
        # nine: 256 tokens of eight together, and as many of all
        (9, 20, 5, {(n, p, 8, 1) for n in (8, 32) for p in (0, 64, 128, 256)} | {(1, 0, 8, 1)}),
    ],
)
def test_programs_that_requests_can_meet(count: int, prompt: int, most: int, expected: set[tuple[int, ...]]):
    asked = [Request((5,) * prompt, most)] * count
    found = list(programs(asked, SIZES, 8, 8))
    assert len(set(found)) == len(found)
    assert set(found) == {Program(*one) for one in expected}


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        # more tokens and rows than a step has: three sizes of prompts, which all rows read, few or all rows that decode
        (300, Sizes((8, 256), (512, 2048, 8192), (128,), (256,))),
        # those above the request's own are for requests that join it
        (1, Sizes((1, 8, 256), (128, 512, 1024, 2048, 4096, 8192), (128,), (8, 256))),
    ],
)
def test_a_job_uses_few_sizes(count: int, expected: Sizes):
    job = Job(any_table=True)
    for _ in range(count):
        job.add(Request((5,) * 500, 20))
    prompts = (64, 128, 256, 512, 1024, 2048, 4096, 8192)
    found = job.sizes(Sizes.of((1, 8, 256), prompts, (8, 32, 128)), 16)
    for name in ("rows", "prompts", "tables", "reading"):
        assert tuple(getattr(found, name)) == getattr(expected, name)


def test_programs_that_read_prompts_have_a_multiple_of_8_rows(world: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    """Whatever the engine's: XLA pads a GPU's products else, and copies what goes in and out of each."""
    shapes, run = [], EngineCore._run

    def spy(self: EngineCore, work: Any, *rest: Any) -> Any:
        if work.prompt is not None:
            shapes.append((work.rows.order.shape[0], work.prompt.tokens.shape[0]))
        return run(self, work, *rest)

    monkeypatch.setattr(EngineCore, "_run", spy)
    model = world["model"]
    engine = EngineCore(model.graph, model.weights, model.config, EngineSize(3, 67, 32, 8))
    for count in (1, 3):
        handles = [engine.submit(model.request([n] * 20, mj.Fixed("cedar"), 4)) for n in range(30, 30 + count)]
        engine.drain()
        assert all(len(h.progress.tokens) == 4 for h in handles)
    assert shapes
    assert {rows for rows, _ in shapes} == {8}
    assert Sizes.of((1, 8, 100), (64,), (8,)).reading == (8, 104)


def test_a_warm_engine_compiles_nothing_whenever_requests_come(world: dict[str, Any]):
    model = world["model"]
    engine = EngineCore(model.graph, model.weights, model.config, EngineSize(3, 67, 32, 8))
    known = model.request(list(range(5, 25)), mj.Fixed("cedar"), 7)
    first = engine.submit(known).wait().tokens
    other = [model.request([n] * 20, mj.Fixed("cedar"), 7) for n in (30, 31, 32)]
    engine.warm(other)
    before = run_steps._cache_size()
    again = engine.submit(known).wait()
    assert again.skipped == 16
    assert again.tokens == first  # read from the cache as it was
    for pause in range(5):
        for one in other:
            engine.submit(one)
            for _ in range(pause):
                engine.step()
        engine.drain()
    assert run_steps._cache_size() == before


@contextlib.contextmanager
def compilations() -> Iterator[list[str]]:
    """The threads in which steps are compiled meanwhile, a name a program."""
    found: list[str] = []

    def heard(event: str, _seconds: float, **what: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration" and what["fun_name"] == "jit(run_steps)":
            found.append(threading.current_thread().name)

    jax.monitoring.register_event_duration_secs_listener(heard)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(heard)


@pytest.mark.parametrize("mesh", [None, (1, 1, 2)])
def test_a_job_compiles_in_threads_and_nothing_twice(
    mesh: tuple[int, int, int] | None, world: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("meteora_jax.engine.engine.platform", lambda: "gpu")  # on a CPU nothing is compiled ahead
    model = world["model"]
    if mesh is not None:
        model = mj.load(world["base"], world["bank"], world["gates"], dtype="float32", mesh=mesh_of(*mesh))
    size = EngineSize(5, 77, 33, 8)  # no other test's
    engine = EngineCore(model.graph, model.weights, model.config, size, mesh=model.mesh, few_programs=True)
    asked = [model.request([n] * 20, mj.Fixed("cedar"), 12) for n in (30, 31, 32)]
    asked[0] = model.request([30] * 20, None, 12)
    with compilations() as threads:
        handles = [engine.submit(request) for request in asked]
        engine.drain()
        wanted = engine._ahead._begun
        assert len(wanted) >= 3
    assert len(threads) == len(wanted)
    assert all(name.startswith("compiler") for name in threads)
    tokens = [handle.progress.tokens for handle in handles]
    with compilations() as threads:
        again = [engine.submit(request) for request in asked]
        engine.drain()
    assert not threads
    assert tokens == [handle.progress.tokens for handle in again]
    alone = EngineCore(model.graph, model.weights, model.config, size, mesh=model.mesh)
    assert tokens[1] == alone.submit(asked[1]).wait().tokens


def test_what_no_thread_has_begun_is_given_up(monkeypatch: pytest.MonkeyPatch):
    """So that an interrupted command ends soon."""
    monkeypatch.setattr("meteora_jax.engine.ahead.THREADS", 1)
    compiler, go, lowered = AheadCompiler(), threading.Event(), []

    def lower(work: Any) -> Any:
        lowered.append(work)
        go.wait(10)
        raise RuntimeError("an error is left to the call that meets it again")

    found = [Program(rows, 0, 8, 1) for rows in (1, 8, 32)]
    compiler.begin(found, Request((5,), 1), (), lambda program: program, lower)  # pyright: ignore[reportArgumentType]
    compiler.stop()
    go.set()
    compiler.wait()
    assert len(lowered) <= 1
