"""One update of the gates; base and adapters stay as they are."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import optax
from flax import nnx

from meteora_jax.routing import BoundRouter
from meteora_jax.training.data import Batch
from meteora_jax.training.loss import Losses, gate_training_loss


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What training changes: the gates (float32) and the optimiser's moments."""

    gates: Any
    optimizer: Any


def schedule(steps: int, learning_rate: float, warmup: float) -> optax.Schedule:
    """Linear warm-up over the share `warmup` of the steps, then a cosine to zero."""
    return optax.warmup_cosine_decay_schedule(0.0, learning_rate, min(round(steps * warmup), steps - 1), steps)


def optimizer(steps: int, learning_rate: float, warmup: float, clip: float) -> optax.GradientTransformation:
    """AdamW with the gradient's global norm clipped: the original's recipe."""
    return optax.chain(
        optax.clip_by_global_norm(clip), optax.adamw(schedule(steps, learning_rate, warmup), weight_decay=0.0)
    )


@functools.partial(jax.jit, static_argnames=("graph", "tx", "remat"), donate_argnames=("state",))
def train_step(
    graph: Any,
    frozen: Any,
    state: TrainState,
    batch: Batch,
    router: BoundRouter,
    beta: float | jax.Array,
    *,
    tx: optax.GradientTransformation,
    remat: bool,
) -> tuple[TrainState, Losses]:
    """Gradients of the gates alone, one optimiser update; returns the batch's losses before the update."""

    def loss(gates: Any) -> tuple[jax.Array, Losses]:
        losses = gate_training_loss(nnx.merge(graph, gates, frozen), batch, router, beta, remat=remat)
        return losses.loss, losses

    grads, losses = jax.grad(loss, has_aux=True)(state.gates)
    with jax.numpy_dtype_promotion("standard"):  # optax relies on it, whatever the rest of the program says
        updates, moments = tx.update(grads, state.optimizer, state.gates)
        gates = optax.apply_updates(state.gates, updates)
    return TrainState(gates, moments), losses
