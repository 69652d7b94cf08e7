"""Few rows through quantised matrices by Triton: interpreted against NumPy, decoding steps against XLA's; on a GPU,
compiled, against XLA."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from batches import answer
from flax import nnx
from quantized_steps_on_cpu import quantized_model, stepping
from test_gated_model import ROWS, small
from test_quantized_matmul import made

import meteora_jax as mj
from meteora_jax.execution import ExecutionConfig
from meteora_jax.model import decoding, llama
from meteora_jax.model.layout import base_arrays, pack, with_execution
from meteora_jax.quantization import Quantization
from pallas_kernels.decode_step.triton_gpu import StepLimits
from pallas_kernels.quantized_matmul import QuantizedWeight, quantized_matmul, triton_gpu
from pallas_kernels.quantized_matmul.weight import turn, turn_back, turn_zero, word_block

HERE = Path(__file__).parent


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_numerics_by_triton_s_interpreter():
    result = subprocess.run(
        [sys.executable, str(HERE / "quantized_steps_on_cpu.py")],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]
    assert result.stdout.splitlines() == ["products: 15 cases", "summands: 6 cases", "model"]


def turned(kind: str, width: int, total: int, groups: int) -> tuple[QuantizedWeight, np.ndarray]:
    weight, matrix = made(kind, width, total, groups)
    values = turn(weight.values, weight.group)
    np.testing.assert_array_equal(np.asarray(turn_back(values, weight.group)), np.asarray(weight.values))
    zero = None if weight.zero is None else turn_zero(weight.zero, width)
    return QuantizedWeight(values, weight.scale, zero, turned=True, words=True), matrix


@pytest.mark.parametrize("kind", ["int8", "fp8", "int4"])
def test_a_turned_matrix_is_the_same_matrix(kind: str):
    weight, matrix = turned(kind, 384, 40, 3)
    x = jnp.asarray(np.random.default_rng(1).standard_normal((5, 384)), jnp.float32)
    y = quantized_matmul(x, weight)
    assert np.allclose(y, np.asarray(x, np.float64) @ matrix, atol=1e-5 * np.abs(y).max())


def test_activations_in_fp8_are_rounded_a_token():
    """Against the same rounding in NumPy, float64; a token of zeros stays one."""
    weight, matrix = turned("fp8", 384, 40, 3)
    x = np.random.default_rng(1).standard_normal((2, 3, 384)) * [[[1], [1e-3], [0]], [[1], [50], [1]]]
    x = x.astype(np.float32)
    scale = np.abs(x).max(-1, keepdims=True) / np.float32(448)
    scale[scale == 0] = 1
    kept = np.asarray((x / scale).astype(jnp.float8_e4m3fn), np.float64) * scale
    y = np.asarray(quantized_matmul(jnp.asarray(x), weight, implementation="xla_fp8"))
    wanted = kept @ matrix
    assert np.allclose(y, wanted, atol=1e-5 * np.abs(wanted).max(-1, keepdims=True))
    assert np.abs(kept - x).max() > 0


def test_fp8_activations_are_for_fp8_values():
    weight, _ = turned("int8", 384, 40, 3)
    with pytest.raises(NotImplementedError, match="expected float8_e4m3fn values, found int8"):
        quantized_matmul(jnp.zeros((2, 384)), weight, implementation="xla_fp8")


@pytest.mark.parametrize("rows", [1, 8, 16, 64, 512])
@pytest.mark.parametrize(
    ("width", "total", "group"),
    [(4096, 6144, 0), (4096, 28672, 128), (14336, 4096, 0), (14336, 4096, 128), (576, 960, 0), (1536, 576, 32)],
)
def test_tiles_cover_the_matrix(rows: int, width: int, total: int, group: int):
    size = triton_gpu.tiles(rows, width, total, group)
    assert total % size["BN"] == 0
    places, block = 8 if group else 4, word_block(width, group)
    assert block % (places * size["J"]) == 0
    assert width % (block * size["SPLITS"]) == 0
    assert size["BM"] >= min(rows, 64)


def test_a_matrix_that_no_tile_divides_is_refused():
    with pytest.raises(NotImplementedError, match="found 100 x 64"):
        triton_gpu.tiles(1, 100, 64, 0)


@pytest.mark.parametrize(("kind", "served"), [("fp8", True), ("int4", False)])
def test_who_is_served(kind: str, served: bool):
    """Decoding by Triton takes a quantised base once it lies in words, for which 192 inputs are no blocks in 4 bit; its
    arrays are those that were loaded."""
    model = quantized_model(kind, "bfloat16", head=True)
    packed = stepping(model)
    module = nnx.merge(packed.graph, packed.weights)
    layers, execution = module.layers, module.execution
    for router in (None, mj.Gates(2), mj.Fixed("cedar")):
        refusal = decoding.refusal(layers, packed.config, packed.bind(router, 2), 2, execution)
        assert refusal is None if served else "does not lie in words" in str(refusal)
    apart = nnx.merge(model.graph, model.weights).layers
    assert "not lie in words" in str(decoding.refusal(apart, model.config, None, 2, execution))
    before, after = (base_arrays(m.graph, m.weights) for m in (model, packed))
    assert before.keys() == after.keys()
    for path, value in before.items():
        np.testing.assert_array_equal(np.asarray(after[path]), np.asarray(value))


def test_an_embedding_that_is_the_head_lies_in_words():
    """Its rows are tokens' as before, its product the head's; what is saved of it is what was loaded."""
    config = dataclasses.replace(
        small("float32", layers=1).config, tie_word_embeddings=True,
        quantization=Quantization.of("int8", embedding=True),
    )  # fmt: skip
    made = llama.Llama(config, None, dtype=jnp.float32, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(5)
    made.embed[...] = jnp.asarray(rng.integers(-127, 128, (320, 128)), jnp.int8)
    assert made.embed_scale is not None
    made.embed_scale[...] = jnp.asarray(rng.uniform(0.5, 2, 320), jnp.float32)
    made.execution = ExecutionConfig(step=StepLimits())
    graph, weights = nnx.split(made)
    packed = nnx.merge(*pack(graph, weights))
    assert packed.head_words
    assert np.any(np.asarray(packed.embed[...]) != np.asarray(made.embed[...]))
    tokens, hidden = jnp.asarray([[3, 0, 319]]), jnp.asarray(rng.standard_normal((1, 2, 128)), jnp.float32)
    np.testing.assert_array_equal(packed.embedded(tokens), made.embedded(tokens))
    np.testing.assert_allclose(packed.logits(hidden, None), made.logits(hidden, None), rtol=1e-5, atol=1e-3)
    kept = base_arrays(*nnx.split(packed))
    np.testing.assert_array_equal(kept["embed",], made.embed[...])


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["int8", "fp8", "int4"])
@pytest.mark.parametrize("rows", [1, 16, 64, 100])
def test_products_on_a_gpu(kind: str, rows: int):
    """Compiled, of a Llama's width, against XLA; every bit pattern of fp8 that is a number is among the values."""
    weight, _ = turned(kind, 4096, 1024, 32)
    stack = jax.tree.map(lambda z: jnp.stack([z[::-1], z]), weight)
    rng = np.random.default_rng(2)
    x = jnp.asarray(rng.standard_normal((max(8, rows), 4096)), jnp.bfloat16)
    behind = jnp.asarray(rng.standard_normal((2, 512, 4096)), jnp.bfloat16)
    wanted = quantized_matmul(x[:rows].astype(jnp.float32), weight, implementation="reference")
    rest = jnp.einsum("mi,ni->mn", x[:rows], behind[1], preferred_element_type=jnp.float32)
    y = jnp.sum(triton_gpu.product(1, x, stack, behind, rows), axis=0)
    assert jnp.abs(y[:, :1024] - wanted).max() <= 2e-3 * jnp.abs(wanted).max()
    assert jnp.abs(y[:, 1024:] - rest).max() <= 2e-3 * jnp.abs(rest).max()
    small = least_values(kind)
    if small is not None:
        y = jnp.sum(triton_gpu.product(0, x, small, None, rows), axis=0)
        wanted = quantized_matmul(x[:rows].astype(jnp.float32), jax.tree.map(lambda z: z[0], small))
        assert jnp.abs(y - wanted).max() <= 2e-3 * jnp.abs(wanted).max()


