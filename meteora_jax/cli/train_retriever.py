"""`meteora train retriever`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import tyro

from meteora_jax.cli.report import console, progress_bar, status, write_json
from meteora_jax.config import InputError
from meteora_jax.retriever.settings import RetrieverTraining


@dataclass(frozen=True)
class TrainRetriever:
    """Train a sentence encoder so that it finds adapters: contrastively, on part of the adapters' profiles."""

    out: tyro.conf.Positional[Path]
    """ENCODER folder to make, with training.json and training.png."""
    encoder: Path
    """ENCODER folder to start from."""
    profiles: Path
    """A JSON file {NAME: [inputs]}, or the profiles of LoraRetriever's release."""
    only: tuple[str, ...] = ()
    """The adapters to draw from; by default all of the file."""
    settings: RetrieverTraining = field(default_factory=RetrieverTraining)
    checkpoints: Path | None = None
    """Orbax folder, OUT-checkpoints unless given; a run that was cut off goes on from there."""
    resume: bool = True
    """Go on from the newest checkpoint if there is one; --no-resume removes them and starts over."""
    json: Path | None = None
    """Write the final figures here too."""


def train_retriever(command: TrainRetriever) -> None:
    """Runs `meteora train retriever`."""
    from meteora_jax.retriever import training
    from meteora_jax.retriever.encoder import TextEncoder
    from meteora_jax.retriever.profiles import read_profiles

    if command.out.exists() and any(command.out.iterdir()):
        raise InputError(f"{command.out}: expected no folder or an empty one, found one that holds files")
    profiles = read_profiles(command.profiles)
    if unknown := [n for n in command.only if n not in profiles]:
        raise InputError([f"--only: expected a profile's name, found {n!r}" for n in unknown])
    if command.only:
        profiles = {n: p for n, p in profiles.items() if n in command.only}
    settings = command.settings
    checkpoints = command.checkpoints or command.out.with_name(f"{command.out.name}-checkpoints")
    with progress_bar("train retriever") as bar:

        def progress(step: int, record: dict) -> None:
            bar(step, settings.steps, f"loss {record['loss']:.4f}  accuracy {record['accuracy']:.3f}")

        def begun(cut: dict[str, int]) -> None:
            if line := cut_line(cut, profiles, settings.max_length):
                status.print(f"train retriever: {line}", highlight=False, soft_wrap=True)

        encoder = TextEncoder.load(command.encoder)
        report = training.train_retriever(
            encoder, profiles, command.out, settings, checkpoints, progress, begun, resume=command.resume
        )
    training.write_curves(report, command.out / "training.png")
    last = report["steps"][-1]
    console.print(
        f"{command.out}: {settings.steps} steps on {len(report['trained'])} of {len(profiles)} adapters, "
        f"loss {last['loss']:.4f}, accuracy {last['accuracy']:.3f}", highlight=False
    )  # fmt: skip
    if line := cut_line(report["cut"], profiles, settings.max_length):
        console.print(f"  {line}", highlight=False, soft_wrap=True)
    about = {"encoder": str(command.out), "trained": report["trained"], "cut": report["cut"]}
    write_json(command.json, {**about, **last})


def cut_line(cut: Mapping[str, int], profiles: Mapping[str, Sequence[str]], max_length: int | None) -> str:
    """How many inputs of each adapter are longer than an encoder reads; "" where none is."""
    if not cut:
        return ""
    limit = "the encoder reads" if max_length is None else f"the encoder or --max-length {max_length} allows"
    of = ", ".join(f"{name} {count} of {len(profiles[name])}" for name, count in cut.items())
    return f"{sum(cut.values())} inputs are longer than {limit}, their ends are not read: {of}"
