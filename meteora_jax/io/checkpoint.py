"""The data folders BASE, BANK and GATES: from disk to a model's state, and gates back to disk.

A folder is a JSON description and `weights.safetensors`, whose tensors are exactly those that the
description implies; anything else is refused, all problems at once.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from meteora_jax.bank import AdapterBank
from meteora_jax.config import ENDS, GROUPS, BankConfig, InputError, LlamaConfig, read_json
from meteora_jax.execution import ExecutionConfig
from meteora_jax.gate_config import SEGMENTS, SHIFTS, GateConfig, TokenRouterForm
from meteora_jax.io.files import whole_folder, write_json
from meteora_jax.io.provenance import BaseOrigin, misfits
from meteora_jax.model.llama import Llama, lay_out
from meteora_jax.model.lora_linear import column_shards
from meteora_jax.model.routed_llama import gated_llama
from meteora_jax.model.vocab_adapters import end_tensors
from meteora_jax.sharding import place, shard_order, sharding, tensor_shards

WEIGHTS = "weights.safetensors"


def open_tensors(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> Any:
    """A weight file that holds exactly the tensors `shapes` names, none of them read yet.

    Raises:
        InputError: the file is missing or damaged, or a tensor is missing, unknown or of another shape.
    """
    if not path.is_file():
        raise InputError(f"{path}: expected a file, found none")
    try:
        file = safe_open(path, "np")
    except SafetensorError as e:
        raise InputError(f"{path}: expected a complete safetensors file, found a damaged one ({e})") from None
    found = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 (not a dict)
    problems = [f"{path}: {k}: expected no such tensor, found {found[k]}" for k in sorted(found.keys() - shapes)]
    for key, shape in shapes.items():
        if found.get(key) != shape:
            problems.append(f"{path}: {key}: expected shape {shape}, found {found.get(key, 'no such tensor')}")
    if problems:
        raise InputError(problems)
    return file


def read_tensors(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Reads exactly the tensors `shapes` names. Raises InputError as `open_tensors`."""
    file = open_tensors(path, shapes)
    return {key: file.get_tensor(key) for key in shapes}


