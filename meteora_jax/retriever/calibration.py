"""How similar a request must be to be any adapter's: what an index's own inputs are when they are left out of it.

Every adapter's inputs are scored, one of each adapter at a time, by the same scoring fitted without them. What they are
to the other adapters stands for requests of no adapter. The threshold lies in the middle between all but the share
MISSED of the first and all but that share of the second; where these overlap, all but the share MISSED of the adapters'
own inputs are as similar as it says. What is less similar is taken for nobody's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from meteora_jax.retriever.features import Features
from meteora_jax.retriever.scoring import Profile, Scoring

MISSED = 0.01  # share of an index's own inputs that the threshold may refuse
FITTED = 1600  # inputs that are fitted on for it, all fits together; a single fit may have more


def left_out(
    pool: Sequence[Profile], make: Callable[[], Scoring], profile: Callable[[Features], Profile]
) -> np.ndarray:
    """float [N, 2]: the best similarity of inputs to a pool that is without them, to all adapters and to the others
    than their own (-inf where there is no other).

    At most as many fits as FITTED allows, each without one input of every adapter that has another such input.

    Args:
        make: gives a scoring that is fitted on nothing. profile: makes inputs an adapter's.
    """
    sizes = [len(p.inputs) for p in pool]
    fits = max(1, min(max(sizes), FITTED // sum(sizes)))
    best = []
    for fit in range(fits):
        rest, gone = [], []
        for at, (own, size) in enumerate(zip(pool, sizes, strict=True)):
            out = fit * size // fits if size >= fits else fit
            if out >= size:
                rest.append(own)
                continue
            rest.append(profile(own.inputs.part([i for i in range(size) if i != out])))
            gone.append((at, own.inputs.part([out])))
        scoring = make()
        scoring.fit(rest)
        for at, features in gone:
            scores = np.asarray(scoring.score(features), np.float64).reshape(-1)
            best.append((scores.max(), np.delete(scores, at).max(initial=-np.inf)))
    return np.asarray(best)


def calibrate(
    pool: Sequence[Profile], make: Callable[[], Scoring], profile: Callable[[Features], Profile]
) -> float | None:
    """The threshold; None where an adapter has a single input, which nothing is left of to compare it with."""
    if not pool or min(len(p.inputs) for p in pool) < 2:
        return None
    own, others = left_out(pool, make, profile).T
    least, most = np.quantile(own, MISSED, method="lower"), np.quantile(others, 1 - MISSED, method="higher")
    return float((least + most) / 2 if -np.inf < most < least else least)
