"""Run as a program with TRITON_INTERPRET=1: a decoding step's Triton kernels on CPU tensors against float64 NumPy.

Everything but the last call is the package's own code. Prints a line a number of cases, exits 1 on the first wrong
one. tests/test_decode_step.py starts it.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from batches import answer
from ranking_on_cpu import one_ranking
from test_gated_model import small
from triton_interpreter import LAUNCHES, RAN, interpret

import meteora_jax as mj
from meteora_jax.execution import ExecutionConfig
from meteora_jax.gate_config import TokenRouterForm
from meteora_jax.model import layout
from meteora_jax.model.packed_linear import stack_rows
from meteora_jax.model.routed_llama import RoutedCache
from meteora_jax.routing.retrieval import Composed
from pallas_kernels.decode_step import operands, triton_gpu
from pallas_kernels.decode_step.operands import Choice, Group, ResidualStream, StepState
from pallas_kernels.decode_step.triton_gpu import StepLimits
from pallas_kernels.paged_attention import EMPTY
from pallas_kernels.routed_lora import packing

EPS = {"float32": 2.0**-22, "bfloat16": 2.0**-7}


def exact(array: Any) -> np.ndarray:
    return np.asarray(array, np.float64)


def of_kind(array: Any, kind: str) -> jax.Array:
    """Rounded by NumPy: JAX compiles a program for each shape."""
    return jnp.asarray(np.asarray(array).astype(jnp.dtype(kind)))


def softmax_of_largest(logits: np.ndarray, count: int, temperature: float) -> tuple[np.ndarray, np.ndarray]:
    order = np.argsort(-logits, kind="stable")[:count]
    values = np.exp((logits[order] - logits[order[:1]]) / temperature)
    return order, values / values.sum() if count else values


def group(
    x, g: Group, layer: int, epilogue: str, choice: Choice | None, extra: dict[str, Any]
) -> tuple[Any, Any, float]:
    """(result, [[(adapters, weights) by projection] by row], size of the sums), float64.

    extra: residual, cos, sin, norm [L, I] or None, packed [L, P, N, I] or None.
    """
    x, starts, factor = exact(x), np.cumsum((0, *g.splits)), np.ones(len(x))
    choice = jax.tree.map(np.asarray, choice)
    if extra["norm"] is not None:
        factor = 1 / np.sqrt((x * x).mean(-1) + (g.eps or 0.0))
        x = x * exact(extra["norm"])[layer]
    w, b, scale = (exact(z[layer]) for z in map(np.asarray, (g.w, g.b, g.scale)))
    w = w[: starts[-1]].T if g.packed else w
    a, behind = (None if z is None else exact(np.asarray(z)[layer]) for z in (g.a, extra["packed"]))
    y = factor[:, None] * (x @ w)
    size = factor[:, None] * (np.abs(x) @ np.abs(w))
    routed = []
    for m in range(len(x)) if choice is not None else ():
        routed.append([])
        for p in range(len(g.splits)):
            # the factor last: equal logits stay equal
            packed = None if behind is None else behind[p] @ x[m] * factor[m]
            if choice.counts is not None:
                chosen = softmax_of_largest(packed[: g.gates], choice.counts[m], choice.temperatures[m])
            else:
                chosen = choice.indices[m], exact(choice.weights[m])
            routed[-1].append(chosen)
            columns = slice(starts[p], starts[p + 1])
            acting = [(i, w) for i, w in zip(*chosen, strict=True) if 0 <= i < len(b)]
            rank = b.shape[1]
            shrinks = [
                a[p, i] @ x[m] * factor[m] if a is not None else packed[g.first_shrink + i * rank :][:rank]
                for i, _ in acting
            ]
            if choice.fused is not None and choice.fused[m] and acting:
                shrinks = [sum(w * h for (_, w), h in zip(acting, shrinks, strict=True))] * len(acting)
            for (i, w), h in zip(acting, shrinks, strict=True):
                w *= scale[p, i]
                y[m, columns] += w * h @ b[i][:, columns]
                size[m, columns] += abs(w) * np.abs(h) @ np.abs(b[i][:, columns])
    if epilogue == "silu":
        gate, up = np.split(y, 2, -1)
        return (gate / (1 + np.exp(-gate)) * up,), routed, float(size.max()) * max(1.0, np.abs(y).max())
    if epilogue == "residual":
        return (exact(extra["residual"]) + y,), routed, float(size.max()) + np.abs(exact(extra["residual"])).max()
    q, k, v = (y[:, starts[p] : starts[p + 1]].reshape(len(y), -1, extra["head"]) for p in range(3))
    cos, sin = exact(extra["cos"])[:, None], exact(extra["sin"])[:, None]

    def rotate(z: np.ndarray) -> np.ndarray:
        z0, z1 = np.split(z, 2, -1)
        return np.concatenate([z0 * cos - z1 * sin, z1 * cos + z0 * sin], -1)

    return tuple(z.reshape(len(y), -1) for z in (rotate(q), rotate(k), v)), routed, 2 * float(size.max())


def random_group(
    rng, kind, layers, width, splits, adapters, rank, wide, norm, gates, first, null
) -> tuple[Group, Any, Any]:
    """(the group, the scale of the norm before it, its gates and A's as `packing.pack_gates_and_a` packs them)."""

    def draw(*shape: int) -> jax.Array:
        return of_kind(rng.standard_normal(shape) / np.sqrt(shape[-2]), kind)

    @jax.jit
    def pack(w, gate, a):
        packed = jax.vmap(packing.pack_gates_and_a)(gate, a)
        return packed, stack_rows(w, packed)

    p, total = len(splits), sum(splits)
    a = of_kind(rng.standard_normal((layers, p, adapters, rank, width)) / np.sqrt(width), kind)
    columns = adapters + null
    gate = np.round(2 * rng.standard_normal((layers, width, p, columns)))  # with x and norm below, exact; ties
    w, scale = draw(layers, width, total), of_kind(rng.choice([0.5, 1, 2], (layers, width)), kind)
    packed = None
    if gates or not wide:
        packed, w = pack(w, jnp.asarray(gate, jnp.float32), a[..., :0, :] if wide else a)
    g = Group(
        w, a if wide else None, draw(layers, adapters, rank, total),
        jnp.asarray(rng.uniform(0.5, 2, (layers, p, adapters)), jnp.float32), splits, 1e-5 if norm else None,
        0 if packed is None else packed.shape[2], columns, first,
    )  # fmt: skip
    return g, scale if norm else None, packed


def one_case(seed: int, launches: list[str], many: int | None = None) -> None:
    """A random group, routing, epilogue and form. many: rows of a step that multiplies every B, a small bank's."""
    rng = np.random.default_rng(seed)
    epilogue, how = ("qkv", "silu", "residual")[seed % 3], ("none", "gates", "given")[seed // 3 % 3]
    kind = ("float32", "bfloat16")[(seed // 9 + seed) % 2]
    wide = bool((seed // 9 + seed // 3 % 3) % 2)
    # a program for each row, or tiles of them, of which MANY has several
    rows, layers, head = int(rng.choice([1, 2, 3, 5] if seed < 9 else [1, 2, 3, 8, 17])), 2, int(rng.choice([32, 64]))
    width = int(rng.choice([16, 64, 96, 128]))
    adapters, rank, top_k = int(rng.integers(2, 40)), int(rng.choice([1, 3, 8])), int(rng.integers(1, 4))
    top_k, null = min(top_k, adapters), int(rng.integers(2))
    if many is not None:
        rows, width, head, wide, null = many, 16, 32, False, seed % 2
        adapters, rank = (5, 20)[seed // 3 % 2], 4  # one block of B, or two
    kv = int(rng.integers(1, 3))
    splits = {
        "qkv": (2 * kv * head, kv * head, kv * head),
        "silu": ((128, 128), (96, 96))[seed % 2],
        "residual": (int(rng.choice([32, 64])),),
    }[epilogue]
    at = {"qkv": 0, "residual": 3, "silu": 4}[epilogue]  # the group's first projection
    g, norm, packed = random_group(
        rng, kind, layers, width, splits, adapters, rank, wide, epilogue != "residual", how == "gates", at, null
    )
    x = of_kind(rng.integers(-2, 3, (rows, width)), kind)
    layer, blocks, block = int(rng.integers(layers)), rows + 2, 4
    # every B masked, or each row's own, by many rows, too; wide and narrow tiles
    limits = StepLimits(gather=(1, 64)[seed // 2 % 2] if many is None else 0, programs=(1, 4096)[seed % 2])
    traced = how == "gates"
    pages = of_kind(rng.standard_normal((layers * blocks, block, 2 * kv, head)), kind)
    slots = rng.permutation(blocks * block)[:rows].astype(np.int32)
    slots[rows // 2 :: 5] = EMPTY if rows > 1 else slots[0]  # tokens that are none
    state = StepState(
        pages, jnp.full((layers, rows, 7, top_k) if traced else (1,), 99, jnp.int32),
        jnp.zeros((layers, rows, 7, top_k) if traced else (1,), jnp.float32), blocks,
    )  # fmt: skip
    choice = None
    if how == "gates":
        choice = Choice(top_k, jnp.asarray(rng.integers(0, top_k + 1, rows), jnp.int32),
                        jnp.asarray(rng.uniform(5, 20, rows), jnp.float32))  # fmt: skip
    elif how == "given":
        indices = rng.integers(-1, adapters, (rows, top_k))
        if many is not None:  # few rows act, and blocks of B are nobody's: the last in the first tile, then the first
            late = np.arange(rows)[:, None] >= (64 if rows > 64 else 16)
            indices = np.where(rng.random((rows, 1)) < 0.2, indices % 3 + late * (adapters - 3), -1)
        choice = Choice(top_k, indices=jnp.asarray(indices, jnp.int32),
                        weights=jnp.asarray(rng.standard_normal((rows, top_k)), jnp.float32),
                        fused=None if wide or seed % 2 else jnp.asarray(rng.integers(2, size=rows) > 0))  # fmt: skip
    angle = rng.uniform(0, 6, (rows, head // 2))
    then = of_kind(rng.choice([0.5, 1, 2], (layers, splits[0])), kind)
    extra: dict[str, Any] = dict(
        residual=of_kind(rng.standard_normal((rows, splits[0])), kind), head=head, norm=norm, packed=packed,
        cos=jnp.asarray(np.cos(angle), jnp.float32), sin=jnp.asarray(np.sin(angle), jnp.float32),
    )  # fmt: skip
    launches.clear()

    @jax.jit
    def step(x, g, state, choice, residual, angles, slots):
        if epilogue == "residual":
            rest: dict[str, Any] = dict(residual=residual, next_scale=then, next_layer=seed % 2)
            x = operands.at_least(x, operands.LEAST_ROWS)
            return triton_gpu.residual_step(layer, x, g, state, choice, limits, **rest)
        assert norm is not None
        stream = ResidualStream.begin(x, norm[layer])
        if epilogue == "silu":
            return triton_gpu.silu_step(layer, stream, g, state, choice, limits)
        rest = dict(angles=angles, slots=slots, head_dim=head)
        return triton_gpu.qkv_step(layer, stream, g, state, choice, limits, **rest)

    angles = extra["cos"], extra["sin"]
    out, after = jax.device_get(step(x, g, state, choice, extra["residual"], angles, jnp.asarray(slots)))
    gathers = wide or (choice is not None and choice.fused is None and rows * top_k <= limits.gather * adapters)
    shrinks = [] if choice is None else ["shrink_kernel"] if wide else [] if gathers else ["weigh_kernel"]
    assert launches == [*shrinks, f"{epilogue}_epilogue_kernel"], launches
    wanted, routed, size = group(x, g, layer, epilogue, choice, extra)
    found = (out[:rows],) if epilogue == "silu" else (out,)
    if epilogue == "qkv":
        real = slots != EMPTY
        places = layer * blocks * block + slots[real]
        written = np.asarray(after.pages).reshape(-1, kv, 2, head)[places]
        found = out, *(written[:, :, i].reshape(-1, kv * head) for i in (0, 1))
        wanted = wanted[0], *(z[real] for z in wanted[1:])
    elif epilogue == "residual":  # what the next norm needs follows from what was stored
        found, x64 = (out.x,), np.asarray(out.x, np.float64)
        following = np.asarray(then, np.float64)[min(layer + seed % 2, layers - 1)]
        np.testing.assert_allclose(np.asarray(out.scaled[:rows], np.float64), x64 * following, rtol=EPS[kind])
        np.testing.assert_allclose(np.asarray(out.squares).sum(1), (x64 * x64).sum(1), rtol=1e-5)
    for one, other in zip(found, wanted, strict=True):
        error = np.abs(np.asarray(one, np.float64) - other).max() / size
        assert error <= 4 * EPS[kind], f"seed {seed}: {kind} {epilogue} {how} wide={wide}: {error}"
    if traced:
        for m, row in enumerate(routed):
            for p, (indices, weights) in enumerate(row):
                taken = after.indices[layer, m, at + p]
                indices = np.where(indices < adapters, indices, -1)
                np.testing.assert_array_equal(taken, [*indices, *[-1] * (top_k - len(indices))])
                np.testing.assert_allclose(after.weights[layer, m, at + p][: len(indices)], weights, atol=2e-2)
        others = np.delete(np.asarray(after.indices), layer, 0)
        assert (others == 99).all(), "another layer's trace was written"
    if epilogue == "qkv":  # nothing but the slots
        before, now = (np.asarray(z).reshape(-1, 2 * kv, head) for z in (pages, after.pages))
        kept = np.ones(len(before), bool)
        kept[layer * blocks * block + slots[slots != EMPTY]] = False
        np.testing.assert_array_equal(now[kept], before[kept])


PROMPTS = [[5, 6, 7, 8, 9, 300, 17], [11, 12, 13], [200], list(range(20, 40)), [3, 4]]
FEW = StepLimits(rows=64, programs=1)  # fewer programs to interpret, and no prompts
NARROW, WIDE = ExecutionConfig(step=FEW), ExecutionConfig(step=FEW, dense_width=8)


def generate(model: Any, router: Any, count: int = 3, steps: int = 2) -> tuple[list[list[int]], Any, Any]:
    """Greedy tokens, routing, and the cache, of a ragged batch."""
    tokens, routing, engine = answer(model, PROMPTS[:count], router, steps)
    return tokens, routing, engine._state.cache


def stepping(model: Any, execution: ExecutionConfig) -> Any:
    """The model with all that steps need."""
    graph = layout.with_execution(model.graph, model.weights, execution)
    graph, weights = layout.pack(graph, model.weights)
    return dataclasses.replace(model, graph=graph, weights=weights)


def whole_model(everything: bool) -> None:
    """Generation by the kernels tells what generation by XLA does. Without `everything` each form runs once: what rows
    without adapters and those that name them read is in `one_case` as well, a token router in kernels_on_mesh.py."""
    packing.ROWS = 64  # fewer blocks of zeros to interpret
    model = small("float32", layers=2, null=True, smaller=True)
    stepped = stepping(model, NARROW)
    plain = dataclasses.replace(stepped, graph=layout.with_execution(stepped.graph, stepped.weights, ExecutionConfig()))
    named = [mj.Fixed({"cedar": 0.7, "apple": 0.4}), None, mj.Fixed("birch")]
    for router in (None, mj.Gates(2), named) if everything else ():
        agree(plain, stepped, router)
    agree(plain, stepped, [mj.Gates(1, 3.0), mj.Gates(2), None])
    # what XLA chooses between product and epilogue; matrices averaged; prompts
    one = small("float32", layers=1, null=True, smaller=True)
    whole = stepping(one, ExecutionConfig(step=StepLimits(programs=1)))
    within, fused = mj.Gates(1, within=("birch", "cedar")), Composed((("cedar", 0.7), ("apple", 0.4)), True)
    agree(one, whole, [mj.Lag(2, k=3), fused, within], steps=1)
    assert {"weigh_kernel", "runs_kernel", "rank_kernel"} <= set(RAN), RAN
    if everything:
        agree(plain, stepped, within)
        agree(model, stepping(model, WIDE), [within, mj.Fixed("apple")], 2)
        assert "shrink_kernel" in RAN, RAN
    form = TokenRouterForm(width=64, depth=2)
    cases = (NARROW, [mj.Gates(1, 3.0), None, mj.Fixed("birch")], 3), (WIDE, mj.Gates(2), 2)
    for execution, router, count in cases if everything else ():  # the first is in kernels_on_mesh.py as well
        routed = small("float32", form, layers=1, null=True, smaller=True)
        agree(routed, stepping(routed, execution), router, count)
        assert ("shrink_kernel" in RAN) == (execution is WIDE), RAN
    agree(one, stepping(one, WIDE), mj.Gates(2), 1)  # a wide bank's own gates
    assert "shrink_kernel" in RAN, RAN


def agree(apart: Any, model: Any, router: Any, count: int = 3, steps: int = 2) -> None:
    """`model` by the kernels tells what `apart` does by XLA."""
    wanted, traced, cache = generate(apart, router, count, steps)
    if isinstance(router, mj.Gates):  # adapters, and none of them, are chosen
        assert {-1, 0, 1, 2, 3} >= {*np.unique(traced[0][0])} > {-1}, traced[0][0]
    RAN.clear()
    found, routing, kept = generate(model, router, count, steps)
    assert set(triton_gpu.KERNELS.values()) <= set(RAN), RAN
    assert found == wanted, router
    if isinstance(kept, RoutedCache):
        for one, other in zip(jax.tree.leaves(kept.router), jax.tree.leaves(cache.router), strict=True):
            np.testing.assert_allclose(one, other, atol=1e-4)
    assert (routing is None) == (traced is None)
    for one, other in zip(routing or [], traced or [], strict=True):
        assert (one is None) == (other is None)
        if one is None or other is None:  # a request without adapters
            continue
        (i, w), (j, v) = one, other
        np.testing.assert_array_equal(i, j)
        np.testing.assert_allclose(w, v, atol=1e-4)


# (rows, seed): bare; by gates with a null choice and without; given, some of them fused, of one block of B and of two
MANY = [(96, 1), (40, 3), (96, 4), (40, 5), (40, 6), (96, 8), (96, 16), (40, 17)]


def main(examples: int) -> None:
    interpret()
    whole_model(everything=examples > 9)
    print("whole model")
    # as wide banks of real models have it: inputs in parts that the epilogue adds
    triton_gpu.shrink_parts = lambda g, *_: 1 if g.a is None or g.a.shape[-1] < 64 else 2
    for seed in range(examples):
        one_case(seed, LAUNCHES)
    print(f"groups: {examples} cases")
    for seed in range(12):
        one_ranking(seed)
    print("rankings: 12 cases")
    for rows, seed in MANY[:examples]:
        one_case(seed, LAUNCHES, rows)
    print(f"many rows: {len(MANY[:examples])} cases")


if __name__ == "__main__":
    main(int(sys.argv[1]))
