"""The original MeteoRA's checkpoints <-> BANK and GATES.

Layout (the release of arXiv 2405.13053): `model.safetensors`, single or sharded, every key behind `base_model.model.`;
each projection holds `base_layer.weight` [O, I], `lora_A.weight` [A*R, I] and `lora_B.weight` [O, A*R], adapter after
adapter, and `moe_gate.weight` [A, I]. That order is the release's own code's (github.com/NJUDeepEngine/meteora):
`merge_lora_weights` joins the adapters' A by rows and their B by columns one after the other, and the layer reads
rows i*R to (i+1)*R of A, and those columns of B, as adapter i. Neither names nor scale are in the file: names follow
the training's task order, and the scale is alpha / R for every adapter.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from converters.base_folder import OpenedBase, common_dtype, fill_base, norms_sha256
from converters.folders import new_folder, sha256, write_json
from converters.hf_llama import copy_tokenizer, llama_rules, module_name, read_weights, untie
from converters.own_folders import read_bank, read_base, read_origin
from converters.rules import TRANSPOSE, Placement, Progress, Rule, TensorPlan, copy_tensor, plan
from converters.tensor_files import SourceTensor, TensorReader, TensorWriter, dtype_name
from meteora_jax.config import PROJECTIONS, AdapterInfo, BankConfig, InputError, LlamaConfig, read_json
from meteora_jax.gate_config import GateConfig
from meteora_jax.io import hf_config
from meteora_jax.io.provenance import BaseOrigin, misfits

PREFIX = "base_model.model."
_GATE = "moe_gate.weight"


def is_checkpoint(src: Path) -> bool:
    """Whether a folder's weights are those of the original MeteoRA: some projection has its gate."""
    try:
        return any(t.key.startswith(PREFIX) and t.key.endswith(_GATE) for t in read_weights(src)[1])
    except InputError:
        return False


def open_base(src: Path) -> OpenedBase:
    """The base inside a checkpoint; adapters and gates are left. Raises InputError as `hf_llama.open_base`."""
    raw = read_json(src / "config.json")
    files, tensors, remarks = read_weights(src)
    config, untied = untie(hf_config.from_hf(raw), tensors, PREFIX)
    paths = config.weight_shapes()
    rules = [
        rule if rule.path is None or rule.path in paths else Rule(rule.pattern, None, why="not of the base")
        for rule in meteora_rules(config)
    ]
    inputs, tokenizer = [*files, src / "config.json"], lambda folder: copy_tokenizer(src, folder)
    return OpenedBase(config, rules, tensors, inputs, tokenizer, _base_names(raw), remarks=[*remarks, *untied])


def _base_names(raw: Any) -> dict[str, str]:
    """What config.json calls the base; the folder's own name is the checkpoint's."""
    name = raw.get("_name_or_path") if isinstance(raw, dict) else None
    return {"config.json _name_or_path": name} if isinstance(name, str) else {}


def meteora_rules(config: LlamaConfig) -> list[Rule]:
    """The original's keys: the base's (paths as in BASE), `p.gate`, `p.lora_a` and `p.lora_b`."""
    rules = []
    for rule in llama_rules(config):
        pattern = rule.pattern
        if (rule.path or "").endswith((".kernel", ".bias")) and rule.layered:
            module, _, kind = pattern.rpartition(".")
            pattern = f"{module}.base_layer.{kind}"
        same_as = PREFIX + rule.same_as if rule.same_as else None
        rules.append(Rule(PREFIX + pattern, rule.path, rule.transform, same_as))
    for p in PROJECTIONS:
        module = f"{PREFIX}model.layers.{{layer}}.{module_name(p)}"
        rules.append(Rule(f"{module}.{_GATE}", f"{p}.gate", TRANSPOSE))
        rules.append(Rule(f"{module}.lora_A.weight", f"{p}.lora_a"))
        rules.append(Rule(f"{module}.lora_B.weight", f"{p}.lora_b"))
    return rules


def _shapes(config: LlamaConfig, adapters: int, rank: int) -> dict[str, tuple[int, ...]]:
    shapes, n = config.weight_shapes(), config.num_layers
    for p in PROJECTIONS:
        i, o = config.projection_shape(p)
        shapes |= {f"{p}.gate": (n, i, adapters), f"{p}.lora_a": (n, adapters * rank, i)}
        shapes |= {f"{p}.lora_b": (n, o, adapters * rank)}
    return shapes


@dataclasses.dataclass(frozen=True)
class _Checkpoint:
    """A checkpoint after its headers were checked; `given` is the BASE that it must agree with."""

    config: LlamaConfig
    config_file: Path
    given: Path | None
    files: Sequence[Path]
    tensors: Sequence[SourceTensor]
    adapters: int
    rank: int
    placements: Sequence[Placement]


