"""Gates that choose before the model's first layer: a narrow transformer of their own over the token embeddings.

A gate beside a layer knows what the frozen layers below it have brought to a token, and the lowest know next to
nothing; which adapter a line of a composite problem needs must be looked up several steps back. Here every layer and
projection gets one choice, made with all of that done, and for training no layer of the model has to run.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from meteora_jax.adapters import GateParam
from meteora_jax.attention import Fused, attend, rotate, stream_rotation, unit_rms
from meteora_jax.config import LlamaConfig
from meteora_jax.gate_config import HEAD, SHIFTS, GateForm
from meteora_jax.kv_cache import EMPTY, KVCache
from pallas_kernels.routed_lora.reference import einsum_float32


class GatesAhead(nnx.Module):
    """docs/words.md has the formula. Float32, E the stream's width, F its depth:

    read [D, E]: of the embedding into the stream. shift [SHIFTS, E, E]: of what the tokens 1, 2 .. before it have
    read: with it the first layer knows a "2" behind a line's end, which a lookup begins with, and half the training is
    enough. look [F, D, 3, E] and own [F, E, 3, E]: of embedding and stream to queries, keys and values, heads of 32;
    o [F, E, E]. up [F, E, 2, 2 E], down [F, 2 E, E]: silu(gate) up. out [E, A].
    For training alone: before [E, A] and first [E, 1], whose turn it was before a token's, an adapter's or nobody's.
    """

    def __init__(self, config: LlamaConfig, form: GateForm, adapters: int):
        e, f = form.stream, form.depth
        weight = lambda *shape: GateParam(jnp.zeros(shape, jnp.float32), axes=(None,) * len(shape))  # noqa: E731
        self.read = weight(config.hidden_size, e)
        self.look, self.own, self.o = weight(f, config.hidden_size, 3, e), weight(f, e, 3, e), weight(f, e, e)
        self.shift = weight(SHIFTS, e, e)
        self.up, self.down = weight(f, e, 2, 2 * e), weight(f, 2 * e, e)
        self.out, self.before, self.first = weight(e, adapters), weight(e, adapters), weight(e, 1)

    def __call__(
        self,
        x: jax.Array,
        positions: jax.Array,
        mask: jax.Array,
        fused: Fused | None,
        cache: KVCache | None,
        fresh: bool,
    ) -> tuple[jax.Array, KVCache | None]:
        """The stream's end, unit rms [B, T, E], of embeddings x [B, T, D], and the cache with its keys and values.

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
        before, cache = self._before(read.astype(kind), positions, cache, fresh)
        begin = jnp.zeros((), jnp.int32), read + product("nbte,nef->btf", before, self.shift[...]), cache
        unroll = self.o.shape[0] if x.shape[1] == 1 else 1  # a decoding step has no use for a loop
        (_, u, cache), _ = jax.lax.scan(layer, begin, weights, unroll=unroll)
        return unit(u), cache

    def _before(
        self, read: jax.Array, positions: jax.Array, cache: KVCache | None, fresh: bool
    ) -> tuple[jax.Array, KVCache | None]:
        """What the SHIFTS tokens before each of a sequence have read, [SHIFTS, B, T, E], zeros where there is none; of
        read [B, T, E]. The cache keeps it behind the layers' keys."""
        kept, before = read, []
        if cache is not None:
            split = read.reshape(*read.shape[:2], -1, HEAD)
            cache, kept, _ = cache.look_back(jnp.int32(self.o.shape[0]), split, split)
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

    def logits(self, u: jax.Array) -> jax.Array:
        """Of the gates, float32 [B, T, A], at the stream's end u."""
        return einsum_float32(u.dtype, "bte,ea->bta", u, self.out[...].astype(u.dtype))

    def order(self, u: jax.Array) -> jax.Array:
        """Logits float32 [B, T, A + 1] of whose turn it was before; the last: nobody's."""
        weight = jnp.concatenate([self.before[...], self.first[...]], axis=1)
        return einsum_float32(u.dtype, "bte,ea->bta", u, weight.astype(u.dtype))
