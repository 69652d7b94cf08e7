"""The loss of gate training: CE(next token) + beta * CE(gate logits, task id) (MeteoRA, section 3.3)."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from meteora_jax.llama import Llama
from meteora_jax.routing import BoundRouter, Routing
from meteora_jax.training.data import NO_TASK, Batch


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Losses:
    """loss = lm + beta * gate. gate_accuracy float32 [L, P]: share of judged tokens whose top gate is their task's."""

    loss: Any
    lm: Any
    gate: Any
    gate_accuracy: Any


def gate_training_loss(
    model: Llama, batch: Batch, router: BoundRouter, beta: float | jax.Array, *, remat: bool
) -> Losses:
    """The loss of one batch.

    The LM term is averaged over the predicted tokens, the gate term over every layer, projection and token
    that has a task; each layer reduces its own gate logits, so no [L, B, T, P, A] is ever kept.
    """
    judged = (batch.tasks != NO_TASK)[:, :, None]
    labels = jnp.maximum(batch.tasks, 0)[:, :, None]
    count = jnp.maximum(jnp.sum(judged), 1).astype(jnp.float32)

    def observe(routings: tuple[Routing, ...]) -> tuple[jax.Array, jax.Array]:
        logits = jnp.concatenate([r.logits for r in routings], axis=2)  # [B, T, P, A]
        wanted = jnp.broadcast_to(labels, logits.shape[:-1])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, wanted)
        hits = jnp.argmax(logits, axis=-1) == wanted
        total = lambda x: jnp.sum(jnp.where(judged, x, 0.0), axis=(0, 1)) / count  # noqa: E731
        return total(losses), total(hits.astype(jnp.float32))  # [P] each

    out = model(batch.tokens, batch.positions, router, observe=observe, remat=remat)
    gate, accuracy = out.observed
    logits = model.logits(out.hidden[:, :-1])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.tokens[:, 1:])
    predicted = batch.loss[:, 1:]
    lm = jnp.sum(jnp.where(predicted, losses, 0.0)) / jnp.maximum(jnp.sum(predicted), 1).astype(jnp.float32)
    gate = jnp.mean(gate)
    return Losses(lm + beta * gate, lm, gate, accuracy)
