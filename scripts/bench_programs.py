"""The programs that `bench.py` times: prompts, decoding steps and training steps under a named `ExecutionConfig`."""

from __future__ import annotations

import collections
import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
from bench_timing import Timed
from flax import nnx

from meteora_jax.engine.step import EngineState, PromptTokens, StepRows, new_state, run_steps
from meteora_jax.execution import ExecutionConfig, Jit, jit
from meteora_jax.model import layout
from meteora_jax.routing.gates import GateParam
from meteora_jax.training.data import Batch
from meteora_jax.training.gate_loss import GateLoss
from meteora_jax.training.settings import Objective
from meteora_jax.training.step import initial_state, make_step, optimizer
from pallas_kernels.paged_attention import QUERY_BLOCK

BLOCK_SIZE = 16  # of the cache
NO_END = jnp.asarray((-1,), jnp.int32)
DOTS = "dots"  # of training: today's, products kept for the backward pass


def executions(what: str, dtype: Any) -> dict[str, ExecutionConfig]:
    """How a program may run here, by name.

    today: the default of `mj.load` and of training. xla: without Triton, as where the extra `gpu` is not installed.
    plain: nothing that only a GPU has, neither cuDNN's attention nor one product for the updates of a group.
    """
    today = ExecutionConfig.here(dtype)
    found = {"today": today, "xla": ExecutionConfig.here(dtype, triton=False), "plain": ExecutionConfig()}
    return found | {DOTS: today} if what == "train" else found


class LazyArrays:
    """Arrays that are computed when they are first read: programs are compiled from `shapes`, without them."""

    def __init__(self, graph: Any, shapes: Any, compute: Callable[[], Any]):
        self.graph, self.shapes, self._compute, self._arrays = graph, shapes, compute, None

    def __call__(self) -> Any:
        self._arrays = self._compute() if self._arrays is None else self._arrays
        return self._arrays

    def free(self) -> None:
        """Forgets them until they are read again."""
        self._arrays = None

    def copy(self) -> Any:
        """For a call that donates them."""
        return jax.tree.map(jnp.copy, self())


def run_as(model: LazyArrays, execution: ExecutionConfig) -> LazyArrays:
    """The same arrays, run otherwise."""
    return LazyArrays(layout.with_execution(model.graph, model.shapes, execution), model.shapes, model)


def prepared(model: LazyArrays, execution: ExecutionConfig) -> LazyArrays:
    """The model as a GPU has it in 16 bit, after `pack`."""
    graphs = []
    graph = layout.with_execution(model.graph, model.shapes, execution)

    def prepare(weights: Any) -> Any:
        changed, weights = layout.pack(graph, weights)
        graphs.append(changed)
        return weights

    shapes = jax.eval_shape(prepare, model.shapes)
    return LazyArrays(graphs[0], shapes, lambda: prepare(model()))


