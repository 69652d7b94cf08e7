"""`meteora import base | adapters | gates | encoder`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from meteora_jax.cli.report import Conversion, status
from meteora_jax.config import InputError, read_json
from meteora_jax.evaluation.tasks import METEORA_TASKS
from meteora_jax.io import hf_config
from meteora_jax.quantization import WeightFormat

if TYPE_CHECKING:
    from converters.rules import TensorPlan
else:  # slow to import
    TensorPlan = Any


@dataclass(frozen=True)
class ImportBase(Conversion):
    """Convert a LLaMA-family base model."""

    src: tyro.conf.Positional[Path]
    """Hugging Face folder, one of Meta's own, a checkpoint of the original MeteoRA, or .gguf file."""
    dest: tyro.conf.Positional[Path]
    """BASE folder to make."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Stored type; by default the source's own (float32 for quantised ones)."""
    weights: WeightFormat | None = None
    """A quantised base at once: matrices that the source holds in this very format are taken over bit for bit, others
    are rounded anew, and it is said which."""
    replace: Path | None = None
    """PEFT folder whose saved embedding and head take the place of the source's: the base that this adapter needs."""
    name: str | None = None
    """Which model it is, as ORGANISATION/MODEL or ORGANISATION/MODEL@COMMIT, in place of what the source says itself.
    Adapters name the base they were trained on, and those of another are refused."""
    dry_run: bool = False
    """Say what would be done, tensor by tensor, and write nothing."""


def import_base(command: ImportBase) -> None:
    """Runs `meteora import base`."""
    import converters

    remarks: list[str] = []
    if command.dry_run and command.weights is not None:
        raise InputError(f"--dry-run: expected no --weights beside it, found {command.weights}")
    if command.dry_run:
        config, rows = converters.plan_base(command.src, command.dtype, command.replace, remarks.append)
        say(remarks)
        command.tell(plan_lines(rows), {"config": hf_config.to_hf(config), "tensors": [vars(row) for row in rows]})
        return
    convert = partial(
        converters.import_base, command.src, command.dest, command.dtype, replace=command.replace, name=command.name,
        on_remark=remarks.append, weights=command.weights,
    )  # fmt: skip
    command.run("import base", convert)
    say(remarks)
    config = hf_config.from_hf(read_json(command.dest / "config.json"), str(command.dest / "config.json"))
    size = sum(f.stat().st_size for f in command.dest.iterdir())
    command.tell(
        f"{command.dest}: {config.num_layers} layers, hidden {config.hidden_size}, vocabulary {config.vocab_size}, "
        f"{size / 1e6:,.0f} MB",
        {"base": str(command.dest), "config": hf_config.to_hf(config), "bytes": size},
    )


@dataclass(frozen=True)
class ImportAdapters(Conversion):
    """Convert PEFT LoRA folders into one bank."""

    dest: tyro.conf.Positional[Path]
    """BANK folder to make."""
    adapters: tyro.conf.Positional[tuple[str, ...]]
    """NAME=PEFT_DIR, one an adapter; the bank keeps their order."""
    base: Path
    """BASE folder that the adapters were trained on."""
    any_base: bool = False
    """Take adapters whose settings name another base than this one."""
    dry_run: bool = False
    """Say what would be done, tensor by tensor, and write nothing."""


def plan_lines(rows: Sequence[TensorPlan]) -> list[str]:
    """A line for each tensor of a dry run, and one for the sum."""
    lines = []
    for row in rows:
        to = f"-> {row.to} {row.stored}, {row.how}" if row.to else f"-> {row.how}"
        lines.append(f"{row.key} {row.dtype} {row.shape} {to}")
    moved = sum(row.to is not None for row in rows)
    return [*lines, f"{len(rows)} tensors: {moved} converted, {len(rows) - moved} dropped"]


def say(remarks: Sequence[str]) -> None:
    """What should be known of an import that went through, a line each, on stderr."""
    for line in remarks:
        status.print(line, highlight=False, soft_wrap=True)


def parse_adapters(pairs: Sequence[str]) -> list[tuple[str, Path]]:
    """NAME=PEFT_DIR pairs, split; all that are malformed are refused at once."""
    split = [(pair, *pair.partition("=")[::2]) for pair in pairs]
    problems = [f"adapters: expected NAME=PEFT_DIR, found {p!r}" for p, name, folder in split if not (name and folder)]
    if problems:
        raise InputError(problems)
    return [(name, Path(folder)) for _, name, folder in split]


