"""The assembly by which quantised values become bfloat16, interpreted here: every byte, every half with every zero."""

from __future__ import annotations

import importlib.util
import re

import ml_dtypes
import numpy as np
import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
HALVES = np.arange(16)


def pair(first: float, second: float) -> int:
    """Two bfloat16 as a word, the first in its lower half."""
    low, high = (int(np.asarray(v, ml_dtypes.bfloat16).view(np.uint16)) for v in (first, second))
    return low | high << 16


def numbers(word: int) -> tuple[float, float]:
    """What `pair` made the word of."""
    low, high = (np.asarray(v, np.uint16).view(ml_dtypes.bfloat16) for v in (word & 0xFFFF, word >> 16))
    return float(low), float(high)


def run(text: str, *given: int) -> tuple[float, float]:
    """The words $1, $2 and so on through a program of the instructions that PTX's manual describes so."""
    held = {f"${i}": value for i, value in enumerate(given, 1)}

    def read(name: str) -> int:
        return held[name] if name in held else int(name, 0)

    for line in re.findall(r"[^;{}]+", text):
        operation, *rest = line.replace(",", " ").split() or [".reg"]
        if operation == ".reg":
            continue
        into, values = rest[0], [read(name) for name in rest[1:]]
        if operation == "mov.b32":
            (found,) = values
        elif operation == "and.b32":
            found = values[0] & values[1]
        elif operation == "shr.u32":
            found = values[0] >> values[1]
        elif operation == "lop3.b32":
            assert values[3] == 0xEA
            found = values[0] & values[1] | values[2]
        elif operation == "prmt.b32":
            source = (values[0] | values[1] << 32).to_bytes(8, "little")
            found = int.from_bytes(bytes(source[values[2] >> 4 * i & 7] for i in range(4)), "little")
        else:
            assert operation == "fma.rn.bf16x2", operation
            found = pair(*(a * b + c for a, b, c in zip(*map(numbers, values), strict=True)))
        held[into] = found
    return numbers(held["$0"])


@pytest.mark.parametrize("kind", ["int8", "float8_e4m3fn"])
@pytest.mark.parametrize("place", range(4))
def test_bytes(kind: str, place: int):
    from pallas_kernels.quantized_matmul import triton_kernels as kernels

    text = (kernels.FROM_INT8 if kind == "int8" else kernels.FROM_E4M3).value[place]
    values = np.arange(256, dtype=np.uint8).view(kind).astype(np.float64)
    for byte in np.flatnonzero(np.isfinite(values)).tolist():
        other = (255 - byte) if np.isfinite(values[255 - byte]) else 1
        words = (int.from_bytes(bytes(v if i == place else 0x5A for i in range(4)), "little") for v in (byte, other))
        assert run(text, *words) == (values[byte], values[other]), byte


@pytest.mark.parametrize("place", range(8))
def test_halves(place: int):
    from pallas_kernels.quantized_matmul import triton_kernels as kernels

    for q in HALVES.tolist():
        for zero in HALVES.tolist():
            noise = 0xA5C3965A & ~(15 << 4 * place)
            words = noise | q << 4 * place, noise | (15 - q) << 4 * place
            less = pair(128 + zero, 128 + zero)
            assert less == (0x4300 | zero) * 0x10001  # as `half` writes it
            assert run(kernels.FROM_HALVES.value[place], *words, less) == (q - zero, 15 - q - zero)
