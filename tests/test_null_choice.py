"""Gates with a column for no adapter: the formula in float64, every form of gates, folders, training."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from extent import ALL
from flat_settings import flat
from hypothesis import given, settings
from hypothesis import strategies as st
from test_gated_model import prepared
from test_gated_model import run as routed_run
from test_routing import ROWS, torch_gated_logits
from test_training import TASKS
from worlds import NAMES, random_gates

import converters
import meteora_jax as mj
from meteora_jax.config import InputError
from meteora_jax.evaluation.tasks import Example
from meteora_jax.gate_config import GateConfig, TokenRouterForm
from meteora_jax.io.gates import SHARED_BY_ADAPTERS, load_gates, save_gates
from meteora_jax.routing import NO_ADAPTER, RoutingTrace, adapter_share, null_share
from meteora_jax.training.gates import train_gates
from meteora_jax.training.settings import Checkpointing, GateTraining
from meteora_jax.viz import dominant
from pallas_kernels.topk_gating import TopK, topk_gating

FORM = TokenRouterForm(width=32, depth=2)


SIZES = st.tuples(st.integers(1, 3), st.integers(2, 6))  # adapters a token, of the bank
FEW_SIZES = st.sampled_from([(1, 2), (2, 2), (2, 5), (3, 6)])  # each is a program
gating = jax.jit(topk_gating, static_argnames="adapters")


@settings(max_examples=25, deadline=None)
@given(SIZES if ALL else FEW_SIZES, st.sampled_from([0.5, 1.0, 20.0]), st.booleans(), st.integers(0, 2**31))
def test_top_k_softmax_with_a_null_column_equals_the_formula(sizes, temperature, narrowed, seed):
    """An adapter whose dW is zero: it competes and weighs like any other, and leaves as NO_ADAPTER."""
    rng, (chosen, adapters) = np.random.default_rng(seed), sizes
    chosen = min(chosen, adapters)
    logits = rng.integers(-3, 4, (2, 3, 2, adapters + 1)) * 1.0  # ties too
    allowed = np.ones((2, adapters), bool)
    if narrowed:
        allowed[0, rng.permutation(adapters)[: adapters - chosen]] = False
    rule = TopK(jnp.asarray(np.full(2, chosen, np.int32)), jnp.asarray(np.full(2, temperature, np.float32)), chosen)
    within = jnp.asarray(allowed) if narrowed else None
    indices, weights = map(np.asarray, gating(jnp.asarray(logits.astype(np.float32)), rule, within, adapters=adapters))
    for b, t, p in np.ndindex(2, 3, 2):
        columns = [i for i in range(adapters + 1) if i == adapters or allowed[b, i]]
        order = sorted(columns, key=lambda i: (-logits[b, t, p, i], i))[:chosen]
        want = np.exp((logits[b, t, p, order] - logits[b, t, p, order[0]]) / temperature)
        assert indices[b, t, p].tolist() == [i if i < adapters else NO_ADAPTER for i in order]
        np.testing.assert_allclose(weights[b, t, p], want / want.sum(), atol=1e-6)


@pytest.fixture(scope="module")
def null_world(tmp_path_factory, world):
    """The world's base and bank with gates that have a null column."""
    folder = tmp_path_factory.mktemp("null")
    arrays = random_gates(world["model"].config, len(NAMES) + 1, seed=8)
    save_gates(folder / "gates", GateConfig(NAMES, 2, 1.0, null=True), arrays)
    model = mj.load(world["base"], world["bank"], folder / "gates", dtype="float32")
    return {**world, "gates": folder / "gates", "gate_arrays": arrays, "model": model}


@pytest.mark.parametrize(("chosen", "temperature"), [(1, 1.0), (2, 4.0)])
def test_a_gated_model_with_a_null_column_equals_a_float64_transcription(null_world, chosen, temperature):
    """What the null choice weighs is mixed with nothing."""
    ours = np.asarray(null_world["model"].logits(ROWS, mj.Gates(chosen, temperature)))
    for row, logits in zip(ROWS, ours, strict=True):
        want = torch_gated_logits(null_world, row, chosen, temperature)
        assert np.abs(logits[: len(row)] - want).max() <= 2e-4


