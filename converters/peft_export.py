"""One adapter of a BANK -> a PEFT folder that `peft` loads: the way back from `peft_lora`.

The tensors lose the zero rows that the bank's common rank added, and `adapter_config.json` is the one that came in;
for an adapter that had none it is derived from the tensors, with rank and alpha patterns where modules differ. An
embedding or head that the adapter saved (`modules_to_save`) is the base's: a bank has none.
"""

from __future__ import annotations

import collections
import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from converters.folders import new_folder, write_json
from converters.hf_llama import module_name
from converters.own_folders import read_bank, read_base, read_origin
from converters.peft_settings import read_settings
from converters.rules import Progress
from converters.tensor_files import DTYPES, TensorReader, TensorWriter
from meteora_jax.config import ENDS, PROJECTIONS, AdapterInfo, BankConfig, InputError
from meteora_jax.io.provenance import BaseOrigin, misfits

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_VOCAB_TENSORS = {
    ("embed", "a"): "lora_embedding_A", ("embed", "b"): "lora_embedding_B", ("head", "a"): "lora_A.weight",
    ("head", "b"): "lora_B.weight", ("embed", "rows"): "token_adapter.trainable_tokens_delta",
    ("head", "rows"): "token_adapter.trainable_tokens_delta",
}  # fmt: skip
_TENSORS = {"a": "lora_A.weight", "b": "lora_B.weight", "bias": "lora_B.bias", "magnitude": "lora_magnitude_vector"}


@dataclasses.dataclass(frozen=True)
class BankAdapter:
    """One adapter of a bank on disk."""

    folder: Path
    bank: BankConfig
    index: int
    reader: TensorReader

    @property
    def info(self) -> AdapterInfo:
        return self.bank.adapters[self.index]

    def slice(self, layer: int, projection: str, part: str) -> np.ndarray:
        """a [R, I], b [R, O], scale [1], or bias, magnitude, dora [O] of one module, as the bank holds it."""
        return self.reader.slice(f"{projection}.{part}", layer, self.index)

    def scale(self, layer: int, projection: str) -> float:
        return float(self.slice(layer, projection, "scale")[0])

    def rank(self, layer: int, projection: str) -> int:
        """Rows that are not zero padding: up to the last one with a value in A or B; 0 for a module without a part."""
        if projection not in self.bank.ranks:
            return 0
        rows = [self.slice(layer, projection, half).any(axis=1) for half in ("a", "b")]
        used = np.flatnonzero(rows[0] | rows[1])
        return int(used[-1]) + 1 if used.size else 0


@dataclasses.dataclass(frozen=True)
class Module:
    """One adapted module: its place, its own rank, and which of a, b, bias, magnitude it has."""

    layer: int
    projection: str
    rank: int
    parts: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"model.layers.{self.layer}.{module_name(self.projection)}"


def open_adapter(bank: str | os.PathLike[str], name: str) -> BankAdapter:
    """The adapter `name` of a BANK folder.

    Raises:
        InputError: no such folder or adapter, or tensors that are not those of bank.json.
    """
    folder = Path(bank)
    config, reader = read_bank(folder)
    if name not in config.names:
        raise InputError(f"{folder / 'bank.json'}: adapters: expected one of {', '.join(config.names)}, found {name!r}")
    return BankAdapter(folder, config, config.names.index(name), reader)


