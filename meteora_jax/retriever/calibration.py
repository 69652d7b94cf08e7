"""How similar a request must be to be any adapter's: what an index's own inputs are when they are left out of it.

Every adapter's inputs are scored, one of each adapter at a time, by the same scoring fitted without them. All but the
share MISSED of them are as similar to some adapter as the threshold says; what is less is taken for nobody's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from meteora_jax.retriever.features import Features
from meteora_jax.retriever.scoring import Profile, Scoring

MISSED = 0.01  # share of an index's own inputs that the threshold refuses
FITTED = 1600  # inputs that are fitted on for it, all fits together; a single fit may have more


def left_out(
    pool: Sequence[Profile], make: Callable[[], Scoring], profile: Callable[[Features], Profile]
) -> np.ndarray:
    """float [N]: the best similarity of inputs to a pool that is without them.

    At most as many fits as FITTED allows, each without one input of every adapter that has another such input.

    Args:
        make: gives a scoring that is fitted on nothing. profile: makes inputs an adapter's.
    """
    sizes = [len(p.inputs) for p in pool]
    fits = max(1, min(max(sizes), FITTED // sum(sizes)))
    best = []
    for fit in range(fits):
        rest, gone = [], []
        for own, size in zip(pool, sizes, strict=True):
            out = fit * size // fits if size >= fits else fit
            if out >= size:
                rest.append(own)
                continue
            rest.append(profile(own.inputs.part([i for i in range(size) if i != out])))
            gone.append(own.inputs.part([out]))
        scoring = make()
        scoring.fit(rest)
        best += [float(scoring.score(features).max()) for features in gone]
    return np.asarray(best)


def calibrate(
    pool: Sequence[Profile], make: Callable[[], Scoring], profile: Callable[[Features], Profile]
) -> float | None:
    """The threshold; None where an adapter has a single input, which nothing is left of to compare it with."""
    if not pool or min(len(p.inputs) for p in pool) < 2:
        return None
    return float(np.quantile(left_out(pool, make, profile), MISSED, method="lower"))
