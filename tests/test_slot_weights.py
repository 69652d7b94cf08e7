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
from meteora_jax.io.stored_bank import empty_slots
from meteora_jax.loading import fitting_slots
from meteora_jax.model.layout import pack, with_execution
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
    with pytest.raises(InputError, match="found 2 of 6 slots"):
        model.request([7], mj.Fixed({"cedar": 1.0, "daisy": 0.5}), 2)
    with pytest.raises(InputError, match="at most 3 slots of rank 2, found cedar"):
        mj.load(world["base"], world["bank"], world["gates"], adapter_slots=3, adapter_rank=2)


def test_adapters_of_several_slots_are_fused_and_chosen_by_gates(world: dict[str, Any]):
    """Ranks 4, 2, 8, 4 in slots of rank 2, in one batch with a mixture and the base: what the whole bank says."""
    given = world["base"], world["bank"], world["gates"]
    whole = mj.load(*given, dtype="float32")
    model = mj.load(*given, dtype="float32", adapter_slots=9, adapter_rank=2)
    prompts = [[7, 8 + i, 40, 9 * i + 3, 100 + i] for i in range(6)]
    routers = [
        Composed((("cedar", 0.7), ("birch", 0.4)), True), mj.Gates(2), mj.Fixed({"daisy": 0.6, "cedar": 0.5}), None,
        mj.Gates(1, within=("cedar", "apple")), Composed((("cedar", 0.5), ("apple", 0.8), ("daisy", 0.3)), True),
    ]  # fmt: skip
    found, wanted = (np.asarray(m.logits(prompts, routers)) for m in (model, whole))
    np.testing.assert_allclose(found, wanted, rtol=2e-4, atol=2e-4)
    alone = np.asarray(whole.logits(prompts, [mj.Fixed(dict(r.adapters)) if isinstance(r, Composed) else r
                                              for r in routers]))  # fmt: skip
    assert np.abs(alone - wanted)[[0, 5]].max() > 0.01  # fused is not mixed
    handles = [  # one token: no decoding step is compiled
        [(e.submit(m.request(p, r, 1, trace=True)), m) for p, r in zip(prompts, routers, strict=True)]
        for e, m in ((rows_of(model), model), (rows_of(whole), whole))
    ]
    said, right = ([(h.wait(), m) for h, m in own] for own in handles)
    assert [p.tokens for p, _ in said] == [p.tokens for p, _ in right]
    traced, expected = (m.completion(p, "", ()).routing for p, m in (said[1], right[1]))
    assert traced is not None
    assert expected is not None
    shares = [dict(zip(t.adapter_names, adapter_share(t)[0], strict=True)) for t in (traced, expected)]
    assert shares[0] == pytest.approx({n: w for n, w in shares[1].items() if n in shares[0]}, abs=1e-4)
    assert sum(shares[0].values()) == pytest.approx(1, abs=1e-4)


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


def test_automatic_slots_go_by_the_memory_beside_the_base(world: dict[str, Any]):
    config, bank = world["model"].config, world["model"].bank
    assert bank is not None
    slot, kind = empty_slots(bank, 1, rank=2), np.dtype("float32")
    model = mj.load(world["base"], world["bank"], dtype="float32", adapter_slots=1, adapter_rank=8)
    state = {"/".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(model.weights)}
    base = sum(x[...].nbytes for name, x in state.items() if "lora" not in name)
    each = sum(x[...].nbytes for name, x in state.items() if name.endswith(("lora_a", "lora_b"))) // 4  # rank 8
    assert [fitting_slots(config, bank, slot, kind, base + 2 * n * each + each) for n in (0, 1, 3, 7, 500)] == [
        1,
        1,
        3,
        7,
        9,
    ]
    assert fitting_slots(config, bank, slot, kind, None) == 9
    assert fitting_slots(config, bank, slot, kind, 0) == 1


def packed_as(model: mj.Meteora, dense_width: int) -> tuple[Any, Any]:
    """As on a GPU in 16 bit."""
    execution = ExecutionConfig(step=StepLimits(), dense_width=dense_width)
    return pack(with_execution(model.graph, model.weights, execution), model.weights)
