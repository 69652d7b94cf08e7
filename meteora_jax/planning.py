"""What training would need on devices that are not there: the program compiled for them. See `engine_plan`."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike

from meteora_jax.bank import AdapterConstant, AdapterParam, OwnGateParam
from meteora_jax.config import PROJECTIONS, AdapterInfo, BankConfig, InputError, LlamaConfig
from meteora_jax.execution import ExecutionConfig
from meteora_jax.gate_config import TokenRouterForm
from meteora_jax.io import hf_config
from meteora_jax.model.layout import lay_out
from meteora_jax.model.llama import Llama
from meteora_jax.model.routed_llama import gated_llama
from meteora_jax.routing.gates import BoundGates, GateParam
from meteora_jax.sharding import Params, replicated, rows_multiple, sharding, tensor_shards, use_mesh
from meteora_jax.topologies import memory_of
from meteora_jax.training.data import Batch
from meteora_jax.training.gate_loss import gate_loss
from meteora_jax.training.loss import Remat
from meteora_jax.training.recipes import RECIPES
from meteora_jax.training.settings import GateTraining
from meteora_jax.training.step import TrainState, make_step, optimizer
from meteora_jax.training.watch import flops_per_pair, flops_per_token, peak_flops
from pallas_kernels.topk_gating import TopK

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# Nothing can be timed, and on a mesh XLA's fusions with slices ask the device; their copies are counted as memory.
IMAGINED_GPU = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_dynamic_slice_fusion": False}

_LLAMA = dict(model_type="llama", rms_norm_eps=1e-5, tie_word_embeddings=False)
SHAPES: dict[str, dict[str, Any]] = {
    "llama2-7b": dict(vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
                      num_attention_heads=32, num_key_value_heads=32),
    "llama2-13b": dict(vocab_size=32000, hidden_size=5120, intermediate_size=13824, num_hidden_layers=40,
                       num_attention_heads=40, num_key_value_heads=40),
    "llama3-8b": dict(vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
                      num_attention_heads=32, num_key_value_heads=8),
    "llama3-70b": dict(vocab_size=128256, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80,
                       num_attention_heads=64, num_key_value_heads=8),
}  # fmt: skip


def shape_of(name: str) -> LlamaConfig:
    """The configuration of a well-known base by name; what its shape does not depend on is made up."""
    if name not in SHAPES:
        raise InputError(f"base: expected a BASE folder or one of {', '.join(SHAPES)}, found {name!r}")
    return hf_config.from_hf({**_LLAMA, **SHAPES[name]}, name)


@dataclasses.dataclass(frozen=True)
class Plan:
    """Figures of one program on one device of the topology; bytes, FLOPs, seconds.

    what: training, prefill, or decoding (one token a row). weights: base, adapters, gates, and the optimiser or the
    cache. temporary: activations and what the compiler needs beside. collectives: how often each occurs in the program
    (those of the layers' loop run once a layer); None of a program that the compiler gave up, as it does not fit.
    parts: what of `weights` is what (`weight_parts`), before a compiler pads it; empty where nobody counted.
    """

    what: str
    devices: int
    device_kind: str
    mesh: dict[str, int]
    rows: int
    width: int
    weights: int
    temporary: int
    memory: int | None
    flops: float
    seconds: float | None
    collectives: dict[str, int] | None
    parts: dict[str, int] = dataclasses.field(default_factory=dict)

    @property
    def needed(self) -> int:
        """Bytes of one device that the program takes."""
        return self.weights + self.temporary

    @property
    def excess(self) -> int | None:
        """Bytes that a device lacks, 0 if it fits; None if its memory is not known."""
        return None if self.memory is None else max(self.needed - self.memory, 0)

    @property
    def fits(self) -> bool | None:
        """Whether the step fits into a device's memory; None if that is not known."""
        return None if self.memory is None else self.needed <= self.memory

    def advice(self) -> str:
        """Which axis to grow where the step does not fit."""
        if self.fits is not False:
            return ""
        if self.what != "training":
            return "fewer rows, a shorter width, or grow tensor (then fsdp, which gathers weights at every token)"
        if self.weights > self.temporary:
            return "the weights are most of it: grow fsdp (or tensor) at the cost of data"
        if self.rows > self.mesh["data"] * self.mesh["fsdp"]:
            return "activations are most of it: fewer rows a device, --accumulate, or more devices on data or fsdp"
        return "activations of one row are most of it: grow tensor, or shorten --width"


def plan_training(
    config: LlamaConfig,
    adapters: int,
    rank: int,
    mesh: Mesh,
    *,
    rows: int,
    width: int,
    mfu: float,
    top_k: int = 2,
    accumulate: int = 1,
    remat: Remat = True,
    recipe: GateTraining = RECIPES["meteora"],
) -> Plan:
    """Compiles one step of gate training in bfloat16 for `mesh`, whose devices need not exist."""
    if rows % (rows_multiple(mesh) * accumulate):
        raise InputError(
            f"rows: expected a multiple of data x fsdp x accumulate = {rows_multiple(mesh) * accumulate}, found {rows}"
        )
    # without cuDNN's attention, which would ask the GPU
    execution = dataclasses.replace(ExecutionConfig.here(jnp.bfloat16, mesh), fused_attention=())
    abstract, bank = abstract_model(config, adapters, rank, recipe.form, execution)
    lay_out(abstract, tensor_shards(mesh))
    graph, params, frozen = nnx.split(abstract, GateParam, ...)
    params, frozen = spread(params, mesh), spread(frozen, mesh)
    run, speed, objective = recipe.optimization, recipe.schedule, recipe.objective
    tx = optimizer(run.steps, run.learning_rate, speed.warmup, speed.clip)
    like = {x.shape: x.sharding for x in jax.tree.leaves(params)}
    whole = replicated(mesh)
    moments = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=like.get(x.shape, whole)),
        jax.eval_shape(tx.init, params),
    )
    state = TrainState(params, moments)

    whole_batch = _rowwise(mesh, (rows, width), jnp.int32)
    loss = _rowwise(mesh, (rows, width), bool)
    batch = Batch(tokens=whole_batch, positions=whole_batch, segments=whole_batch, loss=loss, tasks=whole_batch)
    part = (rows // accumulate,)
    router = BoundGates(TopK(_rowwise(mesh, part, jnp.int32), _rowwise(mesh, part, jnp.float32), top_k), adapters)
    step: Any = make_step(
        graph, state, tx, gate_loss(objective), dtype=jnp.bfloat16, remat=remat, accumulate=accumulate, mesh=mesh,
    )  # fmt: skip
    with use_mesh(mesh):
        program = compile_program(step.lower(frozen, state, batch, router), gpu=execution.platform == "gpu")
    gates = recipe.form or "meteora"
    per_token = flops_per_token(config, bank, chosen=top_k, gates=gates, train_adapters=False, lm=objective.lm_loss)
    flops = rows * width * (per_token + objective.lm_loss * flops_per_pair(config) * (width + 1) / 2)
    size = bytes_held((frozen, state, batch, router))
    found = program_figures("training", program, size, mesh, rows=rows, width=width, flops=flops, mfu=mfu)
    return dataclasses.replace(found, parts=weight_parts(frozen, state))


def weight_parts(frozen: Params, state: TrainState) -> dict[str, int]:
    """Bytes of one device, by what they are of: base, scales (and zeros, of a quantised one), adapters, gates, and
    optimiser. All arrays are abstract."""
    found = dict.fromkeys(("base", "scales", "adapters", "gates", "optimiser"), 0)
    for path, leaf in nnx.to_flat_state(frozen):
        adapted = isinstance(leaf, AdapterParam | AdapterConstant | OwnGateParam)
        what = "adapters" if adapted else "scales" if str(path[-1]).endswith(("_scale", "_zero")) else "base"
        found[what] += bytes_held(leaf)
    return found | {"gates": bytes_held(state.params), "optimiser": bytes_held(state.optimizer)}


def abstract_model(
    config: LlamaConfig, adapters: int, rank: int, form: TokenRouterForm | None = None,
    execution: ExecutionConfig | None = None,
) -> tuple[Llama, BankConfig]:  # fmt: skip
    """The model in bfloat16 with a bank of such adapters and its gates, shapes only; and the bank."""
    shapes = {p: config.projection_shape(p) for p in PROJECTIONS}
    info = tuple(AdapterInfo(f"adapter {i}", rank, PROJECTIONS, "", "", {}) for i in range(adapters))
    bank = BankConfig(info, dict.fromkeys(PROJECTIONS, rank), config.num_layers, shapes)
    return nnx.eval_shape(lambda: gated_llama(config, bank, form, jnp.bfloat16, nnx.Rngs(0), execution)), bank


def _rowwise(mesh: Mesh, shape: tuple[int, ...], dtype: DTypeLike) -> jax.ShapeDtypeStruct:
    where = sharding(mesh, ("batch",) + (None,) * (len(shape) - 1), shape)
    return jax.ShapeDtypeStruct(shape, dtype, sharding=where)


def collectives(compiled: Any) -> dict[str, int]:
    """How often each collective occurs in a compiled program (those of the layers' loop run once a layer)."""
    found = Counter(re.findall(rf" ({'|'.join(COLLECTIVES)})(?:-start)?\(", compiled.as_text()))
    return {k: found[k] for k in COLLECTIVES}


@dataclasses.dataclass(frozen=True)
class OutOfMemory:
    """What the compiler says of a program that fits no device: bytes that it needs, and that there are."""

    needed: int
    available: int

    @classmethod
    def from_message(cls, message: str) -> OutOfMemory | None:
        """Reads the compiler's words; None if they are about something else."""
        size = r"([\d.]+)([KMGTP]?)"
        said = re.search(rf"\({size}\) exceeds available \w+ \({size}\)", message)
        said = said or re.search(rf"Used {size} of {size} \w+", message)
        if "RESOURCE_EXHAUSTED" not in message or said is None:
            return None
        units = {unit: 1024**i for i, unit in enumerate(("", *"KMGTP"))}
        needed, available = (int(float(n) * units[unit]) for n, unit in (said.groups()[:2], said.groups()[2:]))
        return cls(max(needed, available + 1), available)  # both are rounded


def compile_program(lowered: Any, gpu: bool = False) -> Any:
    """The compiled program, or how far it is from a device's memory. gpu: for GPUs that are not there."""
    try:
        return lowered.compile(compiler_options=dict(IMAGINED_GPU) if gpu else None)
    except jax.errors.JaxRuntimeError as e:
        if found := OutOfMemory.from_message(str(e)):
            return found
        if "RESOURCE_EXHAUSTED" in str(e):
            raise InputError(
                f"topology: expected a program that fits, found {str(e).strip().splitlines()[0]}"
            ) from None
        raise


def bytes_held(arguments: Any) -> int:
    """Bytes of abstract arguments on one device."""
    leaves = [x for x in jax.tree.leaves(arguments) if isinstance(x, jax.ShapeDtypeStruct)]
    shapes = [x.sharding.shard_shape(x.shape) if x.sharding is not None else x.shape for x in leaves]
    return sum(math.prod(shape) * x.dtype.itemsize for shape, x in zip(shapes, leaves, strict=True))


def program_figures(
    what: str, compiled: Any, held: int, mesh: Mesh, *, rows: int, width: int, flops: float, mfu: float | None
) -> Plan:
    """What the compiler says of a program that takes `held` bytes a device, and `flops` on all together."""
    kind = mesh.devices.flat[0].device_kind
    peak = peak_flops(kind)
    there = memory_of(kind)
    flops /= mesh.size
    if isinstance(compiled, OutOfMemory):
        weights, temporary, available = held, max(compiled.needed - held, 0), compiled.available
        seen = None
    else:
        memory = compiled.memory_analysis()
        # a program that does not read the model (a token router's training) does not have it among its arguments
        weights, temporary = max(memory.argument_size_in_bytes, held), memory.temp_size_in_bytes
        available, seen = there, collectives(compiled)
    seconds = flops / (peak * mfu) if peak and mfu else None
    return Plan(
        what=what, devices=mesh.size, device_kind=kind, mesh=dict(mesh.shape), rows=rows, width=width, weights=weights,
        temporary=temporary, memory=available, flops=flops, seconds=seconds, collectives=seen,
    )  # fmt: skip


def spread(state: Params, mesh: Mesh) -> Params:
    """Abstract weights with the shardings that `assemble` would give them."""

    def one(leaf: nnx.Variable) -> nnx.Variable:
        where = sharding(mesh, leaf.get_metadata("axes"), leaf.shape)
        return leaf.replace(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where))

    return nnx.from_flat_state([(path, one(leaf)) for path, leaf in nnx.to_flat_state(state)])
