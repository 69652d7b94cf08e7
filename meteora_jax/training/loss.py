"""The loss of gate training: CE(next token) + beta * CE(gate logits, task id) (MeteoRA, section 3.3)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from meteora_jax.config import GROUPS, PROJECTIONS
from meteora_jax.gate_config import SEGMENTS
from meteora_jax.model.llama import Llama
from meteora_jax.model.routed_llama import RoutedLlama
from meteora_jax.routing import BoundRouter, Routing
from meteora_jax.routing.token_router import Hop, choose
from meteora_jax.sharding import constrain
from meteora_jax.training.data import NO_TASK, Batch

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
    load: float32 [L, P, A], mean weight that each adapter got. Without gates these five are empty. Parts of a step that
    share `Counts` add up.
    """

    tokens: Any
    pairs: Any
    loss: Any
    lm: Any
    gate: Any
    gate_accuracy: Any
    hits: Any
    judged: Any
    entropy: Any
    load: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Counts:
    """What the terms are averaged over: predicted and judged tokens of the whole step, those that are both, and the
    `turns` of these, float32 []. Where prompts carry no loss the latter two are the answers' and their beginnings'.

    decided: float32 [], the judged tokens behind the first `shared` (int32 []) of their sequence: with these the
    sequences of all tasks begin, so that no gate can tell one task by them, and accuracy leaves them out.
    """

    predicted: Any
    judged: Any
    answered: Any
    turned: Any
    decided: Any
    shared: Any

    @classmethod
    def of(cls, batch: Batch, shared: int = 0) -> Counts:
        count = lambda x: jnp.maximum(jnp.sum(x), 1).astype(jnp.float32)  # noqa: E731
        judged = batch.tasks != NO_TASK
        decided = count(judged & (batch.positions >= shared))
        whole = count(batch.loss), count(judged), count(judged & batch.loss), count(turns(batch))
        return cls(*whole, decided, jnp.int32(shared))

    def decidable(self, batch: Batch) -> jax.Array:
        """float32 [B, T]: 1 for the judged tokens that count in accuracy."""
        return ((batch.tasks != NO_TASK) & (batch.positions >= self.shared)).astype(jnp.float32)


def gate_training_loss(
    model: Llama,
    batch: Batch,
    router: BoundRouter,
    beta: float | jax.Array,
    *,
    remat: Remat,
    counts: Counts | None = None,
    lm_loss: bool = True,
    answer_share: float | None = None,
    turn_share: float = 0.0,
    order: float = 0.0,
) -> Losses:
    """The loss of one batch, or of a part of it (`counts` are then the whole's).

    The LM term is averaged over the predicted tokens, the gate term over every layer, projection and token
    that has a task; each layer reduces its own gate logits, so no [L, B, T, P, A] is ever kept. A model without
    gates has the LM term alone.

    lm_loss: without it a token router has its own term alone, and no layer runs. answer_share: what the tokens that
    carry loss count in the gate term, together; the other judged ones count the rest. turn_share: the part of
    answer_share that `turns` count by themselves. order: then, the weight beside the gate term of
    CE(previous segment's task, `previous_task`) + CE(its own segment's index, `segment_index`).
    """
    counts = Counts.of(batch) if counts is None else counts
    gates = model.has_gates
    judge = _judge(batch, counts, answer_share, turn_share)
    if not lm_loss:
        assert isinstance(model, RoutedLlama), "gates at the projections need the layers"
        return _router_alone(model, batch, router, beta, counts, judge, order)

    def observe(routings: tuple[Routing, ...]) -> tuple[jax.Array, ...]:
        return judge([r.spread(len(ps)) for r, ps in zip(routings, GROUPS.values(), strict=True)])

    out = model(
        batch.tokens, batch.positions, router, segments=batch.segments, observe=observe if gates else None, remat=remat
    )
    lm = next_token_loss(model, out.hidden, batch) / counts.predicted
    size = jnp.sum(batch.segments > 0).astype(jnp.float32), jnp.sum((batch.positions + 1).astype(jnp.float32))
    if not gates:
        none = jnp.zeros((0,), jnp.float32)
        return Losses(*size, lm, lm, jnp.zeros((), jnp.float32), none, none, none, none, none)
    gate, hits, entropy, load = out.observed
    gate = jnp.mean(gate)
    judged = _by_task(counts.decidable(batch)[..., None], batch, hits.shape[-1])[0] / counts.decided
    return Losses(*size, lm + beta * gate, lm, gate, jnp.sum(hits, -1), hits, judged, entropy, load)


