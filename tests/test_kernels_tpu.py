"""TPU kernels: interpreted on the CPU against float64 NumPy, and compiled for real TPUs where libtpu is installed."""

from __future__ import annotations

import functools
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import routed_cases
from extent import examples, parameters
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from routed_cases import SHAPES, Case, cases, cases_of, check, make_case

from pallas_kernels.routed_lora import pallas_tpu

TPU = ("tpu_gathered", "tpu_dense")
FLOATS = ("float32", "bfloat16")
SERVED = [shape for shape, (dtype, *_) in SHAPES.items() if dtype != "float16"]


@pytest.fixture(autouse=True, scope="module")
def interpreted():
    """`api` finds the kernels as they are, but interpreted: there is no TPU here."""
    with pytest.MonkeyPatch.context() as patch:
        quick = {k: functools.partial(f, interpret=True) for k, f in pallas_tpu.IMPLEMENTATIONS.items()}
        patch.setattr(pallas_tpu, "IMPLEMENTATIONS", quick)
        yield


@pytest.mark.parametrize("name", TPU)
@pytest.mark.parametrize("shape", SERVED)
def test_forward_and_gradients(shape: str, name: str):
    for case in cases_of(shape):
        check(case, name)


@pytest.mark.exhaustive("a compile an example, of what SHAPES has")
@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(case=cases(big=False, dtypes=FLOATS), name=st.sampled_from(TPU))
def test_forward_and_gradients_of_random_shapes(case: Case, name: str):
    check(case, name)


@pytest.mark.parametrize("name", TPU)
@pytest.mark.parametrize(
    ("groups", "tokens", "width", "splits"),
    [
        (300, 1, 128, (256, 128)),  # two blocks of tokens, tiles that fit
        (2, 300, 1024, (128, 256)),  # requests of two blocks, two steps of I in the dense kernel
        (3, 1, 5120, (130,)),  # two steps of I in both, a width that nothing divides
        (3, 1, 700, (128,)),  # I padded
    ],
)
def test_several_blocks_of_everything(name: str, groups: int, tokens: int, width: int, splits: tuple[int, ...]):
    case = make_case(1, "bfloat16", groups, tokens, 5, 4, 2, width, splits, "base_rows")
    if name == "tpu_gathered" and groups > 100:
        pytest.skip("one token a step: slow to interpret")
    check(case, name)


def test_an_adapter_that_nobody_chose_is_not_fetched():
    case = make_case(2, "float32", 4, 1, 3, 2, 2, 8, (8,), "any")
    indices = np.where(case.indices == 2, 1, case.indices)
    a = case.a.copy()
    a[:, 2] = np.nan
    arguments = (case.x, a, case.b, indices, *case.arguments[4:])
    y = routed_cases.apply(*map(jnp.asarray, arguments), case.splits, implementation="tpu_gathered")
    assert np.all(np.isfinite(y))


def test_what_a_tpu_cannot_do_is_refused():
    half = make_case(3, "float16", 2, 1, 3, 2, 2, 8, (8,), "any")
    wide = make_case(3, "float32", 2, 1, 200, 8, 2, 8, (8,), "any")
    for case, name, reason in ((half, "tpu_gathered", "float16"), (wide, "tpu_dense", "A \\* R of at most 1024")):
        with pytest.raises(NotImplementedError, match=reason):
            routed_cases.apply(*map(jnp.asarray, case.arguments), case.splits, implementation=name)


@pytest.mark.parametrize(
    ("sizes", "largest", "expected"),
    [((4096, 1024, 1024), 1024, 1024), ((576, 192, 192), 512, 0), ((14336,), 512, 512), ((14336,), 4096, 3584)],
)
def test_tiles_divide_every_projection(sizes: tuple[int, ...], largest: int, expected: int):
    assert pallas_tpu.tile_of(sizes, largest) == expected


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu (the extra tpu) is not installed")
@pytest.mark.parametrize(
    "topology",
    parameters(["v5e:2x2", "v5p:2x2x1", "v6e:4x4"], ["v5e:2x2"], "one chip is much like another"),
)
def test_the_kernels_compile_for_real_tpus(topology: str):
    program = Path(__file__).with_name("tpu_compile.py")
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    command = [sys.executable, str(program), topology]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr[-3000:]
    assert result.stdout.count("beside the arguments") == examples(4, 7)
    assert "the engine: " in result.stdout.splitlines()[-1]
