"""Routing is a value: adapter indices and weights. Whatever decides, decides by making one.

A router as the caller writes it (`Gates`, `Fixed`, a list of them, None) is *bound* to a bank's names and a batch of
prompts. What comes out is a small pytree, a `BoundRouter`: either its `routing` is known before any layer runs, or it
makes one for each projection group from what the gates say, by `route`. A `Routing` is a bound router itself.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NoReturn, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from meteora_jax.config import InputError
from pallas_kernels.routed_lora.reference import dense_weights
from pallas_kernels.topk_gating import NO_ADAPTER, TopK

# What a router may ask of a projection group: the logits of gates (or of a token router), or a score of `scores.py`.
Score = Literal["gates", "arrow", "spectr", "inverse-entropy", "phatgoose", "own-gate"]
NOTHING: frozenset[Score] = frozenset()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Routing:
    """Which adapters act, and how strongly.

    indices: int32 [B, T, P, C]; NO_ADAPTER where nothing acts.
    weights: float32 [B, T, P, C]; of NO_ADAPTER 0, or what the null choice took of the token: its adapter's dW is zero.
    logits: float32 [B, T, P, A], the gates' own (with a null choice A + 1), for the router that has them; what gate
    training reads.
    fused: bool [B], the requests whose chosen adapters act as one, their matrices averaged by the weights, cross
    terms included (LoraRetriever's fusion); None: nobody's. Such a request's choice is the same at every T and P.
    runs: int32 [B], of fused requests so many choices that lie side by side are one adapter's, a part of its ranks
    each: matrices of equal parts are averaged; None: every choice is a whole adapter.
    Axes T and P of each array may be 1 and then broadcast.
    """

    indices: Any
    weights: Any
    logits: Any = None
    fused: Any = None
    runs: Any = None

    @property
    def gating(self) -> None:
        """Nothing is left to choose."""

    @property
    def asks(self) -> frozenset[Score]:
        """Nothing."""
        return NOTHING

    def known(self, positions: jax.Array | None) -> Routing:
        """Itself."""
        return self

    def after_gates(self, x: jax.Array, gates: GateLogits) -> Routing:
        """Itself."""
        return self

    def route(self, x: jax.Array, gates: GateLogits) -> Routing:
        """Itself, whatever the gates say."""
        return self

    def moved(self, where: np.ndarray, count: int, columns: np.ndarray | None) -> Routing:
        """Its adapters 0 to k - 1 as the slots that `where` says; see `Movable`."""
        several = where.shape[1]
        nowhere = np.full((1, several), NO_ADAPTER, np.int32)  # of NO_ADAPTER, -1
        indices = np.concatenate([where, nowhere])[np.asarray(self.indices)]
        weights = np.where(indices == NO_ADAPTER, np.float32(0), np.asarray(self.weights)[..., None])
        flat = (z.reshape(*z.shape[:-2], -1) for z in (indices, weights))
        runs = None if self.fused is None or several == 1 else np.full(len(indices), several, np.int32)
        return Routing(*flat, fused=self.fused, runs=runs)

    @property
    def per_request(self) -> bool:
        """Whether one choice serves all tokens and projections of a request (its weights may still differ by token)."""
        return self.indices.shape[1] == self.indices.shape[2] == 1

    def spread(self, projections: int) -> Routing:
        """The same with so many projections on the P axis."""

        def wide(x: Any) -> Any:
            return x if x is None else jnp.broadcast_to(x, (*x.shape[:2], projections, x.shape[3]))

        return dataclasses.replace(self, **{k: wide(getattr(self, k)) for k in ("indices", "weights", "logits")})

    def dense(self, num_adapters: int) -> jax.Array:
        """[B, T, P, A]: the weight of every adapter, zero where it was not chosen."""
        return dense_weights(self.indices, self.weights, num_adapters)


@runtime_checkable
class GateLogits(Protocol):
    """Who knows the gate logits of a projection group's input."""

    def logits(self, x: jax.Array) -> jax.Array:
        """float32 [B, T, P, A] of x [B, T, I], a null choice behind the adapters."""
        ...

    def score(self, score: Score) -> jax.Array:
        """Another score than the gates', float32 [B, T, P, A], -inf where an adapter has no part. Only scores that the
        router `asks` for are there."""
        ...

    def choose(
        self, score: Score, rule: TopK, allowed: jax.Array | None = None, candidates: jax.Array | None = None
    ) -> Routing:
        """The best adapters of every token by such a score, and the softmax of their scores: [B, T, P, C].

        Args:
            allowed: bool [B, A], the adapters that each row may choose; None: all.
            candidates: int32 [B], how many of them Arrow's score lets through; None: all.
        """
        ...


@runtime_checkable
class Onlooker(Protocol):
    """A bound router by which no adapter acts: a projection group runs the base alone, and is asked of its input."""

    def look(self, group: Any, x: jax.Array, shrink: Callable[[jax.Array], jax.Array]) -> Routing:
        """What is to be known of a group (a `scores.AdaptedGroup`) with the input x [B, T, I]: a routing of no adapter,
        whose `logits` say it. shrink: what takes a part of x through every A, where the group has any."""
        ...


@runtime_checkable
class BoundRouter(Protocol):
    """A router made ready for one batch: a pytree whose leaves have B as their first axis."""

    @property
    def gating(self) -> TopK | None:
        """The rule of a router that takes the plain top-k of all gate logits, which kernels then do by themselves; None
        for every other."""
        ...

    @property
    def asks(self) -> frozenset[Score]:
        """The scores that `route` asks a projection group for; none where the routing is known."""
        ...

    def known(self, positions: jax.Array | None) -> Routing | None:
        """The routing of tokens int32 [B, T] at these positions of their sequences, [B, 1 or T, 1, C], where it depends
        on nothing else; None where gates decide. positions None: of no token in particular, [B, 1, 1, C]."""
        ...

    def after_gates(self, x: jax.Array, gates: GateLogits) -> BoundRouter:
        """What is left for the projections once a token router has spoken: who asks for gates has the routing [B, T, 1,
        C] that its logits of embeddings x [B, T, D] make; every other is itself."""
        ...

    def route(self, x: jax.Array, gates: GateLogits) -> Routing:
        """The routing [B, T, P, C] of a projection group that reads x [B, T, I]."""
        ...


@runtime_checkable
class Movable(Protocol):
    """A bound router whose adapters can be put into slots."""

    def moved(self, where: np.ndarray, count: int, columns: np.ndarray | None) -> BoundRouter:
        """The same, its leaves the host's, for a bank of `count` slots.

        Args:
            where: int32 [k, n], the slots of the adapters that it was bound to, each of which acts in all of its own,
                NO_ADAPTER behind them; where it was bound to choose among all, of all that it may choose.
            columns: int32, of each slot (and of the null choice, behind them) its column in logits that have more (a
                token router's); None: logits have a column a slot.
        """
        ...


@runtime_checkable
class Router(Protocol):
    """What a caller passes as `router=`. A new kind of router needs these two methods and nothing else."""

    @property
    def needs_gates(self) -> bool:
        """Whether a model without trained gates is refused."""
        ...

    def bind(self, routers: Sequence[Any], names: tuple[str, ...]) -> BoundRouter:
        """Binds the rows of a batch that hold this kind of router; None rows must route to NO_ADAPTER. Its arrays are
        NumPy's: a server binds while the device works, and what is made on the device is read behind all of that."""
        ...


@runtime_checkable
class NamedAdapters(Protocol):
    """A router that says beforehand what it may choose, as a pool of adapters must know."""

    needs_gates: bool

    def named(self) -> tuple[str, ...] | int:
        """The adapters; or of how many, whichever they are, it makes its choice."""
        ...

    def bind(self, routers: Sequence[Any], names: tuple[str, ...]) -> BoundRouter:
        """As `Router`."""
        ...


def refuse(router: Any, names: Sequence[str] = ()) -> NoReturn:
    """Raises InputError: what a caller passed is no router. names: the bank's, which no bare string stands for."""
    taken = "Gates, Fixed, Retrieval, GatesWithin, TaskRetrieval, Arrow, Spectr, Lag, Phatgoose, Logo, None or a list"
    words = ""
    if isinstance(router, str):
        own = f"; the adapter of this name is mj.Fixed({router!r})" if router in names else ""
        words = f"; or 'gates', 'base', 'gates if loaded'{own}"
    raise InputError(f"router: expected {taken} of them, found {router!r:.200}{words}")


@runtime_checkable
class RequestRouter(Protocol):
    """What a request's text is looked up for (`Retrieval`, `GatesWithin`, `TaskRetrieval`); it makes a `Router` of what
    was found: of `index`'s names, `hidden` ones excluded, the `k` best, by what `read` says of a conversation."""

    @property
    def index(self) -> Any: ...
    @property
    def k(self) -> int: ...
    @property
    def read(self) -> Any: ...
    @property
    def hidden(self) -> tuple[str, ...]: ...

    def router(self, found: Any) -> Router:
        """The router of a request for which `found` was retrieved."""
        ...


@runtime_checkable
class PassRouter(Protocol):
    """What chooses by one pass of the prompt through the base (`Logo`), in which no adapter acts."""

    @property
    def probes(self) -> Score:
        """The score that the pass takes of every adapter."""
        ...

    def after_pass(self, scores: np.ndarray, names: tuple[str, ...]) -> Router:
        """The router of a request: scores float32 [L, P, A] at its prompt's last token, projections in the order of
        PROJECTIONS, -inf where an adapter has no part."""
        ...


# What callers pass as `router=`: a router, one of `routing.named.WORDS`, None (the bare base), or a list, one a prompt.
AnyRouter = Router | RequestRouter | PassRouter
OneRouter = AnyRouter | str | None
RouterArgument = OneRouter | Sequence[OneRouter]


def bind(
    router: RouterArgument, names: tuple[str, ...], batch: int, gated: tuple[str, ...] | None
) -> BoundRouter | None:
    """Makes `router` (one router, a list of one a prompt, or None) ready for a batch of `batch` prompts.

    Args:
        names: the bank's adapters. gated: those that gates know, the first of them; None: no gates are loaded.

    Raises:
        InputError: a list of another length, an unknown adapter, gates asked for where none are loaded.
    """
    per_prompt: list[Any] = list(router) if isinstance(router, list | tuple) else [router] * batch
    if len(per_prompt) != batch:
        raise InputError(f"router: expected a list of {batch} (one a prompt), found {len(per_prompt)}")
    from meteora_jax.routing.mixed import Mixed

    kinds: list[type] = []
    for r in per_prompt:
        if r is None or type(r) in kinds:
            continue
        if isinstance(r, type) or not hasattr(r, "bind"):
            refuse(r)
        kinds.append(type(r))
    if not kinds:
        return None
    if not names:
        raise InputError("router: expected a bank of adapters, found a model loaded without one")
    bound = []
    for kind in kinds:
        rows = [r if type(r) is kind else None for r in per_prompt]
        first = next(r for r in rows if r is not None)
        if any(r is not None and r.needs_gates for r in rows) and gated is None:
            raise InputError(f"router: {first!r} expected trained gates, found a model loaded without them")
        bound.append(first.bind(rows, gated if first.needs_gates and gated is not None else names))
    if len(bound) == 1:
        return bound[0]
    which = [kinds.index(type(r)) if r is not None else -1 for r in per_prompt]
    return Mixed(np.asarray(which, np.int32), tuple(bound))


@dataclasses.dataclass(frozen=True, repr=False)
class RoutingTrace:
    """What routed each token of one request, on the host.

    tokens: T display strings, prompt first, then the response.
    indices: int32 [T, L, P, C], NO_ADAPTER where nothing acted; weights: float32, the same shape.
    The last token of a response was never fed back, so nothing routed it.
    retrieved: the adapters that a retrieval found for the request and their similarities, best first.
    adapted: bool [L, P, A], where each adapter has weights (`routing.trace.adapted_places`); None: everywhere.
    """

    adapter_names: tuple[str, ...]
    projections: tuple[str, ...]
    tokens: tuple[str, ...]
    prompt_length: int
    indices: np.ndarray
    weights: np.ndarray
    retrieved: tuple[tuple[str, float], ...] = ()
    adapted: np.ndarray | None = None

    def __repr__(self) -> str:
        layers, projections, choices = self.indices.shape[1:]
        share = np.append(adapter_share(self).sum(axis=0), null_share(self).sum())
        share /= max(1.0, share.sum())  # of the tokens that anything routed
        names = *self.adapter_names, "no adapter"
        shown = [f"{names[i]} {share[i]:.0%}" for i in np.argsort(-share)[:3] if share[i] >= 0.005]
        return (
            f"RoutingTrace({self.prompt_length} + {len(self.tokens) - self.prompt_length} tokens, {layers} layers, "
            f"{projections} projections, {choices} choices: {', '.join(shown) or 'no adapter'})"
        )

    def _repr_html_(self) -> str:
        """The page of `meteora generate --show-routing`, for a notebook."""
        from meteora_jax.routing.page import cell_of

        return cell_of(self)

    def acting(self) -> np.ndarray:
        """`indices` with NO_ADAPTER in the place of choices that have no weights where they were chosen."""
        if self.adapted is None:
            return self.indices
        places = np.arange(self.indices.shape[1])[:, None, None], np.arange(self.indices.shape[2])[:, None]
        return np.where(self.adapted[*places, np.maximum(self.indices, 0)], self.indices, NO_ADAPTER)


def adapter_share(trace: RoutingTrace) -> np.ndarray:
    """Each adapter's share of a token's total weight over all layers and projections.

    Where the weights of every projection sum to one, this is their average over layers and projections.

    Returns:
        float32 [T, A]: rows sum to one less `null_share`, or are zero where no adapter acted.
    """
    return weight_share(trace.indices, trace.weights, len(trace.adapter_names))


def null_share(trace: RoutingTrace) -> np.ndarray:
    """float32 [T]: the share of a token's total weight, over all layers and projections, that went to the null choice:
    1 where the base answered alone; 0 where nothing routed."""
    rows = len(trace.indices)
    weights = np.abs(trace.weights).reshape(rows, math.prod(trace.weights.shape[1:]))
    total = weights.sum(axis=1)
    null = np.where(trace.indices.reshape(weights.shape) == NO_ADAPTER, weights, 0).sum(axis=1)
    return np.divide(null, total, out=np.zeros(rows, np.float32), where=total > 0)


def weight_share(indices: np.ndarray, weights: np.ndarray, num_adapters: int) -> np.ndarray:
    """float32 [rows, A]: each adapter's share of a row's absolute weight, of which null choices have their part;
    `indices` and `weights` are [rows, ..]."""
    rows = len(indices)
    shape = rows, math.prod(indices.shape[1:])
    indices, weights = indices.reshape(shape), np.abs(weights).reshape(shape)
    acting = indices != NO_ADAPTER
    slots = (np.arange(rows)[:, None] * num_adapters + indices)[acting]
    summed = np.bincount(slots, weights[acting], minlength=rows * num_adapters).reshape(rows, num_adapters)
    total = weights.sum(axis=1, keepdims=True)
    return np.divide(summed, total, out=np.zeros(summed.shape, np.float32), where=total > 0)
