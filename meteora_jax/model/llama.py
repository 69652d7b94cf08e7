"""LLaMA in Flax NNX: one layer body for training, prefill and decode; layers stacked and scanned."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from meteora_jax.bank import BaseParam
from meteora_jax.config import GROUPS, BankConfig, LlamaConfig
from meteora_jax.execution import ExecutionConfig
from meteora_jax.model.attention import How, attend
from meteora_jax.model.decoding import refusal, run_step
from meteora_jax.model.lora_linear import LoRALinear, quantized
from meteora_jax.model.packed_linear import PackedKernel, PackedLinear
from meteora_jax.model.paged_cache import PagedCache
from meteora_jax.model.rope import rotate, rotation
from meteora_jax.model.shares import run_shares
from meteora_jax.model.vocab_adapters import VocabAdapters, check_request_routing
from meteora_jax.numerics import contract, matmul_precision
from meteora_jax.routing import BoundRouter, Routing
from meteora_jax.sharding import constrain, partitioned_mesh, partitions
from pallas_kernels.paged_attention import EMPTY, StepTokens
from pallas_kernels.paged_attention.api import choose as choose_attention
from pallas_kernels.quantized_matmul.weight import in_words
from pallas_kernels.routed_lora.reference import KEPT

# What leaves a layer beside its output: called with the routing of each group that routed, in GROUPS order.
Observer = Callable[[tuple[Routing, ...]], Any]


class RmsNorm(nnx.Module):
    """x / rms(x) * scale, in float32."""

    def __init__(self, width: int, eps: float, dtype: Any):
        self.scale = BaseParam(jnp.ones((width,), dtype), axes=(None,))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        return y.astype(x.dtype) * jnp.expand_dims(self.scale[...], tuple(range(x.ndim - 1)))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Where:
    """What every layer shares about the tokens of a call: rotary angles [B, T, 1, H/2]; of whole sequences mask bool
    [B, 1, T, T] and `attend`'s `how`; of a step of the engine its tokens and their slots int32 [M]; execution: the
    model's; keep: products stay for the backward pass."""

    cos: Any
    sin: Any
    mask: Any
    step: StepTokens | None
    slots: Any
    execution: ExecutionConfig = dataclasses.field(metadata={"static": True})
    how: Any = dataclasses.field(default=None, metadata={"static": True})
    keep: bool = dataclasses.field(default=False, metadata={"static": True})


class Layer(nnx.Module):
    """One transformer layer."""

    def __init__(self, config: LlamaConfig, bank: BankConfig | None, gate_columns: int, dtype: Any, rngs: nnx.Rngs):
        self.config = config
        norm = config.hidden_size, config.rms_norm_eps, dtype
        self.attention_norm, self.mlp_norm = RmsNorm(*norm), RmsNorm(*norm)
        head_norm = config.head_dim, config.rms_norm_eps, dtype
        self.q_norm, self.k_norm = (RmsNorm(*head_norm) if config.qk_norm else None for _ in "qk")
        self.qkv, self.o, self.gate_up, self.down = (
            LoRALinear(config, group, bank, gate_columns, dtype, rngs) for group in GROUPS
        )

    def __call__(
        self,
        x: jax.Array,
        where: Where,
        cache: PagedCache | None,
        index: jax.Array,
        router: BoundRouter | None,
    ) -> tuple[jax.Array, PagedCache | None, tuple[Routing, ...]]:
        """x [B, T, D] -> x, the cache with this layer's keys and values, the routing of each group."""
        width = self.config.head_dim
        (q, k, v), r_qkv = self.qkv(self.attention_norm(x), router, where.execution, index, where.keep)
        q, k, v = (constrain(y.reshape(*y.shape[:2], -1, width), "batch", None, "heads", None) for y in (q, k, v))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, where.cos, where.sin), rotate(k, where.cos, where.sin)
        if cache is None or where.step is None:
            y = attend(q, k, v, where.mask, where.how)
        else:
            cache = cache.write(index, k[:, 0], v[:, 0], where.slots)
            window, execution = self.config.sliding_window, where.execution
            heads = q.shape[2], k.shape[2], width, cache.pages.dtype
            how = choose_attention(execution.platform, execution.kernels and not partitions(), *heads, window)
            y = cache.attend(index, q[:, 0], where.step, window, how)[:, None]
        x, r_o = self.o.until(x, y, router, where.execution, index, where.keep)
        hidden, r_gate_up = self.gate_up.until("silu", self.mlp_norm(x), router, where.execution, index, where.keep)
        # down's is added to the residual stream and to nothing else: no backward pass reads it
        x, r_down = self.down.until(x, hidden, router, where.execution, index)
        return x, cache, tuple(r for r in (r_qkv, r_o, r_gate_up, r_down) if r is not None)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LlamaOutput:
    """hidden [B, T, D] after the last norm; the cache; what the observer returned, stacked over layers."""

    hidden: Any
    cache: Any
    observed: Any


