"""A projection group for training and prompts: a base kernel, its adapters and its gates, each a weight of its own."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from meteora_jax.bank import AdapterConstant, AdapterParam, BaseParam, OwnGateParam, group_rank
from meteora_jax.config import GROUPS, BankConfig, LlamaConfig
from meteora_jax.execution import ExecutionConfig
from meteora_jax.numerics import contract, cpu_block
from meteora_jax.routing import BoundRouter, GateLogits, Onlooker, Routing
from meteora_jax.routing.gates import GATES, GateParam, KnownLogits, ProjectionGates
from meteora_jax.routing.scores import SHRUNK, GroupScores
from meteora_jax.sharding import constrain, splits_inner, sum_shares
from pallas_kernels.decode_step.triton_gpu import StepLimits
from pallas_kernels.quantized_matmul import QuantizedWeight, quantized_matmul, triton_gpu
from pallas_kernels.routed_lora import LoraBank, routed_lora
from pallas_kernels.routed_lora.api import choose_for_wide_bank
from pallas_kernels.routed_lora.reference import KEPT, einsum_float32, shrink
from pallas_kernels.routed_lora.xla import FEW_ROWS

Share = Literal["inputs", "outputs"]  # of a group on one device of a tensor axis


def column_shards(config: LlamaConfig, group: str, tensor: int) -> int:
    """Parts in which a group's columns are stored on a mesh of that tensor axis, each with whole heads (or its share of
    F) of every projection; 1: in the projections' own order, as on one device and where the mesh would cut a head.
    """
    if len(GROUPS[group]) == 1:
        return 1
    sizes = (config.num_heads, config.num_kv_heads) if group == "qkv" else (config.intermediate_size,)
    return tensor if all(n % tensor == 0 for n in sizes) else 1


# The input and output side of each group's kernel; see sharding.LOGICAL_AXES.
GROUP_SIDES = {
    "qkv": ("model", "inner"), "o": ("inner", "model"), "gate_up": ("model", "inner"), "down": ("inner", "model"),
}  # fmt: skip


# What follows a group's projections: "silu", of gate and up silu(gate) * up [B, T, F]; or the residual stream
# [B, T, D], to which o, or down, is added.
End = jax.Array | Literal["silu"]


def by_column(combine: jax.Array, columns: jax.Array, splits: tuple[int, ...]) -> jax.Array:
    """sum_a combine[.., p, a] * columns[a, columns of p] for each projection p, side by side.

    Args: combine float32 [B, T, P, A] (T and P may be 1), columns float32 [A, O]. Returns: float32 [B, T, O].
    """
    parts, start = [], 0
    for p, width in enumerate(splits):
        weights = combine[:, :, min(p, combine.shape[2] - 1)]
        parts.append(jnp.einsum("bta,ao->bto", weights, columns[:, start : start + width]))
        start += width
    return jnp.concatenate(parts, axis=-1)


def quantized(
    x: jax.Array, values: BaseParam, scale: BaseParam, zero: BaseParam | None = None, turned: bool = False,
    words: bool = False, step: StepLimits | None = None,
) -> jax.Array:  # fmt: skip
    """x [.., I] through a quantised matrix, float32 [.., O]; see `pallas_kernels.quantized_matmul`.

    turned, words: see `QuantizedWeight`. step: a matrix in words is multiplied by Triton with few rows as
        these limits have them; None: by XLA.
    """
    weight = QuantizedWeight(values[...], scale[...], None if zero is None else zero[...], turned, words)
    few = step is not None and x.size // x.shape[-1] <= step.rows
    how = "triton" if few and triton_gpu.serves(weight) else None
    return quantized_matmul(x, weight, implementation=how, block=cpu_block(x))


def ended(parts: list[jax.Array], end: End) -> jax.Array:
    """What follows a group's projections [B, T, O_p]: see `End`."""
    if isinstance(end, str):
        gate, up = parts
        return jax.nn.silu(gate) * up
    (y,) = parts
    return end + y


