"""Adapters as a loaded model's arrays have them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from meteora_jax.bank import AdapterBank
from meteora_jax.config import ENDS, GROUPS, LlamaConfig
from meteora_jax.io.model_state import column_orders
from meteora_jax.model.packed_linear import PackedLinear
from meteora_jax.model.vocab_adapters import vocab_tensors
from meteora_jax.sharding import Params, fetch, place, sharding, tensor_shards
from meteora_jax.spectra import SPECTRA, spectra
from pallas_kernels.routed_lora.reference import columns as columns_of

# Of a model's arrays those with an axis of adapters, or of the gates' columns: which one.
ADAPTER_AXES = {
    "lora_a": -3, "lora_b": -3, "lora_scale": -1, "lora_arrow": -2, "lora_spectr": -3, "lora_dora": -2,
    "lora_bias": -2, "own_gate": -2, "rows": -3, "ids": -2,
}  # fmt: skip
COLUMN_AXES = {"gate": -1, "task": -1, "previous": -1}


def rank_in(weights: Params) -> Callable[[int, str], int]:
    """What `BankConfig.take` asks, of a loaded model: rows of an adapter's A up to the last that is not zero."""
    flat = {tuple(map(str, path)): leaf for path, leaf in nnx.to_flat_state(weights)}

    def rank(i: int, place: str) -> int:
        if place in ENDS:
            a = flat[f"{place}_adapters", "lora_a"][...][i]
            used = jnp.any(a != 0, axis=0 if place == "embed" else 1)
        else:
            group = next(g for g, projections in GROUPS.items() if place in projections)
            a = flat["layers", group, "lora_a"][...][:, GROUPS[group].index(place), i]
            used = jnp.any(a != 0, axis=(0, 2))
        return int(np.flatnonzero(np.asarray(used)).max(initial=0)) + 1

    return rank


def packs(graph: nnx.GraphDef, weights: Params, mesh: Mesh | None) -> bool:
    """Whether the model is one that `pack` prepares for inference, or has prepared."""
    model = nnx.merge(graph, weights)
    layers = model.layers
    return model.execution.packs(model.dtype, mesh) or any(
        isinstance(getattr(layers, group), PackedLinear) for group in GROUPS
    )


def adapter_tensors(
    bank: AdapterBank, config: LlamaConfig, mesh: Mesh | None,
    into: Mapping[tuple[str, ...], np.ndarray] = MappingProxyType({}),
) -> dict[tuple[str, ...], np.ndarray]:  # fmt: skip
    """A bank's arrays by their paths in the module tree, columns as they lie on the mesh.

    into: memory for a group's lora_a and lora_b; see `AdapterBank.group`.
    """
    orders = column_orders(config, tensor_shards(mesh))
    found: dict[tuple[str, ...], np.ndarray] = {}
    for group in GROUPS:
        a, b = (into.get(("layers", group, name)) for name in ("lora_a", "lora_b"))
        memory = None if a is None or b is None else (a, b)
        for name, value in (bank.group(group, memory) or {}).items():
            by_column = group in orders and name in ("lora_b", "lora_dora", "lora_bias")
            found["layers", group, name] = value[..., orders[group]] if by_column else value
    for end in ENDS:
        found |= {(f"{end}_adapters", name): value for name, value in vocab_tensors(bank, end).items()}
    return found


def fill_spectra(graph: nnx.GraphDef, weights: Params, mesh: Mesh | None) -> None:
    """Puts into a model's own arrays, in place, what routers of a bank alone read of its adapters; every host calls."""
    layers = nnx.merge(graph, weights).layers
    leaves = {tuple(map(str, path)): leaf for path, leaf in nnx.to_flat_state(weights)}
    for group in GROUPS:
        linear = getattr(layers, group)
        if linear.lora_a is None:
            continue
        a, b, scale = (fetch(leaves["layers", group, name][...]) for name in ("lora_a", "lora_b", "lora_scale"))
        for name, value in zip(SPECTRA, group_spectra(a, b, scale, linear.splits, linear.shards), strict=True):
            leaf = leaves["layers", group, name]
            leaf.set_value(
                jnp.asarray(value)
                if mesh is None
                else place(value, sharding(mesh, leaf.get_metadata("axes"), value.shape))
            )


def group_spectra(
    a: np.ndarray, b: np.ndarray, scale: np.ndarray, splits: Sequence[int], shards: int
) -> tuple[np.ndarray, np.ndarray]:
    """`SPECTRA` of a group's arrays as `AdapterBank.group` has them, the columns in `shards` parts."""
    b = b.reshape(*b.shape[:3], shards, -1)
    found = []
    for p, (start, stop) in enumerate(columns_of(tuple(o // shards for o in splits))):
        own = b[..., start:stop].reshape(*b.shape[:3], -1)  # in which order columns lie changes neither
        found.append(spectra(a[:, p], own, scale[:, p]))
    arrow, spectr = (np.stack(parts, 1) for parts in zip(*found, strict=True))
    return arrow, spectr
