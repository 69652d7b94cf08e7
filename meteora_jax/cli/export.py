"""`meteora export adapter | merged | base | gates | bank`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import tyro

from meteora_jax.cli.report import Conversion, console, write_json
from meteora_jax.config import BankConfig, read_json
from meteora_jax.io import hf_config
from meteora_jax.io.files import refuse_foreign
from meteora_jax.io.tensors import WEIGHTS


@dataclass(frozen=True)
class ExportAdapter(Conversion):
    """Write one adapter of a bank as a PEFT folder, which `peft` loads."""

    bank: tyro.conf.Positional[Path]
    """BANK folder."""
    name: tyro.conf.Positional[str]
    """The adapter."""
    dest: tyro.conf.Positional[Path]
    """Folder to make."""
    base: Path | None = None
    """BASE folder, for an adapter that saved its embedding or head (PEFT's modules_to_save)."""


def export_adapter(command: ExportAdapter) -> None:
    """Runs `meteora export adapter`."""
    import converters

    export = partial(converters.export_adapter, command.bank, command.name, command.dest, base=command.base)
    raw = command.run("export adapter", export)
    lines = [f"{command.dest}: {command.name}, rank {raw['r']}, alpha {raw['lora_alpha']}"]
    file = command.bank / "bank.json"
    bank = BankConfig.from_json(read_json(file), str(file))
    own_gate = bank.adapters[bank.names.index(command.name)].own_gate
    if own_gate:
        lines.append("its own gate stays in the bank alone: PEFT has no place for it")
    report = {"adapter": str(command.dest), "name": command.name, "peft_config": raw, "own_gate_left": own_gate}
    command.tell(lines, report)


@dataclass(frozen=True)
class ExportMerged(Conversion):
    """Write a base with one adapter merged into its weights as a Hugging Face folder."""

    base: tyro.conf.Positional[Path]
    """BASE folder."""
    bank: tyro.conf.Positional[Path]
    """BANK folder."""
    name: tyro.conf.Positional[str]
    """The adapter to merge."""
    dest: tyro.conf.Positional[Path]
    """Folder to make."""
    dequantize: bool = False
    """Take a quantised base, and write its matrices as what they stand for in the type of its norms."""


def export_merged(command: ExportMerged) -> None:
    """Runs `meteora export merged`."""
    import converters

    convert = partial(
        converters.export_merged, command.base, command.bank, command.name, command.dest, dequantize=command.dequantize
    )
    config = command.run("export merged", convert)
    command.tell(
        f"{command.dest}: {config.num_layers} layers with {command.name} merged in",
        {"folder": str(command.dest), "merged": command.name, "config": hf_config.to_hf(config)},
    )


@dataclass(frozen=True)
class ExportBase(Conversion):
    """Write a base as a Hugging Face folder, bit for bit."""

    base: tyro.conf.Positional[Path]
    """BASE folder."""
    dest: tyro.conf.Positional[Path]
    """Folder to make."""
    dequantize: bool = False
    """Take a quantised base, and write its matrices as what they stand for in the type of its norms."""


def export_base(command: ExportBase) -> None:
    """Runs `meteora export base`."""
    import converters

    convert = partial(converters.export_base, command.base, command.dest, dequantize=command.dequantize)
    config = command.run("export base", convert)
    command.tell(
        f"{command.dest}: {config.num_layers} layers",
        {"folder": str(command.dest), "merged": None, "config": hf_config.to_hf(config)},
    )


@dataclass(frozen=True)
class ExportGates(Conversion):
    """Write base, bank and gates as a checkpoint of the original MeteoRA."""

    base: tyro.conf.Positional[Path]
    """BASE folder."""
    bank: tyro.conf.Positional[Path]
    """BANK folder."""
    gates: tyro.conf.Positional[Path]
    """GATES folder."""
    dest: tyro.conf.Positional[Path]
    """Folder to make."""


def export_gates(command: ExportGates) -> None:
    """Runs `meteora export gates`."""
    import converters

    convert = partial(converters.export_gates, command.base, command.bank, command.gates, command.dest)
    unplaced = command.run("export gates", convert)
    lines = [f"{command.dest}: rank {unplaced['rank']}, alpha {unplaced['alpha']:g}"]
    lines += [f"adapters in its order: {' '.join(unplaced['names'])}"]
    command.tell(lines, {"checkpoint": str(command.dest), **unplaced})


@dataclass(frozen=True)
class ExportBank:
    """Write some of a bank's adapters as a bank of their own."""

    bank: tyro.conf.Positional[Path]
    """BANK folder."""
    dest: tyro.conf.Positional[Path]
    """BANK folder to write; one that is there is replaced once the new one is complete."""
    names: tyro.conf.Positional[tuple[str, ...]]
    """The adapters, in the order that they shall have."""
    json: Path | None = None
    """Write the report here too."""


def export_bank(command: ExportBank) -> None:
    """Runs `meteora export bank`."""
    import converters

    refuse_foreign(command.dest, "bank.json", WEIGHTS)
    converters.take_adapters(command.bank, command.dest, command.names, overwrite=True)
    console.print(f"{command.dest}: {' '.join(command.names)}", highlight=False, soft_wrap=True)
    write_json(command.json, {"bank": str(command.dest), "names": list(command.names)})
