"""The folders of a base, a bank and gates become a model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from meteora_jax import compilation_cache
from meteora_jax.api import Meteora
from meteora_jax.arguments import Arguments
from meteora_jax.config import GROUPS, InputError
from meteora_jax.execution import default_dtype, packs
from meteora_jax.io.bank import load_bank
from meteora_jax.io.base import load_base, read_origin
from meteora_jax.io.gates import load_gates
from meteora_jax.io.model_state import assemble
from meteora_jax.model.llama import pack
from meteora_jax.text import load_tokenizer

DTYPES = ("float32", "bfloat16", "float16")


def load(
    base: str | os.PathLike[str],
    bank: str | os.PathLike[str] | None = None,
    gates: str | os.PathLike[str] | None = None,
    mesh: Any = None,
    dtype: str | None = None,
) -> Meteora:
    """Loads BASE, and on top of it BANK and GATES, made by `meteora import` and `meteora train gates`.

    Args:
        base: the BASE folder. bank: the BANK folder of its adapters; None: the base alone. gates: the GATES folder of
            that bank; None: adapters act where a router names them.
        mesh: of `sharding.make_mesh`: weights are split over its devices, and batches too; None is one device.
        dtype: of base, adapters and activations; by default float32 on a CPU, bfloat16 on an accelerator; the model's
            `dtype` says which. Gates stay float32.

    Raises:
        InputError: a folder is missing, damaged, or made for another base or bank.
    """
    compilation_cache.use()
    with Arguments() as given:
        given.path("base", base)
        given.path("bank", bank, none=True)
        given.path("gates", gates, none=True)
        if mesh is not None and not isinstance(mesh, Mesh):
            given.refuse("mesh", "one of sharding.make_mesh, or None", mesh)
        if dtype is not None:
            given.choice("dtype", dtype, DTYPES)
    if gates is not None and bank is None:
        raise InputError(f"{gates}: gates: expected a bank beside them, found none")
    kind = jnp.dtype(default_dtype(dtype))
    config, weights = load_base(base, kind)
    loaded = load_bank(bank, config, kind, read_origin(base)) if bank is not None else None
    gate_config, columns = load_gates(gates, config, loaded.names) if gates is not None and loaded else (None, None)
    form = gate_config.form if gate_config else None
    graph, state = assemble(config, weights, loaded, columns, kind, mesh, form)
    if packs(kind, mesh):
        graph, state = pack(graph, state, release=GROUPS)
    held = config, loaded.config if loaded else None, gate_config, load_tokenizer(base), graph, state, mesh, Path(base)
    return Meteora(*held)
