"""A loaded model's adapters change in place: its arrays are replaced one by one, and all others stay where they are."""

from __future__ import annotations

import functools
import gc
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from meteora_jax.bank import AdapterBank
from meteora_jax.config import GROUPS, BankConfig, LlamaConfig
from meteora_jax.gate_config import GateConfig
from meteora_jax.io.model_bank import ADAPTER_AXES, COLUMN_AXES, adapter_tensors, packs
from meteora_jax.model.layout import lay_out
from meteora_jax.model.llama import Llama
from meteora_jax.model.packed_linear import PackedLinear, packed
from meteora_jax.model.routed_llama import gated_llama
from meteora_jax.sharding import Params, fetch, place, sharding, tensor_shards
from meteora_jax.spectra import SPECTRA

AXES = ADAPTER_AXES | COLUMN_AXES
FEW = ("lora_scale", "ids")  # a few numbers each, changed on the host: no program is compiled for them

Path = tuple[str, ...]
Contents = tuple[BankConfig | None, GateConfig | None]
Order = Sequence[int | None]  # places of the old adapters, or columns, that stay; None: the adapter that comes


class AdapterChange:
    """A model with a bank and gates becomes one with others: that of `load` from the folders of these.

    graph, weights: the model, before and after a `run`. Nothing here has another reference to the arrays: one that
    nobody else holds is freed as soon as there is the new one, and one that an engine reads lives until it lets go.
    """

    def __init__(self, graph: nnx.GraphDef, weights: Params, config: LlamaConfig, mesh: Mesh | None):
        self.graph, self.weights, self._config, self._mesh = graph, weights, config, mesh
        self._packs = packs(graph, weights, mesh)
        model = nnx.merge(graph, weights)
        self._dtype, self._execution = model.dtype, model.execution
        self._head = (model.embed, model.lm_head) if model.head_words else None
        # each program runs once, and LLVM's optimiser takes up to a second for one
        self._once = {"xla_backend_optimization_level": 0} if self._execution.platform == "cpu" else None
        self._held: dict[Path, jax.Array] = {}  # groups that are packed in `_linears`, others as `LoRALinear` has them
        self._linears: dict[str, PackedLinear] = {}

    def run(self, was: Contents, becomes: Contents, order: Order, columns: Order, added: AdapterBank | None) -> None:
        """Changes `graph` and `weights`. Whatever stops it, they are then as they were.

        Args:
            was, becomes: the bank and the gates before and after; the bank's first adapters are those that gates know.
            order: of the adapters. columns: of the gates, a null choice's among them.
            added: a bank of the adapter that comes, in the model's type; None: none comes.
        """
        template = self._template(*becomes)
        one = {} if added is None else adapter_tensors(added, self._config, self._mesh)
        self._take()
        undo: list[Callable[[], Any]] = []
        try:
            self._unpack()
            gone = self._parts_that_go(order, columns)
            for path, leaf in nnx.to_flat_state(nnx.split(template)[1]):
                at, name = tuple(map(str, path)), path[-1]
                if name in AXES and name not in SPECTRA:
                    own = order if name in ADAPTER_AXES else columns
                    how = leaf.shape, leaf.dtype, self._where(leaf), own
                    undo.append(self._replace(at, *how, one.get(at), gone.get(at)))
            self._give(template)
        except BaseException as failure:
            traceback.clear_frames(failure.__traceback__)  # they hold arrays
            for back in reversed(undo):  # each needs the memory of the step that it undoes, and no more
                back()
            graph = self.graph
            self._give(self._template(*was))
            self.graph = graph
            raise

    def _template(self, bank: BankConfig | None, gates: GateConfig | None) -> Llama:
        """The model without arrays, no group packed."""

        def fresh() -> Llama:
            how: dict[str, Any] = dict(dtype=self._dtype, rngs=nnx.Rngs(0), execution=self._execution)
            if gates is None or bank is None:
                return Llama(self._config, bank, **how)
            return gated_llama(self._config, bank, gates.form, null=gates.null, known=len(gates.names), **how)

        model = nnx.eval_shape(fresh)
        lay_out(model, tensor_shards(self._mesh))
        at_vocabulary = set() if bank is None else set(bank.vocab_adapter_names)
        model.gates_leave_vocab = bool(gates and at_vocabulary and not at_vocabulary & set(gates.names))
        if self._head is not None:
            (model.embed, model.lm_head), model.head_words = self._head, True
        return model

    def _where(self, leaf: Any) -> Any:
        return None if self._mesh is None else sharding(self._mesh, leaf.get_metadata("axes"), leaf.shape)

    def _take(self) -> None:
        """The arrays out of `weights`, without those that are filled when a router asks."""
        layers = nnx.merge(self.graph, self.weights).layers
        linears = {group: getattr(layers, group) for group in GROUPS}
        self._linears = {group: linear for group, linear in linears.items() if isinstance(linear, PackedLinear)}
        leaves = ((tuple(map(str, path)), leaf) for path, leaf in nnx.to_flat_state(self.weights))
        self._held = {path: leaf[...] for path, leaf in leaves if path[-1] not in SPECTRA}
        self.weights = nnx.State({})
        del layers, linears, leaves
        gc.collect()  # what flax flattens a state with refers to itself, and to every array, until it is collected

    def _unpack(self) -> None:
        """Kernels and gates of packed groups, as a `LoRALinear` has them."""
        for group in tuple(self._linears):
            parts = self._linears[group].base_parts() | {"gate": self._linears[group].gates()}
            jax.block_until_ready(parts)
            del self._linears[group]
            self._held.pop(("layers", group, "values"), None)
            self._held |= {("layers", group, name): value for name, value in parts.items()}

    def _parts_that_go(self, order: Order, columns: Order) -> dict[Path, jax.Array]:
        """What no changed array will have, in one program: with it the old ones can be made again."""
        parts: dict[Path, tuple[int, int]] = {}
        for path, old in self._held.items():
            if path[-1] in AXES:
                axis, own = AXES[path[-1]] % old.ndim, order if path[-1] in ADAPTER_AXES else columns
                for i in set(range(old.shape[axis])).difference(own):  # one, or none
                    parts[path] = axis, i

        def cut(arrays: dict[Path, jax.Array]) -> dict[Path, jax.Array]:
            return {p: jax.lax.slice_in_dim(arrays[p], i, i + 1, axis=axis) for p, (axis, i) in parts.items()}

        held = {path: self._held[path] for path in parts}
        return jax.block_until_ready(jax.jit(cut, compiler_options=self._once)(held)) if parts else {}

    def _replace(
        self, path: Path, shape: tuple[int, ...], dtype: Any, where: Any, order: Order, one: Any, gone: Any = None
    ) -> Callable[[], Any]:
        """Another array in the place of that at the path; returns what puts the old one back, with `gone` of it."""
        old, axis = self._held.get(path), AXES[path[-1]] % len(shape)
        if old is not None and old.shape == shape and tuple(order) == tuple(range(shape[axis])):
            return lambda: None
        fill = self._config.vocab_size if path[-1] == "ids" else 0  # a token id that is none: VocabAdapters' padding
        how = functools.partial(_rebuilt, shape, dtype, axis, order, fill)
        if path[-1] in FEW:
            new = how(np, None if old is None else fetch(old), one)
            new = jax.device_put(new) if where is None else place(new, where)
        else:
            made = jax.jit(functools.partial(how, jnp), out_shardings=where, compiler_options=self._once)
            new = made(old, one)
        self._held[path] = jax.block_until_ready(new)  # here it fails, not in what is computed behind it
        if old is None:
            return lambda: self._held.pop(path)
        back = [order.index(i) if i in order else None for i in range(old.shape[axis])]
        return functools.partial(self._replace, path, old.shape, old.dtype, where and old.sharding, back, gone)

    def _give(self, template: Llama) -> None:
        """The arrays into `graph` and `weights`, groups packed; after a failure they are where they were."""
        graph, state = nnx.split(template)
        leaves = []
        for path, leaf in nnx.to_flat_state(state):
            at = tuple(map(str, path))
            if path[-1] in SPECTRA:
                zeros, where = np.zeros(leaf.shape, leaf.dtype), self._where(leaf)
                leaves.append((path, leaf.replace(jax.device_put(zeros) if where is None else place(zeros, where))))
            elif at[0] == "layers" and at[1] in self._linears:
                leaves.append((path, leaf))
            else:
                leaves.append((path, leaf.replace(self._held[at])))
        model: Any = nnx.merge(graph, nnx.from_flat_state(leaves))
        del leaves
        if self._packs:
            gc.collect()  # as in `_take`
        fresh: dict[str, PackedLinear] = {}
        try:
            for group in GROUPS if self._packs else ():
                if (known := self._linears.get(group)) is not None:  # was not unpacked
                    setattr(model.layers, group, known)
                    continue
                made = packed(getattr(model.layers, group), model.has_gates, self._execution, self._dtype)
                if isinstance(made, PackedLinear):
                    jax.block_until_ready(nnx.state(made))
                    setattr(model.layers, group, made)
                    fresh[group] = made
                    for name in ("kernel", "gate", "kernel_zero"):
                        self._held.pop(("layers", group, name), None)
        except BaseException as failure:
            traceback.clear_frames(failure.__traceback__)
            model = made = None
            self._linears = fresh
            self._unpack()
            raise
        self.graph, self.weights = nnx.split(model)
        self._held, self._linears = {}, {}


