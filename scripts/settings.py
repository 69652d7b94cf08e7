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
from meteora_jax.generation import Decoding, Sampling, decode, prefill
from meteora_jax.routed_llama import RoutedCache
from meteora_jax.training.data import Batch
from meteora_jax.training.step import initial_state, make_step, optimizer
from pallas_kernels.decode_step import triton_gpu
from pallas_kernels.routed_lora import gated, reference

GRAPHS = {  # CUDA graphs of whole loops, too
    "xla_gpu_enable_command_buffer": "FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,DYNAMIC_SLICE_FUSION,WHILE",
    "xla_gpu_graph_min_graph_size": 2,
}


@dataclasses.dataclass(frozen=True)
class Setting:
    """One state of the switches; `switch` says how to make it the default. joined: gates and A's behind the kernels'
    rows, as a step needs them."""

    switch: str
    step: Step | None = None
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    fused: tuple[Any, ...] = ("prompt", "packed")
    updates: Any = "exact"
    prompts: Any = "reference"
    joined: bool = False
    gather: int = triton_gpu.GATHER
    remat: Any = True


def _step(gather: int = triton_gpu.GATHER, **more: Any) -> Setting:
    step = Step(64, **more)
    switch = f"compiler.STEPS = ({step},)" + f", triton_gpu.GATHER = {gather}" * (gather != triton_gpu.GATHER)
    return Setting(switch, step=step, joined=True, gather=gather)


def _prompts(name: str, joined: bool = False) -> Setting:
    return Setting(f'gated.PROMPTS = "{name}"' + " with compiler.STEPS" * joined, prompts=name, joined=joined)


TODAY: dict[str, Any] = dict(
    step=next(iter(compiler.STEPS), None), updates=reference.UPDATES, prompts=gated.PROMPTS, joined=bool(compiler.STEPS)
)
SETTINGS: dict[str, dict[str, Setting]] = {
    "decode": {
        "today": Setting("nothing", **TODAY),
        "xla": Setting("compiler.STEPS = ()"),
        "step": _step(),
        "step_plain": _step(captured=False),
        "step_masked": _step(gather=1),
        "cudnn": Setting(
            'llama.FUSED_ATTENTION = ("prompt", "packed", "decode")', fused=("prompt", "packed", "decode")
        ),
        "graphs": Setting(f"compiler.GPU_OPTIONS |= {GRAPHS}", options=GRAPHS),
    },
    "prefill": {
        "today": Setting("nothing", **TODAY),
        "xla": Setting('compiler.STEPS = (), reference.UPDATES = "exact"'),
        "rounded": Setting('reference.UPDATES = "rounded"', updates="rounded"),
        "diagonal": _prompts("diagonal"),
        "masked_diagonal": _prompts("masked_diagonal"),
        "apart": _prompts("apart"),
        "masked_apart": _prompts("masked_apart"),
        "joined_diagonal": _prompts("diagonal", True),
        "joined_masked": _prompts("masked_diagonal", True),
        "joined_apart": _prompts("masked_apart", True),
    },
    "train": {
        "today": Setting("nothing", updates=reference.UPDATES),
        "xla": Setting('llama.FUSED_ATTENTION = ("prompt",)', fused=("prompt",)),
        "exact": Setting('reference.UPDATES = "exact"'),
        "rounded": Setting('reference.UPDATES = "rounded"', updates="rounded"),
        "dots": Setting("--remat-keeps dots", updates=reference.UPDATES, remat="dots"),
    },
}
# What a device without a GPU can be given: the rest is refused there, by name.
ANYWHERE = {"today", "rounded", "diagonal", "apart", "cudnn", "graphs", "xla", "exact", "dots"}


def has_bare(what: str, setting: Setting) -> bool:
    """Whether the bare model differs under a setting, too."""
    plain = setting.updates in ("exact", None) and setting.prompts == "reference"
    return setting.joined or plain or (what == "train" and setting.remat == "dots")


NO_END = jnp.asarray((-1,), jnp.int32)


