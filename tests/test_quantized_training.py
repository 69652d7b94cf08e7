"""Gates train over an int4 base on two devices as on one, and a plan's bytes are those that are allocated there."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapter_banks import random_bank
from flax import nnx
from meshes import mesh_of
from worlds import random_gates

import meteora_jax as mj
from converters import quantize_base
from meteora_jax.config import read_json
from meteora_jax.gate_config import GateConfig
from meteora_jax.io import hf_config
from meteora_jax.io.bank import save_bank
from meteora_jax.io.gates import save_gates
from meteora_jax.planning import plan_training, weight_parts
from meteora_jax.routing.gates import GateParam
from meteora_jax.sharding import place_rows, use_mesh
from meteora_jax.training.data import Batch
from meteora_jax.training.gate_loss import gate_loss
from meteora_jax.training.recipes import RECIPES
from meteora_jax.training.step import initial_state, make_step, optimizer

ADAPTERS, RANK, ROWS, WIDTH, STEPS = 4, 8, 2, 32, 3
MESHES = {"fsdp": (1, 2, 1), "tensor": (1, 1, 2)}


def trained(folder: Path, mesh: Any, dtype: str, steps: int) -> dict[str, Any]:
    """The losses of some steps, and the bytes on the first device; without steps those that the program has there."""
    model = mj.load(folder / "int4", folder / "bank", folder / "gates", mesh=mesh, dtype=dtype)
    graph, params, frozen = nnx.split(nnx.merge(model.graph, model.weights), GateParam, ...)
    recipe = RECIPES["meteora"]
    tx = optimizer(steps + 1, 5e-3, 0.0, 0.3)
    state = initial_state(params, tx, mesh)
    rng = np.random.default_rng(0)
    positions = np.tile(np.arange(WIDTH, dtype=np.int32), (ROWS, 1))
    tasks = np.tile(np.arange(ROWS, dtype=np.int32)[:, None], (1, WIDTH))
    tokens = rng.integers(3, 300, (ROWS, WIDTH)).astype(np.int32)
    batch = Batch(tokens=tokens, positions=positions, segments=np.ones_like(tokens), loss=positions > 8, tasks=tasks)
    router = place_rows(jax.tree.map(np.asarray, model.bind(mj.Gates(2), ROWS)), mesh)
    step: Any = make_step(graph, state, tx, gate_loss(recipe.objective), dtype=jnp.dtype(dtype), remat=True, mesh=mesh)
    held = {what: _bytes(tree) for what, tree in (("gates", state.params), ("optimiser", state.optimizer))}
    held["frozen"] = _bytes(frozen)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), (frozen, state))
    with use_mesh(mesh):
        batch = place_rows(batch, mesh)
        program = None if steps else step.lower(frozen, state, batch, router).compile().memory_analysis()
        losses = []
        for _ in range(steps):
            state, found = step(frozen, state, batch, router)
            losses.append(float(found.loss))
    return {
        "losses": losses, "held": held, "batch": _bytes((batch, router)), "parts": weight_parts(*shapes),
        "arguments": program and program.argument_size_in_bytes, "temporary": program and program.temp_size_in_bytes,
    }  # fmt: skip


def _bytes(tree: Any) -> int:
    """What the first device holds of arrays."""
    return sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree))


@pytest.fixture(scope="module")
def found(world: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder, config = tmp_path_factory.mktemp("trained"), world["model"].config
    quantize_base(world["base"], folder / "int4", "int4")
    names = tuple(f"adapter {i}" for i in range(ADAPTERS))
    save_bank(folder / "bank", random_bank(config, names, 1, RANK))
    small = {p: 0.1 * g for p, g in random_gates(config, ADAPTERS).items()}
    save_gates(folder / "gates", GateConfig(names, 2, 1.0), small)
    fsdp, quantised = mesh_of(*MESHES["fsdp"]), hf_config.from_hf(read_json(folder / "int4" / "config.json"))
    plan = plan_training(quantised, ADAPTERS, RANK, fsdp, rows=ROWS, width=WIDTH, mfu=0.4)
    return {
        "one": trained(folder, None, "float32", STEPS),
        **{name: trained(folder, mesh_of(*shape), "float32", STEPS) for name, shape in MESHES.items()},
        "bfloat16": trained(folder, fsdp, "bfloat16", 0),
        "plan": dataclasses.asdict(plan),
    }


@pytest.mark.parametrize("mesh", MESHES)
def test_two_devices_train_over_int4_as_one_does(found: dict[str, Any], mesh: str):
    one = found["one"]["losses"]
    assert one[-1] < one[0]
    np.testing.assert_allclose(found[mesh]["losses"], one, rtol=2e-4)


def test_two_devices_share_the_base_and_the_optimiser(found: dict[str, Any]):
    """Each has a part: fsdp splits gates of the residual stream, tensor those of o and down; both split kernels."""
    for what in ("gates", "optimiser", "frozen"):
        for mesh in MESHES:
            assert found[mesh]["held"][what] < 0.9 * found["one"]["held"][what]


def test_a_plan_s_bytes_are_those_that_are_allocated(found: dict[str, Any]):
    plan, real = found["plan"], found["bfloat16"]
    assert plan["parts"] == real["parts"]
    assert sum(plan["parts"][what] for what in ("base", "scales", "adapters")) == real["held"]["frozen"]
    assert (plan["parts"]["gates"], plan["parts"]["optimiser"]) == (real["held"]["gates"], real["held"]["optimiser"])
    assert plan["weights"] == sum(real["held"].values()) + real["batch"] >= real["arguments"]
    assert plan["temporary"] == pytest.approx(real["temporary"], rel=0.02)
    base, scales = plan["parts"]["base"], plan["parts"]["scales"]
    assert 0 < scales < base