def _step_rows(batch: int, slots: int, decodes: bool) -> StepRows:
    """`batch` rows, each with blocks of its own for so many positions."""
    width = -(-slots // BLOCK_SIZE)
    tables = jnp.arange(batch * width, dtype=jnp.int32).reshape(batch, width)
    own = jnp.arange(batch, dtype=jnp.int32)
    return StepRows(own, jnp.full((batch,), decodes), tables, jnp.full((batch,), slots, jnp.int32), None)


def _prompt(tokens: jax.Array, left: int) -> PromptTokens:
    """The whole prompts [B, T] of all rows; T is a multiple of QUERY_BLOCK."""
    batch, length = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), tokens.shape)
    own = jnp.arange(batch, dtype=jnp.int32)
    last = batch + (own + 1) * length - 1
    runs = jnp.repeat(own, length // QUERY_BLOCK)
    zeros = jnp.zeros((batch,), jnp.int32)
    return PromptTokens(tokens.reshape(-1), positions.reshape(-1), runs, last, zeros, zeros + left)


def _empty(model: LazyArrays, batch: int, slots: int) -> LazyArrays:
    """A state without tokens."""
    call = functools.partial(
        new_state, model.graph, blocks=batch * -(-slots // BLOCK_SIZE), block_size=BLOCK_SIZE, rows=batch
    )
    return LazyArrays(None, jax.eval_shape(call, model.shapes), lambda: call(model()))


def _reading(model: LazyArrays, router: Any, tokens: jax.Array, steps: int) -> tuple[LazyArrays, Callable[..., Any]]:
    """An empty state, and the compiled step that reads the prompts into it."""
    slots = tokens.shape[1] + 2 * steps
    empty = _empty(model, tokens.shape[0], slots)
    rest = _step_rows(tokens.shape[0], slots, False), _prompt(tokens, 2 * steps), router, NO_END
    call = run_steps.lower(
        model.graph, model.shapes, empty.shapes, *rest, steps=1, logprobs=None, trace=False
    ).compile()
    return empty, lambda weights, state: call(weights, state, *rest)


def started(model: LazyArrays, router: Any, tokens: jax.Array, steps: int = 32) -> LazyArrays:
    """The engine's state after a prompt, with room for twice `steps`."""
    empty, read = _reading(model, router, tokens, steps)
    return LazyArrays(None, empty.shapes, lambda: read(model(), empty.copy())[0])


def written_keys(state: EngineState, batch: int, slots: int, position: int) -> jax.Array:
    """Keys [L, B, K, H] of every row at a position."""
    cache = state.cache.model if hasattr(state.cache, "model") else state.cache
    width = -(-slots // BLOCK_SIZE)
    pages = cache.pages.reshape(-1, batch, width * BLOCK_SIZE, *cache.pages.shape[2:])
    return pages[:, :, position, 0::2]


def generating(model: LazyArrays, router: Any, tokens: jax.Array, start: LazyArrays | None, steps: int = 32) -> Timed:
    """The prompts, or `steps` decoding steps from `start` on, compiled."""
    batch, length = tokens.shape
    slots = length + 2 * steps
    keys = functools.partial(written_keys, batch=batch, slots=slots)
    if start is None:
        empty, read = _reading(model, router, tokens, steps)
        return Timed(lambda s: read(model(), s)[0], empty.copy, compared=functools.partial(keys, position=length - 1))
    rest = _step_rows(batch, slots, True), None, router, NO_END
    how: dict[str, Any] = dict(steps=steps, logprobs=None, trace=False)
    call = run_steps.lower(model.graph, model.shapes, start.shapes, *rest, **how).compile()
    # the first step's token is the same under every setting
    compared = functools.partial(keys, position=length)
    return Timed(lambda s: call(model(), s, *rest)[0], start.copy, calls=steps, compared=compared)


def training(model: LazyArrays, router: Any, tokens: jax.Array, adapters: int, remat: Any) -> dict[str, Timed]:
    """One step of gate training; bare: loss and gradient of the embedding, through the same layers."""

    def cut(weights: Any, what: Any) -> Any:
        return nnx.split(nnx.merge(model.graph, weights), what, ...)

    split, gates, frozen = cut(model.shapes, GateParam)
    tx = optimizer(1000, 1e-4, 0.1, 1.0)
    everywhere = jnp.ones(tokens.shape, bool)
    columns = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    batch = Batch(
        tokens=tokens, positions=columns, loss=everywhere, tasks=tokens % adapters, segments=jnp.ones_like(tokens)
    )

    def begin(gates: Any) -> Any:
        return initial_state(gates, tx, None)

    state = LazyArrays(None, jax.eval_shape(begin, gates), lambda: begin(cut(model(), GateParam)[1]))
    dtype = nnx.merge(model.graph, model.shapes).dtype
    loss = GateLoss(Objective(beta=50.0))
    step = cast("Jit", make_step(split, state.shapes, tx, loss, dtype=dtype, remat=remat))
    update = step.lower(frozen, state.shapes, batch, router).compile()
    embedding = nnx.PathContains("embed")
    bare_graph, embed, rest = cut(model.shapes, embedding)

    @jit()
    def bare(embed: Any, rest: Any) -> Any:
        def loss(embed: Any) -> jax.Array:
            whole = nnx.merge(bare_graph, embed, rest)
            hidden = whole(tokens, columns, None, segments=batch.segments, remat=remat).hidden
            logits = whole.logits(hidden[:, :-1], None)
            own = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], axis=-1)
            return -jnp.mean(own)

        return jax.value_and_grad(loss)(embed)

    alone = bare.lower(embed, rest).compile()
    return {
        "adapted": Timed(lambda s: update(cut(model(), GateParam)[2], s, batch, router), state.copy),
        "bare": Timed(lambda _: alone(*cut(model(), embedding)[1:])),
    }


def kernels_of(call: Callable[[], Any]) -> list[tuple[str, int, float]]:
    """(name, launches, microseconds) of each kernel of one call, the longest first; on a CPU, of each operation."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(call())
        (file,) = Path(folder).rglob("*.xplane.pb")
        planes = list(jax.profiler.ProfileData.from_file(str(file)).planes)
        gpu = [plane for plane in planes if plane.name.startswith("/device:GPU")]
        events = [
            (event.name, event.duration_ns)
            for plane in gpu or planes
            for line in plane.lines
            if not gpu or line.name.startswith("Stream")  # other lines say the same again, by module and operation
            for event in line.events
            if gpu or any(name == "hlo_op" for name, _ in event.stats)
        ]
    return summed(events)


def summed(events: list[tuple[str, float]]) -> list[tuple[str, int, float]]:
    """Events by name, with count and total microseconds of nanoseconds."""
    counts: collections.Counter[str] = collections.Counter()
    total: collections.Counter[str] = collections.Counter()
    for name, duration in events:
        counts[name] += 1
        total[name] += duration
    return [(name, counts[name], total[name] / 1e3) for name, _ in total.most_common()]
