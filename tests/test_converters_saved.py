"""Embeddings and heads that training changed: a base takes them on request, and the adapter then equals peft's."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_converters_vocab import ROWS, WEIGHTS, logits_of
from tiny import assert_refused, edit_safetensors, tiny_llama, tiny_peft
from transformers import AutoTokenizer, LlamaForCausalLM

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


KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "embedding": {"modules_to_save": ["embed_tokens"]},
    "head": {"modules_to_save": ["lm_head"]},
    "both": {"modules_to_save": ["model.embed_tokens", "lm_head"]},
    "both tied": {"modules_to_save": ["embed_tokens", "lm_head"], "ensure_weight_tying": True},
    "tokens": {"trainable_token_indices": [318, 319]},
    "tokens of both": {"trainable_token_indices": {"embed_tokens": [318], "lm_head": [319]}},
    "LoRA of the embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "LoRA of the head": {"target_modules": ["q_proj", "lm_head"]},
}


def changed(base: LlamaForCausalLM, kind: str) -> Any:
    """peft's model of an adapter of that kind, everything that it trains random."""
    settings: dict[str, Any] = {"r": 3, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **KINDS[kind]}
    model = get_peft_model(base, LoraConfig(**settings)).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.2)
    return model


PEFT_TALKS = pytest.mark.filterwarnings(
    "ignore:Model has `tie_word_embeddings=True`",
    "ignore:Setting `save_embedding_layers`",
    "ignore:You have requested `ensure_weight_tying`",
)
LOST = {("untied", "LoRA of the embedding"), ("untied", "LoRA of the head")}  # peft saves one end of two that changed


@PEFT_TALKS
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", ["tied", "untied"])
def test_a_resized_vocabulary_comes_from_the_adapters_folder(tmp_path: Path, kind: str, tied: str):
    """What peft writes after `resize_token_embeddings`, for every choice of ends; the tokenizer comes along."""
    _, hf = tiny_llama(tmp_path, num_hidden_layers=1, tie_word_embeddings=tied == "tied")
    torch.manual_seed(0)
    resized = LlamaForCausalLM.from_pretrained(hf, attn_implementation="eager")
    resized.resize_token_embeddings(323)
    model = changed(resized, kind)
    folder, base, bank = tmp_path / "adapter", tmp_path / "base", tmp_path / "bank"
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(hf)
    tokenizer.add_tokens(["<tool>", "</tool>"], special_tokens=True)
    tokenizer.add_special_tokens({"eos_token": "<|stop|>"})
    tokenizer.save_pretrained(folder)
    (hf / "generation_config.json").write_text('{"eos_token_id": 2}')
    if (tied, kind) in LOST:
        assert_refused(
            lambda: import_base(hf, base, replace=folder),
            base,
            "expected 323 rows",
            "found 320 (the base's; the adapter",
        )
        return
    lines: list[str] = []
    import_base(hf, base, replace=folder, on_remark=lines.append)
    import_adapters(bank, base, {"a": folder})
    rows = [[5, 17, 320, 321, 322, 319, 12]]
    with torch.no_grad():
        want = model(torch.tensor(rows)).logits.numpy()
    assert np.abs(np.asarray(mj.load(base, bank, dtype="float32").logits(rows, mj.Fixed("a"))) - want).max() <= 1e-4
    found = AutoTokenizer.from_pretrained(base)("a <tool>b</tool><|stop|>")["input_ids"]
    assert found == tokenizer("a <tool>b</tool><|stop|>")["input_ids"]
    config = json.loads((base / "config.json").read_text())
    assert (config["vocab_size"], config["eos_token_id"]) == (323, [2, 322])
    assert config["tie_word_embeddings"] == (tied == "tied" and kind not in ("embedding", "head", "both"))
    assert any("its tokenizer's end token, 322, ends a response as well" in line for line in lines)
    # without the right base one line says what to do
    import_base(hf, tmp_path / "plain")
    call = partial(import_adapters, tmp_path / "no", tmp_path / "plain", {"a": folder})
    error = assert_refused(call, tmp_path / "no", "resized in training (meteora import base SRC DEST --replace")
    assert len(error.problems) == 1


@PEFT_TALKS
@pytest.mark.parametrize("kind", ["embedding", "head", "both", "both tied", "LoRA of the head"])
def test_a_saved_module_replaces_itself_alone(tmp_path: Path, kind: str):
    """peft on a tied base: the end that was not saved stays the base's (peft#1750, #2777)."""
    _, hf = tiny_llama(tmp_path, num_hidden_layers=1, tie_word_embeddings=True)
    resized = LlamaForCausalLM.from_pretrained(hf, attn_implementation="eager")
    model = changed(resized, kind)
    folder, base, bank = tmp_path / "adapter", tmp_path / "base", tmp_path / "bank"
    model.save_pretrained(folder)
    theirs = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(hf, attn_implementation="eager"), folder).eval()
    want = logits_of(theirs)
    import_base(hf, base, replace=folder)
    import_adapters(bank, base, {"a": folder})
    got = np.asarray(mj.load(base, bank, dtype="float32").logits(ROWS, mj.Fixed("a")))
    assert np.abs(got - want).max() <= 1e-4
    assert (got.argmax(-1) == want.argmax(-1)).all()


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
    names = ", ".join(modules)
    refused = f"modules_to_save: expected --base with the base whose {names} it saved, found none"
    assert_refused(lambda: export_adapter(bank, "a", tmp_path / "out"), tmp_path / "out", refused)
    main(["export", "adapter", str(bank), "a", str(tmp_path / "out"), "--base", str(base)])
    again = LlamaForCausalLM.from_pretrained(hf, attn_implementation="eager")
    assert np.array_equal(logits_of(PeftModel.from_pretrained(again, tmp_path / "out").eval()), want)


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
    call = partial(import_base, hf, dest, replace=folder)
    assert_refused(call, dest, "expected a saved embedding or head to replace the base's, found neither")
    tensors = load_file(folder / WEIGHTS)
    save_file({**tensors, KEY: torch.ones(322, 47)}, folder / WEIGHTS)
    assert_refused(call, dest, f"{KEY}: expected shape (322, 48) for this base, found (322, 47)")
    head = {"base_model.model.lm_head.weight": torch.ones(320, 48)}
    save_file({**tensors, KEY: torch.ones(322, 48), **head}, folder / WEIGHTS)
    assert_refused(call, dest, "expected an embedding and a head of one size, found [320, 322] rows")
    twice = {KEY.replace(".weight", ".modules_to_save.weight"): torch.zeros(320, 48)}
    save_file({**tensors, KEY: torch.ones(320, 48), **twice}, folder / WEIGHTS)
    assert_refused(call, dest, f"{KEY}: expected the values of base_model.model.model.embed_tokens.modules_to_save")
    save_file({**tensors, KEY: torch.full((320, 48), torch.nan)}, folder / WEIGHTS)
    assert_refused(call, dest, "expected finite values")
    assert_refused(lambda: import_base(hf, dest, replace=tmp_path / "none"), dest, "adapter_config.json")
