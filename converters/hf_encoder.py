"""A sentence-transformers folder -> ENCODER: BERT, RoBERTa, XLM-R, MPNet and T5 encoders with their pooling."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from converters.folders import new_folder, sha256, write_json
from converters.hf_llama import copy_tokenizer, read_weights
from converters.rules import AS_IS, TRANSPOSE, Progress, Rule, fill, plan
from converters.tensor_files import TensorWriter, read_safetensors
from meteora_jax.config import InputError, read_json
from meteora_jax.retriever.config import EncoderConfig

BERT_KEYS = {
    "query": "attention.self.query", "key": "attention.self.key", "value": "attention.self.value",
    "output": "attention.output.dense", "up": "intermediate.dense", "down": "output.dense",
    "attention_norm": "attention.output.LayerNorm", "mlp_norm": "output.LayerNorm",
}  # fmt: skip
MPNET_KEYS = BERT_KEYS | {
    "query": "attention.attn.q", "key": "attention.attn.k", "value": "attention.attn.v", "output": "attention.attn.o",
    "attention_norm": "attention.LayerNorm",
}  # fmt: skip
ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu"}
TOKENIZER_ONLY = ("vocab.txt", "spiece.model", "sentencepiece.bpe.model")


def import_encoder(
    src: str | os.PathLike[str],
    dest: str | os.PathLike[str],
    overwrite: bool = False,
    progress: Progress | None = None,
    instructor: bool = False,
) -> EncoderConfig:
    """Imports a sentence-transformers folder into an ENCODER folder, float32.

    Args:
        src: the folder: modules.json, config.json, safetensors, the pooling's folder, a tokenizer.
        dest: the ENCODER folder to make.
        overwrite: replace a `dest` that holds something, once the new one is complete.
        progress: called after each tensor with (key, done, total).
        instructor: the pooling leaves out the tokens of an instruction; by default as the pooling's config.json says
            (include_prompt). Instructor's own folders do not say so, although it was trained that way.

    Raises:
        InputError: everything that is wrong with the input; `dest` is then as it was.
    """
    src = Path(src)
    modules = read_modules(src)
    raw = read_json(src / modules["Transformer"] / "config.json")
    config = encoder_config(src, modules, raw)
    if instructor:
        config = dataclasses.replace(config, pool_instruction=False)
    files, tensors, _ = read_weights(src / modules["Transformer"])
    if config.projection:
        dense = src / modules["Dense"] / "model.safetensors"
        files = [*files, dense]
        tensors = tensors + read_safetensors(dense)
    shapes = config.weight_shapes()
    placements = plan(encoder_rules(config, raw["model_type"]), tensors, shapes, files[0].name)
    with new_folder(dest, overwrite, files) as folder:
        copy_tokenizer(src / modules["Transformer"], folder)
        for name in TOKENIZER_ONLY:
            if (src / modules["Transformer"] / name).exists():
                (folder / name).write_bytes((src / modules["Transformer"] / name).read_bytes())
        writer = TensorWriter(folder / "weights.safetensors", {p: (np.dtype(np.float32), s) for p, s in shapes.items()})
        fill(placements, writer, progress)
        source = [{"file": path.name, "sha256": sha256(path)} for path in files]
        write_json(folder / "encoder.json", {**config.to_json(), "source": source})
        # AutoTokenizer reads the tokenizer's class from it in folders whose tokenizer_config.json names none
        write_json(folder / "config.json", {"model_type": raw["model_type"]})
    return config


def read_modules(src: Path) -> dict[str, str]:
    """{kind of module: its folder} of modules.json, in order; what the encoder cannot do is refused."""
    raw = read_json(src / "modules.json")
    try:
        modules = {entry["type"].split(".")[-1]: entry["path"] for entry in raw}
        if len(modules) < len(raw):
            raise TypeError("one kind twice")
    except (KeyError, TypeError, AttributeError) as e:
        raise InputError(f"modules.json: expected sentence-transformers' list of modules, found {e!r}") from None
    allowed = [["Transformer", "Pooling", *rest] for rest in ([], ["Normalize"], ["Dense"], ["Dense", "Normalize"])]
    if list(modules) not in allowed:
        raise InputError(
            f"modules.json: expected Transformer, Pooling, perhaps Dense, perhaps Normalize, found {', '.join(modules)}"
        )
    return modules


def read_pooling(src: Path, folder: str) -> tuple[Any, bool]:
    """Mean or "cls" of the pooling's config.json, in its newer form, too, and whether instructions are pooled."""
    raw = read_json(src / folder / "config.json")
    modes = {k.removeprefix("pooling_mode_").removesuffix("_token").removesuffix("_tokens"): v for k, v in raw.items()}
    chosen = [mode for mode, on in modes.items() if on is True and mode not in ("include_prompt",)]
    if isinstance(raw.get("pooling_mode"), str):
        chosen = [raw["pooling_mode"]]
    if chosen not in (["mean"], ["cls"]):
        raise InputError(f"{folder}/config.json: expected mean or cls pooling, found {', '.join(chosen) or 'none'}")
    return chosen[0], raw.get("include_prompt") is not False


