"""GGUF files for tests: a Hugging Face model written as llama.cpp writes it, in any type and with either tokenizer."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from tiny import BOS, CHAT_TEMPLATE, CORPUS, EOS, tiny_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import LlamaForCausalLM

NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


TEXTS = (
    "hello world", "I have 24 apples and 1234 pears.", f"{BOS}user\nHi there{EOS}\n", "  two  spaces\n\n\ttab",
    "Ünïcödé 漢字 🙂", "don't 'S it", " leading", "",
)  # fmt: skip


def gguf_name(key: str) -> str:
    top = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    module, _, kind = key.rpartition(".")
    if module in top:
        return f"{top[module]}.{kind}"
    _, _, layer, rest = module.split(".", 3)
    return f"blk.{layer}.{NAMES[rest]}.{kind}"


def permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's `LlamaModel.permute`."""
    return (
        weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
    )


# Where the float16 scales of a block stand (llama.cpp's ggml-common.h), of types that `gguf` cannot quantise to.
SCALES = {
    Type.Q2_K: (80, 82), Type.Q3_K: (108,), Type.Q4_K: (0, 2), Type.Q5_K: (0, 2), Type.Q6_K: (208,), Type.IQ4_NL: (0,),
    Type.IQ4_XS: (0,), Type.IQ3_S: (0,), Type.IQ2_XXS: (0,),
}  # fmt: skip


def random_blocks(shape: tuple[int, ...], kind: Type, random: np.random.Generator) -> np.ndarray:
    """Valid random blocks of a type that `gguf` cannot quantise to: any bytes, with small scales."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = random.integers(0, 256, (*shape[:-1], shape[-1] // block, size), np.uint8)
    at = SCALES[kind]
    for offset in at:
        scales = random.uniform(0.001, 0.01, blocks.shape[:-1]).astype(np.float16)
        blocks[..., offset : offset + 2] = scales[..., None].view(np.uint8)
    return blocks.reshape(*shape[:-1], -1)


def encode(values: np.ndarray, kind: Type, random: np.random.Generator) -> np.ndarray:
    if kind in SCALES:
        return random_blocks(values.shape, kind, random)
    return gguf.quantize(values, kind)


def byte_level_metadata(pre: str | None = "smollm", **changes: Any) -> dict[str, Any]:
    """tokenizer.* metadata of the tiny byte-level vocabulary; a change of None removes the key."""
    backend = tiny_tokenizer().backend_tokenizer
    model = json.loads(backend.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    special = {t.content for t in backend.get_added_tokens_decoder().values()}
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if t in special else 1 for t in tokens],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in model["merges"]],
        "tokenizer.ggml.bos_token_id": tokens.index(BOS),
        "tokenizer.ggml.eos_token_id": tokens.index(EOS),
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.chat_template": CHAT_TEMPLATE,
        **{f"tokenizer.ggml.{key}": value for key, value in changes.items()},
    }
    return {key: value for key, value in metadata.items() if value is not None}


def sentencepiece_metadata(**changes: Any) -> dict[str, Any]:
    """tokenizer.* metadata of a SentencePiece-like vocabulary: bytes, characters, and pieces with scores."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=200, show_progress=False))
    pieces = sorted(backend.get_vocab(), key=backend.get_vocab().__getitem__)
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, *[1] * len(pieces)],
        "tokenizer.ggml.scores": [0.0] * 259 + [float(-i) for i in range(len(pieces))],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        **{f"tokenizer.ggml.{key}": value for key, value in changes.items()},
    }
    return {key: value for key, value in metadata.items() if value is not None}


def llama_metadata(config: Any) -> dict[str, Any]:
    return {
        "llama.block_count": config.num_hidden_layers,
        "llama.context_length": config.max_position_embeddings,
        "llama.embedding_length": config.hidden_size,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.head_count": config.num_attention_heads,
        "llama.attention.head_count_kv": config.num_key_value_heads,
        "llama.attention.key_length": config.head_dim,
        "llama.attention.value_length": config.head_dim,
        "llama.rope.dimension_count": config.head_dim,
        "llama.rope.freq_base": config.rope_parameters["rope_theta"],
        "llama.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "llama.vocab_size": config.vocab_size,
    }


def write_gguf(
    path: Path,
    model: LlamaForCausalLM,
    kind: Type = Type.F32,
    tokenizer: dict[str, Any] | None = None,
    edit: Callable[[dict[str, Any], dict[str, tuple[np.ndarray, Type]]], None] = lambda metadata, tensors: None,
) -> Path:
    """A GGUF file as llama.cpp's converter writes it: q and k permuted, vectors in F32, all else in `kind`."""
    random = np.random.default_rng(0)
    heads = {"attn_q": model.config.num_attention_heads, "attn_k": model.config.num_key_value_heads}
    metadata = llama_metadata(model.config) | (byte_level_metadata() if tokenizer is None else tokenizer)
    tensors: dict[str, tuple[np.ndarray, Type]] = {}
    for key, tensor in model.state_dict().items():
        if key == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        name, values = gguf_name(key), tensor.float().numpy()
        module = name.split(".")[-2]
        values = permute(values, heads[module]) if module in heads else values
        of_kind = kind if values.ndim == 2 else Type.F32
        tensors[name] = (encode(values, of_kind, random), of_kind)
    edit(metadata, tensors)
    architecture = metadata.pop("general.architecture", "llama")
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in metadata.items():
        add_value(writer, key, value)
    for name, (values, of_kind) in tensors.items():
        writer.add_tensor(name, values, raw_dtype=of_kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_value(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, list):
        writer.add_array(key, value)
    else:
        adders = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        adders[type(value)](key, value)
