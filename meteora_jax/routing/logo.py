"""Request-level routing by one pass through the base (LoGo, Lee et al., arXiv 2511.07129).

`Logo` says how; `probing.probed` runs the prompts of a batch once and puts `Composed` in its place, as `look_up` does
for routers that read a request's text.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from meteora_jax.arguments import Arguments
from meteora_jax.config import PROJECTIONS, InputError
from meteora_jax.routing import NO_ADAPTER, GateLogits, PassRouter, Routing, Score
from meteora_jax.routing.gates import KnownLogits
from meteora_jax.routing.retrieval import Composed
from meteora_jax.routing.scores import AdaptedGroup, GroupScores


@dataclasses.dataclass(frozen=True)
class Logo:
    """The k adapters whose outputs dW_i h say most at the prompt's last token, acting together on the whole request.

    A score s_i is the output's norm, or one over the entropy of its softmax; weights are s_i / sum s. It is taken at
    one projection of one layer, the last unless told, of the base alone. Where there are fewer than k adapters all act.
    within: only these adapters may be chosen; None: all.

    Raises:
        InputError: k below 1, an unknown score or projection; by the model, a layer that it has not.

    Examples:
        >>> model.generate(["Name a fruit."], mj.Logo(k=3, score="inverse-entropy"), max_new_tokens=4)
    """

    k: int = 20
    score: Literal["norm", "inverse-entropy"] = "norm"
    projection: str = "q_proj"
    layer: int = -1
    within: tuple[str, ...] | None = None

    def __post_init__(self):
        with Arguments("Logo") as given:
            given.whole("k", self.k)
            given.choice("score", self.score, ("norm", "inverse-entropy"))
            given.choice("projection", self.projection, PROJECTIONS)
            given.whole("layer", self.layer, least=-(1 << 16))
            if self.within is not None:
                given.texts("within", self.within)

    @property
    def probes(self) -> Score:
        """The norm of an adapter's output is SpectR's score."""
        return "spectr" if self.score == "norm" else "inverse-entropy"

    def after_pass(self, scores: np.ndarray, names: tuple[str, ...]) -> Composed:
        """The mixture of a request whose prompt has these scores [L, P, A]."""
        if unknown := sorted(set(self.within or ()) - set(names)):
            raise InputError([f"Logo: within: expected one of {', '.join(names)}, found {n!r}" for n in unknown])
        if not -len(scores) <= self.layer < len(scores):
            raise InputError(f"Logo: layer: expected one of {len(scores)}, from 0 or back from -1, found {self.layer}")
        own = scores[self.layer, PROJECTIONS.index(self.projection)]
        may = [i for i, name in enumerate(names) if own[i] > 0 and (self.within is None or name in self.within)]
        if not may:
            raise InputError(f"Logo: projection: expected one that adapters change, found {self.projection}")
        best = sorted(may, key=lambda i: -own[i])[: self.k]
        total = float(np.sum(own[best]))
        return Composed(tuple((names[i], float(own[i]) / total) for i in best), False)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Probe:
    """Nothing acts, and every projection group says a score of all adapters at one token of each row.

    last: int32 [B], which token. The scores leave as the routing's `logits`, [B, 1, P, A]. A group runs the base alone
    and asks `look` of its input: adapters then cost what one token costs.
    """

    score: Score = dataclasses.field(metadata={"static": True})
    last: Any

    @property
    def gating(self) -> None:
        """Nothing is chosen."""

    @property
    def asks(self) -> frozenset[Score]:
        """The score."""
        return frozenset({self.score})

    def known(self, positions: jax.Array | None) -> Routing | None:
        """That nothing acts, at embedding and head; in the layers there are scores to be taken."""
        return self._nothing() if positions is None else None

    def after_gates(self, x: jax.Array, gates: GateLogits) -> Probe:
        """Itself."""
        return self

    def route(self, x: jax.Array, gates: GateLogits) -> Routing:
        """Nothing, with the scores of x [B, 1, I], the one token of each row."""
        return dataclasses.replace(self._nothing(), logits=gates.score(self.score))

    def look(self, group: AdaptedGroup, x: jax.Array, shrink: Callable[[jax.Array], jax.Array]) -> Routing:
        """`route` of a group whose input is x [B, T, I]; shrink: x through every A of a group that has any."""
        x = jnp.take_along_axis(x, self.last[:, None, None], axis=1)
        shrunk = None if group.lora_scale is None else shrink(x)
        return self.route(x, GroupScores.of(group, x, KnownLogits(None), shrunk))

    def _nothing(self) -> Routing:
        shape = len(self.last), 1, 1, 1
        return Routing(jnp.full(shape, NO_ADAPTER, jnp.int32), jnp.zeros(shape, jnp.float32))


def observe_scores(routings: tuple[Routing, ...]) -> jax.Array:
    """A layer's scores with its projections side by side, float32 [B, P, A]."""
    return jnp.concatenate([r.logits[:, 0] for r in routings], axis=1)


def asking(router: Any, batch: int) -> Sequence[PassRouter | None]:
    """Of each row the router that wants a pass."""
    rows = router if isinstance(router, list | tuple) else [router] * batch
    return [r if isinstance(r, PassRouter) else None for r in rows]
