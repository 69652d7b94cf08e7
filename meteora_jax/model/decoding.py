"""A decoding step by cuBLAS and Triton: one token a row through all layers, read where they are stacked."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from meteora_jax.config import GROUPS, LlamaConfig
from meteora_jax.execution import ExecutionConfig
from meteora_jax.model.lora_linear import LoRALinear
from meteora_jax.model.packed_linear import PackedLinear
from meteora_jax.model.paged_cache import PagedCache
from meteora_jax.routing import BoundRouter, Routing, Score
from meteora_jax.routing.gates import GATES, KnownLogits
from meteora_jax.routing.scores import SHRUNK, GroupScores
from meteora_jax.sharding import LOGICAL_AXES, sum_shares
from pallas_kernels.decode_step import triton_gpu
from pallas_kernels.decode_step.choosing import Chooser, Shrinks
from pallas_kernels.decode_step.operands import Choice, Group, ResidualStream, StepState
from pallas_kernels.decode_step.triton_gpu import Epilogue
from pallas_kernels.paged_attention import StepTokens
from pallas_kernels.quantized_matmul import triton_gpu as quantized_gpu
from pallas_kernels.routed_lora.reference import shrink
from pallas_kernels.topk_gating import TopK

EPILOGUES: dict[str, Epilogue] = {"qkv": "qkv", "o": "residual", "gate_up": "silu", "down": "residual"}
FIRST = {"qkv": 0, "o": 3, "gate_up": 4, "down": 6}  # each group's first projection among a layer's seven


def refusal(
    layers: Any, config: LlamaConfig, router: BoundRouter | None, rows: int, execution: ExecutionConfig
) -> str | None:
    """Why this model or router is left to XLA; None where the kernels of `execution.step` serve both."""
    if execution.step is None:
        return "no steps by Triton"
    if config.qk_norm or config.sliding_window is not None:
        return "head norms or a sliding window"
    if rows > execution.step.rows or config.head_dim not in (32, 64, 128, 256):
        return "rows or heads that no tile has"
    linears: list[LoRALinear | PackedLinear] = [getattr(layers, name) for name in GROUPS]
    for linear, epilogue in zip(linears, EPILOGUES.values(), strict=True):
        if linear.bias is not None:
            return "biases"
        weight = linear.weight() if isinstance(linear, PackedLinear) else None
        if linear.kernel_scale is not None and weight is None:
            return "a quantised base that does not lie in words (4 bit: of inputs in blocks of 128)"
        try:
            triton_gpu.tiles(rows, sum(linear.splits), epilogue, config.head_dim, None)
            if weight is not None:
                quantized_gpu.tiles(rows, *weight.shape, weight.group)
        except NotImplementedError as e:
            return str(e)
    if router is None:
        return None
    if any(linear.lora_b is None for linear in linears):
        return "a group without adapters"
    if any(isinstance(x, LoRALinear) and (x.lora_dora is not None or x.lora_bias is not None) for x in linears):
        return "DoRA or biases of adapters"
    given = router.known(None)
    acting = _routing_shapes(router, layers, rows) if given is None and router.gating is None else given
    fuses = acting is not None and acting.fused is not None
    if acting is not None and acting.runs is not None:
        return "fusion of adapters whose ranks lie in several places"
    for linear in linears:
        if fuses and _is_wide(linear, execution):
            return "fusion in a wide bank"
        if not linear.packed_rows and (given is None or not _is_wide(linear, execution)):
            return "gates and A's that are not behind the kernel's rows"
    return None


def _is_wide(linear: LoRALinear | PackedLinear, execution: ExecutionConfig) -> bool:
    """Whether the bank has too many adapters times ranks for their A's to be packed."""
    assert linear.lora_a is not None
    return linear.lora_a.shape[-3] * linear.lora_a.shape[-2] > execution.dense_width


