"""A mesh of eight devices computes what one device does."""

from typing import Any

import jax
import numpy as np
import pytest
from extent import parameters
from flax import nnx
from meshes import mesh_of
from worlds import NAMES

import meteora_jax as mj
from meteora_jax.bank import BaseParam
from meteora_jax.config import InputError
from meteora_jax.gate_config import GateConfig
from meteora_jax.io.gates import save_gates
from meteora_jax.sharding import make_mesh

KEPT, REASON = ["2x2x2"], "an axis alone; 2x2x2 has all three"
SHAPES = {"8x1x1": (8, 1, 1), "1x8x1": (1, 8, 1), "1x1x8": (1, 1, 8), "2x2x2": (2, 2, 2)}
PROMPTS = ["How many apples?", "The quick brown fox jumps over the lazy dog, and", "Answer yes or no."]
NEW_TOKENS = 12


def routers() -> list[Any]:
    return [mj.Gates(2), mj.Fixed({"birch": 0.5, "daisy": 0.5}), None]


def answers(model: mj.Meteora) -> dict[str, np.ndarray]:
    """Logits of ragged rows, greedy tokens and their routing, and how many come before a stop string."""
    ids = [model.encode(p) for p in PROMPTS]
    out = model.generate(PROMPTS, routers(), max_new_tokens=NEW_TOKENS)
    stop = out[1].text[2:4] or "x"
    logits = [np.asarray(row)[: len(i)] for row, i in zip(model.logits(ids, routers()), ids, strict=True)]
    return {
        "logits": np.concatenate(logits),
        "tokens": np.asarray([c.token_ids for c in out]),
        "stopped": np.asarray(
            [len(c.token_ids) for c in model.generate(PROMPTS, routers(), max_new_tokens=32, stop=[stop])]
        ),
        "routing": np.concatenate([c.routing.weights.sum(-1)[:-1].ravel() for c in out if c.routing is not None]),
    }


@pytest.fixture(scope="module")
def calm(world, tmp_path_factory) -> list[str]:
    """The world with smaller gates: at their own size a rounding of x changes a softmax by more than 1e-5."""
    gates = tmp_path_factory.mktemp("calm") / "gates"
    save_gates(gates, GateConfig(NAMES, 2, 1.0), {p: 0.2 * g for p, g in world["gate_arrays"].items()})
    return [str(world["base"]), str(world["bank"]), str(gates)]


@pytest.fixture(scope="module")
def expected(calm) -> dict[str, np.ndarray]:
    """What one device computes."""
    return answers(mj.load(*calm, dtype="float32"))


@pytest.fixture(scope="module", params=parameters(SHAPES, KEPT, REASON))
def meshed(calm, request) -> tuple[str, mj.Meteora]:
    """A mesh's name, and the model on it."""
    return request.param, mj.load(*calm, mesh=mesh_of(*SHAPES[request.param]), dtype="float32")


def test_a_mesh_computes_what_one_device_does(expected, meshed):
    found = answers(meshed[1])
    assert np.abs(found["logits"] - expected["logits"]).max() <= 1e-5
    assert np.array_equal(found["tokens"], expected["tokens"])
    assert np.array_equal(found["stopped"], expected["stopped"])
    assert np.allclose(found["routing"], expected["routing"], atol=1e-5)


def test_weights_are_split_over_fsdp_and_tensor(meshed):
    """How many devices it takes to hold the base's matrices once."""
    name, model = meshed
    matrices = [x[...] for _, x in nnx.to_flat_state(nnx.filter_state(model.weights, BaseParam)) if x.ndim > 1]
    matrices = [x for x in matrices if x.size > 1000]
    split = sum(x.size for x in matrices) / sum(x.addressable_shards[0].data.size for x in matrices)
    assert split == {"8x1x1": 1, "1x8x1": 8, "1x1x8": 8, "2x2x2": 4}[name]


def test_a_mesh_must_use_every_device():
    with pytest.raises(InputError, match="expected axes that multiply to the 1 devices, found 2x1x1"):
        make_mesh(2, 1, 1, devices=jax.devices()[:1])
    with pytest.raises(InputError, match="one of them perhaps -1, found -1x-1x1"):
        make_mesh(-1, -1, 1)
    with pytest.raises(InputError, match="found -1x2x1"):
        make_mesh(-1, 2, 1, devices=jax.devices()[:1])
    assert dict(make_mesh(devices=jax.devices()[:1]).shape) == {"data": 1, "fsdp": 1, "tensor": 1}
