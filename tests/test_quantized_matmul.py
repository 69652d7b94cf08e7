"""Products with weights in 8 and 4 bits against NumPy in float64, and how far the quantisers are off at most."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from converters import quantize
from pallas_kernels.quantized_matmul import QuantizedWeight, quantized_matmul

FP8 = ml_dtypes.float8_e4m3fn


def made(kind: str, width: int = 96, total: int = 40, groups: int = 3) -> tuple[QuantizedWeight, np.ndarray]:
    """A quantised matrix drawn in its own numbers, and the matrix in float64."""
    rng = np.random.default_rng(0)
    if kind == "int4":
        q, zero = rng.integers(0, 16, (width, total)), rng.integers(0, 16, (groups, total))
        scale = rng.uniform(0.01, 0.1, (groups, total)).astype(np.float32)
        packed = (q[::2] + 16 * q[1::2]).astype(np.uint8)
        size = width // groups
        matrix = np.repeat(scale.astype(np.float64), size, 0) * (q - np.repeat(zero, size, 0))
        return QuantizedWeight(*map(jnp.asarray, (packed, scale, zero.astype(np.uint8)))), matrix
    values = rng.integers(-127, 128, (width, total)).astype(np.int8)
    values = values.astype(np.float32).astype(FP8) if kind == "fp8" else values
    scale = rng.uniform(0.001, 0.01, total).astype(np.float32)
    matrix = values.astype(np.float64) * scale.astype(np.float64)
    if kind == "turned":
        return QuantizedWeight(jnp.asarray(values.T), jnp.asarray(scale), turned=True), matrix
    return QuantizedWeight(jnp.asarray(values), jnp.asarray(scale)), matrix


@pytest.mark.parametrize("kind", ["int8", "fp8", "int4", "turned"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_product_and_its_gradient(kind: str, dtype: str):
    weight, matrix = made(kind)
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.standard_normal((2, 5, 96)), dtype)
    dy = rng.standard_normal((2, 5, 40))
    exact = np.asarray(x, np.float64)
    # of bfloat16 the matrix in 4 bit and the gradient are rounded, values in 8 bit are not
    near = dict(float32=1e-5, bfloat16=2e-2 if kind == "int4" else 1e-5)[dtype]
    for how, block in (("reference", None), ("xla", None), ("xla", 40)):
        y, pull = jax.vjp(lambda x: quantized_matmul(x, weight, implementation=how, block=block), x)  # noqa: B023
        assert y.dtype == jnp.float32
        assert np.allclose(y, exact @ matrix, atol=near * np.abs(exact @ matrix).max())
        (dx,) = pull(jnp.asarray(dy, jnp.float32))
        wanted = dy @ matrix.T
        assert np.allclose(np.asarray(dx, np.float64), wanted, atol=dict(float32=1e-5, bfloat16=2e-2)[dtype] * 10)
        assert dx.dtype == x.dtype


def test_what_does_not_fit_together_is_refused():
    weight, _ = made("int4")
    x = jnp.zeros((2, 96))
    with pytest.raises(ValueError, match="x's last axis: expected 96, found 40"):
        quantized_matmul(x[:, :40], weight)
    with pytest.raises(ValueError, match="scale's shape"):
        quantized_matmul(x, QuantizedWeight(weight.values, weight.scale[:, :5], weight.zero[:, :5]))
    with pytest.raises(ValueError, match="values' dtype: expected int8 or float8_e4m3fn, found uint8"):
        quantized_matmul(x[:, :48], QuantizedWeight(weight.values, weight.scale[0]))


def drawn() -> np.ndarray:
    """Columns of all sorts: normal, with an outlier, tiny, of one sign, zero."""
    matrix = np.random.default_rng(2).standard_normal((256, 12)).astype(np.float32)
    matrix[7, 1] = 90
    matrix[:, 2] *= 1e-6
    matrix[:, 3] = np.abs(matrix[:, 3]) + 1
    matrix[:, 4] = -1 - np.abs(matrix[:, 4])
    matrix[:, 5] = 0
    return matrix


def test_int8_is_at_most_half_a_step_off():
    matrix = drawn()
    values, scale = quantize.eight_bit(matrix, "int8")
    assert np.array_equal(np.abs(values.astype(int)).max(axis=0), np.where(np.arange(12) == 5, 0, 127))
    assert np.all(np.abs(values * scale.astype(np.float64) - matrix) <= scale * (0.5 + 1e-4))


def test_fp8_is_at_most_half_of_its_last_bit_off():
    matrix = drawn()
    values, scale = quantize.eight_bit(matrix, "float8_e4m3fn")
    back = values.astype(np.float64) * scale
    # three bits behind the point: 1/16 of the value; below the least normal value, 2^-6, half of 2^-9
    assert np.all(np.abs(back - matrix) <= np.maximum(np.abs(matrix) / 16, scale * 2.0**-10) * (1 + 1e-4))
    assert np.isfinite(back).all()


def test_int4_is_at_most_a_step_off_and_mostly_half():
    matrix = drawn()
    packed, scale, zero = quantize.int4(matrix, 2)
    q = np.empty((256, 12))
    q[::2], q[1::2] = packed % 16, packed // 16
    step = np.repeat(scale.astype(np.float64), 128, 0)
    error = np.abs(step * (q - np.repeat(zero.astype(int), 128, 0)) - matrix)
    assert np.all(error <= step * (1 + 1e-4))  # the zero is rounded, too: an end may lie half a step further out
    assert np.mean(error <= step * (0.5 + 1e-4)) > 0.98
    assert not error[:, 5].any()
