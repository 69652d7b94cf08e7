"""What the device does between two looks of the host: one step with prompts in it, or several decoding steps."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from meteora_jax.config import GROUPS
from meteora_jax.engine.request import Trace
from meteora_jax.engine.sampling import SamplingRows, only, sample
from meteora_jax.execution import jit
from meteora_jax.routing import BoundRouter, Routing
from meteora_jax.sharding import Params
from pallas_kernels.paged_attention import EMPTY, StepTokens


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EngineState:
    """What stays on the device: the cache, and of every row int32 [R] the token to be read next, its position (EMPTY
    where nothing is decoded), how many tokens the response has, and how many it may still get."""

    cache: Any
    token: Any
    position: Any
    drawn: Any
    left: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepRows:
    """The B rows of a dispatch, gathered from the R of the state.

    order int32 [B]: which ones; R for none. decodes bool [B]. tables int32 [B, W], prompts int32 [B]: of `StepTokens`.
    sampling: None where all are greedy. allowed uint32 [B, ceil(V / 32)]: of `Guide`, all ones in rows without one;
    None where no row has one.
    """

    order: Any
    decodes: Any
    tables: Any
    prompts: Any
    sampling: SamplingRows | None
    allowed: Any = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PromptTokens:
    """The prompts' part of a step: tokens and positions int32 [P], runs int32 [P / QUERY_BLOCK] as in `StepTokens`.

    Of each of the B rows int32 [B]: last, where in the step's B + P tokens its prompt ends, -1 if it does not here;
    drawn, left: of `EngineState`, before the token behind the prompt is drawn.
    """

    tokens: Any
    positions: Any
    runs: Any
    last: Any
    drawn: Any
    left: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepResult:
    """What the host reads, N steps of B rows.

    tokens int32 [N, B], EMPTY where none was drawn. logprob float32 [N, B], of these; likely (int32 and float32
    [N, B, n]): the likeliest tokens and theirs; trace (int32 and float32 [N, L, M, P, C]): of each token of a step, or
    of its B rows' alone; L and P are 1 where one choice serves all of a request; None where nobody asked.
    """

    tokens: Any
    logprob: Any = None
    likely: Any = None
    trace: Any = None


def observe_routing(routings: tuple[Routing, ...], count: int | None = None) -> tuple[jax.Array, jax.Array]:
    """A layer's routing with its projections side by side: indices int32 and weights float32 [B, T or 1, P, C]; count:
    of the first so many of B."""
    spread = [r.spread(len(ps)) for r, ps in zip(routings, GROUPS.values(), strict=True)]
    both = [r.indices[:count] for r in spread], [r.weights[:count] for r in spread]
    return jnp.concatenate(both[0], axis=2), jnp.concatenate(both[1], axis=2)


def _step(
    model: Any, state: EngineState, rows: StepRows, prompt: PromptTokens | None, router: BoundRouter | None,
    end: jax.Array, logprobs: int | None, trace: Trace,
) -> tuple[EngineState, StepResult]:  # fmt: skip
    """One step: every row's next token through the model, the prompts' tokens beside them."""

    def own(x: jax.Array, fill: int) -> jax.Array:
        return x.at[rows.order].get(mode="fill", fill_value=fill)

    token, position, drawn, left = (
        own(z, fill) for z, fill in ((state.token, 0), (state.position, EMPTY), (state.drawn, 0), (state.left, 0))
    )
    position = jnp.where(rows.decodes, position, EMPTY)
    tokens, positions, runs = token, position, jnp.zeros((0,), jnp.int32)
    if prompt is not None:
        tokens, positions = jnp.concatenate([token, prompt.tokens]), jnp.concatenate([position, prompt.positions])
        runs = prompt.runs
    where = StepTokens(positions, rows.tables, runs, rows.prompts)
    each = router
    if router is not None and prompt is not None:
        at = where.rows()
        each = jax.tree.map(lambda z: z[at], router)
    observe = None
    alike = isinstance(each, Routing) and each.per_request
    if trace and router is not None and not alike:
        observe = observe_routing if trace is True else functools.partial(observe_routing, count=len(token))
    out = model(tokens[:, None], positions[:, None], each, cache=state.cache, step=where, observe=observe)
    hidden, draws = out.hidden[:, 0], position != EMPTY
    if prompt is not None:
        ends = prompt.last >= 0
        hidden = hidden[jnp.where(ends, prompt.last, jnp.arange(len(token), dtype=jnp.int32))]
        position = jnp.where(ends, positions[prompt.last], position)
        drawn, left = jnp.where(ends, prompt.drawn, drawn), jnp.where(ends, prompt.left, left)
        draws |= ends
    logits = model.logits(hidden, router)
    new = sample(logits if rows.allowed is None else only(logits, rows.allowed), drawn, rows.sampling)
    left = left - 1
    over = jnp.any(new[:, None] == end[None, :], axis=1) | (left <= 0)
    at = jnp.where(draws, rows.order, len(state.token))  # a row that draws nothing keeps what it has

    def put(x: jax.Array, value: jax.Array) -> jax.Array:
        return x.at[at].set(value, mode="drop")

    state = EngineState(
        out.cache, put(state.token, new), put(state.position, jnp.where(over, EMPTY, position + 1)),
        put(state.drawn, drawn + 1), put(state.left, left),
    )  # fmt: skip
    logprob = likely = None
    if logprobs is not None:
        normed = jax.nn.log_softmax(logits)
        logprob = jnp.take_along_axis(normed, new[:, None], axis=1)[:, 0]
        values, indices = jax.lax.top_k(normed, logprobs)
        likely = indices.astype(jnp.int32), values
    routing = None if observe is None else tuple(z[:, :, 0] for z in out.observed)
    if trace and isinstance(each, Routing) and alike:
        count = len(token) if trace == "response" else None
        routing = tuple(z[None, :count, 0] for z in (each.indices, each.weights))
    return state, StepResult(jnp.where(draws, new, EMPTY), logprob, likely, routing)


@jit(static_argnames=("graph", "steps", "logprobs", "trace"), donate_argnames=("state",))
def run_steps(
    graph: nnx.GraphDef,
    weights: Params,
    state: EngineState,
    rows: StepRows,
    prompt: PromptTokens | None,
    router: BoundRouter | None,
    end: jax.Array,
    *,
    steps: int,
    logprobs: int | None,
    trace: Trace,
) -> tuple[EngineState, StepResult]:
    """`steps` decoding steps; or, with `prompt`, one step that reads it too.

    The number is the program's: a GPU's loop that asks whether to go on waits for the host at every step.

    Args:
        router: of the B rows, its leaves [B, ..]. end: int32 [E], the tokens that end a response. logprobs: how many of
            the likeliest tokens' are wanted. trace: whether the routing is, and of which tokens.
    """
    model = nnx.merge(graph, weights)
    model.prepare()
    run = functools.partial(
        _step, model, rows=rows, prompt=prompt, router=router, end=end, logprobs=logprobs, trace=trace
    )
    if steps == 1:
        state, result = run(state)
        return state, jax.tree.map(lambda z: z[None], result)
    return jax.lax.scan(lambda state, _: run(state), state, length=steps)


@jit(static_argnames=("graph", "blocks", "block_size", "rows"))
def new_state(graph: nnx.GraphDef, weights: Params, blocks: int, block_size: int, rows: int) -> EngineState:
    """An empty cache and `rows` rows that do nothing."""
    model = nnx.merge(graph, weights)
    nothing = jnp.full((rows,), EMPTY, jnp.int32)
    zeros = jnp.zeros((rows,), jnp.int32)
    return EngineState(model.new_cache(blocks, block_size), zeros, nothing, zeros, zeros)