def export_adapter(
    bank: str | os.PathLike[str],
    name: str,
    dest: str | os.PathLike[str],
    overwrite: bool = False,
    progress: Progress | None = None,
    base: str | os.PathLike[str] | None = None,
) -> dict[str, Any]:
    """Writes one adapter as a PEFT folder.

    Args:
        bank: the BANK folder.
        name: of the adapter.
        dest: the folder to make.
        overwrite: replace a `dest` that holds something, once the new one is complete.
        progress: called after each tensor with (key, done, total).
        base: the BASE folder, of adapters with `modules_to_save` alone.

    Returns:
        What `adapter_config.json` holds.

    Raises:
        InputError: no such adapter, a bank whose settings and tensors contradict each other, or no base where the
            adapter saved modules of it.
    """
    adapter = open_adapter(bank, name)
    modules = list_modules(adapter)
    raw = adapter.info.peft_config or derive_settings(adapter, modules)
    dtype = DTYPES[adapter.info.dtype] if adapter.info.dtype else None
    wanted = {_key(module, part): _read(adapter, module, part) for module in modules for part in module.parts}
    wanted |= _read_vocab_adapters(adapter)
    saved = _read_saved(adapter, None if base is None else Path(base))
    with new_folder(dest, overwrite, [adapter.folder / "bank.json"]) as partial:
        specs = {key: (dtype or values.dtype, values.shape) for key, values in wanted.items()}
        specs |= {key: (values.dtype, values.shape) for key, values in saved.items()}
        wanted |= saved
        writer = TensorWriter(partial / WEIGHTS, specs)
        for done, (key, values) in enumerate(wanted.items(), start=1):
            out = writer.slice(key)
            out[...] = values.astype(out.dtype)
            if not np.array_equal(out, values):
                raise InputError(
                    f"{adapter.folder / 'bank.json'}: {name}: dtype: expected one that holds {key}, "
                    f"found {adapter.info.dtype}"
                )
            if progress is not None:
                progress(key, done, len(wanted))
        write_json(partial / CONFIG, raw)
    return raw


def _read_saved(adapter: BankAdapter, base: Path | None) -> dict[str, np.ndarray]:
    """{key: values} of the modules that the adapter saved, as the base has them."""
    where = f"{adapter.folder / 'bank.json'}: {adapter.info.name}: peft_config"
    raw = adapter.info.peft_config
    modules = read_settings(raw, where).saved if raw else ()
    if not modules:
        return {}
    if base is None:
        names = ", ".join(module.rpartition(".")[2] for module in modules)
        raise InputError(f"{where}: modules_to_save: expected --base with the base whose {names} it saved, found none")
    config, weights = read_base(base)
    if problems := misfits(adapter.bank, config, read_origin(base), str(adapter.folder / "bank.json")):
        raise InputError(problems)
    found = {}
    for module in modules:
        embedding = module == ENDS["embed"] or config.tie_word_embeddings
        own = weights.slice("embed.embedding") if embedding else weights.slice("lm_head.kernel").T
        found[f"base_model.model.{module}.weight"] = own
    return found


def _key(module: Module, part: str) -> str:
    return f"base_model.model.{module.name}.{_TENSORS[part]}"


def _read(adapter: BankAdapter, module: Module, part: str) -> np.ndarray:
    values = adapter.slice(module.layer, module.projection, part)
    if part == "a":
        return values[: module.rank]
    return values[: module.rank].T if part == "b" else values


def _read_vocab_adapters(adapter: BankAdapter) -> dict[str, np.ndarray]:
    """{key: values} of what the adapter changes at embedding and head; which parts those are its settings say."""
    bank, raw = adapter.bank, adapter.info.peft_config
    if not raw or not bank.vocab_adapters:
        return {}
    where = f"{adapter.folder / 'bank.json'}: {adapter.info.name}: peft_config"
    settings = read_settings(raw, where)
    found: dict[str, np.ndarray] = {}
    problems = []
    for matrix, module in ENDS.items():
        own, ids = bank.vocab_adapters.get(matrix), settings.tokens.get(matrix, ())
        rank = settings.rank_of(module) if settings.adapts(matrix) else 0
        tokens = own.tokens[adapter.index] if own else ()
        if rank > (own.rank if own else 0) or (ids and tokens != ids):
            problems.append(f"{where}: {module}: expected what the tensors hold, found rank {rank}, tokens {ids}")
            continue
        parts: dict[str, np.ndarray] = {}
        if rank:
            scale = float(adapter.reader.slice(f"{matrix}.scale", adapter.index)[0])
            if np.float32(settings.scale_of(module)) != np.float32(scale):
                problems.append(f"{where}: {module}: expected scale {scale}, found {settings.scale_of(module)}")
            parts["a"] = adapter.reader.slice(f"{matrix}.a", adapter.index)[:rank]
            parts["b"] = adapter.reader.slice(f"{matrix}.b", adapter.index)[:rank].T
        if ids and module.rpartition(".")[2] in adapter.info.targets:  # a tied head's may be the embedding's
            parts["rows"] = adapter.reader.slice(f"{matrix}.rows", adapter.index)[: len(ids)]
        found |= {f"base_model.model.{module}.{_VOCAB_TENSORS[matrix, part]}": values for part, values in parts.items()}
    if problems:
        raise InputError(problems)
    return found


