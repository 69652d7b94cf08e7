"""GATES folders: gates from disk and back, and gates before their training."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from meteora_jax.config import GROUPS, PROJECTIONS, BankConfig, InputError, LlamaConfig, read_json
from meteora_jax.gate_config import SEGMENTS, SHIFTS, GateConfig, TokenRouterForm
from meteora_jax.io.tensors import WEIGHTS, read_tensors, write_folder

# Tensors of a token router, in the order in which `fresh_gates` draws them; the last two have the gates' columns.
_ROUTER = ("embed", "shift", "qkv_embed", "qkv", "o", "gate_up", "down", "lookup", "first", "hop", "segment", "task",
           "previous")  # fmt: skip
TOKEN_ROUTER = tuple(f"token_router.{part}" for part in _ROUTER)
SHARED_BY_ADAPTERS = TOKEN_ROUTER[:-2]  # of a gate's tensors those without the gates' columns
# What they were called in GATES of format "meteora-gates-2".
_FORMER = dict(zip(TOKEN_ROUTER, (f"ahead.{part}" for part in (
    "read", "shift", "look", "own", "o", "up", "down", "point", "first", "again", "number", "out", "before"
)), strict=True))  # fmt: skip
LOOKUP = 8.0, 4.0  # of a fresh token router: the look-up's sharpness and weight
# Fresh ones are normal with 1 over the square root of their inputs times this: less where a stream of several layers
# adds up and at its end, more for `hop`, since what it reads has the length 1 and the stream that of sqrt(E).
_SIZES = {"qkv_embed": 0.3, "o": 0.5, "down": 0.5, "shift": 0.5, "hop": 4.0}
_SIZES |= dict.fromkeys(("task", "previous", "first", "segment"), 0.1)


def gate_shapes(
    form: TokenRouterForm | None, base: LlamaConfig | BankConfig, columns: int
) -> dict[str, tuple[int, ...]]:
    """{name: shape} of `GATES/weights.safetensors`: MeteoRA's gates [L, I, G], named like their projections; or the
    parameters of a token router, as `TokenRouter` has them. base: or a bank, which knows its shapes. columns: G,
    `GateConfig.columns`."""
    if form is None:
        return {
            p: (base.num_layers, base.projection_shape(p)[0], columns) for ps in GROUPS.values() for p in ps
        }  # fmt: skip
    d, e, f = base.hidden_size, form.width, form.depth
    parts = {
        "embed": (d, e), "shift": (SHIFTS, e, e), "qkv_embed": (f, d, 3, e), "qkv": (f, e, 3, e), "o": (f, e, e),
        "gate_up": (f, e, 2, 2 * e), "down": (f, 2 * e, e), "lookup": (2,), "first": (e, 1),
        "hop": (1 + SHIFTS, e, e), "segment": (e, SEGMENTS), "task": (e, columns), "previous": (e, columns),
    }  # fmt: skip
    return {f"token_router.{part}": parts[part] for part in _ROUTER}


def stored_shapes(config: GateConfig, base: LlamaConfig | BankConfig) -> dict[str, tuple[int, ...]]:
    """`gate_shapes` under the names that the file has."""
    shapes = gate_shapes(config.form, base, config.columns)
    return {_FORMER[name]: shape for name, shape in shapes.items()} if config.former else shapes


def base_of(shapes: Mapping[str, tuple[int, ...]]) -> BankConfig:
    """The sizes of a base that a gate file's own tensors speak of, as far as they do."""
    sound = {p: shapes[p] for p in PROJECTIONS if len(shapes.get(p, ())) == 3}
    widths = {p: next((sound[q][1] for q in ps if q in sound), 0) for ps in GROUPS.values() for p in ps}
    for embed in (TOKEN_ROUTER[0], _FORMER[TOKEN_ROUTER[0]]):
        if len(shapes.get(embed, ())) == 2:
            widths["q_proj"] = shapes[embed][0]
    layers = next((shape[0] for shape in sound.values()), 0)
    return BankConfig((), {}, layers, {p: (width, 0) for p, width in widths.items()})


