"""A quantised BASE of a source of base weights: matrices that it holds in the very format are taken over bit for bit.

    int8, fp8   a scale an output column, or one for all
    int4        scales and zeros for groups of inputs that are multiples of the base's own; a scale of more inputs
                stands several times

All others are rounded anew from what they stand for, as `quantize_base` does it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence

import numpy as np

from converters import rules
from converters.base_folder import OpenedBase, write_description
from converters.folders import Journal, new_folder
from converters.quantize import LEAST_GROUP, quantization_of, quantize_matrix
from converters.rules import Placement, Progress, copy_tensor
from converters.tensor_files import DTYPES, PackedMatrix, TensorWriter
from meteora_jax.config import InputError
from meteora_jax.quantization import GROUP_SIZE, Quantization


@dataclasses.dataclass(frozen=True)
class PackedImport:
    """What `write_packed` did: how many of the source's matrices were taken over, and the others by tensor."""

    quantization: Quantization
    kept: int
    rounded: Mapping[str, int]

    def __str__(self) -> str:
        """In words."""
        total, anew = self.kept + sum(self.rounded.values()), ", ".join(f"{p} ({n})" for p, n in self.rounded.items())
        kept = f"{self.kept} of {total} matrices taken over bit for bit"
        return f"{self.quantization}: {kept}" + (f"; rounded anew: {anew}" if anew else "")


def write_packed(
    dest: str | os.PathLike[str],
    opened: OpenedBase,
    weights: str,
    head: bool = False,
    embedding: bool = False,
    dtype: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> PackedImport:
    """Converts a source into a quantised BASE; killed, the same call goes on where it was.

    Args:
        dest, opened, overwrite, progress: as of `write_base`. dtype: of what is not quantised. weights, head,
            embedding: as of `quantize_base`.

    Raises:
        InputError: as these.
    """
    placements, dtypes = opened.plan(dtype)
    found = _format(opened, placements, weights, head, embedding)
    config = dataclasses.replace(opened.config, quantization=found)
    whole, shapes, types = opened.config.weight_shapes(), config.weight_shapes(), config.stored_types()
    specs = {p: (DTYPES[types[p]] if p in types else dtypes[p], shape) for p, shape in shapes.items()}
    problems: list[str] = []
    with new_folder(dest, overwrite, opened.inputs, _identity(opened, found, specs)) as folder:
        opened.write_tokenizer(folder)
        writer, journal = TensorWriter(folder / "weights.safetensors", specs), Journal(folder)
        if not writer.found:
            journal.begin(journal.conversion)
        first, unsaved = journal.done, 0
        anew: dict[str, int] = json.loads(journal.said or "{}")
        for done, place in enumerate(placements[first:], start=first + 1):
            index = () if place.layer is None else (place.layer,)
            if place.path not in types:
                out = writer.slice(place.path, *index)
                problems += copy_tensor(place.source, out, place.transform)
                unsaved += out.nbytes
            else:
                parts = {p: writer.slice(p, *index) for p in types if p == place.path or p.startswith(f"{place.path}_")}
                if (packed := place.source.packed) is not None and _fits(packed, found, place):
                    problems += _take(packed, parts, place)
                else:
                    values = np.empty(whole[place.path][len(index) :], np.float32)
                    problems += copy_tensor(place.source, values, place.transform)
                    if not problems:
                        quantize_matrix(values, parts, place.path, found)
                    anew[place.path] = anew.get(place.path, 0) + 1
                unsaved += sum(part.nbytes for part in parts.values())
            if unsaved >= rules.SAVE_BYTES and not problems:
                writer.sync()
                journal.note(done, json.dumps(anew))
                unsaved = 0
            if progress is not None:
                progress(place.source.key, done, len(placements))
        if problems:
            raise InputError(problems)
        write_description(folder, opened, placements, quantization=dataclasses.asdict(found))
    total = sum(place.path in types for place in placements)
    return PackedImport(found, total - sum(anew.values()), anew)


def _format(
    opened: OpenedBase, placements: Sequence[Placement], weights: str, head: bool, embedding: bool
) -> Quantization:
    """What the base will be in: int4 in the source's groups, where these are smaller."""
    found = quantization_of(opened.config, weights, head, embedding, opened.inputs[0])
    packed = [p.source.packed for p in placements if p.source.packed is not None]
    size = math.gcd(GROUP_SIZE, *(held.group for held in packed if held.kind == "int4"))
    if found.group_size is None or size < LEAST_GROUP:
        return found
    return dataclasses.replace(found, group_size=size)


def _identity(opened: OpenedBase, found: Quantization, specs: Mapping[str, tuple[np.dtype, tuple[int, ...]]]) -> str:
    """A digest of what is asked for, and of the files as they are now."""
    files = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in opened.inputs]
    types = {path: str(dtype) for path, (dtype, _) in specs.items()}
    text = json.dumps([files, types, dataclasses.asdict(found)], sort_keys=True)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def _fits(packed: PackedMatrix, found: Quantization, place: Placement) -> bool:
    """Whether it has the format's values and scales; of the projections alone, as others have another layout."""
    if packed.kind != found.weights or not place.path.startswith("layers."):
        return False
    if found.group_size is None:
        return True
    inputs = place.source.shape[-1 if place.transform.transpose else 0]
    return packed.group % math.gcd(inputs, found.group_size) == 0


def _take(packed: PackedMatrix, parts: Mapping[str, np.ndarray], place: Placement) -> list[str]:
    """Fills the parts of a base's matrix with what the source holds; what is wrong with its scales or values."""
    values, scale, zero = packed.read()
    finite = bool(np.isfinite(scale).all()) and not (packed.kind == "fp8" and ((values & 0x7F) == 0x7F).any())
    if not finite:
        return [f"{place.source.where}: expected finite scales and values, found others"]
    out = parts[place.path]
    if zero is None:
        out[...], parts[f"{place.path}_scale"][...] = values, scale
        return []
    again = len(parts[f"{place.path}_scale"]) // len(scale)
    out[...] = values[::2] | values[1::2] << 4
    parts[f"{place.path}_scale"][...] = np.repeat(scale, again, 0)
    parts[f"{place.path}_zero"][...] = np.repeat(zero, again, 0)
    return []