class StoredArray:
    """Tensors of a file side by side along their last axis, cast; indexing reads the part that is asked for, no more.

    So a base of any size goes to its devices with one leaf on the host at a time, and where a mesh splits it with one
    device's part of a leaf; a host never reads what none of its own devices holds.
    """

    def __init__(self, file: Any, keys: Sequence[str], dtype: Any, shards: int = 1):
        self._source = file, keys, dtype
        parts = [file.get_slice(key) for key in keys]
        widths = [part.get_shape()[-1] // shards for part in parts]
        # (tensor, its first column here, how many): as they follow each other in `shard_order`
        self._pieces = [(p, i * w, w) for i in range(shards) for p, w in zip(parts, widths, strict=True)]
        self.shape = (*parts[0].get_shape()[:-1], shards * sum(widths))
        self.dtype = np.dtype(dtype)

    def in_shards(self, shards: int) -> StoredArray:
        """The same with its columns in so many parts, each with its share of every tensor."""
        return StoredArray(*self._source, shards)

    def __getitem__(self, part: tuple[slice, ...]) -> np.ndarray:
        *rest, columns = (range(size)[s] for size, s in zip(self.shape, part, strict=True))
        out = np.empty((*map(len, rest), len(columns)), self.dtype)
        where = tuple(slice(r.start, r.stop) for r in rest)
        start = 0
        for stored, offset, width in self._pieces:
            first, last = max(columns.start, start), min(columns.stop, start + width)
            if first < last and out.size:
                out[..., first - columns.start : last - columns.start] = stored[
                    (*where, slice(offset + first - start, offset + last - start))
                ]
            start += width
        return out

    def first(self, count: int) -> np.ndarray:
        """The first `count` values in row-major order, [count]; all where there are fewer."""
        taken, part = 1, []
        for size in reversed(self.shape):
            part.append(slice(min(size, -(-count // taken))))
            taken *= part[-1].stop
        return self[tuple(reversed(part))].reshape(-1)[:count]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        whole = self[(slice(None),) * len(self.shape)]
        return whole if dtype is None else whole.astype(dtype, copy=False)


def load_base(folder: str | os.PathLike[str], dtype: Any) -> tuple[LlamaConfig, dict[tuple[str, ...], StoredArray]]:
    """BASE/ -> its configuration and the model's base weights by path in the module tree, still on disk."""
    folder = Path(folder)
    config = LlamaConfig.from_hf(read_json(folder / "config.json"), str(folder / "config.json"))
    shapes = config.weight_shapes()
    file = open_tensors(folder / WEIGHTS, shapes)
    joined = {
        ("layers", group, part): [f"layers.{p}.{part}" for p in projections]
        for group, projections in GROUPS.items()
        for part in ("kernel", "bias")
        if f"layers.{projections[0]}.{part}" in shapes
    }
    grouped = {key for keys in joined.values() for key in keys}
    named = {"embed.embedding": ("embed",), "lm_head.kernel": ("lm_head",)}
    joined |= {named.get(key, tuple(key.split("."))): [key] for key in shapes if key not in grouped}
    return config, {path: StoredArray(file, keys, dtype) for path, keys in joined.items()}


def read_origin(folder: str | os.PathLike[str]) -> BaseOrigin | None:
    """Which model a BASE/ is; None if it records nothing. Raises InputError: a missing or malformed config.json."""
    path = Path(folder) / "config.json"
    return BaseOrigin.of_base(read_json(path), str(path))


def load_bank(
    folder: str | os.PathLike[str], base: LlamaConfig, dtype: Any, origin: BaseOrigin | None = None
) -> AdapterBank:
    """BANK/ -> the bank, refused if it was imported for a base of another shape, or other norms than `origin`'s."""
    folder = Path(folder)
    source = str(folder / "bank.json")
    config = BankConfig.from_json(read_json(folder / "bank.json"), source)
    if problems := misfits(config, base, origin, source):
        raise InputError(problems)
    tensors = read_tensors(folder / WEIGHTS, config.weight_shapes())
    ends: dict[str, dict[str, np.ndarray]] = {}
    for end in config.ends:
        held = {k: tensors[f"{end}.{k}"] for k in ("a", "b", "scale", "rows") if f"{end}.{k}" in tensors}
        ends[end] = {k: t.astype(np.float32 if k == "scale" else dtype) for k, t in held.items()}
    part = lambda kind, dt: {p: tensors[f"{p}.{kind}"].astype(dt) for p in config.ranks}  # noqa: E731
    columns = lambda kind, ps: {p: tensors[f"{p}.{kind}"].astype(np.float32) for p in ps}  # noqa: E731
    dora, bias = columns("dora", config.dora), columns("bias", config.lora_bias)
    return AdapterBank(part("a", dtype), part("b", dtype), part("scale", np.float32), config, dora, bias, ends)


# Tensors of a token router, in the order in which `fresh_gates` draws them; the last two have a column an adapter.
_ROUTER = ("embed", "shift", "qkv_embed", "qkv", "o", "gate_up", "down", "lookup", "first", "hop", "segment", "task",
           "previous")  # fmt: skip
TOKEN_ROUTER = tuple(f"token_router.{part}" for part in _ROUTER)
SHARED_BY_ADAPTERS = TOKEN_ROUTER[:-2]  # of a gate's tensors those whose last axis is not the adapters'
# What they were called in GATES of format "meteora-gates-2".
_FORMER = dict(zip(TOKEN_ROUTER, (f"ahead.{part}" for part in (
    "read", "shift", "look", "own", "o", "up", "down", "point", "first", "again", "number", "out", "before"
)), strict=True))  # fmt: skip
LOOKUP = 8.0, 4.0  # of a fresh token router: the look-up's sharpness and weight
# Fresh ones are normal with 1 over the square root of their inputs times this: less where a stream of several layers
# adds up and at its end, more for `hop`, since what it reads has the length 1 and the stream that of sqrt(E).
_SIZES = {"qkv_embed": 0.3, "o": 0.5, "down": 0.5, "shift": 0.5, "hop": 4.0}
_SIZES |= dict.fromkeys(("task", "previous", "first", "segment"), 0.1)


def gate_shapes(form: TokenRouterForm | None, base: LlamaConfig, adapters: int) -> dict[str, tuple[int, ...]]:
    """{name: shape} of `GATES/weights.safetensors`: MeteoRA's gates [L, I, A], named like their projections; or the
    parameters of a token router, as `TokenRouter` has them."""
    if form is None:
        return {
            p: (base.num_layers, base.projection_shape(p)[0], adapters) for ps in GROUPS.values() for p in ps
        }  # fmt: skip
    d, e, f = base.hidden_size, form.width, form.depth
    parts = {
        "embed": (d, e), "shift": (SHIFTS, e, e), "qkv_embed": (f, d, 3, e), "qkv": (f, e, 3, e), "o": (f, e, e),
        "gate_up": (f, e, 2, 2 * e), "down": (f, 2 * e, e), "lookup": (2,), "first": (e, 1),
        "hop": (1 + SHIFTS, e, e), "segment": (e, SEGMENTS), "task": (e, adapters), "previous": (e, adapters),
    }  # fmt: skip
    return {f"token_router.{part}": parts[part] for part in _ROUTER}


def fresh_gates(form: TokenRouterForm | None, base: LlamaConfig, adapters: int, seed: int) -> dict[str, np.ndarray]:
    """Gates before their training, float32 as `gate_shapes` has them: MeteoRA's zeros, a token router's normal."""
    gates = {name: np.zeros(shape, np.float32) for name, shape in gate_shapes(form, base, adapters).items()}
    if form is None:
        return gates
    rng = np.random.default_rng(seed)
    for name, zeros in gates.items():
        part = name.removeprefix("token_router.")
        if part == "lookup":
            zeros[:] = LOOKUP
            continue
        inputs = zeros.shape[0 if zeros.ndim == 2 else 1]
        gates[name] = rng.standard_normal(zeros.shape).astype(np.float32) * _SIZES.get(part, 1.0) * inputs**-0.5
    return gates


def load_gates(
    folder: str | os.PathLike[str], base: LlamaConfig, names: tuple[str, ...]
) -> tuple[GateConfig, dict[str, np.ndarray]]:
    """GATES/ -> its configuration and float32 tensors as `gate_shapes` has them, columns in the bank's order."""
    folder = Path(folder)
    source = str(folder / "gates.json")
    config = GateConfig.from_json(read_json(folder / "gates.json"), source)
    missing = [n for n in names if n not in config.names]
    unknown = [n for n in config.names if n not in names]
    if missing or unknown:
        wrong = [f"no gate for {n!r}" for n in missing] + [f"a gate for {n!r}" for n in unknown]
        raise InputError(f"{source}: names: expected the bank's adapters, found {', '.join(wrong)}")
    shapes = gate_shapes(config.form, base, len(names))
    if former := config.former:
        shapes = {_FORMER[name]: shape for name, shape in shapes.items()}
    tensors = read_tensors(folder / WEIGHTS, shapes)
    if former:
        tensors = {name: tensors[before] for name, before in _FORMER.items()}
    order = [config.names.index(n) for n in names]
    tensors = {p: t if p in SHARED_BY_ADAPTERS else t[..., order] for p, t in tensors.items()}
    return config, {p: np.ascontiguousarray(t.astype(np.float32)) for p, t in tensors.items()}


def save_gates(folder: str | os.PathLike[str], config: GateConfig, gates: Mapping[str, np.ndarray]) -> None:
    """Writes GATES/ whole or not at all; an existing folder is replaced only once the new one is complete."""
    tensors = {p: np.ascontiguousarray(g, np.float32) for p, g in gates.items()}
    _write_folder(Path(folder), "gates.json", config.to_json(), tensors)


def save_bank(folder: str | os.PathLike[str], bank: AdapterBank) -> None:
    """Writes BANK/ in float32, whole or not at all.

    Each adapter's `sha256` becomes that of its own tensors here: they are from no file.
    """
    assert not bank.ends, "a bank from training has adapters in the layers alone"
    parts = {"a": bank.a, "b": bank.b, "scale": bank.scale}
    tensors = {f"{p}.{k}": np.ascontiguousarray(v[p], np.float32) for k, v in parts.items() for p in bank.config.ranks}
    infos = []
    for i, info in enumerate(bank.config.adapters):
        digest = hashlib.sha256()
        for key in sorted(tensors):
            digest.update(np.ascontiguousarray(tensors[key][:, i]).tobytes())
        infos.append(dataclasses.replace(info, sha256=digest.hexdigest()))
    config = dataclasses.replace(bank.config, adapters=tuple(infos))
    _write_folder(Path(folder), "bank.json", config.to_json(), tensors)


def take_adapters(folder: str | os.PathLike[str], dest: str | os.PathLike[str], names: Sequence[str]) -> None:
    """Writes BANK/ with some of another's adapters, bit for bit, in the order given.

    Raises:
        InputError: a name twice, none at all, or none of the bank's; a bank with adapters at the embedding or the head.
    """
    source = Path(folder) / "bank.json"
    config = BankConfig.from_json(read_json(source), str(source))
    problems = [f"{source}: expected an adapter {n!r}, found {', '.join(config.names)}" for n in names
                if n not in config.names]  # fmt: skip
    if not names or len(set(names)) < len(names):
        problems.append(f"{source}: expected adapters to take, each once, found {' '.join(names) or 'none'}")
    if config.ends:
        problems.append(f"{source}: expected adapters in the layers alone, found {', '.join(config.at_ends)} at an end")
    if problems:
        raise InputError(problems)
    at = [config.names.index(n) for n in names]
    tensors = read_tensors(Path(folder) / WEIGHTS, config.weight_shapes())
    taken = {key: np.ascontiguousarray(tensor[:, at]) for key, tensor in tensors.items()}  # [L, A, ..]
    config = dataclasses.replace(config, adapters=tuple(config.adapters[i] for i in at))
    _write_folder(Path(dest), "bank.json", config.to_json(), taken)


def _write_folder(folder: Path, name: str, description: Any, tensors: dict[str, np.ndarray]) -> None:
    with whole_folder(folder) as partial:
        save_file(tensors, partial / WEIGHTS)
        (partial / WEIGHTS).chmod(0o644)  # safetensors keeps others from reading
        write_json(partial / name, description)


_PLACES = {name: tuple(name.split(".")) for name in TOKEN_ROUTER}  # in the module tree


def gate_weights(gates: Mapping[str, np.ndarray]) -> dict[tuple[str, ...], np.ndarray]:
    """Gates as `gate_shapes` has them -> the module tree's, MeteoRA's as [L, I, P, A] a group."""
    if any(name in gates for name in _PLACES):
        return {place: gates[name] for name, place in _PLACES.items()}
    return {("layers", group, "gate"): np.stack([gates[p] for p in ps], axis=2) for group, ps in GROUPS.items()}


def split_gates(state: Mapping[tuple[str, ...], Any]) -> dict[str, np.ndarray]:
    """The inverse of `gate_weights`."""
    gates = {name: np.asarray(state[place]) for name, place in _PLACES.items() if place in state}
    for group, projections in GROUPS.items():
        if (stacked := state.get(("layers", group, "gate"))) is not None:
            gates |= {p: np.take(np.asarray(stacked), i, axis=2) for i, p in enumerate(projections)}
    return gates


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


COLUMNS = ("kernel", "bias", "lora_b", "lora_dora", "lora_bias")  # what of a group has its output's columns


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


def assemble(
    config: LlamaConfig,
    weights: Mapping[tuple[str, ...], Any],
    bank: AdapterBank | None,
    gates: Mapping[str, np.ndarray] | None,
    dtype: Any,
    mesh: Mesh | None = None,
    form: TokenRouterForm | None = None,
) -> tuple[Any, Any]:
    """A model's graph definition and state with every leaf filled: nothing is initialised and then replaced.

    With a mesh every leaf goes straight to the devices that hold a part of it; of a base that `load_base` left on disk
    a host reads only those parts. form: of the gates, if there are any.
    """
    bank_config = bank.config if bank is not None else None
    execution = ExecutionConfig.here(dtype, mesh)

    def fresh() -> Llama:
        if gates is None or bank_config is None:
            return Llama(config, bank_config, dtype=dtype, rngs=nnx.Rngs(0), execution=execution)
        return gated_llama(config, bank_config, form, dtype, nnx.Rngs(0), execution)

    abstract = nnx.eval_shape(fresh)
    lay_out(abstract, tensor_shards(mesh))
    graph, state = nnx.split(abstract)
    filled = dict(weights)
    if bank is not None:
        for group in GROUPS:
            filled |= {("layers", group, k): v for k, v in (bank.group(group) or {}).items()}
        for end in ENDS:
            filled |= {(f"{end}_adapters", k): v for k, v in end_tensors(bank, end).items()}
    if gates is not None:
        filled |= gate_weights(gates)
    for group, order in column_orders(config, tensor_shards(mesh)).items():
        for path in (("layers", group, part) for part in COLUMNS):
            if path in filled:
                filled[path] = _in_shards(filled[path], order, tensor_shards(mesh))
    leaves = nnx.to_flat_state(state)
    loaded = [
        (path, leaf.replace(_placed(path, leaf, filled.pop(tuple(map(str, path))), mesh))) for path, leaf in leaves
    ]
    assert not filled, f"weights without a place in the model: {sorted(filled)}"
    return graph, nnx.from_flat_state(loaded)


def _placed(path: Any, leaf: Any, value: Any, mesh: Mesh | None) -> jax.Array:
    assert leaf.shape == value.shape, f"{path}: {leaf.shape} != {value.shape}"
    if mesh is None:
        return jnp.asarray(value, leaf.dtype)
    where = sharding(mesh, leaf.get_metadata("axes"), leaf.shape)
    if isinstance(value, jax.Array) and value.sharding == where and value.dtype == leaf.dtype:
        return value  # another model's, shared
    return place(value, where, leaf.dtype)
