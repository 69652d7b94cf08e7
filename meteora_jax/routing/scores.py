"""What a projection group knows of its adapters beside gates: scores that need no training, or an adapter's own.

    arrow            |v_i . x|, v_i the first right singular vector of dW_i       Arrow, arXiv 2405.11157
    spectr           ||dW_i x||                                                 SpectR, arXiv 2504.03454
    inverse-entropy  1 / H(softmax(dW_i x))                                     LoGo, arXiv 2511.07129
    phatgoose        v_i . u / sqrt(I), v_i and u = x standardised              PHATGOOSE, arXiv 2402.05859

    own-gate         v_i . u                                                    as it is trained

The first three are made of the shrink A_i x, which the adapters' update takes too: see `spectra`.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from meteora_jax.routing import NO_ADAPTER, GateLogits, Routing, Score
from meteora_jax.sharding import join_shares
from pallas_kernels.routed_lora.reference import columns
from pallas_kernels.topk_gating import TopK, topk_gating

SHRUNK: frozenset[Score] = frozenset({"arrow", "spectr", "inverse-entropy"})  # made of the shrink
LEAST = -3e38  # of what must not be chosen: finite, for a softmax over it alone
LEAST_DEVIATION = 1e-6  # of what is standardised
CERTAIN = 1e-20  # least entropy in nats: of a distribution of one value float32 has 0


@runtime_checkable
class AdaptedGroup(Protocol):
    """A projection group with its adapters, as a `LoRALinear` holds them; None where no adapter has a part."""

    splits: tuple[int, ...]
    shards: int
    share: Any
    adapters: int
    lora_b: Any
    lora_scale: Any
    lora_arrow: Any
    lora_spectr: Any
    own_gate: Any


@dataclasses.dataclass(frozen=True)
class GroupScores:
    """Of one input x [B, T, I] of a group.

    gates: whoever knows its gates' logits. part: bool [P, A], whether an adapter has a part at a projection. shrink
    float32 [B, T, P, A, R]; arrow [P, A, R], spectr [P, A, R, R]: see `spectra`; b [A, R, O], scale float32 [P, A], and
    splits, the projections' widths in each of O's equal parts. own_gates float32 [P, A, I], zeros of
    adapters that have none. share: of a device that holds a share of the group's "inputs" (of x and own_gates) or
    "outputs" (of b); shrink is whole.
    """

    gates: GateLogits
    part: Any
    x: Any
    shrink: Any = None
    arrow: Any = None
    spectr: Any = None
    b: Any = None
    scale: Any = None
    splits: tuple[int, ...] = ()
    own_gates: Any = None
    share: Any = None

    @classmethod
    def of(
        cls, group: AdaptedGroup, x: jax.Array, gates: GateLogits, shrink: jax.Array | None, layer: int | None = None
    ) -> GroupScores:
        """Of a group whose input is x; shrink: x through every A, where a score is made of it. layer: of a group whose
        layers are stacked."""
        if group.lora_scale is None:
            return cls(gates, jnp.zeros((len(group.splits), group.adapters), bool), x)

        def own(z: Any) -> Any:
            return z if z is None else z[...] if layer is None else z[...][layer]

        scale = own(group.lora_scale)
        return cls(
            gates, scale != 0, x, shrink, own(group.lora_arrow), own(group.lora_spectr), own(group.lora_b), scale,
            tuple(o // group.shards for o in group.splits), own(group.own_gate), group.share,
        )  # fmt: skip

    def logits(self, x: jax.Array) -> jax.Array:
        """The gates'."""
        return self.gates.logits(x)

    def score(self, score: Score) -> jax.Array:
        """float32 [B, T, P, A], -inf where an adapter has no part."""
        x, h = self.x, self.shrink
        part, own = self.part, score in ("phatgoose", "own-gate")
        if own and self.own_gates is not None:
            gates = self.own_gates
            if self.share == "inputs":
                x, gates = join_shares(x, x.ndim - 1), join_shares(gates, gates.ndim - 1)
            part &= jnp.any(gates != 0, axis=-1) | (score == "own-gate")
            found = (_phatgoose if score == "phatgoose" else _logits)(x, gates)
        elif own or h is None:  # a group that no adapter touches, or without gates of their own
            return jnp.full((*x.shape[:2], *self.part.shape), -jnp.inf, jnp.float32)
        elif score == "arrow":
            found = jnp.abs(_product("btpar,par->btpa", h, self.arrow))
        elif score == "spectr":
            found = jnp.linalg.norm(_product("btpar,pasr->btpas", h, self.spectr), axis=-1)
        elif score == "inverse-entropy":
            found = self._inverse_entropy(h)
        else:
            raise NotImplementedError(f"no score {score!r}")
        return jnp.where(part[None, None], found, -jnp.inf)

    def choose(self, score: Score, rule: TopK, allowed: Any = None, candidates: Any = None) -> Routing:
        """See `GateLogits`."""
        scores = self.score(score)
        may = scores > -jnp.inf
        if allowed is not None:
            may &= allowed[:, None, None]
        if candidates is not None:
            first = jnp.where(may, self.score("arrow"), -jnp.inf)
            place = jnp.argsort(jnp.argsort(-first, axis=-1), axis=-1)
            may &= place < candidates[:, None, None, None]
        indices, weights = topk_gating(jnp.where(may, scores, LEAST), rule)
        chosen = jnp.take_along_axis(may, jnp.maximum(indices, 0), axis=-1) & (indices != NO_ADAPTER)
        return Routing(jnp.where(chosen, indices, NO_ADAPTER), jnp.where(chosen, weights, 0.0))

    def _inverse_entropy(self, h: jax.Array) -> jax.Array:
        """[B, T, P, A]; every adapter's whole output is made, so that it is for few tokens."""
        b = self.b if self.share != "outputs" else join_shares(self.b, self.b.ndim - 1)
        b = b.astype(jnp.float32).reshape(*b.shape[:2], -1, sum(self.splits))
        found = []
        for p, (start, stop) in enumerate(columns(self.splits)):
            own = b[..., start:stop].reshape(*b.shape[:2], -1)
            output = _product("btar,aro->btao", h[:, :, p] * self.scale[p][None, None, :, None], own)
            log = jax.nn.log_softmax(output)
            entropy = -jnp.sum(jnp.exp(log) * log, axis=-1)
            found.append(1 / jnp.maximum(entropy, CERTAIN))
        return jnp.stack(found, axis=2)


def _product(equation: str, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.einsum(equation, x, y, precision=jax.lax.Precision.HIGHEST)


def _logits(x: jax.Array, own_gates: jax.Array) -> jax.Array:
    """v . u, as an own gate is trained: x [B, T, I], gates [P, A, I] -> [B, T, P, A]."""
    return _product("bti,pai->btpa", x.astype(jnp.float32), own_gates.astype(jnp.float32))


def _phatgoose(x: jax.Array, own_gates: jax.Array) -> jax.Array:
    """The same of both standardised, over sqrt(I)."""
    return _logits(_standard(x.astype(jnp.float32)), _standard(own_gates)) / x.shape[-1] ** 0.5


def _standard(z: jax.Array) -> jax.Array:
    """z with the mean 0 and the deviation 1 along its last axis."""
    centred = z - jnp.mean(z, axis=-1, keepdims=True)
    deviation = jnp.sqrt(jnp.mean(centred * centred, axis=-1, keepdims=True))
    return centred / jnp.maximum(deviation, LEAST_DEVIATION)