class Llama(nnx.Module):
    """A LLaMA-family decoder with room for a bank of adapters and their gates."""

    def __init__(
        self,
        config: LlamaConfig,
        bank: BankConfig | None = None,
        gate_columns: int = 0,
        dtype: Any = jnp.float32,
        *,
        rngs: nnx.Rngs,
        execution: ExecutionConfig | None = None,
    ):
        """gate_columns: of the gates at every projection, one an adapter and any for the null choice; 0: no gates."""
        self.config, self.has_gates = config, gate_columns > 0
        self.execution = ExecutionConfig.here(dtype) if execution is None else execution
        self.adapters = len(bank.names) if bank else 0
        init = nnx.initializers.normal(0.02)
        shape = config.vocab_size, config.hidden_size
        ends = {} if config.quantization is None else config.quantization.vocab_parts(*shape)

        def vocab_matrix(name: str, shape: tuple[int, int], *axes: str) -> tuple[BaseParam, BaseParam | None]:
            """A matrix and, where it is quantised, the scale of each token."""
            if name not in ends:
                return BaseParam(init(rngs.params(), shape, dtype), axes=axes), None
            values, scale = (jnp.zeros(*ends[key]) for key in (name, f"{name}_scale"))
            return BaseParam(values, axes=axes), BaseParam(scale, axes=("vocab",))

        self.embed, self.embed_scale = vocab_matrix("embed.embedding", shape, "vocab", "model")

        @nnx.split_rngs(splits=config.num_layers)
        @nnx.vmap(transform_metadata={nnx.PARTITION_NAME: None})
        def stack(rngs: nnx.Rngs) -> Layer:
            return Layer(config, bank, gate_columns, dtype, rngs)

        self.layers = stack(rngs)
        self.norm = RmsNorm(config.hidden_size, config.rms_norm_eps, dtype)
        head = None, None
        if not config.tie_word_embeddings:
            head = vocab_matrix("lm_head.kernel", (shape[1], shape[0]), "model", "vocab")
        self.lm_head, self.lm_head_scale = head
        self.head_words = False  # whether the quantised matrix of the logits lies in words [V, D], see `pack`
        self.vocab_adapter_names = bank.vocab_adapter_names if bank is not None else ()
        self.gates_leave_vocab = False  # whether gates know none of these, so that a choice by token is not refused
        adapted = bank.vocab_adapters if bank is not None else {}
        self.embed_adapters, self.head_adapters = (
            VocabAdapters(bank, end, dtype) if bank is not None and end in adapted else None
            for end in ("embed", "head")
        )

    @property
    def dtype(self) -> Any:
        """Of activations, and of all weights that are not quantised."""
        return self.norm.scale.dtype

    def embedded(self, tokens: jax.Array) -> jax.Array:
        """Tokens int32 [B, T] -> their rows of the embedding [B, T, D]."""
        x = self.embed[...][tokens]
        if self.embed_scale is None:
            return x
        x = in_words(x, 0, back=True) if self.head_words and self.lm_head is None else x
        return (x.astype(jnp.float32) * self.embed_scale[...][tokens][..., None]).astype(self.dtype)

    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        router: BoundRouter | None = None,
        *,
        cache: Any = None,
        step: StepTokens | None = None,
        segments: jax.Array | None = None,
        observe: Observer | None = None,
        remat: bool | Literal["dots"] = False,
    ) -> LlamaOutput:
        """Runs the layers.

        Args:
            tokens: int32 [B, T]. positions: int32 [B, T], each token's place in its own sequence, EMPTY for
                padding, which nobody attends to.
            router: who chooses the adapters; a Routing [B, T, 1, C] is the same for all layers.
            cache: read and extended; then T is 1, each of the B tokens stands where `step` says, and a router's first
                axis is that of tokens. Without a cache a row is whole sequences.
            segments: int32 [B, T] for packed sequences (no cache): a token sees its own segment only.
            observe: see `Observer`; its result is stacked, layers first.
            remat: recompute each layer in the backward pass instead of keeping its activations; "dots" keeps what its
                products gave, once their updates are added: all matmuls then run once, attention twice.
        """
        with matmul_precision(self.dtype):
            return self._run(tokens, positions, router, cache, step, segments, observe, remat)

    def _run(self, tokens, positions, router, cache, step, segments, observe, remat) -> LlamaOutput:
        mask, how = self.visible(positions, segments) if step is None else (None, None)
        slots = None if step is None else step.slots(cache.block_size)
        angles = rotation(self.config, positions, None if step is None else step.lengths())
        where = Where(*angles, mask, step, slots, self.execution, how, remat == "dots")
        known = None if router is None else router.known(positions)
        router = router if known is None else known
        x = self.embedded(tokens)
        acting = self._vocab_routing(router)
        if acting is not None and self.embed_adapters is not None:
            x = self.embed_adapters.embed(x, tokens, acting)
        x = constrain(x, "batch", None, None)
        run = functools.partial(run_layers, observe=observe, remat=remat)
        given = self.layers, self.config, x, where, cache, router
        x, cache, observed = run_shares(*given, run) if self._has_shares(step is not None) else run(*given)
        return LlamaOutput(self.norm(x), cache, observed)

    def prepare(self) -> None:
        """Makes what all steps of a program share: nothing here."""

    def _has_shares(self, step: bool) -> bool:
        """Whether each device of `use_mesh`'s mesh runs its share of the layers: steps of a mesh without a data axis,
        whose rows share one cache, and all that packed weights serve."""
        mesh = partitioned_mesh()
        if mesh is None or mesh.size == 1 or not self.execution.shares:
            return False
        packed = any(isinstance(getattr(self.layers, group), PackedLinear) for group in GROUPS)
        return packed or (step and mesh.shape["data"] == 1)

    def new_cache(self, blocks: int, block_size: int) -> Any:
        """An empty cache of so many blocks of so many slots, as `__call__` takes it."""
        config = self.config
        heads = config.num_kv_heads, config.head_dim
        return PagedCache.create(config.num_layers, blocks, block_size, *heads, self.dtype)

    def visible(self, positions: jax.Array, segments: jax.Array | None) -> tuple[jax.Array, How | None]:
        """Which tokens of whole sequences see which, bool [B, 1, T, T], and `attend`'s `how`."""
        keys = positions[:, None, :]
        mask = (keys != EMPTY) & (keys <= positions[:, :, None])  # [B, T, T]
        if self.config.sliding_window is not None:
            mask &= keys > positions[:, :, None] - self.config.sliding_window
        if segments is not None:
            mask &= segments[:, None, :] == segments[:, :, None]
        known = self.config.head_dim % 8 == 0 and self.config.head_dim <= 128  # to cuDNN
        if segments is None:
            return mask[:, None], "parts"
        if not known or "packed" not in self.execution.fused_attention:
            return mask[:, None], None
        mask |= (positions == EMPTY)[:, :, None]  # a row of padding that sees nobody has no softmax
        return mask[:, None], "packed"

    def _vocab_routing(self, router: BoundRouter | None) -> Routing | None:
        """What acts at embedding and head; None where no adapter of the bank, or no router, does."""
        if router is None or not self.vocab_adapter_names:
            return None
        known = router.known(None)
        if self.gates_leave_vocab and (known is None or known.indices.shape[1] != 1):
            return None
        return check_request_routing(known, self.vocab_adapter_names)

    def logits(self, hidden: jax.Array, router: BoundRouter | None) -> jax.Array:
        """Next-token logits float32 [B, V] or [B, T, V] of hidden [B, D] or [B, T, D], with the call's own router."""
        with matmul_precision(hidden.dtype):
            plain = self._plain_logits(hidden).astype(jnp.float32)
            acting = self._vocab_routing(router)
            if acting is None or self.head_adapters is None:
                return plain
            if hidden.ndim == 2:
                return self.head_adapters.logits(plain[:, None], hidden[:, None], acting)[:, 0]
            return self.head_adapters.logits(plain, hidden, acting)

    def _plain_logits(self, hidden: jax.Array) -> jax.Array:
        """The base's, of hidden [.., D]."""
        few = self.execution.step if hidden.ndim == 2 else None
        if self.lm_head is None and self.embed_scale is not None:
            return quantized(hidden, self.embed, self.embed_scale, turned=True, words=self.head_words, step=few)
        if self.lm_head is None:
            return contract("...d,vd->...v", hidden, self.embed[...], 1)
        if self.lm_head_scale is not None:
            words = self.head_words
            return quantized(hidden, self.lm_head, self.lm_head_scale, turned=words, words=words, step=few)
        return contract("...d,dv->...v", hidden, self.lm_head[...], 0)


