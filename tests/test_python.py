"""What one meets at a Python prompt: short reprs, words for routers, traces that are left out, warm-up, the cache."""

import dataclasses
import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import meteora_jax as mj
from meteora_jax import compilation_cache, warming
from meteora_jax.cli import main
from meteora_jax.config import InputError
from meteora_jax.engine.step import run_steps
from meteora_jax.routing import NO_ADAPTER

PROMPTS = ["How many apples", "The quick brown fox jumps over the lazy dog"]
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def said(world: dict[str, Any]) -> list[mj.Completion]:
    return world["model"].generate(PROMPTS, max_new_tokens=6)


def test_reprs_fit_a_line_or_two(world: dict[str, Any], said: list[mj.Completion]):
    model = world["model"]
    shown = repr(model)
    for part in ("3 layers", "4 adapters: apple, birch, cedar, daisy", "meteora gates of 4", "float32", "cpu"):
        assert part in shown
    assert str(world["base"]) in shown
    bare = repr(mj.load(world["base"], dtype="float32"))
    assert "0 adapters, float32" in bare
    completion, trace = repr(said[0]), repr(said[0].routing)
    assert completion.startswith(f"Completion({said[0].text[:20]!r}"[:-1])
    assert "finish_reason='" in completion
    assert re.search(r"3 layers, 7 projections, 2 choices: (\w+ \d+%(, |\)$)){1,3}", trace)
    indices = np.asarray([[0, NO_ADAPTER], [NO_ADAPTER, 1]], np.int32).reshape(2, 1, 1, 2)
    weights = np.asarray([[0.25, 0.75], [1, 0]], np.float32).reshape(2, 1, 1, 2)
    own = mj.RoutingTrace(("apple", "birch"), ("q_proj",), ("a", "b"), 2, indices, weights)
    assert repr(own).endswith("2 choices: no adapter 88%, apple 12%)")
    assert repr(dataclasses.replace(own, indices=np.full_like(indices, NO_ADAPTER))).endswith(": no adapter 100%)")
    nothing = dataclasses.replace(own, indices=np.full_like(indices, NO_ADAPTER), weights=0 * weights)
    assert repr(nothing).endswith(": no adapter)")
    index = mj.Index.build({f"adapter{i}": [f"about {i}"] for i in range(28)})
    assert repr(index) == "Index(28 adapters: adapter0, adapter1, adapter2, adapter3 and 24 more; scoring lexical)"
    assert max(map(len, (shown, bare, completion, trace))) < 300


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]):
    assert mj.__version__ == importlib.metadata.version("meteora-jax")
    main(["--version"])
    assert capsys.readouterr().out == f"meteora {mj.__version__}\n"
    for package in ("meteora_jax", "converters", "pallas_kernels"):
        assert (ROOT / package / "py.typed").exists()


def test_words_stand_for_routers(world: dict[str, Any]):
    model, rows = world["model"], [[5, 6, 7], [8, 9]]
    by_gates, bare = model.logits(rows, mj.Gates(2, 1.0)), model.logits(rows, None)
    for word, wanted in (("gates", by_gates), ("gates if loaded", by_gates), ("base", bare)):
        np.testing.assert_array_equal(model.logits(rows, word), wanted)
    mixed = model.logits(rows, ["base", mj.Gates(2, 1.0)])
    np.testing.assert_allclose(mixed[0, :3], bare[0, :3], atol=1e-5)
    alone = mj.load(world["base"], world["bank"], dtype="float32")
    np.testing.assert_array_equal(alone.logits(rows), bare)
    for router, message in (
        ("apple", "found 'apple'; or 'gates', 'base', 'gates if loaded'"),
        (["base", "elm"], "found 'elm'"),
    ):
        with pytest.raises(InputError) as refusal:
            model.logits(rows, router)
        assert message in str(refusal.value)
    with pytest.raises(InputError, match="expected trained gates beside 'gates', found a model loaded without them"):
        alone.logits(rows, "gates")


def test_a_trace_can_be_left_out(world: dict[str, Any], said: list[mj.Completion]):
    model = world["model"]
    without = model.generate(PROMPTS, max_new_tokens=6, routing=False)
    assert [c.token_ids for c in without] == [c.token_ids for c in said]
    assert [c.routing for c in without] == [None, None]
    *_, streamed = model.stream(PROMPTS, max_new_tokens=6, routing=False)
    assert [(c.token_ids, c.routing) for c in streamed] == [(c.token_ids, None) for c in without]


