"""Adapters trained side by side: one batch, every token under its own task's adapter, and none disturbs another.

The loss is the sum over adapters of the mean over the tokens that each predicts, and each adapter's gradient is clipped
by its own norm; Adam works number by number. So an adapter learns what it would learn alone, from its own sequences.
Where several tasks share a sequence (composites) an adapter also answers for what others make of its keys and values.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax

from meteora_jax.model.llama import Llama
from meteora_jax.routing import NO_ADAPTER, Routing
from meteora_jax.sharding import Params
from meteora_jax.training.data import Batch
from meteora_jax.training.loss import Losses, PartLoss, Remat, next_token_loss
from meteora_jax.training.sequences import NO_TASK

ADAPTERS = -3  # the adapters' axis of lora_a [L, P, A, R, I] and of lora_b [L, A, R, O]


def task_routing(tasks: jax.Array) -> Routing:
    """Each token's own adapter with weight 1 at every projection, [B, T, 1, 1]; tasks int32 [B, T], NO_TASK tokens get
    none."""
    indices = jnp.where(tasks == NO_TASK, NO_ADAPTER, tasks)[:, :, None, None]
    return Routing(indices, (indices != NO_ADAPTER).astype(jnp.float32))


def acting(batch: Batch) -> jax.Array:
    """int32 [B, T]: the adapter at work where each token is predicted, its predecessor's."""
    return jnp.roll(batch.tasks, 1, axis=1)  # a row's first token is never predicted


@dataclasses.dataclass(frozen=True)
class SideBySideLoss:
    """The sum over adapters of the mean loss of the tokens that each predicts; what no adapter predicts does not count.

    `Losses.lm` is the mean of these over the adapters that predict anything. Tokens are routed by their tasks.
    """

    def over(self, model: Llama, batch: Batch, shared_prefix: int) -> PartLoss:
        """See `training.loss.Loss`."""
        del shared_prefix
        own = jax.nn.one_hot(acting(batch), model.adapters, dtype=jnp.float32)  # NO_TASK gives zeros
        # float32 [A], the tokens of the whole step that each adapter predicts
        predicted = jnp.einsum("bt,bta->a", batch.loss.astype(jnp.float32), own, precision="highest")

        def losses(model: Llama, part: Batch, router: None, remat: Remat) -> Losses:
            del router
            out = model(part.tokens, part.positions, task_routing(part.tasks), segments=part.segments, remat=remat)
            here = acting(part)
            share = jnp.where(here == NO_TASK, 0.0, 1 / jnp.maximum(predicted, 1)[here])
            loss = next_token_loss(model, out.hidden, part, share)
            lm = loss / jnp.maximum(jnp.sum((predicted > 0).astype(jnp.float32)), 1)
            return Losses.without_gates(part, loss, lm)

        return losses


def along_adapters(x: jax.Array, like: jax.Array) -> jax.Array:
    """x [A] with `like`'s rank, its own axis where the adapters are."""
    return x.reshape((1,) * (like.ndim + ADAPTERS) + (-1,) + (1,) * (-ADAPTERS - 1))


def clip_each(limit: float) -> optax.GradientTransformation:
    """`optax.clip_by_global_norm` for every adapter by itself."""

    def init(params: Params) -> optax.EmptyState:
        del params
        return optax.EmptyState()

    def update(updates: Params, state: optax.OptState, params: Params | None = None) -> tuple[Params, optax.OptState]:
        del params
        squares = []
        for leaf in jax.tree.leaves(updates):
            others = tuple(axis for axis in range(leaf.ndim) if axis != leaf.ndim + ADAPTERS)
            squares.append(jnp.sum(jnp.square(leaf.astype(jnp.float32)), axis=others))
        norms = jnp.sqrt(sum(squares))  # [A]
        factor = jnp.where(norms < limit, 1.0, limit / norms)
        return jax.tree.map(lambda g: g * along_adapters(factor, g).astype(g.dtype), updates), state

    return optax.GradientTransformation(init, update)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EMA:
    """The exponential moving average of parameters over steps, and of how many (int32). Unlike the last step's
    parameters it need not wait for a learning rate that sinks to zero, so it can be the best at any step."""

    params: Params
    steps: jax.Array

    def after(self, params: Params, decay: float) -> EMA:
        """With one step more: each counts `decay` times its successor, but the first ones all alike."""
        before = self.steps.astype(jnp.float32)
        old = jnp.minimum(decay, before / (before + 1))
        mean = jax.tree.map(lambda mean, new: old * mean + (1 - old) * new, self.params, params)
        return EMA(mean, self.steps + 1)


def shares_of(lengths: Mapping[str, np.ndarray], tokens: int, epochs: float) -> dict[str, float]:
    """How often each task's sequences are to be drawn, sums to 1: every task for `tokens` tokens, but none more than
    `epochs` times over. lengths: of each task's sequences."""
    draws = {name: min(tokens / float(np.mean(n)), epochs * len(n)) for name, n in lengths.items()}
    total = sum(draws.values())
    return {name: n / total for name, n in draws.items()}