def list_modules(adapter: BankAdapter) -> list[Module]:
    """The modules that an adapter holds, with their own ranks; its settings are checked against its tensors.

    Raises:
        InputError: settings and tensors contradict each other; all modules at once.
    """
    bank, raw = adapter.bank, adapter.info.peft_config
    where = f"{adapter.folder / 'bank.json'}: {adapter.info.name}: peft_config"
    settings = read_settings(raw, where) if raw else None
    problems: list[str] = []
    if settings is not None and settings.invocation != adapter.info.invocation:
        expected, found = list(adapter.info.invocation), list(settings.invocation)
        problems.append(f"{where}: alora_invocation_tokens: expected {expected} (the bank's), found {found}")
    modules: list[Module] = []
    for layer in range(bank.num_layers):
        for p in PROJECTIONS:
            name = f"model.layers.{layer}.{module_name(p)}"
            rank = adapter.rank(layer, p)
            if settings is not None and settings.selects(name):
                expected, limit = settings.rank_of(name), bank.ranks.get(p, 0)
                if not rank <= expected <= limit:
                    problems.append(
                        f"{where}: {name}: expected rank {rank} to {limit} (the tensors'), found {expected}"
                    )
                elif np.float32(settings.scale_of(name)) != np.float32(adapter.scale(layer, p)):
                    scale = adapter.scale(layer, p)
                    problems.append(f"{where}: {name}: expected scale {scale}, found {settings.scale_of(name)}")
                modules.append(_describe(adapter, layer, p, expected))
            elif rank and settings is not None:
                problems.append(f"{where}: target_modules: expected {name} among them (it has tensors), found none")
            elif rank:
                modules.append(_describe(adapter, layer, p, rank))
    if not modules and not problems and adapter.info.name not in bank.vocab_adapter_names:
        problems.append(f"{adapter.folder}: {adapter.info.name}: expected tensors that are not zero, found none")
    if problems:
        raise InputError(problems)
    return modules


def _describe(adapter: BankAdapter, layer: int, p: str, rank: int) -> Module:
    parts = ["a", "b"]
    for part, holders in (("bias", adapter.bank.lora_bias), ("magnitude", adapter.bank.dora)):
        # A magnitude of zero everywhere would be a projection that outputs nothing: it stands for none.
        wanted = {"bias": "lora_bias", "magnitude": "use_dora"}[part]
        if p in holders and (adapter.info.peft_config.get(wanted) or adapter.slice(layer, p, part).any()):
            parts.append(part)
    return Module(layer, p, rank, tuple(parts))


def derive_settings(adapter: BankAdapter, modules: Sequence[Module]) -> dict[str, Any]:
    """An `adapter_config.json` for tensors that came without one."""
    record = adapter.bank.base
    origin = BaseOrigin.from_json(record, f"{adapter.folder / 'bank.json'}: base") if record else None
    alphas = {m.name: adapter.scale(m.layer, m.projection) * m.rank for m in modules}
    ranks = {m.name: m.rank for m in modules}
    rank = collections.Counter(ranks.values()).most_common(1)[0][0]
    alpha = collections.Counter(alphas.values()).most_common(1)[0][0]
    adapted = {(m.layer, m.projection) for m in modules}
    projections = [p for p in PROJECTIONS if any(p == q for _, q in adapted)]
    everywhere = len(adapted) == adapter.bank.num_layers * len(projections)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": projections if everywhere else [m.name for m in modules],
        "rank_pattern": {name: r for name, r in ranks.items() if r != rank},
        "alpha_pattern": {name: a for name, a in alphas.items() if a != alpha},
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": any("magnitude" in m.parts for m in modules),
        "lora_bias": any("bias" in m.parts for m in modules),
        "alora_invocation_tokens": list(adapter.info.invocation) or None,
        "base_model_name_or_path": origin.name if origin else None,
    }
