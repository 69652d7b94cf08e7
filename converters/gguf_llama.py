"""A `.gguf` file, whole or split -> BASE: configuration and tokenizer are in its metadata.

Architectures llama (Mistral's files too), qwen2 (Qwen 2 and 2.5) and qwen3. Keys:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md#standardized-key-value-pairs. For architecture llama
llama.cpp's converter interleaves the two rotary halves of each head's rows in q and k (`LlamaModel.permute`), and only
there; the rules undo that.
"""

from __future__ import annotations

import functools
import math
import re
from pathlib import Path
from typing import Any

import numpy as np

from converters.base_folder import OpenedBase, own_names
from converters.gguf_file import GgufFile, read_gguf
from converters.gguf_tokenizer import build_tokenizer
from converters.hf_llama import DERIVED
from converters.rules import TRANSPOSE, Rule, Transform
from meteora_jax.config import InputError, LlamaConfig
from meteora_jax.io import hf_config
from meteora_jax.io.provenance import is_known

ROPE_FACTORS = "rope_freqs.weight"
_ARCHITECTURES = ("llama", "qwen2", "qwen3")  # transformers names these model types alike
# Each key of the architecture's own that the importer reads or knows to change nothing; any other is refused by name.
_READ = (
    "block_count", "context_length", "embedding_length", "feed_forward_length", "vocab_size",
    "attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length",
    "attention.layer_norm_rms_epsilon", "rope.freq_base", "rope.dimension_count",
    "rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length", "rope.scale_linear",
)  # fmt: skip
# layer_norm_epsilon: for architectures whose norm is not RMS. finetuned: a note on the training.
_WITHOUT_EFFECT = ("attention.layer_norm_epsilon", "rope.scaling.finetuned")
_NEUTRAL = {"expert_count": 0, "expert_used_count": 0, "tensor_data_layout": "Meta AI original pth"}
_PROJECTIONS = {
    "attn_q": "q_proj", "attn_k": "k_proj", "attn_v": "v_proj", "attn_output": "o_proj",
    "ffn_gate": "gate_proj", "ffn_up": "up_proj", "ffn_down": "down_proj",
}  # fmt: skip
_SPLIT = re.compile(r"(?P<name>.+)-[0-9]{5}-of-(?P<count>[0-9]{5})\.gguf", re.IGNORECASE)
# (low_freq_factor, high_freq_factor, original context) of Llama 3.1, 3.2 and 3.3: rope_freqs.weight holds only the
# factors that follow from them.
_LLAMA3 = (1.0, 4.0, 8192)


def open_base(src: Path) -> OpenedBase:
    """Reads the headers of a GGUF file.

    Args:
        src: the file; of a split one any part, the others in the same folder.

    Raises:
        InputError: everything that is wrong with configuration, tokenizer and headers.
    """
    file, files = read_split(src)
    config = read_config(file)
    tokenizer = build_tokenizer(file.metadata, file.path.name, config.vocab_size, config.max_position_embeddings)
    rules, remarks = gguf_rules(config), list(tokenizer.remarks)
    return OpenedBase(config, rules, file.tensors, files, tokenizer.write, *_names(file), remarks=remarks)


def _names(file: GgufFile) -> tuple[dict[str, str], str | None]:
    """What the metadata calls the model; its parts only where its name says nothing of them."""
    general = {k.removeprefix("general."): v for k, v in file.metadata.items() if k.startswith("general.")}
    said = {"general.name": general.get("name")}
    parts = [general.get(k) for k in ("basename", "size_label", "finetune", "version")]
    if isinstance(parts[0], str) and not is_known(str(said["general.name"])):
        said["general.basename"] = "-".join(p for p in parts if isinstance(p, str) and p)
    match = _SPLIT.fullmatch(file.path.name)
    return own_names(file.path.with_name(match["name"]) if match else file.path, **said)


def read_split(src: Path) -> tuple[GgufFile, list[Path]]:
    """(the whole, its files) of a GGUF file or of the parts that llama.cpp's gguf-split made of one.

    Raises:
        InputError: as `read_gguf`, for every part; parts that are missing or do not belong together.
    """
    first = read_gguf(src)
    count = first.metadata.get("split.count", 0)
    if count in (0, 1):
        return first, [src]
    match = _SPLIT.fullmatch(src.name)
    if match is None or not isinstance(count, int) or int(match["count"]) != count:
        raise InputError(f"{src.name}: expected the name NAME-00001-of-{count:05}.gguf (split.count), found another")
    paths = [src.with_name(f"{match['name']}-{i:05}-of-{count:05}.gguf") for i in range(1, count + 1)]
    problems: list[str] = []
    parts: list[GgufFile] = []
    for number, path in enumerate(paths):
        try:
            part = read_gguf(path)
        except InputError as e:
            problems += e.problems
            continue
        for key, expected in (("split.no", number), ("split.count", count)):
            if part.metadata.get(key) != expected:
                problems.append(f"{path.name}: {key}: expected {expected}, found {part.metadata.get(key)!r:.200}")
        parts.append(part)
    if problems:
        raise InputError(problems)
    tensors = [tensor for part in parts for tensor in part.tensors]
    total = parts[0].metadata.get("split.tensors.count", len(tensors))
    if total != len(tensors):
        raise InputError(f"{paths[0].name}: split.tensors.count: expected {len(tensors)} (found), found {total!r:.200}")
    return GgufFile(paths[0], parts[0].metadata, tensors), paths


