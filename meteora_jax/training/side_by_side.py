"""Adapters trained side by side: one batch, every token under its own task's adapter, and none disturbs another.

The loss is the sum over adapters of the mean over the tokens that each predicts, and each adapter's gradient is clipped
by its own norm; Adam works number by number. So an adapter learns what it would learn alone, from its own sequences.
Where several tasks share a sequence (composites) an adapter also answers for what others make of its keys and values.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from meteora_jax.model.llama import Llama
from meteora_jax.routing import NO_ADAPTER, Routing
from meteora_jax.training.data import NO_TASK, Batch
from meteora_jax.training.loss import Losses, Remat, next_token_loss

ADAPTERS = -3  # the adapters' axis of lora_a [L, P, A, R, I] and of lora_b [L, A, R, O]


def task_routing(tasks: jax.Array) -> Routing:
    """Each token's own adapter with weight 1 at every projection, [B, T, 1, 1]; tasks int32 [B, T], NO_TASK tokens get
    none."""
    indices = jnp.where(tasks == NO_TASK, NO_ADAPTER, tasks)[:, :, None, None]
    return Routing(indices, (indices != NO_ADAPTER).astype(jnp.float32))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ByTask:
    """The router of such a run: it is bound anew to every batch's tasks, inside the step."""

    needs_gates = False

    def bind(self, routers: Sequence[Any], names: tuple[str, ...]) -> ByTask:
        """Itself: what it needs comes with the batch."""
        return self

    def route(self, x: jax.Array, gate: Any) -> Routing:
        raise NotImplementedError("a batch's tasks say which adapters act: task_routing(batch.tasks)")


def acting(batch: Batch) -> jax.Array:
    """int32 [B, T]: the adapter at work where each token is predicted, its predecessor's."""
    return jnp.roll(batch.tasks, 1, axis=1)  # a row's first token is never predicted


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class OwnCounts:
    """predicted: float32 [A], the tokens of a whole step that each adapter predicts."""

    predicted: Any

    @classmethod
    def of(cls, batch: Batch, adapters: int) -> OwnCounts:
        own = jax.nn.one_hot(acting(batch), adapters, dtype=jnp.float32)  # NO_TASK gives zeros
        return cls(jnp.einsum("bt,bta->a", batch.loss.astype(jnp.float32), own, precision="highest"))


def side_by_side_loss(model: Llama, batch: Batch, counts: OwnCounts, *, remat: Remat) -> Losses:
    """Of a batch, or of a part of it (`counts` are then the whole's). What no adapter predicts does not count.

    loss: the sum over adapters of their mean losses; lm: the mean of those over the adapters that predict anything.
    """
    out = model(batch.tokens, batch.positions, task_routing(batch.tasks), segments=batch.segments, remat=remat)
    size = jnp.sum(batch.segments > 0).astype(jnp.float32), jnp.sum((batch.positions + 1).astype(jnp.float32))
    here = acting(batch)
    share = jnp.where(here == NO_TASK, 0.0, 1 / jnp.maximum(counts.predicted, 1)[here])
    loss = next_token_loss(model, out.hidden, batch, share)
    lm = loss / jnp.maximum(jnp.sum((counts.predicted > 0).astype(jnp.float32)), 1)
    none = jnp.zeros((0,), jnp.float32)
    return Losses(*size, loss, lm, jnp.zeros((), jnp.float32), none, none, none, none, none)


def along_adapters(x: jax.Array, like: jax.Array) -> jax.Array:
    """x [A] with `like`'s rank, its own axis where the adapters are."""
    return x.reshape((1,) * (like.ndim + ADAPTERS) + (-1,) + (1,) * (-ADAPTERS - 1))


def clip_each(limit: float) -> optax.GradientTransformation:
    """`optax.clip_by_global_norm` for every adapter by itself."""

    def init(params: Any) -> optax.EmptyState:
        del params
        return optax.EmptyState()

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
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
class Average:
    """The mean of parameters over steps, recent ones counting most, and of how many (int32). Unlike the last step's it
    need not wait for a rate that sinks to zero, so it can be the best at any step."""

    params: Any
    steps: Any

    def after(self, params: Any, decay: float) -> Average:
        """With one step more: each counts `decay` times its successor, but the first ones all alike."""
        before = self.steps.astype(jnp.float32)
        old = jnp.minimum(decay, before / (before + 1))
        mean = jax.tree.map(lambda mean, new: old * mean + (1 - old) * new, self.params, params)
        return Average(mean, self.steps + 1)


def shares_of(lengths: Mapping[str, np.ndarray], tokens: int, epochs: float) -> dict[str, float]:
    """How often each task's sequences are to be drawn, sums to 1: every task for `tokens` tokens, but none more than
    `epochs` times over. lengths: of each task's sequences."""
    draws = {name: min(tokens / float(np.mean(n)), epochs * len(n)) for name, n in lengths.items()}
    total = sum(draws.values())
    return {name: n / total for name, n in draws.items()}
