"""The bank of adapters, and the linear map that carries a base kernel, its adapters and its gates."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from meteora_jax.config import GROUPS, BankConfig, LlamaConfig
from meteora_jax.execution import ExecutionConfig
from meteora_jax.routing import BoundRouter, Routing
from meteora_jax.routing.gates import BoundGates, GateParam, ProjectionGates
from meteora_jax.sharding import constrain, splits_inner
from pallas_kernels.routed_lora import add_routed_lora, gated, routed_lora
from pallas_kernels.routed_lora.reference import FEW_ROWS, KEPT, Expand, add_expanded, einsum_float32, shrink


class BaseParam(nnx.Param):
    """A weight of the base model."""


class JoinedKernel(BaseParam):
    """A kernel of `AdaptedLinear.prepare(joined=True)`, which keeps the axis of layers where layers are scanned."""


class AdapterParam(nnx.Param):
    """A weight of the adapters."""


class AdapterConstant(nnx.Param):
    """What of the adapters nobody trains: scales (alpha over rank), DoRA's columns, biases."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AdapterBank:
    """All adapters of one base, stacked: zero-padded to a common rank, scale 0 where an adapter has no part.

    a: {projection: [L, A, R, I]}, b: {projection: [L, A, R, O]}, scale: {projection: float32 [L, A]}.
    `a` keeps PEFT's row order: the shrink then reads it along I whether it is dense over the adapters or
    gathers the chosen ones. Where an adapter has them, dora {projection: float32 [L, A, O]} is what its magnitudes make
    of each output column less 1, and bias {projection: [L, A, O]} belongs to its `b`. The arrays are the host's; a
    model's are put on its devices.
    """

    a: dict[str, Any]
    b: dict[str, Any]
    scale: dict[str, Any]
    config: BankConfig = dataclasses.field(metadata={"static": True})
    dora: dict[str, Any] = dataclasses.field(default_factory=dict)
    bias: dict[str, Any] = dataclasses.field(default_factory=dict)
    vocab_adapters: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)  # see model.vocab_adapters

    @property
    def names(self) -> tuple[str, ...]:
        return self.config.names

    def group(self, group: str) -> dict[str, np.ndarray] | None:
        """A group's tensors as `AdaptedLinear` holds them; None if no adapter touches the group.

        lora_a [L, P, A, R, I], lora_b [L, A, R, O of the group], lora_scale float32 [L, P, A]; lora_dora and lora_bias
        float32 [L, A, O of the group] where an adapter has them. DoRA's columns are folded into lora_b.
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
                a.append(np.zeros((n, count, rank, i), dtype))
                b.append(np.zeros((n, count, rank, o), dtype))
                scale.append(np.zeros((n, count), np.float32))
                continue
            pad = [(0, 0), (0, 0), (0, rank - self.a[p].shape[2]), (0, 0)]
            a.append(np.pad(self.a[p], pad))
            b.append(np.pad(self._scaled_b(p), pad))
            scale.append(np.asarray(self.scale[p], np.float32))
        tensors = {"lora_a": np.stack(a, 1), "lora_b": np.concatenate(b, -1), "lora_scale": np.stack(scale, 1)}
        for key, held in (("lora_dora", self.dora), ("lora_bias", self.bias)):
            if any(p in held for p in projections):
                zeros = lambda p: np.zeros((n, count, self.config.base_shapes[p][1]), np.float32)  # noqa: E731
                columns = [held[p].astype(np.float32) if p in held else zeros(p) for p in projections]
                tensors[key] = np.concatenate(columns, -1)
        return tensors

    def _scaled_b(self, p: str) -> np.ndarray:
        b = self.b[p]
        if p not in self.dora:
            return b
        return (b.astype(np.float32) * (1 + self.dora[p][:, :, None, :])).astype(b.dtype)


def group_rank(bank: BankConfig | None, group: str) -> int:
    """R of a group's stacked adapters; 0 if no adapter touches it."""
    return 0 if bank is None else max((bank.ranks.get(p, 0) for p in GROUPS[group]), default=0)


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


def add_update(
    y: jax.Array, x: jax.Array, a: jax.Array, b: jax.Array, scale: jax.Array, routing: Routing,
    splits: tuple[int, ...], every: bool = False, expand: Expand = "reference",
) -> jax.Array:  # fmt: skip
    """y [B, T, O] + what the routed adapters add to it, in y's dtype; a, b, scale as in `AdaptedLinear`.

    every: shrink by every adapter, whichever the routing chose. expand: of `ExecutionConfig`.
    """
    requests, choices = routing.indices.shape[0], routing.indices.shape[-1]
    # a batch whose requests name as many adapters as there are reads every one of them once
    dense = every or not routing.per_request or requests * choices >= scale.shape[1]
    if routing.fused is not None or not dense or (y.dtype == jnp.float32 and not every):
        return (y.astype(jnp.float32) + routed_update(x, a, b, scale, routing, splits)).astype(y.dtype)
    h = shrink(x, a, routing.dense(scale.shape[1]) * scale[None, None])
    return add_expanded(y, h, b, splits, expand)


