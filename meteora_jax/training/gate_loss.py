"""The losses of gate training: CE(next token) + beta * CE(gate logits, task id) (MeteoRA, section 3.3)."""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import optax

from meteora_jax.config import GROUPS, PROJECTIONS
from meteora_jax.gate_config import SEGMENTS
from meteora_jax.model.llama import Llama
from meteora_jax.model.routed_llama import RoutedLlama
from meteora_jax.routing import NO_ADAPTER, BoundRouter, Routing
from meteora_jax.routing.token_router import Hop, choose
from meteora_jax.training.data import Batch
from meteora_jax.training.loss import Loss, Losses, PartLoss, Remat, batch_size, count, next_token_loss
from meteora_jax.training.sequences import NO_TASK
from meteora_jax.training.settings import Objective
from pallas_kernels.routed_lora.reference import dense_weights


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Counts:
    """What the terms are averaged over: tokens of the whole step, float32 [].

    predicted: those that carry loss. judged: those that have a task. responses: those that carry loss and have a task;
    where prompts carry no loss these are the responses' tokens. starts: the first two of each response
    (`response_starts`). decided: the judged tokens behind the first `shared_prefix` (int32 []) of their sequence: with
    these the sequences of all tasks begin, so that no gate can tell one task by them, and accuracy leaves them out.
    """

    predicted: jax.Array
    judged: jax.Array
    responses: jax.Array
    starts: jax.Array
    decided: jax.Array
    shared_prefix: jax.Array

    @classmethod
    def of(cls, batch: Batch, shared_prefix: int) -> Counts:
        """Of a step's whole batch."""
        judged = batch.tasks != NO_TASK
        decided = count(judged & (batch.positions >= shared_prefix))
        whole = count(batch.loss), count(judged), count(judged & batch.loss), count(response_starts(batch))
        return cls(*whole, decided, jnp.int32(shared_prefix))

    def decidable(self, batch: Batch) -> jax.Array:
        """float32 [B, T]: 1 for the judged tokens that count in accuracy."""
        return ((batch.tasks != NO_TASK) & (batch.positions >= self.shared_prefix)).astype(jnp.float32)


# Of some projections' gates: their loss [P], hits [P, A], entropy [P] and load [P, A]; see `Losses`. A counts the null
# choice, which is the last.
Figures = tuple[jax.Array, jax.Array, jax.Array, jax.Array]


def gate_loss(objective: Objective) -> Loss:
    """The loss that such settings describe."""
    return GateLoss(objective) if objective.lm_loss else TokenRouterLoss(objective)


@dataclasses.dataclass(frozen=True)
class GateLoss:
    """Both terms: the layers run, and gates are trained through their outputs too.

    The LM term is averaged over the predicted tokens, the gate term over every layer, projection and token that has a
    task; each layer reduces its own gate logits, so no [L, B, T, P, A] is ever kept.
    """

    objective: Objective

    def over(self, model: Llama, batch: Batch, shared_prefix: int) -> PartLoss:
        """See `Loss`."""
        del model
        counts = Counts.of(batch, shared_prefix)

        def losses(model: Llama, part: Batch, router: BoundRouter, remat: Remat) -> Losses:
            figures = _figures(self.objective, part, counts)

            def observe(routings: tuple[Routing, ...]) -> Figures:
                return figures([r.spread(len(ps)) for r, ps in zip(routings, GROUPS.values(), strict=True)])

            out = model(part.tokens, part.positions, router, segments=part.segments, observe=observe, remat=remat)
            lm = next_token_loss(model, out.hidden, part) / counts.predicted
            size = batch_size(part)
            gate, hits, entropy, load = out.observed
            gate = jnp.mean(gate)
            judged = _by_task(counts.decidable(part)[..., None], part, hits.shape[-1])[0] / counts.decided
            loss = lm + self.objective.beta * gate
            return Losses(
                *size, loss=loss, lm=lm, gate=gate, gate_accuracy=jnp.sum(hits, -1), hits=hits, judged=judged,
                entropy=entropy, load=load,
            )  # fmt: skip

        return losses