def encoder_config(src: Path, modules: Mapping[str, str], raw: Mapping[str, Any]) -> EncoderConfig:
    """The encoder that the folder's files describe.

    Raises:
        InputError: keys that are missing, or ask for what is not supported; all at once.
    """
    reader = _Reader(raw)
    kind = raw.get("model_type")
    if kind not in ("bert", "roberta", "xlm-roberta", "mpnet", "t5"):
        raise InputError(f"config.json: model_type: expected bert, roberta, xlm-roberta, mpnet or t5, found {kind!r}")
    shape = _t5_shape(reader) if kind == "t5" else _bert_shape(reader, kind)
    settings_file = src / modules["Transformer"] / "sentence_bert_config.json"
    settings = read_json(settings_file) if settings_file.exists() else {}
    positions = shape["max_positions"] - shape["position_offset"] if shape["max_positions"] else 512
    longest = settings.get("max_seq_length") or positions
    if not isinstance(longest, int) or (shape["max_positions"] and longest > positions):
        reader.problems.append(
            f"sentence_bert_config.json: max_seq_length: expected at most {positions}, found {longest}"
        )
    projection = 0
    if "Dense" in modules:
        dense = read_json(src / modules["Dense"] / "config.json")
        projection = dense.get("out_features", 0)
        if dense.get("bias") or not str(dense.get("activation_function", "")).endswith("Identity"):
            reader.problems.append(f"{modules['Dense']}/config.json: expected a map without bias and activation")
    if reader.problems:
        raise InputError(reader.problems)
    pooling, pool_instruction = read_pooling(src, modules["Pooling"])
    return EncoderConfig(
        **shape, max_length=longest, pooling=pooling, projection=projection, normalize="Normalize" in modules,
        lower_case=bool(settings.get("do_lower_case", False)), pool_instruction=pool_instruction,
    )  # fmt: skip


class _Reader:
    """Reads a config.json and collects what is wrong with it."""

    def __init__(self, raw: Mapping[str, Any]):
        self.raw, self.problems = raw, []

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        value = self.raw.get(key, default)
        if not isinstance(value, kind) or isinstance(value, bool):
            self.problems.append(f"config.json: {key}: expected {kind.__name__}, found {value!r}")
            return default if default is not None else kind(1)
        return value

    def activation(self, name: Any) -> Any:
        if name not in ACTIVATIONS:
            self.problems.append(f"config.json: activation: expected {', '.join(ACTIVATIONS)}, found {name!r}")
        return ACTIVATIONS.get(name, "gelu")


def _bert_shape(reader: _Reader, kind: str) -> dict[str, Any]:
    d, heads = reader.get("hidden_size", int), reader.get("num_attention_heads", int)
    if d % heads:
        reader.problems.append(f"config.json: num_attention_heads: expected a divisor of {d}, found {heads}")
    if (positions := reader.raw.get("position_embedding_type", "absolute")) != "absolute":
        reader.problems.append(f"config.json: position_embedding_type: expected 'absolute', found {positions!r}")
    padding = reader.get("pad_token_id", int, 0 if kind == "bert" else 1)
    return dict(
        family="bert", vocab_size=reader.get("vocab_size", int), hidden_size=d,
        intermediate_size=reader.get("intermediate_size", int), num_layers=reader.get("num_hidden_layers", int),
        num_heads=heads, head_dim=d // heads, norm_eps=float(reader.get("layer_norm_eps", float, 1e-12)),
        activation=reader.activation(reader.raw.get("hidden_act", "gelu")), gated=False,
        max_positions=reader.get("max_position_embeddings", int), position_offset=0 if kind == "bert" else padding + 1,
        type_vocab_size=0 if kind == "mpnet" else reader.get("type_vocab_size", int, 2),
        relative_buckets=reader.get("relative_attention_num_buckets", int, 32) if kind == "mpnet" else 0,
        relative_max_distance=128, pad_token_id=padding,
    )  # fmt: skip


