"""Whole sequences of more adapters than slots, against a model that has all of them on the device."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest
from adapter_banks import NAMES
from meshes import mesh_of
from test_adapter_pool import banks, fresh  # noqa: F401

import meteora_jax as mj
from meteora_jax.config import InputError


def logits_of(model: mj.Meteora, rows: list[list[int]], routers: list[Any]) -> list[np.ndarray]:
    found = np.asarray(model.logits(rows, routers))
    return [one[: len(row)] for one, row in zip(found, rows, strict=True)]


def test_logits_of_more_adapters_than_slots(banks: dict[str, Any]):  # noqa: F811
    """Rows of eight adapters, of gates and of the base run in parts, and come back in their order."""
    model, whole, rng = fresh(banks), banks["all"], np.random.default_rng(5)
    rows = [rng.integers(3, 300, n).tolist() for n in (9, 4, 16, 7, 12, 5, 11)]
    within = mj.Gates(2, within=(NAMES[7], NAMES[2], NAMES[9]))
    routers = [
        mj.Fixed(NAMES[0]), mj.Fixed({NAMES[4]: 1.0, NAMES[5]: 0.5}), None, mj.Fixed(NAMES[6]), within,
        mj.Fixed(NAMES[8]), mj.Fixed(NAMES[0]),
    ]  # fmt: skip
    found, right = logits_of(model, rows, routers), logits_of(whole, rows, routers)
    for one, other in zip(found, right, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-3)
    bare = logits_of(whole, rows, [None] * 7)
    assert [np.abs(a - b).max() > 0.1 for a, b in zip(found, bare, strict=True)] == [r is not None for r in routers]
    assert model.pool.table.pins == [0, 0, 0]
    model.pool.table.check()


def test_logits_while_answers_hold_the_slots(banks: dict[str, Any]):  # noqa: F811
    """Whoever stopped reading a stream keeps its adapters until it is moved on, which who waits for slots does."""
    model = fresh(banks)
    prompts = [[5, 6, 7], [8, 9], [10, 11, 12]]
    stream = model.stream(prompts, [mj.Fixed(n) for n in NAMES[:3]], max_new_tokens=40)
    next(stream)
    assert sum(model.pool.table.pins) == 3
    (found,) = logits_of(model, [[5, 6, 7, 8]], [mj.Fixed(NAMES[8])])
    np.testing.assert_allclose(found, logits_of(banks["all"], [[5, 6, 7, 8]], [mj.Fixed(NAMES[8])])[0], atol=1e-3)
    said = list(stream)[-1]
    assert isinstance(said, list)
    assert [len(c.token_ids) for c in said] == [40, 40, 40] or all(c.finish_reason for c in said)


def test_adapters_are_added_and_removed(banks: dict[str, Any], world: dict[str, Any]):  # noqa: F811
    """Into the pool, of a PEFT folder or of a bank; nothing of the stored bank is read or written for it."""
    model, row = fresh(banks), [[9, 8, 7, 6, 5]]
    before = sorted((f.name, f.stat().st_mtime_ns) for f in banks["first"].iterdir())
    assert model.add_adapter(world["peft"]["birch"], "birch") is model
    model.add_adapter(world["bank"], "apple").remove_adapter(NAMES[0])
    assert model.adapter_names == (*NAMES[1:], "birch", "apple")
    for name in ("birch", "apple"):
        (found,) = logits_of(model, row, [mj.Fixed(name)])
        (right,) = logits_of(world["model"], row, [mj.Fixed(name)])
        np.testing.assert_allclose(found, right, atol=1e-3)
    with pytest.raises(InputError, match="expected one of"):
        model.logits(row, mj.Fixed(NAMES[0]))
    assert sorted((f.name, f.stat().st_mtime_ns) for f in banks["first"].iterdir()) == before


ROWS = [[5, 6, 7, 8, 9], [300, 17, 4], [40, 41, 7, 7, 7, 2], [11, 12]]


def answers(model: mj.Meteora) -> dict[str, np.ndarray]:
    """Each row by another adapter: logits of all, and tokens."""
    routers = [mj.Fixed(name) for name in model.adapter_names[:4]]
    said = model.generate(ROWS, routers, max_new_tokens=5)
    return {"logits": np.concatenate(logits_of(model, ROWS, routers)), "tokens": np.stack([c.token_ids for c in said])}


def test_slots_on_the_mesh_of_a_host(world: dict[str, Any]):
    model = mj.load(world["base"], world["bank"], mesh=mesh_of(1, 2, 2), dtype="float32", adapter_slots=2)
    found, right = answers(model), answers(world["model"])
    np.testing.assert_allclose(found["logits"], right["logits"], atol=1e-4)
    np.testing.assert_array_equal(found["tokens"], right["tokens"])


def test_slots_over_several_hosts_are_refused(world: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    line = "adapter_slots: expected one process, found 2: over several hosts a bank is on the devices as a whole"
    with pytest.raises(InputError) as refused:
        mj.load(world["base"], world["bank"], adapter_slots=2)
    assert refused.value.problems == (line,)
