"""Adapters at the two ends of the model: where token ids become vectors (embed) and vectors become logits (head).

No gate stands at an end, so what an adapter changes there follows the request: it acts with the weight that the
request's router (`Fixed`, a retrieval) gives the adapter, for all its tokens. With matrices A, B and retrained rows

    embed   e(t) = E[t] + sum_c w_c (s_c A_c[:, t] B_c + (rows_c[t] - E[t] where adapter c retrained t))
    head    z_t  = h W[:, t] + sum_c w_c (s_c (h A_c) B_c[:, t] + (h rows_c[t] - h W[:, t] where it retrained t))

fused requests average the matrices A and B first, as everywhere else. Sources: peft's `lora.Embedding`, `lora.Linear`
and `TrainableTokensLayer` for one adapter of weight 1.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from meteora_jax.bank import AdapterBank, AdapterConstant, AdapterParam
from meteora_jax.config import BankConfig, InputError
from meteora_jax.routing import Routing
from pallas_kernels.routed_lora import LoraBank, routed_lora
from pallas_kernels.routed_lora.reference import einsum_float32
from pallas_kernels.routed_lora.xla import gathered_expand


class VocabAdapters(nnx.Module):
    """What a bank's adapters change at one end.

    lora_a [A, V, R] at embed and [A, R, D] at head, lora_b [A, R, D or V], lora_scale float32 [A]; rows [A, n, D] and
    their token ids int32 [A, n], V where an adapter retrained fewer. What no adapter has is None.
    """

    def __init__(self, bank: BankConfig, end: str, dtype: Any):
        assert bank.vocab_shape is not None, "a bank with ends knows their shape"
        (vocab, width), held, count = bank.vocab_shape, bank.vocab_adapters[end], len(bank.names)
        embed, rank = end == "embed", held.rank
        a_shape, a_axes = ((vocab, rank), ("vocab", None)) if embed else ((rank, width), (None, "model"))

        def zeros(kind, shape, axes, dtype):
            return kind(jnp.zeros((count, *shape), dtype), axes=(None, *axes))

        self.lora_a = zeros(AdapterParam, a_shape, a_axes, dtype) if rank else None
        b_shape, b_axes = ((rank, width), (None, "model")) if embed else ((rank, vocab), (None, "vocab"))
        self.lora_b = zeros(AdapterParam, b_shape, b_axes, dtype) if rank else None
        self.lora_scale = zeros(AdapterConstant, (), (), jnp.float32) if rank else None
        most = held.most
        self.rows = zeros(AdapterConstant, (most, width), (None, "model"), dtype) if most else None
        self.ids = zeros(AdapterConstant, (most,), (None,), jnp.int32) if most else None

    def embed(self, x: jax.Array, tokens: jax.Array, routing: Routing) -> jax.Array:
        """x [B, T, D], the base's embedding of tokens int32 [B, T] -> the adapted one."""
        chosen, weights = _chosen(routing)
        y = x.astype(jnp.float32)
        if self.rows is not None and self.ids is not None:
            mine = self.ids[...][chosen][:, None] == tokens[:, :, None, None]  # [B, T, C, n]
            share = jnp.where(mine, weights[:, None, :, None], 0.0)
            rows = self.rows[...][chosen].astype(jnp.float32)
            y *= 1 - jnp.sum(share, axis=(2, 3))[..., None]  # a row that takes the base's place takes all of it
            y += einsum_float32(share.dtype, "btcn,bcnd->btd", share, rows)
        if self.lora_a is not None and self.lora_b is not None and self.lora_scale is not None:
            h = self.lora_a[...][chosen[:, None], tokens[:, :, None]].astype(jnp.float32)[:, :, None]  # a look-up
            scale = self.lora_scale[...][chosen][:, None]
            b, fused, splits = self.lora_b[...], routing.fused, y.shape[-1:]
            y = gathered_expand(h, b, chosen[:, None], weights[:, None, None], scale, fused, y, splits, routing.runs)
        return y.astype(x.dtype)

    def logits(self, plain: jax.Array, hidden: jax.Array, routing: Routing) -> jax.Array:
        """plain float32 [B, T, V], the base's logits of hidden [B, T, D] -> the adapted ones."""
        chosen, weights = _chosen(routing)
        y = plain
        if self.lora_a is not None and self.lora_b is not None and self.lora_scale is not None:
            bank = LoraBank(self.lora_a[...][None], self.lora_b[...], self.lora_scale[...][None], y.shape[-1:])
            request = dataclasses.replace(routing, weights=weights[:, None, None])
            y = routed_lora(hidden, bank, request, y, implementation="gathered")
        if self.rows is not None and self.ids is not None:
            ids = self.ids[...][chosen]  # [B, C, n]
            base = jnp.take_along_axis(plain, ids.reshape(len(ids), 1, -1), axis=2, mode="clip")
            own = einsum_float32(hidden.dtype, "btd,bcnd->btcn", hidden, self.rows[...][chosen])
            change = weights[:, None, :, None] * (own - base.reshape(own.shape))
            batch, steps = jnp.arange(plain.shape[0]), jnp.arange(plain.shape[1])
            at = batch[:, None, None, None], steps[None, :, None, None], ids[:, None]
            y = y.at[at].add(change, mode="drop")  # id V, the padding, is no token
        return y


def _chosen(routing: Routing) -> tuple[jax.Array, jax.Array]:
    """Indices int32 and weights float32 [B, C] of the requests; NO_ADAPTER's weight is 0."""
    return jnp.maximum(routing.indices[:, 0, 0], 0), routing.weights[:, 0, 0]


def check_request_routing(routing: Routing | None, names: tuple[str, ...]) -> Routing:
    """The one choice of each request, which the adapters `names` follow; routing: what is known before any layer.

    Raises:
        InputError: a router that chooses for every token, beside adapters that act where no gate stands.
    """
    if routing is None or routing.indices.shape[1] != 1:
        raise InputError(
            f"router: expected one that names the adapters of a request (Fixed, Retrieval): {', '.join(names)} "
            "change the embedding or the head, where no gate stands; found one that chooses for every token"
        )
    return routing


def vocab_tensors(bank: AdapterBank, end: str) -> dict[str, np.ndarray]:
    """What a `VocabAdapters` holds, of a bank whose adapters change this end; empty if none does."""
    if end not in bank.vocab_adapters:
        return {}
    assert bank.config.vocab_shape is not None, "a bank with ends knows their shape"
    held, tokens = bank.vocab_adapters[end], bank.config.vocab_adapters[end].tokens
    tensors = {}
    if "a" in held:
        a = held["a"].swapaxes(1, 2) if end == "embed" else held["a"]  # a token's column is read as a row
        tensors = {"lora_a": a, "lora_b": held["b"], "lora_scale": np.asarray(held["scale"], np.float32)}
    if "rows" in held:
        ids = np.full(held["rows"].shape[:2], bank.config.vocab_shape[0], np.int32)
        for i, mine in enumerate(tokens):
            ids[i, : len(mine)] = mine
        tensors |= {"rows": held["rows"], "ids": ids}
    return tensors
