"""BANK folders: adapters from disk and back."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import DTypeLike

from meteora_jax.bank import AdapterBank
from meteora_jax.config import BankConfig, InputError, LlamaConfig, read_json
from meteora_jax.io.files import refuse_unimported_bank
from meteora_jax.io.provenance import BaseOrigin, misfits
from meteora_jax.io.tensors import WEIGHTS, read_tensors, write_folder


def load_bank(
    folder: str | os.PathLike[str], base: LlamaConfig, dtype: DTypeLike, origin: BaseOrigin | None = None
) -> AdapterBank:
    """BANK/ -> the bank, refused if it was imported for a base of another shape, or other norms than `origin`'s."""
    folder = Path(folder)
    refuse_unimported_bank(folder)
    source = str(folder / "bank.json")
    config = BankConfig.from_json(read_json(folder / "bank.json"), source)
    if problems := misfits(config, base, origin, source):
        raise InputError(problems)
    tensors = read_tensors(folder / WEIGHTS, config.weight_shapes())
    vocab: dict[str, dict[str, np.ndarray]] = {}
    for end in config.vocab_adapters:
        held = {k: tensors[f"{end}.{k}"] for k in ("a", "b", "scale", "rows") if f"{end}.{k}" in tensors}
        vocab[end] = {k: t.astype(np.float32 if k == "scale" else dtype) for k, t in held.items()}

    def part(kind: str, projections: Iterable[str], dtype: DTypeLike = np.float32) -> dict[str, np.ndarray]:
        return {p: tensors[f"{p}.{kind}"].astype(dtype) for p in projections}

    a, b, scale = part("a", config.ranks, dtype), part("b", config.ranks, dtype), part("scale", config.ranks)
    dora, bias = part("dora", config.dora), part("bias", config.lora_bias)
    return AdapterBank(a, b, scale, config, dora, bias, vocab, part("own_gate", config.own_gates))


def save_bank(folder: str | os.PathLike[str], bank: AdapterBank) -> None:
    """Writes BANK/ in float32, whole or not at all.

    Each adapter's `sha256` becomes that of its own tensors here: they are from no file.
    """
    assert not bank.vocab_adapters, "a bank from training has adapters in the layers alone"
    parts = {"a": bank.a, "b": bank.b, "scale": bank.scale, "own_gate": bank.own_gate}
    tensors = {f"{p}.{k}": np.ascontiguousarray(v[p], np.float32) for k, v in parts.items() for p in v}
    infos = []
    for i, info in enumerate(bank.config.adapters):
        digest = hashlib.sha256()
        for key in sorted(tensors):
            digest.update(np.ascontiguousarray(tensors[key][:, i]).tobytes())
        infos.append(dataclasses.replace(info, sha256=digest.hexdigest()))
    config = dataclasses.replace(bank.config, adapters=tuple(infos))
    write_folder(Path(folder), "bank.json", config.to_json(), tensors)
