"""BASE -> a BASE whose matrices are in 8 or 4 bits, and those matrices read as what they stand for.

    int8    scale = max |w| of an output column / 127, values round(w / scale)
    fp8     scale = max |w| of an output column / 448, values w / scale as float8 e4m3
    int4    of each group of inputs in a column, [min, max] with 0 inside: scale = (max - min) / 15,
            zero = round(-min / scale), values round(w / scale) + zero in 0..15

By rounding alone; no data is looked at. `pallas_kernels.quantized_matmul` multiplies with what this writes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import ml_dtypes
import numpy as np

from converters import rules
from converters.folders import Journal, new_folder, write_json
from converters.hf_llama import copy_tokenizer
from converters.own_folders import read_base
from converters.rules import Progress
from converters.tensor_files import DTYPES, SourceTensor, TensorReader, TensorWriter
from meteora_jax.config import PROJECTIONS, InputError, LlamaConfig, read_json
from meteora_jax.quantization import GROUP_SIZE, WEIGHT_FORMATS, Quantization, WeightFormat

LEAST_GROUP = 16  # inputs that share a scale; fewer would need more memory than 8 bit does
BLOCK_VALUES = 1 << 24  # of a matrix that are in memory at a time, about
FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
FORMAT = "meteora-base-1"


@dataclasses.dataclass(frozen=True)
class Quantized:
    """What `quantize_base` did. error: of all quantised matrices together, the root of the sum of squared differences
    over that of squared weights; worst: the tensor with the largest, and that."""

    config: LlamaConfig
    bytes_before: int
    bytes_after: int
    error: float
    worst: tuple[str, float]


def quantize_base(
    base: str | os.PathLike[str],
    dest: str | os.PathLike[str],
    weights: str,
    head: bool = False,
    embedding: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Quantized:
    """Writes a BASE folder again with its matrices in fewer bits; norms, biases and records stay bit for bit. Killed,
    the same call goes on from what is on disk.

    Args:
        base: the BASE folder. dest: the BASE folder to make.
        weights: int8, fp8 or int4, of the seven projections.
        head, embedding: put these in 8 bit as well, with a scale a token.
        overwrite: replace a `dest` that holds something, once the new one is complete.
        progress: called after each tensor of a layer with (key, done, total).

    Raises:
        InputError: a damaged base, one that is quantised already or of unknown format, weights that are not finite, or
            shapes that the format has no place for; `dest` is then as it was.
    """
    base = Path(base)
    config, reader = read_base(base)
    raw, found = read_json(base / "config.json"), quantization_of(config, weights, head, embedding, base)
    meteora = raw.get("meteora")
    if not isinstance(meteora, dict) or meteora.get("format") != FORMAT:
        said = meteora.get("format") if isinstance(meteora, dict) else meteora
        raise InputError(f"{base / 'config.json'}: meteora.format: expected {FORMAT!r}, found {said!r:.200}")
    new = dataclasses.replace(config, quantization=found)
    shapes, types = new.weight_shapes(), new.stored_types()
    specs = {p: (DTYPES[types[p]] if p in types else reader.dtype(p), shape) for p, shape in shapes.items()}
    jobs = [
        (path, layer)
        for path in config.weight_shapes()
        for layer in (range(config.num_layers) if path.startswith("layers.") else (None,))
    ]
    problems: list[str] = []
    inputs = [base / "config.json", reader.path]
    with new_folder(dest, overwrite, inputs, _identity(found, inputs)) as partial:
        copy_tokenizer(base, partial)
        writer, journal = TensorWriter(partial / "weights.safetensors", specs), Journal(partial)
        if not writer.found:
            journal.begin(journal.conversion)
        first, unsaved = journal.done, 0
        sums = {p: np.asarray(held) for p, held in json.loads(journal.said or "{}").items()}  # as of `quantize_matrix`
        for done, (path, layer) in enumerate(jobs[first:], start=first + 1):
            index = () if layer is None else (layer,)
            values = reader.slice(path, *index)
            if path not in types:
                writer.slice(path, *index)[:] = values
            else:
                parts = {p: writer.slice(p, *index) for p in types if p == path or p.startswith(f"{path}_")}
                added = quantize_matrix(values, parts, path, found)
                sums[path] = sums.get(path, 0) + added
                if not np.isfinite(added).all():
                    problems.append(f"{reader.path}: {path}: expected finite values, found others")
            unsaved += values.nbytes
            if unsaved >= rules.SAVE_BYTES and not problems:
                writer.sync()
                journal.note(done, json.dumps({p: held.tolist() for p, held in sums.items()}))
                unsaved = 0
            if progress is not None:
                progress(path if layer is None else f"{path}[{layer}]", done, len(jobs))
        if problems:
            raise InputError(problems)
        record = {**meteora, "quantization": dataclasses.asdict(found)}
        write_json(partial / "config.json", {**raw, "meteora": record})
    error = {path: math.sqrt(wrong / all_) if all_ else 0.0 for path, (wrong, all_) in sums.items()}
    wrong, whole = np.sum(list(sums.values()), axis=0)
    worst = max(error, key=lambda path: error[path])
    before, after = (_file_bytes(Path(folder)) for folder in (base, dest))
    return Quantized(new, before, after, math.sqrt(wrong / whole) if whole else 0.0, (worst, error[worst]))


def _identity(found: Quantization, inputs: Iterable[Path]) -> str:
    """A digest of what is asked for, and of the files as they are now."""
    files = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in inputs]
    return hashlib.sha256(json.dumps([dataclasses.asdict(found), files]).encode("utf-8")).hexdigest()


def _file_bytes(folder: Path) -> int:
    return (folder / "weights.safetensors").stat().st_size


def quantization_of(config: LlamaConfig, weights: str, head: bool, embedding: bool, base: Path) -> Quantization:
    """What `quantize_base` is asked for. base: as messages name it. Raises InputError: shapes have no place in it."""
    problems = []
    known: dict[str, WeightFormat] = {name: name for name in WEIGHT_FORMATS}
    kind = known.get(weights)
    if kind is None:
        raise InputError(f"weights: expected {', '.join(WEIGHT_FORMATS)}, found {weights!r}")
    if head and config.tie_word_embeddings:
        problems.append(f"{base}: head: expected a head of its own, found it tied to the embedding (--embedding)")
    if kind == "int4":
        widths = {p: config.projection_shape(p)[0] for p in PROJECTIONS}
        problems += [
            f"{base}: {p}: expected inputs in multiples of {LEAST_GROUP} for int4, found {width}"
            for p, width in widths.items()
            if math.gcd(width, GROUP_SIZE) < LEAST_GROUP
        ]
    if problems:
        raise InputError(problems)
    return Quantization.of(kind, head, embedding)


def quantize_matrix(
    values: np.ndarray, parts: dict[str, np.ndarray], path: str, quantization: Quantization
) -> np.ndarray:
    """Fills the parts of one matrix [I, O], or embedding [O, I]; float64 [2], the sums of squared differences and of
    squared weights, not finite where a weight is not."""
    turned = path == "embed.embedding"
    grouped = f"{path}_zero" in parts
    values, out = (values.T, parts[path].T) if turned else (values, parts[path])
    sums, scale = np.zeros(2), parts[f"{path}_scale"]
    for columns in _blocks(*values.shape):
        block = np.ascontiguousarray(values[:, columns], np.float32)
        with np.errstate(invalid="ignore", over="ignore"):
            if grouped:
                packed, scales, zeros = int4(block, len(scale))
                out[:, columns], scale[:, columns], parts[f"{path}_zero"][:, columns] = packed, scales, zeros
                back = _unpacked(packed, scales, zeros)
            else:
                held, scale[columns] = eight_bit(block, quantization.eight_bit)
                out[:, columns] = held.view(out.dtype)
                back = held.astype(np.float32) * scale[columns]
            block64 = block.astype(np.float64)
            sums += np.square(block64 - back).sum(), np.square(block64).sum()
    return sums


def _blocks(width: int, total: int) -> Iterator[slice]:
    """Columns, so many at a time that a block is of about `BLOCK_VALUES`."""
    step = max(1, BLOCK_VALUES // max(1, width))
    for start in range(0, total, step):
        yield slice(start, min(start + step, total))


def eight_bit(matrix: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """float32 [I, O] -> values [I, O] of "int8" or "float8_e4m3fn", and scale float32 [O]; a column of zeros has 0."""
    most = 127.0 if kind == "int8" else float(ml_dtypes.finfo(FP8).max)
    scale = (np.abs(matrix).max(axis=0) / most).astype(np.float32)
    values = np.clip(matrix / np.where(scale > 0, scale, 1), -most, most)
    return (np.rint(values).astype(np.int8) if kind == "int8" else values.astype(FP8)), scale


def int4(matrix: np.ndarray, groups: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """float32 [I, O] -> two values a byte, uint8 [I / 2, O]; scale float32 and zero uint8 [groups, O]."""
    total = matrix.shape[1]
    by_group = matrix.reshape(groups, -1, total)
    low, high = np.minimum(by_group.min(axis=1), 0), np.maximum(by_group.max(axis=1), 0)
    scale = ((high - low) / 15).astype(np.float32)
    divisor = np.where(scale > 0, scale, 1)
    zero = np.clip(np.rint(-low / divisor), 0, 15)
    q = np.clip(np.rint(by_group / divisor[:, None]) + zero[:, None], 0, 15).astype(np.uint8).reshape(-1, 2, total)
    return q[:, 0] | q[:, 1] << 4, scale, zero.astype(np.uint8)


def _unpacked(packed: np.ndarray, scale: np.ndarray, zero: np.ndarray) -> np.ndarray:
    """float32 [I, O] of `int4`'s parts."""
    q = np.stack((packed & 15, packed >> 4), axis=1).reshape(len(scale), -1, packed.shape[1]).astype(np.float32)
    return ((q - zero[:, None].astype(np.float32)) * scale[:, None]).reshape(-1, packed.shape[1])


