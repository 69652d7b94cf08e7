"""Cases of the routed LoRA product for every implementation, and the product itself in float64 NumPy, token by token.

An implementation passes where `assert_close` holds of its output, and of its gradients where it has any, for
`cases_of` each of SHAPES that it serves; what follows a packed weight's product, for `gated_case` of each of GATED.
The shapes are fixed, so that a program is compiled once for all routings of one.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import ml_dtypes
import numpy as np
from hypothesis import strategies as st

from meteora_jax.routing import Routing
from pallas_kernels.routed_lora import LoraBank, packing, routed_lora
from pallas_kernels.routed_lora.reference import einsum_float32
from pallas_kernels.routed_lora.triton_gpu import topk_gated_lora
from pallas_kernels.topk_gating import TopK, topk_gating

DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
EPS = {"float32": 2.0**-23, "bfloat16": 2.0**-8, "float16": 2.0**-11}


@dataclasses.dataclass(frozen=True)
class Case:
    """Arrays as `routed_lora` takes them; x [M, I] if tokens == 1, else [G, S, I] with one routing a group."""

    dtype: str
    x: np.ndarray
    a: np.ndarray
    b: np.ndarray
    indices: np.ndarray
    weights: np.ndarray
    scale: np.ndarray
    base: np.ndarray
    splits: tuple[int, ...]
    dy: np.ndarray

    @property
    def arguments(self) -> tuple[Any, ...]:
        return self.x, self.a, self.b, self.indices, self.weights, self.scale, self.base


def make_case(
    seed: int,
    dtype: str,
    groups: int,
    tokens: int,
    adapters: int,
    rank: int,
    choices: int,
    width: int,
    splits: tuple[int, ...],
    routing: str,
) -> Case:
    """Ranks are mixed: each adapter's own is between 1 and `rank`, zeros follow."""
    rng = np.random.default_rng(seed)
    projections, kind = len(splits), DTYPES[dtype]
    lead = (groups,) if tokens == 1 else (groups, tokens)
    draw = lambda *shape: rng.standard_normal(shape).astype(kind)  # noqa: E731
    a, b = draw(projections, adapters, rank, width), draw(adapters, rank, sum(splits))
    for i in range(adapters):
        own = rng.integers(1, rank + 1)
        a[:, i, own:], b[i, own:] = 0, 0
    routed = (groups,) if tokens == 1 else (groups, 1)
    shape = (*routed, projections, choices)
    indices = {
        "any": lambda: rng.integers(-1, adapters, shape),  # the same adapter twice, too
        "one": lambda: np.full(shape, rng.integers(0, adapters)),  # all tokens on one adapter; nobody on the others
        "none": lambda: np.full(shape, -1),
        "base_rows": lambda: np.where(rng.random((*routed, 1, 1)) < 0.5, -1, rng.integers(0, adapters, shape)),
        "outside": lambda: rng.integers(-3, adapters + 3, shape),  # no adapter either
    }[routing]()
    weights = rng.standard_normal(shape).astype(np.float32)
    if rng.random() < 0.3:
        weights = np.full(shape, 1 / choices, np.float32)  # ties
    # as a caller's slice of something larger may come: not contiguous
    x = draw(*lead, 2 * width)[..., ::2]
    scale = rng.uniform(0.5, 2, (projections, adapters)).astype(np.float32)
    base, dy = draw(*lead, sum(splits)), draw(*lead, sum(splits))
    return Case(dtype, x, a, b, indices.astype(np.int32), weights, scale, base, splits, dy)


# dtype, groups, tokens that share a routing, adapters, rank, choices, inputs, widths of the projections
SHAPES: dict[str, tuple[str, int, int, int, int, int, int, tuple[int, ...]]] = {
    "the least": ("float32", 1, 1, 1, 1, 1, 1, (1,)),
    "odd": ("bfloat16", 9, 1, 9, 3, 2, 33, (5, 31, 16)),
    "requests": ("float32", 7, 3, 9, 4, 3, 16, (31, 48)),
    "requests in 16 bit": ("bfloat16", 6, 3, 5, 8, 1, 64, (48,)),
    "more choices than adapters": ("float16", 40, 1, 2, 2, 4, 7, (48, 1)),
    # A * R above DENSE_GRADIENTS_WIDTH: the other backward form
    "wide": ("float32", 40, 1, 40, 13, 4, 33, (16, 5)),
    "wide in bfloat16": ("bfloat16", 17, 3, 65, 8, 2, 16, (31,)),
    "wide in float16": ("float16", 20, 1, 33, 16, 3, 64, (1, 16, 5)),
}
ROUTINGS = ("any", "one", "none", "base_rows", "outside")
RESULTS = ("y", "x", "a", "b", "weights", "scale", "base")
# most of a case's time is compiling its shape; XLA's optimiser would double it
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def cases_of(shape: str) -> Iterator[Case]:
    """One of each routing."""
    for seed, routing in enumerate(ROUTINGS):
        yield make_case(seed, *SHAPES[shape], routing)


