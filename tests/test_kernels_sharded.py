"""The routed product on a mesh is that of one device, forward and backward, and at most one all-reduce.

Run as a script it is the process that has the devices.
"""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from extent import ALL, parameters
from test_sharding import devices

AXES: dict[str, dict[str, str]] = {
    "outputs": {"outputs": "x"},
    "inputs": {"inputs": "x"},
    "adapters": {"adapters": "x"},
    "rows": {"rows": "y"},
    "inputs, rows": {"inputs": "x", "rows": "y"},
    "outputs, adapters": {"outputs": "x", "adapters": "y"},
    "inputs, adapters": {"inputs": "x", "adapters": "y"},
    "inputs, outputs": {"inputs": "x", "outputs": "y"},
}
KEPT = ["inputs, rows", "outputs, adapters", "inputs, adapters"]  # every axis, and of NAMES each
SPLITS = (16, 8, 8)
DY = np.random.default_rng(4).standard_normal((4, 6, 32)).astype(np.float32)
NAMES = ("reference", "gathered", "grouped")


def case(requests: bool) -> dict[str, np.ndarray]:
    """Random arguments; some choices name no adapter."""
    rng = np.random.default_rng(3)
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    tokens = 1 if requests else 6
    indices = rng.integers(-1, 8, (4, tokens, 3, 2)).astype(np.int32)
    return {
        "x": normal(4, 6, 24), "kernel": 0.2 * normal(24, 32), "a": 0.2 * normal(3, 8, 4, 24), "b": normal(8, 4, 32),
        "indices": indices, "weights": rng.random(indices.shape, np.float32), "scale": rng.random((3, 8), np.float32),
    }  # fmt: skip


def main(dest: str) -> None:
    import jax
    import jax.numpy as jnp
    from jax.sharding import AxisType

    from meteora_jax.routing import Routing
    from meteora_jax.sharding import shard_order
    from pallas_kernels.routed_lora import LoraBank, routed_lora
    from pallas_kernels.routed_lora.sharded import routed_product

    mesh = jax.make_mesh((2, 2), ("x", "y"), (AxisType.Auto, AxisType.Auto))
    problems, counted = [], {}
    for requests in (False, True) if ALL else (True,):
        found = case(requests)
        fixed = {k: jnp.asarray(found.pop(k)) for k in ("indices", "weights")}

        def one(x, kernel, a, b, scale, fixed=fixed):
            base = jnp.einsum("bti,io->bto", x, kernel)
            y = routed_lora(x, LoraBank(a, b, scale, SPLITS), Routing(**fixed), base, implementation="reference")
            return jnp.sum(y * DY), y

        (_, want), wanted = jax.jit(jax.value_and_grad(one, argnums=(0, 1, 2, 3, 4), has_aux=True))(*found.values())
        for axes_name, axes in AXES.items() if ALL else [(name, AXES[name]) for name in KEPT]:
            order = shard_order(SPLITS, 2) if "outputs" in axes else np.arange(32)
            laid = {k: jnp.asarray(v[..., order] if k in ("kernel", "b") else v) for k, v in found.items()}
            programs: list[Any] = []
            for name in NAMES if ALL else (NAMES[list(AXES).index(axes_name) % len(NAMES)],):

                def many(x, kernel, a, b, scale, fixed=fixed, axes=axes, name=name, order=order):
                    bank = LoraBank(a, b, scale, SPLITS)
                    y = routed_product(x, kernel, bank, Routing(**fixed), mesh, **axes, implementation=name)
                    return jnp.sum(y * DY[..., order]), y

                programs.append(jax.jit(lambda *args, many=many: many(*args)[1]))
                run: Any = jax.jit(jax.value_and_grad(many, argnums=(0, 1, 2, 3, 4), has_aux=True))
                (_, y), grads = run(*laid.values())
                pairs = {"y": (y, want), **dict(zip(laid, zip(grads, wanted, strict=True), strict=True))}
                for key, (ours, theirs) in pairs.items():
                    theirs = np.asarray(theirs)[..., order] if key in ("y", "kernel", "b") else np.asarray(theirs)
                    error = np.abs(np.asarray(ours) - theirs).max()
                    if not error <= 2e-4 * max(1.0, np.abs(theirs).max()):
                        problems.append(f"{axes_name} {name} {requests}: {key}: {error}")
            compiled = programs[-1].lower(*laid.values()).compile()
            kinds = r" (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
            counted[axes_name] = sorted(re.findall(kinds, compiled.as_text()))
    Path(dest).write_text(json.dumps({"problems": problems, "counted": counted}))


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    dest = tmp_path_factory.mktemp("sharded") / "found.json"
    done = subprocess.run(
        [sys.executable, __file__, str(dest)], env=devices(4), capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(dest.read_text())


def test_forward_and_gradients_are_those_of_one_device(found: dict[str, Any]):
    assert found["problems"] == []


@pytest.mark.parametrize("axes", parameters(AXES, KEPT, "an axis alone, or another pair of those"))
def test_at_most_one_all_reduce(found: dict[str, Any], axes: str):
    parts = AXES[axes].keys()
    assert found["counted"][axes] == (["all-reduce"] if parts & {"inputs", "adapters"} else [])


def test_what_does_not_divide_is_refused():
    import jax
    import jax.numpy as jnp
    from jax.sharding import AbstractMesh

    from meteora_jax.routing import Routing
    from pallas_kernels.routed_lora import LoraBank
    from pallas_kernels.routed_lora.sharded import routed_product

    mesh: Any = AbstractMesh((5, 2), ("x", "y"))
    arguments = {k: jnp.asarray(v) for k, v in case(False).items()}
    x, kernel, a, b, scale = (arguments[k] for k in ("x", "kernel", "a", "b", "scale"))
    bank, routing = LoraBank(a, b, scale, SPLITS), Routing(arguments["indices"], arguments["weights"])

    def call(**axes):
        return jax.eval_shape(lambda: routed_product(x, kernel, bank, routing, mesh, **axes))

    with pytest.raises(ValueError, match="I: expected a multiple of 5, found 24"):
        call(inputs="x")
    with pytest.raises(ValueError, match="splits: expected multiples of 5, found 16"):
        call(outputs="x")
    with pytest.raises(ValueError, match="axes: expected a different one for every dimension, found y, y"):
        call(inputs="y", adapters="y")


if __name__ == "__main__":
    import conftest  # noqa: F401  (the same strictness as in every test)

    main(sys.argv[1])