def _t5_shape(reader: _Reader) -> dict[str, Any]:
    # transformers writes the feed-forward's kind as "relu", "gated-gelu" or "gated-<activation>"
    kind = reader.raw.get("feed_forward_proj", "relu")
    act = {"gated-gelu": "gelu_new"}.get(kind, str(kind).removeprefix("gated-"))
    return dict(
        family="t5", vocab_size=reader.get("vocab_size", int), hidden_size=reader.get("d_model", int),
        intermediate_size=reader.get("d_ff", int), num_layers=reader.get("num_layers", int),
        num_heads=reader.get("num_heads", int), head_dim=reader.get("d_kv", int),
        norm_eps=float(reader.get("layer_norm_epsilon", float, 1e-6)), activation=reader.activation(act),
        gated=str(kind).startswith("gated-"), max_positions=0, position_offset=0, type_vocab_size=0,
        relative_buckets=reader.get("relative_attention_num_buckets", int, 32),
        relative_max_distance=reader.get("relative_attention_max_distance", int, 128),
        pad_token_id=reader.get("pad_token_id", int, 0),
    )  # fmt: skip


def encoder_rules(config: EncoderConfig, kind: str) -> list[Rule]:
    """The table for transformers' keys of one model type; its linear weights are [O, I]."""
    rules = _t5_rules(config) if config.family == "t5" else _bert_rules(config, kind)
    if config.projection:
        rules.append(Rule("linear.weight", "projection.kernel", TRANSPOSE))
    return rules


def _bert_rules(config: EncoderConfig, kind: str) -> list[Rule]:
    rules = [
        Rule("embeddings.word_embeddings.weight", "words.embedding"),
        Rule("embeddings.position_embeddings.weight", "positions.embedding"),
        Rule("embeddings.LayerNorm.weight", "norm.scale"),
        Rule("embeddings.LayerNorm.bias", "norm.bias"),
        Rule("embeddings.position_ids", None),  # a buffer: 0, 1, 2 ...
        Rule("pooler.dense.weight", None),  # sentence-transformers pools by itself
        Rule("pooler.dense.bias", None),
    ]
    if config.type_vocab_size:
        rules.append(Rule("embeddings.token_type_embeddings.weight", "types.embedding"))
    if config.relative_buckets:
        rules.append(Rule("encoder.relative_attention_bias.weight", "distances.embedding"))
    for name, key in (MPNET_KEYS if kind == "mpnet" else BERT_KEYS).items():
        norm = name.endswith("norm")
        weight = f"layers.{name}.{'scale' if norm else 'kernel'}"
        key = f"encoder.layer.{{layer}}.{key}"
        rules.append(Rule(f"{key}.weight", weight, AS_IS if norm else TRANSPOSE))
        rules.append(Rule(f"{key}.bias", f"layers.{name}.bias"))
    return rules


def _t5_rules(config: EncoderConfig) -> list[Rule]:
    block = "encoder.block.{layer}.layer"
    rules = [
        Rule("shared.weight", "words.embedding"),
        Rule("encoder.embed_tokens.weight", None, same_as="shared.weight"),
        Rule("encoder.final_layer_norm.weight", "norm.scale"),
        Rule(f"{block}.0.layer_norm.weight", "layers.attention_norm.scale"),
        Rule(f"{block}.1.layer_norm.weight", "layers.mlp_norm.scale"),
        Rule("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", "distances.embedding"),
    ]
    for name, key in (("query", "q"), ("key", "k"), ("value", "v"), ("output", "o")):
        rules.append(Rule(f"{block}.0.SelfAttention.{key}.weight", f"layers.{name}.kernel", TRANSPOSE))
    mlp = {"gate": "wi_0", "up": "wi_1", "down": "wo"} if config.gated else {"up": "wi", "down": "wo"}
    for name, key in mlp.items():
        rules.append(Rule(f"{block}.1.DenseReluDense.{key}.weight", f"layers.{name}.kernel", TRANSPOSE))
    return rules
