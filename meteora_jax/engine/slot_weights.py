"""A model's arrays that have an axis of slots, and one adapter written into a slot of them in place."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, Sharding, SingleDeviceSharding

from meteora_jax.bank import AdapterBank
from meteora_jax.config import GROUPS, LlamaConfig
from meteora_jax.execution import jit
from meteora_jax.io.model_bank import ADAPTER_AXES, COLUMN_AXES, adapter_tensors, group_spectra
from meteora_jax.model.packed_linear import PackedLinear
from meteora_jax.sharding import Params, place, sharding
from meteora_jax.spectra import SPECTRA
from pallas_kernels.routed_lora import packing

Path = tuple[str, ...]
# what goes into a slot, by the place of the leaf that it goes into, 1 on the axis of slots
Staged = Mapping[Path, Any]


@dataclasses.dataclass(frozen=True)
class Packing:
    """Where a packed kernel [L, O + P N, I] has its gates and A's: O, or 0 of a quantised base, P, and how many columns
    the gates have; rank 0 where there are no A's behind them."""

    outputs: int
    projections: int
    gates: int
    rank: int


class SlotWeights:
    """The state of a model whose bank has slots. Its leaves are changed in place, so all who hold the state see what
    lies in the slots: a program must be given it under the same lock as `write` (see `AdapterPool`)."""

    def __init__(self, graph: nnx.GraphDef, weights: Params, config: LlamaConfig, mesh: Mesh | None, router: bool):
        """router: whether gates are a token router's, which knows all adapters and has no slots."""
        self._config, self._mesh = config, mesh
        model = nnx.merge(graph, weights)
        self._packings: dict[Path, Packing] = {}
        self._cuts: dict[str, tuple[tuple[int, ...], int]] = {}  # of each group its columns' widths, in how many parts
        for group in GROUPS:
            linear = getattr(model.layers, group)
            self._cuts[group] = linear.splits, linear.shards
            if isinstance(linear, PackedLinear) and linear.lora_a is not None:
                rank = 0 if linear.wide else linear.lora_a.shape[-2]
                self._packings["layers", group, "kernel"] = Packing(
                    linear.base_rows, len(linear.splits), linear.gate_columns, rank
                )
        self._leaves: dict[Path, Any] = {}
        self._axes: dict[Path, int] = {}
        for at, leaf in nnx.to_flat_state(weights):
            path = tuple(map(str, at))
            columns = {} if router else COLUMN_AXES
            axis = (ADAPTER_AXES | columns).get(path[-1])
            if axis is not None and path[0] in ("layers", "embed_adapters", "head_adapters"):
                self._leaves[path], self._axes[path] = leaf, axis
            elif path in self._packings:
                self._leaves[path] = leaf
        self._gated = not router and model.has_gates

    def stage(
        self, adapter: AdapterBank, columns: Mapping[Path, np.ndarray], slots: int = 1, spectra: bool = False
    ) -> list[Staged]:
        """An adapter on its way to the devices: padded to the slots' shape, and handed over without waiting.

        Args:
            adapter: alone. columns: of its gates, [L, I, P] by the place of `gate`; none: gates do not know it. slots:
                into so many its ranks are divided; what has no rank, and the columns, go into the first. spectra: with
                what routers by score read of the matrices.
        """
        own = adapter_tensors(adapter, self._config, self._mesh)
        for group in GROUPS if spectra else ():
            if ("layers", group, "lora_a") in own:
                a, b, scale = (own["layers", group, name] for name in ("lora_a", "lora_b", "lora_scale"))
                for name, value in zip(SPECTRA, group_spectra(a, b, scale, *self._cuts[group]), strict=True):
                    own["layers", group, name] = value
        return [self._stage(own, {} if part else columns, part) for part in range(slots)]

    def _stage(self, own: Mapping[Path, np.ndarray], columns: Mapping[Path, np.ndarray], part: int) -> Staged:
        staged: dict[Path, Any] = {}
        for path, leaf in self._leaves.items():
            if path in self._packings:
                if self._gated:
                    staged[*path[:-1], "gate"] = self._column(columns.get((*path[:-1], "gate")), path)
                continue
            if path[-1] in COLUMN_AXES:
                staged[path] = self._column(columns.get(path), path)
                continue
            shape, axis = list(leaf.shape), self._axes[path]
            shape[axis] = 1
            whole = _ranks(path, own.get(path), leaf.shape, part)
            if whole is None or whole.shape != tuple(shape) or whole.dtype != leaf.dtype:
                padded = np.full(shape, self._config.vocab_size if path[-1] == "ids" else 0, leaf.dtype)
                if whole is not None:
                    padded[tuple(map(slice, whole.shape))] = whole
                whole = padded
            staged[path] = self._put(whole, path)
        return staged

    def write(self, staged: Staged, slot: int) -> None:
        """Puts what was staged into a slot, behind whatever the devices have been given to do."""
        held = {path: leaf[...] for path, leaf in self._leaves.items()}
        layout = tuple(sorted([*self._axes.items(), *self._packings.items()]))
        written = write_slot(held, dict(staged), np.int32(slot), layout=layout)
        for path, leaf in self._leaves.items():
            leaf.set_value(written[path])

    def _column(self, column: np.ndarray | None, path: Path) -> jax.Array:
        """A gate's column [L, I, P] as [L, I, P, 1], float32; zeros where there is none."""
        group = path[1]
        width = self._config.projection_shape(GROUPS[group][0])[0]
        shape = self._config.num_layers, width, len(GROUPS[group])
        value = np.zeros(shape, np.float32) if column is None else np.asarray(column, np.float32)
        return self._put(value[..., None], (*path[:-1], "gate"))

    def _put(self, value: np.ndarray, path: Path) -> jax.Array:
        if self._mesh is None:
            where = SingleDeviceSharding(jax.devices()[0])
        else:
            where = sharding(self._mesh, self._leaves[path].get_metadata("axes"), value.shape)
        pinned = pinned_like(where)
        # by way of memory that the device reads by itself: the copy takes no time of the host's
        return place(value, where) if pinned is None else jax.device_put(place(value, pinned), where)


