"""Meta's original LLaMA folders -> BASE: `consolidated.NN.pth`, `params.json`, `tokenizer.model`.

Layout: github.com/meta-llama/llama-models, `llama3/model.py`. The weights of a large model are cut into model-parallel
shards: projections that spread over heads or feed-forward units by rows, those that bring them together by columns,
norms repeated in each. q and k hold the two rotary halves of each head interleaved; the rules undo that.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from converters.base_folder import OpenedBase, own_names
from converters.gguf_llama import unpermuted_rows
from converters.hf_llama import DERIVED
from converters.meta_tokenizer import read_tokenizer
from converters.pickle_files import read_pickle
from converters.rules import TRANSPOSE, Rule, Transform
from converters.tensor_files import SourceTensor
from meteora_jax.config import InputError, LlamaConfig, read_json
from meteora_jax.io import hf_config

PARAMS = "params.json"
_READ = (
    "dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of", "ffn_dim_multiplier", "norm_eps",
    "rope_theta", "use_scaled_rope", "rope_scaling_factor", "rope_high_freq_factor", "max_seq_len",
)  # fmt: skip
_WITHOUT_EFFECT = ("max_batch_size",)
# The axis along which a weight is cut; embeddings are recognised by their shape, all else is repeated.
_CUT = {
    "attention.wq": 0, "attention.wk": 0, "attention.wv": 0, "attention.wo": 1,
    "feed_forward.w1": 0, "feed_forward.w2": 1, "feed_forward.w3": 0, "output": 0,
}  # fmt: skip
_PROJECTIONS = {
    "attention.wq": "q_proj", "attention.wk": "k_proj", "attention.wv": "v_proj", "attention.wo": "o_proj",
    "feed_forward.w1": "gate_proj", "feed_forward.w2": "down_proj", "feed_forward.w3": "up_proj",
}  # fmt: skip
# (dim, layers) -> factor: what `use_scaled_rope` alone means. Llama 3.1 and 3.3: 8B, 70B, 405B; Llama 3.2: 1B, 3B.
_SCALING = {(4096, 32): 8.0, (8192, 80): 8.0, (16384, 126): 8.0, (2048, 16): 32.0, (3072, 28): 32.0}


def is_meta_folder(src: Path) -> bool:
    """Whether a folder looks like one of Meta's own downloads."""
    return (src / PARAMS).exists() or any(src.glob("consolidated.*.pth"))


def open_base(src: Path) -> OpenedBase:
    """Reads the headers of one of Meta's original folders.

    Args:
        src: the folder; `tokenizer.model` may also lie in the folder above, as Llama 2's download puts it.

    Raises:
        InputError: everything that is wrong with configuration, tokenizer and headers.
    """
    config, rules, tensors, files = open_folder(src)
    found = next((p for p in (src / "tokenizer.model", src.parent / "tokenizer.model") if p.exists()), None)
    if found is None:
        raise InputError(f"{src / 'tokenizer.model'}: expected a file here or in the folder above, found none")
    tokenizer, ids = read_tokenizer(found, config.vocab_size, config.max_position_embeddings)
    config = dataclasses.replace(config, bos_token_id=ids["bos"], eos_token_ids=ids["eos"])
    return OpenedBase(config, rules, tensors, [*files, src / PARAMS, found], tokenizer.write, *own_names(src))


def open_folder(src: Path) -> tuple[LlamaConfig, list[Rule], list[SourceTensor], list[Path]]:
    """(configuration without token ids, rules, whole tensors, weight files) of a folder, from headers alone."""
    files = sorted(src.glob("consolidated.*.pth"))
    expected = [f"consolidated.{i:02}.pth" for i in range(max(1, len(files)))]
    if [p.name for p in files] != expected:
        found = ", ".join(p.name for p in files) or "none"
        raise InputError(f"{src}: expected {expected[0]} to {expected[-1]}, found {found}")
    params = read_json(src / PARAMS)
    dim = params.get("dim") if isinstance(params, dict) else None
    tensors = _join([read_pickle(path) for path in files], dim)
    config = _read_config(params, {t.key: t for t in tensors})
    return config, meta_rules(config), tensors, files


def meta_rules(config: LlamaConfig) -> list[Rule]:
    """The table for Meta's tensor names; linear weights are [O, I]."""
    layer = "layers.{layer}"
    rules = [
        Rule("tok_embeddings.weight", "embed.embedding"),
        Rule("norm.weight", "norm.scale"),
        Rule(f"{layer}.attention_norm.weight", "layers.attention_norm.scale"),
        Rule(f"{layer}.ffn_norm.weight", "layers.mlp_norm.scale"),
        Rule("rope.freqs", None),  # follow from rope_theta
        *DERIVED,
        Rule("output.weight", "lm_head.kernel", TRANSPOSE),
    ]
    heads = {"attention.wq": config.num_heads, "attention.wk": config.num_kv_heads}
    for name, p in _PROJECTIONS.items():
        rows = functools.partial(unpermuted_rows, heads[name]) if name in heads else None
        rules.append(Rule(f"{layer}.{name}.weight", f"layers.{p}.kernel", Transform(transpose=True, rows=rows)))
    return rules


