"""Embeddings and heads that training changed: a base takes them on request, and the adapter then equals peft's."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from test_converters_ends import ROWS, WEIGHTS, logits_of
from tiny import assert_refused, edit_safetensors, tiny_llama, tiny_peft
from transformers import LlamaForCausalLM

import meteora_jax as mj
from converters import export_adapter, import_adapters, import_base, plan_base
from meteora_jax.cli import main

KEY = "base_model.model.model.embed_tokens.weight"


def write_saved(tmp_path: Path, hf: Path, modules: list[str]) -> tuple[Any, Path]:
    """(peft's model, its folder) of an adapter that retrained whole modules."""
    base = LlamaForCausalLM.from_pretrained(hf, attn_implementation="eager")
    settings: dict[str, Any] = {"r": 3, "target_modules": ["q_proj", "up_proj"], "task_type": "CAUSAL_LM"}
    model = get_peft_model(base, LoraConfig(**settings, modules_to_save=modules)).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name or ".modules_to_save." in name:
                p.copy_(torch.randn(p.shape, generator=generator) / p.shape[-1] ** 0.5)
    model.save_pretrained(tmp_path / "adapter")
    return model, tmp_path / "adapter"


@pytest.mark.parametrize("modules", [["embed_tokens", "lm_head"], ["lm_head"], ["embed_tokens"]], ids=" ".join)
def test_a_base_takes_what_an_adapter_saved(tmp_path: Path, modules: list[str], capsys: pytest.CaptureFixture[str]):
    _, hf = tiny_llama(tmp_path)
    plain, base, bank = tmp_path / "plain", tmp_path / "base", tmp_path / "bank"
    theirs, folder = write_saved(tmp_path, hf, modules)
    import_base(hf, plain)
    refused = "expected the values of the base, found others (a bank has one base: meteora import base SRC DEST --repl"
    assert_refused(lambda: import_adapters(bank, plain, {"a": folder}), bank, refused)
    main(["import", "base", str(hf), str(base), "--replace", str(folder)])
    import_adapters(bank, base, {"a": folder})
    want = logits_of(theirs)
    assert np.abs(np.asarray(mj.load(base, bank, dtype="float32").logits(ROWS, mj.Fixed("a"))) - want).max() <= 1e-4
    before, after = (load_file(f / "weights.safetensors") for f in (plain, base))
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == {{"embed_tokens": "embed.embedding", "lm_head": "lm_head.kernel"}[m] for m in modules}
    sources = json.loads((base / "config.json").read_text())["meteora"]["source"]
    assert WEIGHTS in [s["file"] for s in sources]
    raw = export_adapter(bank, "a", tmp_path / "out")
    assert raw["modules_to_save"] == modules


def test_a_tied_base_takes_the_embedding_once(tmp_path: Path):
    _, hf = tiny_llama(tmp_path, tie_word_embeddings=True)
    edit_safetensors(
        hf / "model.safetensors", lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()})
    )
    folder = tiny_peft(tmp_path, hf, "adapter")
    saved = torch.randn((320, 48), generator=torch.Generator().manual_seed(5))
    edit_safetensors(folder / WEIGHTS, lambda t: t.update({KEY: saved}))
    import_base(hf, tmp_path / "base", replace=folder)
    assert torch.equal(load_file(tmp_path / "base" / "weights.safetensors")["embed.embedding"], saved)
    import_adapters(tmp_path / "bank", tmp_path / "base", {"a": folder})
    _, rows = plan_base(hf, replace=folder)
    assert "lm_head.weight" not in {row.key for row in rows}


def test_what_is_refused(tmp_path: Path):
    _, hf = tiny_llama(tmp_path, tie_word_embeddings=True)
    dest, folder = tmp_path / "base", tiny_peft(tmp_path, hf, "adapter")
    call = lambda: import_base(hf, dest, replace=folder)  # noqa: E731
    assert_refused(call, dest, "expected a saved embedding or head to replace the base's, found neither")
    tensors = load_file(folder / WEIGHTS)
    save_file({**tensors, "base_model.model.lm_head.weight": torch.ones(320, 48)}, folder / WEIGHTS)
    assert_refused(
        call, dest, "expected a saved model.embed_tokens beside lm_head (the base ties them), found the head"
    )
    save_file({**tensors, KEY: torch.ones(322, 48)}, folder / WEIGHTS)
    assert_refused(call, dest, f"{KEY}: expected shape (320, 48) for this base, found (322, 48)")
    save_file({**tensors, KEY: torch.full((320, 48), torch.nan)}, folder / WEIGHTS)
    assert_refused(call, dest, "expected finite values")
    assert_refused(lambda: import_base(hf, dest, replace=tmp_path / "none"), dest, "adapter_config.json")
