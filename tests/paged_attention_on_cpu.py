"""Run as a program with TRITON_INTERPRET=1: attention over blocks by Triton on CPU tensors against float64 NumPy.

tests/test_paged_attention.py starts it.
"""

from __future__ import annotations

import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from decode_step_on_cpu import EPS, exact
from test_paged_attention import Case
from triton_interpreter import LAUNCHES, interpret

from pallas_kernels.paged_attention import paged_attention
from pallas_kernels.paged_attention import triton_gpu as paged_gpu

# heads, key heads, width, tokens in the cache of each sequence, and how many of them are read now
PAGED: list[tuple[int, int, int, tuple[int, ...], tuple[int, ...]]] = [
    (6, 2, 16, (13, 1, 37, 22), (0, 0, 21, 16)),
    (4, 4, 32, (150, 90, 100, 70), (0, 0, 48, 20)),
    (1, 1, 256, (40, 70), (0, 40)),
    (3, 1, 16, (200, 5), (0, 0)),
    (2, 1, 16, (80,), (80,)),
]


def one_paged(seed: int, launches: list[str]) -> None:
    """Decoded tokens and runs over blocks; few and many runs a program, parts of all rows and of long ones alone."""
    heads, kv, width, lengths, chunks = PAGED[seed % len(PAGED)]
    kind, programs = ("float32", "bfloat16")[seed % 2], (128, 1)[seed // len(PAGED) % 2]
    case = Case(seed, heads, kv, width, lengths, chunks)
    launches.clear()
    given = jnp.asarray(case.q, kind), jnp.asarray(case.pages, kind), case.tokens, case.layer * case.blocks
    paged_gpu.PROGRAMS, paged_gpu.LONG_PART = programs, 64
    y = paged_attention(*given, implementation="triton")
    kernels = [*["runs_kernel"] * any(chunks), "decode_kernel"]
    assert launches in (kernels, [*kernels, "combine_kernel"]), launches
    error = np.abs(exact(y) - case.expected(None)).max()
    assert error <= 8 * EPS[kind], f"seed {seed}: {kind}: {error}"


def main() -> None:
    interpret()
    ends = set()
    for seed in range(2 * len(PAGED)):
        one_paged(seed, LAUNCHES)
        ends.add(LAUNCHES[-1])
    assert ends == {"decode_kernel", "combine_kernel"}, "one of the two forms did not run"
    print(f"{2 * len(PAGED)} cases")


if __name__ == "__main__":
    main()
