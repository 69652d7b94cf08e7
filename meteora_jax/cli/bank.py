"""`meteora bank add | remove | rename | subtract | list`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.table import Table

from meteora_jax.cli.importing import parse_adapters, say
from meteora_jax.cli.report import console, progress_bar, write_json
from meteora_jax.config import BankConfig, InputError, read_json
from meteora_jax.gate_config import GateConfig
from meteora_jax.io.files import refuse_foreign, refuse_unimported_bank
from meteora_jax.io.tensors import WEIGHTS


@dataclass(frozen=True)
class BankAdd:
    """Add PEFT LoRA folders to a bank; its other adapters keep every bit."""

    bank: tyro.conf.Positional[Path]
    """BANK folder; it is replaced once the new one is complete."""
    adapters: tyro.conf.Positional[tuple[str, ...]]
    """NAME=PEFT_DIR, one an adapter; they stand behind the others, in this order."""
    base: Path | None = None
    """BASE folder of the bank: needed for adapters with DoRA, an invocation, or tensors at the vocabulary."""
    any_base: bool = False
    """Take adapters whose settings name another base than the bank's."""
    json: Path | None = None
    """Write the report here too."""


@dataclass(frozen=True)
class BankRemove:
    """Remove adapters from a bank, and their columns from its gates."""

    bank: tyro.conf.Positional[Path]
    """BANK folder; it is replaced once the new one is complete."""
    names: tyro.conf.Positional[tuple[str, ...]]
    """The adapters."""
    gates: Path | None = None
    """GATES folder of the bank: loses their columns. Killed between the two, the same command goes on."""
    json: Path | None = None
    """Write the report here too."""


@dataclass(frozen=True)
class BankRename:
    """Give an adapter of a bank another name, and its column in the gates."""

    bank: tyro.conf.Positional[Path]
    """BANK folder; it is replaced once the new one is complete."""
    old: tyro.conf.Positional[str]
    """The adapter."""
    new: tyro.conf.Positional[str]
    """Its new name."""
    gates: Path | None = None
    """GATES folder of the bank, renamed too. Killed between the two, the same command goes on."""
    json: Path | None = None
    """Write the report here too."""


@dataclass(frozen=True)
class BankSubtract:
    """Make a bank of a bank's other adapters, less the mean of its general ones (GenKnowSub).

    Routers that read adapters' matrices (arrow, spectr, lag, logo) then tell them apart by what they do not share.
    """

    bank: tyro.conf.Positional[Path]
    """BANK folder of plain LoRAs of one rank; it stays as it is."""
    dest: tyro.conf.Positional[Path]
    """BANK folder to make."""
    general: tyro.conf.Positional[tuple[str, ...]]
    """Adapters of general knowledge, such as of Wikipedia's text; DEST has none of them."""
    base: Path
    """BASE folder of the bank."""
    json: Path | None = None
    """Write the report here too."""


@dataclass(frozen=True)
class BankList:
    """List the adapters of a bank in its order."""

    bank: tyro.conf.Positional[Path]
    """BANK folder."""
    json: Path | None = None
    """Write the report here too."""


@dataclass(frozen=True)
class BankCommand:
    """Change a bank without the PEFT folders that it was made of: add, remove, rename, subtract and list adapters."""

    what: (
        Annotated[BankAdd, tyro.conf.subcommand("add")]
        | Annotated[BankRemove, tyro.conf.subcommand("remove")]
        | Annotated[BankRename, tyro.conf.subcommand("rename")]
        | Annotated[BankSubtract, tyro.conf.subcommand("subtract")]
        | Annotated[BankList, tyro.conf.subcommand("list")]
    )


def read_description(bank: Path) -> BankConfig:
    """A BANK folder's description. Raises InputError."""
    refuse_unimported_bank(bank)
    return BankConfig.from_json(read_json(bank / "bank.json"), str(bank / "bank.json"))


def _check_changed(bank: Path, gates: Path | None = None) -> None:
    """Refuses folders with files that their change would delete, before either is changed."""
    refuse_foreign(bank, "bank.json", WEIGHTS)
    if gates is not None:
        refuse_foreign(gates, "gates.json", WEIGHTS)