class LoRALinear(nnx.Module):
    """One projection group: the projections that read the same input, their adapters and their gates.

    kernel [I, O] holds the projections' columns side by side, so one matmul serves the group;
    lora_a [P, A, R, I], lora_b [A, R, O], lora_scale float32 [P, A]; gate float32 [I, P, G], None without gates here;
    lora_arrow [P, A, R], lora_spectr [P, A, R, R], float32: what routers read of adapters, see `meteora_jax.spectra`;
    lora_dora, lora_bias float32 [A, O], own_gate float32 [P, A, I], None where no adapter has any.
    A quantised base's kernel is what `Quantization.parts` says, with kernel_scale and in int4 kernel_zero beside it.
    O's columns lie in `shards` parts of equal width, each with its share of every projection: `sharding.shard_order`.
    Parameters name their dimensions for meteora_jax.sharding: adapters and gate split as the kernel they sit on.
    """

    packed_rows = 0  # rows of gates and A's behind the kernel's own: see `PackedLinear`
    # what of the group this device holds a share of, inside `jax.shard_map`: see `model.shares`
    share: Share | None = None

    def __init__(
        self, config: LlamaConfig, group: str, bank: BankConfig | None, gate_columns: int, dtype: Any, rngs: nnx.Rngs
    ):
        shapes = [config.projection_shape(p) for p in GROUPS[group]]
        width, self.splits, self.shards = shapes[0][0], tuple(o for _, o in shapes), 1
        total, count, rank = sum(self.splits), len(self.splits), group_rank(bank, group)
        adapters = len(bank.names) if bank else 0
        init = nnx.initializers.normal(0.02)
        self.sides = i, o = GROUP_SIDES[group]

        def columns() -> AdapterConstant:
            return AdapterConstant(jnp.zeros((adapters, total), jnp.float32), axes=(None, o))

        parts = {} if config.quantization is None else config.quantization.parts(width, total)

        def part(name: str) -> BaseParam | None:
            """What belongs to a quantised kernel: by group of inputs and column, or by column alone."""
            if name not in parts:
                return None
            value = jnp.zeros(*parts[name])
            return BaseParam(value, axes=(i, o)[-value.ndim :])

        plain = part("kernel")
        self.kernel = BaseParam(init(rngs.params(), (width, total), dtype), axes=(i, o)) if plain is None else plain
        self.kernel_scale, self.kernel_zero = part("kernel_scale"), part("kernel_zero")
        # a projection without a bias in a group that has one does not occur in the family
        biased = config.projection_bias(GROUPS[group][0])
        self.bias = BaseParam(jnp.zeros((total,), dtype), axes=(o,)) if biased else None
        a = b = scale = arrow = spectr = None
        self.adapters = adapters
        if rank:
            a = init(rngs.params(), (count, adapters, rank, width), dtype)
            a = AdapterParam(a, axes=(None, None, None, i))
            b = AdapterParam(jnp.zeros((adapters, rank, total), dtype), axes=(None, None, o))

            def constant(*shape) -> AdapterConstant:
                return AdapterConstant(
                    jnp.zeros((count, adapters, *shape), jnp.float32), axes=(None,) * (2 + len(shape))
                )

            scale, arrow, spectr = constant(), constant(rank), constant(rank, rank)
        self.lora_a, self.lora_b, self.lora_scale = a, b, scale
        self.lora_arrow, self.lora_spectr = arrow, spectr
        self.lora_dora = columns() if bank and any(p in bank.dora for p in GROUPS[group]) else None
        self.lora_bias = columns() if bank and any(p in bank.lora_bias for p in GROUPS[group]) else None
        own = jnp.zeros((count, adapters, width), jnp.float32)
        gated = bank is not None and any(p in bank.own_gates for p in GROUPS[group])
        self.own_gate = OwnGateParam(own, axes=(None, None, i)) if gated else None
        self.gate_columns = gate_columns
        gate = jnp.zeros((width, count, gate_columns), jnp.float32) if gate_columns else None
        self.gate = None if gate is None else GateParam(gate, axes=(i, None, None))

    def base_parts(self) -> dict[str, jax.Array]:
        """What of the base may lie otherwise where it is packed, as it is stored."""
        return {"kernel": self.kernel[...]}

    def shrink(self, x: jax.Array) -> jax.Array | None:
        """x [B, T, I] through every A, float32 [B, T, P, A, R]; None where no adapter has a part."""
        return None if self.lora_a is None else self._shrink(x)

    def _shrink(self, x: jax.Array) -> jax.Array:
        assert self.lora_a is not None
        return self._whole(shrink(x, self.lora_a[...]))

    def _whole(self, x: jax.Array) -> jax.Array:
        """A sum over the group's inputs, of all devices that hold a share of them."""
        return sum_shares(x) if self.share == "inputs" else x

    def __call__(
        self,
        x: jax.Array,
        router: BoundRouter | None,
        execution: ExecutionConfig,
        layer: jax.Array | int = 0,
        keep: bool = False,
    ) -> tuple[list[jax.Array], Routing | None]:
        """x [B, T, I] -> each projection's [B, T, O_p], and the routing that acted (None: the bare base).

        layer: not read; the weights are one layer's. keep: the result is kept for the backward pass, see
        `remat="dots"`.
        """
        del layer
        partial = self.share == "inputs"
        # y, logits and shrinks of few tokens cross devices as one float32 sum: a second one would take as long again
        summed = self.sides[0] == "inner" and (partial or splits_inner(x.shape[-1]))
        summed &= x.shape[0] * x.shape[1] <= FEW_ROWS
        if self.kernel_scale is not None:
            plain = quantized(x, self.kernel, self.kernel_scale, self.kernel_zero)
            plain = plain if summed else plain.astype(x.dtype)
        elif summed and x.dtype != jnp.float32:
            plain = einsum_float32(x.dtype, "bti,io->bto", x, self.kernel[...])
        else:
            plain = contract("bti,io->bto", x, self.kernel[...], 0)
        y = plain if partial else self._with_bias(plain)
        routing = None
        if router is None:
            y = self._whole(y)
        elif isinstance(router, Onlooker):
            y, routing = self._whole(y), router.look(self, x, self._shrink)
        else:
            # without gates here the router is a routing, which asks for no logits
            gates: GateLogits = KnownLogits(None) if self.gate is None else ProjectionGates(self.gate[...])
            if partial and self.gate is not None:
                gates = KnownLogits(self._whole(gates.logits(x)))
            shrunk = None
            if not router.asks <= GATES:
                shrunk = self.shrink(x) if router.asks & SHRUNK else None
                gates = GroupScores.of(self, x, gates, shrunk)
            routing = router.route(x, gates)
            y = self._adapted(x, plain, y, routing, summed, execution, shrunk)
        y = (self._with_bias(y) if partial else y).astype(x.dtype)
        if keep:
            # without the barrier XLA multiplies a second time, to write one of the results where it is kept
            y = checkpoint_name(jax.lax.optimization_barrier(y), KEPT)
        return self._split(y), routing

    def until(
        self, end: End, x: jax.Array, router: BoundRouter | None, execution: ExecutionConfig,
        layer: jax.Array | int = 0, keep: bool = False,
    ) -> tuple[jax.Array, Routing | None]:  # fmt: skip
        """As `__call__`, and what follows the projections: see `End`."""
        parts, routing = self(x, router, execution, layer, keep)
        return ended(parts, end), routing

    def _with_bias(self, y: jax.Array) -> jax.Array:
        return y if self.bias is None else y + self.bias[...].astype(y.dtype)[None, None, :]

    def _adapted(
        self, x: jax.Array, plain: jax.Array, y: jax.Array, routing: Routing, summed: bool, execution: ExecutionConfig,
        shrunk: jax.Array | None,
    ) -> jax.Array:  # fmt: skip
        """y [B, T, O], the base's output, + what the routed adapters add; plain is y without the base's bias.

        summed: y is a sum over devices, which a shrink by every adapter joins. shrunk: what was shrunk for the router.
        A device with a share of the inputs is given its own y, without the bias; what is returned is whole.
        """
        if self.lora_a is None or self.lora_b is None or self.lora_scale is None:
            return self._whole(y)
        a, scale, splits = self.lora_a[...], self.lora_scale[...], tuple(o // self.shards for o in self.splits)
        wide = a.shape[1] * a.shape[2] > execution.dense_width
        how = "reference" if summed and not wide and routing.fused is None else None
        if shrunk is not None and wide:  # the chosen alone are shrunk again
            shrunk, how = None, choose_for_wide_bank(x.shape[0] * x.shape[1])
        if self.share == "inputs":  # own shrinks go through B, and all is one sum
            shrunk, how = None, None if how == "reference" else how

        def part(plain: jax.Array, y: jax.Array, b: jax.Array, dora: Any, bias: Any) -> jax.Array:
            y = routed_lora(
                x, LoraBank(a, b, scale, splits), routing, y, shrink=shrunk, implementation=how,
                platform=execution.platform,
            )  # fmt: skip
            if dora is not None:
                change = by_column(routing.dense(scale.shape[1]), dora, splits) * plain.astype(jnp.float32)
                y = (y.astype(jnp.float32) + change).astype(y.dtype)
            y = self._whole(y)
            if bias is not None:
                change = by_column(routing.dense(scale.shape[1]) * scale[None, None], bias, splits)
                y = (y.astype(jnp.float32) + change).astype(y.dtype)
            return y

        columns = self.lora_b[...], *(None if z is None else z[...] for z in (self.lora_dora, self.lora_bias))
        if self.shards == 1:
            return part(plain, y, *columns)
        parts = jax.tree.map(lambda z: z.reshape(*z.shape[:-1], self.shards, -1), (plain, y, *columns))
        return jax.vmap(part, in_axes=-2, out_axes=-2)(*parts).reshape(y.shape)

    def _split(self, y: jax.Array) -> list[jax.Array]:
        """y [B, T, O] -> each projection's [B, T, O_p]; on a mesh every device cuts what it holds."""
        starts = [sum(self.splits[:i]) // self.shards for i in range(1, len(self.splits))]
        inner = "inner" if self.sides[1] == "inner" else None  # the residual stream stays whole along D
        if self.shards == 1:
            return [constrain(part, "batch", None, inner) for part in jnp.split(y, starts, axis=-1)]
        y = constrain(y.reshape(*y.shape[:2], self.shards, -1), "batch", None, inner, None)
        return [
            constrain(part.reshape(*y.shape[:2], -1), "batch", None, inner) for part in jnp.split(y, starts, axis=-1)
        ]
