"""A device's share of the layers: kernels on a tensor axis, which meshes have shares, and what is packed there."""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from extent import ALL
from jax.sharding import PartitionSpec
from meshes import environment
from test_gated_model import small

from meteora_jax.execution import ExecutionConfig
from meteora_jax.io import model_state
from meteora_jax.model.shares import refusal
from meteora_jax.quantization import Quantization
from meteora_jax.sharding import make_mesh, on_each, use_mesh
from pallas_kernels.decode_step.triton_gpu import StepLimits


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_steps_by_the_kernels_on_a_tensor_axis_say_what_one_device_says():
    """By Triton's interpreter on two CPU devices: mixed batches of MeteoRA gates, named adapters, none, and a token
    router's; with --all a wide bank, fusion and routers that XLA asks, too."""
    result = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "kernels_on_mesh.py"), *["all"] * ALL],
        env=os.environ | environment(2) | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=1200,
    )  # fmt: skip
    assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]
    assert result.stdout == "the same\n"


def test_an_array_without_elements_is_no_input_of_the_devices():
    """Shardy of jaxlib 0.11.2 ends the process where one is (tests/gpu_compile.py compiles such a step)."""

    def double(x: jax.Array, given: tuple[jax.Array, jax.Array]) -> jax.Array:
        empty, y = given
        assert (empty.shape, empty.dtype) == ((0, 3), jnp.int32)
        return 2 * x + y

    given = jnp.ones(4), (jnp.zeros((0, 3), jnp.int32), jnp.full(4, 3.0))
    with use_mesh(make_mesh(1, 1, 1)):
        call = jax.jit(lambda *given: on_each(double, PartitionSpec("tensor"), PartitionSpec("tensor"), *given))
        (equation,) = [e for e in jax.make_jaxpr(call)(*given).eqns[0].params["jaxpr"].eqns if "in_specs" in e.params]
        assert [v.aval.shape for v in equation.invars] == [(4,), (4,)]
        assert call(*given).tolist() == [5.0] * 4


def test_who_has_a_share():
    config = small("float32").config  # 4 heads, 2 of keys and values
    assert refusal(config, 1) is None
    assert refusal(config, 2) is None
    assert refusal(config, 4) == "tensor: expected a divisor of 4 heads, 2 kv heads, 192 units, found 4"
    quantised = dataclasses.replace(config, quantization=Quantization.of("int8"))
    assert "quantised" in str(refusal(quantised, 2))
    assert refusal(quantised, 1) is None


@pytest.mark.parametrize("sizes", [(1, 1, 2), (2, 1, 1), (2, 2, 1)])
def test_kernels_serve_meshes_that_split_no_layer_s_weights_but_by_heads(sizes):
    mesh = jax.sharding.AbstractMesh(sizes, ("data", "fsdp", "tensor"))
    found = ExecutionConfig.of("gpu", "bfloat16", mesh)
    served = sizes[1] == 1
    assert (found.shares, found.step) == (served, StepLimits() if served else None)
    assert found.packs("bfloat16", mesh) == served
    assert not found.packs("float32", mesh)
    assert not ExecutionConfig.of("cpu", "float32", mesh).shares


def test_an_axis_that_cuts_a_head_is_left_to_xla_and_said(monkeypatch, caplog):
    gpu = ExecutionConfig("gpu", StepLimits(), triton=True, shares=True)
    monkeypatch.setattr(model_state.ExecutionConfig, "here", lambda *_: gpu)
    config, kind = small("float32").config, jnp.bfloat16
    monkeypatch.setattr(model_state, "tensor_shards", lambda mesh: 2)
    assert model_state.execution_on(config, kind, None) == gpu
    assert caplog.messages == []
    monkeypatch.setattr(model_state, "tensor_shards", lambda mesh: 4)
    with caplog.at_level(logging.WARNING):
        found = model_state.execution_on(config, kind, None)
    assert (found.shares, found.step) == (False, None)
    (line,) = caplog.messages
    assert line.startswith("tensor: expected a divisor of 4 heads, 2 kv heads, 192 units, found 4: XLA runs the steps")