def fresh_gates(
    form: TokenRouterForm | None, base: LlamaConfig | BankConfig, columns: int, seed: int
) -> dict[str, np.ndarray]:
    """Gates before their training, float32 as `gate_shapes` has them: MeteoRA's zeros, a token router's normal."""
    gates = {name: np.zeros(shape, np.float32) for name, shape in gate_shapes(form, base, columns).items()}
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
    folder: str | os.PathLike[str], base: LlamaConfig | BankConfig, names: tuple[str, ...]
) -> tuple[GateConfig, dict[str, np.ndarray]]:
    """GATES/ -> its configuration and float32 tensors as `gate_shapes` has them, columns in the bank's order, a null
    choice's last."""
    folder = Path(folder)
    source = str(folder / "gates.json")
    config = GateConfig.from_json(read_json(folder / "gates.json"), source)
    missing = [n for n in names if n not in config.names]
    unknown = [n for n in config.names if n not in names]
    if missing or unknown:
        wrong = [f"no gate for {n!r}" for n in missing] + [f"a gate for {n!r}" for n in unknown]
        ways = ["meteora train gates --extend trains what is missing"] if missing else []
        ways += ["meteora bank remove and rename --gates change gates with their bank"] if unknown else []
        raise InputError(f"{source}: names: expected the bank's adapters, found {', '.join(wrong)} ({'; '.join(ways)})")
    tensors = read_tensors(folder / WEIGHTS, stored_shapes(config, base))
    if config.former:
        tensors = {name: tensors[before] for name, before in _FORMER.items()}
    order = [*(config.names.index(n) for n in names), *range(len(names), config.columns)]
    tensors = {p: t if p in SHARED_BY_ADAPTERS else t[..., order] for p, t in tensors.items()}
    return config, {p: np.ascontiguousarray(t.astype(np.float32)) for p, t in tensors.items()}


def save_gates(folder: str | os.PathLike[str], config: GateConfig, gates: Mapping[str, np.ndarray]) -> None:
    """Writes GATES/ whole or not at all; an existing folder is replaced only once the new one is complete."""
    tensors = {p: np.ascontiguousarray(g, np.float32) for p, g in gates.items()}
    write_folder(Path(folder), "gates.json", config.to_json(), tensors)


def change_columns(
    folder: str | os.PathLike[str], bank: BankConfig, changes: Mapping[str, str | None]
) -> tuple[GateConfig, bool]:
    """Renames columns of GATES/, or drops those of adapters that become None; every other column keeps every bit.

    Columns that are not there are not missed, so that a change which was killed between gates and bank can be made
    once more. A choice of more adapters than are left becomes one of all that are.

    Args:
        bank: the gates' own, before its change or after it.

    Returns:
        the description, and whether it had to be changed.

    Raises:
        InputError: gates of adapters that the bank will not have, or whose columns all go.
    """
    source = Path(folder) / "gates.json"
    config = GateConfig.from_json(read_json(source), str(source))
    kept = {old: new for old in config.names if (new := changes.get(old, old)) is not None}
    allowed = {changes.get(name, name) for name in bank.names}
    unknown = [new for new in kept.values() if new not in allowed]
    if unknown:
        found = f"columns of {', '.join(unknown)}: gates of another bank"
        raise InputError(f"{source}: names: expected adapters of the bank, found {found}")
    if not kept:
        raise InputError(f"{source}: names: expected an adapter that stays, found all of them removed")
    if len(set(kept.values())) < len(kept):
        raise InputError(f"{source}: names: expected a name that no column has, found {', '.join(kept.values())}")
    new = dataclasses.replace(config, names=tuple(kept.values()), top_k=min(config.top_k, len(kept)), former=False)
    if new.names == config.names:
        return config, False
    config, gates = load_gates(folder, bank, config.names)
    at = [*(config.names.index(name) for name in kept), *range(len(config.names), config.columns)]
    save_gates(folder, new, {p: g if p in SHARED_BY_ADAPTERS else g[..., at] for p, g in gates.items()})
    return new, True


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


def count_columns(gates: Mapping[str, np.ndarray]) -> int:
    """Of gates as `gate_shapes` has them: one an adapter, and any of a null choice."""
    return next(gates[name].shape[-1] for name in ("token_router.task", "q_proj") if name in gates)
