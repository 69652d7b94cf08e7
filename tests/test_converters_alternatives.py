"""What people's folders hold twice or in another spelling: the choice is transformers' or peft's, and is said."""

import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny import assert_refused, edit_json, edit_safetensors, tiny_llama, tiny_peft
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import meteora_jax as mj
from converters import import_adapters, import_base
from meteora_jax.cli import main
from meteora_jax.config import InputError, read_json
from meteora_jax.io import hf_config

ROWS = [[5, 6, 7, 8, 9, 300, 17, 3, 250, 77, 12, 40]]
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip


def theirs(model: Any) -> np.ndarray:
    with torch.no_grad():
        return model.eval()(torch.tensor(ROWS)).logits.float().numpy()


def ours(base: Path, bank: Path | None = None) -> np.ndarray:
    return np.asarray(mj.load(base, bank, dtype="float32").logits(ROWS, router=mj.Fixed("a") if bank else None))


def assert_base_equals_transformers(folder: Path, base: Path, **options: Any) -> None:
    import_base(folder, base, **options)
    want = theirs(AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager"))
    assert np.abs(ours(base) - want).max() <= 1e-4


@pytest.mark.parametrize(
    "settings",
    [
        {"rope_scaling": {"rope_type": "default", "rope_theta": 500000.0}},
        {"rope_scaling": LLAMA3},
        {"rope_scaling": {"type": "linear", "factor": 4.0, "rope_theta": 70000.0}},
        {"rope_parameters": LLAMA3},
        {"rope_theta": 500000.0, "rope_scaling": {k: v for k, v in LLAMA3.items() if k != "rope_theta"}},
        {"rope_theta": 500000, "rope_scaling": LLAMA3, "rope_parameters": LLAMA3},
        {"rope_scaling": {k: v for k, v in LLAMA3.items() if "original" not in k}},
        {"rope_theta": 300000.0, "rope_scaling": None, "rope_parameters": {}},
        {},
    ],
    ids=range(9),
)
def test_theta_comes_from_whichever_place_holds_it(tmp_path: Path, settings: dict[str, Any]):
    _, folder = tiny_llama(tmp_path, num_hidden_layers=2)
    edit_json(folder / "config.json", **{"rope_parameters": ..., "rope_scaling": ..., "rope_theta": ..., **settings})
    assert_base_equals_transformers(folder, tmp_path / "base")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"rope_theta": 10000.0, "rope_scaling": LLAMA3}, "rope_scaling.rope_theta: expected 10000.0 as in rope_theta"),
        ({"rope_scaling": LLAMA3, "rope_parameters": {**LLAMA3, "factor": 32.0}},
         "rope_scaling.factor: expected 32.0 as in rope_parameters.factor, found 8.0"),
        ({"rope_scaling": LLAMA3, "rope_parameters": {**LLAMA3, "high_freq_factor": 2.0}},
         "rope_scaling.high_freq_factor"),
        ({"rope_scaling": LLAMA3, "original_max_position_embeddings": 64},
         "rope_scaling.original_max_position_embeddings: expected 64 as in original_max_position_embeddings, found 32"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}, "rope_parameters": {"rope_type": "default"}},
         "rope_scaling.type: expected 'default' as in rope_parameters.rope_type, found 'yarn'"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}},
         "rope_parameters.sliding_attention.rope_theta: expected 1000000.0 as in rope_parameters.full_attention"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
         "expected 1 (whole heads), found 0.5"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 64}},
         "original_max_position_embeddings: expected max_position_embeddings, 256, beside dynamic scaling, found 64"),
    ],
)  # fmt: skip
def test_two_places_that_say_different_things_are_both_named(tmp_path: Path, settings: dict[str, Any], said: str):
    _, folder = tiny_llama(tmp_path, num_hidden_layers=1)
    edit_json(folder / "config.json", **{"rope_parameters": ..., "rope_scaling": ..., "rope_theta": ..., **settings})
    assert_refused(lambda: import_base(folder, tmp_path / "base"), tmp_path / "base", said)


def test_one_kind_of_layer_may_have_its_own_dict(tmp_path: Path):
    _, folder = tiny_llama(tmp_path, num_hidden_layers=1)
    edit_json(folder / "config.json", rope_theta=..., rope_parameters={"full_attention": LLAMA3})
    config = hf_config.from_hf(read_json(folder / "config.json"))
    assert config.rope_theta == 500000.0
    assert config.rope_scaling is not None
    assert config.rope_scaling.factor == 8.0


