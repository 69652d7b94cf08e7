"""Adapters put into a loaded model and taken out of it, an array at a time; all others are shared, not copied."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from meteora_jax.bank import AdapterBank
from meteora_jax.config import ENDS, GROUPS, BankConfig, LlamaConfig
from meteora_jax.gate_config import GateConfig
from meteora_jax.io.model_state import column_orders
from meteora_jax.model.layout import lay_out, pack, plain_head
from meteora_jax.model.llama import Llama
from meteora_jax.model.packed_linear import PackedLinear
from meteora_jax.model.routed_llama import gated_llama
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


def change_adapters(
    graph: nnx.GraphDef,
    weights: Params,
    config: LlamaConfig,
    bank: BankConfig,
    keep: Sequence[int],
    added: AdapterBank | None,
    gates: GateConfig | None,
    columns: Sequence[int],
    mesh: Mesh | None,
    packs: bool,
    release: bool,
) -> tuple[nnx.GraphDef, Params]:
    """A model's graph and state with another bank: those of `load` from the folders of that bank and of its gates.

    Args:
        bank: what it becomes: the adapters at `keep` of the old one, and behind them the one of `added`.
        added: a bank of one adapter, in the model's type; None: none is added.
        gates: what they become: `bank`'s first adapters are those that they know; None: the model has none then.
        columns: of the old gates, those that stay, a null choice's among them.
        packs: whether groups are packed for inference, as `load` does on a GPU in 16 bit.
        release: arrays that are replaced are deleted as soon as there is the new one; `weights` is then of no more use.
    """
    model = nnx.merge(graph, weights)
    dtype, execution = model.dtype, model.execution

    def fresh() -> Llama:
        if gates is None:
            return Llama(config, bank, dtype=dtype, rngs=nnx.Rngs(0), execution=execution)
        known = len(gates.names)
        return gated_llama(config, bank, gates.form, dtype, nnx.Rngs(0), execution, gates.null, known)

    abstract = nnx.eval_shape(fresh)
    lay_out(abstract, tensor_shards(mesh))
    at_vocabulary = set(bank.vocab_adapter_names)
    abstract.gates_leave_vocab = bool(gates and at_vocabulary and not at_vocabulary & set(gates.names))
    new_graph, state = nnx.split(abstract)
    held = {tuple(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(weights)}
    unpacked = _unpack(model, held, release)
    one = {} if added is None else adapter_tensors(added, config, mesh)
    # a token id that is none: VocabAdapters' padding
    fills = {"ids": config.vocab_size}
    leaves = []
    for path, leaf in nnx.to_flat_state(state):
        place = tuple(map(str, path))
        old, name = held.get(place), place[-1]
        if name in ADAPTER_AXES or name in COLUMN_AXES:
            staying = keep if name in ADAPTER_AXES else columns
            axis = (ADAPTER_AXES | COLUMN_AXES)[name]
            new = _rebuilt(leaf, axis, staying, old, one.get(place), fills.get(name, 0), mesh)
            if release and old is not None:
                old.delete()
        else:
            new = old
        leaves.append((path, leaf.replace(new)))
    changed = nnx.from_flat_state(leaves)
    del held, leaves, state
    return pack(new_graph, changed, release=GROUPS if release else unpacked) if packs else (new_graph, changed)


def _unpack(model: Llama, held: dict[tuple[str, ...], jax.Array], release: bool) -> tuple[str, ...]:
    """Puts kernels and gates of packed groups into `held` as a `LoRALinear` has them; which groups were packed."""
    found = []
    for group in GROUPS:
        linear = getattr(model.layers, group)
        if not isinstance(linear, PackedLinear):
            continue
        held |= {("layers", group, name): value for name, value in linear.base_parts().items()}
        held["layers", group, "gate"] = linear.gates()
        if release:
            linear.kernel[...].delete()
            if linear.values is not None:
                linear.values[...].delete()
        found.append(group)
    held.update(plain_head(model))
    return tuple(found)


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


def _rebuilt(
    leaf: Any, axis: int, keep: Sequence[int], old: Any, one: np.ndarray | None, fill: int, mesh: Mesh | None
) -> jax.Array:
    """An array of the shape of `leaf`: `keep` of `old` along the axis, `one` behind them, `fill` where neither has
    anything (another rank, a part that only one of them has)."""

    def build(old: Any, one: Any) -> jax.Array:
        out = jnp.full(leaf.shape, fill, leaf.dtype)
        for part, start in ((old, 0), (one, len(keep))):
            if part is None:
                continue
            at = [0] * part.ndim
            at[axis] = start
            size = [min(sizes) for sizes in zip(part.shape, leaf.shape, strict=True)]
            out = jax.lax.dynamic_update_slice(out, part[tuple(map(slice, size))].astype(leaf.dtype), at)
        return out

    def take(old: Any) -> Any:
        runs = _runs(keep)  # slices: no index array, no gather
        parts = [jax.lax.slice_in_dim(old, a, b, axis=axis) for a, b in runs]
        return jnp.concatenate(parts, axis=axis) if parts else None

    where = None if mesh is None else sharding(mesh, leaf.get_metadata("axes"), leaf.shape)
    whole = jax.jit(lambda old, one: build(None if old is None else take(old), one), out_shardings=where)
    return whole(old, one)


def _runs(at: Sequence[int]) -> list[tuple[int, int]]:
    """Ascending places as (first, end) of what lies together."""
    runs: list[tuple[int, int]] = []
    for i in at:
        if runs and runs[-1][1] == i:
            runs[-1] = runs[-1][0], i + 1
        else:
            runs.append((i, i + 1))
    return runs
