"""Embedding, head and tokenizer as an adapter saved them, in place of a base's own: the base that this adapter acts on.

peft saves whole embeddings and heads where training changed them (`modules_to_save`) and where tokens were added and
the vocabulary resized. Such an adapter belongs to the base that has them, and no other adapter of a bank could share a
base with it otherwise. As in peft, a module that was trained apart (`modules_to_save`) replaces itself alone: on a base
whose head is tied to its embedding the other matrix stays the base's, and the two are tied no longer.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from pathlib import Path
from typing import Any

from converters.base_folder import OpenedBase
from converters.hf_llama import TOKENIZER_FILES, copy_tokenizer
from converters.peft_folder import SavedVocabTensor, read_adapter, read_tensors, saved_rows
from converters.rules import TRANSPOSE, Rule, find_rule, same_values
from converters.tensor_files import SourceTensor
from meteora_jax.config import ENDS, InputError, LlamaConfig, read_json

_RULES = {
    "embed": Rule(f"{ENDS['embed']}.weight", "embed.embedding"),
    "head": Rule(f"{ENDS['head']}.weight", "lm_head.kernel", TRANSPOSE),
}
_GENERATION = "generation_config.json"  # among TOKENIZER_FILES: the base's, whatever the adapter's folder holds


def replace_vocab(opened: OpenedBase, folder: str | os.PathLike[str]) -> OpenedBase:
    """The source of a base with the embedding, head and tokenizer that a PEFT folder saved in place of its own.

    Raises:
        InputError: a folder that cannot be an adapter of this base, one that saved neither matrix, or one that saved
            only one of a resized vocabulary where the base has no other of that size.
    """
    folder, sizes = Path(folder), {opened.config.vocab_size}
    with contextlib.suppress(InputError):  # read_adapter says all that is wrong
        sizes = saved_rows(read_tensors(folder)[1]) or sizes
    if len(sizes) > 1:
        raise InputError(f"{folder}: expected an embedding and a head of one size, found {sorted(sizes)} rows")
    config = dataclasses.replace(opened.config, vocab_size=sizes.pop())
    adapter = read_adapter(folder.name, folder, config)
    saved = {matrix: adapter.saved[module] for matrix, module in ENDS.items() if module in adapter.saved}
    if not saved:
        raise InputError(f"{adapter.weights}: expected a saved embedding or head to replace the base's, found neither")
    own, others = _split_vocab(opened)
    tied = config.tie_word_embeddings
    chosen = {matrix: _acting(matrix, saved, own, tied) for matrix in ENDS}
    if (
        tied
        and len(saved) == 2
        and not any(tensor.apart for tensor in saved.values())
        and not same_values(*chosen.values())
    ):
        expected = f"the values of {chosen['embed'].key} (the base ties the two, and neither is in modules_to_save)"
        raise InputError(f"{chosen['head'].where}: expected {expected}, found others")
    problems = [
        f"{tensor.where}: expected {config.vocab_size} rows as {folder} has them, found {tensor.shape[0]} (the base's; "
        f"the adapter saved no {ENDS[matrix]}: import the base that was resized in training)"
        for matrix, tensor in chosen.items()
        if tensor.shape[:1] != (config.vocab_size,)
    ]
    if problems:
        raise InputError(problems)
    tied = tied and same_values(chosen["embed"], chosen["head"])
    matrices = ["embed"] if tied else list(ENDS)
    tensors = [dataclasses.replace(chosen[matrix], key=_RULES[matrix].pattern) for matrix in matrices]
    rules = [rule for rule in opened.rules if rule.path not in ("embed.embedding", "lm_head.kernel")]
    config = dataclasses.replace(config, tie_word_embeddings=tied)
    remarks = list(opened.remarks)
    if opened.config.tie_word_embeddings and not tied:
        remarks.append(f"{folder}: saved one of embedding and head, or two that differ, so they are tied no longer")
    changed = dataclasses.replace(
        opened,
        config=config,
        rules=[*(_RULES[matrix] for matrix in matrices), *rules],
        tensors=[*tensors, *others],
        inputs=[*opened.inputs, *adapter.inputs],
        remarks=remarks,
    )
    return _with_tokenizer(changed, folder)


def _split_vocab(opened: OpenedBase) -> tuple[dict[str, SourceTensor], list[SourceTensor]]:
    """({matrix: the base's own tensor} where it has one, all others); a second copy of a tied embedding is left out."""
    paths = {rule.path: matrix for matrix, rule in _RULES.items()}
    own: dict[str, SourceTensor] = {}
    others: list[SourceTensor] = []
    for tensor in opened.tensors:
        rule, _ = find_rule(opened.rules, tensor.key)
        if rule is not None and rule.path in paths:
            own[paths[rule.path]] = tensor
        elif rule is None or rule.same_as is None:
            others.append(tensor)
    if "embed" not in own:
        raise InputError(f"{opened.inputs[0].name}: expected an embedding, found none")
    return own, others


def _acting(matrix: str, saved: dict[str, SavedVocabTensor], own: dict[str, SourceTensor], tied: bool) -> SourceTensor:
    """What peft has as embedding or head once it has loaded the adapter."""
    if matrix in saved:
        return saved[matrix].tensor
    if not tied:
        return own.get(matrix, own["embed"])
    (other,) = saved.values()
    if not other.apart:  # loaded into the weight that both share
        return other.tensor
    return own["embed"] if other.original is None else other.original


def _with_tokenizer(opened: OpenedBase, folder: Path) -> OpenedBase:
    """The source with the tokenizer that lies in an adapter's folder, if one does; its end token is added."""
    names = [name for name in TOKENIZER_FILES if name != _GENERATION and (folder / name).exists()]
    if not {"tokenizer.json", "tokenizer.model", "vocab.json"} & set(names):
        return opened
    ids = _token_ids(folder / "tokenizer.json") if "tokenizer.json" in names else {}
    if max(ids.values(), default=0) >= opened.config.vocab_size:
        found = max(ids.values())
        raise InputError(f"{folder / 'tokenizer.json'}: expected ids below {opened.config.vocab_size}, found {found}")
    remarks = [*opened.remarks, f"{folder}: its tokenizer is the base's now"]
    config = _with_end_token(opened.config, folder, ids)
    if config != opened.config:
        remarks.append(f"{folder}: its tokenizer's end token, {config.eos_token_ids[-1]}, ends a response as well")

    def write(dest: Path) -> None:
        opened.write_tokenizer(dest)
        for name in TOKENIZER_FILES:
            if name != _GENERATION:
                (dest / name).unlink(missing_ok=True)
        copy_tokenizer(folder, dest, [name for name in TOKENIZER_FILES if name != _GENERATION])

    return dataclasses.replace(opened, config=config, write_tokenizer=write, remarks=remarks)


def _token_ids(file: Path) -> dict[str, int]:
    """{token: id} of a `tokenizer.json`, added tokens included (format: the tokenizers library's)."""
    raw = read_json(file)
    try:
        vocab: Any = raw["model"]["vocab"]
        known = vocab if isinstance(vocab, dict) else {piece[0]: i for i, piece in enumerate(vocab)}
        return {**known, **{added["content"]: int(added["id"]) for added in raw.get("added_tokens") or ()}}
    except (KeyError, TypeError, ValueError, IndexError) as e:
        raise InputError(f"{file}: expected a tokenizer, found a malformed one ({e!r})") from None


def _with_end_token(config: LlamaConfig, folder: Path, ids: dict[str, int]) -> LlamaConfig:
    file = folder / "tokenizer_config.json"
    raw = read_json(file) if file.exists() else {}
    token = raw.get("eos_token") if isinstance(raw, dict) else None
    token = token.get("content") if isinstance(token, dict) else token
    if not isinstance(token, str) or ids.get(token) in (None, *config.eos_token_ids):
        return config
    return dataclasses.replace(config, eos_token_ids=(*config.eos_token_ids, ids[token]))