def least_values(kind: str) -> QuantizedWeight | None:
    """Of fp8: the values below its least normal number alone, which bfloat16 has as such, too, by the assembly."""
    if kind != "fp8":
        return None
    bits = np.random.default_rng(3).integers(0, 8, (1, 1024, 4096)).astype(np.uint8)
    bits |= np.random.default_rng(4).choice(np.asarray([0, 128], np.uint8), bits.shape)
    values = jax.lax.bitcast_convert_type(jnp.asarray(bits), jnp.float8_e4m3fn)
    return QuantizedWeight(values, jnp.ones((1, 1024), jnp.float32), None, turned=True, words=True)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["int8", "fp8", "int4"])
@pytest.mark.parametrize("router", [None, mj.Gates(2), mj.Fixed("cedar")])
def test_decoding_on_a_gpu(kind, router):
    """The engine by Triton says what it says by XLA, float32; adapters say something else than the base."""
    model = loud(quantized_model(kind, "float32", head=True))
    plain = model_of(model, ExecutionConfig.of("gpu", "float32", triton=False))
    with jax.default_matmul_precision("highest"):
        wanted = answer(plain, ROWS, router, 8)[0]
        assert answer(stepping(model, ExecutionConfig.of("gpu", "float32").step), ROWS, router, 8)[0] == wanted
        assert router is None or answer(plain, ROWS, None, 8)[0] != wanted


def loud(model: mj.Meteora) -> mj.Meteora:
    """With adapters a hundred times as strong, so that they change tokens."""
    flat = nnx.to_flat_state(model.weights)
    leaves = [(path, leaf.replace(100 * leaf[...]) if path[-1] == "lora_scale" else leaf) for path, leaf in flat]
    return dataclasses.replace(model, weights=nnx.from_flat_state(leaves))


def model_of(model: mj.Meteora, execution: ExecutionConfig) -> mj.Meteora:
    return dataclasses.replace(model, graph=with_execution(model.graph, model.weights, execution))