def _read_checkpoint(src: Path, base: str | os.PathLike[str] | None) -> _Checkpoint:
    given = Path(base) if base is not None and Path(base).exists() else None
    config_file = (given or src) / "config.json"
    config = hf_config.from_hf(read_json(config_file), str(config_file))
    files, tensors, _ = read_weights(src)
    config = config if given else untie(config, tensors, PREFIX)[0]
    adapters, rank = _count(tensors, files[0].name)
    placements = plan(meteora_rules(config), tensors, _shapes(config, adapters, rank), files[0].name)
    return _Checkpoint(config, config_file, given, files, tensors, adapters, rank, placements)


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
    found = _read_checkpoint(Path(src), base)
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
            order; a bank that does not exist is made from the checkpoint's own adapters, then `alpha` and `names` say
            what the checkpoint does not.
        base: a BASE folder; the checkpoint's base weights must be its own. One that does not exist is made from the
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
    found = _read_checkpoint(src, base)
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
        specs = {p: (np.dtype(np.float32), s) for p, s in _gate_shapes(config, adapters).items()}
        _fill(TensorWriter(partial / "weights.safetensors", specs), placements, ".gate", progress)
        write_json(partial / "gates.json", gates.to_json())
        if not known:
            assert alpha is not None, "checked above"
            partial = stack.enter_context(new_folder(folder, False, files))
            raw = read_json(found.config_file)
            origin = BaseOrigin.of_base(raw, str(found.config_file)) if found.given else None
            origin = origin or BaseOrigin(_base_names(raw), None, norms_sha256(placements))
            _write_bank(partial, config, placements, names, rank, alpha, files, progress, origin)
        if opened is not None and base is not None:
            fill_base(stack.enter_context(new_folder(base, False, inputs)), opened, *opened.plan(None), progress)
    return gates


def _gate_shapes(config: LlamaConfig, adapters: int) -> dict[str, tuple[int, ...]]:
    return {p: (config.num_layers, config.projection_shape(p)[0], adapters) for p in PROJECTIONS}


def _count(tensors: Sequence[SourceTensor], file: str) -> tuple[int, int]:
    """(adapters, rank) as the first gate and the first lora_A say; `plan` holds all others to them."""
    gate = next((t for t in tensors if t.key.endswith(_GATE) and len(t.shape) == 2), None)
    lora = next((t for t in tensors if t.key.endswith("lora_A.weight") and len(t.shape) == 2), None)
    if gate is None or lora is None or not gate.shape[0]:
        raise InputError(f"{file}: {_GATE}: expected gates [A, I] and lora_A [A*R, I] as in MeteoRA, found none")
    adapters, rows = gate.shape[0], lora.shape[0]
    if not rows or rows % adapters:
        raise InputError(f"{lora.where}: expected a multiple of {adapters} rows (the gates'), found {rows}")
    return adapters, rows // adapters


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
            held = reader.slice(f"{p}.{part}", place.layer or 0).astype(np.float32)
            if held.shape[2] != found.shape[2]:
                raise InputError(f"{source}: base_shapes.{p}: expected the checkpoint's, found {bank.base_shapes[p]}")
            rows = min(rank, held.shape[1])
            if held[:, rows:].any():
                raise InputError(f"{source}: ranks.{p}: expected at most {rank} (the checkpoint's), found more")
            own[:, :rows] = held[:, :rows]
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


def export_gates(
    base: str | os.PathLike[str],
    bank: str | os.PathLike[str],
    gates: str | os.PathLike[str],
    dest: str | os.PathLike[str],
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Writes base, bank and gates as a checkpoint of the original MeteoRA, ranks padded to the largest.

    Returns:
        What the layout has no place for: {"names": in the checkpoint's order, "rank", "alpha"}.

    Raises:
        InputError: damaged folders or ones that do not belong together; DoRA, biases, scales that differ, or a
            token router, none of which the original knows.
    """
    base, bank, gates = Path(base), Path(bank), Path(gates)
    config, own = read_base(base)
    origin = read_origin(base)
    held, adapters = read_bank(bank)
    gate_config = GateConfig.from_json(read_json(gates / "gates.json"), str(gates / "gates.json"))
    count, rank = len(held.names), max(held.ranks.values(), default=0)
    columns = _open_gates(gates, config, gate_config)
    scale = _common_scale(bank / "bank.json", config, origin, held, adapters)
    if sorted(gate_config.names) != sorted(held.names):
        raise InputError(f"{gates / 'gates.json'}: names: expected the bank's adapters, found {gate_config.names}")
    order = [gate_config.names.index(name) for name in held.names]
    rules = [rule for rule in meteora_rules(config) if rule.path is not None]
    shapes = _shapes(config, count, rank)
    lora = common_dtype({adapters.dtype(f"{p}.a") for p in held.ranks})
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
                values = _stacked(adapters, held, p, part.removeprefix("lora_"), index, shapes[path][1:], rank)
            writer.slice(key)[...] = values.T if rule.transform.transpose else values
            if progress is not None:
                progress(key, done, len(jobs))
        copy_tokenizer(base, partial)
        name = {"_name_or_path": origin.name} if origin and origin.name else {}
        write_json(partial / "config.json", {**name, **hf_config.to_hf(config)})
    return {"names": list(held.names), "rank": rank, "alpha": scale * rank}


def _open_gates(folder: Path, config: LlamaConfig, gates: GateConfig) -> TensorReader:
    """The gates' columns; refused where the original's layout has no place for their form."""
    if gates.form is not None:
        expected = "MeteoRA's own gates (its layout has no place for others)"
        raise InputError(f"{folder / 'gates.json'}: form: expected {expected}, found a token router")
    return TensorReader(folder / "weights.safetensors", _gate_shapes(config, len(gates.names)))


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
