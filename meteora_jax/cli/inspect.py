"""`meteora inspect`: what a base, bank, gates, index or encoder folder holds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from rich.table import Table

from meteora_jax.cli.report import console, write_json
from meteora_jax.config import PROJECTIONS, BankConfig, GateConfig, InputError, LlamaConfig, read_json


@dataclass(frozen=True)
class Inspect:
    """Say what a base, bank, gates, index or encoder folder holds."""

    path: tyro.conf.Positional[Path]
    """BASE, BANK, GATES, INDEX or ENCODER folder."""
    json: Path | None = None
    """Write the report here too."""


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
    write_json(command.json, found)


def describe(path: Path) -> dict[str, Any]:
    """A folder's kind and contents.

    Raises:
        InputError: not one of our folders, or its tensors are not those that its description implies.
    """
    from meteora_jax.checkpoint import WEIGHTS, read_tensors

    if (path / "bank.json").exists():
        bank = BankConfig.from_json(read_json(path / "bank.json"), str(path / "bank.json"))
        read_tensors(path / WEIGHTS, bank.weight_shapes())
        adapters = [vars(a) for a in bank.adapters]
        about = {"adapters": len(adapters), "layers": bank.num_layers, "stacked ranks": bank.ranks}
        return {"kind": "bank", "about": about, "adapters": adapters}
    if (path / "gates.json").exists():
        gates = GateConfig.from_json(read_json(path / "gates.json"), str(path / "gates.json"))
        about = {"adapters": " ".join(gates.names), "top_k": gates.top_k, "temperature": gates.temperature}
        return {"kind": "gates", "about": about}
    if (path / "index.json").exists():
        from meteora_jax.retriever.index import Index

        index = Index.load(path)
        about = {"adapters": len(index.names), "scoring": index.scoring, "instruction": index.instruction}
        inputs = {name: len(texts) for name, texts in index.profiles.items()}
        return {"kind": "index", "about": about | {"encoder": index.encoder is not None, "inputs": inputs}}
    if (path / "encoder.json").exists():
        from meteora_jax.retriever.encoder import TextEncoder

        return {"kind": "encoder", "about": TextEncoder.load(path).config.to_json()}
    if (path / "config.json").exists():
        raw = read_json(path / "config.json")
        config = LlamaConfig.from_hf(raw, str(path / "config.json"))
        tensors = read_tensors(path / WEIGHTS, config.weight_shapes())
        about = {k: v for k, v in vars(config).items() if v is not None}
        about["parameters"] = f"{sum(t.size for t in tensors.values()):,}"
        about["dtype"] = str(next(iter(tensors.values())).dtype)
        about["projections"] = {p: config.projection_shape(p) for p in PROJECTIONS}
        about["source"] = raw.get("meteora", {}).get("source")
        return {"kind": "base", "about": about}
    raise InputError(
        f"{path}: expected config.json, bank.json, gates.json, index.json or encoder.json, found none of them"
    )