def _router_alone(
    model: RoutedLlama,
    batch: Batch,
    router: BoundRouter,
    beta: float | jax.Array,
    counts: Counts,
    judge: Any,
    order: float,
) -> Losses:
    """The gate term of a token router; each figure stands for all layers and projections, and is the last hop's. The
    loss is the mean of both hops'."""
    hops = model.hops(batch.tokens, batch.positions, batch.segments)
    totals, seen = [], ()
    for hop in hops:
        seen = judge([choose(router, hop.logits, hop.logits)])
        totals.append(jnp.mean(seen[0]))
        if order:
            losses = jnp.where(batch.tasks != NO_TASK, _order_losses(hop, batch), 0.0)
            totals[-1] += order * jnp.sum(losses) / counts.judged
    everywhere = model.config.num_layers, len(PROJECTIONS)
    gate, hits, entropy, load = (jnp.broadcast_to(z[None], (*everywhere, *z.shape[1:])) for z in seen)
    gate = jnp.mean(gate)
    judged = _by_task(counts.decidable(batch)[..., None], batch, hits.shape[-1])[0] / counts.decided
    size = jnp.sum(batch.segments > 0).astype(jnp.float32), jnp.sum((batch.positions + 1).astype(jnp.float32))
    none, total = jnp.zeros((), jnp.float32), sum(totals) / len(totals)
    return Losses(*size, beta * total, none, gate, jnp.sum(hits, -1), hits, judged, entropy, load)


def _order_losses(hop: Hop, batch: Batch) -> jax.Array:
    """CE(previous segment's task) + CE(own segment's index), float32 [B, T]."""
    entropy = optax.softmax_cross_entropy_with_integer_labels
    losses = entropy(hop.previous, previous_task(batch.tasks, batch.segments, hop.previous.shape[-1] - 1))
    return losses + entropy(hop.segment, segment_index(batch.tasks, batch.segments, SEGMENTS))


def previous_task(tasks: jax.Array, sequences: jax.Array, none: int) -> jax.Array:
    """The task of the segment before each token's own, int32 [B, T]; a segment is a run of one task's tokens.

    `none` for the first question and the first answer of a block, which are known by their task: a block begins
    with a sequence, or behind tokens of no task. That is what a line of a composite problem and its question have in
    common, whatever their number, and what attention can look up.
    """
    last, apart, first = _runs(tasks, sequences)
    before = _latest(jnp.where(apart, NO_TASK, last), (tasks != last) | apart)
    return jnp.where((tasks == first) | (before == NO_TASK), none, before)


def segment_index(tasks: jax.Array, sequences: jax.Array, count: int) -> jax.Array:
    """The index of each token's segment in its block, int32 [B, T], from 0 and at most count - 1: segments since the
    latest of the task that the block began with, so that a line has its question's."""
    last, apart, first = _runs(tasks, sequences)
    begins = (tasks != NO_TASK) & ((tasks != last) | apart)
    number = jnp.cumsum(begins, axis=1)
    return jnp.minimum(number - _latest(number, begins & (tasks == first)), count - 1)


def _runs(tasks: jax.Array, sequences: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of each token [B, T]: the task of the one before, whether a sequence begins, the task its block began with."""
    behind = lambda x: jnp.pad(x[:, :-1], ((0, 0), (1, 0)), constant_values=NO_TASK)  # noqa: E731
    last, apart = behind(tasks), sequences != behind(sequences)
    return last, apart, _latest(tasks, (tasks != NO_TASK) & ((last == NO_TASK) | apart))


def _latest(x: jax.Array, at: jax.Array) -> jax.Array:
    """x [B, T] where `at` was last true; a row's first where it never was."""
    place = jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32)[None], x.shape)
    return jnp.take_along_axis(x, jax.lax.cummax(jnp.where(at, place, 0), axis=1), axis=1)


