"""BASE folders: a base's configuration, which model it is, and its weights."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

from numpy.typing import DTypeLike

from meteora_jax.config import GROUPS, LlamaConfig, read_json
from meteora_jax.io import hf_config
from meteora_jax.io.files import refuse_unimported_base
from meteora_jax.io.provenance import BaseOrigin
from meteora_jax.io.tensors import WEIGHTS, StoredArray, open_tensors


def load_base(
    folder: str | os.PathLike[str], dtype: DTypeLike
) -> tuple[LlamaConfig, dict[tuple[str, ...], StoredArray]]:
    """BASE/ -> its configuration and the model's base weights by path in the module tree, still on disk.

    dtype: of all that is not quantised, which stays as it is stored.
    """
    folder = Path(folder)
    refuse_unimported_base(folder)
    config = hf_config.from_hf(read_json(folder / "config.json"), str(folder / "config.json"))
    shapes, types = config.weight_shapes(), {path: kind for path, (_, kind) in config.quantized_tensors().items()}
    file = open_tensors(folder / WEIGHTS, shapes, config.stored_types())
    paths = {
        ("layers", group, part): [f"layers.{p}.{part}" for p in projections]
        for group, projections in GROUPS.items()
        for part in ("kernel", "kernel_scale", "kernel_zero", "bias")
        if f"layers.{projections[0]}.{part}" in shapes
    }
    grouped = {key for keys in paths.values() for key in keys}
    named = {
        f"{name}{part}": (f"{place}{part}",)
        for name, place in (("embed.embedding", "embed"), ("lm_head.kernel", "lm_head"))
        for part in ("", "_scale")
    }
    paths |= {named.get(key, tuple(key.split("."))): [key] for key in shapes if key not in grouped}
    return config, {path: StoredArray(file, keys, types.get(keys[0], dtype)) for path, keys in paths.items()}


def sample_digest(weights: Mapping[tuple[str, ...], StoredArray]) -> str:
    """SHA-256 of a few rows of each weight, which tells one base from another."""
    sample = hashlib.sha256()
    for path in sorted(weights, key=str):
        sample.update(weights[path].first(4096).tobytes())
    return sample.hexdigest()[:16]


def read_origin(folder: str | os.PathLike[str]) -> BaseOrigin | None:
    """Which model a BASE/ is; None if it records nothing. Raises InputError: a missing or malformed config.json."""
    path = Path(folder) / "config.json"
    return BaseOrigin.of_base(read_json(path), str(path))
