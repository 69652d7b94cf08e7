"""One update of what is trained; the rest of the model stays as it is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from meteora_jax.bank import AdapterParam
from meteora_jax.execution import Jit
from meteora_jax.routing import BoundRouter
from meteora_jax.routing.gates import GateParam
from meteora_jax.sharding import constrain, place_whole, replicated
from meteora_jax.training.data import Batch
from meteora_jax.training.loss import Counts, Losses, Remat, gate_training_loss
from meteora_jax.training.side_by_side import ByTask, OwnCounts, clip_each, side_by_side_loss

COLUMNS = ("gate", "task", "previous")  # parameters of gates and token router with a column an adapter

Step = Callable[[Any, Any, Batch, BoundRouter], tuple[Any, Losses]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What training changes: the trained parameters (float32), the optimiser's moments, and, where a run keeps them,
    the best so far (`bank.Best`), which a step passes on, and the parameters' `Average`."""

    params: Any
    optimizer: Any
    best: Any = None
    average: Any = None


def schedule(steps: int, learning_rate: float, warmup: float) -> optax.Schedule:
    """Linear warm-up over the share `warmup` of the steps, then a cosine to zero."""
    return optax.warmup_cosine_decay_schedule(0.0, learning_rate, min(round(steps * warmup), steps - 1), steps)


def optimizer(
    steps: int, learning_rate: float, warmup: float, clip: float, adapter_learning_rate: float | None = None,
    each: bool = False,
) -> optax.GradientTransformation:  # fmt: skip
    """AdamW with the gradient's global norm clipped: the original's recipe.

    adapter_learning_rate: the adapters' peak where they are trained beside gates; otherwise the same.
    each: the norm is each adapter's own.
    """
    adamw = optax.adamw(schedule(steps, learning_rate, warmup), weight_decay=0.0)
    if each:
        return optax.chain(clip_each(clip), adamw)
    if adapter_learning_rate is None:
        return optax.chain(optax.clip_by_global_norm(clip), adamw)
    slower = optax.masked(optax.scale(adapter_learning_rate / learning_rate), _adapters)
    return optax.chain(optax.clip_by_global_norm(clip), adamw, slower)


def _adapters(params: Any) -> Any:
    """Which of the parameters are adapters', in the parameters' structure."""
    flat = nnx.to_flat_state(params)
    return nnx.from_flat_state([(path, leaf.replace(isinstance(leaf, AdapterParam))) for path, leaf in flat])


def initial_state(params: Any, tx: optax.GradientTransformation, mesh: Mesh | None) -> TrainState:
    """Parameters in float32 with fresh moments; on a mesh each moment lies where its parameter does."""
    params = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    moments = tx.init(params)
    if mesh is not None:
        split = lambda x: isinstance(x.sharding, NamedSharding) and x.ndim > 0  # noqa: E731
        moments = jax.tree.map(lambda x: x if split(x) else place_whole(x, mesh), moments)
    return TrainState(params, moments)


def make_step(
    graph: Any,
    state: TrainState,
    tx: optax.GradientTransformation,
    *,
    beta: float,
    dtype: Any,
    remat: Remat,
    accumulate: int = 1,
    columns: np.ndarray | None = None,
    mesh: Mesh | None = None,
    lm_loss: bool = True,
    answer_share: float | None = None,
    turn_share: float = 0.0,
    order: float = 0.0,
    shared: int = 0,
    average: float = 0.0,
) -> Step:
    """The compiled update (frozen, state, batch, router) -> (state, the losses before it); the state is donated.

    Args:
        graph: of the whole model. state: the one it will be called with first; it stays where it lies.
        dtype: of base, adapters and activations; trained adapters are cast to it, gates stay float32.
        accumulate: the batch is worked off in so many parts, whose gradients add up to the whole batch's; the router
            is bound for the rows of one part.
        columns: bool [A], the gate columns that are trained (all unless given); the others keep every bit.
        lm_loss, answer_share, turn_share, order: as `gate_training_loss` takes them.
        shared: tokens that all tasks' sequences begin with, which the gates' accuracy leaves out.
        average: the decay of the state's `Average`, where it has one.
    """

    def step(frozen: Any, state: TrainState, batch: Batch, router: BoundRouter) -> tuple[TrainState, Losses]:
        losses, grads = gradients(
            graph, frozen, state.params, batch, router, beta, dtype=dtype, remat=remat, accumulate=accumulate,
            lm_loss=lm_loss, answer_share=answer_share, turn_share=turn_share, order=order, shared=shared,
        )  # fmt: skip
        if columns is not None:
            grads = _only(grads, columns)  # before the optimiser: the clipped norm is that of what is trained
        with jax.numpy_dtype_promotion("standard"):  # optax relies on it, whatever the rest of the program says
            updates, moments = tx.update(grads, state.optimizer, state.params)
            params = optax.apply_updates(state.params, updates)
        mean = None if state.average is None else state.average.after(params, average)
        return TrainState(params, moments, state.best, mean), losses

    if mesh is None:
        return Jit(step, donate_argnums=1)
    # outputs lie where the inputs did: else the second call would find another layout and compile again
    kept = jax.tree.map(lambda x: x.sharding, state)
    return Jit(step, donate_argnums=1, out_shardings=(kept, replicated(mesh)))