def gguf_rules(config: LlamaConfig) -> list[Rule]:
    """The table for llama.cpp's tensor names; linear weights are [O, I]."""
    rules = [
        Rule("token_embd.weight", "embed.embedding"),
        Rule("output_norm.weight", "norm.scale"),
        Rule("blk.{layer}.attn_norm.weight", "layers.attention_norm.scale"),
        Rule("blk.{layer}.ffn_norm.weight", "layers.mlp_norm.scale"),
        Rule(ROPE_FACTORS, None),  # read into rope_scaling
        Rule("blk.{layer}.attn_rot_embd", None),  # old files' rotary buffers
        *DERIVED,
    ]
    heads = {"attn_q": config.num_heads, "attn_k": config.num_kv_heads} if config.model_type == "llama" else {}
    if config.qk_norm:
        rules += [Rule(f"blk.{{layer}}.attn_{x}_norm.weight", f"layers.{x}_norm.scale") for x in "qk"]
    for name, p in _PROJECTIONS.items():
        rows = functools.partial(unpermuted_rows, heads[name]) if name in heads else None
        rules.append(Rule(f"blk.{{layer}}.{name}.weight", f"layers.{p}.kernel", Transform(transpose=True, rows=rows)))
        if config.projection_bias(p):
            rules.append(Rule(f"blk.{{layer}}.{name}.bias", f"layers.{p}.bias", Transform(rows=rows)))
    if not config.tie_word_embeddings:
        rules.append(Rule("output.weight", "lm_head.kernel", TRANSPOSE))
    return rules


def unpermuted_rows(heads: int, n: int) -> np.ndarray:
    """Where each of GGUF's n rows of q or k belongs: [head, pair, half] in the file, [head, half, pair] here."""
    return np.arange(n).reshape(heads, 2, -1).swapaxes(1, 2).reshape(-1)


def read_config(file: GgufFile) -> LlamaConfig:
    """The base's configuration from metadata and tensor names.

    Raises:
        InputError: another architecture, settings that are not supported, missing or malformed ones; all of them.
    """
    reader = _MetadataReader(file)
    config = reader.read()
    if reader.problems:
        raise InputError(reader.problems)
    return hf_config.from_hf(config, file.path.name)


