"""Hugging Face folders that are quantised already: their matrices as what they stand for, read by rows.

    fp8                 weight float8 e4m3 [O, I] * weight_scale_inv, one a block of rows and columns
    compressed-tensors  weight float8 e4m3 or int8 [O, I] * weight_scale, one a tensor, a row or a group of columns; or
                        weight_packed, weights + 8 in 4 bits of int32 along I
    gptq                scales[g] * (qweight - qzeros[g] - 1), 4 or 8 bits in int32, qweight along I, qzeros along O;
                        g = g_idx[i]; "gptq_v2" without the 1
    awq ("gemm")        scales[g] * (qweight - qzeros[g]), 4 bits in int32, both along O: the eight columns of a word
                        lie in the order 0, 2, 4, 6, 1, 3, 5, 7

AWQ and SmoothQuant fold scales into norms and the rows of earlier matrices. As a model of its own it is whole, but
adapters of the unquantised model do not fit it: its names say AWQ or SmoothQuant (see `io.provenance`). Of a
compressed-tensors folder the `recipe.yaml` that llm-compressor writes says whether it was done.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from converters.rules import AS_IS, Rule, find_rule
from converters.tensor_files import FLOATS, PackedMatrix, SourceTensor, dtype_name
from meteora_jax.config import InputError

METHODS = ("fp8", "compressed-tensors", "gptq", "awq")
BYTES = {"FP8": 1.0, "INT8": 1.0, "INT4": 0.5}  # a weight, by `SourceTensor.stored`
DROPPED = (".input_scale", ".weight_shape")  # activations stay as they are; a shape is known without
PARTS = {  # what a module has beside its bias, the matrix first
    "fp8": ("weight", "weight_scale_inv"),
    "compressed-tensors": ("weight", "weight_scale"),
    "packed": ("weight_packed", "weight_scale"),
    "gptq": ("qweight", "qzeros", "scales", "g_idx"),
    "awq": ("qweight", "qzeros", "scales"),
}
TURNED = ("gptq", "awq")  # whose matrices lie as [I, O], as this project's do; they keep their key, qweight
_FOLDING = {"AWQModifier": "AWQ", "SmoothQuantModifier": "SmoothQuant"}  # in a recipe, what makes another model
_AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # of each of eight columns, which four bits of a word are its
Rows = Callable[[int, int], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Method:
    """What a `quantization_config` says. block: rows and columns that share a scale (fp8); offset: what a stored zero
    lacks (gptq)."""

    name: str
    bits: int = 8
    block: tuple[int, int] | None = None
    offset: int = 0

    @classmethod
    def of(cls, raw: Mapping[str, Any], source: str = "config.json") -> Method | None:
        """Of a Hugging Face `config.json`; None where it is not quantised. Raises InputError."""
        said = raw.get("quantization_config")
        if said is None:
            return None
        name = said.get("quant_method") if isinstance(said, Mapping) else None
        if name not in METHODS:
            expected = f"none, {', '.join(METHODS)}"
            raise InputError(f"{source}: quantization_config.quant_method: expected {expected}, found {name!r:.200}")
        if name == "compressed-tensors":
            return cls(name)
        if name == "fp8":
            block = said.get("weight_block_size")
            if block is not None and not (isinstance(block, list) and len(block) == 2 and all(map(_is_size, block))):
                key = "quantization_config.weight_block_size"
                raise InputError(f"{source}: {key}: expected two sizes, found {block!r:.200}")
            return cls(name, block=None if block is None else (block[0], block[1]))
        widths = (4,) if name == "awq" else (4, 8)
        if said.get("bits") not in widths:
            expected = " or ".join(map(str, widths))
            raise InputError(
                f"{source}: quantization_config.bits: expected {expected}, found {said.get('bits')!r:.200}"
            )
        if name == "awq":
            version = said.get("version", said.get("format", "gemm"))
            if version != "gemm":
                key = "quantization_config.version"
                raise InputError(f"{source}: {key}: expected 'gemm', found {version!r:.200}")
            return cls(name, bits=4)
        return cls(name, bits=said["bits"], offset=int(said.get("checkpoint_format") != "gptq_v2"))


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def written_out(method: Method, tensors: Sequence[SourceTensor]) -> list[SourceTensor]:
    """The tensors with one float32 matrix in the place of each quantised module's parts: weight [O, I], or of `TURNED`
    qweight [I, O].

    Raises:
        InputError: parts that are missing, or of another shape or type; all of them.
    """
    by_key = {t.key: t for t in tensors}
    problems: list[str] = []
    found: list[SourceTensor] = []
    used: set[str] = set()
    for tensor in tensors:
        module, _, part = tensor.key.rpartition(".")
        name = method.name if part != "weight_packed" else "packed"
        # norms, embeddings and modules left in floating point have a weight alone
        if part != PARTS[name][0] or (part == "weight" and f"{module}.{PARTS[name][1]}" not in by_key):
            continue
        keys = [f"{module}.{p}" for p in PARTS[name]]
        used.update(keys)
        try:
            parts = [_part(by_key, key, tensor) for key in keys]
            key = tensor.key if method.name in TURNED else f"{module}.weight"
            found.append(_module(method, name, key, parts))
        except InputError as e:
            problems += e.problems
    if problems:
        raise InputError(problems)
    return found + [t for t in tensors if t.key not in used and not t.key.endswith(DROPPED)]


def _part(by_key: Mapping[str, SourceTensor], key: str, matrix: SourceTensor) -> SourceTensor:
    if key not in by_key:
        raise InputError(f"{matrix.where}: expected {key} beside it, found none")
    return by_key[key]


def _module(method: Method, name: str, key: str, parts: Sequence[SourceTensor]) -> SourceTensor:
    matrix = parts[0]
    kinds = {"fp8": ("F8_E4M3",), "compressed-tensors": ("F8_E4M3", "I8")}.get(name, ("I32",))
    if (kind := dtype_name(matrix.dtype)) not in kinds or len(matrix.shape) != 2:
        expected = f"a matrix of {' or '.join(kinds)}"
        raise InputError(f"{matrix.where}: expected {expected}, found {kind} {matrix.shape}")
    for part in parts[1:]:
        _check_part(name, part)
    if name == "gptq":
        shape, rows, packed = _gptq(method, parts)
        stored = f"INT{method.bits}"
    elif name == "awq":
        shape, rows, packed = _awq(*parts)
        stored = "INT4"
    elif name == "packed":
        shape, rows, packed = _packed(*parts)
        stored = "INT4"
    else:
        shape, rows, packed = matrix.shape, _scaled(method, *parts), _eight_bit(method, *parts)
        stored = "INT8" if kind == "I8" else "FP8"
    return SourceTensor(matrix.file, key, np.dtype(np.float32), shape, rows, stored=stored, packed=packed)


def _check_part(name: str, part: SourceTensor) -> None:
    which = part.key.rpartition(".")[2]
    types = {"qzeros": ("I32",), "g_idx": ("I32", "I64")}.get(which, FLOATS)
    axes = 1 if which == "g_idx" else 2
    kind = dtype_name(part.dtype)
    if kind not in types or (name in TURNED and len(part.shape) != axes):
        expected = f"{' or '.join(types)}{f' of {axes} axes' if name in TURNED else ''}"
        raise InputError(f"{part.where}: expected {expected}, found {kind} {part.shape}")


def _eight_bit(method: Method, matrix: SourceTensor, scale: SourceTensor) -> PackedMatrix | None:
    """None where a scale is not a whole row's."""
    outputs = matrix.shape[0]
    if method.block is not None or scale.shape not in ((), (1,), (1, 1), (outputs,), (outputs, 1)):
        return None
    integers = dtype_name(matrix.dtype) == "I8"

    def read() -> tuple[np.ndarray, np.ndarray, None]:
        values = np.ascontiguousarray(matrix.read().T)
        scales = np.broadcast_to(scale.read().astype(np.float32).reshape(-1), (outputs,))
        return values if integers else values.view(np.uint8), scales, None

    return PackedMatrix("int8" if integers else "fp8", 0, read)