def _report(command: BankAdd | BankRemove | BankRename, bank: BankConfig, lines: list[str]) -> None:
    for line in [*lines, f"{command.bank}: {len(bank.names)} adapters: {' '.join(bank.names)}"]:
        console.print(line, highlight=False, soft_wrap=True)
    write_json(command.json, {"bank": str(command.bank), **bank.to_json()})


def bank_add(command: BankAdd) -> None:
    """Runs `meteora bank add`."""
    import converters

    _check_changed(command.bank)
    remarks: list[str] = []
    with progress_bar("bank add") as bar:
        bank = converters.add_adapters(
            command.bank, parse_adapters(command.adapters), command.base,
            progress=lambda note, done, total: bar(done, total, note), any_base=command.any_base,
            on_remark=remarks.append,
        )  # fmt: skip
    say(remarks)
    new = bank.adapters[-len(command.adapters) :]
    _report(command, bank, [f"{a.name}: rank {a.rank}, {' '.join(a.targets)}" for a in new])


def bank_remove(command: BankRemove) -> None:
    """Runs `meteora bank remove`."""
    import converters

    _check_changed(command.bank, command.gates)
    bank = read_description(command.bank)
    # what a killed command left in the gates alone is theirs to lose
    only = [name for name in _gate_names(command.gates) if name in command.names and name not in bank.names]
    names = [name for name in command.names if name not in only]
    if names or not only:
        converters.names_left(bank, names, str(command.bank))
    lines = _change_gates(command.gates, bank, dict.fromkeys(command.names))
    _report(command, converters.remove_adapters(command.bank, names) if names else bank, lines)


def bank_rename(command: BankRename) -> None:
    """Runs `meteora bank rename`."""
    import converters

    _check_changed(command.bank, command.gates)
    bank, change = read_description(command.bank), (command.old, command.new)
    # a killed command may have renamed the one and not the other
    done = command.old in _gate_names(command.gates) and command.old not in bank.names and command.new in bank.names
    if not done:
        converters.check_rename(bank.names, *change, str(command.bank))
    lines = _change_gates(command.gates, bank, dict([change]))
    _report(command, bank if done else converters.rename_adapter(command.bank, *change), lines)


def bank_subtract(command: BankSubtract) -> None:
    """Runs `meteora bank subtract`."""
    from meteora_jax.io import hf_config
    from meteora_jax.io.bank import load_bank, save_bank
    from meteora_jax.io.base import read_origin

    if command.dest.exists():
        raise InputError(f"{command.dest}: expected no such folder, found one")
    path = command.base / "config.json"
    bank = load_bank(command.bank, hf_config.from_hf(read_json(path), str(path)), "float32", read_origin(command.base))
    new = bank.less(command.general, str(command.bank))
    save_bank(command.dest, new)
    line = f"{command.dest}: {' '.join(new.names)}, less the mean of {' '.join(command.general)}"
    console.print(line, highlight=False, soft_wrap=True)
    write_json(command.json, {"bank": str(command.dest), **new.config.to_json()})


def _gate_names(gates: Path | None) -> tuple[str, ...]:
    if gates is None:
        return ()
    return GateConfig.from_json(read_json(gates / "gates.json"), str(gates / "gates.json")).names


def _change_gates(gates: Path | None, bank: BankConfig, changes: Mapping[str, str | None]) -> list[str]:
    """Changes the columns of gates, if there are any, before the bank is changed: killed in between, the gates are
    refused by name, and the same command, given once more, finds them changed already."""
    if gates is None:
        return []
    from meteora_jax.io.gates import change_columns

    config, changed = change_columns(gates, bank, changes)
    said = f"{gates}: columns of {' '.join(config.names)}, top-k {config.top_k}"
    return [said if changed else f"{said}, as before"]


def bank_list(command: BankList) -> None:
    """Runs `meteora bank list`."""
    bank = read_description(command.bank)
    table = Table("adapter", "rank", "where", "from token ids", "source", title=str(command.bank), title_justify="left")
    for a in bank.adapters:
        table.add_row(a.name, str(a.rank), " ".join(a.targets), " ".join(map(str, a.invocation)), a.source)
    console.print(table)
    write_json(command.json, {"bank": str(command.bank), **bank.to_json()})