@dataclasses.dataclass(frozen=True)
class StepScores(GroupScores):
    """Of a decoding step's group. lying: its shrinks, where a kernel ranks them by the scores of `linear`."""

    lying: Shrinks | None = None
    linear: Any = None

    def choose(self, score: Score, rule: TopK, allowed: Any = None, candidates: Any = None) -> Routing:
        """See `GateLogits`."""
        if self.lying is None or score not in ("arrow", "spectr"):
            return super().choose(score, rule, allowed, candidates)
        arrow = self.linear.lora_arrow[...] if score == "arrow" or candidates is not None else None
        spectr = self.linear.lora_spectr[...] if score == "spectr" else None
        return Routing(*(z[:, None] for z in self.lying.rank(rule, arrow, spectr, allowed, candidates)))


def chooser(router: BoundRouter, layers: Any) -> Chooser:
    """What asks a router for a group's routing that takes more than the plain top-k of all its logits."""
    route = _routed(router, layers)

    def choose(
        layer: int, first: int, x: jax.Array, logits: jax.Array, shrinks: jax.Array | None, lying: Shrinks | None
    ) -> Choice:
        routing = route(layer, first, x, logits, shrinks, lying)
        shape = *logits.shape[:2], routing.indices.shape[-1]
        indices, weights = (jnp.broadcast_to(z[:, 0], shape) for z in (routing.indices, routing.weights))
        return Choice(shape[-1], None, None, indices, weights, routing.fused)

    return choose


def _routed(router: BoundRouter, layers: Any) -> Callable[..., Routing]:
    """The same, as a routing [M, 1, P, C]."""
    groups = {first: getattr(layers, group) for group, first in FIRST.items()}

    def route(
        layer: int, first: int, x: jax.Array, logits: jax.Array, shrinks: jax.Array | None,
        lying: Shrinks | None = None,
    ) -> Routing:  # fmt: skip
        x, gates = x[:, None], KnownLogits(logits[:, None])
        if not router.asks <= GATES:
            linear = groups[first]
            if router.asks & SHRUNK and shrinks is None:  # of a wide bank
                shrinks = shrink(x, linear.lora_a[...][layer])[:, 0]
                shrinks = sum_shares(shrinks) if linear.share == "inputs" else shrinks
            gates = StepScores.of(linear, x, gates, None if shrinks is None else shrinks[:, None], layer)
            gates = dataclasses.replace(gates, lying=lying, linear=linear)
        return router.route(x, gates)

    return route


def _routing_shapes(router: BoundRouter, layers: Any, rows: int) -> Any:
    """A `Routing` of shapes: what a router that is asked for each group gives of one."""
    linear: LoRALinear | PackedLinear = layers.qkv
    assert linear.lora_a is not None
    _, p, adapters, rank, width = linear.lora_a.shape
    shapes = (rows, width), (rows, p, linear.gate_columns), (rows, p, adapters, rank)
    route = functools.partial(_routed(router, layers), 0, FIRST["qkv"])
    return jax.eval_shape(route, *(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes))


def group_weights(
    linear: LoRALinear | PackedLinear, norm: Any, adapt: bool, execution: ExecutionConfig, first_projection: int
) -> Group:
    """The stacked weights of a group; `norm` is the RmsNorm before it."""
    if not adapt or linear.lora_a is None or linear.lora_b is None or linear.lora_scale is None:
        a = b = scale = None
        gates = 0
    else:
        a = linear.lora_a[...] if _is_wide(linear, execution) else None
        b, scale = linear.lora_b[...], linear.lora_scale[...]
        gates = linear.gate_columns
    weight, behind = linear.weight() if isinstance(linear, PackedLinear) else None, None
    if weight is not None and adapt and linear.packed_rows:
        behind = linear.kernel[...]
    return Group(
        linear.kernel[...] if weight is None else weight, a, b, scale, splits=linear.splits,
        eps=None if norm is None else norm.eps, packed=linear.packed_rows // len(linear.splits), gates=gates,
        first_projection=first_projection, behind=behind,
        summed=LOGICAL_AXES["inner"] if linear.share == "inputs" else (),
    )  # fmt: skip