@functools.partial(jax.jit, static_argnames=("splits", "name"), compiler_options=QUICK)
def forward_and_backward(arguments: Any, dy: Any, splits: tuple[int, ...], name: str) -> dict[str, jax.Array]:
    """Output and gradients of an implementation, named as RESULTS has them."""
    x, a, b, indices, weights, scale, base = arguments

    def of(x, a, b, weights, scale, base):
        return apply(x, a, b, indices, weights, scale, base, splits, name)

    y, pull = jax.vjp(of, x, a, b, weights, scale, base)
    return dict(zip(RESULTS, (y, *pull(dy)), strict=True))


def check(case: Case, name: str) -> None:
    assert_close(forward_and_backward(case.arguments, case.dy, case.splits, name), case)


def apply(x, a, b, indices, weights, scale, base, splits, implementation=None):
    """`routed_lora` of a case's arrays."""
    return routed_lora(x, LoraBank(a, b, scale, splits), Routing(indices, weights), base, implementation=implementation)


PACKED = ("reference", "masked", "triton")  # what may follow a packed weight's product


def follow_product(x, packed, bank, rule, base, name, gates=None):
    """(base + update, indices, weights) behind the product of x [M, I] with gates and A's packed [P, N, I].

    gates: columns of the gates, the bank's adapters unless given.
    """
    adapters, rank, _ = bank.b.shape
    gates = adapters if gates is None else gates
    first = packing.first_a_row(gates)
    product = einsum_float32(x.dtype, "mi,pni->mpn", x, packed)
    if name == "triton":
        return topk_gated_lora(product.reshape(len(product), -1), bank, rule, base, gates)
    indices, weights = topk_gating(product[..., :gates], rule, adapters=adapters)
    shrink = product[..., first : first + adapters * rank].reshape(*product.shape[:2], adapters, rank)
    y = routed_lora(x, bank, Routing(indices, weights), base, shrink=shrink, implementation=name)
    return y, indices, weights


# dtype, rows, adapters, rank, choices, inputs, widths, columns of a null choice: one tile of rows, of columns and of
# A * R, or several whose last is not full; adapters that fill the gates' padding, and a null choice that is beyond it
GATED = {
    "the least": ("float16", 1, 1, 1, 1, 7, (5,), 0),
    "tiles": ("float32", 40, 9, 8, 3, 32, (130, 48), 1),
    "tiles in 16 bit": ("bfloat16", 20, 40, 3, 2, 7, (5, 130, 48), 0),
    "full": ("bfloat16", 16, 32, 8, 4, 32, (128,), 1),
}
SEEDS = range(3)  # of each: fewer let a bias slip that one of them forgets


@dataclasses.dataclass(frozen=True)
class GatedCase:
    """x [M, I], gates and A's packed, the bank, the rule and base, as `follow_product` takes them; expected: the choice
    in NumPy, and all else that `exact` needs."""

    arguments: tuple[Any, ...]
    gates: int
    expected: Case


def gated_case(shape: str, seed: int) -> GatedCase:
    dtype, rows, adapters, rank, top_k, width, splits, null = GATED[shape]
    rng, kind = np.random.default_rng(seed), DTYPES[dtype]
    # few distinct values: logits are exact, being sums of small integers, and some are equal
    gate = rng.integers(-2, 3, (width, len(splits), adapters + null)).astype(np.float32)
    x = rng.integers(-2, 3, (rows, width)).astype(kind)
    a, b, base = (
        rng.standard_normal(shape).astype(kind)
        for shape in ((len(splits), adapters, rank, width), (adapters, rank, sum(splits)), (rows, sum(splits)))
    )
    scale = rng.uniform(0.5, 2, (len(splits), adapters)).astype(np.float32)
    counts = rng.integers(0, top_k + 1, rows).astype(np.int32)
    temperatures = rng.uniform(0.5, 20, rows).astype(np.float32)
    logits = np.einsum("mi,ipa->mpa", np.asarray(x, np.float64), np.asarray(gate, np.float64))
    order = np.argsort(-logits, axis=-1, kind="stable")[..., :top_k]
    taken = (np.arange(top_k) < counts[:, None])[:, None, :]
    values = np.take_along_axis(logits, order, -1) / temperatures.astype(np.float64)[:, None, None]
    values = np.where(taken, np.exp(values - values[..., :1]), 0)
    weights = (values / np.maximum(values.sum(-1, keepdims=True), 1e-300)).astype(np.float32)
    indices = np.where(taken & (order < adapters), order, -1).astype(np.int32)
    expected = Case(dtype, x, a, b, indices, weights, scale, base, splits, base)
    bank, rule = LoraBank(a, b, scale, splits), TopK(counts, temperatures, top_k)
    return GatedCase((x, packing.pack_gates_and_a(jax.numpy.asarray(gate), jax.numpy.asarray(a)), bank, rule, base),
                     adapters + null, expected)  # fmt: skip


