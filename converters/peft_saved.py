"""Embedding and head as an adapter saved them, in place of a base's own: the base that such an adapter acts on.

peft saves copies of both (`modules_to_save`, `save_embedding_layers`); where training changed them, the adapter belongs
to the base that has them, and no other adapter of a bank could share a base with it otherwise.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from converters.base_folder import OpenedBase
from converters.peft_folder import read_adapter
from converters.rules import find_rule
from meteora_jax.config import ENDS, InputError

_PATHS = {"embed.embedding": ENDS["embed"], "lm_head.kernel": ENDS["head"]}


def replace_ends(opened: OpenedBase, folder: str | os.PathLike[str]) -> OpenedBase:
    """The source of a base with the embedding and head that a PEFT folder saved in place of its own.

    Raises:
        InputError: a folder that cannot be an adapter of this base, one that saved neither, or a head alone where the
            base ties its head to the embedding.
    """
    folder = Path(folder)
    adapter = read_adapter(folder.name, folder, opened.config)
    tied = opened.config.tie_word_embeddings
    if not adapter.saved:
        raise InputError(f"{adapter.weights}: expected a saved embedding or head to replace the base's, found neither")
    if tied and ENDS["embed"] not in adapter.saved:
        expected = f"{ENDS['embed']} beside {ENDS['head']} (the base ties them)"
        raise InputError(f"{adapter.weights}: expected a saved {expected}, found the head alone")
    tensors = []
    for tensor in opened.tensors:
        rule, _ = find_rule(opened.rules, tensor.key)
        if rule is not None and tied and rule.path is None and _is_embedding(opened, rule.same_as):
            continue  # a second copy of the embedding that is replaced
        saved = adapter.saved.get(_PATHS.get(rule.path or "", "")) if rule is not None else None
        tensors.append(tensor if saved is None else dataclasses.replace(saved, key=tensor.key))
    return dataclasses.replace(opened, tensors=tensors, inputs=[*opened.inputs, *adapter.inputs])


def _is_embedding(opened: OpenedBase, key: str | None) -> bool:
    rule = find_rule(opened.rules, key)[0] if key else None
    return rule is not None and rule.path == "embed.embedding"
