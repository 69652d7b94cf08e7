"""What training minimises: the interface of every loss, and the next token's cross-entropy."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import optax

from meteora_jax.model.llama import Llama
from meteora_jax.routing import BoundRouter
from meteora_jax.sharding import constrain
from meteora_jax.training.data import Batch

LOGITS_AT_ONCE = 1 << 28  # float32 logits [B, T, V] that are held together; beyond that T is cut into blocks

Remat = bool | Literal["dots"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Losses:
    """loss = lm + beta * gate, and what the gates did on the tokens that have a task ("judged").

    tokens, pairs: float32 [], tokens that are no padding, and pairs of them that attention joins.
    loss, lm, gate: float32 []. gate_accuracy: float32 [L, P], share of the judged tokens behind the prefix that all
    tasks share whose top gate is their task's. hits: float32 [L, P, A], the same by task, as shares of all these
    tokens; judged: float32 [A], each task's share of them. entropy: float32 [L, P], mean of the gates' softmax in nats.
    load: float32 [L, P, A], mean weight that each adapter got. Without gates these five are empty. The losses of the
    parts of one step add up.
    """

    tokens: jax.Array
    pairs: jax.Array
    loss: jax.Array
    lm: jax.Array
    gate: jax.Array
    gate_accuracy: jax.Array
    hits: jax.Array
    judged: jax.Array
    entropy: jax.Array
    load: jax.Array

    @classmethod
    def without_gates(cls, batch: Batch, loss: jax.Array, lm: jax.Array) -> Losses:
        """Of a step that trains no gates."""
        none = jnp.zeros((0,), jnp.float32)
        return cls(
            *batch_size(batch), loss=loss, lm=lm, gate=jnp.zeros((), jnp.float32), gate_accuracy=none, hits=none,
            judged=none, entropy=none, load=none,
        )  # fmt: skip


# (a model that has what the loss is about, part of a step's batch, the router bound to its rows or None where the loss
# routes by itself, what the backward pass computes again) -> the part's losses
PartLoss = Callable[[Any, Batch, Any, Remat], Losses]


@runtime_checkable
class Loss(Protocol):
    """What a step minimises. Each kind of training has one: a frozen value of the settings that it depends on."""

    def over(self, model: Llama, batch: Batch, shared_prefix: int) -> PartLoss:
        """The loss of any part of `batch`, averaged over the whole of it, so that the parts' losses add up.

        shared_prefix: tokens that the sequences of all tasks begin with, which the gates' accuracy leaves out.
        """
        ...


def batch_size(batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Tokens that are no padding, and pairs of them that attention joins; float32 []."""
    return jnp.sum(batch.segments > 0).astype(jnp.float32), jnp.sum((batch.positions + 1).astype(jnp.float32))


def count(x: jax.Array) -> jax.Array:
    """How many of x bool [B, T] are true, float32 [] and at least 1."""
    return jnp.maximum(jnp.sum(x), 1).astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class NextTokenLoss:
    """The mean over predicted tokens of the next token's cross-entropy."""

    def over(self, model: Llama, batch: Batch, shared_prefix: int) -> PartLoss:
        """See `Loss`."""
        del model, shared_prefix
        predicted = count(batch.loss)

        def losses(model: Llama, part: Batch, router: BoundRouter | None, remat: Remat) -> Losses:
            out = model(part.tokens, part.positions, router, segments=part.segments, remat=remat)
            lm = next_token_loss(model, out.hidden, part) / predicted
            return Losses.without_gates(part, lm, lm)

        return losses


def next_token_loss(model: Llama, hidden: jax.Array, batch: Batch, share: jax.Array | None = None) -> jax.Array:
    """Sum of the negative log-probabilities of the predicted tokens; hidden [B, T, D].

    Logits are made block by block of T, and again in the backward pass, where all at once would be too many.
    share: float32 [B, T], what each predicted token counts; 1 unless given.
    """
    # the first token of a sequence is never predicted, so nothing leaks from one sequence of a row into the next
    targets, predicted = jnp.roll(batch.tokens, -1, axis=1), jnp.roll(batch.loss, -1, axis=1)
    predicted = predicted.at[:, -1].set(False)
    share = jnp.ones(batch.tokens.shape, jnp.float32) if share is None else jnp.roll(share, -1, axis=1)

    def block(hidden: jax.Array, targets: jax.Array, predicted: jax.Array, share: jax.Array) -> jax.Array:
        # what is trained acts in the layers alone, so the head needs no router
        logits = constrain(model.logits(hidden, None), "batch", None, "vocab")
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        return jnp.sum(jnp.where(predicted, losses * share, 0.0))

    whole = hidden, targets, predicted, share
    if _blocks(model, hidden) == 1:
        return block(*whole)

    def add(total: jax.Array, parts: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        return total + jax.checkpoint(block)(*parts), None

    return jax.lax.scan(add, jnp.zeros((), jnp.float32), _cut(whole, _blocks(model, hidden)))[0]


def token_scores(model: Llama, hidden: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Of every token but a row's first: its negative log-probability float32 [B, T], and whether it was the likeliest
    one, bool [B, T]; hidden [B, T, D]. Not for gradients."""
    targets = jnp.roll(batch.tokens, -1, axis=1)

    def block(parts: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        logits = constrain(model.logits(parts[0], None), "batch", None, "vocab")
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, parts[1])
        return losses, jnp.argmax(logits, axis=-1) == parts[1]

    found = jax.lax.map(block, _cut((hidden, targets), _blocks(model, hidden)))

    def whole_rows(x: jax.Array) -> jax.Array:
        return jnp.roll(jnp.moveaxis(x, 0, 1).reshape(targets.shape), 1, axis=1)

    return whole_rows(found[0]), whole_rows(found[1])


def _blocks(model: Llama, hidden: jax.Array) -> int:
    """Parts of T whose logits are held together."""
    rows, length, _ = hidden.shape
    for n in range(1, length):
        if length % n == 0 and rows * (length // n) * model.config.vocab_size <= LOGITS_AT_ONCE:
            return n
    return length


def _cut(arrays: tuple[jax.Array, ...], blocks: int) -> tuple[jax.Array, ...]:
    """Arrays [B, T, ..] as [blocks, B, T / blocks, ..]."""
    return tuple(jnp.moveaxis(x.reshape(x.shape[0], blocks, x.shape[1] // blocks, *x.shape[2:]), 1, 0) for x in arrays)
