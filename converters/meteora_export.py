"""BASE, BANK and GATES -> a checkpoint of the original MeteoRA."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TypedDict

import numpy as np

from converters.base_folder import common_dtype
from converters.folders import new_folder, write_json
from converters.hf_llama import copy_tokenizer
from converters.meteora_layout import checkpoint_shapes, gate_shapes, meteora_rules
from converters.own_folders import read_bank, read_base, read_origin
from converters.rules import Progress, Rule
from converters.tensor_files import TensorReader, TensorWriter
from meteora_jax.config import BankConfig, InputError, LlamaConfig, read_json
from meteora_jax.gate_config import GateConfig
from meteora_jax.io import hf_config
from meteora_jax.io.provenance import BaseOrigin, misfits


class Unplaced(TypedDict):
    """What the original's layout has no place for: the adapters' names in its order, their rank, LoRA's alpha."""

    names: list[str]
    rank: int
    alpha: float


def export_gates(
    base: str | os.PathLike[str],
    bank: str | os.PathLike[str],
    gates: str | os.PathLike[str],
    dest: str | os.PathLike[str],
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Unplaced:
    """Writes base, bank and gates as a checkpoint of the original MeteoRA, ranks padded to the largest.

    Returns:
        What the layout has no place for.

    Raises:
        InputError: damaged folders or ones that do not belong together; DoRA, biases, scales that differ, or a
            token router, none of which the original knows.
    """
    base, bank, gates = Path(base), Path(bank), Path(gates)
    config, own = read_base(base)
    origin = read_origin(base)
    bank_config, adapters = read_bank(bank)
    gate_config = GateConfig.from_json(read_json(gates / "gates.json"), str(gates / "gates.json"))
    count, rank = len(bank_config.names), max(bank_config.ranks.values(), default=0)
    columns = _open_gates(gates, config, gate_config)
    scale = _common_scale(bank / "bank.json", config, origin, bank_config, adapters)
    if sorted(gate_config.names) != sorted(bank_config.names):
        raise InputError(f"{gates / 'gates.json'}: names: expected the bank's adapters, found {gate_config.names}")
    order = [gate_config.names.index(name) for name in bank_config.names]
    rules = [rule for rule in meteora_rules(config) if rule.path is not None]
    shapes = checkpoint_shapes(config, count, rank)
    lora = common_dtype({adapters.dtype(f"{p}.a") for p in bank_config.ranks})
    specs: dict[str, tuple[np.dtype, tuple[int, ...]]] = {}
    jobs: list[tuple[str, Rule, int | None]] = []
    for rule in rules:
        path = rule.path or ""
        dtype = own.dtype(path) if path in config.weight_shapes() else lora
        dtype = np.dtype(np.float32) if path.endswith(".gate") else dtype
        for layer in range(config.num_layers) if rule.layered else (None,):
            key = rule.pattern.format(layer=layer)
            specs[key] = (dtype, rule.transform.source_shape(shapes[path][1:] if rule.layered else shapes[path]))
            jobs.append((key, rule, layer))
    with new_folder(dest, overwrite, [base / "config.json", bank / "bank.json", gates / "gates.json"]) as partial:
        writer = TensorWriter(partial / "model.safetensors", specs)
        for done, (key, rule, layer) in enumerate(jobs, start=1):
            path, index = rule.path or "", () if layer is None else (layer,)
            p, _, part = path.rpartition(".")
            if path in config.weight_shapes():
                values = own.slice(path, *index)
            elif part == "gate":
                values = columns.slice(p, *index)[:, order]
            else:
                values = _stacked(adapters, bank_config, p, part.removeprefix("lora_"), index, shapes[path][1:], rank)
            writer.slice(key)[...] = values.T if rule.transform.transpose else values
            if progress is not None:
                progress(key, done, len(jobs))
        copy_tokenizer(base, partial)
        name = {"_name_or_path": origin.name} if origin and origin.name else {}
        write_json(partial / "config.json", {**name, **hf_config.to_hf(config)})
    return {"names": list(bank_config.names), "rank": rank, "alpha": scale * rank}


def _open_gates(folder: Path, config: LlamaConfig, gates: GateConfig) -> TensorReader:
    """The gates' columns; refused where the original's layout has no place for their form."""
    if gates.form is not None:
        expected = "MeteoRA's own gates (its layout has no place for others)"
        raise InputError(f"{folder / 'gates.json'}: form: expected {expected}, found a token router")
    if gates.null:
        raise InputError(
            f"{folder / 'gates.json'}: null: expected gates that always choose an adapter, found a null choice"
        )
    return TensorReader(folder / "weights.safetensors", gate_shapes(config, len(gates.names)))


def _common_scale(
    source: Path, config: LlamaConfig, origin: BaseOrigin | None, bank: BankConfig, reader: TensorReader
) -> float:
    problems = [
        f"{source}: {what}: expected none (the original MeteoRA has no place for it), found {', '.join(found)}"
        for what, found in (
            ("dora", bank.dora),
            ("lora_bias", bank.lora_bias),
            ("ends", bank.vocab_adapter_names),
            ("invocation", bank.invoked),
        )
        if found
    ]
    problems += misfits(bank, config, origin, str(source))
    scales = np.unique(np.concatenate([reader.slice(f"{p}.scale").ravel() for p in bank.ranks]))
    scales = scales[scales != 0]
    if len(scales) != 1:
        problems.append(f"{source}: scale: expected one for all adapters (as in the original), found {scales.tolist()}")
    if problems:
        raise InputError(problems)
    return float(scales[0])


def _stacked(
    reader: TensorReader, bank: BankConfig, p: str, half: str, index: tuple[int, ...], shape: tuple[int, ...], rank: int
) -> np.ndarray:
    """One module's lora_A [A*R, I] or lora_B [O, A*R], adapter after adapter."""
    if p not in bank.ranks:
        return np.zeros(shape, np.float32)
    acts = reader.slice(f"{p}.scale", *index) != 0
    values = reader.slice(f"{p}.{half}", *index) * acts[:, None, None]  # [A, r, I or O]
    padded = np.pad(values, [(0, 0), (0, rank - values.shape[1]), (0, 0)]).reshape(-1, values.shape[2])
    return padded if half == "a" else padded.T
