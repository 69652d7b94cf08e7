"""A router by its name, as command lines and other programs give it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from meteora_jax.config import InputError
from meteora_jax.gate_config import GateConfig
from meteora_jax.routing import PassRouter, Router, RouterArgument, refuse
from meteora_jax.routing.by_score import Arrow, Lag, Phatgoose, Spectr
from meteora_jax.routing.fixed import Fixed
from meteora_jax.routing.gates import Gates
from meteora_jax.routing.logo import Logo

# Routers of a bank alone that have a name: those that choose `top_k` adapters a token by a softmax at a temperature,
BY_TOKEN: Mapping[str, type[Arrow] | type[Spectr] | type[Lag] | type[Phatgoose]] = {
    "arrow": Arrow,
    "spectr": Spectr,
    "lag": Lag,
    "phatgoose": Phatgoose,
}
BY_REQUEST = ("logo", "uniform")  # and those with one choice a request: k adapters, or all alike
NAMED = (*BY_TOKEN, *BY_REQUEST)


def named_router(
    word: str,
    names: Sequence[str],
    count: int | None = None,
    temperature: float | None = None,
    within: Sequence[str] | None = None,
) -> Router | PassRouter:
    """The router of a word of NAMED.

    Args:
        names: the bank's adapters. count: how many of them act; by default the paper's number, or all if there are
            fewer. temperature: of the softmax over the chosen scores; 1 by default. within: only these may act; None:
            all.

    Raises:
        InputError: another word, no adapters, or an option that the router does not have.
    """
    if word not in NAMED:
        raise InputError(f"router: expected one of {', '.join(NAMED)}, found {word!r:.200}")
    allowed = tuple(names if within is None else within)
    if not allowed:
        raise InputError(f"router: expected a bank of adapters beside {word!r}, found none")
    if word in BY_REQUEST and temperature is not None:
        raise InputError(f"router: expected no temperature beside {word!r}, found {temperature}")
    if word == "uniform":
        if count is not None:
            raise InputError(f"router: expected all adapters beside 'uniform', found {count}")
        return Fixed(dict.fromkeys(allowed, 1 / len(allowed)))
    own = None if within is None else allowed
    if word == "logo":
        return Logo(within=own) if count is None else Logo(count, within=own)
    make = BY_TOKEN[word]
    top_k = min(make().top_k, len(allowed)) if count is None else count
    return make(top_k=top_k, temperature=1.0 if temperature is None else temperature, within=own)


def read_router(
    text: str | None,
    gates: GateConfig | None,
    names: Sequence[str],
    top_k: int | None = None,
    temperature: float | None = None,
) -> Router | PassRouter | None:
    """The router of "gates", "none", a word of NAMED, an adapter's name, or a mixture NAME=WEIGHT,NAME=WEIGHT.

    Args:
        text: None is the gates if there are any, else none.
        gates: of the loaded model. names: its adapters.
        top_k, temperature: of the gates, by default as they were trained; or of a router of NAMED.

    Raises:
        InputError: gates asked for where there are none, options of gates beside another router, an unknown adapter.
    """
    text = text or ("none" if gates is None else "gates")
    if text == "gates":
        if gates is None:
            raise InputError("router: expected gates beside 'gates', found none")
        return Gates(*gate_options(gates, top_k, temperature))
    if text in NAMED and text not in names:
        return named_router(text, names, top_k, temperature)
    if top_k is not None or temperature is not None:
        raise InputError(f"top_k, temperature of gates: expected the router gates beside them, found {text!r}")
    if text == "none":
        return None
    mixture: dict[str, float] = {}
    for part in text.split(","):
        name, equals, weight = part.partition("=")
        if not names:
            raise InputError(f"router: expected a bank of adapters beside {text!r}, found none")
        if name not in names:
            raise InputError(
                f"router: expected gates, none, {', '.join(NAMED)} or one of {', '.join(names)}, found {name!r}"
            )
        if name in mixture:
            raise InputError(f"router: expected each adapter once, found {name!r} twice")
        if not equals and "," in text:
            raise InputError(f"router: expected NAME=WEIGHT, found {part!r}")
        try:
            mixture[name] = float(weight) if equals else 1.0
        except ValueError:
            raise InputError(f"router: expected NAME=WEIGHT, found {part!r}") from None
    return Fixed(mixture) if "=" in text else Fixed(text)


WORDS = ("gates", "base", "gates if loaded")  # what `router=` may be called


def spelled_out(router: Any, gates: GateConfig | None, names: Callable[[], Sequence[str]]) -> Any:
    """A caller's `router=` with routers in the place of words: "gates" as they were trained, "base" (None), and "gates
    if loaded", which is the one or the other. names: the bank's, asked for by a refusal alone: they may be thousands.

    Raises:
        InputError: another word; adapters and indices are never named by a bare string.
    """
    if isinstance(router, list | tuple):
        return [spelled_out(r, gates, names) for r in router]
    if not isinstance(router, str):
        return router
    if router == "base" or (router == "gates if loaded" and gates is None):
        return None
    if router not in WORDS:
        refuse(router, names())
    if gates is None:
        raise InputError("router: expected trained gates beside 'gates', found a model loaded without them")
    return Gates(gates.top_k, gates.temperature)


def gate_options(gates: GateConfig, top_k: int | None, temperature: float | None) -> tuple[int, float]:
    """Top-k and temperature, as the gates were trained where a caller says nothing."""
    return gates.top_k if top_k is None else top_k, gates.temperature if temperature is None else temperature


def one_a_row(router: RouterArgument, count: int) -> list[Any]:
    """A caller's `router=` as a list of one a row. Raises InputError: it is a list of another length."""
    rows: list[Any] = list(router) if isinstance(router, list | tuple) else [router] * count
    if len(rows) != count:
        raise InputError(f"router: expected a list of {count} (one a prompt), found {len(rows)}")
    return rows