def import_adapters(command: ImportAdapters) -> None:
    """Runs `meteora import adapters`."""
    import converters

    remarks: list[str] = []
    if command.dry_run:
        bank, plans = converters.describe_adapters(
            command.base, parse_adapters(command.adapters), command.any_base, remarks.append
        )
        say(remarks)
        lines = [line for name, rows in plans.items() for line in (f"{name}:", *plan_lines(rows))]
        tensors = {name: [vars(row) for row in rows] for name, rows in plans.items()}
        command.tell(lines, {**bank.to_json(), "tensors": tensors})
        return
    pairs = parse_adapters(command.adapters)
    convert = partial(
        converters.import_adapters,
        command.dest,
        command.base,
        pairs,
        any_base=command.any_base,
        on_remark=remarks.append,
    )
    bank = command.run("import adapters", convert)
    say(remarks)

    def since(a):
        return f", from tokens {' '.join(map(str, a.invocation))} on" if a.invocation else ""

    lines = [f"{a.name}: rank {a.rank}, {' '.join(a.targets)}{since(a)}" for a in bank.adapters]
    command.tell(lines, {"bank": str(command.dest), **bank.to_json()})


@dataclass(frozen=True)
class ImportGates(Conversion):
    """Convert a checkpoint of the original MeteoRA: its gates, and its adapters where there is no bank yet."""

    src: tyro.conf.Positional[Path]
    """Folder with model.safetensors."""
    dest: tyro.conf.Positional[Path]
    """GATES folder to make."""
    bank: Path
    """BANK folder that the gates are for; created from the checkpoint if it does not exist."""
    base: Path | None = None
    """BASE folder whose weights the checkpoint must hold; created from the checkpoint if it does not exist. None: only
    the checkpoint's own config.json is read."""
    alpha: float | None = None
    """LoRA's alpha in training, which the checkpoint does not say; needed to make the bank."""
    names: tuple[str, ...] = METEORA_TASKS
    """The adapters in the checkpoint's order, to make the bank; by default the original's 28 tasks."""
    top_k: int = 2
    """Adapters for a token, as trained."""
    temperature: float = 1.0
    """Of the softmax over the chosen ones."""
    dry_run: bool = False
    """Say what would be done, tensor by tensor, and write nothing."""


def import_gates(command: ImportGates) -> None:
    """Runs `meteora import gates`."""
    import converters

    if command.dry_run:
        rows = converters.describe_gates(
            command.src, command.bank, base=command.base, alpha=command.alpha, names=command.names
        )
        command.tell(plan_lines(rows), {"tensors": [vars(row) for row in rows]})
        return
    convert = partial(
        converters.import_gates,
        command.src,
        command.dest,
        command.bank,
        base=command.base,
        alpha=command.alpha,
        names=command.names,
        top_k=command.top_k,
        temperature=command.temperature,
    )
    gates = command.run("import gates", convert)
    command.tell(
        f"{command.dest}: gates of {len(gates.names)} adapters",
        {"gates": str(command.dest), "bank": str(command.bank), **gates.to_json()},
    )


@dataclass(frozen=True)
class ImportEncoder(Conversion):
    """Convert a sentence encoder (BERT, RoBERTa, MPNet or T5 family) from a sentence-transformers folder."""

    src: tyro.conf.Positional[Path]
    """sentence-transformers folder."""
    dest: tyro.conf.Positional[Path]
    """ENCODER folder to make."""
    instructor: bool = False
    """An Instructor: its pooling leaves out the instruction before a text, which its own folder does not say."""


def import_encoder(command: ImportEncoder) -> None:
    """Runs `meteora import encoder`."""
    from converters.hf_encoder import import_encoder as into

    convert = partial(into, command.src, command.dest, instructor=command.instructor)
    config = command.run("import encoder", convert)
    command.tell(
        f"{command.dest}: {config.family}, {config.num_layers} layers, vectors of {config.width}, {config.pooling} "
        f"pooling, at most {config.max_length} tokens",
        {"encoder": str(command.dest), "config": config.to_json()},
    )
