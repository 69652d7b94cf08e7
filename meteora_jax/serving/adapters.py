"""Adapters that come and go while the server runs.

The engine's arrays have one size for a bank, so a change makes another engine: requests that arrive wait, those under
way end by the old bank, and then the new engine takes its place with an empty cache.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from meteora_jax.api import Meteora
from meteora_jax.config import InputError
from meteora_jax.serving.errors import ApiError
from meteora_jax.serving.models import VIRTUAL
from meteora_jax.serving.server import Server

LOG = logging.getLogger(__name__)


def inside(root: Path, path: str) -> Path:
    """A folder below the root, links followed.

    Raises:
        ApiError: it is outside or not there; which of both is not said.
    """
    refusal = ApiError(400, "lora_path: expected a folder below the server's adapter root", param="lora_path")
    try:
        found = (root / path).resolve(strict=True)
        if found.is_relative_to(root.resolve(strict=True)) and found.is_dir():
            return found
    except (OSError, ValueError, RuntimeError):
        raise refusal from None
    raise refusal


async def add(server: Server, name: str, path: str) -> dict[str, Any]:
    """Adds an adapter under a name; one of that name is replaced."""
    root = server.settings.adapter_root
    assert root is not None
    folder = await server.read(lambda: inside(root, path))
    if name == server.fleet.base or name.partition(":")[0] in VIRTUAL:
        raise ApiError(400, f"lora_name: {name!r:.200} is the name of the base or a router", param="lora_name")

    def change(model: Meteora) -> Meteora:
        if name not in model.adapter_names:
            return model.add_adapter(folder, name)
        fresh = name + "\u2060"  # a bank may not become empty: the new one comes before the old one goes
        model = model.add_adapter(folder, fresh).remove_adapter(name)
        assert model.bank is not None
        infos = (dataclasses.replace(info, name=name) if info.name == fresh else info for info in model.bank.adapters)
        return dataclasses.replace(model, bank=dataclasses.replace(model.bank, adapters=tuple(infos)))

    async with server.changes:
        await _swap(server, change)
    gates = server.fleet.model.gates
    known = gates is not None and name in gates.names
    return {"status": "loaded", "lora_name": name, "reachable_by": ["name"], "known_to_gates": known}


async def remove(server: Server, name: str) -> dict[str, Any]:
    """Takes an adapter away."""
    async with server.changes:
        if name not in server.fleet.model.adapter_names:
            raise ApiError(404, f"the adapter {name!r:.200} does not exist", code="model_not_found", param="lora_name")
        await _swap(server, lambda model: model.remove_adapter(name))
    return {"status": "unloaded", "lora_name": name}


async def _swap(server: Server, change: Callable[[Meteora], Meteora]) -> None:
    """Another model in the place of the served one, and an engine for it."""
    old = server.fleet
    try:
        model = await server.read(lambda: change(old.model))
        fleet = dataclasses.replace(old, model=model)
    except InputError as e:
        LOG.warning("an adapter was refused: %s", e)
        said = re.sub(r"/[^\s:,;]*/", "", "; ".join(e.problems))  # whose folders these are is not the client's business
        raise ApiError(400, said[:1000]) from None
    async with server.closed():
        make = functools.partial(server.make, fleet)
        await server.driver.call(lambda: server.driver.replace(make, len(model.adapter_names)))
        server.fleet = fleet
