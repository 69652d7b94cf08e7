"""The token router: one choice a token for all layers and projections, made before the model's first layer.

A narrow transformer over the token embeddings. A gate at a projection knows what the frozen layers below it have
brought to a token, and the lowest know next to nothing; which adapter a line of a composite problem needs must be
looked up several steps back. Here every layer gets one choice with all of that done, and training runs no layer of the
model.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from meteora_jax.execution import ExecutionConfig
from meteora_jax.gate_config import HEAD, HOPS, SEGMENTS, SHIFTS, TokenRouterForm
from meteora_jax.model.attention import How, attend, unit_rms
from meteora_jax.model.paged_cache import PagedCache
from meteora_jax.model.rope import angles, frequencies, rotate
from meteora_jax.routing import BoundRouter, Routing
from meteora_jax.routing.gates import GateParam, KnownLogits
from meteora_jax.sharding import partitions
from pallas_kernels.paged_attention import EMPTY, StepTokens
from pallas_kernels.paged_attention.api import choose as choose_attention
from pallas_kernels.routed_lora.reference import einsum_float32

WIDEST = 128  # head that cuDNN's attention knows
THETA = 10_000.0  # of the router's rotary embedding, whatever the base's


class Hop(NamedTuple):
    """What one look-up gives: logits float32 [B, T, A] of the tokens' tasks, previous float32 [B, T, A + 1] of the task
    of the segment before a token's own (the last: none), segment float32 [B, T, SEGMENTS] of its own segment's index.
    """

    logits: jax.Array
    previous: jax.Array
    segment: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RouterCache:
    """What later tokens read of the token router, in the blocks that the model's cache has.

    layers: keys and values of its layers. hops: of each hop's look-up, of one head. shifts [HOPS * blocks * Bs, E]:
    what the SHIFTS tokens after it read of a token.
    """

    layers: PagedCache
    hops: PagedCache
    shifts: Any

    @classmethod
    def create(cls, form: TokenRouterForm, blocks: int, block_size: int, dtype: Any) -> RouterCache:
        """An empty one beside a model's cache of so many blocks of so many slots; whole on every device of a mesh."""
        e = form.width
        shifts = jnp.zeros((HOPS * blocks * block_size, e), dtype)
        layers = PagedCache.create(form.depth, blocks, block_size, e // HEAD, HEAD, dtype, split=False)
        return cls(layers, PagedCache.create(HOPS, blocks, block_size, 1, e, dtype, split=False), shifts)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sight:
    """Which tokens a call's tokens see. Of whole sequences: positions int32 [B, T], and as `attend` takes them mask
    bool [B, 1, T, T] and how. Of a step of the engine (B tokens, T = 1): its tokens, and their slots int32 [B]."""

    positions: Any
    mask: Any = None
    how: How | None = dataclasses.field(default=None, metadata={"static": True})
    step: StepTokens | None = None
    slots: Any = None
    execution: ExecutionConfig = dataclasses.field(default=ExecutionConfig(), metadata={"static": True})

    def read(
        self, q: jax.Array, k: jax.Array, v: jax.Array, cache: PagedCache | None, layer: jax.Array | int
    ) -> tuple[jax.Array, PagedCache | None]:
        """Attention of q [B, T, N, H] over k and v [B, T, K, H] and what the cache has, which is extended."""
        if cache is None or self.step is None:
            return attend(q, k, v, self.mask, self.how if self.how != "packed" or q.shape[-1] <= WIDEST else None), None
        cache = cache.write(layer, k[:, 0], v[:, 0], self.slots)
        heads = q.shape[2], k.shape[2], q.shape[3], cache.pages.dtype
        may = self.execution.kernels and not partitions()  # on TPUs heads this narrow are no kernel's
        how = choose_attention(self.execution.platform, may, *heads, None)
        return cache.attend(layer, q[:, 0], self.step, None, how)[:, None], cache


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RouterWeights:
    """A token router's weights as its products read them, of the model's type; names and shapes are `TokenRouter`'s.

    read [D, (1 + 3 F) E]: `embed`, and queries, keys and values of every layer, side by side: one product of the
    embedding. before [E, A + 1]: `previous` and `first`. *_units: columns of length 1.
    """

    read: Any
    shift: Any
    qkv: Any
    o: Any
    gate_up: Any
    down: Any
    hop: Any
    task: Any
    before: Any
    segment: Any
    task_units: Any
    before_units: Any
    segment_units: Any


def choose(router: BoundRouter, x: jax.Array, logits: jax.Array) -> Routing:
    """What a router makes of the token router's logits, once for all layers: Routing [B, T, 1, C].

    x: embeddings [B, T, D]. logits: float32 [B, T, A].
    """
    routing = router.route(x, KnownLogits(logits[:, :, None]))
    indices, weights = (
        jnp.broadcast_to(z, (*logits.shape[:2], *z.shape[2:])) for z in (routing.indices, routing.weights)
    )
    return Routing(indices, weights, routing.logits, routing.fused, routing.runs)


class TokenRouter(nnx.Module):
    """docs/words.md has the formula. Parameters, float32, with D the model's width, E the router's, F its depth:

    embed [D, E]: of the embedding into the stream. shift [SHIFTS, E, E]: of what `embed` makes of the tokens 1, 2, 3
        before: with it the first layer tells the "2" at the beginning of a line, which a look-up starts with.
    qkv_embed [F, D, 3, E], qkv [F, E, 3, E], o [F, E, E]: attention; queries, keys and values of embedding and stream.
    gate_up [F, E, 2, 2 E], down [F, 2 E, E]: silu(gate) up.
    task [E, A]: logits of the token's own task; with a null choice A counts it as well. previous [E, A], first [E, 1]:
        logits of the task of the segment before its own, or of none. segment [E, SEGMENTS]: logits of its segment's
        index. lookup [2]: the sharpness of the look-up, in which tokens that agree in the latter two read each other's
        task, and its weight.
    hop [1 + SHIFTS, E, E]: of the tasks that the first hop found, at a token and those before it, into the last layer:
        by it a line's first token knows the task of the line before, which that line's text, "5. incorrect", hides.
    """

    def __init__(self, width: int, form: TokenRouterForm, columns: int):
        """width: D. columns: of the logits, one an adapter and any for the null choice."""
        e, f = form.width, form.depth
        self.form = form

        def weight(*shape):
            return GateParam(jnp.zeros(shape, jnp.float32), axes=(None,) * len(shape))

        self.embed, self.shift = weight(width, e), weight(SHIFTS, e, e)
        self.qkv_embed, self.qkv, self.o = weight(f, width, 3, e), weight(f, e, 3, e), weight(f, e, e)
        self.gate_up, self.down = weight(f, e, 2, 2 * e), weight(f, 2 * e, e)
        self.task, self.previous, self.first = weight(e, columns), weight(e, columns), weight(e, 1)
        self.segment, self.lookup = weight(e, SEGMENTS), weight(2)
        self.hop = weight(1 + SHIFTS, e, e)
        self.ready: Any = None  # GateParam of RouterWeights, see `prepare`

    def prepare(self, kind: Any) -> None:
        """Makes the weights of that type once, for all calls of a program; else each call casts them."""
        self.ready = nnx.data(GateParam(self.weights(kind)))

    def weights(self, kind: Any) -> RouterWeights:
        """The parameters in that type, as the products read them."""
        seen = jnp.moveaxis(self.qkv_embed[...], 0, 1).reshape(self.embed.shape[0], -1)
        before = jnp.concatenate([self.previous[...], self.first[...]], axis=1)
        ends = self.task[...], before, self.segment[...]
        made = RouterWeights(
            jnp.concatenate([self.embed[...], seen], axis=1), self.shift[...], self.qkv[...], self.o[...],
            self.gate_up[...], self.down[...], self.hop[...], *ends, *map(_columns, ends)
        )  # fmt: skip
        return jax.tree.map(lambda z: z.astype(kind), made)

    def __call__(
        self, x: jax.Array, sight: Sight, cache: RouterCache | None
    ) -> tuple[tuple[Hop, Hop], RouterCache | None]:
        """Of embeddings x [B, T, D]: both hops, the second of which chooses, and the cache, extended."""
        kind, (depth, e) = x.dtype, (self.form.depth, self.form.width)
        turn = angles(frequencies(THETA, HEAD), sight.positions)
        w: RouterWeights = self.weights(kind) if self.ready is None else self.ready.get_value()

        def heads(z):
            return z.astype(kind).reshape(*z.shape[:2], -1, HEAD)

        def product(spec, x, w):
            return einsum_float32(kind, spec, x, w)

        def unit(u):
            return unit_rms(u.astype(jnp.float32)).astype(kind)

        read = product("btd,dn->btn", unit(x), w.read)
        seen = jnp.moveaxis(read[..., e:].reshape(*x.shape[:2], depth, 3, e), 2, 0)

        def layer(carry: tuple[jax.Array, jax.Array, PagedCache | None], own: tuple[jax.Array, ...]) -> Any:
            index, u, held = carry
            seen, qkv, o, gate_up, down = own
            q, k, v = map(heads, jnp.moveaxis(seen + product("bte,epf->btpf", unit(u), qkv), 2, 0))
            y, held = sight.read(rotate(q, *turn), rotate(k, *turn), v, held, index)
            u = u + product("bte,ef->btf", y, o)
            gate, up = jnp.moveaxis(product("bte,epf->btpf", unit(u), gate_up), 2, 0)
            return (index + 1, u + product("btf,fe->bte", (jax.nn.silu(gate) * up).astype(kind), down), held), None

        layers = seen, w.qkv, w.o, w.gate_up, w.down
        unroll = depth if x.shape[1] == 1 else 1  # a step of the engine has no use for a loop

        def run(state, layers):
            return jax.lax.scan(layer, state, layers, unroll=unroll)[0]

        held, hops, shifts = (None, None, None) if cache is None else (cache.layers, cache.hops, cache.shifts)
        u = read[..., :e]
        before, shifts = self._shifted(u.astype(kind), 0, sight, shifts, cache)
        u = u + product("nbte,nef->btf", before, w.shift)
        index, u, held = run((jnp.zeros((), jnp.int32), u, held), tuple(z[: 1 - HOPS] for z in layers))
        first, hops = self._look_up(unit(u), 0, w, sight, hops)
        found = product("bta,ea->bte", jax.nn.softmax(first.logits).astype(kind), w.task_units).astype(kind)
        before, shifts = self._shifted(found, 1, sight, shifts, cache)
        u = u + product("nbte,nef->btf", jnp.concatenate([found[None], before]), w.hop)
        _, u, held = run((index, u, held), tuple(z[1 - HOPS :] for z in layers))
        second, hops = self._look_up(unit(u), 1, w, sight, hops)
        extended = None if held is None or hops is None else RouterCache(held, hops, shifts)
        return (first, second), extended

    def _look_up(
        self, u: jax.Array, hop: int, w: RouterWeights, sight: Sight, cache: PagedCache | None
    ) -> tuple[Hop, PagedCache | None]:
        """Tokens read the task of those that agree with them in the previous segment's task and in their own segment's
        index; u [B, T, E], the cache keeps keys and values of that hop.

        A line of a composite problem has both in common with its question. A stream that has to learn this look-up by
        itself had not after 138 million tokens.
        """
        kind = u.dtype

        def product(spec, x, w):
            return einsum_float32(kind, spec, x.astype(kind), w)

        own, previous = product("bte,ea->bta", u, w.task), product("bte,ea->bta", u, w.before)
        key = product("bta,ea->bte", jax.nn.softmax(previous), w.before_units)
        segment = product("bte,en->btn", u, w.segment)
        key = (key + product("btn,en->bte", jax.nn.softmax(segment), w.segment_units)).astype(kind)
        value = product("bta,ea->bte", jax.nn.softmax(own), w.task_units).astype(kind)
        e, (sharpness, weight) = u.shape[-1], self.lookup[...]
        query = key * (sharpness * e**0.5).astype(kind)
        read, cache = sight.read(query[:, :, None], key[:, :, None], value[:, :, None], cache, hop)  # one head
        return Hop(own + weight * product("bte,ea->bta", read, w.task_units), previous, segment), cache

    def _shifted(
        self, z: jax.Array, hop: int, sight: Sight, shifts: jax.Array | None, cache: RouterCache | None
    ) -> tuple[jax.Array, jax.Array | None]:
        """z [B, T, E] of the SHIFTS tokens before each in its own sequence, [SHIFTS, B, T, E], zeros where there is
        none; `shifts` keep z."""
        if cache is not None and shifts is not None and sight.step is not None:
            size = cache.layers.block_size
            first = hop * cache.layers.blocks * size
            beyond = len(shifts) + jnp.arange(len(z), dtype=jnp.int32)
            at = jnp.where(sight.slots == EMPTY, beyond, first + sight.slots)
            shifts = shifts.at[at].set(z[:, 0], mode="drop", unique_indices=True)
            slots = jnp.stack([sight.step.slots(size, n) for n in range(1, SHIFTS + 1)])
            there = shifts[first + jnp.maximum(slots, 0)]
            return jnp.where((slots == EMPTY)[..., None], 0, there)[:, :, None], shifts
        before, positions = [], sight.positions
        for n in range(1, SHIFTS + 1):
            place = jnp.where(positions >= n, positions - n, EMPTY - 1)  # no token's

            def back(z, n=n):
                return jnp.pad(z[:, :-n], ((0, 0), (n, 0), *[(0, 0)] * (z.ndim - 2)))

            before.append(jnp.where((back(positions) == place)[..., None], back(z), 0))
        return jnp.stack(before), None


def _columns(w: jax.Array) -> jax.Array:
    """w [E, N] with columns of length 1."""
    return w * jax.lax.rsqrt(jnp.sum(w * w, axis=0, keepdims=True) + 1e-6)
