"""Token-level routing by what adapters themselves say of a projection's input: by their matrices, or by a gate that
each was given without knowing the others.

At every projection the best adapters of a token act, weighted by the softmax of their scores (`scores.py` has these);
an adapter without a part at the projection is not among them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import numpy as np

from meteora_jax.arguments import Arguments
from meteora_jax.config import InputError
from meteora_jax.routing import GateLogits, Routing, Score
from meteora_jax.routing.gates import bound_choice, check_choosing
from pallas_kernels.topk_gating import TopK


@dataclasses.dataclass(frozen=True)
class ByScore:
    """What the routers below have alike.

    top_k: adapters that act at each projection. temperature: divides their scores before the softmax. within: only
    these adapters may be chosen; None: all.
    """

    top_k: int = 4
    temperature: float = 1.0
    within: tuple[str, ...] | None = None
    score: ClassVar[Score]

    def __post_init__(self):
        with Arguments(type(self).__name__) as given:
            check_choosing(given, self)

    @property
    def needs_gates(self) -> bool:
        """Never."""
        return False

    def named(self) -> tuple[str, ...] | int:
        """Those that may be chosen; its top_k of any where it names none."""
        return self.top_k if self.within is None else tuple(dict.fromkeys(self.within))

    def bind(self, routers: Sequence[Any], names: tuple[str, ...]) -> BoundScores:
        """As `Router`."""
        return BoundScores(self.score, *bound_choice(routers, names))


@dataclasses.dataclass(frozen=True)
class Arrow(ByScore):
    """Scores |v_i . x| by the first right singular vector v_i of s_i B_i A_i (Arrow, Ostapenko et al., arXiv
    2405.11157).

    top_k: adapters that act on a token at each projection. temperature: divides their scores before the softmax.
    within: only these adapters may be chosen; None: all.

    Raises:
        InputError: top_k below 1 or above the adapters', a temperature that is not positive.

    Examples:
        >>> model.generate(["Name a fruit."], mj.Arrow(top_k=2), max_new_tokens=4)
    """

    score = "arrow"


@dataclasses.dataclass(frozen=True)
class Spectr(ByScore):
    """Scores ||s_i B_i A_i x||, by the whole spectrum of an adapter (SpectR, Fleshman and Van Durme, arXiv
    2504.03454). Arguments and errors: as `Arrow`.

    Examples:
        >>> model.generate(["Name a fruit."], mj.Spectr(top_k=2, temperature=0.5), max_new_tokens=4)
    """

    score = "spectr"


@dataclasses.dataclass(frozen=True)
class Lag(ByScore):
    """The k best by Arrow's score, ranked anew by SpectR's (LAG, Fleshman and Van Durme, arXiv 2507.05346).

    k: candidates, all adapters where there are fewer. The other arguments: as `Arrow`.

    Raises:
        InputError: as `Arrow`; k below top_k.

    Examples:
        >>> model.generate(["Name a fruit."], mj.Lag(top_k=1, k=4), max_new_tokens=4)
    """

    top_k: int = 1
    k: int = dataclasses.field(default=20, kw_only=True)
    score = "spectr"

    def __post_init__(self):
        super().__post_init__()
        with Arguments("Lag") as given:
            given.whole("k", self.k)
        if self.k < self.top_k:
            raise InputError(f"Lag: k: expected at least {self.top_k} (top_k), found {self.k}")

    def bind(self, routers: Sequence[Any], names: tuple[str, ...]) -> BoundScores:
        """As `Router`, with each row's number of candidates."""
        candidates = np.asarray([r.k if r is not None else 0 for r in routers], np.int32)
        return dataclasses.replace(super().bind(routers, names), candidates=candidates)


@dataclasses.dataclass(frozen=True)
class Phatgoose(ByScore):
    """Scores v_i . u / sqrt(I) of an adapter's own gate v_i, trained on the adapter's own data alone (`meteora train
    adapter --own-gate`), and the projection's input u, both standardised (PHATGOOSE, Muqeeth et al., arXiv 2402.05859).
    An adapter without a gate of its own is never chosen. Arguments and errors: as `Arrow`.

    Examples:
        >>> router = mj.Phatgoose(top_k=2)  # for banks whose adapters have gates of their own
    """

    top_k: int = 2
    score = "phatgoose"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BoundScores:
    """One score for a batch.

    rule: each prompt its own C (0: not routed by it) and temperature. allowed: bool [B, A], the adapters that each
    prompt may choose; None: all. candidates: int32 [B], how many of them Arrow's score lets through; None: all.
    """

    score: Score = dataclasses.field(metadata={"static": True})
    rule: TopK
    allowed: Any = None
    candidates: Any = None

    def moved(self, where: np.ndarray, count: int, columns: np.ndarray | None) -> BoundScores:
        """See `Movable`; adapters have one slot each."""
        allowed = np.zeros((len(self.rule.counts), count), bool)
        allowed[:, where[:, 0]] = True if self.allowed is None else np.asarray(self.allowed)
        return dataclasses.replace(self, allowed=allowed)

    @property
    def gating(self) -> None:
        """No gates' logits."""

    @property
    def asks(self) -> frozenset[Score]:
        """Its score, and Arrow's where that finds the candidates."""
        return frozenset({self.score} if self.candidates is None else {self.score, "arrow"})

    def known(self, positions: jax.Array | None) -> None:
        """Nothing: every token is chosen for."""

    def after_gates(self, x: jax.Array, gates: GateLogits) -> BoundScores:
        """Itself."""
        return self

    def route(self, x: jax.Array, gates: GateLogits) -> Routing:
        """x [B, T, I] -> Routing [B, T, P, C]."""
        return gates.choose(self.score, self.rule, self.allowed, self.candidates)