def _join(shards: Sequence[Sequence[SourceTensor]], dim: Any) -> list[SourceTensor]:
    """The whole tensors of model-parallel shards; nothing is read but norms, which must agree."""
    if len(shards) == 1:
        return list(shards[0])
    problems: list[str] = []
    by_key = [{t.key: t for t in shard} for shard in shards]
    for shard in by_key[1:]:
        for key in sorted(by_key[0].keys() ^ shard.keys()):
            holder = by_key[0].get(key) or shard[key]
            problems.append(f"{holder.where}: expected in every shard, found in some only")
    if problems:
        raise InputError(problems)
    whole = []
    for key, first in by_key[0].items():
        parts = [shard[key] for shard in by_key]
        axis = _axis(key, parts, dim)
        shapes = [p.shape[:axis] + p.shape[axis + 1 :] if axis is not None else p.shape for p in parts]
        if len({(shape, p.dtype) for shape, p in zip(shapes, parts, strict=True)}) > 1:
            found = ", ".join(f"{p.dtype} {p.shape}" for p in parts)
            problems.append(f"{first.where}: expected shards that fit together, found {found}")
        elif axis is not None:
            whole.append(_rows_joined(parts) if axis == 0 else _columns_joined(parts))
        else:
            if first.shape and not all(np.array_equal(p.read(), first.read(), equal_nan=True) for p in parts[1:]):
                problems.append(f"{first.where}: expected the same values in every shard, found others")
            whole.append(first)
    if problems:
        raise InputError(problems)
    return whole


def _axis(key: str, parts: Sequence[SourceTensor], dim: Any) -> int | None:
    if any(len(p.shape) != 2 for p in parts):
        return None
    if key == "tok_embeddings.weight":  # Llama 3 cuts the vocabulary, its predecessors the width
        return 0 if parts[0].shape[1] == dim else 1
    return next((axis for name, axis in _CUT.items() if key.endswith(f"{name}.weight")), None)


def _rows_joined(parts: Sequence[SourceTensor]) -> SourceTensor:
    bounds = list(itertools.accumulate(p.shape[0] for p in parts))

    def rows(start: int, stop: int) -> np.ndarray:
        pieces = []
        for part, end in zip(parts, bounds, strict=True):
            begin = end - part.shape[0]
            first, last = max(start, begin), min(stop, end)
            if first < last:
                pieces.append(part.rows(first - begin, last - begin))
        return np.concatenate(pieces) if pieces else parts[0].rows(0, 0)

    return SourceTensor(parts[0].file, parts[0].key, parts[0].dtype, (bounds[-1], *parts[0].shape[1:]), rows)


def _columns_joined(parts: Sequence[SourceTensor]) -> SourceTensor:
    def rows(start, stop):
        return np.concatenate([p.rows(start, stop) for p in parts], axis=1)

    shape = (parts[0].shape[0], sum(p.shape[1] for p in parts))
    return SourceTensor(parts[0].file, parts[0].key, parts[0].dtype, shape, rows)


def _read_config(params: Any, tensors: dict[str, SourceTensor]) -> LlamaConfig:
    """`params.json` with what only the tensors say: the vocabulary's size and the feed-forward width."""
    if not isinstance(params, dict):
        raise InputError(f"{PARAMS}: expected an object, found {type(params).__name__}")
    problems: list[str] = []

    def get(key: str, kind: type, default: Any = None) -> Any:
        value = params.get(key)
        value = default if value is None else value
        sound = isinstance(value, (int, float) if kind is float else kind) and isinstance(value, bool) == (kind is bool)
        if not sound or (kind is not bool and not 0 < value < 1e12):
            problems.append(f"{PARAMS}: {key}: expected a positive {kind.__name__}, found {params.get(key)!r:.200}")
            return kind(1)
        return value

    for key, value in params.items():
        if key not in _READ and key not in _WITHOUT_EFFECT and value not in (None, False, 0, "", [], {}):
            problems.append(f"{PARAMS}: {key}: expected no such setting (unknown here), found {value!r:.200}")
    dim, layers, heads = get("dim", int), get("n_layers", int), get("n_heads", int)
    kv_heads, eps, theta = get("n_kv_heads", int, heads), get("norm_eps", float), get("rope_theta", float, 10000.0)
    scaled = get("use_scaled_rope", bool, False)
    sizes: list[int] = []
    for key in ("output.weight", "layers.0.feed_forward.w1.weight"):
        shape = tensors[key].shape if key in tensors else ()
        if len(shape) != 2:
            problems.append(f"consolidated.00.pth: {key}: expected a matrix, found {shape or 'no such tensor'}")
        sizes.append(shape[0] if len(shape) == 2 else 1)
    vocab, ffn = sizes
    if params.get("vocab_size", -1) not in (-1, None, vocab):
        found = params["vocab_size"]
        problems.append(f"{PARAMS}: vocab_size: expected {vocab} (rows of output.weight), found {found!r:.200}")
    multiple = get("multiple_of", int, 256)
    width = int(int(2 * 4 * dim / 3) * get("ffn_dim_multiplier", float, 1.0))
    if not problems and ffn != multiple * -(-width // multiple):
        problems.append(
            f"{PARAMS}: ffn_dim_multiplier: expected {ffn} units (rows of feed_forward.w1), "
            f"found {multiple * -(-width // multiple)}"
        )
    factor = params.get("rope_scaling_factor") or _SCALING.get((dim, layers))
    scaling = None
    if scaled and factor is None:
        problems.append(f"{PARAMS}: rope_scaling_factor: expected a number (use_scaled_rope is on), found none")
    elif scaled:
        high = get("rope_high_freq_factor", float, 4.0)
        scaling = {
            "rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": high,
            "original_max_position_embeddings": 8192,
        }  # fmt: skip
    # What the releases were trained on; the file itself is silent.
    context = 131072 if scaled else 8192 if vocab >= 128000 else 4096
    context = get("max_seq_len", int, context)
    if problems:
        raise InputError(problems)
    raw = {
        "model_type": "llama", "vocab_size": vocab, "hidden_size": dim, "intermediate_size": ffn,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
        "rms_norm_eps": float(eps), "rope_theta": float(theta), "rope_scaling": scaling,
        "max_position_embeddings": context, "tie_word_embeddings": False,
    }  # fmt: skip
    return hf_config.from_hf(raw, PARAMS)
