"""All adapters of a bank trained in one run, and of each the state that served its validation split best."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from meteora_jax.bank import AdapterParam
from meteora_jax.examples import Example, end_token
from meteora_jax.io.bank import save_bank
from meteora_jax.io.base import load_base, read_origin
from meteora_jax.io.files import refuse_foreign
from meteora_jax.io.model_state import split_bank
from meteora_jax.io.tensors import WEIGHTS
from meteora_jax.text import load_tokenizer
from meteora_jax.training.adapter import fresh_bank
from meteora_jax.training.settings import BankTraining, Checkpointing
from meteora_jax.training.side_by_side import SideBySideLoss, shares_of
from meteora_jax.training.step import optimizer
from meteora_jax.training.trainer import Callbacks, Trainee, Trainer, fetched, longest
from meteora_jax.training.validation import Validation, repeated_prompts, split_validation, validation_composites
from meteora_jax.training.watch import FlopCount


def train_bank(
    base: str | os.PathLike[str],
    tasks: Mapping[str, Sequence[Example]],
    dest: str | os.PathLike[str],
    settings: BankTraining,
    *,
    dtype: str = "bfloat16",
    mesh: Mesh | None = None,
    checkpointing: Checkpointing = Checkpointing(),
    callbacks: Callbacks = Callbacks(),
) -> dict[str, Any]:
    """Trains an adapter for each of `tasks`, side by side, and writes the best of each to `dest` as a BANK.

    As `gates.train_gates`; the result also has `kept`, {task: step, exact and loss of what the bank holds}.
    """
    kind = jnp.dtype(dtype)
    refuse_foreign(dest, "bank.json", WEIGHTS)
    config, weights = load_base(base, kind)
    shape = settings.lora.rank, settings.lora.numerator, settings.lora.targets, settings.seed
    bank = fresh_bank(config, list(tasks), *shape, read_origin(base))
    tokenizer = load_tokenizer(base)
    how = settings, tokenizer, end_token(base, config, tokenizer), longest(config, settings)
    training, split = split_validation(tasks, *how)
    validation = Validation(
        split, settings, callbacks.validated, composites=validation_composites(tasks, training, *how),
        repeats=repeated_prompts(tasks, training, split),
    )  # fmt: skip
    run, speed = settings.optimization, settings.schedule
    trainer = Trainer(
        trainee=Trainee(
            base=base, config=config, weights=weights, bank=bank, trained=AdapterParam, router=None,
            flops=FlopCount.of(config, bank.config, chosen=1, gates=None, train_adapters=True),
        ),
        tasks=training, loss=SideBySideLoss(), labels={name: i for i, name in enumerate(tasks)}, settings=settings,
        optimizer=optimizer(run.steps, run.learning_rate, speed.warmup, speed.clip, each=True),
        shares=functools.partial(shares_of, tokens=settings.tokens, epochs=float(settings.epochs)),
        dtype=kind, mesh=mesh, checkpointing=checkpointing, callbacks=callbacks, validation=validation,
    )  # fmt: skip
    state, final = trainer.run()
    if jax.process_index() == 0:
        save_bank(dest, split_bank(bank, fetched(state.best.params), config, mesh))
    return {**final, "kept": validation.summary(state.best)}
