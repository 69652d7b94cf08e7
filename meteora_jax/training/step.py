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
from jax.typing import DTypeLike

from meteora_jax.bank import AdapterParam
from meteora_jax.execution import Jit
from meteora_jax.routing import BoundRouter
from meteora_jax.routing.gates import GateParam
from meteora_jax.sharding import Params, constrain, place_whole, replicated
from meteora_jax.training.data import Batch
from meteora_jax.training.loss import Loss, Losses, Remat
from meteora_jax.training.side_by_side import EMA, clip_each

COLUMNS = ("gate", "task", "previous")  # parameters of gates and token router with a column an adapter

Step = Callable[[Params, "TrainState", Batch, BoundRouter | None], "tuple[TrainState, Losses]"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What training changes: the trained parameters (float32), the optimiser's moments, and, where a run keeps them,
    the best so far (`validation.Best`), which a step passes on, and the parameters' `EMA`."""

    params: Params
    optimizer: Params
    best: Params = None
    ema: EMA | None = None


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


def _adapters(params: Params) -> Params:
    """Which of the parameters are adapters', in the parameters' structure."""
    flat = nnx.to_flat_state(params)
    return nnx.from_flat_state([(path, leaf.replace(isinstance(leaf, AdapterParam))) for path, leaf in flat])


def initial_state(params: Params, tx: optax.GradientTransformation, mesh: Mesh | None) -> TrainState:
    """Parameters in float32 with fresh moments; on a mesh each moment lies where its parameter does."""
    params = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    moments = tx.init(params)
    if mesh is not None:

        def placed(x: jax.Array) -> jax.Array:
            return x if isinstance(x.sharding, NamedSharding) and x.ndim > 0 else place_whole(x, mesh)

        moments = jax.tree.map(placed, moments)
    return TrainState(params, moments)


def make_step(
    graph: nnx.GraphDef,
    state: TrainState,
    tx: optax.GradientTransformation,
    loss: Loss,
    *,
    dtype: DTypeLike,
    remat: Remat,
    accumulate: int = 1,
    columns: np.ndarray | None = None,
    mesh: Mesh | None = None,
    shared_prefix: int = 0,
    ema: float = 0.0,
) -> Step:
    """The compiled update (frozen, state, batch, router) -> (state, the losses before it); the state is donated.

    Args:
        graph: of the whole model. state: the one it will be called with first; it stays where it lies.
        loss: what is minimised.
        dtype: of base, adapters and activations; trained adapters are cast to it, gates stay float32.
        accumulate: the batch is worked off in so many parts, whose gradients add up to the whole batch's; the router
            is bound for the rows of one part.
        columns: bool [A], the gate columns that are trained (all unless given); the others keep every bit.
        shared_prefix: tokens that all tasks' sequences begin with, which the gates' accuracy leaves out.
        ema: the decay of the state's `EMA`, where it has one.
    """

    def step(frozen: Params, state: TrainState, batch: Batch, router: BoundRouter | None) -> tuple[TrainState, Losses]:
        losses, grads = gradients(
            graph, frozen, state.params, batch, router, loss, dtype=dtype, remat=remat, accumulate=accumulate,
            shared_prefix=shared_prefix,
        )  # fmt: skip
        if columns is not None:
            grads = _only(grads, columns)  # before the optimiser: the clipped norm is that of what is trained
        with jax.numpy_dtype_promotion("standard"):  # optax relies on it, whatever the rest of the program says
            updates, moments = tx.update(grads, state.optimizer, state.params)
            params = optax.apply_updates(state.params, updates)
        mean = None if state.ema is None else state.ema.after(params, ema)
        return TrainState(params, moments, state.best, mean), losses

    if mesh is None:
        return Jit(step, donate_argnums=1)
    # outputs lie where the inputs did: else the second call would find another layout and compile again
    kept = jax.tree.map(lambda x: x.sharding, state)
    return Jit(step, donate_argnums=1, out_shardings=(kept, replicated(mesh)))


def gradients(
    graph: nnx.GraphDef,
    frozen: Params,
    params: Params,
    batch: Batch,
    router: BoundRouter | None,
    loss: Loss,
    *,
    dtype: DTypeLike,
    remat: Remat,
    accumulate: int = 1,
    shared_prefix: int = 0,
) -> tuple[Losses, Params]:
    """The losses of a batch and the gradients of `params`; arguments as `make_step` and its step take them."""
    part_loss = loss.over(nnx.merge(graph, params, frozen), batch, shared_prefix)

    def lost(params: Params, part: Batch) -> tuple[jax.Array, Losses]:
        losses = part_loss(nnx.merge(graph, computed(params, dtype), frozen), part, router, remat)
        return losses.loss, losses

    differentiate = jax.grad(lost, has_aux=True)
    if accumulate == 1:
        grads, losses = differentiate(params, batch)
        return losses, grads

    def cut(x: jax.Array) -> jax.Array:
        # neighbours go to different parts, so that each device keeps its own rows
        parts = jnp.swapaxes(x.reshape(x.shape[0] // accumulate, accumulate, x.shape[1]), 0, 1)
        return constrain(parts, None, "batch", None)

    def add(total: tuple[Losses, Params], part: Batch) -> tuple[tuple[Losses, Params], None]:
        grads, losses = differentiate(params, part)
        return jax.tree.map(jnp.add, total, (losses, grads)), None

    parts = jax.tree.map(cut, batch)
    shapes = jax.eval_shape(lambda p: differentiate(params, p)[::-1], jax.tree.map(lambda x: x[0], parts))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return jax.lax.scan(add, zeros, parts)[0]


def _only(grads: Params, columns: np.ndarray) -> Params:
    """The gradients, those of gates' columns [.., A] with zeros outside `columns`; AdamW without decay leaves such
    entries alone. What of a token router all columns read is trained: it has not learnt to see the new tasks."""

    def keep(path: tuple[Any, ...], leaf: nnx.Variable) -> nnx.Variable:
        if not isinstance(leaf, GateParam) or path[-1] not in COLUMNS:
            return leaf
        return leaf.replace(jnp.where(columns, leaf[...], 0))

    return nnx.from_flat_state([(path, keep(path, leaf)) for path, leaf in nnx.to_flat_state(grads)])


def computed(params: Params, dtype: DTypeLike) -> Params:
    """The parameters as the model computes with them: adapters in its dtype, gates in float32."""

    def cast(leaf: nnx.Variable) -> nnx.Variable:
        return leaf.replace(leaf[...].astype(dtype)) if isinstance(leaf, AdapterParam) else leaf

    return nnx.from_flat_state([(path, cast(leaf)) for path, leaf in nnx.to_flat_state(params)])
