"""Exports: what leaves loads in peft and transformers with the same values and logits, and returns bit for bit."""

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file
from tiny import assert_refused, edit_safetensors, hf_weights, tiny_llama, tiny_peft
from transformers import AutoTokenizer, LlamaForCausalLM

import meteora_jax as mj
from converters import export_adapter, export_base, export_merged, import_adapters, import_base
from meteora_jax.config import PROJECTIONS

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ROW = [5, 6, 7, 8, 9, 300, 17]
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {
        "rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 6},
        "alpha_pattern": {"v_proj": 3, "up_proj": 1},
    },
    "subset": {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [0, 2]},
    "regex": {"target_modules": r".*layers\.[12]\.(self_attn\.[qk]|mlp\.up)_proj"},
    "all_linear": {"target_modules": "all-linear", "exclude_modules": ["o_proj"]},
    "no alpha": {"lora_alpha": 0},
}


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("export"), attention_bias=True)[1]


@pytest.fixture(scope="module")
def base(hf: Path) -> Path:
    import_base(hf, hf.parent / "base")
    return hf.parent / "base"


@pytest.fixture(scope="module")
def wide(hf: Path) -> Path:
    """A second adapter of a larger rank, so that the bank pads the first."""
    return tiny_peft(hf.parent, hf, "wide", seed=9, r=9)


def hf_logits(model: torch.nn.Module) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor([ROW])).logits[0].numpy()


def peft_logits(hf: Path, adapter: Path) -> np.ndarray:
    model = LlamaForCausalLM.from_pretrained(hf, attn_implementation="eager")
    return hf_logits(PeftModel.from_pretrained(model, adapter))


def our_logits(base: Path, bank: Path, name: str) -> np.ndarray:
    return np.asarray(mj.load(base, bank, dtype="float32").logits([ROW], router=mj.Fixed(name)))[0]


def assert_same_folder(found: Path, expected: Path) -> None:
    """The same settings and, bit for bit and type for type, the same tensors."""
    assert json.loads((found / CONFIG).read_text()) == json.loads((expected / CONFIG).read_text())
    ours, theirs = load_file(found / WEIGHTS), load_file(expected / WEIGHTS)
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert ours[key].dtype == tensor.dtype
        assert torch.equal(ours[key], tensor), key


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match")
@pytest.mark.parametrize("option", OPTIONS)
def test_an_adapter_returns_bit_for_bit(tmp_path: Path, hf: Path, base: Path, wide: Path, option: str):
    adapter = tiny_peft(tmp_path, hf, "in", **OPTIONS[option])
    import_adapters(tmp_path / "bank", base, {"wide": wide, "a": adapter})
    seen = []
    export_adapter(tmp_path / "bank", "a", tmp_path / "out", progress=lambda *step: seen.append(step))
    assert_same_folder(tmp_path / "out", adapter)
    assert len(seen) == len(load_file(adapter / WEIGHTS)) == seen[-1][1] == seen[-1][2]
    expected = peft_logits(hf, adapter)
    assert np.abs(peft_logits(hf, tmp_path / "out") - expected).max() == 0
    assert np.abs(our_logits(base, tmp_path / "bank", "a") - expected).max() <= 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_adapter_keeps_its_own_type(tmp_path: Path, hf: Path, base: Path, wide: Path, dtype: torch.dtype):
    adapter = tiny_peft(tmp_path, hf, "in", dtype=dtype)
    import_adapters(tmp_path / "bank", base, {"a": adapter, "wide": wide})
    export_adapter(tmp_path / "bank", "a", tmp_path / "out")
    assert_same_folder(tmp_path / "out", adapter)


