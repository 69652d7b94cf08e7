"""Banks that stay on disk: what is read of them, and what is not."""

from __future__ import annotations

import gc
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
from adapter_banks import NAMES, random_bank

import meteora_jax as mj
from meteora_jax.engine.adapter_versions import AdapterVersions
from meteora_jax.io.bank import load_bank, save_bank
from meteora_jax.io.stored_bank import StoredBank


def test_a_bank_of_a_thousand_is_not_read_into_memory(world: dict[str, Any], tmp_path: Path):
    config = world["model"].config
    names = tuple(f"a{i}" for i in range(1000))
    bank = random_bank(config, names, 1, rank=2)
    save_bank(tmp_path / "bank", bank)
    right = {p: bank.a[p][:, 777].copy() for p in bank.a}
    del bank
    size = (tmp_path / "bank" / "weights.safetensors").stat().st_size
    before = own_bytes()
    stored = StoredBank(tmp_path / "bank", config, np.float32)
    one = stored.adapter(777)
    assert own_bytes() - before < size / 10
    for p, a in right.items():
        rank = one.a[p].shape[2]
        np.testing.assert_array_equal(one.a[p][:, 0], a[:, :rank])
        assert not a[:, rank:].any()
    model = mj.load(world["base"], tmp_path / "bank", dtype="float32", adapter_slots=3)
    assert len(model.adapter_names) == 1000
    assert model.pool.resident() == names[:3]


def own_bytes() -> int:
    """This process's memory but for mapped files, whose pages the system takes back when it likes."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{os.getpid()}/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def test_a_stored_adapter_is_what_the_whole_bank_has(world: dict[str, Any], tmp_path: Path):
    """Of mixed ranks and targets, as an import writes them."""
    config = world["model"].config
    save_bank(tmp_path / "bank", random_bank(config, NAMES, 1))
    for folder in (world["bank"], tmp_path / "bank"):
        whole, stored = load_bank(folder, config, np.float32), StoredBank(folder, config, np.float32)
        for i in range(len(whole.names)):
            one = stored.adapter(i)
            for group in ("qkv", "o", "gate_up", "down"):
                mine, all_of_them = one.group(group), whole.group(group)
                assert all_of_them is not None
                assert mine is not None
                rank = mine["lora_a"].shape[3]
                np.testing.assert_array_equal(mine["lora_a"][:, :, 0], all_of_them["lora_a"][:, :, i, :rank])
                np.testing.assert_array_equal(mine["lora_b"][:, 0], all_of_them["lora_b"][:, i, :rank])
                np.testing.assert_array_equal(mine["lora_scale"][..., 0], all_of_them["lora_scale"][..., i])
                assert not all_of_them["lora_a"][:, :, i, rank:].any()


def test_a_scratch_folder_goes_with_who_knew_it(world: dict[str, Any], tmp_path: Path):
    versions, scratch = AdapterVersions(), tmp_path / "scratch"
    scratch.mkdir()
    stored = StoredBank(world["bank"], world["model"].config, np.float32)
    versions.add("poems", stored, 0, scratch)
    gc.collect()
    assert scratch.exists()
    del versions
    gc.collect()
    assert not scratch.exists()
