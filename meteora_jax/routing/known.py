"""Routers of a model whose gates know a part of its adapters: the first of them, as those that came later have no
column. Gates never choose one of those; routers that name the adapters of a request may.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from meteora_jax.config import BankConfig, InputError
from meteora_jax.gate_config import GateConfig
from meteora_jax.routing import BoundRouter, RouterArgument, bind
from meteora_jax.routing.alora import watch
from meteora_jax.routing.gates import GATES, Gates
from meteora_jax.routing.named import spelled_out
from meteora_jax.routing.retrieval import Found


def bind_known(
    router: RouterArgument,
    bank: BankConfig | None,
    gates: GateConfig | None,
    batch: int,
    prompts: Sequence[Sequence[int]] | None,
) -> BoundRouter | None:
    """A caller's `router=` made ready for a batch.

    Args:
        bank, gates: of the model. prompts: the token ids of each request; None: not known.

    Raises:
        InputError: as `bind` and `watch`; gates beside a router that names an adapter of the vocabulary.
    """
    names = bank.names if bank else ()
    router = spelled_out(router, gates, lambda: names)
    if gates is None or bank is None or len(gates.names) == len(names):
        bound = bind(router, names, batch, gates.names if gates else None)
        return watch(_having_scores(bound, bank), bank, prompts)
    known = gates.names
    rows: list[Any] = list(router) if isinstance(router, list | tuple) else [router] * batch
    if gates.null:  # kernels take the column behind the bank's last adapter for the null choice: these must not choose
        rows = [
            dataclasses.replace(r, within=known)
            if isinstance(r, Gates) and r.within is None and r.top_k <= len(known)
            else r
            for r in rows
        ]
    bound = _having_scores(bind(rows, names, batch, known), bank)
    by_gates = [isinstance(r, Gates) for r in rows]
    alone = all(own or r is None for own, r in zip(by_gates, rows, strict=True))
    if any(by_gates) and not alone and bank.vocab_adapter_names:
        raise InputError(
            f"router: expected gates in a batch of their own: {', '.join(bank.vocab_adapter_names)} change the "
            "embedding or the head, where no gate stands; found routers that name adapters beside them"
        )
    # what waits for its invocation is none of theirs
    return bound if alone and not set(bank.invoked) & set(known) else watch(bound, bank, prompts)


def _having_scores(bound: BoundRouter | None, bank: BankConfig | None) -> BoundRouter | None:
    """`bound`, of whose scores the bank has what they are made of."""
    if bound is None or bank is None or bound.asks <= GATES:
        return bound
    if "phatgoose" in bound.asks and not bank.own_gates:
        raise InputError(
            "router: expected adapters with gates of their own beside Phatgoose (meteora train adapter "
            "--own-gate), found none"
        )
    if bank.vocab_adapter_names:
        raise InputError(
            f"router: expected one that names the adapters of a request (Fixed, Retrieval, Logo): "
            f"{', '.join(bank.vocab_adapter_names)} change the embedding or the head, where adapters have no score; "
            "found one that chooses for every token"
        )
    return bound


def within_known(
    router: RouterArgument, found: Sequence[Found], names: tuple[str, ...], gates: GateConfig | None
) -> RouterArgument:
    """Routers after their look-up: of what an index found for gates to choose from, adapters that they have no column
    of are left out.

    Raises:
        InputError: fewer are left than gates are to choose.
    """
    rows: list[Any] = list(router) if isinstance(router, list | tuple) else [router] * len(found)
    if gates is None or len(gates.names) == len(names) or len(rows) != len(found):
        return router
    return [_narrowed(r, gates.names, names) if retrieved else r for r, retrieved in zip(rows, found, strict=True)]


def _narrowed(router: Any, known: tuple[str, ...], names: tuple[str, ...]) -> Any:
    if not isinstance(router, Gates) or router.within is None:
        return router
    left = tuple(name for name in router.within if name in known or name not in names)
    if len(left) < router.top_k:
        raise InputError(
            f"GatesWithin: expected at least {router.top_k} adapters that gates have a column of, found "
            f"{', '.join(left) or 'none'} of {', '.join(router.within)} (meteora train gates --extend adds columns)"
        )
    return dataclasses.replace(router, within=left)
