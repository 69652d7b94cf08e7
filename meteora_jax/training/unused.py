"""What of a run's data no step will learn from, and what a reader of its figures should know of the rest."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from meteora_jax.evaluation.tasks import Example
from meteora_jax.training.data import Mixture
from meteora_jax.training.sequences import Tokenized

TRIED = 64  # composites and conversations drawn to see how many are too long


@dataclasses.dataclass(frozen=True)
class Unused:
    """Counts by task, of the tasks that have any.

    examples: those that there were to choose from. too_long: sequences longer than max_length, which no step sees;
    empty: responses of no text, which train the end token alone; unpredicted: sequences in which no token carries loss.
    composites: of TRIED drawn ones, conversations among them, those longer than max_length, in whose place others are
    drawn. validation_prompts: examples that are not trained on as their prompt is in the validation split with
    another response. shared_prefix: tokens that the sequences of all tasks begin with.
    """

    max_length: int
    examples: dict[str, int]
    too_long: dict[str, int]
    empty: dict[str, int]
    unpredicted: dict[str, int]
    composites: int = 0
    validation_prompts: dict[str, int] = dataclasses.field(default_factory=dict)
    shared_prefix: int = 0

    def record(self) -> dict[str, Any]:
        """As a run's final record holds it."""
        return {**dataclasses.asdict(self), "composites_tried": TRIED}


def unused(mixture: Mixture, chosen: Mapping[str, Sequence[tuple[Example, Tokenized]]]) -> Unused:
    """Of a mixture, whose `Mixture.chosen` is `chosen`."""
    most = mixture.samples_per_task
    examples = {n: min(len(mixture.tasks[n]), most or len(mixture.tasks[n])) for n in chosen}
    composites = 0
    if mixture.composite > 0:
        rng = np.random.default_rng([mixture.seed, len(chosen), 3])
        lengths = (len(mixture.several_of(chosen, rng).tokens) for _ in range(TRIED))
        composites = sum(length > mixture.max_length for length in lengths)
    return Unused(
        mixture.max_length,
        examples,
        _positive({n: examples[n] - len(pairs) for n, pairs in chosen.items()}),
        _positive({n: sum(not e.response.strip() for e, _ in pairs) for n, pairs in chosen.items()}),
        _positive({n: sum(not s.loss.any() for _, s in pairs) for n, pairs in chosen.items()}),
        composites,
        shared_prefix=shared_prefix({n: [s.tokens for _, s in pairs] for n, pairs in chosen.items()}),
    )


def _positive(counts: dict[str, int]) -> dict[str, int]:
    return {name: count for name, count in counts.items() if count}


def shared_prefix(sequences: Mapping[str, Sequence[np.ndarray]]) -> int:
    """Tokens int32 [T] that at least half of each task's sequences begin with, all with the same ones: a system
    prompt, a tokenizer's first token. 0 for a single task, which there is nothing to distinguish from."""
    if len(sequences) < 2:
        return 0
    left = dict(sequences)
    length = 0
    while True:
        left = {n: [s for s in own if len(s) > length] for n, own in left.items()}
        tokens, counts = np.unique([s[length] for own in left.values() for s in own], return_counts=True)
        if not len(tokens):
            return length
        usual = tokens[np.argmax(counts)]
        left = {n: [s for s in own if s[length] == usual] for n, own in left.items()}
        if any(2 * len(own) < len(sequences[n]) for n, own in left.items()):
            return length
        length += 1