@dataclasses.dataclass(frozen=True)
class TokenRouterLoss:
    """The gate term of a token router alone: no layer of the model runs.

    The loss is the mean of both hops'; each figure stands for all layers and projections, and is the last hop's.
    """

    objective: Objective

    def over(self, model: Llama, batch: Batch, shared_prefix: int) -> PartLoss:
        """See `Loss`."""
        del model
        objective, counts = self.objective, Counts.of(batch, shared_prefix)

        def losses(model: RoutedLlama, part: Batch, router: BoundRouter, remat: Remat) -> Losses:
            del remat
            figures = _figures(objective, part, counts)
            hops = model.hops(part.tokens, part.positions, part.segments)
            totals, seen = [], ()
            for hop in hops:
                seen = figures([choose(router, hop.logits, hop.logits)])
                totals.append(jnp.mean(seen[0]))
                if objective.segment_weight:
                    apart = jnp.where(part.tasks != NO_TASK, _segment_losses(hop, part), 0.0)
                    totals[-1] += objective.segment_weight * jnp.sum(apart) / counts.judged
            everywhere = model.config.num_layers, len(PROJECTIONS)
            gate, hits, entropy, load = (jnp.broadcast_to(z[None], (*everywhere, *z.shape[1:])) for z in seen)
            gate = jnp.mean(gate)
            judged = _by_task(counts.decidable(part)[..., None], part, hits.shape[-1])[0] / counts.decided
            none, total = jnp.zeros((), jnp.float32), functools.reduce(operator.add, totals) / len(totals)
            loss = objective.beta * total
            return Losses(
                *batch_size(part), loss=loss, lm=none, gate=gate, gate_accuracy=jnp.sum(hits, -1), hits=hits,
                judged=judged, entropy=entropy, load=load,
            )  # fmt: skip

        return losses


def _segment_losses(hop: Hop, batch: Batch) -> jax.Array:
    """CE(previous segment's task) + CE(own segment's index), float32 [B, T]."""
    entropy = optax.softmax_cross_entropy_with_integer_labels
    losses = entropy(hop.previous, previous_task(batch.tasks, batch.segments, hop.previous.shape[-1] - 1))
    return losses + entropy(hop.segment, segment_index(batch.tasks, batch.segments, SEGMENTS))


def previous_task(tasks: jax.Array, sequences: jax.Array, none: int) -> jax.Array:
    """The task of the segment before each token's own, int32 [B, T]; a segment is a run of one task's tokens.

    `none` for the first question and the first answer of a block, which are known by their task: a block begins
    with a sequence, or behind tokens of no task. The question and the answer of a composite problem's part have the
    same previous task, so that attention can look up one from the other.
    """
    last, apart, first = _runs(tasks, sequences)
    before = _latest(jnp.where(apart, NO_TASK, last), (tasks != last) | apart)
    return jnp.where((tasks == first) | (before == NO_TASK), none, before)


def segment_index(tasks: jax.Array, sequences: jax.Array, count: int) -> jax.Array:
    """The index of each token's segment in its block, int32 [B, T], from 0 and at most count - 1: segments since the
    latest of the task that the block began with, so that an answer has its question's."""
    last, apart, first = _runs(tasks, sequences)
    begins = (tasks != NO_TASK) & ((tasks != last) | apart)
    number = jnp.cumsum(begins, axis=1)
    return jnp.minimum(number - _latest(number, begins & (tasks == first)), count - 1)


