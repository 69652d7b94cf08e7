"""The bank of adapters, and the linear map that carries a base kernel, its adapters and its gates."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from meteora_jax.config import GROUPS, BankConfig, LlamaConfig
from meteora_jax.routing import BoundRouter, Routing
from pallas_kernels.routed_lora import routed_lora


class BaseParam(nnx.Param):
    """A weight of the base model."""


class AdapterParam(nnx.Param):
    """A weight of the adapters."""


class GateParam(nnx.Param):
    """A weight of the gates."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AdapterBank:
    """All adapters of one base, stacked: zero-padded to a common rank, scale 0 where an adapter has no part.

    a: {projection: [L, A, R, I]}, b: {projection: [L, A, R, O]}, scale: {projection: float32 [L, A]}.
    `a` keeps PEFT's row order: the shrink then reads it along I whether it is dense over the adapters or
    gathers the chosen ones.
    """

    a: dict[str, Any]
    b: dict[str, Any]
    scale: dict[str, Any]
    config: BankConfig = dataclasses.field(metadata={"static": True})

    @property
    def names(self) -> tuple[str, ...]:
        return self.config.names

    def group(self, group: str) -> dict[str, jax.Array] | None:
        """A group's tensors as `AdaptedLinear` holds them; None if no adapter touches the group.

        lora_a [L, P, A, R, I], lora_b [L, A, R, O of the group], lora_scale float32 [L, P, A].
        """
        projections = GROUPS[group]
        rank = max((self.config.ranks.get(p, 0) for p in projections), default=0)
        if rank == 0:
            return None
        n, count = self.config.num_layers, len(self.names)
        dtype = next(iter(self.a.values())).dtype
        a, b, scale = [], [], []
        for p in projections:
            i, o = self.config.base_shapes[p]
            if p not in self.a:
                a.append(jnp.zeros((n, count, rank, i), dtype))
                b.append(jnp.zeros((n, count, rank, o), dtype))
                scale.append(jnp.zeros((n, count), jnp.float32))
                continue
            pad = [(0, 0), (0, 0), (0, rank - self.a[p].shape[2]), (0, 0)]
            a.append(jnp.pad(self.a[p], pad))
            b.append(jnp.pad(self.b[p], pad))
            scale.append(jnp.asarray(self.scale[p], jnp.float32))
        return {"lora_a": jnp.stack(a, 1), "lora_b": jnp.concatenate(b, -1), "lora_scale": jnp.stack(scale, 1)}


def group_rank(bank: BankConfig | None, group: str) -> int:
    """R of a group's stacked adapters; 0 if no adapter touches it."""
    return 0 if bank is None else max((bank.ranks.get(p, 0) for p in GROUPS[group]), default=0)


CPU_BLOCK = 192


def contract(equation: str, x: jax.Array, weight: jax.Array, axis: int) -> jax.Array:
    """einsum(equation, x, weight) over x's last and weight's `axis` dimension; float32 is exact to its last bits.

    XLA's CPU matmul adds in one long chain; where activations are massive (the down projections of SmolLM2)
    its rounding alone put 1.5e-4 between logits and their exact values. On a CPU in float32 the sum is
    therefore taken in blocks, which costs a few percent. GPUs and TPUs accumulate in blocks by themselves.
    """
    width = x.shape[-1]
    if x.dtype != jnp.float32 or jax.default_backend() != "cpu" or width <= CPU_BLOCK:
        return jnp.einsum(equation, x, weight)
    blocks = [(start, min(start + CPU_BLOCK, width)) for start in range(0, width, CPU_BLOCK)]
    parts = [jnp.einsum(equation, x[..., a:b], jax.lax.slice_in_dim(weight, a, b, axis=axis)) for a, b in blocks]
    return functools.reduce(jnp.add, parts)


def routed_update(
    x: jax.Array, a: jax.Array, b: jax.Array, scale: jax.Array, routing: Routing, combine: jax.Array,
    splits: tuple[int, ...],
) -> jax.Array:  # fmt: skip
    """What the routed adapters add to a group's output, float32 [B, T, O].

    a, b, scale as in `AdaptedLinear`; combine float32 [B, T, P, A], every adapter's weight times its scale.
    """
    chosen = (routing.indices[:, 0, 0], routing.weights[:, 0, 0])
    if routing.per_request:
        return request_lora(x, a, b, scale, *chosen, routing.fused, splits)
    if routing.fused is None:
        return routed_lora(x, a, b, combine, splits)
    own = routing.fused[:, None, None, None]
    return jnp.where(
        routing.fused[:, None, None],
        request_lora(x, a, b, scale, *chosen, routing.fused, splits),
        routed_lora(x, a, b, jnp.where(own, 0.0, combine), splits),
    )


