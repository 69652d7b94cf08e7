"""What is in a slot: the arrays that a load puts there, ranks in several slots, the columns of a token router."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapter_banks import rows_of
from flax import nnx
from test_token_router import FORM, arrays_of

import converters
import meteora_jax as mj
from meteora_jax.config import InputError
from meteora_jax.engine.slot_weights import SlotWeights
from meteora_jax.execution import ExecutionConfig
from meteora_jax.gate_config import GateConfig
from meteora_jax.io.gates import save_gates
from meteora_jax.model.llama import pack, with_execution
from meteora_jax.routing import adapter_share
from meteora_jax.routing.retrieval import Composed
from pallas_kernels.decode_step.triton_gpu import StepLimits


def test_a_token_router_chooses_among_what_was_named(world: dict[str, Any], tmp_path: Path):
    """Its columns stay on the device, all of them; those of what lies in the slots are read."""
    config, names = world["model"].config, world["model"].adapter_names
    save_gates(tmp_path, GateConfig(names, 2, 1.0, FORM), arrays_of(FORM, config))
    given = world["base"], world["bank"], tmp_path
    whole, model = mj.load(*given, dtype="float32"), mj.load(*given, dtype="float32", adapter_slots=2)
    chosen = []
    for of in (whole, model):
        engine, router = rows_of(of), mj.Gates(1, within=(names[3], names[1]))
        handles = [engine.submit(of.request([7, 30 + i, 9, 60 + i], router, 1, trace=True)) for i in range(4)]
        traces = [of.completion(h.wait(), "", ()).routing for h in handles]  # one token: no decoding step is compiled
        chosen.append([np.asarray(t.adapter_names)[t.indices[:4]].tolist() for t in traces if t is not None])
    assert chosen[0] == chosen[1]
    assert set(np.unique(chosen[1])) == {names[1], names[3]}  # each of them somewhere


def test_a_large_adapter_takes_several_slots_and_a_small_one_does_not_pay(world: dict[str, Any]):
    """Ranks 4, 2, 8, 4 in slots of rank 2: two, one, four and two of them."""
    whole = mj.load(world["base"], world["bank"], dtype="float32")
    model = mj.load(world["base"], world["bank"], dtype="float32", adapter_slots=5, adapter_rank=2)
    pool, engine, right = model.pool, rows_of(model), rows_of(whole)
    assert pool is not None
    assert [v.slots for v in pool.versions.find(pool.names())] == [2, 1, 4, 2]
    assert model.weights["layers"]["qkv"]["lora_a"].shape[2:4] == (5, 2)
    for weights in ({"cedar": 0.8, "birch": 0.4}, {"apple": 0.8, "daisy": 0.5}):
        prompts, router = [[7, 8 + i, 40, 9 * i + 3] for i in range(6)], mj.Fixed(weights)
        found, wanted = (  # one token each: no decoding step is compiled
            [h.wait() for h in [e.submit(m.request(p, router, 1, trace=True)) for p in prompts]]
            for e, m in ((engine, model), (right, whole))
        )
        assert [p.tokens for p in found] == [p.tokens for p in wanted]
        assert len({tuple(p.tokens) for p in found}) > 2
        pool.table.check()
        traces = [m.completion(p[0], "", ()).routing for m, p in ((model, found), (whole, wanted))]
        shares = [dict(zip(t.adapter_names, adapter_share(t)[0], strict=True)) for t in traces if t is not None]
        assert shares[0] == pytest.approx({n: shares[1][n] for n in weights})
    for router, expected in (
        (Composed((("cedar", 1.0),), True), "one slot each to be fused"),
        (mj.Fixed({"cedar": 1.0, "daisy": 0.5}), "found 2 of 6 slots"),
    ):
        with pytest.raises(InputError, match=expected):
            model.request([7], router, 2)
    with pytest.raises(InputError, match="at most 1 slots of rank 4 beside gates, found cedar"):
        mj.load(world["base"], world["bank"], world["gates"], adapter_slots=3, adapter_rank=4)


@pytest.mark.parametrize("dense_width", [None, 512, 8], ids=["plain", "packed", "packed, wide"])
def test_slots_hold_what_a_load_puts_there(world: dict[str, Any], tmp_path: Path, dense_width: int | None):
    """Every adapter written into another slot than its own: bit for bit the bank in that order, gates' columns too."""
    order = [2, 0, 3, 1]
    names = tuple(np.asarray(world["model"].adapter_names)[order])
    converters.take_adapters(world["bank"], tmp_path / "bank", names)
    given: dict[str, Any] = dict(gates=world["gates"], dtype="bfloat16")
    model = mj.load(world["base"], world["bank"], adapter_slots=4, **given)
    wanted = mj.load(world["base"], tmp_path / "bank", **given)
    (graph, state), (_, right) = (
        (m.graph, m.weights) if dense_width is None else packed_as(m, dense_width) for m in (model, wanted)
    )
    pool = model.pool
    written = SlotWeights(graph, state, model.config, None, router=False)
    for slot, number in enumerate(order):
        version = pool.versions[number]
        columns = {path: z[..., number] for path, z in pool._columns.items()}
        (staged,) = written.stage(version.bank.adapter(version.place), columns)
        written.write(staged, slot)
    found, expected = ({p: x[...] for p, x in nnx.to_flat_state(s)} for s in (state, right))
    assert found.keys() == expected.keys()
    for path, array in expected.items():
        np.testing.assert_array_equal(np.asarray(found[path]), np.asarray(array), err_msg=str(path))


def packed_as(model: mj.Meteora, dense_width: int) -> tuple[Any, Any]:
    """As on a GPU in 16 bit."""
    execution = ExecutionConfig(step=StepLimits(), dense_width=dense_width)
    return pack(with_execution(model.graph, model.weights, execution), model.weights)
