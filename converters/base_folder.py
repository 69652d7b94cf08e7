"""Writing `BASE/`: the folder that every importer of base weights ends in.

`config.json` (Hugging Face's keys plus "meteora"), the tokenizer's files, and `weights.safetensors` with exactly
`LlamaConfig.weight_shapes()`: layers stacked, kernels [I, O].
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np

from converters.folders import new_folder, sha256, write_json
from converters.rules import Placement, Progress, Rule, fill, plan
from converters.tensor_files import SourceTensor, TensorWriter
from meteora_jax.config import InputError, LlamaConfig

_DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}


def write_base(
    dest: str | os.PathLike[str],
    config: LlamaConfig,
    rules: Sequence[Rule],
    tensors: Sequence[SourceTensor],
    *,
    inputs: Sequence[Path],
    dtype: str | None,
    overwrite: bool,
    progress: Progress | None,
    write_tokenizer: Callable[[Path], None],
) -> None:
    """Converts `tensors` by `rules` into a new `dest`.

    Args:
        dest: the folder to make.
        config: of the base.
        rules: the source format's table.
        tensors: all that the source holds, in reading order.
        inputs: the files read, the one that lists the tensors first; their SHA-256 goes into `config.json`.
        dtype: of every tensor; None keeps the source's (the wider one where stacked layers differ).
        overwrite: replace a `dest` that holds something.
        progress: told about every tensor.
        write_tokenizer: writes the tokenizer's files into the folder it is given.

    Raises:
        InputError: as `plan`, `fill` and `new_folder`; then `dest` is as it was.
    """
    if dtype is not None and dtype not in _DTYPES:
        raise InputError(f"dtype: expected {', '.join(_DTYPES)}, found {dtype!r}")
    shapes = config.weight_shapes()
    placements = plan(rules, tensors, shapes, inputs[0].name)
    dtypes = _stored_dtypes(placements, dtype)
    with new_folder(dest, overwrite, inputs) as folder:
        write_tokenizer(folder)
        writer = TensorWriter(folder / "weights.safetensors", {p: (dtypes[p], shapes[p]) for p in shapes})
        fill(placements, writer, progress)
        source = [{"file": path.name, "sha256": sha256(path)} for path in inputs]
        meteora = {"format": "meteora-base-1", "source": source}
        write_json(folder / "config.json", {**config.to_hf(), "meteora": meteora})


def _stored_dtypes(placements: Sequence[Placement], dtype: str | None) -> dict[str, np.dtype]:
    if dtype is not None:
        return {p.path: _DTYPES[dtype] for p in placements}
    found: dict[str, set[np.dtype]] = {}
    for p in placements:
        found.setdefault(p.path, set()).add(p.source.dtype)
    return {path: common_dtype(kinds) for path, kinds in found.items()}


def common_dtype(kinds: set[np.dtype]) -> np.dtype:
    """The type that holds all of them without loss: the only one there is, or float32."""
    return next(iter(kinds)) if len(kinds) == 1 else np.dtype(np.float32)
