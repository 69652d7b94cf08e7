"""The programs that `bench.py` times: prompts, decoding steps and training steps under a named `ExecutionConfig`."""

from __future__ import annotations

import collections
import dataclasses
import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from meteora_jax.execution import ExecutionConfig, jit
from meteora_jax.generation import Decoding, Sampling, decode, prefill
from meteora_jax.model import llama
from meteora_jax.model.lora_linear import GateParam
from meteora_jax.model.routed_llama import RoutedCache
from meteora_jax.training.data import Batch
from meteora_jax.training.gate_loss import GateLoss
from meteora_jax.training.settings import Objective
from meteora_jax.training.step import initial_state, make_step, optimizer

NO_END = jnp.asarray((-1,), jnp.int32)
DOTS = "dots"  # of training: today's, products kept for the backward pass


def executions(what: str, dtype: Any) -> dict[str, ExecutionConfig]:
    """Ways to run a program here, by name.

    today: what `mj.load` and training take. xla: without the extra `gpu`, so no decoding steps by Triton. plain:
    nothing that is a GPU's alone, neither cuDNN's attention nor updates added by one product a group.
    """
    today = ExecutionConfig.here(dtype)
    found = {"today": today, "xla": ExecutionConfig.here(dtype, triton=False), "plain": ExecutionConfig()}
    return found | {DOTS: today} if what == "train" else found


@dataclasses.dataclass(frozen=True)
class Timed:
    """A function to time: `prepare` (not timed) makes what a call consumes; `inner` calls go into one measurement."""

    call: Callable[[Any], Any]
    prepare: Callable[[], Any] = lambda: None
    calls: int = 1  # what one call counts for: layers or decoding steps
    shown: Callable[[Any], Any] | None = None  # of a result: what every setting must agree on, up to rounding


class Held:
    """Arrays that are made when they are first read: programs are compiled from `shapes`, without them."""

    def __init__(self, graph: Any, shapes: Any, make: Callable[[], Any]):
        self.graph, self.shapes, self._make, self._made = graph, shapes, make, None

    def __call__(self) -> Any:
        self._made = self._make() if self._made is None else self._made
        return self._made

    def free(self) -> None:
        """Forgets them until they are read again."""
        self._made = None

    def copy(self) -> Any:
        """For a call that donates them."""
        return jax.tree.map(jnp.copy, self())


def run_as(model: Held, execution: ExecutionConfig) -> Held:
    """The same arrays, run otherwise."""
    return Held(llama.with_execution(model.graph, model.shapes, execution), model.shapes, model)


def prepared(model: Held, execution: ExecutionConfig) -> Held:
    """The model as a GPU has it in 16 bit, after `prepare_gates`."""
    graphs = []
    graph = llama.with_execution(model.graph, model.shapes, execution)

    def prepare(weights: Any) -> Any:
        made, weights = llama.prepare_gates(graph, weights)
        graphs.append(made)
        return weights

    shapes = jax.eval_shape(prepare, model.shapes)
    return Held(graphs[0], shapes, lambda: prepare(model()))


def _asked(router: Any, tokens: jax.Array) -> tuple[Any, ...]:
    """What `prefill` is given behind the weights."""
    lengths = jnp.full(tokens.shape[:1], tokens.shape[1], jnp.int32)
    return tokens, lengths, router, Sampling().traced, NO_END


def started(model: Held, router: Any, tokens: jax.Array, steps: int = 32) -> Held:
    """The state behind a prompt, with room for twice `steps`."""
    rest = _asked(router, tokens)
    call = prefill.lower(model.graph, model.shapes, *rest, new_tokens=2 * steps).compile()
    plain = functools.partial(prefill.__wrapped__, model.graph, new_tokens=2 * steps)
    shapes = jax.eval_shape(plain, model.shapes, *rest)[0]
    return Held(None, shapes, lambda: call(model(), *rest)[0])


def model_keys(state: Decoding) -> Any:
    """Keys [L, B, S, K, H] of the model's cache, whether a token router has its own beside it or not."""
    return (state.cache.model if isinstance(state.cache, RoutedCache) else state.cache).keys


def generating(model: Held, router: Any, tokens: jax.Array, start: Held | None, steps: int = 32) -> Timed:
    """A prefill, or `steps` decoding steps from `start` on, compiled."""
    if start is None:
        rest = _asked(router, tokens)
        call = prefill.lower(model.graph, model.shapes, *rest, new_tokens=2 * steps).compile()
        return Timed(lambda _: call(model(), *rest)[0], shown=lambda s: model_keys(s)[:, :, tokens.shape[1] - 1])
    rest = router, Sampling().traced, NO_END, jnp.int32(steps + 1)
    call = decode.lower(model.graph, model.shapes, start.shapes, *rest).compile()
    # keys of the first step, which all are given
    shown = lambda state: model_keys(state)[:, :, tokens.shape[1]]  # noqa: E731
    return Timed(lambda s: call(model(), s, *rest), start.copy, calls=steps, shown=shown)


def training(model: Held, router: Any, tokens: jax.Array, adapters: int, remat: Any) -> dict[str, Timed]:
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

    state = Held(None, jax.eval_shape(begin, gates), lambda: begin(cut(model(), GateParam)[1]))
    dtype = nnx.merge(model.graph, model.shapes).embed.dtype
    update: Any = make_step(split, state.shapes, tx, GateLoss(Objective(beta=50.0)), dtype=dtype, remat=remat)
    update = update.lower(frozen, state.shapes, batch, router).compile()
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