@pytest.mark.parametrize(("width", "router"), [(512, mj.Gates(2)), (1, mj.Gates(1, within=("apple", "birch")))])
def test_packed_weights_have_the_null_column_too(null_world, router, width):
    model = null_world["model"]
    wanted, found = routed_run(model, router), routed_run(prepared(model, width), router)
    assert {NO_ADAPTER, 0, 1} <= {*np.unique(wanted[1])}
    assert np.array_equal(found[1], wanted[1])
    assert np.allclose(found[2], wanted[2], atol=1e-4)
    assert np.abs(found[0] - wanted[0]).max() <= 1e-4 * np.abs(wanted[0]).max()


def test_gates_folders_say_whether_they_have_one(tmp_path, null_world):
    config, arrays = load_gates(null_world["gates"], null_world["model"].config, NAMES[::-1])
    assert (config.null, config.columns) == (True, 5)
    for p, gate in arrays.items():  # the bank's order, and the null column last
        assert np.array_equal(gate, null_world["gate_arrays"][p][..., [3, 2, 1, 0, 4]])
    raw = json.loads((null_world["gates"] / "gates.json").read_text())
    assert raw["null"] is True
    assert GateConfig.from_json({k: v for k, v in raw.items() if k != "null"}, "x").columns == 4
    assert "null" not in GateConfig(NAMES, 2, 1.0, FORM).to_json()
    assert GateConfig.from_json(GateConfig(NAMES, 2, 1.0, FORM, True).to_json(), "x").null
    with pytest.raises(InputError, match="x: null: expected true or false, found 'yes'"):
        GateConfig.from_json({**raw, "null": "yes"}, "x")
    save_gates(tmp_path / "wrong", GateConfig(NAMES, 2, 1.0), null_world["gate_arrays"])
    with pytest.raises(InputError, match="shape"):
        load_gates(tmp_path / "wrong", null_world["model"].config, NAMES)


def test_gates_of_before_never_choose_nothing(world):
    assert not world["model"].gates.null
    assert (routed_run(world["model"], mj.Gates(2))[1] >= 0).all()


