"""A LLaMA with a token router beside it, whose state is its own and whose choice is all that the model sees."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
from flax import nnx

from meteora_jax.config import BankConfig, LlamaConfig
from meteora_jax.execution import ExecutionConfig
from meteora_jax.gate_config import TokenRouterForm
from meteora_jax.model.llama import Llama, LlamaOutput, Observer
from meteora_jax.model.paged_cache import PagedCache
from meteora_jax.model.shares import run_alike
from meteora_jax.numerics import matmul_precision
from meteora_jax.routing import BoundRouter
from meteora_jax.routing.gates import GATES, KnownLogits
from meteora_jax.routing.token_router import Hop, RouterCache, Sight, TokenRouter, choose
from pallas_kernels.paged_attention import StepTokens


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RoutedCache:
    """The model's cache, and the token router's own in the same blocks."""

    model: PagedCache
    router: RouterCache

    @property
    def block_size(self) -> int:
        """Bs."""
        return self.model.block_size


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
        step: StepTokens | None = None,
        segments: jax.Array | None = None,
        observe: Observer | None = None,
        remat: bool | Literal["dots"] = False,
    ) -> LlamaOutput:
        """As `Llama.__call__`, with a `RoutedCache`."""
        run = super().__call__
        how: dict[str, Any] = dict(step=step, segments=segments, observe=observe, remat=remat)
        held = None if cache is None else cache.model
        if router is None or "gates" not in router.asks:
            out = run(tokens, positions, router, cache=held, **how)
            return out if cache is None else dataclasses.replace(out, cache=RoutedCache(out.cache, cache.router))
        self._vocab_routing(router)  # refuses a choice by token where adapters change the embedding or the head
        with matmul_precision(self.dtype):
            if step is None or cache is None:
                sight = Sight(positions, *self.visible(positions, segments))
            else:
                sight = Sight(positions, step=step, slots=step.slots(cache.block_size), execution=self.execution)
            x = self.embedded(tokens)
            given = x, sight, None if cache is None else cache.router
            apart = step is not None and self._has_shares(True)  # its attention may be a launch
            hops, own = run_alike(self.token_router, *given) if apart else self.token_router(*given)
            logits, left = hops[-1].logits, router
            if router.asks == GATES:
                left = choose(router, x, logits)
            else:  # others wait for the projections
                left = router.after_gates(x, KnownLogits(logits[:, :, None]))
        out = run(tokens, positions, left, cache=held, **how)
        return out if own is None else dataclasses.replace(out, cache=RoutedCache(out.cache, own))

    def hops(self, tokens: jax.Array, positions: jax.Array, segments: jax.Array) -> tuple[Hop, Hop]:
        """Both hops of the token router in packed sequences; no layer of the model runs."""
        with matmul_precision(self.dtype):
            x = self.embedded(tokens)
            return self.token_router(x, Sight(positions, *self.visible(positions, segments)), None)[0]

    def prepare(self) -> None:
        """As `Llama.prepare`: the token router's weights, which are float32, in the model's type."""
        self.token_router.prepare(self.dtype)

    def new_cache(self, blocks: int, block_size: int) -> RoutedCache:
        """As `Llama.new_cache`."""
        own = RouterCache.create(self.token_router.form, blocks, block_size, self.dtype)
        return RoutedCache(super().new_cache(blocks, block_size), own)


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
