"""The token router's launch against the same module by XLA, by Triton's interpreter; `decode_step_on_cpu.py` runs these
cases."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from triton_interpreter import LAUNCHES

from meteora_jax.execution import ExecutionConfig
from meteora_jax.gate_config import TokenRouterForm
from meteora_jax.numerics import matmul_precision
from meteora_jax.routing.gates import GateParam
from meteora_jax.routing.token_router import RouterCache, Sight, TokenRouter
from pallas_kernels.paged_attention import EMPTY, StepTokens

SHAPES = ((64, 2, 5), (32, 3, 20), (128, 4, 28), (64, 3, 16))  # width, depth, columns of the logits
WIDTH, BLOCK, TABLE = 48, 4, 6  # of the embeddings; slots of a block; blocks of a sequence
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-1}  # of the mean; rounding grows from layer to layer


def close(found: jax.Array, wanted: jax.Array, kind: str, where: str) -> None:
    """Whether they differ by rounding alone, in the mean."""
    apart, size = (np.abs(np.asarray(z, np.float32)).mean() for z in (found - wanted, wanted))
    assert apart <= TOLERANCE[kind] * max(1.0, size), f"{where}: expected {wanted}, found {found}"


def one_router(seed: int) -> None:
    """A few steps of a few sequences that begin, rest and go on, in a cache that was full of others' before."""
    rng = np.random.default_rng(seed)
    width, depth, columns = SHAPES[seed % len(SHAPES)]
    kind = ("float32", "bfloat16")[seed // 4 % 2]
    rows = 1 + seed % 4
    module = TokenRouter(WIDTH, TokenRouterForm(width, depth), columns)
    for _, leaf in nnx.to_flat_state(nnx.state(module, GateParam)):
        leaf[...] = jnp.asarray(0.6 * rng.standard_normal(leaf.shape) / leaf.shape[-2:][0] ** 0.5, jnp.float32)
    module.lookup[...] = jnp.asarray([1.0, 2.0])
    graph, state = nnx.split(module)
    tables = rng.permutation(rows * TABLE + 3)[: rows * TABLE].reshape(rows, TABLE).astype(np.int32)
    cache = RouterCache.create(module.form, rows * TABLE + 3, BLOCK, jnp.dtype(kind))
    cache = jax.tree.map(lambda z: jnp.asarray(rng.standard_normal(z.shape), z.dtype), cache)
    positions = rng.integers(0, 14, rows).astype(np.int32)
    positions[0] = seed % 3  # one whose first tokens have too few before them

    def run(launched: bool) -> Any:
        @jax.jit
        def step(x: jax.Array, positions: jax.Array, cache: RouterCache) -> Any:
            module = nnx.merge(graph, state)
            if launched:
                module.prepare(jnp.dtype(kind))
            nothing = jnp.zeros((0,), jnp.int32)
            tokens = StepTokens(positions, jnp.asarray(tables), nothing, jnp.zeros((rows,), jnp.int32))
            sight = Sight(positions[:, None], step=tokens, slots=tokens.slots(BLOCK), execution=ExecutionConfig())
            with matmul_precision(x.dtype):
                return module(x, sight, cache)

        return step

    both = run(True), run(False)
    for n in range(3):
        x = jnp.asarray(rng.standard_normal((rows, 1, WIDTH)), kind)
        there = rng.random(rows) < 0.75
        there[n % rows] = True
        now = jnp.asarray(np.where(there, positions, EMPTY).astype(np.int32))
        before = LAUNCHES.count("token_router_kernel")
        found, wanted = (step(x, now, cache) for step in both)
        assert LAUNCHES.count("token_router_kernel") == before + (n == 0), "expected one launch, traced once"
        where = f"seed {seed}, step {n}, {kind}"
        close(found[0][there], wanted[0][there], kind, where)
        leaves = (jax.tree.leaves(z) for z in (found[1], wanted[1], cache))
        for mine, its, old in zip(*leaves, strict=True):
            changed = np.asarray((its != old).any(-1))  # whole slots
            assert changed.any(), f"{where}: expected keys and values of {there.sum()} tokens, found none"
            np.testing.assert_array_equal(mine[~changed], old[~changed], where)
            close(mine[changed], its[changed], kind, where)
        cache = wanted[1]
        positions += there