def _runs(tasks: jax.Array, sequences: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of each token [B, T]: the task of the one before, whether a sequence begins, the task its block began with."""
    last, apart = _shifted(tasks, NO_TASK), sequences != _shifted(sequences, NO_TASK)
    return last, apart, _latest(tasks, (tasks != NO_TASK) & ((last == NO_TASK) | apart))


def _latest(x: jax.Array, at: jax.Array) -> jax.Array:
    """x [B, T] where `at` was last true; a row's first where it never was."""
    place = jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32)[None], x.shape)
    return jnp.take_along_axis(x, jax.lax.cummax(jnp.where(at, place, 0), axis=1), axis=1)


def _by_task(x: jax.Array, batch: Batch, adapters: int) -> jax.Array:
    """Sums of x float32 [B, T, P] over each task's tokens: [P, A]."""
    own = jax.nn.one_hot(batch.tasks, adapters, dtype=jnp.float32)  # NO_TASK gives zeros
    return jnp.einsum("btp,bta->pa", x, own, precision="highest")


def _shifted(x: jax.Array, first: int | bool) -> jax.Array:
    """x [B, T] one place later, `first` in front."""
    return jnp.pad(x[:, :-1], ((0, 0), (1, 0)), constant_values=first)


def response_starts(batch: Batch) -> jax.Array:
    """The first two tokens of each run of one task's tokens that carry loss, bool [B, T]: what chooses the adapter of a
    response before there is any of it."""
    own = batch.loss & (batch.tasks != NO_TASK)
    same = (_shifted(batch.tasks, 0) == batch.tasks) & (_shifted(batch.segments, 0) == batch.segments)
    goes_on = _shifted(own, False) & same
    first = own & ~goes_on
    return first | (_shifted(first, False) & own & goes_on)


def _figures(objective: Objective, batch: Batch, counts: Counts) -> Callable[[Sequence[Routing]], Figures]:
    """What reduces some projections' routings over a batch's tokens to their `Figures`."""
    judged, decidable = (batch.tasks != NO_TASK)[:, :, None], counts.decidable(batch)[:, :, None]
    weight = 1.0 / counts.judged
    if objective.response_weight is not None:
        prompts = (1.0 - objective.response_weight) / jnp.maximum(counts.judged - counts.responses, 1.0)
        responses = objective.response_weight * (1.0 - objective.start_weight) / counts.responses
        starts = objective.response_weight * objective.start_weight / counts.starts
        responses = responses + jnp.where(response_starts(batch), starts, 0.0)
        weight = jnp.where(batch.loss, responses, prompts)[:, :, None]
    labels = jnp.maximum(batch.tasks, 0)[:, :, None]

    def mean(x: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(judged, x, 0.0), axis=(0, 1)) / counts.judged

    def figures(routings: Sequence[Routing]) -> Figures:
        logits = jnp.concatenate([r.logits for r in routings], axis=2)  # [B, T, P, A]
        wanted = jnp.broadcast_to(labels, logits.shape[:-1])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, wanted)
        seen = jax.lax.stop_gradient(logits)
        hits = (jnp.argmax(seen, axis=-1) == wanted).astype(jnp.float32)
        logp = jax.nn.log_softmax(seen, axis=-1)
        entropy = -jnp.sum(jnp.exp(logp) * logp, axis=-1)
        load = jnp.concatenate([_load(r, logits.shape[-1]) for r in routings], axis=2)
        load = jnp.sum(jnp.where(judged[..., None], load, 0.0), axis=(0, 1)) / counts.judged
        loss = jnp.sum(jnp.where(judged, losses * weight, 0.0), axis=(0, 1))
        return loss, _by_task(hits * decidable, batch, logits.shape[-1]) / counts.decided, mean(entropy), load

    return figures


def _load(routing: Routing, columns: int) -> jax.Array:
    """[B, T, P, columns]: what each column of the gates got; of a null choice, NO_ADAPTER with a weight, the last."""
    indices = jnp.where(routing.indices == NO_ADAPTER, columns - 1, routing.indices)
    return jax.lax.stop_gradient(dense_weights(indices, routing.weights, columns))
