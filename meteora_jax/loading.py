"""The folders of a base, a bank and gates become a model."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from meteora_jax import compilation_cache
from meteora_jax.adapter_files import importer_of
from meteora_jax.api import Meteora
from meteora_jax.arguments import Arguments
from meteora_jax.config import GROUPS, BankConfig, InputError, LlamaConfig
from meteora_jax.engine.adapter_pool import AdapterPool
from meteora_jax.engine.memory import free_bytes
from meteora_jax.execution import Dtype, default_dtype
from meteora_jax.io.bank import load_bank
from meteora_jax.io.base import load_base, read_origin
from meteora_jax.io.gates import gate_weights, load_gates
from meteora_jax.io.model_bank import packs
from meteora_jax.io.model_state import assemble
from meteora_jax.io.stored_bank import StoredBank, empty_slots, slots_for
from meteora_jax.model.layout import pack
from meteora_jax.text import load_tokenizer

SLOTS = 64  # where the memory is not known
DTYPES: tuple[Dtype, ...] = get_args(Dtype)


def load(
    base: str | os.PathLike[str],
    bank: str | os.PathLike[str] | None = None,
    gates: str | os.PathLike[str] | None = None,
    mesh: Mesh | None = None,
    dtype: Dtype | None = None,
    adapter_slots: int | Literal["auto"] | None = None,
    adapter_rank: int | None = None,
) -> Meteora:
    """Loads BASE, and on top of it BANK and GATES, made by `meteora import` and `meteora train gates`.

    Args:
        base: the BASE folder. bank: the BANK folder of its adapters; None: the base alone. gates: the GATES folder of
            that bank; None: adapters act where a router names them.
        mesh: of `sharding.make_mesh`: weights are split over its devices, and batches too; None is one device.
        dtype: of base, adapters and activations; by default float32 on a CPU, bfloat16 on an accelerator; the model's
            `dtype` says which. Gates stay float32.
        adapter_slots: the bank stays on disk, and so many of its adapters are on the device at a time, those that
            requests ask for; the model's `pool` loads and unloads others meanwhile. "auto": what half of the memory
            beside the base holds, and 64 where that is not known, at most one an adapter. None: all are on the device,
            as they have to be over several hosts.
        adapter_rank: of a slot, at every projection; an adapter of a larger rank takes several slots, so that one of
            rank 8 does not pay for one of rank 64. None: as the bank's need.

    Raises:
        InputError: a folder is missing, damaged, or made for another base or bank; slots over several hosts.

    Examples:
        >>> import meteora_jax as mj
        >>> model = mj.load("runs/demo/base", bank="runs/demo/bank", gates="runs/demo/gates", dtype="float32")
        >>> model.adapter_names
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
        if adapter_slots != "auto":
            given.whole("adapter_slots", adapter_slots, none=True)
        given.whole("adapter_rank", adapter_rank, none=True)
    if gates is not None and bank is None:
        raise InputError(f"{gates}: gates: expected a bank beside them, found none")
    if bank is None and adapter_slots is not None:
        raise InputError(f"adapter_slots: expected a bank beside them, found none for {adapter_slots}")
    if adapter_slots is not None and jax.process_count() > 1:
        # whatever is loaded or unloaded meanwhile would have to change every host's slots at the same step
        found = f"{jax.process_count()}: over several hosts a bank is on the devices as a whole"
        raise InputError(f"adapter_slots: expected one process, found {found}")
    if adapter_slots is None and adapter_rank is not None:
        raise InputError(f"adapter_rank: expected adapter_slots beside it, found none for {adapter_rank}")
    kind = jnp.dtype(default_dtype(dtype))
    if bank is not None and adapter_slots is not None:
        return _load_slots(Path(base), Path(bank), gates, mesh, kind, adapter_slots, adapter_rank)
    config, weights = load_base(base, kind)
    loaded = load_bank(bank, config, kind, read_origin(base)) if bank is not None else None
    gate_config, columns = load_gates(gates, config, loaded.names) if gates is not None and loaded else (None, None)
    form = gate_config.form if gate_config else None
    graph, state = assemble(config, weights, loaded, columns, kind, mesh, form)
    if packs(graph, state, mesh):
        graph, state = pack(graph, state, release=GROUPS)
    held = config, loaded.config if loaded else None, gate_config, load_tokenizer(base), graph, state, mesh, Path(base)
    return Meteora(*held)


def _load_slots(
    base: Path,
    bank: Path,
    gates: Any,
    mesh: Mesh | None,
    kind: np.dtype,
    asked: int | Literal["auto"],
    rank: int | None,
) -> Meteora:
    """A model whose bank stays on disk, but for the slots."""
    config, weights = load_base(base, kind)
    origin = read_origin(base)
    stored = StoredBank(bank, config, kind, origin)
    one = empty_slots(stored.config, 1, rank)
    count = fitting_slots(config, stored.config, one, kind, _free_bytes(mesh)) if asked == "auto" else asked
    slots = empty_slots(stored.config, count, rank)
    described, columns = load_gates(gates, config, stored.config.names) if gates is not None else (None, None)
    if described is not None and stored.config.vocab_adapter_names:
        found = ", ".join(stored.config.vocab_adapter_names)
        raise InputError(
            f"{bank}: expected no adapter of the embedding or the head beside gates and slots, found {found}"
        )
    if large := [a.name for a in stored.config.adapters if slots_for(a.rank, slots) > count]:
        room = f"adapters of at most {count} slots of rank {rank}"
        raise InputError(f"adapter_rank: expected {room}, found {', '.join(large[:8])}")
    form = described.form if described else None
    held, known = columns, len(stored.config.names)
    if columns is not None and described is not None and form is None:
        null = int(described.null)  # its column stays, behind the slots'
        held = {p: np.zeros((*g.shape[:-1], count + null), np.float32) for p, g in columns.items()}
        for p, g in columns.items() if null else ():
            held[p][..., -1] = g[..., -1]
        known = count
    graph, state = assemble(config, weights, None, held, kind, mesh, form, slots, known)
    if mesh is None and packs(graph, state, mesh):  # on a mesh slots stay apart from the kernels' rows
        graph, state = pack(graph, state, release=GROUPS)
    paged = gate_weights(columns) if columns is not None and form is None else None
    pool = AdapterPool(
        stored, slots, graph, state, config, described, paged, mesh, kind, origin, importer_of(base)
    )  # fmt: skip
    return Meteora(config, stored.config, described, load_tokenizer(base), graph, state, mesh, base, pool)


def _free_bytes(mesh: Mesh | None) -> int | None:
    """What the devices that share a model's weights have left together; None where that is not known."""
    free = free_bytes(mesh)
    return free if free is None or mesh is None else free * mesh.shape["fsdp"] * mesh.shape["tensor"]


def fitting_slots(config: LlamaConfig, bank: BankConfig, slot: BankConfig, kind: np.dtype, free: int | None) -> int:
    """How many slots, each like the only one of `slot`, half of the memory beside the base holds: at least one, at most
    what the bank's adapters take. free: bytes; None: not known."""
    most = sum(slots_for(info.rank, slot) for info in bank.adapters)
    if free is None:
        return min(SLOTS, most)
    each = sum(math.prod(shape) for name, shape in slot.weight_shapes().items() if name.endswith((".a", ".b", ".rows")))
    return min(most, max(1, int((free - config.weight_bytes(kind.itemsize)) / kind.itemsize / 2 / each)))