def _rebuilt(
    shape: tuple[int, ...], dtype: Any, axis: int, order: Order, fill: int, xp: Any, old: Any, one: Any
) -> Any:
    """An array of that shape: along the axis what `order` says of `old` and `one`, and `fill` where they have nothing
    (another rank, a part that only one of them has). xp: numpy, or jax.numpy."""

    def fitted(part: Any, count: int) -> Any:
        if part is None:
            return xp.full((*shape[:axis], count, *shape[axis + 1 :]), fill, dtype)
        part = part[tuple(slice(count if i == axis else n) for i, n in enumerate(shape))].astype(dtype)
        short = [(0, 0 if i == axis else n - part.shape[i]) for i, n in enumerate(shape)]
        return xp.pad(part, short, constant_values=fill) if any(n for _, n in short) else part

    def cut(start: int, stop: int) -> Any:
        return None if old is None else old[(slice(None),) * axis + (slice(start, stop),)]

    parts = [fitted(one if run is None else cut(*run), 1 if run is None else run[1] - run[0]) for run in _runs(order)]
    return xp.concatenate(parts, axis=axis)


def _runs(order: Order) -> list[tuple[int, int] | None]:
    """Places as (first, end) of what lies together, so that slices serve; None as it is."""
    runs: list[tuple[int, int] | None] = []
    for i in order:
        if i is None:
            runs.append(None)
        elif runs and (last := runs[-1]) is not None and last[1] == i:
            runs[-1] = last[0], i + 1
        else:
            runs.append((i, i + 1))
    return runs
