"""From prompts to tokens: one prefill, then a jitted loop of many decoding steps."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from meteora_jax.arguments import MOST, Arguments
from meteora_jax.config import GROUPS, InputError, LlamaConfig
from meteora_jax.execution import jit
from meteora_jax.model.kv_cache import EMPTY, KVCache
from meteora_jax.model.routed_llama import RoutedCache
from meteora_jax.routing import NO_ADAPTER, BoundRouter, Routing
from meteora_jax.sharding import Params, fetch, pad_rows, place_rows, place_whole, rows_multiple, use_mesh


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: greedy at temperature 0, else from the top-k / top-p of the softmax."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    def __post_init__(self):
        with Arguments() as given:
            given.number("temperature", self.temperature, "0 or a positive number", lambda t: t >= 0)
            given.whole("top_k", self.top_k, none=True)
            if self.top_p is not None:
                given.number("top_p", self.top_p, "a number in (0, 1]", lambda p: 0 < p <= 1)
            given.whole("seed", self.seed, least=-MOST - 1)

    @property
    def traced(self) -> dict[str, jax.Array]:
        """The values as arrays: another temperature or seed compiles nothing; which of them apply is structure."""
        if self.temperature == 0:
            return {}
        values = {"temperature": jnp.float32(self.temperature), "seed": jnp.int32(self.seed)}
        if self.top_k is not None:
            values["top_k"] = jnp.int32(self.top_k)
        if self.top_p is not None:
            values["top_p"] = jnp.float32(self.top_p)
        return values


def sample(logits: jax.Array, step: jax.Array, how: dict[str, jax.Array]) -> jax.Array:
    """Next tokens int32 [B] from logits float32 [B, V]; `how` is `Sampling.traced`.

    Temperature first, then top-k, then top-p (the smallest set whose probability reaches p). Row b at step t
    draws with its own key, so a token does not depend on how many steps a call makes.
    """
    if "temperature" not in how:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / how["temperature"]
    if "top_k" in how or "top_p" in how:
        ranked = -jnp.sort(-logits, axis=-1)
        kept = jnp.ones(ranked.shape, bool)
        if "top_k" in how:
            kept &= jnp.arange(ranked.shape[1])[None, :] < how["top_k"]
        if "top_p" in how:
            probabilities = jax.nn.softmax(jnp.where(kept, ranked, -jnp.inf), axis=-1)
            kept &= jnp.cumsum(probabilities, axis=-1) - probabilities < how["top_p"]
        lowest = jnp.min(jnp.where(kept, ranked, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < lowest, -jnp.inf, logits)
    key = jax.random.fold_in(jax.random.key(how["seed"]), step)
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(logits.shape[0]))
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def observe_routing(routings: tuple[Routing, ...]) -> tuple[jax.Array, jax.Array]:
    """A layer's routing with its projections side by side: indices int32 and weights float32 [B, T or 1, P, C]."""
    spread = [r.spread(len(ps)) for r, ps in zip(routings, GROUPS.values(), strict=True)]
    return jnp.concatenate([r.indices for r in spread], axis=2), jnp.concatenate([r.weights for r in spread], axis=2)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Decoding:
    """A batch in the middle of its decoding.

    tokens: int32 [B, N], the response so far; counts: int32 [B], how many of them are real; done: bool [B];
    step: int32 [], tokens emitted by the rows still running; positions: int32 [B], of the newest token.
    trace: (indices, weights), each [N, L, B, P, C], of the tokens fed back so far; None without a router, or untraced.
    """

    cache: KVCache | RoutedCache
    tokens: jax.Array
    counts: jax.Array
    done: jax.Array
    step: jax.Array
    positions: jax.Array
    trace: tuple[jax.Array, jax.Array] | None


def _emit(state: Decoding, logits: jax.Array, how: dict[str, jax.Array], eos: jax.Array) -> Decoding:
    """Chooses the next token of every row that is not done and appends it; an end token ends its row."""
    token = sample(logits, state.step, how)
    ended = jnp.any(token[:, None] == eos[None, :], axis=1)
    tokens = jax.lax.dynamic_update_slice(state.tokens, token[:, None], (jnp.zeros((), jnp.int32), state.step))
    counts = state.counts + (~state.done & ~ended).astype(jnp.int32)
    return dataclasses.replace(state, tokens=tokens, counts=counts, done=state.done | ended, step=state.step + 1)


