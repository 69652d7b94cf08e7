"""A projection group for inference: gates and A's are rows behind the base kernel's own."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.core import Tracer
from jax.sharding import Mesh, NamedSharding

from meteora_jax.bank import AdapterConstant, AdapterParam, BaseParam
from meteora_jax.execution import ExecutionConfig
from meteora_jax.model.lora_linear import End, LoRALinear, Share, ended
from meteora_jax.numerics import contract, cpu_block
from meteora_jax.routing import BoundRouter, GateLogits, Onlooker, Routing
from meteora_jax.routing.gates import GATES, KnownLogits
from meteora_jax.routing.scores import SHRUNK, GroupScores
from meteora_jax.sharding import sharding, sum_shares
from pallas_kernels.quantized_matmul import QuantizedWeight, quantized_matmul
from pallas_kernels.quantized_matmul.weight import turn, turn_back, turn_zero, turn_zero_back, word_block
from pallas_kernels.routed_lora import LoraBank, packing, routed_lora
from pallas_kernels.routed_lora.api import choose_for_wide_bank
from pallas_kernels.routed_lora.reference import einsum_float32, shrink
from pallas_kernels.routed_lora.triton_gpu import MAX_TOKENS, add_lora, many_refusal, silu_lora, topk_gated_lora
from pallas_kernels.routed_lora.xla import FEW_ROWS


class PackedKernel(BaseParam):
    """A packed weight. It keeps the axis of layers where layers are scanned: XLA copies a slice of a slice."""


class PackedLinear(nnx.Module):
    """A `LoRALinear` whose weights are laid out for inference on one device, or on a tensor axis' devices.

    kernel [L, O + P N, I]: the base's columns as rows, and behind them, for each projection, N rows of its gates and
    its A's (`packing`); `gate_columns` of them are gates. One product serves a decoding step; a prompt reads the first
    O rows, or the P N behind them, where they lie. `wide`: of a bank with too many adapters times ranks there are the
    gates alone, and A's are read where they are chosen. The rest as in `LoRALinear`.
    A quantised base's `values` [L, O, I] (int4: [L, O, I / 2]) and zeros lie in words, see `quantized_matmul.weight`;
    kernel then has the rows behind them alone: the first `base_rows`, O or 0, are the base's.
    Where O lies in `shards` parts, the kernel has as many, each with its own columns as rows and all P N behind them:
    it is then read inside `jax.shard_map` alone, where this is a device's share (see `model.shares`).
    """

    share: Share | None = None

    def __init__(self, linear: LoRALinear, dense_width: int, dtype: Any):
        """linear: with layers stacked, and no DoRA or biases of adapters; with adapters unless it is quantised.

        dtype: of the activations.
        """
        self.splits, self.sides = linear.splits, linear.sides
        self.bias: BaseParam | None = linear.bias
        self.lora_a: AdapterParam | None = linear.lora_a
        self.lora_b: AdapterParam | None = linear.lora_b
        self.lora_scale: AdapterConstant | None = linear.lora_scale
        self.lora_arrow, self.lora_spectr = linear.lora_arrow, linear.lora_spectr
        self.own_gate = linear.own_gate
        self.shards = linear.shards
        rows = self._rows_behind(linear, dense_width, dtype)
        self.packed_rows = rows.shape[1] * rows.shape[2]
        self.kernel_scale = linear.kernel_scale
        values = kernel_zero = None
        if self.kernel_scale is None:
            kernel, self.base_rows = stack_rows(linear.kernel[...], rows, self.sides, self.shards), sum(self.splits)
        else:
            kernel, self.base_rows = rows.reshape(rows.shape[0], -1, rows.shape[3]), 0
            zero = None if linear.kernel_zero is None else linear.kernel_zero[...]
            group = QuantizedWeight(linear.kernel[...], self.kernel_scale[...], zero).group
            if zero is not None:
                turned = jax.jit(jax.vmap(functools.partial(turn_zero, width=rows.shape[3])))(zero)
                kernel_zero = BaseParam(turned, axes=linear.sides[::-1])
            values = PackedKernel(turn_layers(linear.kernel[...], group), axes=linear.sides[::-1])
        self.kernel, self.values = PackedKernel(kernel, axes=linear.sides[::-1]), values
        self.kernel_zero = kernel_zero

    def _rows_behind(self, linear: LoRALinear, dense_width: int, dtype: Any) -> jax.Array:
        """Gates and A's of each projection [L, P, N, I]; sets what is known of them."""
        if linear.lora_a is None:
            self.wide, self.gate_columns, self.adapters = False, 0, 0
            layers, width = linear.kernel.shape[0], linear.kernel.shape[1]
            width *= 1 if linear.kernel_zero is None else 2  # two values a byte
            return jnp.zeros((layers, len(self.splits), 0, width), dtype)
        a = linear.lora_a[...]
        layers, projections, adapters, rank, width = a.shape
        self.adapters, self.wide = adapters, adapters * rank > dense_width
        gate = jnp.zeros((layers, width, projections, adapters), a.dtype) if linear.gate is None else linear.gate[...]
        self.gate_columns = gate.shape[-1]
        return jax.jit(jax.vmap(packing.pack_gates_and_a))(gate, a[..., :0, :] if self.wide else a)

    def weight(self) -> QuantizedWeight | None:
        """A quantised base's, stacked, or one layer's scale and zero where layers are scanned; None of any other."""
        if self.values is None or self.kernel_scale is None:
            return None
        zero = None if self.kernel_zero is None else self.kernel_zero[...]
        return QuantizedWeight(self.values[...], self.kernel_scale[...], zero, turned=True, words=True)

    def base_parts(self) -> dict[str, jax.Array]:
        """What `LoRALinear` has of the base where it lies otherwise here, copied: the kernel [L, I, O]."""
        if (weight := self.weight()) is not None:
            found = {"kernel": turn_layers(weight.values, weight.group, back=True)}
            if weight.zero is not None:
                back = functools.partial(turn_zero_back, groups=weight.scale.shape[1], width=weight.shape[0])
                found["kernel_zero"] = jax.jit(jax.vmap(back))(weight.zero)
            return found
        kernel = self.kernel[...]
        rows = kernel.reshape(len(kernel), self.shards, -1, kernel.shape[-1])[:, :, : self.base_rows // self.shards]
        rows = jnp.swapaxes(rows.reshape(len(kernel), self.base_rows, -1), 1, 2)
        where = lies_on(kernel, (None, *self.sides), rows.shape)
        return {"kernel": rows if where is None else jax.device_put(rows, where)}

    def gates(self) -> jax.Array:
        """The gates' rows as `LoRALinear.gate` has them, float32 [L, I, P, G], as precise as they are kept."""
        kernel, projections = self.kernel[...], len(self.splits)
        last = kernel.shape[1] - self.packed_rows
        behind = kernel[:, last:].reshape(len(kernel), projections, -1, kernel.shape[-1])
        return behind[:, :, : self.gate_columns].transpose(0, 3, 1, 2).astype(jnp.float32)

    def __call__(
        self,
        x: jax.Array,
        router: BoundRouter | None,
        execution: ExecutionConfig,
        layer: jax.Array | int = 0,
        keep: bool = False,
    ) -> tuple[list[jax.Array], Routing | None]:
        """x [B, T, I] -> each projection's [B, T, O_p], and the routing that acted.

        layer: which one of the packed weight. keep: not for inference.
        """
        assert not keep, "a packed weight has no backward pass"
        y, routing, _ = self._run(x, router, execution, layer)
        return self._split(y), routing

    def until(
        self, end: End, x: jax.Array, router: BoundRouter | None, execution: ExecutionConfig,
        layer: jax.Array | int = 0, keep: bool = False,
    ) -> tuple[jax.Array, Routing | None]:  # fmt: skip
        """As `LoRALinear.until`, in the launch behind the product where there is one."""
        assert not keep, "a packed weight has no backward pass"
        y, routing, done = self._run(x, router, execution, layer, end)
        return y if done else ended(self._split(y), end), routing

    def _run(
        self, x: jax.Array, router: BoundRouter | None, execution: ExecutionConfig, layer: jax.Array | int,
        end: End | None = None,
    ) -> tuple[jax.Array, Routing | None, bool]:  # fmt: skip
        """x [B, T, I] -> [B, T, O], and the routing; or, if the last is True, what a launch made of it to the end."""
        total, projections = sum(self.splits), len(self.splits)
        batch, tokens, _ = x.shape
        if self.lora_a is None or self.lora_b is None or self.lora_scale is None:
            y = self._with_bias(self._whole(self._base(x, layer, execution)))
            if router is None:
                return y, None, False
            if isinstance(router, Onlooker):
                return y, router.look(self, x, self._shrink), False
            nothing: GateLogits = KnownLogits(None)
            nothing = nothing if router.asks <= GATES else GroupScores.of(self, x, nothing, None)
            return y, router.route(x, nothing), False
        bank = LoraBank(self.lora_a[...], self.lora_b[...], self.lora_scale[...], self.splits)
        adapters, rank, _ = bank.b.shape
        first = packing.first_a_row(self.gate_columns)

        given = None if router is None or router.asks else router.known(None)
        requests = given is not None and (given.fused is not None or self._few_choices(given))
        if router is None or requests or isinstance(router, Onlooker):
            y = self._base(x, layer, execution)
            y = y if self.share == "inputs" else self._with_bias(y)
            if given is not None:
                y = routed_lora(x, bank, given, y, platform=execution.platform)
            y = self._with_bias(self._whole(y)) if self.share == "inputs" else y
            if isinstance(router, Onlooker):
                given = router.look(self, x, self._shrink)
            return y.astype(x.dtype), given, False

        few = batch * tokens <= FEW_ROWS
        if few and self.values is None:
            rows = self._rows(layer, 0, total + self.packed_rows)
            if self.share == "inputs":
                y = self._whole(einsum_float32(x.dtype, "bti,oi->bto", x, rows))
            else:
                y = contract("bti,oi->bto", x, rows, 1)
            y, product = y[..., :total], y[..., total:]
        else:
            y = self._whole(self._base(x, layer, execution))
            product = einsum_float32(x.dtype, "bti,ni->btn", x, self._rows(layer, self.base_rows, self.packed_rows))
            product = self._whole(product)
        y = self._with_bias(y).astype(x.dtype)
        product = product.astype(jnp.float32).reshape(batch, tokens, projections, -1)
        if router.gating is not None and execution.triton and not self.wide and batch * tokens <= MAX_TOKENS:
            flat = product.reshape(batch * tokens, -1), bank, router.gating.spread(tokens), y.reshape(-1, total)
            y, *chosen = topk_gated_lora(*flat, self.gate_columns)
            routing = Routing(*(z.reshape(batch, tokens, *z.shape[1:]) for z in chosen))
            return y.reshape(batch, tokens, total), routing, False
        shrunk = None
        if not self.wide:
            shrunk = product[..., first : first + adapters * rank].reshape(batch, tokens, projections, adapters, rank)
        gates: GateLogits = KnownLogits(product[..., : self.gate_columns])
        if not router.asks <= GATES:
            all_shrunk = self._shrink(x) if self.wide and router.asks & SHRUNK else shrunk
            gates = GroupScores.of(self, x, gates, all_shrunk)
        routing = router.route(x, gates)
        if self.wide or routing.fused is not None:
            implementation = choose_for_wide_bank(batch * tokens) if self.wide else None
            own = jnp.zeros_like(y) if self.share == "inputs" else y  # y is whole, x and its shrinks are not
            own = routed_lora(x, bank, routing, own, implementation=implementation, platform=execution.platform)
            y = y + self._whole(own) if self.share == "inputs" else own
        elif shrunk is not None and self._launches(batch * tokens, bank, routing, execution):
            indices, weights = (
                jnp.broadcast_to(z, (batch, tokens, *z.shape[2:])).reshape(batch * tokens, *z.shape[2:])
                for z in (routing.indices, routing.weights)
            )
            given = bank, indices, weights, shrunk.reshape(-1, *shrunk.shape[2:]), y.reshape(-1, total)
            if isinstance(end, str):
                out = silu_lora(*given)
            else:
                out = add_lora(*given, residual=None if end is None else end.reshape(-1, total))
            return out.reshape(batch, tokens, -1), routing, end is not None
        else:
            y = routed_lora(x, bank, routing, y, shrink=shrunk, platform=execution.platform)
        return y, routing, False

    def _shrink(self, x: jax.Array) -> jax.Array:
        """x [B, T, I] through every A, float32 [B, T, P, A, R]."""
        assert self.lora_a is not None
        return self._whole(shrink(x, self.lora_a[...]))

    def _whole(self, x: jax.Array) -> jax.Array:
        """A sum over the group's inputs, of all devices that hold a share of them."""
        return sum_shares(x) if self.share == "inputs" else x

    def _rows(self, layer: jax.Array | int, start: int, count: int) -> jax.Array:
        """Rows of the layer, in one slice of the stack: of a slice of a slice XLA makes a copy, 15 GB a prompt."""
        return layer_of(self.kernel[...], layer, start, count)

    def _base(self, x: jax.Array, layer: jax.Array | int, execution: ExecutionConfig) -> jax.Array:
        """x [B, T, I] through the base, without bias [B, T, O]."""
        weight = self.weight()
        if weight is None:
            return contract("bti,oi->bto", x, self._rows(layer, 0, self.base_rows), 1)
        weight = dataclasses.replace(weight, values=layer_of(weight.values, layer, 0, weight.values.shape[1]))
        many = execution.fp8_tokens is not None and x.shape[0] * x.shape[1] >= execution.fp8_tokens
        how = "xla_fp8" if many and weight.values.dtype == jnp.float8_e4m3fn else None
        return quantized_matmul(x, weight, implementation=how, block=cpu_block(x)).astype(x.dtype)

    def _few_choices(self, routing: Routing) -> bool:
        """Whether requests name fewer adapters than there are: only theirs are read then."""
        assert self.lora_scale is not None
        requests, choices = routing.indices.shape[0], routing.indices.shape[-1]
        return routing.per_request and requests * choices < self.lora_scale.shape[-1]

    def _launches(self, tokens: int, bank: LoraBank, routing: Routing, execution: ExecutionConfig) -> bool:
        """Whether one launch behind the base's product adapts so many tokens, and ends the group."""
        many = execution.epilogue_tokens is not None and tokens >= execution.epilogue_tokens
        return many and many_refusal(bank, routing.indices.shape[-1]) is None

    def _with_bias(self, y: jax.Array) -> jax.Array:
        return y if self.bias is None else y + self.bias[...].astype(y.dtype)[None, None, :]

    def _split(self, y: jax.Array) -> list[jax.Array]:
        starts = [sum(self.splits[:i]) for i in range(1, len(self.splits))]
        return list(jnp.split(y, starts, axis=-1))


def packed(linear: LoRALinear, by_token: bool, execution: ExecutionConfig, dtype: Any) -> LoRALinear | PackedLinear:
    """The group as inference on one device, or in its shares, reads it; itself where there is nothing to pack.

    by_token: whether tokens of this model are routed one by one, by gates here or by a token router. dtype: of the
    activations. DoRA and biases of adapters are left apart, and so is a wide bank without gates. A quantised kernel
    lies in words where Triton decodes.
    """
    if linear.lora_dora is not None or linear.lora_bias is not None:
        return linear
    if linear.kernel_scale is not None:
        zero = None if linear.kernel_zero is None else linear.kernel_zero[...]
        weight = QuantizedWeight(linear.kernel[...], linear.kernel_scale[...], zero)
        if execution.step is None or execution.shares or not word_block(weight.shape[0], weight.group):
            return linear
    if linear.lora_a is None:
        turns = linear.kernel_scale is not None and linear.gate is None
        return PackedLinear(linear, execution.dense_width, dtype) if turns else linear
    wide = linear.lora_a.shape[-3] * linear.lora_a.shape[-2] > execution.dense_width
    if linear.gate is None and (wide or not (by_token or execution.step is not None)):
        return linear
    return PackedLinear(linear, execution.dense_width, dtype)


def layer_of(stack: jax.Array, layer: jax.Array | int, start: int, count: int) -> jax.Array:
    """`count` rows of a layer of [L, O, I] from `start` on."""
    sizes = 1, count, stack.shape[2]
    return jax.lax.dynamic_slice(stack, (layer, start, 0), sizes, allow_negative_indices=False)[0]


def turn_layers(values: jax.Array, group: int, back: bool = False) -> jax.Array:
    """A stack of quantised values, turned as `quantized_matmul.weight` says, or turned back; a layer at a time."""
    layers, rows, columns = values.shape
    out = jnp.zeros((layers, columns, rows), values.dtype)
    for layer in range(values.shape[0]):
        out = _put_changed(out, values, layer, group=group, back=back)
    return out


@functools.partial(jax.jit, donate_argnames="out", static_argnames=("group", "back"))
def _put_changed(out: jax.Array, values: jax.Array, layer: jax.Array | int, group: int, back: bool) -> jax.Array:
    changed = (turn_back if back else turn)(jax.lax.dynamic_index_in_dim(values, layer, keepdims=False), group)
    return jax.lax.dynamic_update_index_in_dim(out, changed, layer, 0)


def lies_on(kernel: jax.Array, axes: Sequence[str | None], shape: Sequence[int]) -> NamedSharding | None:
    """Where an array of these axes goes on the mesh that holds the kernel; None without one."""
    if isinstance(kernel, Tracer) or not isinstance(kernel.sharding, NamedSharding):
        return None
    mesh = kernel.sharding.mesh
    return sharding(mesh, axes, shape) if isinstance(mesh, Mesh) else None


def stack_rows(
    kernel: jax.Array, behind: jax.Array, sides: Sequence[str] = ("model", "inner"), shards: int = 1
) -> jax.Array:
    """kernel [L, I, O], its sides named for meteora_jax.sharding, as rows, and behind [L, P, N, I] after them: [L, O +
    P N, I]; of each of `shards` parts of O, side by side: [L, S (O / S + P N), I]."""
    rows = behind.reshape(behind.shape[0], 1, -1, behind.shape[-1]).astype(kernel.dtype)
    count = kernel.shape[2] + shards * rows.shape[2]
    where = lies_on(kernel, (None, *sides[::-1]), (kernel.shape[0], count, kernel.shape[1]))

    @functools.partial(jax.jit, out_shardings=where)
    def begin(rows: jax.Array) -> jax.Array:
        rows = jnp.pad(jnp.repeat(rows, shards, axis=1), ((0, 0), (0, 0), (kernel.shape[2] // shards, 0), (0, 0)))
        return rows.reshape(len(rows), -1, rows.shape[-1])

    stack = begin(rows)
    for layer in range(kernel.shape[0]):  # a stack turned in one program would need its memory once more
        stack = _put_turned(stack, kernel, layer, shards=shards)
    return stack


@functools.partial(jax.jit, donate_argnames="rows", static_argnames="shards")
def _put_turned(rows: jax.Array, kernel: jax.Array, layer: jax.Array | int, shards: int) -> jax.Array:
    turned = jax.lax.dynamic_index_in_dim(kernel, layer).swapaxes(1, 2)
    parts = rows.reshape(len(rows), shards, -1, rows.shape[-1])
    turned = turned.reshape(1, shards, -1, rows.shape[-1])
    return jax.lax.dynamic_update_slice(parts, turned, (layer, 0, 0, 0)).reshape(rows.shape)
