"""A Hugging Face folder of the LLaMA family -> BASE.

`config.json`, weights as safetensors or as `torch.save` wrote them (single or sharded), the tokenizer's files; of some
quantised folders, too: see hf_quantized.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from converters.base_folder import OpenedBase, own_names
from converters.hf_quantized import Method, folded, rules_of, without_zero_biases, written_out
from converters.pickle_files import read_pickle
from converters.rules import TRANSPOSE, Rule, same_values
from converters.tensor_files import SourceTensor, read_safetensors
from meteora_jax.config import PROJECTIONS, InputError, LlamaConfig, read_json
from meteora_jax.io import hf_config

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED, PICKLED_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model",
    "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json", "generation_config.json",
)  # fmt: skip
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
NORMS = (
    Rule("model.norm.weight", "norm.scale"),
    Rule("model.layers.{layer}.input_layernorm.weight", "layers.attention_norm.scale"),
    Rule("model.layers.{layer}.post_attention_layernorm.weight", "layers.mlp_norm.scale"),
    *(Rule(f"model.layers.{{layer}}.self_attn.{x}_norm.weight", f"layers.{x}_norm.scale") for x in "qk"),
)
# Rotary buffers that models saved, in whichever module they stood; they follow from rope_theta.
DERIVED = tuple(
    Rule(f"{{any}}rotary_emb.{buffer}", None)
    for buffer in ("inv_freq", "original_inv_freq", "cos_cached", "sin_cached", "cos_sin_cache")
)


def open_base(src: Path) -> OpenedBase:
    """Reads the headers of a Hugging Face folder of model_type llama, mistral, qwen2 or qwen3.

    Args:
        src: the folder.

    Raises:
        InputError: everything that is wrong with configuration, tokenizer and headers.
    """
    raw = read_json(src / "config.json")
    method = Method.of(raw) if isinstance(raw, Mapping) else None
    plain = {key: value for key, value in raw.items() if key != "quantization_config"} if method else raw
    config = add_end_tokens(hf_config.from_hf(plain), src / "generation_config.json")
    files, tensors, remarks = read_weights(src)
    if method is not None:
        tensors = written_out(method, tensors)
        said = "are read as what they stand for, or with --weights taken over where that format allows"
        remarks = [*remarks, f"{src}: weights quantised by {method.name} {said}"]
    config, untied = untie(config, tensors)
    rules = llama_rules(config)
    if method is not None:
        rules = rules_of(method, rules)
        tensors = without_zero_biases(rules, tensors)
    said = {"config.json _name_or_path": raw.get("_name_or_path")}
    names, revision = own_names(src, **said)
    if method is not None:
        way, said_of = folded(method, src, tensors)
        remarks = [*remarks, *said_of]
        if way is not None:
            names = {where: n if way.lower() in n.lower() else f"{n}-{way}" for where, n in names.items()}
    return OpenedBase(
        config,
        rules,
        tensors,
        [*files, src / "config.json"],
        lambda folder: copy_tokenizer(src, folder),
        names,
        revision,
        remarks=[*remarks, *untied],
    )


def untie(config: LlamaConfig, tensors: Sequence[SourceTensor], prefix: str = "") -> tuple[LlamaConfig, list[str]]:
    """The configuration, untied where the weights hold a head of their own, as in transformers, and that in words."""
    by_key = {tensor.key: tensor for tensor in tensors}
    embedding, head = by_key.get(f"{prefix}model.embed_tokens.weight"), by_key.get(f"{prefix}lm_head.weight")
    head = head or by_key.get(f"{prefix}lm_head.qweight")
    if not config.tie_word_embeddings or embedding is None or head is None or same_values(embedding, head):
        return config, []
    said = f"{head.where}: differs from {embedding.key}, so the head is its own although config.json ties the two"
    return dataclasses.replace(config, tie_word_embeddings=False), [said]


def add_end_tokens(config: LlamaConfig, generation: Path) -> LlamaConfig:
    """The configuration with the end tokens that only `generation_config.json` lists, as Llama 3's chat models do."""
    if not generation.exists():
        return config
    raw = read_json(generation)
    if not isinstance(raw, dict):
        raise InputError(f"{generation.name}: expected an object, found {type(raw).__name__}")
    ids = raw.get("eos_token_id")
    ids = [] if ids is None else ids if isinstance(ids, list) else [ids]
    if any(not isinstance(i, int) or isinstance(i, bool) for i in ids):
        raise InputError(f"{generation.name}: eos_token_id: expected token ids, found {raw.get('eos_token_id')!r}")
    return dataclasses.replace(config, eos_token_ids=tuple(dict.fromkeys((*config.eos_token_ids, *ids))))