def open_matrix(config: LlamaConfig, reader: TensorReader, path: str, layer: int | None = None) -> SourceTensor:
    """A tensor of a BASE as what it stands for, read by rows: float32 where it is quantised, else as it is."""
    index = () if layer is None else (layer,)
    packed, types = config.quantized_tensors(), config.stored_types()
    if path not in packed:
        plain = reader.slice(path, *index)

        # The mapping is opened anew for each block, so that its pages do not pile up in this process.
        def rows(start: int, stop: int) -> np.ndarray:
            return reader.slice(path, *index)[start:stop]

        return SourceTensor("weights.safetensors", path, plain.dtype, plain.shape, rows)
    kind = packed[path][1]
    scale = np.array(reader.slice(f"{path}_scale", *index))
    if f"{path}_zero" not in types:

        def rows(start: int, stop: int) -> np.ndarray:
            values = reader.slice(path, *index)[start:stop]
            values = (values.view(FP8) if kind == FP8.name else values).astype(np.float32)
            return values * (scale[start:stop, None] if path == "embed.embedding" else scale)

        shape = reader.slice(path, *index).shape
    else:
        zero = np.array(reader.slice(f"{path}_zero", *index))
        half, total = reader.slice(path, *index).shape
        shape, size = (2 * half, total), 2 * half // len(scale)

        def rows(start: int, stop: int) -> np.ndarray:
            first, last = start // size, -(-stop // size)  # whole groups
            part = reader.slice(path, *index)[first * size // 2 : last * size // 2]
            whole = _unpacked(part, scale[first:last], zero[first:last])
            return whole[start - first * size : stop - first * size]

    return SourceTensor("weights.safetensors", path, np.dtype(np.float32), shape, rows)
