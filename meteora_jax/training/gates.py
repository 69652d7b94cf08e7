"""Gates of a bank trained on its adapters' tasks."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from meteora_jax.bank import AdapterParam
from meteora_jax.config import BankConfig, InputError, LlamaConfig, read_json
from meteora_jax.evaluation.tasks import Example
from meteora_jax.gate_config import GateConfig, TokenRouterForm
from meteora_jax.io.bank import load_bank, save_bank
from meteora_jax.io.base import load_base, read_origin
from meteora_jax.io.files import refuse_foreign
from meteora_jax.io.gates import SHARED_BY_ADAPTERS, fresh_gates, load_gates, save_gates, split_gates
from meteora_jax.io.model_state import split_bank
from meteora_jax.io.tensors import WEIGHTS
from meteora_jax.routing.gates import GateParam, Gates
from meteora_jax.text import load_tokenizer
from meteora_jax.training.background import NULL, in_frames, with_background
from meteora_jax.training.gate_loss import gate_loss
from meteora_jax.training.settings import Checkpointing, GateTraining
from meteora_jax.training.step import optimizer
from meteora_jax.training.trainer import Callbacks, Trainee, Trainer, fetched
from meteora_jax.training.watch import FlopCount


def train_gates(
    base: str | os.PathLike[str],
    bank: str | os.PathLike[str],
    tasks: Mapping[str, Sequence[Example]],
    dest: str | os.PathLike[str],
    settings: GateTraining,
    *,
    dtype: str = "bfloat16",
    mesh: Mesh | None = None,
    checkpointing: Checkpointing = Checkpointing(),
    callbacks: Callbacks = Callbacks(),
    new_bank: str | os.PathLike[str] | None = None,
    extend: str | os.PathLike[str] | None = None,
    background: Sequence[Example] = (),
) -> dict[str, Any]:
    """Trains a bank's gates on its adapters' tasks and writes GATES/ to `dest`.

    Args:
        tasks: {adapter name: training examples}, one for every adapter of the bank.
        checkpointing: without a run folder nothing is saved before the end.
        new_bank: the adapters are trained, too, and written to this BANK folder.
        extend: GATES of a part of the bank's adapters. Their columns are kept bit for bit and only the others'
            trained, and of a token router what all columns read, on the tasks of all: the old ones' tokens are what
            the new columns must not claim, and what the stream must not forget. A sample of these is enough.
        background: text of none of the tasks. Where there is any the gates get a column for no adapter, which these
            tokens are to choose, as they are and in the tasks' own frames (`in_frames`); an extension keeps the column
            that it finds, too.

    Returns:
        the last step's record, losses averaged over the last tenth of the steps; `unused`, what `begun` was given.

    Raises:
        Preempted: SIGTERM came and the run was saved.
    """
    refuse_foreign(dest, "gates.json", WEIGHTS)
    if new_bank is not None:
        refuse_foreign(new_bank, "bank.json", WEIGHTS)
    both, form, objective = new_bank is not None, settings.form, settings.objective
    kind = jnp.dtype(dtype)
    config, weights = load_base(base, kind)
    loaded = load_bank(bank, config, kind, read_origin(base))
    names = loaded.names
    old = _described(extend, form) if extend is not None else None
    null = bool(background) or (old is not None and old.null)
    if problems := _problems(settings, loaded.config, str(bank), both):
        raise InputError(problems)
    gates = GateConfig(names, settings.top_k, settings.temperature, form, null)
    fresh = fresh_gates(form, config, gates.columns, settings.seed)
    columns = None if extend is None or old is None else _extended(extend, config, gates, old, fresh)
    labels = {name: i for i, name in enumerate(names)}
    if background:
        own = {name: examples for name in names if (examples := tasks.get(name))}
        tasks = {**tasks, NULL: in_frames(background, own, load_tokenizer(base))}
        labels = {**labels, NULL: len(names)}
    run, speed = settings.optimization, settings.schedule
    trainer = Trainer(
        trainee=Trainee(
            base=base, config=config, weights=weights, bank=loaded, gates=fresh, form=form, columns=columns,
            trained=(GateParam, AdapterParam) if both else GateParam,
            router=Gates(settings.top_k, settings.temperature),
            flops=FlopCount.of(
                config, loaded.config, chosen=settings.top_k, gates=form or "meteora", train_adapters=both,
                lm=objective.lm_loss,
            ),
        ),
        tasks=tasks, labels=labels, settings=settings, loss=gate_loss(objective),
        shares=functools.partial(with_background, share=settings.background_share) if background else None,
        optimizer=optimizer(
            run.steps, run.learning_rate, speed.warmup, speed.clip, settings.adapter_learning_rate
        ),
        dtype=kind, mesh=mesh, checkpointing=checkpointing, callbacks=callbacks, identity={"train_adapters": both},
    )  # fmt: skip
    state, final = trainer.run()
    flat = fetched(state.params)
    if jax.process_index() == 0:
        if new_bank is not None:
            save_bank(new_bank, split_bank(loaded, flat, config, mesh))
        save_gates(Path(dest), gates, split_gates(flat))
    return final


def _problems(settings: GateTraining, bank: BankConfig, folder: str, both: bool) -> list[str]:
    """Why these gates cannot be trained for this bank; both: the adapters are trained, too."""
    problems, count = [], len(bank.names)
    if NULL in bank.names:
        problems.append(f"{folder}: names: expected none called {NULL!r}, found one")
    if settings.adapter_learning_rate is not None and not both:
        problems.append("adapter_learning_rate: expected a new_bank beside it, found adapters frozen")
    if both and not settings.objective.lm_loss:
        problems.append("lm_loss: expected frozen adapters to go without it, found a new_bank")
    if settings.top_k > count:
        problems.append(f"top_k: expected at most {count} (the bank's adapters), found {settings.top_k}")
    if both and (bank.dora or bank.lora_bias):
        problems.append(f"{folder}: new_bank: expected plain LoRA, found an adapter with DoRA or a bias")
    if bank.invoked:
        found = ", ".join(bank.invoked)
        problems.append(f"{folder}: expected adapters that act on every token (gates choose for each), found {found}")
    return problems


def _described(folder: str | os.PathLike[str], form: TokenRouterForm | None) -> GateConfig:
    """What GATES/ says of the gates that are extended; InputError where they are not of that form."""
    source = Path(folder) / "gates.json"
    described = GateConfig.from_json(read_json(source), str(source))
    if described.form != form:
        asked, found = (f or "MeteoRA's own gates" for f in (form, described.form))
        raise InputError(f"{source}: form: expected {asked} (as asked for), found {found}")
    return described


def _extended(
    folder: str | os.PathLike[str], config: LlamaConfig, whole: GateConfig, described: GateConfig,
    gates: dict[str, np.ndarray],
) -> np.ndarray:  # fmt: skip
    """Fills the columns that GATES/ has into `gates`, which are to be `whole`; which it has not, bool [columns]."""
    source, old, names = Path(folder) / "gates.json", described.names, whole.names
    unknown = [n for n in old if n not in names]
    if unknown:
        raise InputError(f"{source}: names: expected adapters of the bank, found {', '.join(unknown)}")
    if len(old) == len(names) and described.null == whole.null:
        raise InputError(f"{source}: names: expected a part of the bank's adapters, found all of them")
    _, trained = load_gates(folder, config, old)
    at = [*(names.index(n) for n in old), *range(len(names), len(names) + described.null)]
    for name, columns in trained.items():
        if name in SHARED_BY_ADAPTERS:
            gates[name] = columns
        else:
            gates[name][..., at] = columns
    return ~np.isin(np.arange(whole.columns), at)