def gradients(
    graph: Any,
    frozen: Any,
    params: Any,
    batch: Batch,
    router: BoundRouter,
    beta: float,
    *,
    dtype: Any,
    remat: Remat,
    accumulate: int = 1,
    lm_loss: bool = True,
    answer_share: float | None = None,
    turn_share: float = 0.0,
    order: float = 0.0,
    shared: int = 0,
) -> tuple[Losses, Any]:
    """The losses of a batch and the gradients of `params`; with the router `ByTask` those of adapters side by side."""
    if isinstance(router, ByTask):
        counts = OwnCounts.of(batch, nnx.merge(graph, params, frozen).adapters)
    else:
        counts = Counts.of(batch, shared)

    def loss(params: Any, part: Batch) -> tuple[jax.Array, Losses]:
        model = nnx.merge(graph, computed(params, dtype), frozen)
        if isinstance(counts, OwnCounts):
            losses = side_by_side_loss(model, part, counts, remat=remat)
        else:
            losses = gate_training_loss(
                model, part, router, beta, remat=remat, counts=counts, lm_loss=lm_loss, answer_share=answer_share,
                turn_share=turn_share, order=order,
            )  # fmt: skip
        return losses.loss, losses

    differentiate = jax.grad(loss, has_aux=True)
    if accumulate == 1:
        grads, losses = differentiate(params, batch)
        return losses, grads

    def cut(x: jax.Array) -> jax.Array:
        # neighbours go to different parts, so that each device keeps its own rows
        parts = jnp.swapaxes(x.reshape(x.shape[0] // accumulate, accumulate, x.shape[1]), 0, 1)
        return constrain(parts, None, "batch", None)

    def add(total: Any, part: Batch) -> tuple[Any, None]:
        grads, losses = differentiate(params, part)
        return jax.tree.map(jnp.add, total, (losses, grads)), None

    parts = jax.tree.map(cut, batch)
    shapes = jax.eval_shape(lambda p: differentiate(params, p)[::-1], jax.tree.map(lambda x: x[0], parts))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return jax.lax.scan(add, zeros, parts)[0]


def _only(grads: Any, columns: np.ndarray) -> Any:
    """Gate gradients [.., A] with zeros outside `columns`; AdamW without decay leaves such entries alone."""

    def keep(path: Any, leaf: Any) -> Any:
        if not isinstance(leaf, GateParam):
            return leaf
        if path[-1] not in COLUMNS:  # the old columns read them too
            return leaf.replace(jnp.zeros_like(leaf[...]))
        return leaf.replace(jnp.where(columns, leaf[...], 0))

    return nnx.from_flat_state([(path, keep(path, leaf)) for path, leaf in nnx.to_flat_state(grads)])


def computed(params: Any, dtype: Any) -> Any:
    """The parameters as the model computes with them: adapters in its dtype, gates in float32."""
    flat = nnx.to_flat_state(params)
    cast = lambda leaf: leaf.replace(leaf[...].astype(dtype)) if isinstance(leaf, AdapterParam) else leaf  # noqa: E731
    return nnx.from_flat_state([(path, cast(leaf)) for path, leaf in flat])