def test_the_original_s_layout_has_no_place_for_it(tmp_path, null_world):
    with pytest.raises(InputError, match="null: expected gates that always choose an adapter, found a null choice"):
        converters.export_gates(null_world["base"], null_world["bank"], null_world["gates"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_trace_tells_an_adapter_s_share_from_the_base_s():
    indices = np.array([[0, -1], [-1, 1], [-1, -1], [-1, -1]])[:, None, None]
    weights = np.array([[0.75, 0.25], [0.75, 0.25], [1.0, 0.0], [0.0, 0.0]], np.float32)[:, None, None]
    trace = RoutingTrace(("a", "b"), ("q_proj",), ("w", "x", "y", "z"), 4, indices, weights)
    np.testing.assert_allclose(adapter_share(trace), [[0.75, 0], [0, 0.25], [0, 0], [0, 0]])
    np.testing.assert_allclose(null_share(trace), [0.25, 0.75, 1, 0])
    assert dominant(trace).tolist() == [0, NO_ADAPTER, NO_ADAPTER, NO_ADAPTER]


OTHERS = [Example(f"Tell me about the sea {i}, please.\n", f"Waves {i} roll") for i in range(20)]
HOW = dict(form=FORM, lm_loss=False, prompt_loss=False, segment_weight=0.5, response_weight=0.5, max_length=200,
           batch_size=8, beta=5.0)  # fmt: skip


@pytest.fixture(scope="module")
def learnt(tmp_path_factory, world):
    """A token router trained with background: its folder, its first record and its last."""
    folder = tmp_path_factory.mktemp("learnt")
    final = train_gates(
        world["base"], world["bank"], TASKS, folder / "gates",
        flat(GateTraining, steps=60, learning_rate=1e-2, composite=0.2, composite_sizes=(2, 2), **HOW),
        dtype="float32", checkpointing=Checkpointing(log=folder / "log.jsonl"), background=OTHERS[:15],
    )  # fmt: skip
    return folder / "gates", json.loads((folder / "log.jsonl").read_text().splitlines()[0]), final


def shares(folder, world, text):
    """Of a text's tokens: those that the base answers alone, and those that each adapter leads."""
    model = mj.load(world["base"], world["bank"], folder, dtype="float32")
    (done,) = model.generate([text], mj.Gates(2), max_new_tokens=1)
    leaders = dominant(done.routing)[: done.prompt_length]
    return (leaders == NO_ADAPTER).mean(), [(leaders == i).mean() for i in range(len(NAMES))]


def test_background_tokens_learn_to_choose_none(world, learnt):
    folder, first, final = learnt
    assert final["gate"] < 0.3 * first["gate"]
    for example in OTHERS[15:]:  # not trained on
        assert shares(folder, world, example.prompt + example.response)[0] > 0.9
    for i, name in enumerate(NAMES):
        alone, own = shares(folder, world, TASKS[name][3].prompt + TASKS[name][3].response)
        assert alone < 0.2
        assert own[i] > 0.6


def test_an_extension_adds_the_null_column_and_keeps_it(tmp_path, world, learnt):
    config = world["model"].config
    _, whole = load_gates(learnt[0], config, NAMES)

    def part(at):
        return {k: v if k in SHARED_BY_ADAPTERS else np.ascontiguousarray(v[..., at]) for k, v in whole.items()}

    settings = flat(GateTraining, steps=2, learning_rate=1e-2, **HOW)
    # (names, whether they have it, background, columns kept)
    for names, null, background, at in [
        (NAMES, False, OTHERS, [0, 1, 2, 3]), (NAMES[:3], True, OTHERS, [0, 1, 2, 4]),
        (NAMES[:3], True, (), [0, 1, 2, 4]),
    ]:  # fmt: skip
        save_gates(tmp_path / "old", GateConfig(names, 2, 1.0, FORM, null), part(at))
        train_gates(world["base"], world["bank"], TASKS, tmp_path / "new", settings, dtype="float32",
                    extend=tmp_path / "old", background=background)  # fmt: skip
        grown, tensors = load_gates(tmp_path / "new", config, NAMES)
        assert grown.null
        for name, columns in tensors.items():  # what all columns read learns what is new
            kept = columns if name in SHARED_BY_ADAPTERS else columns[..., at]
            assert np.array_equal(kept, part(at)[name]) == (name not in SHARED_BY_ADAPTERS)
        new = [i for i in range(5) if i not in at]
        assert all(not np.array_equal(tensors[f"token_router.{k}"][..., new], whole[f"token_router.{k}"][..., new])
                   for k in ("task", "previous"))  # fmt: skip
    with pytest.raises(InputError, match="expected a part of the bank's adapters, found all"):
        train_gates(world["base"], world["bank"], TASKS, tmp_path / "x", settings, dtype="float32", extend=learnt[0],
                    background=OTHERS)  # fmt: skip


@pytest.mark.exhaustive("learns the target of the token router above; these gates equal float64 above")
def test_gates_at_every_projection_learn_it_too(tmp_path, world):
    settings = flat(GateTraining, steps=12, batch_size=8, learning_rate=5e-2, max_length=200)
    log = tmp_path / "log.jsonl"
    final = train_gates(world["base"], world["bank"], TASKS, tmp_path / "gates", settings, dtype="float32",
                        background=OTHERS, checkpointing=Checkpointing(log=log))  # fmt: skip
    assert final["gate"] < 0.9 * json.loads(log.read_text().splitlines()[0])["gate"]
    assert shares(tmp_path / "gates", world, OTHERS[0].prompt)[0] > 0.5
    assert dataclasses.asdict(load_gates(tmp_path / "gates", world["model"].config, NAMES)[0])["null"]
