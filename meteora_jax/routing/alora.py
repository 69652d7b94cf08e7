"""Adapters that a token sequence switches on: activated LoRA (aLoRA, arXiv 2504.12397), as peft runs it.

Such an adapter acts from the first token of the last occurrence of its invocation in the prompt on, and on every token
that is generated; where the prompt does not hold its invocation it does not act at all. The request's router says with
what weight, this module from which token on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from meteora_jax.config import BankConfig, InputError
from meteora_jax.routing import NOTHING, BoundRouter, GateLogits, Routing, Score

NEVER = np.iinfo(np.int32).max


def activation(tokens: Sequence[int], invocation: Sequence[int]) -> int:
    """Where the last occurrence of `invocation` in `tokens` begins; NEVER where there is none."""
    wanted = list(invocation)
    starts = range(len(tokens) - len(wanted), -1, -1)
    return next((i for i in starts if list(tokens[i : i + len(wanted)]) == wanted), NEVER)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Invoked:
    """A request's routing of which some adapters act on later tokens only.

    routing: [B, 1, 1, C]. starts: int32 [B, C], the position from which each of a request's choices acts (0:
    everywhere, NEVER: nowhere).
    """

    routing: Routing
    starts: Any

    @property
    def gating(self) -> None:
        """Gates have no part in it."""

    def moved(self, where: np.ndarray, count: int, columns: np.ndarray | None) -> Invoked:
        """See `Movable`."""
        starts = np.repeat(np.asarray(self.starts), where.shape[1], axis=-1)
        return Invoked(self.routing.moved(where, count, columns), starts)

    @property
    def asks(self) -> frozenset[Score]:
        """Nothing."""
        return NOTHING

    def after_gates(self, x: jax.Array, gates: GateLogits) -> Invoked:
        """Itself."""
        return self

    def known(self, positions: jax.Array | None) -> Routing:
        """indices [B, 1, 1, C], weights [B, T, 1, C]: 0 on the tokens before a choice's start. Where weights may not
        vary, at embedding and head, no adapter with an invocation acts."""
        if positions is None:
            return self.routing
        acts = positions[:, :, None, None] >= self.starts[:, None, None, :]
        return dataclasses.replace(self.routing, weights=jnp.where(acts, self.routing.weights, 0.0))

    def route(self, x: jax.Array, gates: GateLogits) -> Routing:
        """Not asked: the routing is known."""
        raise NotImplementedError("Invoked.known gives the routing")


def watch(
    bound: BoundRouter | None, bank: BankConfig | None, prompts: Sequence[Sequence[int]] | None
) -> BoundRouter | None:
    """`bound`, made to wait for the invocations of the adapters that it names; untouched where none of them has one.

    Args:
        prompts: the token ids of each request; None: not known.

    Raises:
        InputError: a router that chooses for every token, beside such adapters; prompts that are not known.
    """
    if bound is None or bank is None or not bank.invoked:
        return bound
    routing = bound.known(None)
    if routing is None:
        raise InputError(
            f"router: expected one that names the adapters of a request (Fixed, Retrieval): {', '.join(bank.invoked)} "
            "act from their invocation on, of which a choice by token knows nothing; found one "
            "that chooses for every token"
        )
    chosen = np.asarray(routing.indices)[:, 0, 0]
    found = [[bank.adapters[i].invocation if i >= 0 else () for i in row] for row in chosen]
    if not any(map(any, found)):
        return bound
    if prompts is None:
        raise InputError(f"prompts: expected the tokens in which {', '.join(bank.invoked)} are invoked, found none")
    starts = np.zeros(chosen.shape, np.int32)
    for row, prompt, invocations in zip(starts, prompts, found, strict=True):
        row[:] = [activation(prompt, invocation) if invocation else 0 for invocation in invocations]
    return Invoked(routing, starts)
