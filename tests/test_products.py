"""Sums and products in 16 bit, and updates that start from a packed weight's shrink, against float64 NumPy."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meteora_jax.routing import NO_ADAPTER, Routing
from pallas_kernels.routed_lora import LoraBank, packing, reference, routed_lora, xla
from pallas_kernels.topk_gating import TopK, topk_gating

HALF = (jnp.bfloat16, jnp.float16)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("rows", [1, xla.FEW_ROWS, xla.FEW_ROWS + 1])
@pytest.mark.parametrize("expand", ["reference", "masked"])
def test_a_16_bit_sum_equals_the_formula(dtype, rows, expand):
    rng = np.random.default_rng(rows)
    splits, adapters, rank = (24, 8, 8), 5, 3
    base, h, b = (rng.standard_normal(s) for s in ((rows, 40), (rows, 3, adapters, rank), (adapters, rank, 40)))
    half = [jnp.asarray(z, dtype) for z in (base, h, b)]
    base, h, b = (np.asarray(z, np.float64) for z in half)
    starts = np.cumsum((0, *splits))
    update = [np.einsum("mar,aro->mo", h[:, p], b[:, :, starts[p] : starts[p + 1]]) for p in range(3)]
    wanted = base + np.concatenate(update, 1)
    base, h, b = half
    if expand == "masked":
        found = xla.masked_expand(h, b, base, splits)
    else:
        found = reference.expand(h[None], b, base[None], splits)[0]
    assert found.dtype == dtype
    rounding = float(jnp.finfo(dtype).eps)
    assert np.abs(np.asarray(found, np.float64) - wanted).max() <= 2 * rounding * np.abs(wanted).max()


@pytest.mark.parametrize("requests", [1, 2, 4])  # times two choices, against four adapters
def test_requests_that_name_every_adapter_read_the_bank_once(requests):
    rng = np.random.default_rng(requests)

    def make(*s):
        return jnp.asarray(rng.standard_normal(s), jnp.bfloat16)

    x, a, b, y = make(requests, 3, 16), make(2, 4, 3, 16), make(4, 3, 24), make(requests, 3, 24)
    scale = jnp.asarray(rng.uniform(0.5, 2, (2, 4)), jnp.float32)
    indices = np.array([[rng.permutation(4)[:2]] for _ in range(requests)])[:, :, None].astype(np.int32)
    indices[-1, 0, 0, 1] = NO_ADAPTER
    weights = np.where(indices == NO_ADAPTER, 0, 0.7).astype(np.float32)
    routing = Routing(jnp.asarray(indices), jnp.asarray(weights))
    found = routed_lora(x, LoraBank(a, b, scale, (16, 8)), routing, y)

    def f64(z):
        return np.asarray(z, np.float64)

    wanted = f64(y)
    for i in range(requests):
        for index, weight in zip(indices[i, 0, 0], weights[i, 0, 0], strict=True):
            for p, cut in enumerate((slice(0, 16), slice(16, 24))):
                h = weight * float(scale[p, index]) * f64(x)[i] @ f64(a)[p, index].T
                wanted[i, :, cut] += h @ f64(b)[index][:, cut]
    assert np.abs(f64(found) - wanted).max() <= 0.02 * np.abs(wanted).max()


def test_gradients_of_bfloat16_products_are_products_of_bfloat16():
    rng = np.random.default_rng(0)
    x, a = (jnp.asarray(rng.standard_normal(s), jnp.bfloat16) for s in ((2, 5, 16), (3, 4, 2, 16)))

    def loss(x, a):
        return jnp.sum(jnp.sin(reference.einsum_float32(x.dtype, "bti,pari->btpar", x, a)))

    found = jax.grad(loss, (0, 1))(x, a)
    exact = jax.grad(loss, (0, 1))(x.astype(jnp.float32), a.astype(jnp.float32))
    for got, want in zip(found, exact, strict=True):
        assert got.dtype == jnp.bfloat16
        assert np.abs(np.asarray(got, np.float64) - np.asarray(want)).max() <= 0.02 * np.abs(np.asarray(want)).max()
    text = jax.jit(jax.grad(loss, (0, 1))).lower(x, a).as_text()
    products = [line for line in text.splitlines() if "dot_general" in line]
    assert len(products) == 3
    assert all(line.count("xbf16>") >= 2 for line in products)


@pytest.mark.parametrize("how", ["reference", "masked"])
def test_a_shrink_that_the_product_gave_equals_the_formula(how):
    """Two of five adapters a token for three projections, none for one token; float64 NumPy."""
    keys = jax.random.split(jax.random.key(0), 7)

    def draw(i, *shape):
        return jax.random.normal(keys[i], shape, jnp.float32)

    x, a, b, base = draw(0, 70, 48), draw(1, 3, 5, 4, 48), draw(2, 5, 4, 64), draw(3, 70, 64)
    scale, splits = jnp.abs(draw(4, 3, 5)), (32, 16, 16)
    counts = jnp.full((70,), 2, jnp.int32).at[3].set(0)
    routing = Routing(*topk_gating(draw(5, 70, 1, 5), TopK(counts, jnp.ones((70,)), 2)))
    rows = packing.pack_gates_and_a(draw(6, 48, 3, 5), a)
    shrink = jnp.einsum("mi,pni->mpn", x, rows)[..., 32 : 32 + 5 * 4].reshape(70, 3, 5, 4)
    y = routed_lora(x, LoraBank(a, b, scale, splits), routing, base, shrink=shrink, implementation=how)
    given = routing.indices[:, 0], routing.weights[:, 0]
    wanted = np.asarray(base, np.float64)
    parts = list(itertools.pairwise(np.cumsum([0, *splits])))
    a, b, x = (np.asarray(z, np.float64) for z in (a, b, x))
    for m, (index, weight) in enumerate(zip(*map(np.asarray, given), strict=True)):
        for adapter, w in zip(index, weight, strict=True):
            for p, (start, stop) in enumerate(parts if adapter >= 0 else []):
                wanted[m, start:stop] += (
                    w * float(scale[p, adapter]) * (a[p, adapter] @ x[m]) @ b[adapter, :, start:stop]
                )
    np.testing.assert_allclose(y, wanted, rtol=1e-5, atol=1e-4)
    assert np.array_equal(wanted[3], np.asarray(base, np.float64)[3])