def run_step(
    layers: Any,
    config: LlamaConfig,
    x: jax.Array,
    angles: tuple[jax.Array, jax.Array],
    cache: PagedCache,
    tokens: StepTokens,
    router: BoundRouter | None,
    execution: ExecutionConfig,
) -> tuple[jax.Array, PagedCache, tuple[Routing, ...]]:
    """All layers of one step.

    Args:
        layers: the stacked `Layer`. x [M, D]. angles: cosines and sines float32 [M, H/2]. tokens: of all M, their
            blocks claimed already. router: bound for M rows of one token each.

    Returns:
        x [M, D], the cache with the slots written, each group's routing with layers first: [L, M, 1, P or 1, C].
    """
    assert execution.step is not None
    limits = execution.step
    rows, depth = x.shape[0], config.num_layers
    choice: Choice | Chooser | None = None
    top_k = 0  # of a choice that is traced
    given = None if router is None else router.known(None)
    if given is not None:
        own = given.indices[:, 0, 0], given.weights[:, 0, 0], given.fused
        choice = Choice(given.indices.shape[-1], None, None, *own)
    elif router is not None and router.gating is not None:
        top_k = router.gating.k
        choice = Choice(top_k, router.gating.counts, router.gating.temperatures)
    elif router is not None:
        choice, top_k = chooser(router, layers), _routing_shapes(router, layers, rows).indices.shape[-1]
    shape = (depth, rows, sum(map(len, GROUPS.values())), top_k) if top_k else (1,)
    traced = jnp.full(shape, -1, jnp.int32), jnp.zeros(shape, jnp.float32)
    norms = {"qkv": layers.attention_norm, "gate_up": layers.mlp_norm}
    adapt = choice is not None
    groups = {g: group_weights(getattr(layers, g), norms.get(g), adapt, execution, FIRST[g]) for g in GROUPS}
    state = StepState(cache.pages, *traced, cache.blocks)
    slots = tokens.slots(cache.block_size)
    stream = ResidualStream.begin(x, layers.attention_norm.scale[0])
    for layer in range(depth):  # written out: cuBLAS reads a layer in place where its number is known
        q, state = triton_gpu.qkv_step(
            layer, stream, groups["qkv"], state, choice, limits, angles=angles, slots=slots, head_dim=config.head_dim
        )
        y = triton_gpu.attend(layer, q, state, tokens, config.num_heads, config.head_dim)
        stream, state = triton_gpu.residual_step(
            layer, y, groups["o"], state, choice, limits, residual=stream.x, next_scale=layers.mlp_norm.scale[...],
            next_layer=0,
        )  # fmt: skip
        y, state = triton_gpu.silu_step(layer, stream, groups["gate_up"], state, choice, limits)
        stream, state = triton_gpu.residual_step(
            layer, y, groups["down"], state, choice, limits, residual=stream.x,
            next_scale=layers.attention_norm.scale[...], next_layer=1,
        )  # fmt: skip
    cache = dataclasses.replace(cache, pages=state.pages)
    routings: tuple[Routing, ...] = ()
    if choice is not None:
        routings = tuple(_routing(state, choice, g, depth) for g in GROUPS)
    return stream.x, cache, routings


def _routing(state: StepState, choice: Choice | Chooser, group: str, depth: int) -> Routing:
    """What acted in a group, layers first."""
    if not isinstance(choice, Choice) or choice.indices is None or choice.weights is None:
        own = slice(FIRST[group], FIRST[group] + len(GROUPS[group]))
        return Routing(state.indices[:, :, None, own], state.weights[:, :, None, own])
    given = (
        jnp.broadcast_to(z[None, :, None, None], (depth, z.shape[0], 1, 1, z.shape[1]))
        for z in (choice.indices, choice.weights)
    )
    return Routing(*given)
