"""What `bench.py --settings` times side by side: each switch of the GPU path under a name, and where time goes.

A setting is applied while a program is traced and compiled; what is timed is the compiled program, so that any number
of settings alternate in one process.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from meteora_jax import compiler, llama
from meteora_jax.adapters import GateParam
from meteora_jax.compiler import Jit, Step, jit
from meteora_jax.generation import Sampling, decode, prefill
from meteora_jax.training.data import Batch
from meteora_jax.training.step import initial_state, make_step, optimizer
from pallas_kernels.routed_lora import gated, reference

GRAPHS = {  # CUDA graphs of whole loops, too
    "xla_gpu_enable_command_buffer": "FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,DYNAMIC_SLICE_FUSION,WHILE",
    "xla_gpu_graph_min_graph_size": 2,
}


@dataclasses.dataclass(frozen=True)
class Setting:
    """One state of the switches; `switch` says how to make it the default."""

    switch: str
    step: Step | None = None
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    fused: tuple[Any, ...] = ("prompt",)
    rounded: bool = False
    prompts: Any = "reference"


def _step(*given: Any, **more: Any) -> dict[str, Any]:
    step = Step(64, *given, **more)
    return dict(switch=f"compiler.STEPS = ({step},)", step=step)


SETTINGS: dict[str, dict[str, Setting]] = {
    "decode": {
        "today": Setting("nothing"),
        "two": Setting(**_step("two")),
        "one": Setting(**_step("one")),
        "one_head": Setting(**_step("one", head=True)),
        "one_loop": Setting(**_step("one", unroll=1)),
        "one_captured": Setting(**_step("one", captured=True)),
        "one_graphs": Setting(**(_step("one", captured=True) | {"options": GRAPHS})),
        "two_captured": Setting(**_step("two", captured=True)),
        "cudnn": Setting('llama.FUSED_ATTENTION = ("prompt", "decode")', fused=("prompt", "decode")),
        "graphs": Setting(f"compiler.GPU_OPTIONS |= {GRAPHS}", options=GRAPHS),
    },
    "prefill": {
        "today": Setting("nothing"),
        "rounded": Setting("reference.ROUNDED_UPDATES = True", rounded=True),
        "diagonal": Setting('gated.PROMPTS = "diagonal"', prompts="diagonal"),
        "masked_diagonal": Setting('gated.PROMPTS = "masked_diagonal"', prompts="masked_diagonal"),
        "tiles": Setting('gated.PROMPTS = "tiles"', prompts="tiles"),
    },
    "train": {
        "today": Setting("nothing"),
        "packed": Setting('llama.FUSED_ATTENTION = ("prompt", "packed")', fused=("prompt", "packed")),
    },
}
# Switches that the bare model does not have.
ADAPTED_ONLY = {"rounded", "diagonal", "masked_diagonal", "tiles"}
# What a device without a GPU can be given: the rest is refused there, by name.
ANYWHERE = {"today", "rounded", "diagonal", "cudnn", "graphs", "packed"}


NO_END = jnp.asarray((-1,), jnp.int32)


@contextlib.contextmanager
def applied(setting: Setting) -> Iterator[None]:
    """The switches of `setting`, for what is traced and compiled inside."""
    before = (compiler.STEPS, compiler.GPU_OPTIONS, llama.FUSED_ATTENTION, reference.ROUNDED_UPDATES, gated.PROMPTS)

    def put(steps: Any, options: Any, fused: Any, rounded: bool, prompts: Any) -> None:
        compiler.STEPS, compiler.GPU_OPTIONS, llama.FUSED_ATTENTION = steps, options, fused
        reference.ROUNDED_UPDATES, gated.PROMPTS = rounded, prompts
        jax.clear_caches()  # what was traced under other switches

    put(
        () if setting.step is None else (setting.step,), compiler.GPU_OPTIONS | setting.options, setting.fused,
        setting.rounded, setting.prompts,
    )  # fmt: skip
    try:
        yield
    finally:
        put(*before)


def compiled(
    jitted: Jit, setting: Setting, *args: Any, static: tuple[str, ...], donate: tuple[str, ...] = (), **kwargs
):
    """The program of a `Jit` under a setting, compiled; it is called without the static arguments."""
    function = jitted.__wrapped__

    @functools.wraps(function)
    def own(*args: Any, **kwargs: Any) -> Any:  # its own, so that no other setting's trace is found for it
        return function(*args, **kwargs)

    with applied(setting):
        return Jit(own, static_argnames=static, donate_argnames=donate).lower(*args, **kwargs).compile()


@dataclasses.dataclass(frozen=True)
class Timed:
    """A function to time: `prepare` (not timed) makes what a call consumes; `inner` calls go into one measurement."""

    call: Callable[[Any], Any]
    prepare: Callable[[], Any] = lambda: None
    calls: int = 1  # what one call counts for: layers or decoding steps
    shown: Callable[[Any], Any] | None = None  # of a result: what every setting must agree on, up to rounding


def generating(
    what: str, graph: Any, weights: Any, router: Any, tokens: jax.Array, setting: Setting, steps: int = 32
) -> Timed:
    """A prefill, or `steps` decoding steps behind one, compiled under a setting."""
    lengths = jnp.full(tokens.shape[:1], tokens.shape[1], jnp.int32)
    how = Sampling().traced
    start = (weights, tokens, lengths, router, how, NO_END)
    if what == "prefill":
        call = compiled(prefill, setting, graph, *start, room=2 * steps, static=("graph", "room"))
        return Timed(lambda _: call(*start)[0], shown=lambda state: state.cache.keys[:, :, tokens.shape[1] - 1])
    state = prefill(graph, *start, room=2 * steps)[0]
    copy = lambda: jax.tree.map(jnp.copy, state)  # noqa: E731 - a call donates its state
    rest = (router, how, NO_END, jnp.int32(steps + 1))
    call = compiled(decode, setting, graph, weights, state, *rest, static=("graph",), donate=("state",))
    keys = lambda state: state.cache.keys[:, :, tokens.shape[1]]  # noqa: E731 - of the first step, which all are given
    return Timed(lambda s: call(weights, s, *rest), copy, calls=steps, shown=keys)


def training(
    graph: Any, weights: Any, router: Any, tokens: jax.Array, adapters: int, setting: Setting
) -> dict[str, Timed]:
    """One step of gate training under a setting; bare: loss and gradient of the embedding, through the same layers."""
    model = nnx.merge(graph, weights)
    split, gates, frozen = nnx.split(model, GateParam, ...)
    tx = optimizer(1000, 1e-4, 0.1, 1.0)
    everywhere = jnp.ones(tokens.shape, bool)
    columns = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    batch = Batch(
        tokens=tokens, positions=columns, loss=everywhere, tasks=tokens % adapters, segments=jnp.ones_like(tokens)
    )
    state = initial_state(gates, tx, None)
    copy = lambda: jax.tree.map(jnp.copy, state)  # noqa: E731 - a step donates its state
    with applied(setting):
        update = make_step(split, state, tx, beta=50.0, dtype=model.embed.dtype, remat=True)
        update = update.lower(frozen, state, batch, router).compile()
    step = lambda s: update(frozen, s, batch, router)  # noqa: E731
    bare_graph, embed, rest = nnx.split(model, nnx.PathContains("embed"), ...)

    @jit()
    def bare(embed: Any, rest: Any) -> Any:
        def loss(embed: Any) -> jax.Array:
            model = nnx.merge(bare_graph, embed, rest)
            hidden = model(tokens, columns, None, segments=batch.segments, remat=True).hidden
            logits = model.logits(hidden[:, :-1], None)
            own = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], axis=-1)
            return -jnp.mean(own)

        return jax.value_and_grad(loss)(embed)

    with applied(setting):
        alone = bare.lower(embed, rest).compile()
    return {"bare": Timed(lambda _: alone(embed, rest)), "adapted": Timed(step, copy)}


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
