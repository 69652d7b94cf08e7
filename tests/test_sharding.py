"""A mesh of eight devices computes what one device does. Run as a script it is the process that has the devices."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from extent import ALL, parameters
from worlds import NAMES

KEPT, REASON = ["2x2x2"], "an axis alone; 2x2x2 has all three"
SHAPES = {"8x1x1": (8, 1, 1), "1x8x1": (1, 8, 1), "1x1x8": (1, 1, 8), "2x2x2": (2, 2, 2)}
PROMPTS = ["How many apples?", "The quick brown fox jumps over the lazy dog, and", "Answer yes or no."]
NEW_TOKENS = 12


def devices(count: int) -> dict[str, str]:
    """The environment of a process with `count` CPU devices, which compiles as this one does."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}"
    return {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}


def routers(mj):
    return [mj.Gates(2), mj.Fixed({"birch": 0.5, "daisy": 0.5}), None]


def answers(model, mj):
    """Logits of ragged rows, greedy and sampled tokens with a stop string, and the greedy routing."""
    ids = [model.encode(p) for p in PROMPTS]
    out = model.generate(PROMPTS, routers(mj), max_new_tokens=NEW_TOKENS)
    stop = out[1].text[2:4] or "x"
    logits = [np.asarray(row)[: len(i)] for row, i in zip(model.logits(ids, routers(mj)), ids, strict=True)]
    return {
        "logits": np.concatenate(logits),
        "tokens": np.asarray([c.token_ids for c in out]),
        "stopped": np.asarray(
            [len(c.token_ids) for c in model.generate(PROMPTS, routers(mj), max_new_tokens=32, stop=[stop])]
        ),
        "routing": np.concatenate([c.routing.weights.sum(-1)[:-1].ravel() for c in out if c.routing is not None]),
    }


def main(base: str, bank: str, gates: str, dest: str) -> None:
    from flax import nnx

    import meteora_jax as mj
    from meteora_jax.bank import BaseParam
    from meteora_jax.sharding import make_mesh

    split = {}
    for name in SHAPES if ALL else KEPT:
        model = mj.load(base, bank, gates, mesh=make_mesh(*SHAPES[name]), dtype="float32")
        np.savez(Path(dest) / f"{name}.npz", **answers(model, mj))
        matrices = [x[...] for _, x in nnx.to_flat_state(nnx.filter_state(model.weights, BaseParam)) if x.ndim > 1]
        matrices = [x for x in matrices if x.size > 1000]
        split[name] = sum(x.size for x in matrices) / sum(x.addressable_shards[0].data.size for x in matrices)
    (Path(dest) / "split.json").write_text(json.dumps(split))


@pytest.fixture(scope="module")
def calm(world, tmp_path_factory) -> list[str]:
    """The world with smaller gates: at their own size a rounding of x changes a softmax by more than 1e-5."""
    from meteora_jax.gate_config import GateConfig
    from meteora_jax.io.gates import save_gates

    gates = tmp_path_factory.mktemp("calm") / "gates"
    save_gates(gates, GateConfig(NAMES, 2, 1.0), {p: 0.2 * g for p, g in world["gate_arrays"].items()})
    return [str(world["base"]), str(world["bank"]), str(gates)]


@pytest.fixture(scope="module")
def expected(calm) -> dict[str, np.ndarray]:
    """What one device computes."""
    import meteora_jax as mj

    return answers(mj.load(*calm, dtype="float32"), mj)


@pytest.fixture(scope="module")
def meshed(calm, tmp_path_factory) -> Path:
    """What `main` wrote on every mesh."""
    dest = tmp_path_factory.mktemp("meshed")
    command = [sys.executable, __file__, *calm, str(dest)]
    done = subprocess.run(command, env=devices(8), capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-4000:]
    return dest


@pytest.mark.parametrize("shape", parameters(SHAPES, KEPT, REASON))
def test_a_mesh_computes_what_one_device_does(expected, meshed, shape):
    found = np.load(meshed / f"{shape}.npz")
    assert np.abs(found["logits"] - expected["logits"]).max() <= 1e-5
    assert np.array_equal(found["tokens"], expected["tokens"])
    assert np.array_equal(found["stopped"], expected["stopped"])
    assert np.allclose(found["routing"], expected["routing"], atol=1e-5)


def test_weights_are_split_over_fsdp_and_tensor(meshed):
    """How many devices it takes to hold the base's matrices once."""
    split = json.loads((meshed / "split.json").read_text())
    expected = {"8x1x1": 1, "1x8x1": 8, "1x1x8": 8, "2x2x2": 4}
    assert split == {name: expected[name] for name in split}
    assert "2x2x2" in split


def test_a_mesh_must_use_every_device():
    import jax

    from meteora_jax.config import InputError
    from meteora_jax.sharding import make_mesh

    with pytest.raises(InputError, match="expected axes that multiply to the 1 devices, found 2x1x1"):
        make_mesh(2, 1, 1, devices=jax.devices()[:1])
    with pytest.raises(InputError, match="one of them perhaps -1, found -1x-1x1"):
        make_mesh(-1, -1, 1)
    with pytest.raises(InputError, match="found -1x2x1"):
        make_mesh(-1, 2, 1, devices=jax.devices()[:1])
    assert dict(make_mesh(devices=jax.devices()[:1]).shape) == {"data": 1, "fsdp": 1, "tensor": 1}


if __name__ == "__main__":
    import conftest  # noqa: F401  (the same strictness as in every test)
    import without_torch  # noqa: F401  (begins sooner)

    main(*sys.argv[1:])