@contextlib.contextmanager
def applied(setting: Setting) -> Iterator[None]:
    """The switches of `setting`, for what is traced and compiled inside."""
    before = (
        compiler.STEPS, compiler.GPU_OPTIONS, llama.FUSED_ATTENTION, reference.UPDATES, gated.PROMPTS, triton_gpu.GATHER
    )  # fmt: skip

    def put(steps: Any, options: Any, fused: Any, updates: Any, prompts: Any, gather: int) -> None:
        compiler.STEPS, compiler.GPU_OPTIONS, llama.FUSED_ATTENTION = steps, options, fused
        reference.UPDATES, gated.PROMPTS, triton_gpu.GATHER = updates, prompts, gather
        jax.clear_caches()  # what was traced under other switches

    put(
        () if setting.step is None else (setting.step,), compiler.GPU_OPTIONS | setting.options, setting.fused,
        setting.updates, setting.prompts, setting.gather,
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


def prepared(model: Held, joined: bool) -> Held:
    """The model after `prepare_gates`."""
    graphs = []

    def prepare(weights: Any) -> Any:
        graph, weights = llama.prepare_gates(model.graph, weights, joined)
        graphs.append(graph)
        return weights

    shapes = jax.eval_shape(prepare, model.shapes)
    return Held(graphs[0], shapes, lambda: prepare(model()))


def started(model: Held, router: Any, tokens: jax.Array, steps: int = 32) -> Held:
    """The state behind a prompt, with room for twice `steps`."""
    lengths = jnp.full(tokens.shape[:1], tokens.shape[1], jnp.int32)
    rest = tokens, lengths, router, Sampling().traced, NO_END
    call = compiled(
        prefill, Setting("nothing"), model.graph, model.shapes, *rest, room=2 * steps, static=("graph", "room")
    )
    plain = functools.partial(prefill.__wrapped__, model.graph, room=2 * steps)
    shapes = jax.eval_shape(plain, model.shapes, *rest)[0]
    return Held(None, shapes, lambda: call(model(), *rest)[0])


def model_keys(state: Decoding) -> Any:
    """Keys [L, B, S, K, H] of the model's cache, whether a token router has its own beside it or not."""
    return (state.cache.model if isinstance(state.cache, RoutedCache) else state.cache).keys


def generating(
    what: str, model: Held, router: Any, tokens: jax.Array, setting: Setting, start: Held | None, steps: int = 32
) -> Timed:
    """A prefill, or `steps` decoding steps from `start` on, compiled under a setting."""
    how = Sampling().traced
    if start is None:
        lengths = jnp.full(tokens.shape[:1], tokens.shape[1], jnp.int32)
        rest = tokens, lengths, router, how, NO_END
        call = compiled(prefill, setting, model.graph, model.shapes, *rest, room=2 * steps, static=("graph", "room"))
        last = lambda state: model_keys(state)[:, :, tokens.shape[1] - 1]  # noqa: E731
        return Timed(lambda _: call(model(), *rest)[0], shown=last)
    rest = (router, how, NO_END, jnp.int32(steps + 1))
    call = compiled(
        decode, setting, model.graph, model.shapes, start.shapes, *rest, static=("graph",), donate=("state",)
    )
    keys = lambda state: model_keys(state)[:, :, tokens.shape[1]]  # noqa: E731 - of the first step, which all are given
    return Timed(lambda s: call(model(), s, *rest), start.copy, calls=steps, shown=keys)


def training(model: Held, router: Any, tokens: jax.Array, adapters: int, setting: Setting) -> dict[str, Timed]:
    """One step of gate training under a setting; bare: loss and gradient of the embedding, through the same layers."""
    cut = lambda weights: nnx.split(nnx.merge(model.graph, weights), GateParam, ...)  # noqa: E731
    split, gates, frozen = cut(model.shapes)
    tx = optimizer(1000, 1e-4, 0.1, 1.0)
    everywhere = jnp.ones(tokens.shape, bool)
    columns = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    batch = Batch(
        tokens=tokens, positions=columns, loss=everywhere, tasks=tokens % adapters, segments=jnp.ones_like(tokens)
    )
    begin = lambda gates: initial_state(gates, tx, None)  # noqa: E731
    state = Held(None, jax.eval_shape(begin, gates), lambda: begin(cut(model())[1]))
    dtype = nnx.merge(model.graph, model.shapes).embed.dtype
    with applied(setting):
        update = make_step(split, state.shapes, tx, beta=50.0, dtype=dtype, remat=setting.remat)
        update = update.lower(frozen, state.shapes, batch, router).compile()
    step = lambda s: update(cut(model())[2], s, batch, router)  # noqa: E731
    cut_bare = lambda weights: nnx.split(nnx.merge(model.graph, weights), nnx.PathContains("embed"), ...)  # noqa: E731
    bare_graph, embed, rest = cut_bare(model.shapes)

    @jit()
    def bare(embed: Any, rest: Any) -> Any:
        def loss(embed: Any) -> jax.Array:
            whole = nnx.merge(bare_graph, embed, rest)
            hidden = whole(tokens, columns, None, segments=batch.segments, remat=setting.remat).hidden
            logits = whole.logits(hidden[:, :-1], None)
            own = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], axis=-1)
            return -jnp.mean(own)

        return jax.value_and_grad(loss)(embed)

    made = {"adapted": Timed(step, state.copy)}
    if has_bare("train", setting):
        with applied(setting):
            alone = bare.lower(embed, rest).compile()
        made["bare"] = Timed(lambda _: alone(*cut_bare(model())[1:]))
    return made


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