@jit(static_argnames=("graph", "new_tokens", "traced"))
def prefill(
    graph: nnx.GraphDef,
    weights: Params,
    tokens: jax.Array,
    lengths: jax.Array,
    router: BoundRouter | None,
    how: dict[str, jax.Array],
    eos: jax.Array,
    new_tokens: int,
    traced: bool = True,
) -> tuple[Decoding, tuple[jax.Array, jax.Array] | None]:
    """Reads the prompts and emits each one's first token.

    Args:
        tokens: int32 [B, T], padded on the right. lengths: int32 [B]; a row of length 0 is no prompt and is done
            from the start. new_tokens: tokens that the response may take, whose slots the cache gets. traced: what
            routed each token is kept, here and in decoding.

    Returns:
        the state, and the prompts' routing (indices, weights), each [L, B, T, P, C] (T may be 1).
    """
    model = nnx.merge(graph, weights)
    batch, width = tokens.shape
    columns = jnp.arange(width, dtype=jnp.int32)[None, :]
    positions = jnp.where(columns < lengths[:, None], columns, EMPTY)
    cache = KVCache.create(model.config, batch, width + new_tokens, model.embed.dtype)
    observe = observe_routing if router is not None and traced else None
    out = model(tokens, positions, router, cache=cache, fresh=True, observe=observe)
    last = jnp.take_along_axis(out.hidden, jnp.maximum(lengths - 1, 0)[:, None, None], axis=1)[:, 0]
    trace = None
    if observe is not None:
        indices, shares = (jnp.zeros((new_tokens, x.shape[0], batch, *x.shape[3:]), x.dtype) for x in out.observed)
        trace = indices, shares
    zeros = jnp.zeros((batch,), jnp.int32)
    state = Decoding(
        out.cache,
        jnp.zeros((batch, new_tokens), jnp.int32),
        zeros,
        lengths == 0,
        jnp.zeros((), jnp.int32),
        lengths,
        trace,
    )
    return _emit(state, model.logits(last, router), how, eos), out.observed


@jit(static_argnames=("graph",), donate_argnames=("state",))
def decode(
    graph: nnx.GraphDef,
    weights: Params,
    state: Decoding,
    router: BoundRouter | None,
    how: dict[str, jax.Array],
    eos: jax.Array,
    limit: jax.Array,
) -> Decoding:
    """Decodes until `limit` tokens have been emitted or every row is done, in one loop on the device."""
    model = nnx.merge(graph, weights)

    def step(state: Decoding) -> Decoding:
        token = jax.lax.dynamic_slice_in_dim(state.tokens, state.step - 1, 1, axis=1)
        observe = None if state.trace is None else observe_routing
        out = model(token, state.positions[:, None], router, cache=state.cache, observe=observe)
        trace = state.trace
        if trace is not None:
            put = functools.partial(jax.lax.dynamic_update_index_in_dim, index=state.step - 1, axis=0)
            trace = tuple(put(kept, new[:, :, 0]) for kept, new in zip(trace, out.observed, strict=True))
        state = dataclasses.replace(state, cache=out.cache, trace=trace, positions=state.positions + 1)
        return _emit(state, model.logits(out.hidden[:, 0], router), how, eos)

    return jax.lax.while_loop(lambda s: (s.step < limit) & ~jnp.all(s.done), step, state)


def bucket(length: int) -> int:
    """The padded length: 16, 24, 32, 48, 64, 96 ...: few compiled shapes, at most half wasted."""
    size = 16
    while size < length:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return size