def pinned_like(where: Sharding) -> Sharding | None:
    """The same devices' pinned host memory; None where the platform has none."""
    device = next(iter(where.device_set))
    kinds = {memory.kind for memory in device.addressable_memories()}
    return where.with_memory_kind("pinned_host") if "pinned_host" in kinds else None


def _ranks(path: Path, whole: np.ndarray | None, shape: Sequence[int], part: int) -> np.ndarray | None:
    """The ranks that go into slot number `part` of an adapter's; None: nothing does."""
    if whole is None or path[-1] == "lora_scale":
        return whole
    if path[-1] not in ("lora_a", "lora_b"):
        return None if part else whole
    axis = whole.ndim - (1 if path == ("embed_adapters", "lora_a") else 2)
    rank = shape[axis]
    return whole[(slice(None),) * axis + (slice(part * rank, (part + 1) * rank),)]


@jit(static_argnames=("layout",), donate_argnames=("held",))
def write_slot(
    held: dict[Path, jax.Array], one: dict[Path, jax.Array], slot: jax.Array, *, layout: tuple[tuple[Path, Any], ...]
) -> dict[Path, jax.Array]:
    """`held` with `one` in the place of what the slot int32 [] held.

    layout: of each leaf its axis of slots, or the `Packing` of a kernel; sorted.
    """
    out = {}
    for path, how in layout:
        leaf = held[path]
        if not isinstance(how, Packing):
            out[path] = jax.lax.dynamic_update_slice_in_dim(leaf, one[path].astype(leaf.dtype), slot, how)
            continue
        rows = (leaf.shape[1] - how.outputs) // how.projections
        group = path[:-1]
        for p in range(how.projections):
            first = how.outputs + p * rows
            parts = []
            if (gate := one.get((*group, "gate"))) is not None:
                parts.append((gate[:, :, p, 0][:, None], first + slot))
            if how.rank:
                parts.append((one[*group, "lora_a"][:, p, 0], first + packing.first_a_row(how.gates) + slot * how.rank))
            for part, row in parts:
                leaf = jax.lax.dynamic_update_slice_in_dim(leaf, part.astype(leaf.dtype), row, 1)
        out[path] = leaf
    return out
