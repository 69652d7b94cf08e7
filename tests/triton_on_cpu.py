"""Run as a program with TRITON_INTERPRET=1: the Triton kernels of a routed product on CPU tensors.

The cases of routed_cases.py that each serves: behind a packed product of few tokens, and of many. Prints a line a
shape, exits 1 on the first wrong one. tests/test_kernels_triton.py starts it.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from routed_cases import GATED, QUICK, SHAPES, Case, assert_close, cases_of, check_gated
from triton_interpreter import LAUNCHES, interpret

from pallas_kernels.routed_lora import LoraBank
from pallas_kernels.routed_lora.triton_gpu import add_lora, many_refusal


@functools.partial(jax.jit, static_argnames="splits", compiler_options=QUICK)
def many(x, a, b, indices, weights, scale, base, splits):
    """`add_lora` of a case whose tokens each have a routing."""
    shrink = jnp.einsum("mi,pari->mpar", x, a, preferred_element_type=jnp.float32)
    return add_lora(LoraBank(a, b, scale, splits), indices, weights, shrink, base)


def each_token(case: Case) -> tuple[np.ndarray, ...]:
    """A case's arrays with the routing of a request repeated for its tokens."""
    x, a, b, indices, weights, scale, base = case.arguments
    count = x.size // x.shape[-1]
    indices, weights = (np.repeat(z.reshape(-1, *z.shape[-2:]), count // len(z), 0) for z in (indices, weights))
    return x.reshape(count, -1), a, b, indices, weights, scale, base.reshape(count, -1)


def main() -> None:
    interpret()
    for shape in GATED:
        check_gated(shape, "triton")
        print(f"gated: {shape}")
    assert set(LAUNCHES) == {"gated_expand_kernel"}, LAUNCHES
    for shape in SHAPES:
        for case in cases_of(shape):
            if many_refusal(LoraBank(case.a, case.b, case.scale, case.splits), case.indices.shape[-1]) is not None:
                break
            y = many(*each_token(case), splits=case.splits)
            assert_close({"y": y.reshape(case.base.shape)}, case)
        else:
            print(f"many: {shape}")


if __name__ == "__main__":
    main()