def module_name(projection: str) -> str:
    """Where a projection lives inside a layer: `self_attn.q_proj`, `mlp.up_proj`."""
    return f"{'self_attn' if projection in ATTENTION else 'mlp'}.{projection}"


def llama_rules(config: LlamaConfig) -> list[Rule]:
    """The table for the keys of transformers' `LlamaForCausalLM` and its kin; their linear weights are [O, I]."""
    layer = "model.layers.{layer}"
    norms = [rule for rule in NORMS if rule.path in config.weight_shapes()]
    rules = [Rule("model.embed_tokens.weight", "embed.embedding"), *norms, *DERIVED]
    for p in PROJECTIONS:
        rules.append(Rule(f"{layer}.{module_name(p)}.weight", f"layers.{p}.kernel", TRANSPOSE))
        if config.projection_bias(p):
            rules.append(Rule(f"{layer}.{module_name(p)}.bias", f"layers.{p}.bias"))
    if config.tie_word_embeddings:
        rules.append(Rule("lm_head.weight", None, same_as="model.embed_tokens.weight"))
    else:
        rules.append(Rule("lm_head.weight", "lm_head.kernel", TRANSPOSE))
    return rules


def read_weights(src: Path) -> tuple[list[Path], list[SourceTensor], list[str]]:
    """(files, tensors, remarks) of a folder; the first file is the one that lists the tensors.

    Where a folder holds its weights twice transformers' choice is taken, and said: safetensors before pickles, one file
    before shards.

    Raises:
        InputError: no weights, or shards and index that contradict each other.
    """
    formats = ((SINGLE, INDEX, read_safetensors), (PICKLED, PICKLED_INDEX, read_pickle))
    there = [name for single, index, _ in formats for name in (single, index) if (src / name).exists()]
    for single, index, read in formats:
        if single not in there and index not in there:
            continue
        taken = single if single in there else index
        others = [name for name in there if name != taken and not _lists_only(src / name, taken)]
        remarks = [f"{src}: {taken} is read, not {' or '.join(others)}"] if others else []
        if taken == single:
            return [src / single], read(src / single), remarks
        return *_read_shards(src, src / index, read), remarks
    raise InputError(f"{src}: expected {SINGLE}, {INDEX}, {PICKLED} or {PICKLED_INDEX}, found none of them")


def _lists_only(index: Path, name: str) -> bool:
    """Whether a file is an index that lists one file alone."""
    if not index.name.endswith(".index.json"):
        return False
    try:
        return set(_read_weight_map(index, Path(name).suffix).values()) == {name}
    except InputError:
        return False  # nobody reads it


def _read_weight_map(index: Path, suffix: str) -> dict[str, str]:
    raw = read_json(index)
    weight_map = raw.get("weight_map") if isinstance(raw, Mapping) else None
    if not isinstance(weight_map, Mapping) or not weight_map:
        raise InputError(
            f"{index.name}: weight_map: expected an object of tensor names and files, found {weight_map!r:.200}"
        )
    problems = [
        f"{index.name}: {key:.200}: expected the name of a {suffix[1:]} file in the same folder, found {name!r:.200}"
        for key, name in weight_map.items()
        if not _is_shard_name(name, suffix)
    ]
    if problems:
        raise InputError(problems)
    return dict(weight_map)


def _is_shard_name(name: object, suffix: str) -> bool:
    if not isinstance(name, str) or not name.endswith(suffix):
        return False
    return not any(c in name for c in "/\\:\0") and not name.startswith(".")


def _read_shards(
    src: Path, index: Path, read: Callable[[Path], list[SourceTensor]]
) -> tuple[list[Path], list[SourceTensor]]:
    weight_map = _read_weight_map(index, ".safetensors" if index.name == INDEX else ".bin")
    problems: list[str] = []
    tensors: list[SourceTensor] = []
    names = sorted(set(weight_map.values()))
    for name in names:
        expected = {key for key, file in weight_map.items() if file == name}
        try:
            shard = read(src / name)
        except InputError as e:
            problems += e.problems
            continue
        found = {t.key for t in shard}
        problems += [
            f"{name}: {key}: expected by {index.name}, found no such tensor" for key in sorted(expected - found)
        ]
        for key in sorted(found - expected):
            place = f"it in {weight_map[key]}" if key in weight_map else "no entry"
            problems.append(f"{name}: {key}: expected in {index.name}, found {place}")
        tensors += shard
    if problems:
        raise InputError(problems)
    return [index, *(src / name for name in names)], tensors


def copy_tokenizer(src: Path, folder: Path, names: Sequence[str] = TOKENIZER_FILES) -> None:
    """Copies the tokenizer's and generation's files that exist; a malformed JSON one is refused."""
    for name in names:
        path = src / name
        if not path.exists():
            continue
        if path.suffix == ".json":
            read_json(path)
        shutil.copyfile(path, folder / name)
