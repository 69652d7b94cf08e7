"""Several engines on one pool's slots: nobody waits for a request that nobody reads."""

from __future__ import annotations

import gc
import threading
from pathlib import Path
from typing import Any

import pytest
from adapter_banks import NAMES, random_bank, rows_of

import meteora_jax as mj
from meteora_jax.completion import Delta
from meteora_jax.engine import EngineCore, Handle
from meteora_jax.io.bank import save_bank

PROMPT = [30, 31]  # nobody ends its response early


@pytest.fixture(scope="module")
def bank(world: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bank") / "bank"
    save_bank(folder, random_bank(world["model"].config, NAMES[:3], 1))
    return folder


def one_slot(world: dict[str, Any], bank: Path) -> mj.Meteora:
    return mj.load(world["base"], bank, dtype="float32", adapter_slots=1)


def ask(engine: EngineCore, model: mj.Meteora, name: str, tokens: int = 6) -> Handle:
    return engine.submit(model.request(PROMPT, mj.Fixed(name), tokens))


def within(seconds: float, call: Any) -> Any:
    """What a call returns; it fails where the call takes longer, as one that waits for ever does."""
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(call()), daemon=True)
    thread.start()
    thread.join(seconds)
    assert found, "still waits"
    return found[0]


def test_a_call_passes_a_stream_that_nobody_reads(world: dict[str, Any], bank: Path):
    """The many prompts get an engine of their own, and the stream's holds the only slot."""
    model = one_slot(world, bank)
    (whole,) = model.generate([PROMPT], mj.Fixed(NAMES[0]), max_new_tokens=40)
    unread = model.stream([PROMPT], mj.Fixed(NAMES[0]), max_new_tokens=40)
    text = next(unread).text
    assert model.pool is not None
    assert model.pool.table.pins == [1]
    prompts = [PROMPT] * 80
    found = within(60, lambda: model.generate(prompts, mj.Fixed(NAMES[1]), max_new_tokens=30))
    assert {f.text for f in found} == {model.generate([PROMPT], mj.Fixed(NAMES[1]), max_new_tokens=30)[0].text}
    assert text + "".join(d.text for d in unread if isinstance(d, Delta)) == whole.text


def test_sequences_pass_it_too(world: dict[str, Any], bank: Path):
    model = one_slot(world, bank)
    expected = model.logits([PROMPT], mj.Fixed(NAMES[1]))
    unread = model.stream([PROMPT], mj.Fixed(NAMES[0]), max_new_tokens=40)
    next(unread)
    assert model.pool is not None
    assert model.pool.table.pins == [1]
    found = within(60, lambda: model.logits([PROMPT], mj.Fixed(NAMES[1])))
    assert (found == expected).all()


def test_an_engine_moves_on_those_who_hold_the_slots(world: dict[str, Any], bank: Path):
    model = one_slot(world, bank)
    engine, other = rows_of(model), rows_of(model)
    expected = ask(engine, model, NAMES[0], 20).wait().tokens
    unread = ask(engine, model, NAMES[0], 20)
    engine.step()
    assert not unread.done
    within(60, ask(other, model, NAMES[1]).wait)
    assert unread.wait().tokens == expected


def test_the_slots_of_an_engine_that_is_gone_are_free(world: dict[str, Any], bank: Path):
    model = one_slot(world, bank)
    assert model.pool is not None
    engine, other = rows_of(model), rows_of(model)
    ask(engine, model, NAMES[0], 20)
    engine.step()
    assert model.pool.table.pins == [1]
    del engine
    gc.collect()
    within(60, ask(other, model, NAMES[1]).wait)
    assert model.pool.table.pins == [0]
    model.pool.unload(NAMES[0])
    assert model.pool.versions.find([NAMES[0]]) == []  # its request counts no more


def test_who_waits_is_not_hurt_by_another_engine_s_fault(
    world: dict[str, Any], bank: Path, monkeypatch: pytest.MonkeyPatch
):
    model = one_slot(world, bank)
    engine, other = rows_of(model), rows_of(model)
    unread = ask(engine, model, NAMES[0], 20)
    engine.step()

    def broken(*_: Any) -> None:
        raise RuntimeError("no device")

    monkeypatch.setattr(engine, "_dispatch", broken)
    within(60, ask(other, model, NAMES[1]).wait)
    with pytest.raises(RuntimeError, match="the engine has failed"):
        unread.wait()


def test_an_engine_that_a_thread_moves_is_left_to_it(world: dict[str, Any], bank: Path):
    model = one_slot(world, bank)
    engine, other = rows_of(model), rows_of(model)
    held = ask(engine, model, NAMES[0], 20)
    engine.step()
    began, go = threading.Event(), threading.Event()

    def own() -> None:
        with engine._lock:
            began.set()
            go.wait(60)

    thread = threading.Thread(target=own)
    thread.start()
    began.wait(60)
    waits = ask(other, model, NAMES[1])
    for _ in range(3):  # returns, with nothing done
        assert other.step()
    assert not held.done
    assert not waits.done
    go.set()
    thread.join()
    within(60, waits.wait)
    assert held.done
