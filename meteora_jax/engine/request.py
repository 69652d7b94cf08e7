"""What is asked of the engine, and how far it has come."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, Protocol

import jax
import numpy as np

from meteora_jax.arguments import MOST, Arguments
from meteora_jax.config import InputError, LlamaConfig
from meteora_jax.routing import Movable
from meteora_jax.text import Decode

FinishReason = Literal["end", "stop", "length", "cancelled"]
Trace = bool | Literal["response"]


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: greedy at temperature 0, else from the top-k / top-p of the softmax.

    index: which of several responses with one seed this is; each draws by itself.

    Raises:
        InputError: a temperature below 0, top_k below 1, top_p outside of (0, 1].

    Examples:
        >>> mj.Sampling(temperature=0.7, top_p=0.9, seed=1)
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0
    index: int = 0

    def __post_init__(self):
        with Arguments() as given:
            given.number("temperature", self.temperature, "0 or a positive number", lambda t: t >= 0)
            given.whole("top_k", self.top_k, none=True)
            if self.top_p is not None:
                given.number("top_p", self.top_p, "a number in (0, 1]", lambda p: 0 < p <= 1)
            given.whole("seed", self.seed, least=-MOST - 1)
            given.whole("index", self.index, least=0)


GREEDY = Sampling()


@dataclasses.dataclass(frozen=True)
class BoundRow:
    """A request's router, bound: leaves [2, ...], the request's own row and one that routes to nothing.

    kind: which rows may share a program's arrays (structure, and shapes behind the first axis). identity: two requests
    with the same one treat the same tokens alike.
    """

    leaves: tuple[np.ndarray, ...]
    structure: Any
    kind: Any
    identity: bytes

    def moved(self, where: np.ndarray, count: int, columns: np.ndarray | None) -> BoundRow:
        """The same over slots; see `routing.Movable`."""
        bound = jax.tree.unflatten(self.structure, self.leaves)
        if not isinstance(bound, Movable):
            raise NotImplementedError(f"{type(bound).__name__} over slots")
        leaves, structure = jax.tree.flatten(bound.moved(where, count, columns))
        arrays = tuple(map(np.asarray, leaves))
        kind = structure, tuple((z.shape[1:], z.dtype.str) for z in arrays)
        return BoundRow(arrays, structure, kind, self.identity)


@dataclasses.dataclass(frozen=True)
class WantedAdapters:
    """What a request asks of a pool (`adapter_pool`).

    versions: the numbers of those that must lie in slots while it runs. row: its router, bound to them as adapters 0 to
    k - 1. every: it chooses among all that it knows and that lie in slots, these and others. gated: gates choose, which
    know some. scored: by scores, for which more of an adapter must have been copied.
    """

    versions: tuple[int, ...]
    row: BoundRow
    every: bool
    gated: bool = False
    scored: bool = False


class Guide(Protocol):
    """Says which tokens may come next in one response, as a grammar does."""

    def allow(self, tokens: Sequence[int]) -> np.ndarray:
        """uint32 [ceil(V / 32)], bit t % 32 of word t // 32 set where token t may follow the response so far, `tokens`;
        each call has those of the one before and none or more behind them. Must not raise: that fails the engine."""
        ...


@dataclasses.dataclass(frozen=True)
class Request:
    """One prompt and how it is to be answered.

    router: None is the base alone. adapters: of a pool, in the router's place. stop: texts that end the response.
    logprobs: so many of the likeliest tokens' log probabilities at every token beside its own; None: nobody's. trace:
    whether the routing is recorded, of the whole or of the response's tokens alone. guide: of this one response; such a
    request decodes one token in a dispatch, once the host has seen the one before. decode: tokens -> text, in which
    stop strings are looked for; None: as the engine does.
    """

    prompt: tuple[int, ...]
    max_new_tokens: int
    router: BoundRow | None = None
    sampling: Sampling = GREEDY
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    trace: Trace = False
    adapters: WantedAdapters | None = None
    guide: Guide | None = dataclasses.field(default=None, compare=False)
    decode: Decode | None = dataclasses.field(default=None, compare=False)


@dataclasses.dataclass(eq=False)
class Progress:
    """A request on its way through the engine.

    tokens: the response so far, as far as the host knows; its end token excluded. todo: what is read before the next
    token is drawn: the prompt, or after a preemption the prompt and the response so far. read: how much of `todo` has
    been given to the device. promised: how many tokens the device may have drawn by the end of what it was given.
    """

    request: Request
    number: int
    todo: list[int]
    tokens: list[int] = dataclasses.field(default_factory=list)
    blocks: list[int] = dataclasses.field(default_factory=list)
    keys: list[bytes] = dataclasses.field(default_factory=list)
    row: int | None = None
    read: int = 0
    promised: int = 0
    skipped: int = 0  # tokens that the prefix cache had
    preemptions: int = 0
    finish_reason: FinishReason | None = None
    logprobs: list[Any] = dataclasses.field(default_factory=list)
    routing: list[tuple[np.ndarray, np.ndarray]] = dataclasses.field(default_factory=list)
    placed: BoundRow | None = None  # the router over a pool's slots, as they were after `placed_at` of its changes
    placed_at: int = 0
    changes: int = 0  # of the pool when this was let in
    identity: bytes = b""
    failure: InputError | None = None  # why it could not be served

    @property
    def router(self) -> BoundRow | None:
        """What chooses its adapters."""
        return self.request.router if self.request.adapters is None else self.placed

    @property
    def prefilling(self) -> bool:
        """Whether tokens are left to be read before one is drawn."""
        return self.read < len(self.todo)

    @property
    def left(self) -> int:
        """How many more tokens the device may be asked for."""
        return self.request.max_new_tokens - self.promised

    @property
    def awaited(self) -> bool:
        """Whether a guide has to see a token, promised but not known yet, before it allows the next."""
        return self.request.guide is not None and self.promised > len(self.tokens)

    @property
    def slots(self) -> int:
        """Positions that have been given to the device, or been promised: the last token drawn is not read."""
        return self.read if self.prefilling else len(self.request.prompt) + max(self.promised - 1, 0)

    @property
    def recorded(self) -> int:
        """The first position whose routing is still to be recorded: what is read again after a preemption is not."""
        first = 0 if self.request.trace is True else len(self.request.prompt)
        return first + sum(len(indices) for indices, _ in self.routing)

    @property
    def most_slots(self) -> int:
        """The most positions that it can come to need."""
        return len(self.request.prompt) + self.request.max_new_tokens - 1


def check_token_ids(token_ids: Sequence[int], config: LlamaConfig) -> None:
    """Refuses ids that are no tokens of the model."""
    if wrong := strange_ids(token_ids, config):
        raise InputError(f"token_ids: {wrong}")


def strange_ids(token_ids: Sequence[int], config: LlamaConfig) -> str:
    """What was expected instead of the first id that is no token of the model; empty where all are."""
    strange = next((t for t in token_ids if not 0 <= t < config.vocab_size), None)
    return "" if strange is None else f"expected token ids from 0 and below {config.vocab_size}, found {strange}"


def check_prompts(prompts: Sequence[Sequence[int]], config: LlamaConfig, new_tokens: int | Sequence[int]) -> None:
    """Refuses empty prompts, unknown tokens, and prompts that with `new_tokens` (of all, or of each) are beyond the
    context; all at once."""
    problems = []
    if not prompts:
        problems.append("prompts: expected at least one, found none")
    grows = config.rope_scaling is not None and config.rope_scaling.rope_type == "dynamic"
    for i, prompt in enumerate(prompts):
        most = new_tokens if isinstance(new_tokens, int) else new_tokens[i]
        longest = config.max_position_embeddings - most
        if len(prompt) == 0:
            problems.append(f"prompt {i}: expected at least one token, found none")
        elif wrong := strange_ids(prompt, config):
            problems.append(f"prompt {i}: {wrong}")
        elif len(prompt) > longest and not grows:
            problems.append(
                f"prompt {i}: expected at most {max(longest, 0)} tokens (a context of {config.max_position_embeddings} "
                f"less {most} to generate), found {len(prompt)}"
            )
    if problems:
        raise InputError(problems)
