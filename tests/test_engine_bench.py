"""scripts/bench_engine.py, bench_pool.py, bench_serve.py and bench_schedule.py on a CPU, at a tiny shape."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from meteora_jax.engine.ahead import AheadCompiler

SCRIPTS = Path(__file__).parents[1] / "scripts"


def run(script: str, *arguments: str) -> str:
    command = [sys.executable, str(SCRIPTS / script), *arguments]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(SCRIPTS.parent), "COLUMNS": "200"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def records(folder: Path, script: str, *arguments: str) -> list[dict[str, Any]]:
    file = folder / "records.json"
    run(script, "--shape", "tiny", "--json", str(file), *arguments)
    return json.loads(file.read_text(encoding="utf-8"))


def test_a_schedule_is_priced_without_a_device():
    said = run("bench_schedule.py", "--requests", "20", "--rows", "8")
    (dispatches, steps), (few,) = (
        [int(n) for n in re.search(pattern, said).groups()]  # pyright: ignore[reportOptionalMemberAccess]
        for pattern in (r"; (\d+) dispatches, (\d+) steps", r"in (\d+) steps, \d+ tokens padded")
    )
    assert few < dispatches < steps
    assert "first tokens: mean" in said


@pytest.mark.exhaustive("runs a benchmark")
def test_steps_and_requests_bare_and_by_gates(tmp_path: Path):
    options = ["--rows", "2", "--prompt", "16", "--new", "4", "--gates", "token-router", "--kinds", "bare", "gates"]
    found = records(tmp_path, "bench_engine.py", *options, "--requests", "3", "--layers", "1")
    assert [(r["what"], r["kind"]) for r in found] == [(w, k) for w in ("rows", "requests") for k in ("bare", "gates")]
    assert all(r["step_ms"] > 0 and r["prompts_ms"] > 0 for r in found[:2])
    assert all(r["tokens_per_s"] > 0 and r["new_tokens"] == found[2]["new_tokens"] for r in found[2:])


@pytest.mark.exhaustive("runs a benchmark")
@pytest.mark.parametrize("stored", [False, True])
def test_more_adapters_than_slots_compile_nothing_while_they_are_timed(tmp_path: Path, stored: bool):
    options = ["--adapters", "6", "--slots", "2", "--rank", "2", "--batch", "2", "--prompt", "16", "--new", "4"]
    options += ["--requests", "8", "--zipf", "1.0", "--kinds", "bare", "slots", "--layers", "1"]
    found = records(tmp_path, "bench_pool.py", *options, *(["--folder", str(tmp_path / "banks")] if stored else []))
    assert [r["kind"] for r in found] == ["bare", "slots"]
    assert [r["compiled"] for r in found] == [0, 0]
    assert found[1]["misses"] > 0
    assert ("disk_ms" in found[1]) == stored


@pytest.mark.exhaustive("runs a benchmark")
def test_http_beside_the_engine_alone(tmp_path: Path):
    options = ["--users", "2", "--prompt", "16", "--new", "8", "--requests", "2", "--layers", "1"]
    found = records(tmp_path, "bench_serve.py", *options)
    assert [r["what"] for r in found] == ["engine", "http"]
    assert found[0]["tokens"] == found[1]["tokens"] > 0


@pytest.mark.exhaustive("runs a benchmark")
def test_what_is_compiled_before_the_rounds_is_what_they_meet(monkeypatch):
    """Each program once, of steps of one request, of several, and of requests of all lengths."""
    monkeypatch.syspath_prepend(SCRIPTS)
    bench_engine = importlib.import_module("bench_engine")
    begun, met, run_it = [set()], [set()], bench_engine.EngineCore._run

    def begin(self: Any, programs: Any, *rest: Any) -> None:
        begun.append(set(programs))
        met.append(set())

    def note(self: Any, work: Any, *rest: Any) -> Any:
        prompt = 0 if work.prompt is None else len(work.prompt.tokens)
        met[-1].add(bench_engine.Program(*work.rows.tables.shape[:1], prompt, work.rows.tables.shape[1], work.steps))
        return run_it(self, work, *rest)

    monkeypatch.setattr(AheadCompiler, "begin", begin)
    monkeypatch.setattr(bench_engine.EngineCore, "_run", note)
    settings = bench_engine.BenchEngine(
        "tiny",
        rows=(1, 4),
        prompt=32,
        new=24,
        budget=128,
        requests=24,
        gates=("token-router",),
        kinds=("bare",),
        layers=1,
    )
    bench_engine.main(settings)
    assert begun[1:] == met[1:]
    assert [len(programs) for programs in begun[1:]] == [2, 2, 5]