def test_a_head_of_its_own_unties(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    _, folder = tiny_llama(tmp_path, tie_word_embeddings=True)
    head = torch.randn(320, 48, generator=torch.Generator().manual_seed(4))
    edit_safetensors(folder / "model.safetensors", lambda t: t.update({"lm_head.weight": head}))
    lines: list[str] = []
    assert_base_equals_transformers(folder, tmp_path / "base", on_remark=lines.append)
    assert lines == [
        "model.safetensors: lm_head.weight: differs from model.embed_tokens.weight, so the head is its own although "
        "config.json ties the two"
    ]
    assert read_json(tmp_path / "base" / "config.json")["tie_word_embeddings"] is False
    main(["import", "base", str(folder), str(tmp_path / "told"), "--dry-run"])
    assert "so the head is its own" in capsys.readouterr().err


def test_one_file_before_shards_and_safetensors_before_pickles(tmp_path: Path):
    _, folder = tiny_llama(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(tensors, "model.safetensors")}
    (folder / "model.safetensors.index.json").write_text(str(index).replace("'", '"'))
    lines: list[str] = []
    assert_base_equals_transformers(folder, tmp_path / "listed", on_remark=lines.append)
    assert lines == []
    index["weight_map"] = dict.fromkeys(tensors, "model-00001-of-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text(str(index).replace("'", '"'))
    save_file({k: t + 1 for k, t in tensors.items()}, folder / "model-00001-of-00001.safetensors", {"format": "pt"})
    torch.save({k: t + 2 for k, t in tensors.items()}, folder / "pytorch_model.bin")
    assert_base_equals_transformers(folder, tmp_path / "all", on_remark=lines.append)
    assert lines == [f"{folder}: model.safetensors is read, not model.safetensors.index.json or pytorch_model.bin"]
    (folder / "model.safetensors").unlink()
    assert_base_equals_transformers(folder, tmp_path / "shards", on_remark=lines.append)
    assert lines[1:] == [f"{folder}: model.safetensors.index.json is read, not pytorch_model.bin"]


def test_derived_buffers_of_any_spelling_are_dropped(tmp_path: Path):
    _, folder = tiny_llama(tmp_path, num_hidden_layers=2)
    layer = "model.layers.1.self_attn.rotary_emb"
    names = [f"{layer}.{buffer}" for buffer in ("inv_freq", "cos_cached", "sin_cached")]
    names += ["model.rotary_emb.inv_freq", "model.rotary_emb.original_inv_freq", "rotary_emb.cos_sin_cache"]
    edit_safetensors(folder / "model.safetensors", lambda t: t.update({n: torch.ones(6, 2).double() for n in names}))
    assert_base_equals_transformers(folder, tmp_path / "base")
    edit_safetensors(folder / "model.safetensors", lambda t: t.update({f"{layer}.weight": torch.ones(6)}))
    assert_refused(lambda: import_base(folder, tmp_path / "no"), tmp_path / "no", f"{layer}.weight: expected no such")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(Hugging Face folder, BASE)."""
    folder = tmp_path_factory.mktemp("alternatives")
    _, hf = tiny_llama(folder, num_hidden_layers=2)
    import_base(hf, folder / "base")
    return hf, folder / "base"


def peft_logits(hf: Path, adapter: Path) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = LlamaForCausalLM.from_pretrained(hf, attn_implementation="eager")
        return theirs(PeftModel.from_pretrained(model, adapter))


def test_an_adapter_in_both_formats_is_read_as_peft_does(tmp_path: Path, base: tuple[Path, Path]):
    hf, ours_base = base
    folder = tiny_peft(tmp_path, hf, "adapter")
    tensors = load_file(folder / "adapter_model.safetensors")
    torch.save({k: t + 1 for k, t in tensors.items()}, folder / "adapter_model.bin")
    lines: list[str] = []
    import_adapters(tmp_path / "bank", ours_base, {"a": folder}, on_remark=lines.append)
    assert lines == ["a: adapter_model.safetensors is read, not adapter_model.bin"]
    assert np.abs(ours(ours_base, tmp_path / "bank") - peft_logits(hf, folder)).max() <= 1e-4


def test_null_is_off(tmp_path: Path, base: tuple[Path, Path]):
    hf, ours_base = base
    folder = tiny_peft(tmp_path, hf, "adapter", target_modules=["q_proj"])
    off = [k for k, v in read_json(folder / "adapter_config.json").items() if v in (False, [], {}) or v == "none"]
    assert {"use_dora", "use_rslora", "fan_in_fan_out", "lora_bias", "bias", "use_qalora"} <= set(off)
    edit_json(folder / "adapter_config.json", **dict.fromkeys(off))
    import_adapters(tmp_path / "bank", ours_base, {"a": folder})
    plain = tiny_peft(tmp_path, hf, "plain", target_modules=["q_proj"])
    assert np.abs(ours(ours_base, tmp_path / "bank") - peft_logits(hf, plain)).max() <= 1e-4
    copy = tmp_path / "hf"
    shutil.copytree(hf, copy)
    edit_json(copy / "config.json", tie_word_embeddings=None, attention_bias=None, mlp_bias=None)
    assert hf_config.from_hf(read_json(copy / "config.json")) == hf_config.from_hf(read_json(hf / "config.json"))
    raw = {**read_json(hf / "config.json"), "model_type": "mistral", "num_key_value_heads": None}
    assert hf_config.from_hf(raw).num_kv_heads == raw["num_attention_heads"]
    edit_json(folder / "adapter_config.json", use_dora="no")
    with pytest.raises(InputError, match="use_dora: expected true or false, found 'no'"):
        import_adapters(tmp_path / "never", ours_base, {"a": folder})
