"""LoRAs before their training, as banks, and the training of one."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from meteora_jax.bank import AdapterBank, AdapterParam
from meteora_jax.config import PROJECTIONS, AdapterInfo, BankConfig, InputError, LlamaConfig
from meteora_jax.evaluation.tasks import Example
from meteora_jax.io.bank import save_bank
from meteora_jax.io.base import load_base, read_origin
from meteora_jax.io.files import refuse_foreign
from meteora_jax.io.model_state import split_bank
from meteora_jax.io.provenance import BaseOrigin
from meteora_jax.io.tensors import WEIGHTS
from meteora_jax.routing.fixed import Fixed
from meteora_jax.training.settings import AdapterTraining, Checkpointing
from meteora_jax.training.step import optimizer
from meteora_jax.training.trainer import Callbacks, Trainee, Trainer, fetched
from meteora_jax.training.watch import FlopCount


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
    a, b, scale = (
        {p: np.concatenate([held[p] for held in parts], 1) for p in banks[0].a}
        for parts in zip(*((b.a, b.b, b.scale) for b in banks), strict=True)
    )
    whole = dataclasses.replace(banks[0].config, adapters=tuple(b.config.adapters[0] for b in banks))
    return AdapterBank(a, b, scale, whole)


def train_adapter(
    base: str | os.PathLike[str],
    tasks: Mapping[str, Sequence[Example]],
    dest: str | os.PathLike[str],
    settings: AdapterTraining,
    *,
    dtype: str = "bfloat16",
    mesh: Mesh | None = None,
    checkpointing: Checkpointing = Checkpointing(),
    callbacks: Callbacks = Callbacks(),
) -> dict[str, Any]:
    """Trains one adapter on all `tasks` and writes it to `dest` as a BANK of one. Otherwise as `gates.train_gates`."""
    refuse_foreign(dest, "bank.json", WEIGHTS)
    kind = jnp.dtype(dtype)
    config, weights = load_base(base, kind)
    shape = settings.lora.rank, settings.lora.numerator, settings.lora.targets, settings.seed
    bank = fresh_adapter(config, settings.name, *shape, read_origin(base))
    run, speed = settings.optimization, settings.schedule
    trainer = Trainer(
        trainee=Trainee(
            base=base, config=config, weights=weights, bank=bank, trained=AdapterParam, router=Fixed(settings.name),
            flops=FlopCount.of(config, bank.config, chosen=1, gates=None, train_adapters=True),
        ),
        tasks=tasks, labels=dict.fromkeys(tasks, 0), settings=settings, mixture=settings.mixture,
        optimizer=optimizer(run.steps, run.learning_rate, speed.warmup, speed.clip),
        dtype=kind, mesh=mesh, checkpointing=checkpointing, callbacks=callbacks,
    )  # fmt: skip
    state, final = trainer.run()
    if jax.process_index() == 0:
        save_bank(dest, split_bank(bank, fetched(state.params), config, mesh))
    return final