def _scales(scale: SourceTensor, shape: tuple[int, ...], block: tuple[int, int] | None) -> Rows:
    """float32 [rows, I], or what broadcasts to it: the scales of some rows of a matrix of that shape."""
    outputs, inputs = shape
    if math.prod(scale.shape) == 1:
        return lambda start, stop: scale.read().astype(np.float32).reshape(1, 1)
    if block is not None:
        high, wide = block
        expected = (-(-outputs // high), -(-inputs // wide))
        if scale.shape != expected:
            raise InputError(f"{scale.where}: expected shape {expected}, found {scale.shape}")

        def of_blocks(start: int, stop: int) -> np.ndarray:
            first = start // high
            values = scale.rows(first, -(-stop // high)).astype(np.float32)
            return np.repeat(values, wide, 1)[np.arange(start, stop) // high - first, :inputs]

        return of_blocks
    groups = scale.shape[1] if len(scale.shape) == 2 else 1
    if len(scale.shape) not in (1, 2) or scale.shape[0] != outputs or not groups or inputs % groups:
        expected = f"({outputs}, a divisor of {inputs})"
        raise InputError(f"{scale.where}: expected shape {expected}, found {scale.shape}")

    def of_groups(start: int, stop: int) -> np.ndarray:
        values = scale.rows(start, stop).astype(np.float32).reshape(stop - start, groups)
        return np.repeat(values, inputs // groups, 1)

    return of_groups


def _scaled(method: Method, matrix: SourceTensor, scale: SourceTensor) -> Rows:
    scales = _scales(scale, matrix.shape, method.block)
    return lambda start, stop: matrix.rows(start, stop).astype(np.float32) * scales(start, stop)


def _packed(matrix: SourceTensor, scale: SourceTensor) -> tuple[tuple[int, int], Rows, PackedMatrix]:
    """Of compressed-tensors in 4 bits; in others the shape is not the one that config.json has."""
    outputs, words = matrix.shape
    shape = outputs, 8 * words
    scales, groups = _scales(scale, shape, None), max(1, math.prod(scale.shape) // outputs)

    def rows(start: int, stop: int) -> np.ndarray:
        q = unpacked(matrix.rows(start, stop), 4, axis=1).astype(np.float32) - 8
        return q * scales(start, stop)

    def read() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        own = scale.read().astype(np.float32)
        own = np.broadcast_to(own.reshape(1 if own.size == 1 else outputs, -1), (outputs, groups)).T
        return np.ascontiguousarray(unpacked(matrix.read(), 4, axis=1).T), own, np.full(own.shape, 8, np.uint8)

    return shape, rows, PackedMatrix("int4", shape[1] // groups, read)


def _gptq(method: Method, parts: Sequence[SourceTensor]) -> tuple[tuple[int, int], Rows, PackedMatrix | None]:
    matrix, zeros, scales, index = parts
    per = 32 // method.bits
    shape = inputs, outputs = matrix.shape[0] * per, matrix.shape[1]
    groups = scales.shape[0]
    for tensor, expected in ((zeros, (groups, outputs // per)), (scales, (groups, outputs)), (index, (inputs,))):
        if tensor.shape != expected:
            raise InputError(f"{tensor.where}: expected shape {expected}, found {tensor.shape}")
    group = index.read().astype(np.int64)
    if group.min() < 0 or group.max() >= groups:
        raise InputError(f"{index.where}: expected groups 0 to {groups - 1}, found {group.min()} to {group.max()}")
    in_order = inputs % groups == 0 and np.array_equal(group, np.arange(inputs) // (inputs // groups))

    def zeros_of(first: int, last: int) -> np.ndarray:
        """uint8 of some groups; what is stored lacks the offset in so many bits."""
        stored = unpacked(zeros.rows(first, last), method.bits, axis=1).astype(np.int32)
        return ((stored + method.offset) & (2**method.bits - 1)).astype(np.uint8)

    def rows(start: int, stop: int) -> np.ndarray:
        first, last = start // per, -(-stop // per)
        q = unpacked(matrix.rows(first, last), method.bits, axis=0)[start - first * per : stop - first * per]
        own = index.rows(start, stop).astype(np.int64)
        low, high = int(own.min()), int(own.max()) + 1
        zero, scale = (z.astype(np.float32)[own - low] for z in (zeros_of(low, high), scales.rows(low, high)))
        return (q.astype(np.float32) - zero) * scale

    def read() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        q = unpacked(matrix.read(), method.bits, axis=0)
        return q, scales.read().astype(np.float32), zeros_of(0, groups)

    return shape, rows, PackedMatrix("int4", inputs // groups, read) if method.bits == 4 and in_order else None


def _awq(matrix: SourceTensor, zeros: SourceTensor, scales: SourceTensor) -> tuple[tuple[int, int], Rows, PackedMatrix]:
    inputs, words = matrix.shape
    groups, outputs = scales.shape[0], 8 * words
    for tensor, expected in ((zeros, (groups, words)), (scales, (groups, outputs))):
        if tensor.shape != expected:
            raise InputError(f"{tensor.where}: expected shape {expected}, found {tensor.shape}")
    if not groups or inputs % groups:
        raise InputError(f"{scales.where}: expected a number of groups that divides {inputs} inputs, found {groups}")
    size = inputs // groups

    def rows(start: int, stop: int) -> np.ndarray:
        first, last = start // size, -(-stop // size)
        own = np.arange(start, stop) // size - first
        zero = _awq_columns(zeros.rows(first, last)).astype(np.float32)
        scale = scales.rows(first, last).astype(np.float32)
        return (_awq_columns(matrix.rows(start, stop)).astype(np.float32) - zero[own]) * scale[own]

    def read() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return _awq_columns(matrix.read()), scales.read().astype(np.float32), _awq_columns(zeros.read())

    return (inputs, outputs), rows, PackedMatrix("int4", size, read)


def _awq_columns(words: np.ndarray) -> np.ndarray:
    """int32 [n, O / 8] -> uint8 [n, O], columns in their order."""
    return unpacked(words, 4, axis=1).reshape(len(words), -1, 8)[..., _AWQ_PLACES].reshape(len(words), -1)


def unpacked(words: np.ndarray, bits: int, axis: int) -> np.ndarray:
    """int32 words along an axis of a matrix -> their parts of so many bits, lowest first, uint8."""
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    words = np.expand_dims(np.ascontiguousarray(words).view(np.uint32), axis + 1)
    parts = words >> (shifts[:, None] if axis == 0 else shifts) & np.uint32(2**bits - 1)
    shape = list(parts.shape)
    shape[axis : axis + 2] = [shape[axis] * shape[axis + 1]]
    return parts.astype(np.uint8).reshape(shape)


def rules_of(method: Method, rules: Sequence[Rule]) -> list[Rule]:
    """The table for tensors that `written_out` gave: each may be quantised or left in floating point."""
    if method.name not in TURNED:
        return list(rules)
    turned = [
        dataclasses.replace(rule, pattern=f"{rule.pattern.removesuffix('.weight')}.qweight", transform=AS_IS)
        for rule in rules
        if rule.transform.transpose
    ]
    return [*turned, *rules]


def without_zero_biases(rules: Sequence[Rule], tensors: Sequence[SourceTensor]) -> list[SourceTensor]:
    """The tensors but for biases of quantised modules that the model does not have and that are zero, as AutoGPTQ
    writes them."""
    quantized = {t.key.rpartition(".")[0] for t in tensors if t.stored is not None}

    def is_none(tensor: SourceTensor) -> bool:
        module, _, part = tensor.key.rpartition(".")
        there = part == "bias" and module in quantized and find_rule(rules, tensor.key)[0] is None
        return there and dtype_name(tensor.dtype) in FLOATS and not tensor.read().any()

    return [tensor for tensor in tensors if not is_none(tensor)]


def folded(method: Method, src: Path, tensors: Sequence[SourceTensor]) -> tuple[str | None, list[str]]:
    """(AWQ or SmoothQuant where the norms hold scales, remarks): adapters of the unquantised model do not fit then."""
    if method.name == "awq":
        return "AWQ", [f"{src}: AWQ's norms hold scales: adapters of the unquantised model do not fit this base"]
    integers = any(t.stored in ("INT8", "INT4") for t in tensors)
    if method.name != "compressed-tensors" or not integers:
        return None, []
    recipe = src / "recipe.yaml"
    if not recipe.exists():
        said = "no recipe.yaml says how it was quantised: by AWQ or SmoothQuant its norms would hold scales"
        return None, [f"{src}: {said}, and adapters of the unquantised model would not fit"]
    text = recipe.read_text(encoding="utf-8", errors="replace")
    names = [name for modifier, name in _FOLDING.items() if re.search(rf"\b{modifier}\b", text)]
    if not names:
        return None, []
    said = f"{names[0]}'s norms hold scales: adapters of the unquantised model do not fit this base"
    return names[0], [f"{recipe}: {said}"]
