"""Random banks for the tests of adapter pools, and engines that compile few programs."""

from __future__ import annotations

import dataclasses

import numpy as np

import meteora_jax as mj
from meteora_jax.bank import AdapterBank
from meteora_jax.config import PROJECTIONS, AdapterInfo, BankConfig, LlamaConfig
from meteora_jax.engine import EngineCore, EngineSize

NAMES = tuple(f"adapter{i}" for i in range(12))
SIZE = EngineSize(rows=4, tokens=64, blocks=32, block_size=8)  # one size of prompts: few programs
RANK = 4


def random_bank(config: LlamaConfig, names: tuple[str, ...], seed: int, rank: int = RANK) -> AdapterBank:
    """Adapters of ranks 1 to `rank`, zero-padded, loud enough for each to be heard in the greedy tokens."""
    rng = np.random.default_rng(seed)
    shapes = {p: config.projection_shape(p) for p in PROJECTIONS}
    own = [int(r) for r in rng.integers(1, rank + 1, len(names))]
    own[0] = rank
    a, b, scale = {}, {}, {}
    for p, (i, o) in shapes.items():
        a[p] = rng.standard_normal((config.num_layers, len(names), rank, i), np.float32) / i**0.5
        b[p] = rng.standard_normal((config.num_layers, len(names), rank, o), np.float32)
        for n, r in enumerate(own):
            a[p][:, n, r:], b[p][:, n, r:] = 0, 0
        scale[p] = np.full((config.num_layers, len(names)), 0.7, np.float32)
    infos = tuple(AdapterInfo(n, r, PROJECTIONS, n, "", {}) for n, r in zip(names, own, strict=True))
    return AdapterBank(a, b, scale, BankConfig(infos, dict.fromkeys(PROJECTIONS, rank), config.num_layers, shapes))


def joined(one: AdapterBank, other: AdapterBank) -> AdapterBank:
    """Both banks' adapters, the second's names marked."""
    infos = tuple(dataclasses.replace(a, name=f"{a.name}-2") for a in other.config.adapters)

    def both(part: str) -> dict[str, np.ndarray]:
        return {p: np.concatenate([getattr(one, part)[p], getattr(other, part)[p]], 1) for p in one.a}

    config = dataclasses.replace(one.config, adapters=(*one.config.adapters, *infos))
    return AdapterBank(both("a"), both("b"), both("scale"), config)


def rows_of(model: mj.Meteora, size: EngineSize = SIZE) -> EngineCore:
    made = EngineCore(model.graph, model.weights, model.config, size, decode=model.decode, pool=model.pool)
    made.row_sizes, made.table_sizes = made.row_sizes[-1:], made.table_sizes[-1:]  # few programs are compiled
    return made