def run_layers(
    layers: Any, config: LlamaConfig, x: jax.Array, where: Where, cache: PagedCache | None, router: BoundRouter | None,
    *, observe: Observer | None, remat: bool | Literal["dots"],
) -> tuple[jax.Array, PagedCache | None, Any]:  # fmt: skip
    """x [B, T, D] through all layers: a step by the kernels where they serve it, else by XLA; with the cache, and what
    the observer returned."""
    step, execution = where.step, where.execution
    launch = step is not None and not partitions() and refusal(layers, config, router, x.shape[0], execution) is None
    if step is not None and launch:
        cos, sin = (jnp.broadcast_to(z[:, 0, 0], (x.shape[0], z.shape[-1])) for z in (where.cos, where.sin))
        assert cache is not None
        x, cache, routings = run_step(layers, config, x[:, 0], (cos, sin), cache, step, router, execution)
        return x[:, None], cache, None if observe is None else jax.vmap(observe)(routings)
    graph, whole, weights = nnx.split(layers, PackedKernel, ...)

    def body(carry: tuple[jax.Array, jax.Array, PagedCache | None], own: Any):
        index, x, cache = carry
        x, cache, routings = nnx.merge(graph, whole, own)(x, where, cache, index, router)
        return (index + 1, x, cache), None if observe is None else observe(routings)

    policy = jax.checkpoint_policies.save_only_these_names(KEPT) if remat == "dots" else None
    body = jax.checkpoint(body, policy=policy) if remat else body
    # carried, not scanned over: only of a loop's own counter does XLA know where a slice lies
    (_, x, cache), observed = jax.lax.scan(body, (jnp.zeros((), jnp.int32), x, cache), weights)
    return x, cache, observed
