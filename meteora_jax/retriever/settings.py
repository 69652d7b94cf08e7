"""How a sentence encoder is trained: each setting is declared here once, with its help.

The library takes this class and `meteora train retriever` shows it as it is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from meteora_jax.config import InputError


@dataclass(frozen=True, kw_only=True)
class RetrieverTraining:
    """Which adapters and pairs of inputs an encoder is trained on, how long and how fast."""

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
    """For each pair: inputs of other adapters that the encoder finds closest."""
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
    seed: int = 0
    """Of the adapters trained on and of the batches."""

    def __post_init__(self):
        problems = [
            f"{name}: expected at least {low}, found {getattr(self, name)}"
            for name, low in {"steps": 1, "batch_size": 2, "hard_negatives": 0, "refresh": 1, "save_every": 1}.items()
            if getattr(self, name) < low
        ]
        for name, low, high in (("share", 0, 1), ("bare", -1e-9, 1), ("warmup", -1e-9, 1), ("temperature", 0, 10)):
            if not low < getattr(self, name) <= high:
                problems.append(f"{name}: expected a number from {max(low, 0)} to {high}, found {getattr(self, name)}")
        if not 0 < self.learning_rate < math.inf:
            problems.append(f"learning_rate: expected a positive number, found {self.learning_rate}")
        if problems:
            raise InputError(problems)