class _MetadataReader:
    """Turns metadata into a Hugging Face config, which `hf_config.from_hf` then checks value by value."""

    def __init__(self, file: GgufFile):
        self.file, self.metadata = file.path.name, file.metadata
        self.tensors = {t.key: t for t in file.tensors}
        self.problems: list[str] = []
        self.architecture = self.metadata.get("general.architecture")

    def refuse(self, key: str, expected: str, found: object) -> None:
        self.problems.append(f"{self.file}: {key}: expected {expected}, found {found!r:.200}")

    def has(self, key: str) -> bool:
        return f"{self.architecture}.{key}" in self.metadata

    def get(self, key: str, kind: type = int, default: Any = None) -> Any:
        """The architecture's `key`; None (and a problem) where it is of another type, or absent without a default."""
        value = self.metadata.get(f"{self.architecture}.{key}", default)
        if isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else kind):
            self.refuse(f"{self.architecture}.{key}", f"a single {kind.__name__}", value)
            return None
        return value

    def read(self) -> dict[str, Any]:
        if self.architecture not in _ARCHITECTURES:
            self.refuse("general.architecture", ", ".join(_ARCHITECTURES), self.architecture)
            return {}
        self.check_keys()
        tokens = self.metadata.get("tokenizer.ggml.tokens")
        config: dict[str, Any] = {
            "model_type": self.architecture,
            "vocab_size": self.get("vocab_size", default=len(tokens) if isinstance(tokens, list) else None),
            "hidden_size": self.get("embedding_length"),
            "intermediate_size": self.get("feed_forward_length"),
            "num_hidden_layers": self.get("block_count"),
            "num_attention_heads": self.get("attention.head_count"),
            "rms_norm_eps": self.get("attention.layer_norm_rms_epsilon", float),
            "rope_theta": self.get("rope.freq_base", float, 10000.0),
            "max_position_embeddings": self.get("context_length"),
            "tie_word_embeddings": "output.weight" not in self.tensors,
            "attention_bias": "blk.0.attn_q.bias" in self.tensors,
            "mlp_bias": "blk.0.ffn_up.bias" in self.tensors,
            "bos_token_id": self.metadata.get("tokenizer.ggml.bos_token_id"),
            "eos_token_id": self.eos_ids(),
        }
        if self.problems:
            return {}
        heads = config["num_attention_heads"]
        config["num_key_value_heads"] = self.get("attention.head_count_kv", default=heads)
        config["head_dim"] = self.head_dim(config["hidden_size"], heads)
        if not self.problems:
            config["rope_scaling"] = self.rope_scaling(config)
        return config

    def check_keys(self) -> None:
        for key, value in self.metadata.items():
            prefix, _, name = key.partition(".")
            if prefix != self.architecture or name in _READ or name in _WITHOUT_EFFECT:
                continue
            if name not in _NEUTRAL or value != _NEUTRAL[name]:
                self.refuse(
                    key, f"{_NEUTRAL[name]!r}" if name in _NEUTRAL else "no such setting (not supported)", value
                )

    def head_dim(self, hidden: int, heads: int) -> int:
        head_dim = self.get("attention.key_length", default=hidden // max(heads, 1))
        for key in ("attention.value_length", "rope.dimension_count"):
            if self.get(key, default=head_dim) != head_dim:
                self.refuse(f"{self.architecture}.{key}", f"the head dimension {head_dim}", self.get(key))
        return head_dim

    def eos_ids(self) -> list[int] | None:
        """End of text, of turn and of message: each stops a generation, as in llama.cpp."""
        keys = ("eos_token_id", "eot_token_id", "eom_token_id")
        found = []
        for key in (f"tokenizer.ggml.{k}" for k in keys if f"tokenizer.ggml.{k}" in self.metadata):
            value = self.metadata[key]
            if not isinstance(value, int) or isinstance(value, bool):
                self.refuse(key, "a token id", value)
            else:
                found.append(value)
        return list(dict.fromkeys(found)) or None

    def rope_scaling(self, config: dict[str, Any]) -> dict[str, Any] | None:
        scaled = self.has("rope.scale_linear") or self.has("rope.scaling.factor")  # linear unless said, as in llama.cpp
        kind = self.get("rope.scaling.type", str, "linear" if scaled else "none")
        factors = self.tensors.get(ROPE_FACTORS)
        if kind == "linear" and factors is None:
            key = "rope.scale_linear" if self.has("rope.scale_linear") else "rope.scaling.factor"
            original = self.get("rope.scaling.original_context_length", default=config["max_position_embeddings"])
            factor = self.get(key, float)
            return {"rope_type": "linear", "factor": factor, "original_max_position_embeddings": original}
        if kind != "none":
            self.refuse(f"{self.architecture}.rope.scaling.type", f"none, or linear without {ROPE_FACTORS}", kind)
        elif factors is not None and factors.shape != (config["head_dim"] // 2,):
            self.refuse(ROPE_FACTORS, f"shape {(config['head_dim'] // 2,)}", factors.shape)
        elif factors is not None:
            return self.llama3_scaling(factors.read().astype(np.float64), config["rope_theta"])
        return None

    def llama3_scaling(self, factors: np.ndarray, theta: float) -> dict[str, Any] | None:
        """The llama3 parameters whose factors these are; only Llama 3.1's constants are tried."""
        if np.all(factors == 1):
            return None
        low, high, original = _LLAMA3
        original = self.get("rope.scaling.original_context_length", default=original)
        factor = float(factors.max())
        if not np.allclose(factors, llama3_factors(factor, low, high, original, theta, 2 * len(factors)), rtol=1e-4):
            expected = f"llama3 factors of low_freq_factor {low}, high_freq_factor {high}, original context {original}"
            self.refuse(ROPE_FACTORS, expected, [round(float(f), 4) for f in factors])
            return None
        return {
            "rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high,
            "original_max_position_embeddings": original,
        }  # fmt: skip


def llama3_factors(factor: float, low: float, high: float, original: int, theta: float, head_dim: int) -> np.ndarray:
    """What each rotary frequency is divided by, [head_dim / 2] (Llama 3.1 reference code, `apply_scaling`)."""
    wavelength = 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = np.clip((original / wavelength - low) / (high - low), 0, 1)
    return 1 / ((1 - smooth) / factor + smooth)
