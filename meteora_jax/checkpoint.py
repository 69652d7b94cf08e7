"""The data folders BASE, BANK and GATES: from disk to a model's state, and gates back to disk.

A folder is a JSON description and `weights.safetensors`, whose tensors are exactly those that the
description implies; anything else is refused, all problems at once.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
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

from meteora_jax.adapters import AdapterBank, column_shards
from meteora_jax.config import ENDS, GROUPS, BankConfig, InputError, LlamaConfig, read_json
from meteora_jax.ends import end_tensors
from meteora_jax.gate_config import METEORA_FORM, SHIFTS, GateConfig, GateForm
from meteora_jax.llama import Llama, lay_out
from meteora_jax.origin import BaseOrigin, misfits
from meteora_jax.sharding import place, shard_order, sharding, tensor_shards

WEIGHTS = "weights.safetensors"
BACKGROUND = "background.json"  # of independent gates: the tokens that they were trained against


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


def gate_shapes(form: GateForm, base: LlamaConfig, adapters: int) -> dict[str, tuple[int, ...]]:
    """{path: shape} of `GATES/weights.safetensors`: a gate [L, I, A] named like its projection, or like its group where
    the projections of a group share one; `NAME.mean` [L, I, A] and `NAME.bias` [L, A] where the form has them, and so
    `STREAM`'s three: `stream.read` [L, D, 4, E] and `stream.own` [L, E, 3, E] serve all adapters, `stream.out`
    [L, E, 7, A]. Gates that read the embeddings have `AHEAD`'s alone, as `GatesAhead` shapes them."""
    shapes: dict[str, tuple[int, ...]] = {}
    for group, projections in GROUPS.items():
        for name in (group,) if form.shared else projections:
            shape = (base.num_layers, base.projection_shape(projections[0])[0], adapters)
            shapes |= {name: shape} if not form.alone else {}
            shapes |= {f"{name}.mean": shape} if form.input == "prefix-mean" else {}
            shapes |= {f"{name}.bias": (base.num_layers, adapters)} if form.bias else {}
    e, f = form.stream, form.depth
    if form.is_ahead:
        parts = {
            "read": (base.hidden_size, e),
            "shift": (SHIFTS, e, e),
            "look": (f, base.hidden_size, 3, e),
            "own": (f, e, 3, e),
        }
        parts |= {"o": (f, e, e), "up": (f, e, 2, 2 * e), "down": (f, 2 * e, e), "first": (e, 1), "point": (2,)}
        parts |= {"again": (1 + SHIFTS, e, e)} if form.rounds == 2 else {}
        parts |= {"number": (e, form.turns)} if form.turns else {}
        parts |= {"out": (e, adapters), "before": (e, adapters)}
        shapes |= {f"ahead.{part}": shape for part, shape in parts.items()}
    elif e:
        count = sum(map(len, GROUPS.values()))
        parts = {"read": (base.hidden_size, 4, e), "own": (e, 3, e), "out": (e, count, adapters)}
        shapes |= {f"stream.{part}": (base.num_layers, *shape) for part, shape in parts.items()}
    return shapes


STREAM = ("stream.read", "stream.own", "stream.out")
AHEAD = tuple(
    f"ahead.{part}"
    for part in (
        "read", "shift", "look", "own", "o", "up", "down", "point", "first", "again", "number", "out", "before"
    )
)  # fmt: skip
SHARED_BY_ADAPTERS = STREAM[:-1] + AHEAD[:-2]  # of a gate's tensors those whose last axis is not the adapters'
_PLACES = {n: ("layers", "gate_stream", n.removeprefix("stream.")) for n in STREAM}  # in the module tree
POINT = 8.0, 4.0  # fresh gates' `ahead.point`
SMALLER = {"ahead.look": 0.3, "ahead.o": 0.5, "ahead.down": 0.5, "ahead.shift": 0.5}
SMALLER |= {"ahead.out": 0.1, "ahead.before": 0.1, "ahead.first": 0.1, "ahead.number": 0.1}
SMALLER |= {"ahead.again": 4.0}  # what it reads has the length 1, the stream that of sqrt(E)
_PLACES |= {n: ("gates_ahead", n.removeprefix("ahead.")) for n in AHEAD}


