"""Adapters that come and go while the server runs.

With slots (`--adapter-slots`) the model's pool takes them while requests run: those under way keep the version that
they were given. Without, the engine's arrays have the size of the bank, so a change makes another engine: requests that
arrive wait, those under way end by the old bank, and the new engine takes its place with an empty cache.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from meteora_jax.api import Meteora
from meteora_jax.config import InputError
from meteora_jax.retriever.index import Index, check_profile
from meteora_jax.serving.errors import ApiError
from meteora_jax.serving.models import SHOWN, VIRTUAL, named
from meteora_jax.serving.schemas import LoadAdapterRequest
from meteora_jax.serving.server import Server

LOG = logging.getLogger(__name__)
T = TypeVar("T")


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


async def add(server: Server, asked: LoadAdapterRequest) -> dict[str, Any]:
    """Adds an adapter under a name; one of that name gets a new version."""
    root, name = server.settings.adapter_root, asked.lora_name
    assert root is not None
    folder = await server.read(lambda: inside(root, asked.lora_path))
    if name == server.fleet.base or name.partition(":")[0] in VIRTUAL:
        raise ApiError(400, f"lora_name: {name!r:.200} is the name of the base or a router", param="lora_name")
    index, version = server.fleet.index, None
    if asked.profiles is not None and index is None:
        raise ApiError(400, "profiles: expected a server with an index, found one without", param="profiles")
    if asked.profiles is not None and (problems := check_profile(name, asked.profiles)):
        raise ApiError(400, "; ".join(problems)[:1000], param="profiles")  # before the adapter is there
    async with server.changes:
        if (pool := server.fleet.model.pool) is not None:
            version = await _refusing(server, lambda: pool.load(folder, name))
        else:
            await _swap(server, lambda model: _with(model, folder, name))
        if index is not None and asked.profiles is not None:
            await _refusing(server, lambda: _profile(index, name, asked.profiles or []))
    gates = server.fleet.model.gates
    ways = {
        "name": True, "retrieve": index is not None and name in index.names,
        "gates": gates is not None and name in gates.names,
    }  # fmt: skip
    reached = {"reachable_by": [way for way, there in ways.items() if there]}
    if gates is not None and not ways["gates"]:
        reached["note"] = ["gates choose it once they were extended (meteora train gates --extend) and are loaded"]
    return {"status": "loaded", "lora_name": name, "version": version, **reached}


async def remove(server: Server, name: str) -> dict[str, Any]:
    """Takes an adapter away; requests under way keep it."""
    async with server.changes:
        if name not in server.fleet.model.adapter_names:
            known = ", ".join(server.fleet.model.adapter_names[:SHOWN]) or "none"
            said = f"the adapter {name!r:.200} does not exist: expected one of the bank's ({known})"
            raise ApiError(404, said, code="model_not_found", param="lora_name")
        if (pool := server.fleet.model.pool) is not None:
            await _refusing(server, lambda: pool.unload(name))
        else:
            await _swap(server, lambda model: dataclasses.replace(model).remove_adapter(name))
    return {"status": "unloaded", "lora_name": name}


def _with(model: Meteora, folder: Path, name: str) -> Meteora:
    """Another model with an adapter under a name, in the place of one that has it; the served one stays as it is."""
    model = dataclasses.replace(model)
    if name not in model.adapter_names:
        return model.add_adapter(folder, name)
    # a bank may not become empty: the new one comes before the old one goes
    fresh = next(f"{name}.{i}" for i in itertools.count(2) if f"{name}.{i}" not in model.adapter_names)
    model = model.add_adapter(folder, fresh).remove_adapter(name)
    assert model.bank is not None
    infos = (dataclasses.replace(info, name=name) if info.name == fresh else info for info in model.bank.adapters)
    return dataclasses.replace(model, bank=dataclasses.replace(model.bank, adapters=tuple(infos)))


def _profile(index: Index, name: str, inputs: list[str]) -> None:
    """Makes an adapter findable by what it is good at; what the scoring has to learn of it, it learns now."""
    if problems := check_profile(name, inputs):
        raise InputError(problems)
    if name in index.names:
        index.remove([name])
    index.add({name: inputs})
    index.query(inputs[:1], 1)


async def _refusing(server: Server, work: Callable[[], T]) -> T:
    """What `work` returns, away from the loop; its refusals without the server's folders."""
    try:
        return await server.read(work)
    except InputError as e:
        LOG.warning("an adapter was refused: %s", e)
        said = re.sub(r"/[^\s:,;]*/", "", "; ".join(e.problems))
        raise ApiError(400, said[:1000]) from None


async def _swap(server: Server, change: Callable[[Meteora], Meteora]) -> None:
    """Another model in the place of the served one, and an engine for it."""
    old = server.fleet
    fleet = dataclasses.replace(old, model=await _refusing(server, lambda: change(old.model)))
    async with server.closed():
        make = functools.partial(server.make, fleet)
        await server.driver.call(lambda: server.driver.replace(make, named(fleet)))
        server.fleet = fleet