@settings(deadline=None, max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    ranks=st.lists(st.integers(1, 7), min_size=3, max_size=3),
    alphas=st.lists(st.integers(1, 40), min_size=3, max_size=3),
    rslora=st.booleans(),
    targets=st.lists(st.sampled_from(PROJECTIONS), min_size=1, unique=True),
)
@pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match")
def test_settings_are_derived_where_there_were_none(
    tmp_path_factory: pytest.TempPathFactory, hf: Path, base: Path, wide: Path, ranks, alphas, rslora, targets
):
    """peft computes the same from settings that were read off the tensors alone."""
    folder = tmp_path_factory.mktemp("derived")
    adapter = tiny_peft(
        folder, hf, "in", r=ranks[0], lora_alpha=alphas[0], use_rslora=rslora, target_modules=targets,
        rank_pattern={"layers.1.*": ranks[1], "q_proj": ranks[2]},
        alpha_pattern={"layers.2.*": alphas[1], "q_proj": alphas[2]},
    )  # fmt: skip
    import_adapters(folder / "bank", base, {"a": adapter, "wide": wide})
    bank = json.loads((folder / "bank" / "bank.json").read_text())
    bank["adapters"][0]["peft_config"] = {}
    (folder / "bank" / "bank.json").write_text(json.dumps(bank))
    export_adapter(folder / "bank", "a", folder / "out")
    ours, theirs = load_file(folder / "out" / WEIGHTS), load_file(adapter / WEIGHTS)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)
    assert np.abs(peft_logits(hf, folder / "out") - peft_logits(hf, adapter)).max() <= 2e-5
    # and the derived settings are read back: bank -> PEFT -> bank
    import_adapters(folder / "again", base, {"a": folder / "out", "wide": wide})
    first, again = (load_file(folder / b / "weights.safetensors") for b in ("bank", "again"))
    assert first.keys() == again.keys()
    assert all(torch.equal(first[k], again[k]) for k in first)


def test_a_bank_that_contradicts_itself_is_refused(tmp_path: Path, hf: Path, base: Path):
    adapter = tiny_peft(tmp_path, hf, "in", target_modules=["q_proj", "v_proj"])
    bank, dest = tmp_path / "bank", tmp_path / "out"
    import_adapters(bank, base, {"a": adapter})
    assert_refused(lambda: export_adapter(bank, "b", dest), dest, "bank.json: adapters: expected one of a, found 'b'")
    good = (bank / "bank.json").read_text()
    for change, said in {
        "lora_alpha": (9, "expected scale 2.0, found 2.25"),
        "r": (3, "expected rank 4 to 4 (the tensors'), found 3"),
        "target_modules": (["q_proj"], "expected model.layers.0.self_attn.v_proj among them"),
        "use_mirrors": (True, "use_mirrors: expected no such setting"),
    }.items():
        description = json.loads(good)
        description["adapters"][0]["peft_config"][change] = said[0]
        (bank / "bank.json").write_text(json.dumps(description))
        assert_refused(lambda: export_adapter(bank, "a", dest), dest, "bank.json: a: peft_config", said[1])
    description = json.loads(good)
    description["adapters"][0]["dtype"] = "BF16"
    (bank / "bank.json").write_text(json.dumps(description))
    assert_refused(lambda: export_adapter(bank, "a", dest), dest, "dtype: expected one that holds", "found BF16")
    (bank / "bank.json").write_text(good)
    edit_safetensors(bank / "weights.safetensors", lambda t: t.pop("q_proj.scale"))
    assert_refused(lambda: export_adapter(bank, "a", dest), dest, "q_proj.scale: expected shape (3, 1), found no such")


@pytest.mark.parametrize("shard_bytes", [10**9, 30_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_base_returns_bit_for_bit(tmp_path: Path, dtype: torch.dtype, shard_bytes: int):
    model, folder = tiny_llama(tmp_path, dtype=dtype, attention_bias=True, tie_word_embeddings=True)
    import_base(folder, tmp_path / "base")
    export_base(tmp_path / "base", tmp_path / "out", shard_bytes=shard_bytes)
    assert (tmp_path / "out" / "model.safetensors.index.json").exists() == (shard_bytes < 10**9)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager")
    assert loaded.dtype == dtype
    ours, theirs = hf_weights(loaded), hf_weights(model)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[path], theirs[path]) for path in theirs)
    if dtype == torch.float32:
        assert np.array_equal(hf_logits(loaded), hf_logits(model))
    tokenizers = [AutoTokenizer.from_pretrained(f) for f in (folder, tmp_path / "out")]
    assert tokenizers[0]("24 foxes")["input_ids"] == tokenizers[1]("24 foxes")["input_ids"]
    import_base(tmp_path / "out", tmp_path / "again")
    first, again = (load_file(tmp_path / b / "weights.safetensors") for b in ("base", "again"))
    assert all(torch.equal(first[path], again[path]) for path in first)