def fresh_gates(form: GateForm, base: LlamaConfig, adapters: int, seed: int) -> dict[str, np.ndarray]:
    """Gates before their training, float32 as `gate_shapes` has them: zeros, but for what only the stream's own
    products give a gradient, which is normal with 1 over the square root of its inputs, less where a stream of several
    layers adds up and at its end."""
    gates = {name: np.zeros(shape, np.float32) for name, shape in gate_shapes(form, base, adapters).items()}
    rng = np.random.default_rng(seed)
    if form.is_ahead:
        gates["ahead.point"][:] = POINT
    for name in [n for n in (*SHARED_BY_ADAPTERS, *AHEAD[-2:]) if n in gates and n != "ahead.point"]:
        inputs = gates[name].shape[0 if gates[name].ndim == 2 else 1]
        gates[name] = rng.standard_normal(gates[name].shape).astype(np.float32) * SMALLER.get(name, 1.0) * inputs**-0.5
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
    tensors = read_tensors(folder / WEIGHTS, gate_shapes(config.form, base, len(names)))
    order = [config.names.index(n) for n in names]
    tensors = {p: t if p in SHARED_BY_ADAPTERS else t[..., order] for p, t in tensors.items()}
    return config, {p: np.ascontiguousarray(t.astype(np.float32)) for p, t in tensors.items()}


def digest(texts: Sequence[Sequence[int]]) -> str:
    """SHA-256 of a background's tokens."""
    return hashlib.sha256(json.dumps([list(map(int, t)) for t in texts]).encode()).hexdigest()


def load_background(folder: str | os.PathLike[str]) -> list[list[int]]:
    """The tokens that the columns of GATES/ were trained against.

    Raises:
        InputError: gates that were trained together have none; the tokens are not those that gates.json names.
    """
    source, path = Path(folder) / "gates.json", Path(folder) / BACKGROUND
    mark = GateConfig.from_json(read_json(source), str(source)).background
    if mark is None:
        raise InputError(f"{source}: background: expected gates trained with --independent, found none")
    texts = read_json(path)
    lists = isinstance(texts, list) and all(isinstance(t, list) and t for t in texts) and texts
    if not lists or not all(isinstance(token, int) for t in texts for token in t) or digest(texts) != mark:
        raise InputError(f"{path}: expected the tokens that {source.name} names (SHA-256 {mark[:12]}), found others")
    return texts


def save_gates(
    folder: str | os.PathLike[str],
    config: GateConfig,
    gates: Mapping[str, np.ndarray],
    background: Sequence[Sequence[int]] | None = None,
) -> None:
    """Writes GATES/ whole or not at all; an existing folder is replaced only once the new one is complete.

    background: of independent columns, stored beside them.
    """
    tensors = {p: np.ascontiguousarray(g, np.float32) for p, g in gates.items()}
    beside = {} if background is None else {BACKGROUND: background}
    _write_folder(Path(folder), "gates.json", config.to_json(), tensors, beside)


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