def request_lora(
    x: jax.Array, a: jax.Array, b: jax.Array, scale: jax.Array, indices: jax.Array, weights: jax.Array,
    fused: jax.Array | None, splits: tuple[int, ...],
) -> jax.Array:  # fmt: skip
    """The update where a request's adapters are the same for all its tokens: O(B*C) whatever the bank's size.

        mixture (selection: C = 1)   y = sum_c w_c s_c (x A_c) B_c
        fusion                       y = (x sum_c w_c A_c) (sum_c w_c s_c B_c)

    Source: LoraRetriever (arXiv 2402.09997), section 3.3. indices int32 and weights float32 [B, C]; fused bool [B].
    """
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    einsum = functools.partial(jnp.einsum, precision=precision, preferred_element_type=jnp.float32)
    chosen = jnp.maximum(indices, 0)  # NO_ADAPTER has weight 0
    h = einsum("bti,pbcri->btpcr", x, jnp.take(a, chosen, axis=1))
    outer = (weights[None] * jnp.take(scale, chosen, axis=1)).transpose(1, 0, 2)[:, None, :, :, None]  # [B, 1, P, C, 1]
    if fused is not None:
        mean = jnp.sum(h * weights[:, None, None, :, None], axis=3, keepdims=True)
        h = jnp.where(fused[:, None, None, None, None], mean, h)
    h = (h * outer).astype(x.dtype)
    columns = jnp.take(b, chosen, axis=0)  # [B, C, R, O]
    starts = [sum(splits[:i]) for i in range(len(splits) + 1)]
    updates = [
        einsum("btcr,bcro->bto", h[:, :, p], columns[..., starts[p] : starts[p + 1]]) for p in range(len(splits))
    ]
    return jnp.concatenate(updates, axis=-1)


class AdaptedLinear(nnx.Module):
    """One projection group: the projections that read the same input, their adapters and their gates.

    kernel [I, O] holds the projections' columns side by side, so one matmul serves the group;
    lora_a [P, A, R, I], lora_b [A, R, O], lora_scale float32 [P, A]; gate float32 [I, P, A].
    """

    def __init__(
        self, config: LlamaConfig, group: str, bank: BankConfig | None, gates: bool, dtype: Any, rngs: nnx.Rngs
    ):
        shapes = [config.projection_shape(p) for p in GROUPS[group]]
        width, self.splits = shapes[0][0], tuple(o for _, o in shapes)
        total, count, rank = sum(self.splits), len(self.splits), group_rank(bank, group)
        adapters = len(bank.names) if bank else 0
        init = nnx.initializers.normal(0.02)
        self.kernel = BaseParam(init(rngs.params(), (width, total), dtype))
        # a projection without a bias in a group that has one does not occur in the family
        self.bias = BaseParam(jnp.zeros((total,), dtype)) if config.projection_bias(GROUPS[group][0]) else None
        self.lora_a: AdapterParam | None = (
            AdapterParam(init(rngs.params(), (count, adapters, rank, width), dtype)) if rank else None
        )
        self.lora_b = AdapterParam(jnp.zeros((adapters, rank, total), dtype)) if rank else None
        self.lora_scale = AdapterParam(jnp.zeros((count, adapters), jnp.float32)) if rank else None
        self.gate = GateParam(jnp.zeros((width, count, adapters), jnp.float32)) if gates else None

    def __call__(self, x: jax.Array, router: BoundRouter | None) -> tuple[list[jax.Array], Routing | None]:
        """x [B, T, I] -> each projection's [B, T, O_p], and the routing that acted (None: the bare base)."""
        y = contract("bti,io->bto", x, self.kernel[...], 0)
        if self.bias is not None:
            y = y + self.bias[...][None, None, :]
        routing = None
        if router is not None:
            routing = router.route(x, self.gate[...] if self.gate is not None else None)
            if self.lora_a is not None and self.lora_b is not None and self.lora_scale is not None:
                scale = self.lora_scale[...]
                combine = routing.dense(scale.shape[1]) * scale[None, None]
                update = routed_update(x, self.lora_a[...], self.lora_b[...], scale, routing, combine, self.splits)
                y = (y.astype(jnp.float32) + update).astype(x.dtype)
        starts = [sum(self.splits[:i]) for i in range(1, len(self.splits))]
        return jnp.split(y, starts, axis=-1), routing
