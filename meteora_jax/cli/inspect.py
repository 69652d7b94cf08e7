"""`meteora inspect`: what a base, bank, gates, index or encoder folder holds, or what an import would make of files."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro
from rich.table import Table

from meteora_jax.cli.report import console, write_json
from meteora_jax.config import PROJECTIONS, BankConfig, InputError, LlamaConfig, read_json
from meteora_jax.gate_config import GateConfig
from meteora_jax.io import hf_config

if TYPE_CHECKING:
    from converters.tensor_files import SourceTensor
else:  # slow to import
    SourceTensor = Any


@dataclass(frozen=True)
class Inspect:
    """Say what a base, bank, gates, index or encoder folder holds, or what is in files that could be imported."""

    path: tyro.conf.Positional[Path]
    """BASE, BANK, GATES, INDEX or ENCODER folder; a source of base weights; or a PEFT folder."""
    tensors: bool = False
    """List the tensors of files that could be imported, each with where it would go."""
    json: Path | None = None
    """Write the report here too, tensors included."""


def inspect(command: Inspect) -> None:
    """Runs `meteora inspect`: describes the folder and checks its tensors' names and shapes."""
    found = describe(command.path)
    table = Table("key", "value", title=f"{command.path}: {found['kind']}", title_justify="left")
    for key, value in found["about"].items():
        table.add_row(key, str(value))
    console.print(table)
    if found.get("adapters"):
        listing = Table("adapter", "rank", "projections", "source", "sha256")
        for a in found["adapters"]:
            listing.add_row(a["name"], str(a["rank"]), " ".join(a["targets"]), a["source"], a["sha256"][:12])
        console.print(listing)
    for row in found.get("tensors", ()) if command.tensors else ():
        to = f" -> {row['to']}" if row.get("to") else ""
        console.print(f"{row['key']} {row['dtype']} {row['shape']}{to}", highlight=False, soft_wrap=True)
    write_json(command.json, found)


def describe(path: Path) -> dict[str, Any]:
    """A folder's kind and contents, from headers alone.

    Raises:
        InputError: none of the kinds, or its tensors are not those that its description implies.
    """
    import converters
    from converters.peft_folder import CONFIG, read_tensors
    from converters.peft_settings import read_settings
    from converters.tensor_files import TensorReader
    from meteora_jax.io.tensors import WEIGHTS

    if (path / "bank.json").exists():
        bank = BankConfig.from_json(read_json(path / "bank.json"), str(path / "bank.json"))
        TensorReader(path / WEIGHTS, bank.weight_shapes())
        adapters = [vars(a) for a in bank.adapters]
        about = {"adapters": len(adapters), "layers": bank.num_layers, "stacked ranks": bank.ranks, "base": bank.base}
        return {"kind": "bank", "about": about, "adapters": adapters}
    if (path / "gates.json").exists():
        gates = GateConfig.from_json(read_json(path / "gates.json"), str(path / "gates.json"))
        about = {"tensors": _check_gates(path / WEIGHTS, gates)}
        about |= {"adapters": " ".join(gates.names), "top_k": gates.top_k, "temperature": gates.temperature}
        about |= {"form": gates.form_name, "null choice": gates.null}
        about |= {"width": gates.form.width, "depth": gates.form.depth} if gates.form else {}
        return {"kind": "gates", "about": about}
    if (path / "index.json").exists():
        from meteora_jax.retriever.index import Index

        index = Index.load(path)
        about = {"adapters": len(index.names), "scoring": index.scoring, "instruction": index.instruction}
        about |= {"threshold": "none" if index.threshold is None else round(index.threshold, 4)}
        inputs = {name: len(texts) for name, texts in index.profiles.items()}
        return {"kind": "index", "about": about | {"encoder": index.encoder is not None, "inputs": inputs}}
    if (path / "encoder.json").exists():
        from meteora_jax.retriever.encoder import TextEncoder

        return {"kind": "encoder", "about": TextEncoder.load(path).config.to_json()}
    if (path / CONFIG).exists():
        raw = read_json(path / CONFIG)
        settings = read_settings(raw, str(path / CONFIG))
        weights, tensors = read_tensors(path)
        named = {key: raw.get(key) for key in ("base_model_name_or_path", "revision")}
        about = {**vars(settings), **named, "weights": weights.name}
        listing = [{"key": t.key, "dtype": stored_type(t), "shape": t.shape} for t in tensors]
        return {"kind": "PEFT adapter", "about": about | stored_types(tensors), "tensors": listing}
    raw = read_json(path / "config.json") if (path / "config.json").exists() else {}
    if isinstance(raw, dict) and "meteora" in raw:
        config = hf_config.from_hf(raw, str(path / "config.json"))
        reader = TensorReader(path / WEIGHTS, config.weight_shapes(), config.stored_types())
        sizes = dataclasses.replace(config, quantization=None).weight_shapes().values()
        about = _about(config, sum(map(math.prod, sizes))) | {"dtype": str(reader.dtype("norm.scale"))}
        if config.quantization is not None:
            about["quantization"] = str(config.quantization)
        about["bytes"] = f"{(path / WEIGHTS).stat().st_size:,}"
        about |= {key: raw["meteora"].get(key) for key in ("origin", "source")}
        return {"kind": "base", "about": about}
    if path.suffix.lower() == ".gguf" or raw or (path / "params.json").exists():
        config, rows = converters.plan_base(path)
        opened = converters.open_base(path)
        about = _about(config, sum(math.prod(row.shape) for row in rows)) | {"names": opened.names}
        types = {t.key: stored_type(t) for t in opened.tensors}
        listing = [{**vars(row), "dtype": types.get(row.key, row.dtype)} for row in rows]
        return {"kind": "source of a base", "about": about | stored_types(opened.tensors), "tensors": listing}
    raise InputError(
        f"{path}: expected config.json, bank.json, gates.json, index.json or encoder.json, found none of them"
    )


