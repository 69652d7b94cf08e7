"""Routers by score over slots: what a bank of the resident adapters says, by their matrices or their own gates."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapter_banks import NAMES, random_bank

import meteora_jax as mj
from meteora_jax.bank import AdapterBank
from meteora_jax.config import InputError
from meteora_jax.io.bank import save_bank

SOME = NAMES[:5]
ROWS = [[7 + i, 30, 9 * i + 4, 60, 11] for i in range(4)]


def routers(within: tuple[str, ...] | None) -> list[Any]:
    return [mj.Arrow(2, within=within), mj.Spectr(1, within=within), mj.Lag(1, k=2, within=within),
            mj.Phatgoose(2, within=within)]  # fmt: skip


@pytest.fixture(scope="module")
def models(world: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[mj.Meteora, mj.Meteora, Path]:
    """All of a bank whose adapters have gates of their own, and three slots of it; another adapter's folder."""
    folder, config = tmp_path_factory.mktemp("scored"), world["model"].config
    save_bank(folder / "bank", with_own_gates(random_bank(config, SOME, 1)))
    save_bank(folder / "new", with_own_gates(random_bank(config, SOME[:1], 9)))
    whole = mj.load(world["base"], folder / "bank", dtype="float32")
    return whole, mj.load(world["base"], folder / "bank", dtype="float32", adapter_slots=3), folder / "new"


def with_own_gates(bank: AdapterBank) -> AdapterBank:
    rng = np.random.default_rng(4)
    infos = tuple(dataclasses.replace(info, own_gate=True) for info in bank.config.adapters)
    own = {p: rng.standard_normal((*z.shape[:2], z.shape[3]), np.float32) for p, z in bank.a.items()}
    return dataclasses.replace(bank, config=dataclasses.replace(bank.config, adapters=infos), own_gate=own)


def test_scores_choose_among_what_is_resident_and_what_is_named(
    models: tuple[mj.Meteora, mj.Meteora, Path], monkeypatch: pytest.MonkeyPatch
):
    """The first asks for the spectra of what is there, the last of which come late; later copies bring theirs."""
    whole, slots, _ = models
    assert slots.pool is not None
    copies = slots.pool._copies
    stage, last = copies._stage, slots.pool.versions.find([slots.pool.resident()[-1]])[0].number

    def late(number: int, spectra: bool) -> list[Any]:
        time.sleep(0.5 if number == last else 0)
        return stage(number, spectra)

    monkeypatch.setattr(copies, "_stage", late)
    before = slots.pool.counters.copies
    told = []
    for within in (None, (SOME[4], SOME[0], SOME[3]), SOME[1:4]):
        resident = slots.pool.resident() if within is None else within
        right = np.asarray(whole.logits(ROWS, routers(resident)))
        np.testing.assert_allclose(np.asarray(slots.logits(ROWS, routers(within))), right, rtol=2e-4, atol=2e-4)
        assert set(slots.pool.resident()) == set(resident)
        told.append(right)
    assert slots.pool.counters.copies == before + 3 + 2 + 2  # the three again, then two and two others
    bare = np.asarray(whole.logits(ROWS, None))
    assert all(np.abs(right - bare).max() > 0.1 for right in told)
    assert np.abs(told[0] - told[2]).max() > 0.1


def test_a_new_version_is_scored_by_its_own_matrices(models: tuple[mj.Meteora, mj.Meteora, Path]):
    whole, slots, new = models
    assert slots.pool is not None
    within, asked = SOME[:3], [mj.Arrow(2, within=SOME[:3])] * 4
    old = np.asarray(slots.logits(ROWS, asked))
    np.testing.assert_allclose(old, np.asarray(whole.logits(ROWS, asked)), rtol=2e-4, atol=2e-4)
    assert slots.pool.load(new, SOME[0]) == 2
    assert np.abs(np.asarray(slots.logits(ROWS, asked)) - old).max() > 0.1
    assert set(slots.pool.resident()) == set(within)


def test_an_adapter_of_several_slots_has_no_scores(world: dict[str, Any]):
    model = mj.load(world["base"], world["bank"], dtype="float32", adapter_slots=5, adapter_rank=4)
    with pytest.raises(InputError, match=r"one slot each \(adapter_rank\) to be scored, found Arrow with cedar"):
        model.request([5, 6], mj.Arrow(2), 1)
    model.request([5, 6], mj.Arrow(1, within=("birch", "apple")), 1)
