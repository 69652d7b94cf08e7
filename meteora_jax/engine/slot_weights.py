"""A model's arrays that have an axis of slots, and one adapter written into a slot of them in place."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, Sharding

from meteora_jax.bank import AdapterBank
from meteora_jax.config import GROUPS, LlamaConfig
from meteora_jax.engine.staging import Buffers, Layout, Part, Path, Staged, fill
from meteora_jax.execution import jit
from meteora_jax.io.model_bank import ADAPTER_AXES, COLUMN_AXES, adapter_tensors, group_spectra
from meteora_jax.model.packed_linear import PackedLinear
from meteora_jax.sharding import Params, sharding
from meteora_jax.spectra import SPECTRA
from pallas_kernels.routed_lora import packing


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
        self.layout = self._layout(not router and model.has_gates)
        self._threads = threading.local()

    def _layout(self, gated: bool) -> Layout:
        """Of what goes into a slot; gated: gates' columns too, [L, I, P, 1] float32."""
        held: dict[Path, tuple[tuple[int, ...], np.dtype]] = {}
        where: dict[Path, Sharding] = {}
        for path, leaf in self._leaves.items():
            at = path
            if path in self._packings:
                if not gated:
                    continue
                at = (*path[:-1], "gate")
            if at[-1] in COLUMN_AXES:
                width = self._config.projection_shape(GROUPS[at[1]][0])[0]
                held[at] = (self._config.num_layers, width, len(GROUPS[at[1]]), 1), np.dtype(np.float32)
            else:
                axis = self._axes[path] % len(leaf.shape)
                held[at] = (*leaf.shape[:axis], 1, *leaf.shape[axis + 1 :]), np.dtype(leaf.dtype)
            if self._mesh is not None:
                where[at] = sharding(self._mesh, leaf.get_metadata("axes"), held[at][0])
        return Layout(held, None if self._mesh is None else where)

    def stage(
        self, adapter: AdapterBank, columns: Mapping[Path, np.ndarray], slots: int = 1, spectra: bool = False
    ) -> list[Staged]:
        """An adapter in the slots' shape on the devices. It has arrived when this returns; any thread may call.

        Args:
            adapter: alone. columns: of its gates, [L, I, P] by the place of `gate`; none: gates do not know it. slots:
                into so many its ranks are divided; what has no rank, and the columns, go into the first. spectra: with
                what routers by score read of the matrices.
        """
        buffers = self._buffers()
        own = adapter_tensors(adapter, self._config, self._mesh, buffers.views if slots == 1 else {})
        for group in GROUPS if spectra else ():
            if ("layers", group, "lora_a") in own:
                a, b, scale = (own["layers", group, name] for name in ("lora_a", "lora_b", "lora_scale"))
                for name, value in zip(SPECTRA, group_spectra(a, b, scale, *self._cuts[group]), strict=True):
                    own["layers", group, name] = value
        return [self._stage(buffers, own, {} if part else columns, part) for part in range(slots)]

    def _stage(
        self, buffers: Buffers, own: Mapping[Path, np.ndarray], columns: Mapping[Path, np.ndarray], part: int
    ) -> Staged:
        for path, view in buffers.views.items():
            if path[-1] in COLUMN_AXES:
                column = columns.get(path)
                fill(view, None if column is None else column[..., None])
            elif (value := own.get(path)) is not view:  # else it is there
                value = _ranks(path, value, view.shape, part)
                fill(view, value, self._config.vocab_size if path[-1] == "ids" else 0)
        return buffers.send()

    def _buffers(self) -> Buffers:
        """The calling thread's own."""
        found = getattr(self._threads, "buffers", None)
        if found is None:
            found = self._threads.buffers = self.layout.buffers()
        return found

    def write(self, staged: Staged, slot: int) -> None:
        """Puts what was staged into a slot, behind whatever the devices have been given to do."""
        held = {path: leaf[...] for path, leaf in self._leaves.items()}
        layout = tuple(sorted([*self._axes.items(), *self._packings.items()]))
        written = write_slot(held, dict(staged), np.int32(slot), layout=layout, parts=self.layout.key)
        for path, leaf in self._leaves.items():
            leaf.set_value(written[path])


def _ranks(path: Path, whole: np.ndarray | None, shape: Sequence[int], part: int) -> np.ndarray | None:
    """The ranks that go into slot number `part` of an adapter's; None: nothing does."""
    if whole is None or path[-1] == "lora_scale":
        return whole
    if path[-1] not in ("lora_a", "lora_b"):
        return None if part else whole
    axis = whole.ndim - (1 if path == ("embed_adapters", "lora_a") else 2)
    rank = shape[axis]
    return whole[(slice(None),) * axis + (slice(part * rank, (part + 1) * rank),)]


@jit(static_argnames=("layout", "parts"), donate_argnames=("held",))
def write_slot(
    held: dict[Path, jax.Array], staged: dict[str, jax.Array], slot: jax.Array, *,
    layout: tuple[tuple[Path, Any], ...], parts: tuple[tuple[Path, Part], ...],
) -> dict[Path, jax.Array]:  # fmt: skip
    """`held` with what was staged in the place of what the slot int32 [] held.

    layout: of each leaf its axis of slots, or the `Packing` of a kernel; sorted. parts: of `Layout`.
    """
    one = {path: part.of(staged[part.buffer]) for path, part in parts}
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
            rows_in = []
            if (gate := one.get((*group, "gate"))) is not None:
                rows_in.append((gate[:, :, p, 0][:, None], first + slot))
            if how.rank:
                rows_in.append(
                    (one[*group, "lora_a"][:, p, 0], first + packing.first_a_row(how.gates) + slot * how.rank)
                )
            for part, row in rows_in:
                leaf = jax.lax.dynamic_update_slice_in_dim(leaf, part.astype(leaf.dtype), row, 1)
        out[path] = leaf
    return out