def check_gated(shape: str, name: str) -> None:
    run = jax.jit(follow_product, static_argnames=("name", "gates"))
    for seed in SEEDS:
        case = gated_case(shape, seed)
        y, indices, weights = run(*case.arguments, name=name, gates=case.gates)
        np.testing.assert_array_equal(indices, case.expected.indices)
        np.testing.assert_allclose(weights, case.expected.weights, atol=1e-6)
        assert_close({"y": y}, case.expected)


@st.composite
def cases(draw, big: bool = True, dtypes: tuple[str, ...] = tuple(DTYPES)) -> Case:
    """Small shapes, odd ones as well."""
    return make_case(
        seed=draw(st.integers(0, 2**32 - 1)),
        dtype=draw(st.sampled_from(dtypes)),
        groups=draw(st.integers(1, 40 if big else 9)),
        tokens=draw(st.sampled_from([1, 1, 1, 3])),
        adapters=draw(st.integers(1, 40 if big else 9)),
        rank=draw(st.sampled_from([1, 2, 3, 4, 8, 13] if big else [1, 2, 3, 4, 8])),
        choices=draw(st.integers(1, 4)),
        width=draw(st.sampled_from([1, 7, 16, 33, 64])),
        splits=tuple(draw(st.lists(st.sampled_from([1, 5, 16, 31, 48]), min_size=1, max_size=3))),
        routing=draw(st.sampled_from(["any", "any", "one", "none", "base_rows", "outside"])),
    )


def exact(case: Case) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Values in float64 of the output and every gradient, and the size of what was added up to make each."""
    up = lambda array: np.asarray(array, np.float64)  # noqa: E731
    groups, (projections, adapters) = case.indices.shape[0], case.a.shape[:2]
    x, base, dy = (up(array).reshape(groups, -1, array.shape[-1]) for array in (case.x, case.base, case.dy))
    indices = case.indices.reshape(groups, projections, -1)
    weights = up(case.weights).reshape(indices.shape)
    a, b, scale = up(case.a), up(case.b), up(case.scale)
    value = dict(y=base.copy(), x=np.zeros_like(x), a=np.zeros_like(a), b=np.zeros_like(b))
    value |= dict(weights=np.zeros_like(weights), scale=np.zeros_like(scale), base=dy.copy())
    size = {name: np.abs(array) for name, array in value.items()}

    def add(name: str, where: Any, left: np.ndarray, right: np.ndarray, factor: float) -> None:
        value[name][where] += factor * (left @ right)
        size[name][where] += abs(factor) * (np.abs(left) @ np.abs(right))

    stops = np.cumsum(case.splits)
    for g, p in np.ndindex(groups, projections):
        columns = slice(stops[p] - case.splits[p], stops[p])
        for c, i in enumerate(indices[g, p]):
            if not 0 <= i < adapters:
                continue
            a_i, b_i, w, s = a[p, i], b[i][:, columns], weights[g, p, c], scale[p, i]
            h, dh = x[g] @ a_i.T, dy[g][:, columns] @ b_i.T
            h_size, dh_size = np.abs(x[g]) @ np.abs(a_i.T), np.abs(dy[g][:, columns]) @ np.abs(b_i.T)
            add("y", (g, slice(None), columns), h, b_i, w * s)
            size["y"][g][:, columns] += abs(w * s) * (h_size @ np.abs(b_i))
            add("x", g, dh, a_i, w * s)
            size["x"][g] += abs(w * s) * (dh_size @ np.abs(a_i))
            add("a", (p, i), dh.T, x[g], w * s)
            size["a"][p, i] += abs(w * s) * (dh_size.T @ np.abs(x[g]))
            add("b", (i, slice(None), columns), h.T, dy[g][:, columns], w * s)
            size["b"][i][:, columns] += abs(w * s) * (h_size.T @ np.abs(dy[g][:, columns]))
            inner, inner_size = np.sum(h * dh), np.sum(h_size * dh_size)
            value["weights"][g, p, c] += s * inner
            size["weights"][g, p, c] += abs(s) * inner_size
            value["scale"][p, i] += w * inner
            size["scale"][p, i] += abs(w) * inner_size
    shapes = dict(y=case.base.shape, x=case.x.shape, weights=case.weights.shape, base=case.base.shape)
    for results in (value, size):
        for name, shape in shapes.items():
            results[name] = results[name].reshape(shape)
    return value, size


def assert_close(found: dict[str, Any], case: Case, names: tuple[str, ...] | None = None) -> None:
    """Every result within a few roundings of its dtype, measured on the sum of the absolute terms."""
    value, size = exact(case)
    for name in names or tuple(found):
        array = np.asarray(found[name], np.float64)
        assert array.shape == value[name].shape, name
        assert np.all(np.isfinite(array)), name
        bound = 4 * EPS[case.dtype] * size[name] + 1e-30
        worst = np.max(np.abs(array - value[name]) / bound, initial=0.0)
        assert worst <= 1, f"{name}: {worst:.2f} times the bound of its rounding"
