"""LoRAs before their training, as banks."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from meteora_jax.adapters import AdapterBank
from meteora_jax.config import PROJECTIONS, AdapterInfo, BankConfig, InputError, LlamaConfig
from meteora_jax.origin import BaseOrigin


def fresh_adapter(
    config: LlamaConfig,
    name: str,
    rank: int,
    alpha: float,
    targets: Sequence[str],
    seed: int | Sequence[int],
    origin: BaseOrigin | None = None,
) -> AdapterBank:
    """A random, B zero, scale alpha / rank, so that it changes nothing yet.

    A is uniform in +-1/sqrt(I), what PEFT's kaiming_uniform(a=sqrt(5)) gives (Hu et al., arXiv 2106.09685). `origin`
    is the base's.
    """
    problems = [
        f"targets: expected some of {', '.join(PROJECTIONS)}, found {t!r}" for t in targets if t not in PROJECTIONS
    ]
    if not targets:
        problems.append("targets: expected at least one projection, found none")
    if rank < 1:
        problems.append(f"rank: expected at least 1, found {rank}")
    if problems:
        raise InputError(problems)
    ordered = tuple(p for p in PROJECTIONS if p in targets)
    rng = np.random.default_rng(seed)
    n = config.num_layers
    a, b, scale = {}, {}, {}
    for p in ordered:
        i, o = config.projection_shape(p)
        a[p] = rng.uniform(-(i**-0.5), i**-0.5, (n, 1, rank, i)).astype(np.float32)
        b[p] = np.zeros((n, 1, rank, o), np.float32)
        scale[p] = np.full((n, 1), alpha / rank, np.float32)
    peft = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": alpha, "lora_dropout": 0.0,
        "bias": "none", "use_rslora": False, "target_modules": list(ordered),
        "base_model_name_or_path": origin.name if origin else None,
    }  # fmt: skip
    info = AdapterInfo(name, rank, ordered, "trained", "", peft)
    shapes = {p: config.projection_shape(p) for p in PROJECTIONS}
    record = dataclasses.asdict(origin) if origin else None
    return AdapterBank(a, b, scale, BankConfig((info,), dict.fromkeys(ordered, rank), n, shapes, base=record))


def fresh_bank(
    config: LlamaConfig,
    names: Sequence[str],
    rank: int,
    alpha: float,
    targets: Sequence[str],
    seed: int,
    origin: BaseOrigin | None = None,
) -> AdapterBank:
    """A `fresh_adapter` of each name, each with an A of its own, side by side."""
    banks = [fresh_adapter(config, n, rank, alpha, targets, [seed, i], origin) for i, n in enumerate(names)]
    side_by_side = lambda part: {p: np.concatenate([getattr(b, part)[p] for b in banks], 1) for p in banks[0].a}  # noqa: E731
    whole = dataclasses.replace(banks[0].config, adapters=tuple(b.config.adapters[0] for b in banks))
    return AdapterBank(side_by_side("a"), side_by_side("b"), side_by_side("scale"), whole)