@pytest.mark.parametrize("shard_bytes", [10**9, 30_000])
@pytest.mark.parametrize("option", ["patterns", "subset"])
@pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match")
def test_a_merged_folder_equals_peft(tmp_path: Path, hf: Path, base: Path, wide: Path, option: str, shard_bytes: int):
    adapter = tiny_peft(tmp_path, hf, "in", **OPTIONS[option])
    import_adapters(tmp_path / "bank", base, {"wide": wide, "a": adapter})
    export_merged(base, tmp_path / "bank", "a", tmp_path / "out", shard_bytes=shard_bytes)
    merged = LlamaForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager")
    assert np.abs(hf_logits(merged) - peft_logits(hf, adapter)).max() <= 1e-4
    theirs = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(hf), adapter).merge_and_unload().state_dict()
    ours = merged.state_dict()
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        torch.testing.assert_close(ours[key], tensor, rtol=0, atol=1e-6)


def test_a_half_precision_base_is_merged_in_float32_and_rounded_once(tmp_path: Path):
    _, folder = tiny_llama(tmp_path, dtype=torch.bfloat16)
    adapter = tiny_peft(tmp_path, folder, "in")
    import_base(folder, tmp_path / "base")
    import_adapters(tmp_path / "bank", tmp_path / "base", {"a": adapter})
    export_merged(tmp_path / "base", tmp_path / "bank", "a", tmp_path / "out")
    before, after = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "out"))
    lora = load_file(adapter / WEIGHTS)
    for key in ("self_attn.k_proj", "mlp.down_proj"):
        name = f"model.layers.1.{key}"
        a, b = (lora[f"base_model.model.{name}.lora_{half}.weight"].double() for half in "AB")
        exact = before[f"{name}.weight"].double() + 2 * b @ a
        assert after[f"{name}.weight"].dtype == torch.bfloat16
        rounding = (after[f"{name}.weight"].double() - exact).abs() / exact.abs()
        assert rounding.max() <= 2**-8


def test_merging_into_another_base_is_refused(tmp_path: Path, hf: Path, base: Path, wide: Path):
    import_adapters(tmp_path / "bank", base, {"wide": wide})
    dest = tmp_path / "out"
    for name, sizes, said in (
        ("shallow", {"num_hidden_layers": 2}, "num_layers: expected 2 (the base's), found 3"),
        ("narrow", {"intermediate_size": 64}, "base_shapes.down_proj: expected (64, 48) (the base's), found (80, 48)"),
    ):
        _, folder = tiny_llama(tmp_path, folder=name, **sizes)
        import_base(folder, tmp_path / f"{name}-base")
        call = partial(export_merged, tmp_path / f"{name}-base", tmp_path / "bank", "wide", dest)
        assert_refused(call, dest, said)
    assert_refused(lambda: export_merged(base, tmp_path / "bank", "no", dest), dest, "found 'no'")
    call = partial(export_merged, base, tmp_path / "bank", "wide", base, overwrite=True)
    assert_refused(call, dest, "expected a destination apart from its source")
    shutil.copytree(base, tmp_path / "cut")
    weights = tmp_path / "cut" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    assert_refused(lambda: export_base(tmp_path / "cut", dest), dest, "weights.safetensors", "(truncated?)")


def test_sums_that_the_type_cannot_hold_are_refused(tmp_path: Path):
    _, folder = tiny_llama(tmp_path, dtype=torch.float16)
    adapter = tiny_peft(tmp_path, folder, "in", lora_alpha=10**8)
    import_base(folder, tmp_path / "base")
    import_adapters(tmp_path / "bank", tmp_path / "base", {"a": adapter})
    dest = tmp_path / "out"
    call = partial(export_merged, tmp_path / "base", tmp_path / "bank", "a", dest)
    assert_refused(call, dest, "layers.q_proj.kernel: expected values that float16 can hold")


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], hf: Path, base: Path, wide: Path):
    from meteora_jax.cli import main

    bank = tmp_path / "bank"
    import_adapters(bank, base, {"wide": wide})
    for i, words in enumerate((["adapter", bank, "wide"], ["merged", base, bank, "wide"], ["base", base])):
        report = tmp_path / f"{i}.json"
        main(["export", *map(str, words), str(tmp_path / f"out{i}"), "--json", str(report)])
        assert json.loads(report.read_text())
    assert "rank 9" in capsys.readouterr().out
    assert_same_folder(tmp_path / "out0", wide)
    assert (tmp_path / "out1" / "model.safetensors").exists()
    with pytest.raises(SystemExit) as status:
        main(["export", "adapter", str(bank), "nobody", str(tmp_path / "out3")])
    assert status.value.code == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")
    assert not (tmp_path / "out3").exists()
