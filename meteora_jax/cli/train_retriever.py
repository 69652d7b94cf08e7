"""`meteora train retriever`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from meteora_jax.cli.report import console, progress_bar, status, write_json
from meteora_jax.config import InputError


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
    share: float = 0.4
    """Of the adapters, chosen by the seed: those trained on. training.json lists them."""
    steps: int = 500
    """Updates."""
    batch_size: int = 32
    """Pairs a step, spread over all devices."""
    learning_rate: float = 2e-5
    """Peak of the cosine schedule."""
    warmup: float = 0.1
    """Share of the steps that warm up."""
    temperature: float = 0.05
    """Of the softmax over cosines."""
    hard_negatives: int = 1
    """A pair: inputs of other adapters that the encoder finds closest."""
    refresh: int = 100
    """Steps between two searches for hard negatives."""
    bare: float = 0.25
    """How often an input loses the wording that its adapter's inputs share, so that more than templates is learnt."""
    max_length: int = 128
    """Tokens a text while training."""
    instruction: str = ""
    """Stands before every text; build the index with the same."""
    save_every: int = 100
    """Steps between checkpoints."""
    checkpoints: Path | None = None
    """Orbax folder, OUT-checkpoints unless given; a run that was cut off goes on from there."""
    seed: int = 0
    """Of the adapters trained on and of the batches."""
    json: Path | None = None
    """Write the final figures here too."""


def train_retriever(command: TrainRetriever) -> None:
    """Runs `meteora train retriever`."""
    from meteora_jax.retriever import training
    from meteora_jax.retriever.encoder import TextEncoder
    from meteora_jax.retriever.index import read_profiles

    if command.out.exists() and any(command.out.iterdir()):
        raise InputError(f"{command.out}: expected no folder or an empty one, found one that holds files")
    profiles = read_profiles(command.profiles)
    if unknown := [n for n in command.only if n not in profiles]:
        raise InputError([f"--only: expected a profile's name, found {n!r}" for n in unknown])
    if command.only:
        profiles = {n: p for n, p in profiles.items() if n in command.only}
    fields = training.RetrieverTraining.__dataclass_fields__
    settings = training.RetrieverTraining(**{k: v for k, v in vars(command).items() if k in fields})
    checkpoints = command.checkpoints or command.out.with_name(f"{command.out.name}-checkpoints")
    with progress_bar("train retriever") as bar:

        def progress(step: int, record: dict) -> None:
            bar(step, command.steps, f"loss {record['loss']:.4f}  accuracy {record['accuracy']:.3f}")

        def begun(cut: dict[str, int]) -> None:
            if line := cut_line(cut, profiles, command.max_length):
                status.print(f"train retriever: {line}", highlight=False, markup=False, soft_wrap=True)

        encoder = TextEncoder.load(command.encoder)
        report = training.train_retriever(encoder, profiles, command.out, settings, checkpoints, progress, begun)
    training.write_curves(report, command.out / "training.png")
    last = report["steps"][-1]
    console.print(
        f"{command.out}: {command.steps} steps on {len(report['trained'])} of {len(profiles)} adapters, "
        f"loss {last['loss']:.4f}, accuracy {last['accuracy']:.3f}", highlight=False
    )  # fmt: skip
    if line := cut_line(report["cut"], profiles, command.max_length):
        console.print(f"  {line}", highlight=False, markup=False, soft_wrap=True)
    told = {"encoder": str(command.out), "trained": report["trained"], "cut": report["cut"]}
    write_json(command.json, {**told, **last})


def cut_line(cut: Mapping[str, int], profiles: Mapping[str, Sequence[str]], max_length: int | None) -> str:
    """How many inputs of each adapter are longer than an encoder reads; "" where none is."""
    if not cut:
        return ""
    limit = "the encoder reads" if max_length is None else f"the encoder or --max-length {max_length} allows"
    of = ", ".join(f"{name} {count} of {len(profiles[name])}" for name, count in cut.items())
    return f"{sum(cut.values())} inputs are longer than {limit}, their ends are not read: {of}"
