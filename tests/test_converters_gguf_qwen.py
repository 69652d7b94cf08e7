"""GGUF files of Qwen 2, 2.5 and 3: what transformers loads from the same file or the same weights, and its tokens."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from gguf_files import NAMES, TEXTS, add_value, byte_level_metadata, encode
from test_converters_family import hf_logits, tiny_model
from tiny import assert_refused
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Tokenizer

import meteora_jax as mj
from converters import import_base, plan_base
from converters.gguf_tokenizer import build_tokenizer
from meteora_jax.config import read_json
from meteora_jax.io import hf_config

ROW = [5, 6, 7, 8, 9, 300, 17]
MODELS = ("qwen2", "qwen2_tied", "qwen3", "qwen3_bias")
TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
HEAD_NORMS = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}


def write_qwen(path: Path, model: Any, kind: Type = Type.F32, **changes: Any) -> Path:
    """A GGUF file as llama.cpp's converter writes it for these architectures: rows as they are, biases, head norms."""
    config, prefix = model.config, model.config.model_type
    metadata: dict[str, Any] = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "rope.freq_base": config.rope_parameters["rope_theta"],
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "vocab_size": config.vocab_size,
    }
    if prefix == "qwen3":
        metadata |= {"attention.key_length": config.head_dim, "attention.value_length": config.head_dim}
    metadata = {f"{prefix}.{key}": value for key, value in metadata.items()} | byte_level_metadata("qwen2") | changes
    writer = gguf.GGUFWriter(path, prefix)
    for key, value in metadata.items():
        add_value(writer, key, value)
    random = np.random.default_rng(0)
    for key, tensor in model.state_dict().items():
        if key == "lm_head.weight" and config.tie_word_embeddings:
            continue
        module, _, part = key.rpartition(".")
        if module in TOP:
            name = TOP[module]
        else:
            _, _, layer, rest = module.split(".", 3)
            name = f"blk.{layer}.{(NAMES | HEAD_NORMS)[rest]}"
        of_kind = kind if tensor.ndim == 2 else Type.F32
        writer.add_tensor(f"{name}.{part}", encode(tensor.numpy(), of_kind, random), raw_dtype=of_kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("name", MODELS)
def test_a_float_file_gives_the_model_that_it_was_made_from(tmp_path: Path, name: str):
    hf, folder = tiny_model(tmp_path, name)
    import_base(write_qwen(tmp_path / "m.gguf", hf), tmp_path / "base")
    import_base(folder, tmp_path / "known")
    whole, known = ((tmp_path / f / "weights.safetensors").read_bytes() for f in ("base", "known"))
    assert whole == known
    ours, theirs = (hf_config.from_hf(read_json(tmp_path / f / "config.json")) for f in ("base", "known"))
    assert ours == theirs
    logits = np.asarray(mj.load(tmp_path / "base", dtype="float32").logits([ROW]))[0]
    assert np.abs(logits - hf_logits(hf, ROW)).max() <= 1e-4


@pytest.mark.parametrize("kind", ["F16", "Q8_0", "Q4_0"])
@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
def test_logits_equal_transformers_own_loading(tmp_path: Path, name: str, kind: str):
    sizes = {"hidden_size": 64, "intermediate_size": 96}
    hf, _ = tiny_model(tmp_path, name, **sizes)
    # transformers does not read the head width of a file of Qwen3 and takes 128
    hf = hf if name == "qwen2" else tiny_model(tmp_path, name, **sizes, head_dim=128)[0]
    path = write_qwen(tmp_path / "m.gguf", hf, Type[kind])
    import_base(path, tmp_path / "base", dtype="float32")
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
    )
    assert type(theirs) is type(hf)
    logits = np.asarray(mj.load(tmp_path / "base", dtype="float32").logits([ROW]))[0]
    assert np.abs(logits - hf_logits(theirs, ROW)).max() <= 1e-4
    assert np.abs(logits - hf_logits(hf, ROW)).max() > 1e-4  # what was quantised is not what was written


def test_tokens_equal_qwens_own_tokenizer(tmp_path: Path):
    hf, _ = tiny_model(tmp_path, "qwen2")
    metadata = byte_level_metadata("qwen2")
    import_base(write_qwen(tmp_path / "m.gguf", hf), tmp_path / "base")
    ours = AutoTokenizer.from_pretrained(tmp_path / "base")
    vocab = {token: i for i, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    theirs = Qwen2Tokenizer(vocab=vocab, merges=merges, eos_token="<|im_end|>", pad_token="<|im_end|>")  # type: ignore[arg-type]
    theirs.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    for text in (*TEXTS, "e\u0301 in two code points", "x = 12345678 + 9\r\n\r\n  y"):
        ids = theirs(text)["input_ids"]
        assert ours(text)["input_ids"] == ids, text
        assert ours.tokenize(text) == theirs.tokenize(text)
    assert len(ours("12345")["input_ids"]) == 5
    assert ours.convert_ids_to_tokens(ours("e\u0301")["input_ids"]) == ours.tokenize("\u00e9")
    assert build_tokenizer(metadata, "m.gguf", 320, 256).settings["eos_token"] == "<|im_end|>"


def test_settings_of_another_architecture_are_not_read(tmp_path: Path):
    hf, _ = tiny_model(tmp_path, "qwen3")
    path = write_qwen(tmp_path / "m.gguf", hf, **{"llama.block_count": 7, "qwen3.rope.scaling.type": "yarn"})
    assert_refused(lambda: import_base(path, tmp_path / "base"), tmp_path / "base", "qwen3.rope.scaling.type: expected")
    write_qwen(path, hf, **{"qwen3.attention.sliding_window": 4})
    assert_refused(lambda: plan_base(path), tmp_path / "base", "qwen3.attention.sliding_window: expected no such")
    write_qwen(path, tiny_model(tmp_path, "qwen2")[0], **{"general.architecture": "qwen3"})
    assert_refused(lambda: plan_base(path), tmp_path / "base", "qwen3.block_count: expected a single int")
