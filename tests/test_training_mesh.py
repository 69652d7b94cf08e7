"""Training on a mesh, and on two hosts, is training: loss and gradients equal torch's in float64.

Run as a script it is one of two hosts.
"""

import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from extent import parameters
from gate_gradients import loss_and_gradients
from meshes import environment, mesh_of
from test_sharding import KEPT, REASON, SHAPES
from worlds import NAMES

BETA = 2.0
ROWS, WIDTH = 8, 128
HOSTS = ("2x2x2", "1x1x8")


def sequences():
    """Short ones, packed, of all tasks; some tokens without a task, some not predicted."""
    from meteora_jax.training.sequences import NO_TASK, Tokenized

    rng = np.random.default_rng(0)
    made = []
    for i in range(16):
        n = int(rng.integers(8, 60))
        loss, tasks = rng.random(n) < 0.7, np.full(n, i % 4, np.int32)
        loss[0] = False
        tasks[rng.random(n) < 0.2] = NO_TASK
        made.append(Tokenized(rng.integers(3, 320, n).astype(np.int32), loss, tasks))
    return made


def packed():
    """The same in eight rows of two."""
    from meteora_jax.training.data import Batch, collate

    parts = sequences()
    batch = collate(parts[:ROWS], WIDTH)
    for row, s in enumerate(parts[ROWS:]):
        start, n = int(batch.segments[row].sum()), len(s.tokens)
        at = slice(start, start + n)
        batch.tokens[row, at], batch.loss[row, at], batch.tasks[row, at] = s.tokens, s.loss, s.tasks
        batch.positions[row, at], batch.segments[row, at] = np.arange(n), 2
    return Batch(**vars(batch))


def computed(base, bank, gates, mesh, accumulate: int = 1, remat=True) -> dict[str, np.ndarray]:
    import jax
    import jax.numpy as jnp
    from flax import nnx

    import meteora_jax as mj
    from meteora_jax.io.gates import split_gates
    from meteora_jax.routing.gates import GateParam
    from meteora_jax.sharding import fetch, place_rows, use_mesh
    from meteora_jax.training.gate_loss import GateLoss
    from meteora_jax.training.settings import Objective
    from meteora_jax.training.step import gradients

    model = mj.load(base, bank, gates, mesh=mesh, dtype="float32")
    graph, params, frozen = nnx.split(nnx.merge(model.graph, model.weights), GateParam, ...)
    part = ROWS // accumulate
    router = place_rows(jax.tree.map(np.asarray, model.bind(mj.Gates(2), part)), mesh)
    loss = GateLoss(Objective(beta=BETA))
    run = jax.jit(
        lambda frozen, params, batch, router: gradients(
            graph, frozen, params, batch, router, loss, dtype=jnp.float32, remat=remat, accumulate=accumulate
        )
    )
    with use_mesh(mesh):
        losses, grads = run(frozen, params, place_rows(packed(), mesh), router)
    flat = {tuple(map(str, path)): fetch(leaf[...]) for path, leaf in nnx.to_flat_state(grads)}
    return {"lm": fetch(losses.lm), "gate": fetch(losses.gate), **split_gates(flat)}


def main(base: str, bank: str, gates: str, dest: str, coordinator: str, index: str) -> None:
    import jax

    from meteora_jax.sharding import initialize_distributed, make_mesh

    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    initialize_distributed(coordinator, 2, int(index))
    assert len(jax.devices()) == 8
    assert len(jax.local_devices()) == 4
    for name in HOSTS:
        found = computed(base, bank, gates, make_mesh(*SHAPES[name]))
        if index == "0":
            np.savez(Path(dest) / f"{name}.npz", **found)


@pytest.fixture(scope="module")
def calm(world, tmp_path_factory) -> list[str]:
    """The world with gates small enough that rounding does not blow up in their softmax."""
    from meteora_jax.gate_config import GateConfig
    from meteora_jax.io.gates import save_gates

    gates = tmp_path_factory.mktemp("calm") / "gates"
    save_gates(gates, GateConfig(NAMES, 2, 1.0), {p: 0.2 * g for p, g in world["gate_arrays"].items()})
    return [str(world["base"]), str(world["bank"]), str(gates)]


@pytest.fixture(scope="module")
def expected(world):
    gates = {p: 0.2 * g for p, g in world["gate_arrays"].items()}
    return loss_and_gradients(world, gates, sequences(), BETA, 2)


def check(found, expected):
    lm, gate, grads = expected
    assert abs(float(found["lm"]) - lm) <= 1e-5
    assert abs(float(found["gate"]) - gate) <= 1e-5
    for p, grad in grads.items():
        assert np.abs(grad).max() > 1e-3
        assert np.abs(found[p] - grad).max() <= 1e-5, p


@pytest.mark.parametrize(
    ("accumulate", "remat"),
    [
        pytest.param(1, False, marks=pytest.mark.exhaustive("nothing is recomputed")),
        (4, True),  # two rows a part, sixteen tokens a block
        pytest.param(1, "dots", marks=pytest.mark.exhaustive("test_gated_model has what is recomputed")),
    ],
)
def test_one_device_equals_torch(calm, expected, accumulate, remat, monkeypatch):
    monkeypatch.setattr("meteora_jax.training.loss.LOGITS_AT_ONCE", ROWS // accumulate * 16 * 320)
    check(computed(*calm, None, accumulate, remat), expected)


@pytest.mark.exhaustive("parts of a batch are computed in blocks above; the mesh has no blocks")
def test_logits_block_by_block_equal_torch(calm, expected, monkeypatch):
    monkeypatch.setattr("meteora_jax.training.loss.LOGITS_AT_ONCE", ROWS * 16 * 320)
    check(computed(*calm, None), expected)


@pytest.mark.parametrize("shape", parameters(SHAPES, KEPT, REASON))
def test_a_mesh_equals_torch(calm, expected, shape):
    check(computed(*calm, mesh_of(*SHAPES[shape])), expected)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def together(commands: list[list[str]], env: dict[str, str]) -> None:
    """Runs processes side by side; all must succeed."""
    running = [subprocess.Popen(c, env=env, stderr=subprocess.PIPE, text=True) for c in commands]
    errors = [p.communicate(timeout=500)[1] for p in running]
    assert [p.returncode for p in running] == [0] * len(running), "\n".join(e[-3000:] for e in errors)


@pytest.mark.exhaustive("two processes and two meshes; test_training_resume has two hosts")
def test_two_hosts_of_four_devices_equal_torch(calm, expected, tmp_path):
    address = f"127.0.0.1:{free_port()}"
    together([[sys.executable, __file__, *calm, str(tmp_path), address, str(i)] for i in range(2)], environment(4))
    for shape in HOSTS:
        check(np.load(tmp_path / f"{shape}.npz"), expected)


if __name__ == "__main__":
    import conftest  # noqa: F401  (the same strictness as in every test)
    import without_torch  # noqa: F401  (begins sooner)

    main(*sys.argv[1:])