def _check_gates(file: Path, gates: GateConfig) -> int:
    """How many tensors a gate file has: those of the description, for a base of the sizes that they speak of."""
    from converters.tensor_files import TensorReader, read_safetensors
    from meteora_jax.io.gates import base_of, stored_shapes

    found = {tensor.key: tensor.shape for tensor in read_safetensors(file, str(file))}
    shapes = stored_shapes(gates, base_of(found))
    if problems := [
        f"{file}: {key}: expected a tensor of {len(shape)} axes, found {found.get(key, 'none')}"
        for key, shape in shapes.items()
        if len(found.get(key, ())) != len(shape)
    ]:
        raise InputError(problems)
    TensorReader(file, shapes)
    return len(found)


def stored_type(tensor: SourceTensor) -> str:
    """The type that a source's file holds a tensor in, by the file's own name: Q4_1, BF16."""
    from converters.tensor_files import dtype_name

    return tensor.stored or dtype_name(tensor.dtype)


def stored_types(tensors: Sequence[SourceTensor]) -> dict[str, Any]:
    """How many tensors there are, and of each stored type how many and how large; most bytes first."""
    counts: dict[str, list[int]] = {}
    for tensor in tensors:
        of_type = counts.setdefault(stored_type(tensor), [0, 0])
        of_type[0] += 1
        of_type[1] += stored_bytes(tensor)
    ranked = sorted(counts.items(), key=lambda item: -item[1][1])
    stored = {kind: f"{count} tensors, {size:,} bytes" for kind, (count, size) in ranked}
    return {"tensors": len(tensors), "type": ranked[0][0] if ranked else None, "stored as": stored}


def stored_bytes(tensor: SourceTensor) -> int:
    """The bytes of a tensor's values in its file."""
    values = math.prod(tensor.shape)
    if tensor.stored is None:
        return values * tensor.dtype.itemsize
    import gguf

    from converters.hf_quantized import BYTES

    if tensor.stored in BYTES:
        return int(values * BYTES[tensor.stored])
    block, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[tensor.stored]]
    return values // block * block_bytes


def _about(config: LlamaConfig, parameters: int) -> dict[str, Any]:
    about = {k: v for k, v in vars(config).items() if v is not None}
    shapes = {p: config.projection_shape(p) for p in PROJECTIONS}
    return {**about, "parameters": f"{parameters:,}", "projections": shapes}
