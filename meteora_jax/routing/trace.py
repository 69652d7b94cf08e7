"""Where a bank's adapters have weights: elsewhere a choice of theirs changes nothing, and a trace says so."""

from __future__ import annotations

from typing import Any

import numpy as np
from flax import nnx

from meteora_jax.config import GROUPS
from meteora_jax.sharding import fetch


def adapted_places(weights: Any) -> np.ndarray | None:
    """bool [L, P, A], projections in the order of PROJECTIONS: what `RoutingTrace.adapted` holds; None where no adapter
    of the bank touches a layer.

    weights: the state of a model with a bank. A scale is 0 exactly where an adapter has no part.
    """
    scales = {
        path[-2]: fetch(leaf[...])
        for path, leaf in nnx.to_flat_state(weights)
        if path[0] == "layers" and path[-1] == "lora_scale"
    }  # [L, P of the group, A]; a group that no adapter touches has none
    if not scales:
        return None
    layers, _, adapters = next(iter(scales.values())).shape

    def none(group):
        return np.zeros((layers, len(GROUPS[group]), adapters))

    return np.concatenate([scales.get(group, none(group)) for group in GROUPS], axis=1) != 0
