"""The original MeteoRA's checkpoints -> GATES, and BANK and BASE where they are asked for."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from converters.base_folder import common_dtype, fill_base, norms_sha256
from converters.folders import new_folder, sha256, write_json
from converters.meteora_layout import base_names, gate_shapes, open_base, read_checkpoint
from converters.own_folders import read_bank, read_base
from converters.rules import Placement, Progress, TensorPlan, copy_tensor
from converters.tensor_files import TensorWriter, dtype_name
from meteora_jax.config import PROJECTIONS, AdapterInfo, BankConfig, InputError, LlamaConfig, read_json
from meteora_jax.gate_config import GateConfig
from meteora_jax.io.provenance import BaseOrigin


def describe_gates(
    src: str | os.PathLike[str],
    bank: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    alpha: float | None = None,
    names: Sequence[str] = (),
) -> list[TensorPlan]:
    """What `import_gates` would do, tensor by tensor, from headers alone; arguments as there.

    Raises:
        InputError: as `import_gates`, but for values: those that are not finite, and those that an existing bank or
            base does not have.
    """
    folder = Path(bank)
    found = read_checkpoint(Path(src), base)
    known = (folder / "bank.json").exists()
    if known:
        _check_count(folder, read_bank(folder)[0], found.config, found.adapters)
    else:
        _check_new_bank(folder, alpha, names, found.adapters)
    lora = dtype_name(common_dtype({p.source.dtype for p in found.placements if ".lora_" in p.path}))
    makes_base = base is not None and found.given is None
    own = open_base(Path(src)).plan(None)[1] if makes_base else {}
    placed = {id(p.source): p for p in found.placements}
    rows = []
    for tensor in found.tensors:
        to, stored, how = None, None, "dropped: implied"
        if place := placed.get(id(tensor)):
            at = "" if place.layer is None else f"[{place.layer}]"
            how = "transposed" if place.transform.transpose else "as is"
            part = place.path.rpartition(".")[2]
            if part == "gate":
                to, stored = f"gates {place.path.removesuffix('.gate')}{at}", "F32"
            elif part in ("lora_a", "lora_b"):
                how = f"split into {found.adapters} adapters" + (", transposed" if part == "lora_b" else "")
                to, stored = f"bank {place.path.replace('.lora_', '.')}{at}", lora
                if known:
                    to, stored, how = None, None, f"dropped: must be those of {folder}"
            elif makes_base:
                to, stored = f"base {place.path}{at}", dtype_name(own[place.path])
            else:
                why = "no base asked for" if found.given is None else f"must equal that of {found.given}"
                to, stored, how = None, None, f"dropped: {why}"
        rows.append(TensorPlan(tensor.key, dtype_name(tensor.dtype), tensor.shape, to, stored, how))
    return rows


def import_gates(
    src: str | os.PathLike[str],
    dest: str | os.PathLike[str],
    bank: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    alpha: float | None = None,
    names: Sequence[str] = (),
    top_k: int = 2,
    temperature: float = 1.0,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> GateConfig:
    """Imports an original checkpoint's gates, and its adapters where `bank` does not exist yet.

    Args:
        src: the checkpoint's folder.
        dest: the GATES folder to make.
        bank: the BANK that the gates are for. Its adapters are found in the checkpoint by their values, whatever their
            order; a bank that does not exist is created from the checkpoint's own adapters, and `alpha` and `names`
            then say what the checkpoint does not.
        base: a BASE folder; the checkpoint's base weights must be its own. One that does not exist is created from the
            checkpoint. None: only `config.json`, which lies in `src`, is read.
        alpha: LoRA's alpha in training; every adapter's scale is alpha / rank.
        names: of the adapters, in the checkpoint's order.
        top_k: adapters for a token, as trained.
        temperature: of the softmax over them.
        overwrite: replace a `dest` that holds something, once the new one is complete.
        progress: called after each tensor with (key, done, total).

    Raises:
        InputError: everything that is wrong with the checkpoint, another base, adapters that the bank lacks; nothing
            is then written.
    """
    src, folder = Path(src), Path(bank)
    found = read_checkpoint(src, base)
    config, files, placements = found.config, found.files, found.placements
    adapters, rank = found.adapters, found.rank
    if found.given is not None:
        _check_base(found.given, config, placements)
    known = (folder / "bank.json").exists()
    if known:
        names = _match_bank(folder, config, placements, adapters, rank)
    else:
        _check_new_bank(folder, alpha, names, adapters)
    gates = GateConfig(tuple(names), top_k, temperature)
    opened = open_base(src) if base is not None and found.given is None else None
    inputs = [*files, found.config_file]
    with contextlib.ExitStack() as stack:  # every folder is complete before the first of them appears
        partial = stack.enter_context(new_folder(dest, overwrite, inputs))
        specs = {p: (np.dtype(np.float32), s) for p, s in gate_shapes(config, adapters).items()}
        _fill(TensorWriter(partial / "weights.safetensors", specs), placements, ".gate", progress)
        write_json(partial / "gates.json", gates.to_json())
        if not known:
            assert alpha is not None, "checked above"
            partial = stack.enter_context(new_folder(folder, False, files))
            raw = read_json(found.config_file)
            origin = BaseOrigin.of_base(raw, str(found.config_file)) if found.given else None
            origin = origin or BaseOrigin(base_names(raw), None, norms_sha256(placements))
            _write_bank(partial, config, placements, names, rank, alpha, files, progress, origin)
        if opened is not None and base is not None:
            fill_base(stack.enter_context(new_folder(base, False, inputs)), opened, *opened.plan(None), progress)
    return gates


def _fill(writer: TensorWriter, placements: Sequence[Placement], part: str, progress: Progress | None) -> None:
    problems: list[str] = []
    mine = [p for p in placements if p.path.endswith(part)]
    for done, place in enumerate(mine, start=1):
        assert place.layer is not None, "every gate belongs to a layer"
        out = writer.slice(place.path.removesuffix(part), place.layer)
        problems += copy_tensor(place.source, out, place.transform)
        if progress is not None:
            progress(place.source.key, done, len(mine))
    if problems:
        raise InputError(problems)


def _check_base(base: Path, config: LlamaConfig, placements: Sequence[Placement]) -> None:
    _, reader = read_base(base)
    problems = []
    for place in placements:
        if place.path not in config.weight_shapes():
            continue
        own = reader.slice(place.path) if place.layer is None else reader.slice(place.path, place.layer)
        own = own.T if place.transform.transpose else own
        for rows, block in place.source.blocks():
            if not np.array_equal(block.astype(own.dtype), own[rows]):
                problems.append(f"{place.source.where}: expected the values of {base}, found others")
                break
    if problems:
        raise InputError(problems)


def _match_bank(
    folder: Path, config: LlamaConfig, placements: Sequence[Placement], adapters: int, rank: int
) -> tuple[str, ...]:
    """The bank's name of each of the checkpoint's adapters, found by the values of A and B."""
    source = folder / "bank.json"
    bank, reader = read_bank(folder)
    _check_count(folder, bank, config, adapters)
    fits = [set(range(adapters)) for _ in range(adapters)]
    for place in placements:
        p, _, part = place.path.rpartition(".lora_")
        if not p:
            continue
        found = place.source.read()
        found = (found if part == "a" else found.T).reshape(adapters, rank, -1).astype(np.float32)
        own = np.zeros_like(found)
        if p in bank.ranks:
            stored = reader.slice(f"{p}.{part}", place.layer or 0).astype(np.float32)
            if stored.shape[2] != found.shape[2]:
                raise InputError(f"{source}: base_shapes.{p}: expected the checkpoint's, found {bank.base_shapes[p]}")
            rows = min(rank, stored.shape[1])
            if stored[:, rows:].any():
                raise InputError(f"{source}: ranks.{p}: expected at most {rank} (the checkpoint's), found more")
            own[:, :rows] = stored[:, :rows]
        for j, mine in enumerate(fits):
            fits[j] = {k for k in mine if np.array_equal(found[j], own[k])}
    names: list[str] = []
    problems = []
    for j, mine in enumerate(fits):
        k = next((k for k in sorted(mine) if bank.names[k] not in names), None)
        if k is None:
            problems.append(f"{source}: adapters: expected one with the values of adapter {j} there, found none")
        else:
            names.append(bank.names[k])
    if problems:
        raise InputError(problems)
    return tuple(names)


def _check_count(folder: Path, bank: BankConfig, config: LlamaConfig, adapters: int) -> None:
    if len(bank.names) != adapters or bank.num_layers != config.num_layers:
        raise InputError(
            f"{folder / 'bank.json'}: expected {adapters} adapters in {config.num_layers} layers (the checkpoint's), "
            f"found {len(bank.names)} in {bank.num_layers}"
        )


def _check_new_bank(folder: Path, alpha: float | None, names: Sequence[str], adapters: int) -> None:
    problems = []
    if alpha is None:
        problems.append(f"{folder}: expected a bank, or alpha to make one from the checkpoint, found neither")
    if len(names) != adapters or len(set(names)) != adapters:
        found = f"{len(names)} ({len(set(names))} different)"
        problems.append(f"{folder}: names: expected {adapters}, one an adapter of the checkpoint, found {found}")
    if problems:
        raise InputError(problems)


def _write_bank(
    partial: Path, config: LlamaConfig, placements: Sequence[Placement], names: Sequence[str], rank: int, alpha: float,
    files: Sequence[Path], progress: Progress | None, origin: BaseOrigin,
) -> None:  # fmt: skip
    mine = [p for p in placements if ".lora_" in p.path]
    dtype = common_dtype({p.source.dtype for p in mine})
    settings = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "inference_mode": True, "r": rank, "lora_alpha": alpha,
        "lora_dropout": 0.0, "bias": "none", "target_modules": list(PROJECTIONS),
        "base_model_name_or_path": origin.name,
    }  # fmt: skip
    digest = sha256(files[0])
    infos = tuple(
        AdapterInfo(name, rank, PROJECTIONS, f"{files[0].name}, adapter {j}", digest, settings, dtype_name(dtype))
        for j, name in enumerate(names)
    )
    shapes = {p: config.projection_shape(p) for p in PROJECTIONS}
    bank = BankConfig(
        infos, dict.fromkeys(PROJECTIONS, rank), config.num_layers, shapes, base=dataclasses.asdict(origin)
    )
    kinds = {k: np.dtype(np.float32) if k.endswith(".scale") else dtype for k in bank.weight_shapes()}
    writer = TensorWriter(partial / "weights.safetensors", {k: (kinds[k], s) for k, s in bank.weight_shapes().items()})
    problems: list[str] = []
    for done, place in enumerate(mine, start=1):
        assert place.layer is not None, "every adapter's tensors belong to a layer"
        p, _, part = place.path.rpartition(".lora_")
        out = writer.slice(f"{p}.{part}", place.layer)
        out = out.reshape(len(names) * rank, -1)  # a view: the slice is contiguous
        problems += copy_tensor(place.source, out if part == "a" else out.T)
        writer.slice(f"{p}.scale", place.layer)[:] = alpha / rank
        if progress is not None:
            progress(place.source.key, done, len(mine))
    if problems:
        raise InputError(problems)
    write_json(partial / "bank.json", bank.to_json())
