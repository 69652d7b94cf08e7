"""A model's state: filled from a base, a bank and gates, on any mesh; and adapters taken out of it again."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike

from meteora_jax.bank import AdapterBank
from meteora_jax.config import ENDS, GROUPS, BankConfig, LlamaConfig
from meteora_jax.execution import ExecutionConfig
from meteora_jax.gate_config import TokenRouterForm
from meteora_jax.io.gates import count_columns, gate_weights
from meteora_jax.io.tensors import StoredArray
from meteora_jax.model.layout import lay_out
from meteora_jax.model.llama import Llama
from meteora_jax.model.lora_linear import column_shards
from meteora_jax.model.routed_llama import gated_llama
from meteora_jax.model.shares import refusal
from meteora_jax.model.vocab_adapters import vocab_tensors
from meteora_jax.sharding import Params, place, shard_order, sharding, tensor_shards
from meteora_jax.spectra import SPECTRA

LOG = logging.getLogger(__name__)
SMALL = 1 << 20  # elements of a leaf that is filled on the host


def split_bank(
    bank: AdapterBank, state: Mapping[tuple[str, ...], Any], config: LlamaConfig, mesh: Mesh | None
) -> AdapterBank:
    """The bank with the a and b of a module tree that lay on `mesh`: the inverse of `AdapterBank.group`."""
    a, b, orders = {}, {}, column_orders(config, tensor_shards(mesh))
    state = {path: np.asarray(value) for path, value in state.items()}
    for group, order in orders.items():
        if (path := ("layers", group, "lora_b")) in state:
            state[path] = state[path][..., np.argsort(order)]
    for group, projections in GROUPS.items():
        start = 0
        for i, p in enumerate(projections):
            o = bank.config.base_shapes[p][1]
            if rank := bank.config.ranks.get(p):
                a[p] = np.asarray(state["layers", group, "lora_a"])[:, i, :, :rank]
                b[p] = np.asarray(state["layers", group, "lora_b"])[:, :, :rank, start : start + o]
            start += o
    return dataclasses.replace(bank, a=a, b=b)


# what of a group has its output's columns
COLUMNS = ("kernel", "kernel_scale", "kernel_zero", "bias", "lora_b", "lora_dora", "lora_bias")


def column_orders(config: LlamaConfig, tensor: int) -> dict[str, np.ndarray]:
    """`shard_order` of the groups whose columns are not stored in the projections' own order on such a mesh."""
    widths = {group: [config.projection_shape(p)[1] for p in projections] for group, projections in GROUPS.items()}
    shards = {group: column_shards(config, group, tensor) for group in GROUPS}
    return {group: shard_order(widths[group], n) for group, n in shards.items() if n > 1}


def _in_shards(value: Any, order: np.ndarray, shards: int) -> Any:
    """Columns in a group's order on a mesh; a model's own arrays lie so already."""
    if isinstance(value, StoredArray):
        return value.in_shards(shards)
    return value if isinstance(value, jax.Array) else value[..., order]


def execution_on(config: LlamaConfig, dtype: DTypeLike, mesh: Mesh | None) -> ExecutionConfig:
    """How a model of these sizes runs on a mesh; without kernels, and a line that says so, where its tensor axis gives
    no device whole heads."""
    execution = ExecutionConfig.here(dtype, mesh)
    why = refusal(config, tensor_shards(mesh)) if execution.shares else None
    if why is None:
        return execution
    LOG.warning("%s: XLA runs the steps, without kernels", why)
    return dataclasses.replace(execution, shares=False, step=None, ragged=False)


def assemble(
    config: LlamaConfig,
    weights: Mapping[tuple[str, ...], Any],
    bank: AdapterBank | None,
    gates: Mapping[str, np.ndarray] | None,
    dtype: DTypeLike,
    mesh: Mesh | None = None,
    form: TokenRouterForm | None = None,
    slots: BankConfig | None = None,
    known: int | None = None,
) -> tuple[nnx.GraphDef, Params]:
    """A model's graph definition and state with every leaf filled: nothing is initialised and then replaced.

    With a mesh every leaf goes straight to the devices that hold a part of it; of a base that `load_base` left on disk
    a host reads only those parts. form: of the gates, if there are any. slots: a bank of empty slots in the place of
    `bank`. known: how many adapters the gates have a column of; None: all of the bank's.
    """
    bank_config = bank.config if bank is not None else slots
    execution = execution_on(config, dtype, mesh)

    def fresh() -> Llama:
        if gates is None or bank_config is None:
            return Llama(config, bank_config, dtype=dtype, rngs=nnx.Rngs(0), execution=execution)
        adapters = len(bank_config.names) if known is None else known
        return gated_llama(
            config, bank_config, form, dtype, nnx.Rngs(0), execution, count_columns(gates) > adapters, adapters
        )

    abstract = nnx.eval_shape(fresh)
    lay_out(abstract, tensor_shards(mesh))
    graph, state = nnx.split(abstract)
    filled = dict(weights)
    if bank is not None:
        for group in GROUPS:
            filled |= {("layers", group, k): v for k, v in (bank.group(group) or {}).items()}
        for end in ENDS:
            filled |= {(f"{end}_adapters", k): v for k, v in vocab_tensors(bank, end).items()}
    if gates is not None:
        filled |= gate_weights(gates)
    for group, order in column_orders(config, tensor_shards(mesh)).items():
        for path in (("layers", group, part) for part in COLUMNS):
            if path in filled:
                filled[path] = _in_shards(filled[path], order, tensor_shards(mesh))
    leaves = nnx.to_flat_state(state)
    loaded = []
    for path, leaf in leaves:
        place = tuple(map(str, path))
        empty = place not in filled and (slots is not None or place[-1] in SPECTRA)
        value = _empty(leaf, place, config, mesh) if empty else _placed(path, leaf, filled.pop(place), mesh)
        loaded.append((path, leaf.replace(value)))
    assert not filled, f"weights without a place in the model: {sorted(filled)}"
    return graph, nnx.from_flat_state(loaded)


def _empty(leaf: Any, path: tuple[str, ...], config: LlamaConfig, mesh: Mesh | None) -> jax.Array:
    """A leaf of empty slots, made on its devices; a small one is sent there: a program of its own takes longer."""
    where = None if mesh is None else sharding(mesh, leaf.get_metadata("axes"), leaf.shape)
    value = config.vocab_size if path[-1] == "ids" else 0
    if mesh is None and leaf.size <= SMALL:
        return jax.device_put(np.full(leaf.shape, value, leaf.dtype))
    return jnp.full(leaf.shape, value, leaf.dtype, device=where)


def _placed(path: Any, leaf: Any, value: Any, mesh: Mesh | None) -> jax.Array:
    assert leaf.shape == value.shape, f"{path}: {leaf.shape} != {value.shape}"
    if mesh is None:  # NumPy casts, which takes no program
        return jnp.asarray(value if isinstance(value, jax.Array) else np.asarray(value, leaf.dtype), leaf.dtype)
    where = sharding(mesh, leaf.get_metadata("axes"), leaf.shape)
    if isinstance(value, jax.Array) and value.sharding == where and value.dtype == leaf.dtype:
        return value  # another model's, shared
    return place(value, where, leaf.dtype)
