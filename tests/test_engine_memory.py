"""The bytes that are counted beforehand are those that an engine allocates; too little memory is said in a line."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from meshes import mesh_of
from test_token_router import FORM, arrays_of
from worlds import NAMES

import meteora_jax as mj
from meteora_jax.batching import Engine
from meteora_jax.config import InputError
from meteora_jax.engine import memory
from meteora_jax.gate_config import GateConfig
from meteora_jax.generation import LEAST_BLOCKS
from meteora_jax.io.gates import save_gates
from meteora_jax.model import attention as model_attention
from meteora_jax.model.attention import attend
from meteora_jax.routing import Routing
from pallas_kernels.paged_attention import StepTokens, reference
from pallas_kernels.routed_lora import api as routed_lora

BLOCKS, SIZE = 48, 8


@pytest.fixture(scope="module")
def router(world, tmp_path_factory):
    """GATES folder of a token router."""
    folder = tmp_path_factory.mktemp("router") / "gates"
    save_gates(folder, GateConfig(NAMES, 2, 1.0, FORM), arrays_of(FORM, world["model"].config))
    return folder


def counted_and_found(base: Any, bank: Any, gates: Any, mesh: Any = None) -> tuple[int, int]:
    """Bytes of one device's cache: as counted, and of an engine's arrays, those of each row left out."""
    model = mj.load(base, bank, gates, mesh=mesh, dtype="float32")
    engine = Engine(model, 64, BLOCKS, 4, SIZE)
    leaves = [leaf for leaf in jax.tree.leaves(engine.core._state) if leaf.ndim > 1]
    found = sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves)
    return BLOCKS * memory.block_bytes(model.graph, model.weights, SIZE, mesh), found


def test_a_block_is_what_an_engine_allocates(world, router):
    of = world["base"], world["bank"]
    counted, found = {}, {}
    for name, gates in (("none", None), ("meteora", world["gates"]), ("router", router)):
        counted[name], found[name] = counted_and_found(*of, gates)
    assert counted == found
    config = world["model"].config
    keys_and_values = config.num_layers * SIZE * 2 * config.num_kv_heads * config.head_dim * 4
    assert counted["none"] == counted["meteora"] == BLOCKS * keys_and_values
    own = FORM.depth * 2 * FORM.width + 2 * 2 * FORM.width + 2 * FORM.width  # layers, look-ups, shifts
    assert counted["router"] == BLOCKS * (keys_and_values + SIZE * own * 4)


def test_on_a_mesh_each_device_has_its_heads(world, router):
    of = world["base"], world["bank"], router
    (counted, found), (whole, whole_found) = (counted_and_found(*of, mesh_of(*axes)) for axes in ((1, 1, 2), (2, 1, 1)))
    assert (counted, whole) == (found, whole_found)
    assert counted < whole, "two devices share the heads"


def test_what_is_left_decides_over_tokens_and_blocks(world, monkeypatch):
    model = world["model"]
    how = model.graph, model.weights, model.config
    block = memory.block_bytes(*how[:2], 16, None)
    small, large = (memory.step_bytes(*how, 8, tokens, None) for tokens in (1024, 8192))
    assert small < large
    monkeypatch.setattr(memory, "platform", lambda: "gpu")
    for free, expected in ((large + 10 * block, 8192), (small + 10 * block, 1024)):
        monkeypatch.setattr(memory, "free_bytes", lambda mesh, free=free: int(free / memory.USABLE) + 1)
        assert memory.fitting(*how, 8, 16, 10, None) == (expected, 10)


def test_too_little_memory_is_said_in_a_line(world, monkeypatch):
    model = mj.load(world["base"], world["bank"], dtype="float32")
    monkeypatch.setattr(memory, "free_bytes", lambda mesh: 1 << 20)
    said = r"^memory: expected \d+\.\d\d GiB of a device beside the weights \({} blocks of 16 tokens.*found 0.00 GiB$"
    with pytest.raises(InputError, match=said.format(3)):
        model.generate([[5, 6, 7]], None, max_new_tokens=40)
    with pytest.raises(InputError, match=said.format(LEAST_BLOCKS)):
        Engine(model)


def test_in_pieces_it_is_the_same(monkeypatch):
    """Decoding rows of attention, queries of whole sequences, and the adapters of tokens that have their own."""
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    tables = jnp.asarray(rng.permutation(15).reshape(5, 3), jnp.int32)
    ends = jnp.asarray([3, 11, 0, 7, 5], jnp.int32)
    step = StepTokens(ends, tables, jnp.zeros((0,), jnp.int32), ends)
    attention = draw(5, 4, 8), draw(16, 4, 4, 8), step, 1, None
    bank = routed_lora.LoraBank(draw(2, 3, 2, 8), draw(3, 2, 10), draw(2, 3), (6, 4))
    chosen = jnp.asarray(rng.integers(-1, 3, (5, 1, 1, 2)), jnp.int32)
    product = draw(5, 1, 8), bank, Routing(chosen, draw(5, 1, 1, 2), fused=jnp.arange(5) % 2 == 0), draw(5, 1, 10)

    seen = jnp.asarray(rng.random((2, 1, 12, 12)) < 0.7)
    sequences = draw(2, 12, 4, 8), draw(2, 12, 2, 8), draw(2, 12, 2, 8), seen

    def both() -> list[np.ndarray]:
        found = jax.jit(lambda: (
            reference.paged_attention(*attention), routed_lora.routed_lora(*product), attend(*sequences, "parts")
        ))()  # fmt: skip
        return [np.asarray(z) for z in found]

    whole = both()
    monkeypatch.setattr(model_attention, "SCORES", 2 * 4 * 12 * 5)  # four queries, the next that divide 12
    monkeypatch.setattr(reference, "GATHERED", 2 * 4 * 3 * 4 * 4 * 8)  # two rows
    monkeypatch.setattr(routed_lora, "GATHERED", 2 * 4 * 2 * (2 * 2 * 8 + 2 * 10))  # two tokens
    for alike, z in zip(both(), whole, strict=True):
        np.testing.assert_allclose(alike, z, atol=1e-6)