def join_gates(
    folders: Sequence[str | os.PathLike[str]],
    dest: str | os.PathLike[str],
    base: str | os.PathLike[str],
    bank: str | os.PathLike[str],
) -> list[str]:
    """Writes GATES/ for a bank from independent columns of several GATES/, and returns the names left out.

    Raises:
        InputError: gates that were trained together, or against another background; an adapter without a column, or
            with columns that differ.
    """
    config = LlamaConfig.from_hf(read_json(Path(base) / "config.json"), str(Path(base) / "config.json"))
    names = BankConfig.from_json(read_json(Path(bank) / "bank.json"), str(Path(bank) / "bank.json")).names
    found: dict[str, dict[str, np.ndarray]] = {}
    problems: list[str] = []
    first, texts = None, None
    for folder in map(Path, folders):
        source = folder / "gates.json"
        described = GateConfig.from_json(read_json(source), str(source))
        texts = load_background(folder) if texts is None or first is None else texts
        first = described if first is None else first
        for key in ("background", "form", "top_k", "temperature"):
            wanted, own = getattr(first, key), getattr(described, key)
            if wanted != own:
                problems.append(f"{source}: {key}: expected {wanted!r} (as {folders[0]} has it), found {own!r}")
        _, tensors = load_gates(folder, config, described.names)
        for i, name in enumerate(described.names):
            column = {key: tensor[..., i] for key, tensor in tensors.items()}
            known = found.setdefault(name, column)
            if known.keys() == column.keys() and any(not np.array_equal(known[k], column[k]) for k in known):
                problems.append(f"{source}: {name}: expected the column that an earlier folder has, found another")
    if first is None or texts is None:
        raise InputError("gates: expected at least one GATES folder, found none")
    problems += [f"{bank}: {n}: expected a column in one of the folders, found none" for n in names if n not in found]
    if problems:
        raise InputError(problems)
    joined = {key: np.stack([found[n][key] for n in names], axis=-1) for key in found[names[0]]}
    save_gates(dest, dataclasses.replace(first, names=names), joined, texts)
    return [n for n in found if n not in names]


def _write_folder(
    folder: Path, name: str, description: Any, tensors: dict[str, np.ndarray], beside: Mapping[str, Any] | None = None
) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        save_file(tensors, temporary / WEIGHTS)
        (temporary / name).write_text(json.dumps(description, indent=1) + "\n")
        for file, content in (beside or {}).items():
            (temporary / file).write_text(json.dumps(content) + "\n")
        os.chmod(temporary, 0o755)
        if folder.exists():
            retired = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
            os.replace(folder, retired / "old")
            os.replace(temporary, folder)
            shutil.rmtree(retired)
        else:
            os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


# The parts of a gate, and the axis of the module tree's own along which the projections are stacked.
_GATE_PARTS = {"": 2, ".mean": 2, ".bias": 1}


def gate_weights(gates: Mapping[str, np.ndarray]) -> dict[tuple[str, ...], np.ndarray]:
    """Gates as `gate_shapes` has them -> the module tree's, [L, I, P, A] a group (biases [L, P, A])."""
    weights = {}
    for group, projections in GROUPS.items():
        names = (group,) if group in gates else projections
        for part, axis in _GATE_PARTS.items():
            if f"{names[0]}{part}" in gates:
                stacked = np.stack([gates[f"{name}{part}"] for name in names], axis=axis)
                weights["layers", group, f"gate{part.replace('.', '_')}"] = stacked
    return weights | {place: gates[name] for name, place in _PLACES.items() if name in gates}


def split_gates(state: Mapping[tuple[str, ...], Any]) -> dict[str, np.ndarray]:
    """The inverse of `gate_weights`."""
    gates = {}
    for group, projections in GROUPS.items():
        gate = state.get(("layers", "qkv", "gate"))
        shared = gate is not None and gate.shape[2] == 1  # of several projections
        for part, axis in _GATE_PARTS.items():
            stacked = state.get(("layers", group, f"gate{part.replace('.', '_')}"))
            if stacked is not None:
                for i, name in enumerate((group,) if shared else projections):
                    gates[f"{name}{part}"] = np.take(np.asarray(stacked), i, axis=axis)
    found = {name: state.get(place) for name, place in _PLACES.items()}
    return gates | {name: np.asarray(value) for name, value in found.items() if value is not None}


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
    form: GateForm = METEORA_FORM,
) -> tuple[Any, Any]:
    """A model's graph definition and state with every leaf filled: nothing is initialised and then replaced.

    With a mesh every leaf goes straight to the devices that hold a part of it; of a base that `load_base` left on disk
    a host reads only those parts.
    """
    bank_config = bank.config if bank is not None else None
    abstract = nnx.eval_shape(lambda: Llama(config, bank_config, gates is not None, dtype, rngs=nnx.Rngs(0), form=form))
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
