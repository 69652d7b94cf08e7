"""`meteora train gates`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from meteora_jax.cli.report import console, default_dtype, progress_bar, write_json
from meteora_jax.config import BankConfig, read_json


@dataclass(frozen=True)
class TrainGates:
    """Train the gates of a bank on its adapters' tasks; base and adapters stay frozen."""

    base: Path
    """BASE folder."""
    bank: Path
    """BANK folder; adapter NAME is trained towards TASKS/NAME."""
    tasks: Path
    """TASKS folder: TASKS/<adapter>/train.jsonl."""
    out: Path
    """GATES folder to write; replaced once the new gates are complete."""
    steps: int = 1000
    """Updates."""
    batch_size: int = 32
    """Sequences a step."""
    learning_rate: float = 5e-4
    """Peak of the cosine schedule."""
    warmup: float = 0.005
    """Share of the steps that warm up."""
    clip: float = 0.3
    """Largest global gradient norm."""
    beta: float = 50.0
    """Weight of the gate cross-entropy beside the language model's."""
    top_k: int = 2
    """Adapters a token."""
    temperature: float = 1.0
    """Of the softmax over the chosen gates."""
    composite: float = 0.0
    """Share of the batches that hold three tasks in one sequence."""
    max_length: int = 4096
    """Longer sequences are passed over."""
    prompt_loss: bool = True
    """Whether prompt tokens count in the language model's loss, as in the original."""
    remat: bool = True
    """Recompute activations in the backward pass: less memory, a third more arithmetic."""
    seed: int = 0
    """Of the data's order."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Of base, adapters and activations: bfloat16 on an accelerator, float32 on a CPU unless given."""
    log: Path | None = None
    """JSON lines, one a step."""
    json: Path | None = None
    """Write the final figures here too."""


def train_gates(command: TrainGates) -> None:
    """Runs `meteora train gates`."""
    from meteora_jax.evaluation.tasks import load_split
    from meteora_jax.training.loop import GateTraining
    from meteora_jax.training.loop import train_gates as train

    names = BankConfig.from_json(read_json(command.bank / "bank.json"), str(command.bank / "bank.json")).names
    tasks = {name: load_split(command.tasks, name, "train") for name in names}
    fields = GateTraining.__dataclass_fields__
    settings = GateTraining(**{k: v for k, v in vars(command).items() if k in fields})
    with progress_bar("train gates") as bar:

        def progress(step: int, record: dict) -> None:
            note = f"lm {record['lm']:.3f}  gate {record['gate']:.4f}  accuracy {record['gate_accuracy']:.3f}"
            bar(step, command.steps, note)

        final = train(
            command.base, command.bank, tasks, command.out, settings,
            dtype=default_dtype(command.dtype), log=command.log, progress=progress,
        )  # fmt: skip
    console.print(
        f"{command.out}: {command.steps} steps in {final['seconds']:.0f} s; last tenth: lm {final['lm']:.4f}, "
        f"gate {final['gate']:.4f}, gate accuracy {final['gate_accuracy']:.4f}", highlight=False
    )  # fmt: skip
    write_json(command.json, {"gates": str(command.out), "settings": vars(settings), **final})
