"""The routed LoRA product: XLA implementations against float64 NumPy, the table, and what the entry refuses."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from routed_cases import (
    GATED,
    PACKED,
    QUICK,
    SHAPES,
    Case,
    apply,
    assert_close,
    cases,
    cases_of,
    check,
    check_gated,
    make_case,
)

from pallas_kernels.routed_lora import api, reference
from pallas_kernels.routed_lora.api import Shape, choose, choose_for_wide_bank
from pallas_kernels.routed_lora.gradients import grouped_gradients
from pallas_kernels.routed_lora.xla import Buckets, block_rows

XLA = ("reference", "gathered", "grouped")


once = jax.jit(apply, static_argnames=("splits", "implementation"), compiler_options=QUICK)


@pytest.mark.parametrize("name", [*XLA, "masked"])
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_gradients(shape: str, name: str):
    for case in cases_of(shape):
        check(case, name)


@pytest.mark.exhaustive("a compile an example, of what SHAPES has")
@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(case=cases(), name=st.sampled_from(XLA))
def test_forward_and_gradients_of_random_shapes(case: Case, name: str):
    check(case, name)


@pytest.mark.parametrize("name", PACKED[:2])
@pytest.mark.parametrize("shape", GATED)
def test_what_follows_a_packed_product(shape: str, name: str):
    check_gated(shape, name)


@pytest.mark.parametrize("name", XLA)
def test_many_tokens(name: str):
    check(make_case(4, "float32", 4096, 1, 7, 3, 2, 9, (8,), "any"), name)


def test_sorted_gradients_are_deterministic_and_exact():
    case = make_case(5, "float32", 30, 1, 5, 4, 3, 16, (8, 24), "base_rows")
    indices, weights = jnp.asarray(case.indices), jnp.asarray(case.weights)
    own = jnp.arange(2)[None, :, None]
    scaled = jnp.where(indices < 0, 0, weights * case.scale[own, jnp.maximum(indices, 0)])
    arguments = (case.x[:, None], case.a, case.b, indices, scaled, case.dy[:, None])
    of = jax.jit(grouped_gradients, static_argnums=6, compiler_options=QUICK)
    first, again = (of(*map(jnp.asarray, arguments), case.splits) for _ in range(2))
    for one, other in zip(first, again, strict=True):
        np.testing.assert_array_equal(one, other)
    assert_close({"x": first[0][:, 0], "a": first[1], "b": first[2]}, case)


REST = pytest.mark.exhaustive("no axis, or two at once")


@pytest.mark.parametrize(
    "routed",
    [
        (2, 1, 2),
        (1, 3, 2),
        (2, 3, 1),
        *(pytest.param(shape, marks=REST) for shape in ((2, 3, 2), (1, 1, 2), (2, 1, 1))),
    ],
)
@pytest.mark.parametrize("name", XLA)
def test_a_routing_broadcasts_over_tokens_requests_and_projections(name: str, routed: tuple[int, ...]):
    case = make_case(6, "float32", 6, 1, 4, 2, 2, 8, (5, 6), "any")
    rng = np.random.default_rng(0)
    indices = rng.integers(-1, 4, (*routed, 2)).astype(np.int32)
    weights = rng.standard_normal((*routed, 2)).astype(np.float32)
    x, base = jnp.asarray(case.x.reshape(2, 3, 8)), jnp.asarray(case.base.reshape(2, 3, 11))
    rest = tuple(map(jnp.asarray, (case.a, case.b)))
    y = once(x, *rest, jnp.asarray(indices), jnp.asarray(weights), jnp.asarray(case.scale), base, (5, 6),
             implementation=name)  # fmt: skip
    full = (2, 3, 2, 2)
    wide = dict(indices=np.broadcast_to(indices, full).reshape(6, 2, 2))
    wide |= dict(weights=np.broadcast_to(weights, full).reshape(6, 2, 2))
    assert_close({"y": np.asarray(y).reshape(6, 11)}, dataclasses.replace(case, **wide))


@pytest.mark.parametrize("name", [*XLA, None])
def test_weights_may_differ_by_token_where_the_choice_does_not(name: str | None):
    """As aLoRA's do: an adapter of a request acts from one of its tokens on."""
    case = make_case(6, "float32", 6, 1, 9, 2, 2, 8, (5, 6), "any")
    rng = np.random.default_rng(0)
    indices = rng.integers(-1, 9, (2, 1, 1, 2)).astype(np.int32)
    weights = rng.standard_normal((2, 3, 1, 2)).astype(np.float32)
    x, base = jnp.asarray(case.x.reshape(2, 3, 8)), jnp.asarray(case.base.reshape(2, 3, 11))
    a, b, scale = map(jnp.asarray, (case.a, case.b, case.scale))
    y = once(x, a, b, jnp.asarray(indices), jnp.asarray(weights), scale, base, (5, 6), name)
    full = (2, 3, 2, 2)
    spread = {k: np.broadcast_to(v, full).reshape(6, 2, 2) for k, v in (("indices", indices), ("weights", weights))}
    assert_close({"y": np.asarray(y).reshape(6, 11)}, dataclasses.replace(case, **spread))