def _by_task(x: jax.Array, batch: Batch, adapters: int) -> jax.Array:
    """Sums of x float32 [B, T, P] over each task's tokens: [P, A]."""
    own = jax.nn.one_hot(batch.tasks, adapters, dtype=jnp.float32)  # NO_TASK gives zeros
    return jnp.einsum("btp,bta->pa", x, own, precision="highest")


def turns(batch: Batch) -> jax.Array:
    """The first two tokens of each run of one task's tokens that carry loss, bool [B, T]: what chooses for an answer
    before there is any of it."""
    behind = lambda x: jnp.pad(x[:, :-1], ((0, 0), (1, 0)))  # noqa: E731
    own = batch.loss & (batch.tasks != NO_TASK)
    goes_on = behind(own) & (behind(batch.tasks) == batch.tasks) & (behind(batch.segments) == batch.segments)
    first = own & ~goes_on
    return first | (behind(first) & own & goes_on)


def _judge(batch: Batch, counts: Counts, answer_share: float | None = None, turn_share: float = 0.0) -> Any:
    judged, decidable = (batch.tasks != NO_TASK)[:, :, None], counts.decidable(batch)[:, :, None]
    counted = 1.0 / counts.judged
    if answer_share is not None:
        prompts = (1.0 - answer_share) / jnp.maximum(counts.judged - counts.answered, 1.0)
        answers = answer_share * (1.0 - turn_share) / counts.answered
        answers = answers + jnp.where(turns(batch), answer_share * turn_share / counts.turned, 0.0)
        counted = jnp.where(batch.loss, answers, prompts)[:, :, None]
    labels = jnp.maximum(batch.tasks, 0)[:, :, None]
    mean = lambda x: jnp.sum(jnp.where(judged, x, 0.0), axis=(0, 1)) / counts.judged  # noqa: E731

    def judge(routings: Sequence[Routing]) -> tuple[jax.Array, ...]:
        """A layer's gate loss [P], hits [P, A], entropy [P], load [P, A]."""
        logits = jnp.concatenate([r.logits for r in routings], axis=2)  # [B, T, P, A]
        wanted = jnp.broadcast_to(labels, logits.shape[:-1])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, wanted)
        seen = jax.lax.stop_gradient(logits)
        hits = (jnp.argmax(seen, axis=-1) == wanted).astype(jnp.float32)
        logp = jax.nn.log_softmax(seen, axis=-1)
        entropy = -jnp.sum(jnp.exp(logp) * logp, axis=-1)
        load = jnp.concatenate([jax.lax.stop_gradient(r.dense(logits.shape[-1])) for r in routings], axis=2)
        load = jnp.sum(jnp.where(judged[..., None], load, 0.0), axis=(0, 1)) / counts.judged
        loss = jnp.sum(jnp.where(judged, losses * counted, 0.0), axis=(0, 1))
        return loss, _by_task(hits * decidable, batch, logits.shape[-1]) / counts.decided, mean(entropy), load

    return judge


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
    join = lambda x: jnp.roll(jnp.moveaxis(x, 0, 1).reshape(targets.shape), 1, axis=1)  # noqa: E731
    return join(found[0]), join(found[1])


def _blocks(model: Llama, hidden: jax.Array) -> int:
    """Parts of T whose logits are held together."""
    rows, length, _ = hidden.shape
    fits = lambda n: length % n == 0 and rows * (length // n) * model.config.vocab_size <= LOGITS_AT_ONCE  # noqa: E731
    return next((n for n in range(1, length + 1) if fits(n)), length)


def _cut(tree: Any, blocks: int) -> Any:
    """Arrays [B, T, ..] as [blocks, B, T / blocks, ..]."""
    cut = lambda x: jnp.moveaxis(x.reshape(x.shape[0], blocks, x.shape[1] // blocks, *x.shape[2:]), 1, 0)  # noqa: E731
    return jax.tree.map(cut, tree)
