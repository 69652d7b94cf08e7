"""Writing `BASE/`: the folder that every importer of base weights writes.

`config.json` (Hugging Face's keys plus "meteora"), the tokenizer's files, and `weights.safetensors` with exactly
`LlamaConfig.weight_shapes()`: layers stacked, kernels [I, O].
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np

from converters.folders import Journal, new_folder, sha256, write_json
from converters.rules import Placement, Progress, Rule, TensorPlan, fill, find_rule, plan
from converters.tensor_files import SourceTensor, TensorWriter, dtype_name
from meteora_jax.config import InputError, LlamaConfig
from meteora_jax.io import hf_config
from meteora_jax.io.provenance import GIVEN, BaseOrigin, normalized, split_name

_DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}


@dataclasses.dataclass(frozen=True)
class OpenedBase:
    """A source of base weights after its headers were read: all that a conversion needs to know.

    inputs: the files read, the one that lists the tensors first; their SHA-256 goes into `config.json`.
    write_tokenizer: writes the tokenizer's files into the folder it is given.
    names, revision: what the source says about itself, as `BaseOrigin` has them.
    remarks: lines for the user about what was chosen where the source leaves a choice.
    """

    config: LlamaConfig
    rules: Sequence[Rule]
    tensors: Sequence[SourceTensor]
    inputs: Sequence[Path]
    write_tokenizer: Callable[[Path], None]
    names: Mapping[str, str] = dataclasses.field(default_factory=dict)
    revision: str | None = None
    remarks: Sequence[str] = ()

    def plan(self, dtype: str | None) -> tuple[list[Placement], dict[str, np.dtype]]:
        """(where each tensor goes, the type each destination is stored in); `dtype` None keeps the source's.

        Raises:
            InputError: as `rules.plan`, or an unknown dtype.
        """
        if dtype is not None and dtype not in _DTYPES:
            raise InputError(f"dtype: expected {', '.join(_DTYPES)}, found {dtype!r}")
        placements = plan(self.rules, self.tensors, self.config.weight_shapes(), self.inputs[0].name)
        return placements, _stored_dtypes(placements, dtype)


def write_base(
    dest: str | os.PathLike[str], opened: OpenedBase, dtype: str | None, overwrite: bool, progress: Progress | None
) -> None:
    """Converts a source of base weights into a new `dest`; killed, the same call goes on where it was.

    Args:
        dest: the folder to make.
        opened: the source.
        dtype: of every tensor; None keeps the source's (the wider one where stacked layers differ).
        overwrite: replace a `dest` that holds something.
        progress: called after each tensor with (key, done, total).

    Raises:
        InputError: as `plan`, `fill` and `new_folder`; then `dest` is as it was.
    """
    plans = opened.plan(dtype)
    with new_folder(dest, overwrite, opened.inputs, _identity(opened, *plans)) as folder:
        fill_base(folder, opened, *plans, progress, Journal(folder))


def fill_base(
    folder: Path,
    opened: OpenedBase,
    placements: Sequence[Placement],
    dtypes: Mapping[str, np.dtype],
    progress: Progress | None,
    journal: Journal | None = None,
) -> None:
    """Writes all of a BASE into `folder`. Raises InputError as `fill`."""
    shapes = opened.config.weight_shapes()
    opened.write_tokenizer(folder)
    writer = TensorWriter(folder / "weights.safetensors", {p: (dtypes[p], shapes[p]) for p in shapes})
    fill(placements, writer, progress, journal)
    write_description(folder, opened, placements)


def write_description(folder: Path, opened: OpenedBase, placements: Sequence[Placement], **more: object) -> None:
    """`config.json` of a BASE, with what it records of its source and `more`."""
    source = [{"file": path.name, "sha256": sha256(path)} for path in opened.inputs]
    origin = BaseOrigin(dict(opened.names), opened.revision, norms_sha256(placements))
    meteora = {"format": "meteora-base-1", "source": source, "origin": dataclasses.asdict(origin), **more}
    write_json(folder / "config.json", {**hf_config.to_hf(opened.config), "meteora": meteora})


def norms_sha256(placements: Sequence[Placement]) -> str:
    """`BaseOrigin.norms_sha256` of a source: conversions keep norms, and quantisation leaves them in float32."""
    norms = sorted((p for p in placements if p.path.endswith(".scale")), key=lambda p: (p.path, p.layer or 0))
    digest = hashlib.sha256()
    for place in norms:
        digest.update(np.ascontiguousarray(place.source.read().astype(ml_dtypes.bfloat16)).tobytes())
    return digest.hexdigest()


def own_names(path: Path, **said: object) -> tuple[dict[str, str], str | None]:
    """(names, revision) of a source: what its metadata `said`, by key, and the name of the file or folder itself."""
    names = {key: value.strip() for key, value in said.items() if isinstance(value, str) and value.strip()}
    name, revision = split_name(str(Path(os.path.abspath(path))))
    return names | {"path": name}, revision


def named(opened: OpenedBase, name: str | None) -> OpenedBase:
    """The source with the name that the user gives it, `NAME` or `NAME@COMMIT`; None leaves it as it is.

    Raises:
        InputError: a name of which nothing is left to compare.
    """
    if name is None:
        return opened
    name, _, revision = name.partition("@")
    if not normalized(name):
        raise InputError(f"name: expected a model's name, found {name!r}")
    return dataclasses.replace(opened, names={**opened.names, GIVEN: name}, revision=revision or opened.revision)


def _identity(opened: OpenedBase, placements: Sequence[Placement], dtypes: Mapping[str, np.dtype]) -> str:
    """A digest of the conversion: the files as they are now, and where which tensor goes in which type."""
    files = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in opened.inputs]
    moves = [(p.source.file, p.source.key, p.path, p.layer) for p in placements]
    types = {path: str(dtype) for path, dtype in dtypes.items()}
    text = json.dumps([files, moves, types, hf_config.to_hf(opened.config)], sort_keys=True)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def describe_base(opened: OpenedBase, dtype: str | None) -> list[TensorPlan]:
    """What `write_base` would do, tensor by tensor, from headers alone. Raises InputError as `OpenedBase.plan`."""
    placements, dtypes = opened.plan(dtype)
    placed = {id(p.source): p for p in placements}
    rows = []
    for tensor in opened.tensors:
        place = placed.get(id(tensor))
        if place is None:
            rule, _ = find_rule(opened.rules, tensor.key)
            assert rule is not None, "`plan` refuses a tensor without a rule"
            how = f"dropped: {rule.why}"
            rows.append(TensorPlan(tensor.key, dtype_name(tensor.dtype), tensor.shape, None, None, how))
            continue
        how = ["transposed"] if place.transform.transpose else []
        how += ["rows reordered"] if place.transform.rows else []
        to = place.path if place.layer is None else f"{place.path}[{place.layer}]"
        stored = dtype_name(dtypes[place.path])
        rows.append(
            TensorPlan(tensor.key, dtype_name(tensor.dtype), tensor.shape, to, stored, ", ".join(how) or "as is")
        )
    return rows


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
