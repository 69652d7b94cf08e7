"""LLaMA's near family: Mistral, Qwen2 and Qwen3 give transformers' logits and tokens, and return to their folders."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny import VOCAB_SIZE, assert_refused, edit_json, randomize, tiny_tokenizer
from transformers import AutoModelForCausalLM

import converters
import meteora_jax as mj
from meteora_jax.config import read_json
from meteora_jax.io import hf_config

ROWS = [[5, 6, 7, 8, 9, 300, 17], list(range(40, 70))]
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral": ("Mistral", {"sliding_window": None, "head_dim": 16}),
    "mistral_window": ("Mistral", {"sliding_window": 6}),
    "qwen2": ("Qwen2", {}),
    "qwen2_tied": ("Qwen2", {"tie_word_embeddings": True, "rope_theta": 1e6}),
    "qwen2_window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0}),
    "qwen2_window_unused": ("Qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 3}),
    "qwen3": ("Qwen3", {"head_dim": 20}),
    "qwen3_bias": ("Qwen3", {"head_dim": 8, "attention_bias": True, "tie_word_embeddings": True}),
    "qwen3_window": ("Qwen3", {"head_dim": 8, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0}),
}


def tiny_model(tmp_path: Path, name: str, **changes: Any) -> tuple[Any, Path]:
    """A random model of the family, its settings with `changes`, and the folder that it was saved to."""
    family, options = MODELS[name]
    settings: dict[str, Any] = dict(
        vocab_size=VOCAB_SIZE, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, bos_token_id=1, eos_token_id=2, pad_token_id=2,
        tie_word_embeddings=False, attn_implementation="eager",
    )  # fmt: skip
    config = getattr(transformers, f"{family}Config")(**{**settings, **options, **changes})
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    randomize(model, 3)
    model.save_pretrained(tmp_path / name)
    tiny_tokenizer().save_pretrained(tmp_path / name)
    return model, tmp_path / name


def hf_logits(model: torch.nn.Module, row: list[int]) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor([row])).logits[0].numpy()


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_tokens_equal_transformers(tmp_path: Path, name: str):
    hf, folder = tiny_model(tmp_path, name)
    converters.import_base(folder, tmp_path / "base")
    model = mj.load(tmp_path / "base", dtype="float32")
    assert (model.config.sliding_window is not None) == name.endswith("window")
    ours = np.asarray(model.logits(ROWS))
    for row, logits in zip(ROWS, ours, strict=True):
        assert np.abs(logits[: len(row)] - hf_logits(hf, row)).max() <= 1e-4
    for row, done in zip(ROWS, model.generate(ROWS, max_new_tokens=12), strict=True):
        want = hf.generate(torch.tensor([row]), max_new_tokens=12, do_sample=False, pad_token_id=0)
        assert done.token_ids == [t for t in want[0, len(row) :].tolist() if t not in model.config.eos_token_ids]


@pytest.mark.parametrize("name", MODELS)
def test_bases_return_to_folders_of_their_own_kind(tmp_path: Path, name: str):
    hf, folder = tiny_model(tmp_path, name)
    converters.import_base(folder, tmp_path / "base")
    converters.export_base(tmp_path / "base", tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager")
    assert type(again) is type(hf)
    ours, theirs = again.state_dict(), hf.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert np.array_equal(hf_logits(again, ROWS[1]), hf_logits(hf, ROWS[1]))
    configs = [hf_config.from_hf(read_json(tmp_path / f / "config.json")) for f in ("base", "out")]
    assert configs[0] == configs[1]


@pytest.mark.parametrize("name", ["mistral_window", "qwen2", "qwen3"])
def test_adapters_on_the_family_equal_peft_and_merge(tmp_path: Path, name: str):
    hf, folder = tiny_model(tmp_path, name)
    converters.import_base(folder, tmp_path / "base")
    adapted = get_peft_model(hf, LoraConfig(r=3, lora_alpha=5, target_modules="all-linear", task_type="CAUSAL_LM"))
    with torch.no_grad():
        for key, p in adapted.named_parameters():
            if "lora_B" in key:
                p.normal_(generator=torch.Generator().manual_seed(1))
    adapted.save_pretrained(tmp_path / "adapter")
    converters.import_adapters(tmp_path / "bank", tmp_path / "base", {"a": tmp_path / "adapter"})
    want = hf_logits(adapted.eval(), ROWS[0])
    model = mj.load(tmp_path / "base", tmp_path / "bank", dtype="float32")
    assert np.abs(np.asarray(model.logits([ROWS[0]], router=mj.Fixed("a")))[0] - want).max() <= 1e-4
    converters.export_adapter(tmp_path / "bank", "a", tmp_path / "out")
    fresh = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    assert np.array_equal(hf_logits(PeftModel.from_pretrained(fresh, tmp_path / "out"), ROWS[0]), want)
    converters.export_merged(tmp_path / "base", tmp_path / "bank", "a", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", attn_implementation="eager")
    assert np.abs(hf_logits(merged, ROWS[0]) - want).max() <= 1e-4


def test_qwen3_norms_are_of_the_heads(tmp_path: Path):
    hf, folder = tiny_model(tmp_path, "qwen3")
    converters.import_base(folder, tmp_path / "base")
    tensors = load_file(tmp_path / "base" / "weights.safetensors")
    for x in "qk":
        want = torch.stack([getattr(layer.self_attn, f"{x}_norm").weight.detach() for layer in hf.model.layers])
        assert torch.equal(tensors[f"layers.{x}_norm.scale"], want)


@pytest.mark.parametrize(
    ("kind", "changes", "window"),
    [
        ("mistral", {"layer_types": ["full_attention"] * 3}, None),
        ("mistral", {"layer_types": ["sliding_attention"] * 3}, 8),
        ("mistral", {"layer_types": None}, 8),
        ("mistral", {"attention_bias": True}, 8),
        ("qwen2_window", {"sliding_window": None, "layer_types": None}, None),
        ("qwen2_window", {"layer_types": None, "max_window_layers": 0}, 8),
    ],
)
def test_a_window_is_what_transformers_takes_it_for(tmp_path: Path, kind: str, changes: dict[str, Any], window: int):
    _, folder = tiny_model(tmp_path, kind)
    edit_json(folder / "config.json", **{"sliding_window": 8} | changes)
    converters.import_base(folder, tmp_path / "base")
    model = mj.load(tmp_path / "base", dtype="float32")
    assert model.config.sliding_window == window
    tokens = [*range(3, 40)]
    want = hf_logits(AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval(), tokens)
    assert np.abs(np.asarray(model.logits([tokens]))[0] - want).max() <= 1e-4


@pytest.mark.parametrize(("kind", "ends"), [("mistral", (1, (2,))), ("qwen3", (None, ()))])
def test_absent_ends_are_what_the_format_documents(tmp_path: Path, kind: str, ends: Any):
    _, folder = tiny_model(tmp_path, kind)
    (folder / "generation_config.json").unlink(missing_ok=True)
    edit_json(folder / "config.json", bos_token_id=..., eos_token_id=...)
    converters.import_base(folder, tmp_path / "base")
    config = mj.load(tmp_path / "base", dtype="float32").config
    assert (config.bos_token_id, config.eos_token_ids) == ends
    edit_json(folder / "config.json", bos_token_id=None, eos_token_id=None)
    converters.import_base(folder, tmp_path / "none")
    config = mj.load(tmp_path / "none", dtype="float32").config
    assert (config.bos_token_id, config.eos_token_ids) == (None, ())


def test_differences_that_are_not_supported_are_named(tmp_path: Path):
    _, folder = tiny_model(tmp_path, "qwen2_window")
    dest = tmp_path / "base"
    call = partial(converters.import_base, folder, dest)
    good = json.loads((folder / "config.json").read_text())
    for changes, said in (
        ({"layer_types": ["full_attention", "sliding_attention", "full_attention"]}, "the same for every layer"),
        ({"layer_types": ["chunked_attention"] * 3}, "layer_types: expected full_attention or sliding_attention"),
        ({"layer_types": "full_attention"}, "layer_types: expected full_attention or sliding_attention"),
        ({"layer_types": ["full_attention"]}, "layer_types: expected 3 (the layers), found 1"),
        ({"layer_types": ["sliding_attention"] * 3, "use_sliding_window": False}, "expected a window beside"),
        ({"layer_types": ["sliding_attention"] * 3, "sliding_window": None}, "expected a window beside"),
        ({"is_causal": False}, "is_causal: expected true, found False"),
        ({"layer_types": ..., "max_window_layers": 1}, "max_window_layers: expected 0 or at least 3"),
        ({"layer_types": ..., "sliding_window": 0}, "sliding_window: expected a number of at least 1, found 0"),
        ({"num_key_value_heads": ...}, "num_key_value_heads: expected int, found nothing"),
        ({"max_position_embeddings": ...}, "max_position_embeddings: expected int, found nothing"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "found 'yarn'"),
        ({"model_type": "qwen2_moe"}, "model_type: expected llama, mistral, qwen2, qwen3, found 'qwen2_moe'"),
    ):
        edit_json(folder / "config.json", **changes)
        assert_refused(call, dest, said)
        (folder / "config.json").write_text(json.dumps(good))
    edit_json(folder / "config.json", model_type="qwen3", head_dim=12)
    assert_refused(call, dest, "model.layers.0.self_attn.q_norm.weight: expected shape (12,), found no such tensor")
