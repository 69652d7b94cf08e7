"""`meteora export adapter | merged | base | gates`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from meteora_jax.cli.report import console, progress_bar, write_json


@dataclass(frozen=True)
class ExportAdapter:
    """Write one adapter of a bank as a PEFT folder, which `peft` loads."""

    bank: tyro.conf.Positional[Path]
    """BANK folder."""
    name: tyro.conf.Positional[str]
    """The adapter."""
    dest: tyro.conf.Positional[Path]
    """Folder to make."""
    overwrite: bool = False
    """Replace DEST if it exists, once the new one is complete."""
    json: Path | None = None
    """Write the report here too."""


def export_adapter(command: ExportAdapter) -> None:
    """Runs `meteora export adapter`."""
    import converters

    with progress_bar("export adapter") as bar:
        raw = converters.export_adapter(
            command.bank,
            command.name,
            command.dest,
            overwrite=command.overwrite,
            progress=lambda key, done, total: bar(done, total, key),
        )
    console.print(
        f"{command.dest}: {command.name}, rank {raw['r']}, alpha {raw['lora_alpha']}", highlight=False, soft_wrap=True
    )
    write_json(command.json, {"adapter": str(command.dest), "name": command.name, "peft_config": raw})


@dataclass(frozen=True)
class ExportMerged:
    """Write a base with one adapter merged into its weights as a Hugging Face folder."""

    base: tyro.conf.Positional[Path]
    """BASE folder."""
    bank: tyro.conf.Positional[Path]
    """BANK folder."""
    name: tyro.conf.Positional[str]
    """The adapter to merge."""
    dest: tyro.conf.Positional[Path]
    """Folder to make."""
    overwrite: bool = False
    """Replace DEST if it exists, once the new one is complete."""
    json: Path | None = None
    """Write the report here too."""


def export_merged(command: ExportMerged) -> None:
    """Runs `meteora export merged`."""
    import converters

    with progress_bar("export merged") as bar:
        config = converters.export_merged(
            command.base,
            command.bank,
            command.name,
            command.dest,
            overwrite=command.overwrite,
            progress=lambda key, done, total: bar(done, total, key),
        )
    console.print(
        f"{command.dest}: {config.num_layers} layers with {command.name} merged in", highlight=False, soft_wrap=True
    )
    write_json(command.json, {"folder": str(command.dest), "merged": command.name, "config": config.to_hf()})


@dataclass(frozen=True)
class ExportBase:
    """Write a base as a Hugging Face folder, bit for bit."""

    base: tyro.conf.Positional[Path]
    """BASE folder."""
    dest: tyro.conf.Positional[Path]
    """Folder to make."""
    overwrite: bool = False
    """Replace DEST if it exists, once the new one is complete."""
    json: Path | None = None
    """Write the report here too."""


def export_base(command: ExportBase) -> None:
    """Runs `meteora export base`."""
    import converters

    with progress_bar("export base") as bar:
        config = converters.export_base(
            command.base,
            command.dest,
            overwrite=command.overwrite,
            progress=lambda key, done, total: bar(done, total, key),
        )
    console.print(f"{command.dest}: {config.num_layers} layers", highlight=False, soft_wrap=True)
    write_json(command.json, {"folder": str(command.dest), "merged": None, "config": config.to_hf()})


@dataclass(frozen=True)
class ExportGates:
    """Write base, bank and gates as a checkpoint of the original MeteoRA."""

    base: tyro.conf.Positional[Path]
    """BASE folder."""
    bank: tyro.conf.Positional[Path]
    """BANK folder."""
    gates: tyro.conf.Positional[Path]
    """GATES folder."""
    dest: tyro.conf.Positional[Path]
    """Folder to make."""
    overwrite: bool = False
    """Replace DEST if it exists, once the new one is complete."""
    json: Path | None = None
    """Write the report here too."""


def export_gates(command: ExportGates) -> None:
    """Runs `meteora export gates`."""
    import converters

    with progress_bar("export gates") as bar:
        told = converters.export_gates(
            command.base,
            command.bank,
            command.gates,
            command.dest,
            overwrite=command.overwrite,
            progress=lambda key, done, total: bar(done, total, key),
        )
    console.print(f"{command.dest}: rank {told['rank']}, alpha {told['alpha']:g}", highlight=False, soft_wrap=True)
    console.print(f"adapters in its order: {' '.join(told['names'])}", highlight=False, soft_wrap=True)
    write_json(command.json, {"checkpoint": str(command.dest), **told})
