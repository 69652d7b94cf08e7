"""How well an adapter's profile fits a request: what an index asks of a scoring.

A scoring is fitted on a pool of profiles and gives every request a score for every adapter; larger is closer. Only
profiles are ever fitted on. `named_scorings.SCORINGS` has those that an index may be built with.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from meteora_jax.retriever.features import Features

MOST_RIDGE_INPUTS = 12_000  # a dense system of that many unknowns takes about a minute of two cores and 3 GB
BARE_WEIGHT = 0.3  # of an input without the wording that it shares with its adapter's others; an input weighs 1


@dataclasses.dataclass(eq=False)
class Profile:
    """One adapter's inputs, and the same without the wording that they share (empty ones left out).

    `sketch`: float32 [SKETCH], computed where the pool is large and saved with the index.
    """

    inputs: Features
    bare: Features
    sketch: np.ndarray | None = None


def is_large(pool: Sequence[Profile]) -> bool:
    """Whether a pool is too large for the regressions."""
    return sum(len(p.inputs) + len(p.bare) for p in pool) > MOST_RIDGE_INPUTS


class Scoring:
    """What an index asks of a scoring."""

    needs_encoder: bool
    uses_bare: bool  # reads the inputs without their shared wording

    def fit(self, pool: Sequence[Profile]) -> None:
        """Learns the pool; called again, with the same objects where nothing changed, when adapters come or go."""
        raise NotImplementedError

    def score(self, requests: Features) -> np.ndarray:
        """float32 [B, A], adapters in the pool's order."""
        raise NotImplementedError

    def fitted(self) -> dict[str, np.ndarray]:
        """Of what a fit learnt, that which is worth saving: nothing where fitting again is as quick as reading."""
        return {}

    def restore(self, pool: Sequence[Profile], saved: Mapping[str, np.ndarray]) -> bool:
        """Stands in for `fit` by what `fitted` gave; False, and nothing done, where that is not of this pool."""
        if saved:
            return False
        self.fit(pool)
        return True
