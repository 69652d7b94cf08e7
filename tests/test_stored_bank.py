"""Banks that stay on disk: what is read of them, and what is not."""

from __future__ import annotations

import gc
import mmap
import os
import re
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from adapter_banks import NAMES, random_bank
from safetensors.numpy import save_file

import meteora_jax as mj
from meteora_jax.config import InputError
from meteora_jax.engine.adapter_versions import AdapterVersions
from meteora_jax.io import stored_bank
from meteora_jax.io.bank import load_bank, save_bank
from meteora_jax.io.stored_bank import StoredBank
from meteora_jax.io.tensors import FLOATS, all_finite, map_tensors, read_ahead


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


@pytest.mark.parametrize("dtype", FLOATS.values(), ids=FLOATS)
def test_every_value_that_is_no_finite_number_is_found(dtype: np.dtype):
    numbers = np.random.default_rng(0).standard_normal((3, 4, 5)).astype(dtype)
    numbers[0, 0, :4] = [ml_dtypes.finfo(dtype).max, ml_dtypes.finfo(dtype).min, 0, -0.0]
    for values in (numbers, np.abs(numbers), -np.abs(numbers)):
        assert all_finite(values)
        assert all_finite(values[:, :0])
        for wrong in (np.inf, -np.inf, np.nan, -np.nan):
            spoiled = values.copy()
            spoiled[1, 2, 3] = wrong
            assert not all_finite(spoiled[:, 1:])


def test_a_file_of_any_floating_type_is_mapped(tmp_path: Path):
    """Without a copy, and bit for bit; whole numbers are refused."""
    rng = np.random.default_rng(0)
    right = {name: rng.standard_normal((2, 3, 5)).astype(dtype) for name, dtype in FLOATS.items()}
    save_file(right, tmp_path / "weights.safetensors")
    found = map_tensors(tmp_path / "weights.safetensors")
    assert found.keys() == right.keys()
    for name, value in right.items():
        assert (found[name].dtype, found[name].flags.writeable) == (value.dtype, False)
        np.testing.assert_array_equal(found[name], value)
    save_file({"a": np.ones((2, 2), np.int32)}, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match="a: expected type F64, F32, F16, BF16, found I32"):
        map_tensors(tmp_path / "other.safetensors")


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


def test_all_of_an_adapter_is_asked_for_before_it_is_looked_at(world: dict[str, Any], tmp_path: Path, monkeypatch):
    asked, looked = [], []
    monkeypatch.setattr(stored_bank, "read_ahead", lambda part: asked.append(part))
    monkeypatch.setattr(stored_bank, "all_finite", lambda part: looked.append(len(asked)) or True)
    save_bank(tmp_path / "bank", random_bank(world["model"].config, NAMES, 1))
    one = StoredBank(tmp_path / "bank", world["model"].config, np.float32).adapter(1)
    wanted = [*one.a.values(), *one.b.values(), *one.scale.values()]
    assert len(asked) == len(wanted)
    assert set(looked) == {len(wanted)}
    assert sum(part.nbytes for part in asked) == sum(part.nbytes for part in wanted)


def test_of_a_mapped_part_its_pieces_are_asked_for_and_no_more(tmp_path: Path):
    class Told(mmap.mmap):
        def madvise(self, *given: int) -> None:
            told.append(given)

    told: list[tuple[int, ...]] = []
    values = np.arange(3 * 4 * 5 * 1000, dtype=np.float32)
    (tmp_path / "file").write_bytes(bytes(24) + values.tobytes())
    with (tmp_path / "file").open("rb") as file:
        mapped = Told(file.fileno(), 0, access=mmap.ACCESS_READ)
    whole = np.ndarray(24 + values.nbytes, np.uint8, mapped)[24:].view(np.float32).reshape(3, 4, 5, 1000)
    read_ahead(whole[:, 2:3, :2])
    read_ahead(whole[0, 0, 5:])
    page = mmap.PAGESIZE
    firsts = [24 + 4 * 1000 * (5 * (4 * layer + 2)) for layer in range(3)]
    assert told == [(mmap.MADV_WILLNEED, first - first % page, 8000 + first % page) for first in firsts]