def routed_update(
    x: jax.Array, a: jax.Array, b: jax.Array, scale: jax.Array, routing: Routing, splits: tuple[int, ...]
) -> jax.Array:
    """What the routed adapters add to a group's output, float32 [B, T, O]; a, b, scale as in `AdaptedLinear`."""
    chosen = (routing.indices[:, 0, 0], routing.weights[:, :, 0])
    if routing.per_request:  # nothing here may grow with the bank
        return request_lora(x, a, b, scale, *chosen, routing.fused, splits)
    combine = routing.dense(scale.shape[1]) * scale[None, None]
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

    Source: LoraRetriever (arXiv 2402.09997), section 3.3. indices int32 [B, C], weights float32 [B, T, C] (T may be 1);
    fused bool [B].
    """
    einsum = functools.partial(einsum_float32, x.dtype)
    chosen = jnp.maximum(indices, 0)  # NO_ADAPTER has weight 0
    h = einsum("bti,pbcri->btpcr", x, jnp.take(a, chosen, axis=1))
    scales = jnp.take(scale, chosen, axis=1).transpose(1, 0, 2)
    outer = (weights[:, :, None] * scales[:, None])[..., None]  # [B, T or 1, P, C, 1]
    if fused is not None:
        mean = jnp.sum(h * weights[:, :, None, :, None], axis=3, keepdims=True)
        h = jnp.where(fused[:, None, None, None, None], mean, h)
    h = (h * outer).astype(x.dtype)
    columns = jnp.take(b, chosen, axis=0)  # [B, C, R, O]
    starts = [sum(splits[:i]) for i in range(len(splits) + 1)]
    updates = [
        einsum("btcr,bcro->bto", h[:, :, p], columns[..., starts[p] : starts[p + 1]]) for p in range(len(splits))
    ]
    return jnp.concatenate(updates, axis=-1)


def _join(kernel: jax.Array, slim: jax.Array) -> jax.Array:
    """kernel [L, I, O] and slim [L, P, N, I] as rows, [L, O + P N, I]."""
    rows = slim.reshape(slim.shape[0], -1, slim.shape[-1]).astype(kernel.dtype)
    rows = jnp.pad(rows, ((0, 0), (kernel.shape[2], 0), (0, 0)))
    for layer in range(kernel.shape[0]):  # a stack turned in one program would need its memory once more
        rows = _put_turned(rows, kernel, layer)
    return rows


@functools.partial(jax.jit, donate_argnames="rows")
def _put_turned(rows: jax.Array, kernel: jax.Array, layer: jax.Array | int) -> jax.Array:
    turned = jax.lax.dynamic_index_in_dim(kernel, layer).swapaxes(1, 2)
    return jax.lax.dynamic_update_slice(rows, turned, (layer, 0, 0))


class AdaptedLinear(nnx.Module):
    """One projection group: the projections that read the same input, their adapters and their gates.

    kernel [I, O] holds the projections' columns side by side, so one matmul serves the group;
    lora_a [P, A, R, I], lora_b [A, R, O], lora_scale float32 [P, A]; gate float32 [I, P, A], None without gates here;
    lora_dora, lora_bias float32 [A, O], None where no adapter has any; slim [P, N, I], see `prepare`.
    joined: P N where the kernel is [L, O + P N, I] instead, gates and A's as rows behind its own; else 0.
    O's columns lie in `shards` parts of equal width, each with its share of every projection: `sharding.shard_order`.
    Parameters name their dimensions for meteora_jax.sharding: adapters and gate split as the kernel they sit on.
    """

    def __init__(
        self, config: LlamaConfig, group: str, bank: BankConfig | None, gates: bool, dtype: Any, rngs: nnx.Rngs
    ):
        shapes = [config.projection_shape(p) for p in GROUPS[group]]
        width, self.splits, self.shards = shapes[0][0], tuple(o for _, o in shapes), 1
        total, count, rank = sum(self.splits), len(self.splits), group_rank(bank, group)
        adapters = len(bank.names) if bank else 0
        init = nnx.initializers.normal(0.02)
        self.sides = i, o = GROUP_SIDES[group]
        self.kernel = BaseParam(init(rngs.params(), (width, total), dtype), axes=(i, o))
        # a projection without a bias in a group that has one does not occur in the family
        biased = config.projection_bias(GROUPS[group][0])
        self.bias = BaseParam(jnp.zeros((total,), dtype), axes=(o,)) if biased else None
        self.lora_a: AdapterParam | None = (
            AdapterParam(init(rngs.params(), (count, adapters, rank, width), dtype), axes=(None, None, None, i))
            if rank
            else None
        )
        self.lora_b = AdapterParam(jnp.zeros((adapters, rank, total), dtype), axes=(None, None, o)) if rank else None
        self.lora_scale = (
            AdapterConstant(jnp.zeros((count, adapters), jnp.float32), axes=(None, None)) if rank else None
        )
        columns = lambda: AdapterConstant(jnp.zeros((adapters, total), jnp.float32), axes=(None, o))  # noqa: E731
        self.lora_dora = columns() if bank and any(p in bank.dora for p in GROUPS[group]) else None
        self.lora_bias = columns() if bank and any(p in bank.lora_bias for p in GROUPS[group]) else None
        gate = jnp.zeros((width, count, adapters), jnp.float32) if gates else None
        self.gate = None if gate is None else GateParam(gate, axes=(i, None, None))
        self.slim: AdapterConstant | None = None
        self.joined = 0

    def prepare(self, joined: bool, by_token: bool, dense_width: int) -> None:
        """Keeps the gates, and the A's of a bank that is not too wide, as one matrix in A's dtype beside them.

        joined: as the last rows of a new kernel [L, O + P N, I] instead: one product serves a decoding step, and a
        prompt reads the first O rows, or the P N behind them, where they lie. by_token: whether tokens of this model
        are routed one by one, by gates here or by a token router. dense_width: of `ExecutionConfig`.

        For inference on one device, on layers as they are stacked. Nothing is kept, and gates and adapters stay apart,
        where DoRA or biases act.
        """
        if self.lora_a is None or self.lora_dora is not None or self.lora_bias is not None:
            return
        a = self.lora_a[...]
        layers, _, adapters, _, width = a.shape
        wide = adapters * a.shape[-2] > dense_width
        if self.gate is None and (wide or not (joined or by_token)):
            return
        shape = layers, width, len(self.splits), adapters
        gate = jnp.zeros(shape, a.dtype) if self.gate is None else self.gate[...]
        slim = jax.jit(jax.vmap(gated.slim_matrix))(gate, a[..., :0, :] if wide else a)
        if joined:
            self.joined = slim.shape[1] * slim.shape[2]
            self.kernel = JoinedKernel(_join(self.kernel[...], slim), axes=self.sides[::-1])
            return
        self.slim = nnx.data(AdapterConstant(slim, axes=(None, None, None)))  # was None, which NNX took for static

    def __call__(
        self,
        x: jax.Array,
        router: BoundRouter | Routing | None,
        execution: ExecutionConfig,
        layer: jax.Array | int = 0,
        keep: bool = False,
    ) -> tuple[list[jax.Array], Routing | None]:
        """x [B, T, I] -> each projection's [B, T, O_p], and the routing that acted (None: the bare base).

        layer: which one of a joined kernel. keep: the result is kept for the backward pass, see `remat="dots"`.
        """
        rows, total = x.shape[0] * x.shape[1], sum(self.splits)
        kernel, slim, made = self.kernel[...], None if self.slim is None else self.slim[...], None
        gates: BoundGates | Routing | None = None  # the router that slim serves
        if self.joined or slim is not None:
            if isinstance(router, BoundGates):
                gates = router if router.allowed is None else None
            elif isinstance(router, Routing):
                gates = router if router.fused is None else None

        def part(start: int, count: int) -> jax.Array:
            """Rows of the layer, in one slice of the stack: XLA copies a slice of a slice, 15 GB a prompt."""
            size = 1, count, x.shape[-1]
            return jax.lax.dynamic_slice(kernel, (layer, start, 0), size, allow_negative_indices=False)[0]

        # y, logits and shrinks of few tokens cross devices as one float32 sum: a second one would take as long again
        joined = self.sides[0] == "inner" and splits_inner(x.shape[-1]) and rows <= FEW_ROWS
        if self.joined and gates is not None and rows <= gated.TRITON_ROWS:
            plain = contract("bti,oi->bto", x, part(0, total + self.joined), 1)
            plain, made = plain[..., :total], plain[..., total:]
        elif self.joined:
            plain = contract("bti,oi->bto", x, part(0, total), 1)
            slim = part(total, self.joined).reshape(len(self.splits), -1, x.shape[-1])
        elif joined and x.dtype != jnp.float32:
            plain = einsum_float32(x.dtype, "bti,io->bto", x, kernel)
        else:
            plain = contract("bti,io->bto", x, kernel, 0)
        y = plain if self.bias is None else plain + self.bias[...].astype(plain.dtype)[None, None, :]
        routing = None
        if gates is not None:
            y, routing = self._gated(x, y, slim, made, gates, execution)
        elif router is not None:
            gate: Any = None if self.gate is None else ProjectionGates(self.gate[...])
            routing = router if isinstance(router, Routing) else router.route(x, gate)
            if self.lora_a is not None and self.lora_b is not None and self.lora_scale is not None:
                y = self._adapted(x, plain, y, routing, joined, execution)
        y = y.astype(x.dtype)
        if keep:
            # without the barrier XLA multiplies a second time, to write one of the results where it is kept
            y = checkpoint_name(jax.lax.optimization_barrier(y), KEPT)
        return self._split(y), routing

    def _adapted(
        self, x: jax.Array, plain: jax.Array, y: jax.Array, routing: Routing, joined: bool, execution: ExecutionConfig
    ) -> jax.Array:
        """y [B, T, O], the base's output, + what the routed adapters add; plain is y without the base's bias."""
        assert self.lora_a is not None
        assert self.lora_b is not None
        assert self.lora_scale is not None
        a, scale, splits = self.lora_a[...], self.lora_scale[...], tuple(o // self.shards for o in self.splits)
        every = joined and a.shape[1] * a.shape[2] <= execution.dense_width

        def part(plain: jax.Array, y: jax.Array, b: jax.Array, dora: Any, bias: Any) -> jax.Array:
            y = add_update(y, x, a, b, scale, routing, splits, every=every, expand=execution.expand)
            if dora is not None:
                more = by_column(routing.dense(scale.shape[1]), dora, splits) * plain.astype(jnp.float32)
                y = (y.astype(jnp.float32) + more).astype(y.dtype)
            if bias is not None:
                more = by_column(routing.dense(scale.shape[1]) * scale[None, None], bias, splits)
                y = (y.astype(jnp.float32) + more).astype(y.dtype)
            return y

        columns = self.lora_b[...], *(None if z is None else z[...] for z in (self.lora_dora, self.lora_bias))
        if self.shards == 1:
            return part(plain, y, *columns)
        cut = lambda z: z.reshape(*z.shape[:-1], self.shards, -1)  # noqa: E731
        parts = jax.tree.map(cut, (plain, y, *columns))
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

    def _gated(
        self, x: jax.Array, base: jax.Array, slim: Any, made: Any, router: BoundGates | Routing,
        execution: ExecutionConfig,
    ) -> tuple[jax.Array, Routing]:  # fmt: skip
        """base [B, T, O] + the update of tokens routed one by one, and the routing without its logits.

        slim: [P, N, I], or made: [B, T, P N], x times it, where the kernel's product has given that already.
        """
        assert self.lora_a is not None
        assert self.lora_b is not None
        assert self.lora_scale is not None
        a, b, scale = self.lora_a[...], self.lora_b[...], self.lora_scale[...]
        batch, length, _ = x.shape
        rows = batch * length
        flat = lambda z: z.reshape(rows, *z.shape[2:])  # noqa: E731
        wide = a.shape[1] * a.shape[2] > execution.dense_width
        made = None if made is None else flat(made).astype(jnp.float32).reshape(rows, len(self.splits), -1)
        if isinstance(router, Routing):
            chosen = flat(router.indices[:, :, 0]), flat(router.weights[:, :, 0])
            y = gated.chosen_lora(
                flat(x), slim, b, scale, *chosen, flat(base), self.splits, made=made,
                implementation=execution.expand,
            )  # fmt: skip
            return y.reshape(base.shape), dataclasses.replace(router, logits=None)
        by_row = lambda z: jnp.broadcast_to(z[:, None], (batch, length)).reshape(rows)  # noqa: E731
        choice = by_row(router.counts), by_row(router.temperatures)
        if not wide:
            y, *routing = gated.gated_lora(
                flat(x), slim, b, scale, *choice, flat(base), self.splits, router.max_k,
                implementation=execution.gated if rows <= gated.TRITON_ROWS else execution.expand, made=made,
            )  # fmt: skip
        else:
            if made is None:
                assert slim is not None
                made = einsum_float32(x.dtype, "mi,pni->mpn", flat(x), slim)
            routing = gated.choose_adapters(made[..., : scale.shape[1]], *choice, router.max_k)
            y = add_routed_lora(flat(x), a, b, *routing, scale, flat(base), self.splits)
        indices, weights = (z.reshape(batch, length, *z.shape[1:]) for z in routing)
        return y.reshape(base.shape), Routing(indices, weights)
