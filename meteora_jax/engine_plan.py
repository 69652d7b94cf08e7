"""What the engine would need on TPUs that are not there: its programs compiled for their topology."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike

from meteora_jax.config import InputError, LlamaConfig
from meteora_jax.engine.memory import USABLE, block_bytes, state_bytes
from meteora_jax.engine.request import Trace
from meteora_jax.engine.step import EngineState, PromptTokens, StepRows, new_state, run_steps
from meteora_jax.gate_config import TokenRouterForm
from meteora_jax.io.model_state import execution_on
from meteora_jax.model.layout import lay_out
from meteora_jax.planning import (
    OutOfMemory,
    Plan,
    abstract_model,
    bytes_held,
    compile_program,
    program_figures,
    spread,
)
from meteora_jax.routing.gates import BoundGates
from meteora_jax.sharding import replicated, rows_multiple, tensor_shards, use_mesh
from meteora_jax.topologies import memory_of
from meteora_jax.training.watch import flops_per_pair, flops_per_token, peak_flops
from pallas_kernels.paged_attention import QUERY_BLOCK
from pallas_kernels.topk_gating import TopK

BLOCK_SIZE = 16  # of the engine's cache
BUDGET = 8192  # prompt tokens that a step of the engine reads
TRIES = 6  # compilations of both programs, to find how many blocks fit
STEPS = 8  # decoding steps of a program
# Bytes a second of one device's memory by the beginning of its `device_kind` (Google's data sheets; see `MEMORY`).
BANDWIDTH = {"TPU7x": 3.69e12, "TPU v6 lite": 1.64e12, "TPU v5 lite": 8.19e11, "TPU v5": 2.765e12, "TPU v4": 1.228e12}


class EnginePrograms:
    """The engine's programs for `rows` sequences, in bfloat16, with gates or a token router; shapes only.

    top_k: adapters a token. form: None for MeteoRA's own gates. trace: whether the routing is recorded.
    """

    def __init__(
        self, config: LlamaConfig, adapters: int, rank: int, mesh: Mesh, *, rows: int, top_k: int = 2,
        form: TokenRouterForm | None = None, trace: Trace = False,
    ):  # fmt: skip
        """Raises InputError: rows that a mesh cannot share evenly."""
        if rows % rows_multiple(mesh):
            raise InputError(f"rows: expected a multiple of data x fsdp = {rows_multiple(mesh)}, found {rows}")
        abstract, bank = abstract_model(config, adapters, rank, form, execution_on(config, jnp.bfloat16, mesh))
        lay_out(abstract, tensor_shards(mesh))
        self.config, self.mesh, self.rows = config, mesh, rows
        self._graph, weights = nnx.split(abstract)
        self.weights = spread(weights, mesh)
        self._router = BoundGates(TopK(self._whole(rows), self._whole(rows, dtype=jnp.float32), top_k), adapters)
        self._how: dict[str, Any] = dict(logprobs=None, trace=trace)
        # forward alone, and no gate's gradient: a third of attention's count, and of 4 or 6 a weight 2 remain
        per_token = flops_per_token(config, None, chosen=0, gates=None, train_adapters=False) / 2
        gated = flops_per_token(config, bank, chosen=top_k, gates=None, train_adapters=False) / 2 - per_token
        gates = flops_per_token(config, bank, chosen=0, gates=form or "meteora", train_adapters=False) / 3
        gates -= flops_per_token(config, bank, chosen=0, gates=None, train_adapters=False) / 3
        self._head = 2.0 * config.hidden_size * config.vocab_size
        self._layers = per_token - self._head + gated + gates

    def _whole(self, *shape: int, dtype: DTypeLike = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=replicated(self.mesh))

    def _empty(self, blocks: int) -> Any:
        with use_mesh(self.mesh):
            return new_state.lower(self._graph, self.weights, blocks, BLOCK_SIZE, self.rows).compile()

    def state_bytes(self, blocks: int) -> int:
        """What the engine's state with so many blocks takes of one device, as it is laid out there."""
        return state_bytes(self._graph, self.weights, blocks, BLOCK_SIZE, self.rows, self.mesh)

    def block_bytes(self) -> int:
        """What one more block takes of one device."""
        return block_bytes(self._graph, self.weights, BLOCK_SIZE, self.mesh)

    def state(self, blocks: int) -> EngineState:
        """The engine's state with so many blocks, where a mesh puts it."""
        empty = self._empty(blocks)
        shapes = jax.eval_shape(lambda w: new_state(self._graph, w, blocks, BLOCK_SIZE, self.rows), self.weights)
        return jax.tree.map(
            lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), shapes, empty.output_shardings
        )

    def compiled(self, blocks: int, table: int, read: int = 0) -> tuple[Any, int]:
        """The program of STEPS decoding steps, or of one that reads `read` tokens of prompts beside the rows, and the
        bytes of its arguments on one device; `OutOfMemory` in the place of a program that fits none.

        table: blocks that a row may have.
        """
        rows, whole = self.rows, self._whole
        of_rows = StepRows(whole(rows), whole(rows, dtype=bool), whole(rows, table), whole(rows), None)
        tokens = (whole(read), whole(read), whole(read // QUERY_BLOCK)) if read else None
        prompt = None if tokens is None else PromptTokens(*tokens, whole(rows), whole(rows), whole(rows))
        state, call = self.state(blocks), (of_rows, prompt, self._router, whole(1))
        with use_mesh(self.mesh):
            lowered = run_steps.lower(self._graph, self.weights, state, *call, steps=1 if read else STEPS, **self._how)
            return compile_program(lowered), bytes_held((self.weights, state, call))

    def reading(self, tokens: int, width: int) -> float:
        """FLOPs of prompt tokens, on all devices together, of prompts of `width`."""
        return tokens * (self._layers + flops_per_pair(self.config) / 3 * (width + 1) / 2) + self.rows * self._head

    def writing(self, seen: int | float) -> float:
        """FLOPs of a decoding step whose rows see so many tokens each."""
        return self.rows * (self._layers + self._head + flops_per_pair(self.config) / 3 * seen)


def plan_generation(
    config: LlamaConfig, adapters: int, rank: int, mesh: Mesh, *, rows: int, width: int, mfu: float,
    new_tokens: int = 64, top_k: int = 2, form: TokenRouterForm | None = None,
) -> tuple[Plan, ...]:  # fmt: skip
    """Compiles what evaluation runs, in bfloat16 with routing traces: a step of the engine that reads `rows` prompts of
    `width` tokens, as many as go into its budget; and, if that fits, the loop that decodes `new_tokens` more."""
    programs = EnginePrograms(config, adapters, rank, mesh, rows=rows, top_k=top_k, form=form, trace="response")
    table = -(-(width + new_tokens) // BLOCK_SIZE)
    read = min(rows * width, BUDGET) // QUERY_BLOCK * QUERY_BLOCK
    first, held = programs.compiled(rows * table, table, read)
    flops = programs.reading(read, width)
    plan = program_figures("prefill", first, held, mesh, rows=rows, width=width, flops=flops, mfu=mfu)
    if isinstance(first, OutOfMemory):
        return (plan,)
    loop, held = programs.compiled(rows * table, table)
    seen, flops = width + new_tokens, programs.writing(width + new_tokens)
    return plan, program_figures("decoding", loop, held, mesh, rows=rows, width=seen, flops=flops, mfu=None)


@dataclasses.dataclass(frozen=True)
class ServingPlan:
    """What a server of an engine holds and how fast it could be, on a topology; bytes of one device, seconds.

    rows: requests that decode at once. budget: prompt tokens of a step. weights: base, adapters, gates. temporary: the
    larger of both programs', copies of the cache among it where the compiler makes any. blocks: of the cache, of 16
    positions and `block_bytes` each, as many as a few compilations found to fit. step: a decoding step of all rows by
    the roofline, `bound` by memory or arithmetic, where each has a prompt of `width` and half of its `new_tokens`.
    prompt_rate: prompt tokens a second at the MFU. rate: new tokens a second of requests that follow each other. None:
    the device's rates are not known.
    """

    devices: int
    device_kind: str
    mesh: dict[str, int]
    rows: int
    budget: int
    width: int
    new_tokens: int
    memory: int | None
    weights: int
    temporary: int
    block_bytes: int
    blocks: int
    step: float | None
    bound: str | None
    prompt_rate: float | None
    rate: float | None

    @property
    def requests(self) -> int:
        """How many whole requests of that size the blocks hold at once."""
        return self.blocks // -(-(self.width + self.new_tokens) // BLOCK_SIZE)

    @property
    def fits(self) -> bool:
        """Whether the blocks hold all rows."""
        return self.requests >= self.rows


def plan_serving(
    config: LlamaConfig, adapters: int, rank: int, mesh: Mesh, *, rows: int, width: int, mfu: float,
    new_tokens: int = 256, top_k: int = 2, form: TokenRouterForm | None = None, memory: int | None = None,
) -> ServingPlan:  # fmt: skip
    """Compiles the engine's two kinds of step for `rows` requests of `width` tokens and `new_tokens` more, counts the
    blocks that fit into a device's memory beside them.

    memory: bytes of a device; None: as the data sheets have it.

    Raises:
        InputError: a device whose memory is not known, or that does not hold the programs with one block a row.
    """
    kind = mesh.devices.flat[0].device_kind
    there = memory_of(kind) if memory is None else memory
    if there is None:
        raise InputError(f"topology: expected devices whose memory is known, found {kind}")
    programs = EnginePrograms(config, adapters, rank, mesh, rows=rows, top_k=top_k, form=form)
    table = -(-(width + new_tokens) // BLOCK_SIZE)
    read = min(rows * width, BUDGET) // QUERY_BLOCK * QUERY_BLOCK
    block = programs.block_bytes()
    usable = math.floor(USABLE * there)

    def needed(blocks: int) -> tuple[int, int]:
        """Bytes of both programs with so many blocks: of their arguments, and beside."""
        arguments = beside = 0
        for what in (read, 0):
            program, held = programs.compiled(blocks, table, what)
            if isinstance(program, OutOfMemory):
                return held, program.needed - held
            taken = program.memory_analysis()
            arguments = max(arguments, taken.argument_size_in_bytes)
            beside = max(beside, taken.temp_size_in_bytes)
        return arguments, beside

    fewest = rows, needed(rows)
    if sum(fewest[1]) > usable:
        raise InputError(
            f"topology: expected at most {usable} bytes a device with one block a row, found {sum(fewest[1])}: fewer "
            "rows, or grow tensor"
        )
    # what the compiler takes beside grows with the cache where it copies it: nearer from both sides
    most = max(rows + 1, (usable - fewest[1][0]) // block)
    for _ in range(TRIES):
        tried = most, needed(most)
        if sum(tried[1]) <= usable:
            fewest = tried
            break
        slope = (sum(tried[1]) - sum(fewest[1])) / (tried[0] - fewest[0])
        between = fewest[0] + math.floor((usable - sum(fewest[1])) / slope)
        most = min(between, 3 * tried[0] // 4)  # a program that is given up needs more than the compiler says
        if most <= fewest[0]:
            break
    blocks, (arguments, temporary) = fewest
    weights = arguments - programs.state_bytes(blocks)
    peak, speed = peak_flops(kind), next((n for name, n in BANDWIDTH.items() if kind.startswith(name)), None)
    step = bound = prompt_rate = rate = None
    if peak and speed:
        seen = width + new_tokens / 2
        times = {
            "memory": (weights + rows * seen / BLOCK_SIZE * block) / speed,
            "arithmetic": programs.writing(seen) / mesh.size / peak,
        }
        bound = max(times, key=lambda name: times[name])
        step = times[bound]
        prompt_rate = read * mesh.size * peak * mfu / programs.reading(read, width)
        rate = rows * new_tokens / (new_tokens * step + rows * width / prompt_rate)
    return ServingPlan(
        mesh.size, kind, dict(mesh.shape), rows, read, width, new_tokens, there, weights, temporary, block,
        blocks, step, bound, prompt_rate, rate,
    )  # fmt: skip
