"""The loop of gate training on one device."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from meteora_jax.adapters import GateParam
from meteora_jax.checkpoint import assemble, load_bank, load_base, save_gates, split_gates
from meteora_jax.config import PROJECTIONS, GateConfig, InputError
from meteora_jax.evaluation.tasks import Example
from meteora_jax.routing.gates import Gates
from meteora_jax.text import load_tokenizer
from meteora_jax.training.data import mixture
from meteora_jax.training.step import TrainState, optimizer, train_step


@dataclasses.dataclass(frozen=True)
class GateTraining:
    """How gates are trained; the defaults are the original's, batch and steps aside."""

    steps: int
    batch_size: int
    learning_rate: float = 5e-4
    warmup: float = 0.005
    clip: float = 0.3
    beta: float = 50.0
    top_k: int = 2
    temperature: float = 1.0
    composite: float = 0.0
    max_length: int = 4096
    prompt_loss: bool = True
    remat: bool = True
    seed: int = 0


def train_gates(
    base: str | os.PathLike[str],
    bank: str | os.PathLike[str],
    tasks: Mapping[str, Sequence[Example]],
    dest: str | os.PathLike[str],
    settings: GateTraining,
    *,
    dtype: str = "bfloat16",
    log: str | os.PathLike[str] | None = None,
    progress: Callable[[int, dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Trains a bank's gates on its adapters' tasks and writes GATES/ to `dest`.

    Args:
        tasks: {adapter name: training examples}, one for every adapter of the bank.
        log: JSON lines, one a step.
        progress: called after every step with the step's record.

    Returns:
        the last step's record, losses averaged over the last tenth of the steps.
    """
    kind = jnp.dtype(dtype)
    config, weights = load_base(base, kind)
    loaded = load_bank(bank, config, kind)
    names = loaded.names
    if settings.top_k > len(names):
        raise InputError(f"top_k: expected at most {len(names)} (the bank's adapters), found {settings.top_k}")
    if not config.eos_token_ids:
        raise InputError(f"{base}: eos_token_id: expected an end token, found none")
    batches = mixture(
        tasks, names, load_tokenizer(base), config.eos_token_ids[0],
        batch_size=settings.batch_size, max_length=min(settings.max_length, config.max_position_embeddings),
        composite=settings.composite, seed=settings.seed, prompt_loss=settings.prompt_loss,
    )  # fmt: skip
    zeros = {
        p: np.zeros((config.num_layers, config.projection_shape(p)[0], len(names)), np.float32) for p in PROJECTIONS
    }
    graph, state = assemble(config, weights, loaded, zeros, kind)
    graph, gates, frozen = nnx.split(nnx.merge(graph, state), GateParam, ...)
    tx = optimizer(settings.steps, settings.learning_rate, settings.warmup, settings.clip)
    train = TrainState(gates, tx.init(gates))
    router = Gates(settings.top_k, settings.temperature).bind(
        [Gates(settings.top_k, settings.temperature)] * settings.batch_size, names
    )
    records: list[dict[str, Any]] = []
    started = time.perf_counter()
    with open(log or os.devnull, "w", encoding="utf-8") as out:
        for step in range(1, settings.steps + 1):
            batch = next(batches)
            train, losses = train_step(
                graph,
                frozen,
                train,
                jax.tree.map(jnp.asarray, batch),
                router,
                settings.beta,
                tx=tx,
                remat=settings.remat,
            )
            record = {
                "step": step,
                "lm": round(float(losses.lm), 5),
                "gate": round(float(losses.gate), 5),
                "gate_accuracy": round(float(jnp.mean(losses.gate_accuracy)), 5),
                "tokens": int((batch.positions >= 0).sum()),
                "seconds": round(time.perf_counter() - started, 2),
            }
            if not np.isfinite(record["lm"] + record["gate"]):
                raise InputError(f"step {step}: expected a finite loss, found lm {record['lm']}, gate {record['gate']}")
            records.append(record)
            out.write(json.dumps(record) + "\n")
            if progress:
                progress(step, record)
    flat = {tuple(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(train.gates)}
    save_gates(Path(dest), GateConfig(names, settings.top_k, settings.temperature), split_gates(flat))
    tail = records[-max(1, len(records) // 10) :]
    means = {k: float(np.mean([r[k] for r in tail])) for k in ("lm", "gate", "gate_accuracy")}
    return {**records[-1], **means}