def pad_prompts(prompts: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Token lists -> int32 [B, T] padded on the right to a bucket, and their lengths int32 [B]."""
    lengths = np.asarray([len(p) for p in prompts], np.int32)
    tokens = np.zeros((len(prompts), bucket(int(lengths.max()))), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    return tokens, lengths


def pad_batch(
    prompts: Sequence[Sequence[int]], router: BoundRouter | None, mesh: Mesh | None
) -> tuple[np.ndarray, np.ndarray, BoundRouter | None]:
    """`pad_prompts`, with empty rows (length 0) up to what the mesh divides, and the router for all rows."""
    tokens, lengths = pad_prompts(prompts)
    multiple = rows_multiple(mesh)
    rows = -(-len(prompts) // multiple) * multiple
    extra = rows - len(prompts)
    router = router if mesh is None else place_rows(pad_rows(router, rows), mesh)
    return np.pad(tokens, [(0, extra), (0, 0)]), np.pad(lengths, (0, extra)), router


def check_token_ids(token_ids: Sequence[int], config: LlamaConfig) -> None:
    """Refuses ids that are no tokens of the model."""
    if wrong := strange_ids(token_ids, config):
        raise InputError(f"token_ids: {wrong}")


def strange_ids(token_ids: Sequence[int], config: LlamaConfig) -> str:
    """What was expected instead of the first id that is no token of the model; empty where all are."""
    strange = next((t for t in token_ids if not 0 <= t < config.vocab_size), None)
    return "" if strange is None else f"expected token ids from 0 and below {config.vocab_size}, found {strange}"


def check_prompts(prompts: Sequence[Sequence[int]], config: LlamaConfig, new_tokens: int) -> None:
    """Refuses empty prompts, unknown tokens, and prompts that with `new_tokens` exceed the context; all at once."""
    problems = []
    if not prompts:
        problems.append("prompts: expected at least one, found none")
    grows = config.rope_scaling is not None and config.rope_scaling.rope_type == "dynamic"
    longest = config.max_position_embeddings - new_tokens
    for i, prompt in enumerate(prompts):
        if len(prompt) == 0:
            problems.append(f"prompt {i}: expected at least one token, found none")
        elif wrong := strange_ids(prompt, config):
            problems.append(f"prompt {i}: {wrong}")
        elif len(prompt) > longest and not grows:
            problems.append(
                f"prompt {i}: expected at most {max(longest, 0)} tokens (a context of {config.max_position_embeddings} "
                f"less {new_tokens} to generate), found {len(prompt)}"
            )
    if problems:
        raise InputError(problems)


class Generator:
    """One batch being generated: `advance` runs the device loop, the rest reads its state on the host."""

    def __init__(
        self,
        graph: nnx.GraphDef,
        weights: Params,
        config: LlamaConfig,
        prompts: Sequence[Sequence[int]],
        router: BoundRouter | None,
        sampling: Sampling,
        max_new_tokens: int,
        mesh: Mesh | None = None,
        traced: bool = True,
    ):
        if max_new_tokens < 1:
            raise InputError(f"max_new_tokens: expected at least 1, found {max_new_tokens}")
        check_prompts(prompts, config, max_new_tokens)
        self.max_new_tokens = max_new_tokens
        tokens, self.lengths, router = pad_batch(prompts, router, mesh)
        self._mesh, self._model, self._rows = mesh, (graph, weights), len(prompts)
        eos = jnp.asarray(config.eos_token_ids or (-1,), jnp.int32)
        self._call = dict(router=router, how=place_whole(sampling.traced, mesh), eos=place_whole(eos, mesh))
        slots = -(-max_new_tokens // 32) * 32
        with use_mesh(mesh):
            self._state, self._prompt_trace = prefill(
                *self._model,
                place_rows(tokens, mesh),
                place_rows(self.lengths, mesh),
                new_tokens=slots,
                traced=traced,
                **self._call,
            )

    def advance(self, tokens: int) -> bool:
        """Emits up to `tokens` more tokens a row; False once every row is done or at its limit."""
        limit = min(int(self._state.step) + tokens, self.max_new_tokens)
        with use_mesh(self._mesh):
            limit = place_whole(jnp.int32(limit), self._mesh)
            self._state = decode(*self._model, self._state, limit=limit, **self._call)
        return int(self._state.step) < self.max_new_tokens and not bool(np.all(self.done))

    def stop(self, rows: Sequence[int]) -> None:
        """Ends rows from outside (a stop string was found)."""
        done = fetch(self._state.done).copy()
        done[list(rows)] = True
        self._state = dataclasses.replace(self._state, done=place_rows(done, self._mesh))

    @property
    def done(self) -> np.ndarray:
        """bool [B]: rows that met an end token or were stopped."""
        return fetch(self._state.done)[: self._rows]

    def tokens(self) -> list[list[int]]:
        """Each row's response so far, without its end token."""
        tokens, counts = fetch(self._state.tokens), fetch(self._state.counts)
        return [row[:n].tolist() for row, n in zip(tokens[: self._rows], counts, strict=False)]

    def routing(self, fed: Sequence[int], lengths: Sequence[int]) -> list[tuple[np.ndarray, np.ndarray]] | None:
        """Each row's (indices, weights), [T, L, P, C], of its prompt and response; None without a router, or untraced.

        `lengths` are the responses' lengths; only the first `fed` tokens of each were read by the model, and
        nothing routed the rest.
        """
        if self._prompt_trace is None:
            return None
        rows: list[list[np.ndarray]] = [[] for _ in fed]
        fills = (NO_ADAPTER, 0.0)
        for prompt, response, fill in zip(self._prompt_trace, self._state.trace, fills, strict=True):
            prompt, response = fetch(prompt), fetch(response)
            for b, row in enumerate(rows):
                read = np.moveaxis(prompt[:, b], 1, 0)  # [T or 1, L, P, C]
                read = np.broadcast_to(read[: self.lengths[b]], (self.lengths[b], *read.shape[1:]))
                said = response[: lengths[b], :, b].copy()
                said[fed[b] :] = fill
                row.append(np.concatenate([read, said]))
        # a choice that waits for its invocation is no adapter yet
        return [(np.where(weights == 0, NO_ADAPTER, indices), weights) for indices, weights in rows]
