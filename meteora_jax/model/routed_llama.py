"""A LLaMA with a token router beside it, whose state is its own and whose choice is all that the model sees."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
from flax import nnx

from meteora_jax.config import BankConfig, LlamaConfig
from meteora_jax.execution import ExecutionConfig
from meteora_jax.gate_config import TokenRouterForm
from meteora_jax.model.kv_cache import KVCache
from meteora_jax.model.llama import Llama, LlamaOutput, Observer
from meteora_jax.numerics import matmul_precision
from meteora_jax.routing import BoundRouter
from meteora_jax.routing.token_router import Hop, TokenRouter, choose


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RoutedCache:
    """The model's cache, and keys and values [depth + 4, B, S, E / 32, 32] of the token router in the same slots."""

    model: Any
    keys: Any
    values: Any


class RoutedLlama(Llama):
    """Routers that take part in each token's choice are given the token router's logits, once, on the embeddings; the
    layers then get their routing. Others, which name the adapters of a request, go past it."""

    def __init__(
        self,
        config: LlamaConfig,
        bank: BankConfig,
        dtype: Any,
        *,
        rngs: nnx.Rngs,
        form: TokenRouterForm,
        columns: int,
        execution: ExecutionConfig | None = None,
    ):
        """columns: of the token router's logits, one an adapter and any for the null choice."""
        super().__init__(config, bank, dtype=dtype, rngs=rngs, execution=execution)
        self.has_gates = True
        self.token_router = TokenRouter(config.hidden_size, form, columns)

    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        router: BoundRouter | None = None,
        *,
        cache: Any = None,
        fresh: bool = False,
        segments: jax.Array | None = None,
        observe: Observer | None = None,
        remat: bool | Literal["dots"] = False,
    ) -> LlamaOutput:
        """As `Llama.__call__`; the cache of a fresh call is a `KVCache`, and that of later ones what it returned."""
        run = super().__call__
        how: dict[str, Any] = dict(fresh=fresh, segments=segments, observe=observe, remat=remat)
        if router is None or router.known(positions) is not None:
            return run(tokens, positions, router, cache=cache, **how)
        self._vocab_routing(router)  # refuses a choice by token where adapters change the embedding or the head
        held, own = cache, None
        if cache is not None:
            if isinstance(cache, RoutedCache):
                held = cache.model
                own = KVCache(cache.keys, cache.values, held.positions, held.length)
            else:
                own = self.token_router.new_cache(held)
            own = own.claim(positions)
        with matmul_precision(self.embed.dtype):
            mask, fused = self.visible(positions, own, fresh, segments)
            x = self.embed[...][tokens]
            hops, own = self.token_router(x, positions, mask, fused, own, fresh)
            routing = choose(router, x, hops[-1].logits)
        out = run(tokens, positions, routing, cache=held, **how)
        return out if own is None else dataclasses.replace(out, cache=RoutedCache(out.cache, own.keys, own.values))

    def hops(self, tokens: jax.Array, positions: jax.Array, segments: jax.Array) -> tuple[Hop, Hop]:
        """Both hops of the token router in packed sequences; no layer of the model runs."""
        with matmul_precision(self.embed.dtype):
            mask, fused = self.visible(positions, None, False, segments)
            x = self.embed[...][tokens]
            return self.token_router(x, positions, mask, fused, None, False)[0]


def gated_llama(
    config: LlamaConfig, bank: BankConfig, form: TokenRouterForm | None, dtype: Any, rngs: nnx.Rngs,
    execution: ExecutionConfig | None = None, null: bool = False, known: int | None = None,
) -> Llama:  # fmt: skip
    """A model with a bank and gates of that form (None: MeteoRA's own, at every projection), as `Llama` has it.

    null: whether the gates have a column for no adapter. known: of the bank's adapters the first so many have a column;
    None: all.
    """
    columns = (len(bank.names) if known is None else known) + null
    if form is None:
        return Llama(config, bank, columns, dtype=dtype, rngs=rngs, execution=execution)
    return RoutedLlama(config, bank, dtype, rngs=rngs, form=form, columns=columns, execution=execution)