def test_warm_requests_compile_nothing(world: dict[str, Any], capsys: pytest.CaptureFixture[str]):
    model, asked = world["model"], dict(router="gates", max_new_tokens=40, temperature=0.5, routing=False)
    calls: list[tuple[str, int, int]] = []
    took = mj.warm_up(model, [20, 22, 30], [3], progress=lambda *said: calls.append(said), **asked)
    assert [(done, total) for _, done, total in calls] == [(1, 3), (2, 3), (3, 3)]
    assert calls[0][0].startswith("3 x 20 prompt tokens in ")
    assert took > 0
    programs = run_steps._cache_size()
    for length in (17, 32):
        prompts = [list(range(3, 3 + n)) for n in (length, 4, 9)]
        model.generate(prompts, **{**asked, "temperature": 0.9, "seed": 4, "max_new_tokens": 33})
    for most in (35, [33, 3, 20], [4, 40, 2], 2):  # answers end singly, and not together
        model.generate(prompts, **{**asked, "max_new_tokens": most})
    assert run_steps._cache_size() == programs
    mj.warm_up(model, [8], [18], progress=None, router="base", max_new_tokens=24, routing=False)
    programs = run_steps._cache_size()
    model.generate([[5] * 8] * 18, "base", [3] * 16 + [23, 12], routing=False)
    assert run_steps._cache_size() == programs
    warming.print_progress("3 x 24", 1, 2)
    assert capsys.readouterr().err == "warm-up 1/2: 3 x 24\n"
    for options, message in (
        ({"prompt_lengths": [0]}, "warm_up: prompt_lengths: expected at least 1, found 0"),
        ({"batch_sizes": []}, "warm_up: batch_sizes: expected a list of whole numbers, found []"),
        ({"prompt_lengths": [5000]}, "expected at most 192 tokens"),
    ):
        with pytest.raises(InputError) as refusal:
            mj.warm_up(model, **options)
        assert message in str(refusal.value)


def test_where_programs_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert compilation_cache.folder() is None  # tests write nothing into the user's
    monkeypatch.setenv("METEORA_CACHE", str(tmp_path / "given"))
    assert compilation_cache.folder().parent == tmp_path / "given"
    monkeypatch.delenv("METEORA_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert compilation_cache.folder().parent == tmp_path / "meteora_jax"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert compilation_cache.folder().parent == Path.home() / ".cache" / "meteora_jax"
    monkeypatch.setenv("METEORA_CACHE", "/proc/nobody/may")
    of_tests = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    try:
        compilation_cache.use()
        assert jax.config.jax_compilation_cache_dir is None
    finally:
        jax.config.update("jax_compilation_cache_dir", of_tests)


CACHED = """
import sys, warnings
sys.modules["torch"] = None  # begins sooner
import jax, jax.numpy as jnp
import meteora_jax as mj
from meteora_jax import compilation_cache
assert jax.config.jax_compilation_cache_dir is None  # importing switches nothing on
jnp.ones(3) + 1  # a program before the cache is on
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
hits = []
jax.monitoring.register_event_listener(lambda name, **_: hits.append(name))
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    model = mj.load(sys.argv[1], dtype="float32")
    logits = model.logits([[5, 6, 7]])
print(hits.count("/jax/compilation_cache/cache_hits"), sum("Error reading" in str(w.message) for w in said))
print(float(logits.sum()))
"""


def test_the_next_process_reads_what_one_compiled_and_a_torn_file_is_a_miss(tmp_path: Path, world: dict[str, Any]):
    def run() -> tuple[int, int, float]:
        told = [sys.executable, "-c", CACHED, str(world["base"])]
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith("JAX_COMPILATION_CACHE")
        }
        environment["METEORA_CACHE"] = str(tmp_path)
        done = subprocess.run(told, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        (hits, torn), (total,) = (line.split() for line in done.stdout.splitlines()[-2:])
        return int(hits), int(torn), float(total)

    cold = run()
    files = list(compilation_cache_files(tmp_path))
    assert (cold[0], cold[1]) == (0, 0)
    assert files
    torn = files[::2]
    for file in torn:
        file.write_bytes(file.read_bytes()[:-20])
    hits, missed, total = run()
    assert total == cold[2]
    assert 0 < hits <= len(files) - len(torn)
    assert 0 < missed <= len(torn)


def compilation_cache_files(folder: Path) -> list[Path]:
    return [file for file in folder.rglob("*-cache") if file.is_file()]


def test_positionals_are_called_by_what_stands_there(capsys: pytest.CaptureFixture[str]):
    for words, usage in (
        (["bank", "remove"], "usage: meteora bank remove [-h] BANK NAME ..."),
        (["export", "merged"], "usage: meteora export merged [-h] [MERGED OPTIONS] BASE BANK NAME DEST"),
        (["import", "adapters"], "DEST NAME=PEFT_DIR ..."),
    ):
        with pytest.raises(SystemExit):
            main([*words, "--help"])
        said = " ".join(capsys.readouterr().out.split())
        assert usage in said
        assert "{STR}" not in said


def test_the_base_has_no_routing_whoever_shares_its_batch(world: dict[str, Any]):
    model, prompts = world["model"], [[5, 6, 7, 8], [9, 10, 11]]
    base, adapted = model.generate(prompts, router=[None, mj.Fixed("cedar")], max_new_tokens=3)
    assert base.routing is None
    assert adapted.routing is not None
    assert base.token_ids == model.generate(prompts[:1], router=None, max_new_tokens=3)[0].token_ids
