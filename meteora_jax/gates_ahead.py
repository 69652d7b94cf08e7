"""Gates that choose before the model's first layer: a narrow transformer of their own over the token embeddings.

A gate beside a layer knows what the frozen layers below it have brought to a token, and the lowest know next to
nothing; which adapter a line of a composite problem needs must be looked up several steps back. Here every layer and
projection gets one choice, made with all of that done, and for training no layer of the model has to run.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from meteora_jax.adapters import GateParam
from meteora_jax.attention import Fused, attend, rotate, stream_rotation, unit_rms
from meteora_jax.config import LlamaConfig
from meteora_jax.gate_config import HEAD, SHIFTS, GateForm
from meteora_jax.kv_cache import EMPTY, KVCache
from pallas_kernels.routed_lora.reference import einsum_float32

WIDEST = 128  # head that cuDNN's attention knows


class Pointed(NamedTuple):
    """What a stream points to: the gates' logits float32 [B, T, A], those of whose turn it was before float32
    [B, T, A + 1] (the last: nobody's), and of which turn of its block it is float32 [B, T, turns]."""

    logits: jax.Array
    before: jax.Array
    number: jax.Array


class GatesAhead(nnx.Module):
    """docs/words.md has the formula. Float32, E the stream's width, F its depth:

    read [D, E]: of the embedding into the stream. shift [SHIFTS, E, E]: of what the tokens 1, 2 .. before it have
    read: with it the first layer knows a "2" behind a line's end, which a lookup begins with, and half the training is
    enough. look [F, D, 3, E] and own [F, E, 3, E]: of embedding and stream to queries, keys and values, heads of 32;
    o [F, E, E]. up [F, E, 2, 2 E], down [F, 2 E, E]: silu(gate) up. out [E, A]: what a token says of its own task.
    before [E, A] and first [E, 1]: whose turn it was before a token's, an adapter's or nobody's; tokens that agree in
    that hear what each other say. point [2]: how sharply, and how much it counts. number [E, turns], if turns are
    counted: which of a block's it is, which tokens may agree in as well. again [1 + SHIFTS, E, E], with two rounds: of
    what a token and those before it have found into the last layer. A line's first token knows by it whose the line
    before was, which that line's own text, "5. incorrect", seldom tells.
    """

    def __init__(self, config: LlamaConfig, form: GateForm, adapters: int):
        e, f = form.stream, form.depth
        weight = lambda *shape: GateParam(jnp.zeros(shape, jnp.float32), axes=(None,) * len(shape))  # noqa: E731
        self.read = weight(config.hidden_size, e)
        self.look, self.own, self.o = weight(f, config.hidden_size, 3, e), weight(f, e, 3, e), weight(f, e, e)
        self.shift = weight(SHIFTS, e, e)
        self.up, self.down = weight(f, e, 2, 2 * e), weight(f, 2 * e, e)
        self.out, self.before, self.first = weight(e, adapters), weight(e, adapters), weight(e, 1)
        self.point = weight(2)
        self.again = weight(1 + SHIFTS, e, e) if form.rounds == 2 else None
        self.number = weight(e, form.turns) if form.turns else None

    def __call__(
        self,
        x: jax.Array,
        positions: jax.Array,
        mask: jax.Array,
        fused: Fused | None,
        cache: KVCache | None,
        fresh: bool,
    ) -> tuple[tuple[Pointed, ...], KVCache | None]:
        """Of embeddings x [B, T, D]: what each round points to, the last of which chooses, and the cache with all that
        later tokens read.

        positions int32 [B, T]; mask bool [B, 1, T, S], fused: as `attend` takes them.
        """
        kind, turns = x.dtype, stream_rotation(HEAD, positions)
        heads = lambda z: z.astype(kind).reshape(*z.shape[:2], -1, HEAD)  # noqa: E731
        product = lambda spec, x, w: einsum_float32(kind, spec, x, w.astype(kind))  # noqa: E731
        unit = lambda u: unit_rms(u.astype(jnp.float32)).astype(kind)  # noqa: E731
        x = unit(x)

        def layer(carry: tuple[jax.Array, jax.Array, KVCache | None], weights: tuple[jax.Array, ...]) -> Any:
            index, u, cache = carry
            look, own, o, up, down = weights
            seen = product("btd,dpe->btpe", x, look) + product("bte,epf->btpf", unit(u), own)
            q, k, v = (heads(z) for z in jnp.moveaxis(seen, 2, 0))
            q, k = rotate(q, *turns), rotate(k, *turns)
            if cache is not None:
                cache, *kept = cache.look_back(index, k, v)
                k, v = (k, v) if fresh else kept
            u = u + product("bte,ef->btf", attend(q, k, v, mask, fused), o)
            gate, more = jnp.moveaxis(product("bte,epf->btpf", unit(u), up), 2, 0)
            return (index + 1, u + product("btf,fe->bte", (jax.nn.silu(gate) * more).astype(kind), down), cache), None

        weights = tuple(w[...] for w in (self.look, self.own, self.o, self.up, self.down))
        read = product("btd,de->bte", x, self.read[...])
        back = lambda z, slot, cache: self._back(z.astype(kind), slot, positions, cache, fresh)  # noqa: E731
        before, cache = back(read, slot := self.o.shape[0], cache)
        state = jnp.zeros((), jnp.int32), read + product("nbte,nef->btf", before, self.shift[...]), cache
        unroll = len(weights[0]) if x.shape[1] == 1 else 1  # a decoding step has no use for a loop
        run = lambda state, weights: jax.lax.scan(layer, state, weights, unroll=unroll)[0]  # noqa: E731
        point = lambda u, slot, cache: self._point(unit(u), slot, mask, fused, cache, fresh)  # noqa: E731
        if self.again is None:
            _, u, cache = run(state, weights)
            only, cache = point(u, slot + 1, cache)
            return (only,), cache
        index, u, cache = run(state, tuple(w[:-1] for w in weights))
        first, cache = point(u, slot + 1, cache)
        found = product("bta,ea->bte", jax.nn.softmax(first.logits).astype(kind), _columns(self.out[...]))
        earlier, cache = back(found, slot + 2, cache)
        found = jnp.concatenate([found.astype(kind)[None], earlier])
        u = u + product("nbte,nef->btf", found, self.again[...])
        _, u, cache = run((index, u, cache), tuple(w[-1:] for w in weights))
        second, cache = point(u, slot + 3, cache)
        return (first, second), cache

    def _point(
        self, u: jax.Array, slot: int, mask: jax.Array, fused: Fused | None, cache: KVCache | None, fresh: bool
    ) -> tuple[Pointed, KVCache | None]:
        """What the stream u [B, T, E] points to; the cache keeps what tokens say of it at `slot`.

        A line of a composite problem has with its question in common whose turn it was before, so the one finds the
        other by it. A stream that has to learn this lookup by itself had not after 138 million tokens.
        """
        kind = u.dtype
        product = lambda spec, x, w: einsum_float32(kind, spec, x.astype(kind), w.astype(kind))  # noqa: E731
        out, turn = self.out[...], jnp.concatenate([self.before[...], self.first[...]], axis=1)
        own, before = product("bte,ea->bta", u, out), product("bte,ea->bta", u, turn)
        key = product("bta,ea->bte", jax.nn.softmax(before), _columns(turn))
        nth = jnp.zeros((*u.shape[:2], 0), jnp.float32)
        if self.number is not None:
            number = self.number[...]
            nth = product("bte,en->btn", u, number)
            key = key + product("btn,en->bte", jax.nn.softmax(nth), _columns(number))
        key = key.astype(kind)
        value = product("bta,ea->bte", jax.nn.softmax(own), _columns(out)).astype(kind)
        e, (sharp, much) = u.shape[-1], self.point[...]
        query, keys, values = key * (sharp * e**0.5).astype(kind), key, value
        if cache is not None:
            split = lambda z: z.reshape(*z.shape[:2], -1, HEAD)  # noqa: E731
            cache, *kept = cache.look_back(jnp.int32(slot), split(key), split(value))
            keys, values = (key, value) if fresh else (z.reshape(*z.shape[:2], -1) for z in kept)
        alone = lambda z: z[:, :, None]  # noqa: E731 - one head
        heard = attend(alone(query), alone(keys), alone(values), mask, fused if e <= WIDEST else None)
        return Pointed(own + much * product("bte,ea->bta", heard, _columns(out)), before, nth), cache

    def _back(
        self, read: jax.Array, slot: int, positions: jax.Array, cache: KVCache | None, fresh: bool
    ) -> tuple[jax.Array, KVCache | None]:
        """What the SHIFTS tokens before each of a sequence have, [SHIFTS, B, T, E], zeros where there is none; of
        read [B, T, E], which the cache keeps at `slot`."""
        kept, before = read, []
        if cache is not None:
            split = read.reshape(*read.shape[:2], -1, HEAD)
            cache, kept, _ = cache.look_back(jnp.int32(slot), split, split)
            kept = kept.reshape(*kept.shape[:2], -1)
        for n in range(1, SHIFTS + 1):
            place = jnp.where(positions >= n, positions - n, EMPTY - 1)  # nobody's
            if cache is None or fresh:  # neighbours
                back = lambda z, n=n: jnp.pad(z[:, :-n], ((0, 0), (n, 0), *[(0, 0)] * (z.ndim - 2)))  # noqa: E731
                before.append(jnp.where((back(positions) == place)[..., None], back(read), 0))
            else:
                there = (cache.positions[:, None] == place[..., None]).astype(read.dtype)
                before.append(jnp.einsum("bts,bse->bte", there, kept))
        return jnp.stack(before), cache


def _columns(w: jax.Array) -> jax.Array:
    """w [E, N] with columns of length 1."""
    return w * jax.lax.rsqrt(jnp.sum(w * w, axis=0, keepdims=True) + 1e-6)