def test_the_reference_is_bit_for_bit_the_plain_formula():
    case = make_case(7, "float32", 6, 1, 4, 3, 2, 64, (32, 16), "base_rows")
    x, base = jnp.asarray(case.x.reshape(2, 3, 64)), jnp.asarray(case.base.reshape(2, 3, 48))
    indices, weights = (jnp.asarray(r.reshape(2, 3, 2, 2)) for r in (case.indices, case.weights))
    y = apply(x, jnp.asarray(case.a), jnp.asarray(case.b), indices, weights, jnp.asarray(case.scale), base, (32, 16))
    chosen = jax.nn.one_hot(indices, 4, dtype=jnp.float32)
    combine = jnp.sum(chosen * weights[..., None], axis=-2) * case.scale[None, None]
    h = reference.shrink(x, jnp.asarray(case.a)) * combine[..., None]
    wanted = reference.expand(h, jnp.asarray(case.b), base, case.splits)
    np.testing.assert_array_equal(y, wanted)


def test_an_adapter_that_nobody_chose_may_hold_anything_but_is_not_read():
    case = make_case(8, "float32", 4, 1, 3, 2, 2, 8, (8,), "any")
    indices = np.where(case.indices == 2, 1, case.indices)
    case = dataclasses.replace(case, indices=indices)
    a = case.a.copy()
    a[:, 2] = np.nan
    for name in ("gathered", "grouped"):
        arguments = map(jnp.asarray, (case.x, a, *case.arguments[2:]))
        y = once(*arguments, case.splits, implementation=name)
        assert_close({"y": y}, case)


@functools.partial(jax.jit, static_argnums=(1, 2), compiler_options=QUICK)
def sorted_rows(chosen: jax.Array, adapters: int, block: int) -> tuple[jax.Array, ...]:
    buckets = Buckets.sort(chosen, adapters, block)
    return buckets.source, buckets.filled, buckets.adapter, buckets.place


@pytest.mark.parametrize(("rows", "adapters"), [(1, 1), (7, 3), (100, 4), (64, 256), (5, 40)])
def test_buckets_hold_every_row_once_beside_its_own_adapter(rows: int, adapters: int):
    chosen = np.random.default_rng(rows).integers(-1, adapters, rows).astype(np.int32)
    for block in (8, block_rows(rows, adapters)):
        source, filled, adapter, place = jax.device_get(sorted_rows(chosen, adapters, block))
        assert sorted(source[filled]) == sorted(np.flatnonzero(chosen >= 0))
        np.testing.assert_array_equal(chosen[source[filled]], np.repeat(adapter, block).reshape(filled.shape)[filled])
        places = place[chosen >= 0]
        np.testing.assert_array_equal(source.reshape(-1)[places], np.flatnonzero(chosen >= 0))


def test_the_work_of_a_request_does_not_follow_the_pool():
    def cost(adapters: int) -> float:
        case = make_case(9, "float32", 2, 16, adapters, 4, 3, 64, (64,), "any")
        f = functools.partial(apply, splits=case.splits, implementation="gathered")
        return jax.jit(f).lower(*case.arguments).compile().cost_analysis()["flops"]

    assert cost(200) < 1.05 * cost(4)


@pytest.mark.parametrize(
    ("platform", "shape", "expected"),
    [
        ("cpu", Shape(1, 1, 28, 2, 1, False, False), "reference"),
        ("cpu", Shape(8, 512, 28, 3, 3, True, False), "gathered"),
        ("cpu", Shape(8, 512, 24, 3, 3, True, False), "reference"),
        ("cpu", Shape(8, 1, 28, 2, 3, False, True), "masked"),
        ("cpu", Shape(8, 1, 28, 2, 1, False, True), "reference"),
        ("cpu", Shape(65, 1, 28, 2, 3, False, True), "reference"),
        ("gpu", Shape(2048, 1, 28, 2, 3, False, True), "masked"),
        ("gpu", Shape(2048, 1, 28, 2, 3, False, False), "reference"),
        ("gpu", Shape(8, 512, 28, 3, 3, True, True), "gathered"),
        ("tpu", Shape(2048, 1, 28, 2, 3, False, True), "reference"),
    ],
)
def test_what_is_chosen_for_a_shape(platform: str, shape: Shape, expected: str):
    assert choose(platform, shape) == expected


def test_tokens_of_a_wide_bank_are_gathered_or_grouped():
    assert (choose_for_wide_bank(32), choose_for_wide_bank(33)) == ("gathered", "grouped")


def test_bad_input_is_refused_all_at_once():
    case = make_case(10, "float32", 4, 1, 3, 2, 2, 8, (8,), "any")
    x, a, b, indices, weights, scale, base = map(jnp.asarray, case.arguments)
    with pytest.raises(ValueError, match=r"base's shape: expected \(4, 9\), found \(4, 8\)") as raised:
        apply(x, a, b, indices, weights, scale, base, (9,))
    assert "b's shape" in str(raised.value)
    with pytest.raises(ValueError, match="indices' axis 0: expected 4 or 1, found 3"):
        apply(x, a, b, indices[:3], weights[:3], scale, base, (8,))
    with pytest.raises(ValueError, match="a's dtype: expected float32, found bfloat16"):
        apply(x, a.astype(jnp.bfloat16), b, indices, weights, scale, base, (8,))
    with pytest.raises(NotImplementedError, match="cuda"):
        api._forward(x[:, None], a, b, indices, weights, base[:, None], ((8,), "cuda"))
