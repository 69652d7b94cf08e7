"""Gates that read their sequence's mean, look back through a stream of their own, take the logits of the layer before,
or serve a group: against torch in float64, packed, ragged, cached and on a mesh. Run as a script it is a process with
the devices.
"""

import dataclasses
import functools
import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from gate_gradients import SHARED, loss_and_gradients, numbers, turns
from test_sharding import devices
from test_training import TASKS
from test_training_mesh import BETA, ROWS, packed, sequences
from tiny import edit_json
from worlds import NAMES

import converters
import meteora_jax as mj
from meteora_jax.adapters import GateParam
from meteora_jax.checkpoint import (
    SHARED_BY_ADAPTERS,
    fresh_gates,
    gate_shapes,
    load_bank,
    load_gates,
    save_bank,
    save_gates,
    split_gates,
)
from meteora_jax.config import PROJECTIONS, InputError
from meteora_jax.evaluation.tasks import Example
from meteora_jax.gate_config import GateConfig, GateForm
from meteora_jax.generation import observe_routing
from meteora_jax.kv_cache import EMPTY
from meteora_jax.llama import prepare_gates
from meteora_jax.routing.gates import BoundGates
from meteora_jax.routing.memory import prefix_sums
from meteora_jax.sharding import fetch, make_mesh, place_rows, use_mesh
from meteora_jax.training.data import CUT, NO_TASK, Mixture
from meteora_jax.training.loop import GateTraining, train_gates
from meteora_jax.training.loss import turn_before, turn_number
from meteora_jax.training.step import gradients
from pallas_kernels.routed_lora import gated

FORMS = {
    "mean": GateForm(input="prefix-mean"),
    "carry": GateForm(carry=True),
    "shared": GateForm(shared=True),
    "bias": GateForm(bias=True),
    "stream": GateForm(stream=16),
    "alone": GateForm("stream", bias=True, stream=16),
    "all": GateForm("prefix-mean", True, True, True, 8),
    "ahead": GateForm("embedding", stream=64, depth=3),
    "twice": GateForm("embedding", stream=64, depth=3, rounds=2, turns=4),
}
PROMPTS = [[5, 6, 7, 8, 9, 300, 17], [11, 12, 13], list(range(40, 75)), [200]]


def arrays_of(form, config, seed=9):
    """Small enough that rounding does not blow up in their softmax, biases so large that they decide."""
    rng = np.random.default_rng(seed)
    sizes = {"ahead.point": 3.0, "stream.read": 0.4, "stream.own": 0.4, "stream.out": 0.4}
    size = lambda key: 1.0 if key.endswith("bias") else sizes.get(key, 0.2)  # noqa: E731
    draw = lambda key, shape: size(key) * rng.standard_normal(shape)  # noqa: E731
    return {key: draw(key, shape).astype(np.float32) for key, shape in gate_shapes(form, config, len(NAMES)).items()}


@pytest.fixture(scope="module")
def formed(world, tmp_path_factory):
    """{name: (GATES folder, its arrays, the model)} of every form."""
    folder, made = tmp_path_factory.mktemp("forms"), {}
    for name, form in FORMS.items():
        arrays = arrays_of(form, world["model"].config)
        save_gates(folder / name, GateConfig(NAMES, 2, 1.0, form), arrays)
        made[name] = folder / name, arrays, mj.load(world["base"], world["bank"], folder / name, dtype="float32")
    return made


def computed(model, mesh=None, accumulate=1, remat=True, **how):
    """Losses and the gates' gradients of two sequences a row."""
    graph, params, frozen = nnx.split(nnx.merge(model.graph, model.weights), GateParam, ...)
    router = place_rows(jax.tree.map(np.asarray, model.bind(mj.Gates(2), ROWS // accumulate)), mesh)
    run = jax.jit(
        lambda frozen, params, batch, router: gradients(
            graph, frozen, params, batch, router, BETA, dtype=jnp.float32, remat=remat, accumulate=accumulate, **how
        )
    )
    with use_mesh(mesh):
        losses, grads = run(frozen, params, place_rows(packed(), mesh), router)
    flat = {tuple(map(str, path)): fetch(leaf[...]) for path, leaf in nnx.to_flat_state(grads)}
    return {"lm": fetch(losses.lm), "gate": fetch(losses.gate), **split_gates(flat)}


def check(found, expected):
    lm, gate, grads = expected
    assert abs(float(found["lm"]) - lm) <= 1e-5
    assert abs(float(found["gate"]) - gate) <= 1e-5
    assert found.keys() - {"lm", "gate"} == grads.keys()
    for name, grad in grads.items():
        assert np.abs(grad).max() > 1e-3
        assert np.abs(found[name] - grad).max() <= 1e-5 * max(1.0, np.abs(grad).max()), name


@pytest.fixture(scope="module")
def expected(world, formed):
    return {
        name: loss_and_gradients(world, arrays, sequences(), BETA, 2, carry=FORMS[name].carry)
        for name, (_, arrays, _) in formed.items()
    }


@pytest.mark.parametrize("name", FORMS)
def test_loss_and_gradients_of_packed_rows_equal_torch_sequence_by_sequence(formed, expected, name):
    check(computed(formed[name][2]), expected[name])


def test_in_parts_and_without_recomputing_it_is_the_same(formed, expected):
    check(computed(formed["all"][2], accumulate=4, remat=False), expected["all"])


@pytest.mark.parametrize(
    "how",
    [
        dict(lm_loss=False),
        dict(answer_share=0.7),
        dict(answer_share=0.6, turn_share=0.4),
        dict(lm_loss=False, answer_share=0.2, order=0.4),
    ],
)
@pytest.mark.parametrize("name", ["ahead", "twice"])
def test_the_gate_term_alone_and_what_answers_count_in_it(world, formed, how, name):
    _, arrays, model = formed[name]
    lm, gate, grads = loss_and_gradients(world, arrays, sequences(), BETA, 2, **how)
    found = computed(model, accumulate=2, **how)
    assert (float(found["lm"]) == 0) == ("lm_loss" in how)
    assert 0 < sum(int(s.loss.sum()) for s in sequences()) < sum(len(s.loss) for s in sequences())
    check({**found, "lm": lm}, (lm, gate, grads))


def main(base: str, bank: str, gates: str, dest: str) -> None:
    mesh = make_mesh(2, 2, 2)
    model = mj.load(base, bank, gates, mesh=mesh, dtype="float32")
    np.savez(dest, **computed(model, mesh))
    said = [c.token_ids for c in model.generate(PROMPTS, mj.Gates(2), max_new_tokens=8)]
    Path(dest).with_suffix(".json").write_text(json.dumps(said))


@pytest.mark.parametrize("name", ["all", "ahead", "twice"])
def test_eight_devices_compute_and_generate_as_one(world, formed, expected, tmp_path, name):
    folder, _, model = formed[name]
    command = [sys.executable, __file__, *map(str, (world["base"], world["bank"], folder, tmp_path / "found.npz"))]
    done = subprocess.run(command, env=devices(8), capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-4000:]
    check(np.load(tmp_path / "found.npz"), expected[name])
    alone = [c.token_ids for c in model.generate(PROMPTS, mj.Gates(2), max_new_tokens=8)]
    assert json.loads((tmp_path / "found.json").read_text()) == alone


LONGEST = 48


def whole(model, tokens, router):
    """Indices, weights [T, L, P, C] and logits [T, V] of a sequence that is read at once, alone."""
    tokens, bound = np.pad(tokens, (0, LONGEST - len(tokens)), constant_values=EMPTY), model.bind(router, 1)
    at = np.where(tokens == EMPTY, EMPTY, np.arange(LONGEST))
    args = jnp.asarray(np.maximum(tokens, 0)[None], jnp.int32), jnp.asarray(at[None], jnp.int32)
    indices, weights, logits = read(model.graph, model.weights, *args, bound)
    indices, weights = (np.moveaxis(np.asarray(x)[:, 0], 1, 0) for x in (indices, weights))
    return indices, weights, np.asarray(logits)[0]


@functools.partial(jax.jit, static_argnums=0)
def read(graph, weights, tokens, at, router):
    module = nnx.merge(graph, weights)
    out = module(tokens, at, router, observe=observe_routing)
    return *out.observed, module.logits(out.hidden, None)


@pytest.mark.parametrize("name", ["mean", "carry", "stream", "alone", "all", "ahead", "twice"])
def test_a_ragged_batch_decoded_with_the_cache_routes_as_each_sequence_at_once(formed, name):
    model = formed[name][2]
    routers = [mj.Gates(2), mj.Gates(2, 5.0), mj.Gates(2), mj.Gates(2, within=("birch", "daisy", "apple"))]
    done = model.generate(PROMPTS, routers, max_new_tokens=10)
    for prompt, router, c in zip(PROMPTS, routers, done, strict=True):
        sequence = prompt + c.token_ids
        indices, weights, logits = whole(model, sequence, router)
        fed = len(sequence) - (c.finish_reason == "length")
        assert np.array_equal(c.routing.indices[:fed], indices[:fed])
        assert np.allclose(c.routing.weights[:fed], weights[:fed], atol=1e-5)
        said = logits[len(prompt) - 1 : len(sequence) - 1].argmax(-1).tolist()
        assert said == c.token_ids


def test_gates_beside_other_routers_in_one_batch(formed):
    model = formed["all"][2]
    routers = [mj.Gates(2), mj.Fixed("cedar"), None, mj.Gates(1)]
    together = model.generate(PROMPTS, routers, max_new_tokens=6)
    alone = {i: model.generate(PROMPTS, routers[i], max_new_tokens=6)[i] for i in range(4)}
    assert [c.token_ids for c in together] == [alone[i].token_ids for i in range(4)]


@pytest.mark.parametrize("width", [gated.DENSE_WIDTH, 1], ids=["gates and shrinks", "gates alone"])
@pytest.mark.parametrize("joined", [False, True], ids=["slim", "joined"])
@pytest.mark.parametrize("name", ["bias", "shared", "stream", "alone", "all", "ahead", "twice"])
def test_the_slim_matrix_serves_the_forms_that_remember_a_stream_at_most(monkeypatch, formed, name, joined, width):
    """The others keep gates and adapters apart."""
    monkeypatch.setattr(gated, "DENSE_WIDTH", width)
    jax.clear_caches()  # a program for the other width looks the same from outside
    model = formed[name][2]
    graph, weights = prepare_gates(model.graph, model.weights, joined)
    held = nnx.merge(graph, weights).layers
    served = FORMS[name].is_served and (not FORMS[name].alone or width > 1)  # no gates' columns, no A's
    assert (held.o.slim is not None, held.o.joined > 0) == (served and not joined, served and joined)
    assert held.qkv.beside == (4 * 16 if joined and name in ("stream", "alone") else 0)
    found = whole(dataclasses.replace(model, graph=graph, weights=weights), PROMPTS[2], mj.Gates(2))
    expected = whole(model, PROMPTS[2], mj.Gates(2))
    n = len(PROMPTS[2])
    assert np.array_equal(found[0][:n], expected[0][:n])
    assert np.allclose(found[1][:n], expected[1][:n], atol=1e-4)
    assert np.allclose(found[2][:n], expected[2][:n], atol=1e-4 * np.abs(expected[2]).max())


def test_prefix_sums_equal_numpy():
    rng = np.random.default_rng(0)
    values, before = rng.standard_normal((3, 9, 2)), rng.standard_normal((3, 2))
    positions = np.asarray([[0, 1, 2, 3, 0, 1, 0, -1, -1], [5, 6, 7, 0, 1, 2, 3, 4, 5], [4, -1, -1, *[-1] * 6]])
    expected = np.zeros(values.shape)
    for b in range(3):
        total = before[b]
        for t in range(9):
            total = 0 if positions[b, t] == 0 else total
            total = total + values[b, t] * (positions[b, t] >= 0)
            expected[b, t] = total
    args = jnp.asarray(values, jnp.float32), jnp.asarray(positions, jnp.int32), jnp.asarray(before, jnp.float32)
    assert np.allclose(prefix_sums(*args), expected, atol=1e-6)
    one = prefix_sums(*(x[:, 1:2] if x.ndim > 1 and x.shape[1] == 9 else x for x in args))
    assert np.allclose(one[:, 0], np.where(positions[:, 1:2] >= 0, values[:, 1], 0) + before, atol=1e-6)


def part(arrays, at):
    """The columns `at` of gates; what all adapters share stays whole."""
    return {k: v if k in SHARED_BY_ADAPTERS else np.ascontiguousarray(v[..., at]) for k, v in arrays.items()}


SETTINGS = dict(steps=4, batch_size=8, learning_rate=3e-2, max_length=100, beta=5.0)


def test_training_writes_the_form_and_learns(tmp_path, world):
    how = dict(gate_input="prefix-mean", carry_logits=True, shared_gates=True, gate_stream=8)
    settings = GateTraining(**{**SETTINGS, "steps": 30}, **how)
    final = train_gates(world["base"], world["bank"], TASKS, tmp_path / "gates", settings, dtype="float32",
                        log=tmp_path / "log.jsonl")  # fmt: skip
    first = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[0])
    assert final["gate"] < 0.7 * first["gate"]
    described = json.loads((tmp_path / "gates" / "gates.json").read_text())
    assert described["format"] == "meteora-gates-2"
    assert described["form"] == {"input": "prefix-mean", "carry": True, "shared": True, "stream": 8}
    model_config = world["model"].config
    config, _ = load_gates(tmp_path / "gates", model_config, NAMES)
    assert config.form == settings.form
    # what extends them is of their form, or refused
    save_gates(
        tmp_path / "one", GateConfig(NAMES[:1], 2, 1.0, config.form), part(arrays_of(config.form, model_config), [0])
    )
    for other, said in ((dict(carry_logits=True), "carry"), (dict(gate_input="prefix-mean"), "prefix-mean")):
        other = GateTraining(steps=1, batch_size=2, **other)
        with pytest.raises(InputError, match=f"form: expected .*{said}.*as asked for"):
            train_gates(
                world["base"], world["bank"], TASKS, tmp_path / "x", other, dtype="float32", extend=tmp_path / "one"
            )


@pytest.mark.parametrize("form", [GateForm(), FORMS["all"]], ids=["original", "all"])
def test_an_extension_may_raise_all_new_columns_by_one_scalar(tmp_path, world, form):
    config, at, new = world["model"].config, [2, 0], [1, 3]
    old = {k: 0.3 * v for k, v in part(arrays_of(form, config), at).items()}
    save_gates(tmp_path / "old", GateConfig(("cedar", "apple"), 2, 1.0, form), old)
    settings = GateTraining(**SETTINGS, extend_bias=True)
    train = lambda dest, how: train_gates(  # noqa: E731
        world["base"], world["bank"], TASKS, dest, how, dtype="float32", extend=tmp_path / "old"
    )
    train(tmp_path / "new", settings)
    grown, tensors = load_gates(tmp_path / "new", config, NAMES)
    assert grown.form == dataclasses.replace(form, bias=True)
    for name in [n for n in SHARED_BY_ADAPTERS if n in tensors]:  # what the old columns read keeps every bit, too
        assert np.array_equal(tensors.pop(name), old[name])
    for name, columns in tensors.items():
        if not name.endswith(".bias"):
            assert np.array_equal(columns[..., at], old[name])
            continue
        assert np.array_equal(columns[..., at], old[name] if form.bias else np.zeros_like(columns[..., at]))
        assert np.array_equal(columns[:, 1], columns[:, 3])
        assert np.abs(columns[:, new]).min() > 0
    # one scalar: the sum of the new columns' gradients moves it
    with pytest.raises(InputError, match="extend_bias: expected gates to extend"):
        train_gates(world["base"], world["bank"], TASKS, tmp_path / "x", settings, dtype="float32")
    # without it the old biases stay, and new columns have none
    train(tmp_path / "plain", GateTraining(**SETTINGS))
    plain, tensors = load_gates(tmp_path / "plain", config, NAMES)
    assert plain.form == form
    for name, columns in tensors.items():
        if name in SHARED_BY_ADAPTERS:
            assert np.array_equal(columns, old[name])
            continue
        assert np.array_equal(columns[..., at], old[name])
        assert name.endswith(".bias") == (not columns[..., new].any())


def test_a_scalar_of_all_new_columns_has_the_gradient_of_one(world, formed):
    """One step of plain descent on the scalar, by finite differences of the loss."""
    from meteora_jax.training.step import _level, _only

    model = formed["bias"][2]
    graph, params, frozen = nnx.split(nnx.merge(model.graph, model.weights), GateParam, ...)
    batch, router = jax.tree.map(jnp.asarray, packed()), model.bind(mj.Gates(4), ROWS)
    columns = np.asarray([False, True, False, True])
    loss = lambda p: gradients(graph, frozen, p, batch, router, BETA, dtype=jnp.float32, remat=True)[0].loss  # noqa: E731
    _, grads = gradients(graph, frozen, params, batch, router, BETA, dtype=jnp.float32, remat=True)
    only = _only(grads, columns, True)

    def moved(e):
        flat, raised = nnx.to_flat_state(params), e * columns[None, None]
        return nnx.from_flat_state(
            [(p, leaf.replace(leaf[...] + raised) if p[-1] == "gate_bias" else leaf) for p, leaf in flat]
        )

    slope = (float(loss(moved(1e-2))) - float(loss(moved(-1e-2)))) / 2e-2
    found = [leaf[...] for path, leaf in nnx.to_flat_state(only) if path[-1] == "gate_bias"]
    assert sum(float(jnp.sum(x)) for x in found) == pytest.approx(slope, rel=1e-2)
    assert not any(np.asarray(x)[..., [0, 2, 3]].any() for x in found)
    levelled = [leaf[...] for path, leaf in nnx.to_flat_state(_level(moved(0.0), columns)) if path[-1] == "gate_bias"]
    assert all(np.array_equal(x[..., 1], x[..., 3]) for x in map(np.asarray, levelled))


def test_the_originals_layout_refuses_other_forms_by_name(tmp_path, world, formed):
    """(A bank that is the original's own in all else.)"""
    model = world["model"]
    zeros = {k: 0.0 * v for k, v in arrays_of(FORMS["bias"], model.config).items()}
    save_gates(tmp_path / "zero", GateConfig(NAMES, 2, 1.0, FORMS["bias"]), zeros)
    for folder, said in (
        (formed["mean"][0], "form: expected MeteoRA's"),
        (formed["carry"][0], "'carry': True"),
        (formed["shared"][0], "'shared': True"),
        (formed["bias"][0], "biases of 0"),
        (tmp_path / "zero", "scale: expected one for all adapters"),  # the bank's own, beyond the gates
    ):
        with pytest.raises(InputError, match=said):
            converters.export_gates(world["base"], world["bank"], folder, tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_gates_of_the_original_form_are_written_as_ever(tmp_path):
    described = GateConfig(NAMES, 2, 1.0).to_json()
    assert described == {"format": "meteora-gates-1", "names": NAMES, "top_k": 2, "temperature": 1.0}
    assert set(SHARED) == set(PROJECTIONS)
    for change, said in (
        ({"form": {"input": "sideways"}}, "malformed"),
        ({"form": {"carry": 1}}, "malformed"),
        ({"form": {"stream": 12}}, "malformed"),
        ({"form": {"input": "stream"}}, "malformed"),
        ({"form": {"input": "stream", "stream": 8, "shared": True}}, "malformed"),
        ({"form": {"kind": "x"}}, "malformed"),
        ({"format": "meteora-gates-3"}, "expected 'meteora-gates-1' or '-2'"),
    ):
        path = tmp_path / "gates.json"
        path.write_text(json.dumps({**GateConfig(NAMES, 2, 1.0, FORMS["all"]).to_json()}))
        edit_json(path, **change)
        with pytest.raises(InputError, match=said):
            GateConfig.from_json(json.loads(path.read_text()), str(path))


def test_whose_turn_it_was_before_and_which_it_is():
    blocks = [[3, 3, 0, 0, 5, 3, 0, 0, 5], [2, 2, 2], [0, 1, 0, 1], [4, 2, 2, 4, 2, 2]]
    rng = np.random.default_rng(2)
    tasks, segments = np.full((6, 60), NO_TASK), np.zeros((6, 60), int)
    for b in range(6):
        row, parts = [], []
        for s in range(4):
            own = list(blocks[rng.integers(4)])
            own = [NO_TASK, NO_TASK, *own, NO_TASK, *blocks[rng.integers(4)]] if rng.random() < 0.5 else own
            row, parts = row + own, parts + [s + 1] * len(own)
        tasks[b, : len(row)], segments[b, : len(row)] = row[:60], parts[:60]
    found = turn_before(jnp.asarray(tasks), jnp.asarray(segments), 9)
    assert np.array_equal(np.asarray(found)[tasks != NO_TASK], turns(tasks, segments, 9)[tasks != NO_TASK])
    which = np.asarray(turn_number(jnp.asarray(tasks), jnp.asarray(segments), 3))
    assert np.array_equal(which[tasks != NO_TASK], numbers(tasks, segments, 3)[tasks != NO_TASK])
    row, one = jnp.asarray([blocks[0]]), jnp.ones((1, 9), int)
    assert np.asarray(turn_before(row, one, 9))[0].tolist() == [9, 9, 3, 3, 0, 9, 3, 3, 0]
    assert np.asarray(turn_number(row, one, 16))[0].tolist() == [0, 0, 1, 1, 2, 0, 1, 1, 2]


def test_a_share_of_composites_is_cut_to_the_ends_of_its_examples(world):
    long = {n: [Example("begin " + "x" * 400 + " end" + str(i), "y" * 90) for i in range(3)] for n in NAMES}
    tokenizer = world["model"].tokenizer

    def lengths(cut):
        mixture = Mixture(long, {n: i for i, n in enumerate(NAMES)}, tokenizer, 2, 9999, False, composite=1.0,
                          composite_sizes=(2, 2), composite_shots=1, composite_cut=cut)  # fmt: skip
        chosen, rng = mixture.chosen(), np.random.default_rng(0)
        return [tokenizer.decode(mixture.draw_composite(chosen, rng, 9999).tokens) for _ in range(40)]

    runs = {cut: [max(map(len, re.findall("x+", t))) for t in lengths(cut)] for cut in (0.0, 0.5, 1.0)}
    whole, kept = 400, CUT[0] - len("begin ") + CUT[1] - len(" end0")
    assert set(runs[0.0]) == {whole}
    assert set(runs[1.0]) == {kept}
    assert set(runs[0.5]) == {whole, kept}
    assert all(max(map(len, re.findall("y+", t))) == CUT[1] for t in lengths(1.0))


def test_gates_ahead_of_the_layers_learn_alone_from_what_is_cut_short(tmp_path, world):
    twice = dict(gate_depth=2, gate_rounds=2, gate_turns=4)
    how = dict(gate_input="embedding", gate_stream=32, lm_loss=False, prompt_loss=False, order=0.5, **twice,
               answer_share=0.5, composite=0.5, composite_cut=0.5, composite_sizes=(2, 3), max_length=400)  # fmt: skip
    settings = GateTraining(**{**SETTINGS, "steps": 40, "learning_rate": 1e-2, **how})
    final = train_gates(world["base"], world["bank"], TASKS, tmp_path / "gates", settings, dtype="float32",
                        log=tmp_path / "log.jsonl")  # fmt: skip
    first = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[0])
    assert first["lm"] == final["lm"] == 0
    assert final["gate"] < 0.7 * first["gate"]
    config, arrays = load_gates(tmp_path / "gates", world["model"].config, NAMES)
    assert config.form == GateForm("embedding", stream=32, depth=2, rounds=2, turns=4)
    begun = fresh_gates(config.form, world["model"].config, len(NAMES), 0)
    assert all(
        np.abs(arrays[name] - begun[name]).max() > 1e-3 for name in ("ahead.before", "ahead.number", "ahead.again")
    )
    model = mj.load(world["base"], world["bank"], tmp_path / "gates", dtype="float32")
    (c,) = model.generate(PROMPTS[:1], mj.Gates(2), max_new_tokens=3)
    assert (c.routing.indices == c.routing.indices[:, :1, :1]).all()  # one choice for all layers and projections
    # no layer runs, so the gates are those of any bank with these names
    bank = load_bank(world["bank"], world["model"].config, np.float32)
    other = dataclasses.replace(bank, b={p: 1 - 2 * b for p, b in bank.b.items()})
    save_bank(tmp_path / "bank", other)
    train_gates(world["base"], tmp_path / "bank", TASKS, tmp_path / "same", settings, dtype="float32")
    assert (tmp_path / "same/weights.safetensors").read_bytes() == (tmp_path / "gates/weights.safetensors").read_bytes()


def test_gates_ahead_of_the_layers_choose_once(monkeypatch, formed):
    """Not once a group: all layers and projections get one choice, whoever else is in the batch."""
    calls, route = [], BoundGates.route
    monkeypatch.setattr(BoundGates, "route", lambda self, x, gate: calls.append(x.shape) or route(self, x, gate))
    model = formed["ahead"][2]
    ids = np.asarray([[5, 6, 7, 8], [9, 10, 11, 12]], np.int32)
    for router in (mj.Gates(2), [mj.Gates(1), mj.Fixed("cedar")]):
        calls.clear()
        jax.clear_caches()
        model.logits(ids, router)
        assert len(calls) == 1, calls
    assert not dataclasses.replace(FORMS["ahead"], bias=True).is_possible  # no layer's own logits for it to be added to


@pytest.mark.parametrize(
    ("how", "said"),
    [
        (dict(lm_loss=False), "lm_loss: expected gate_input embedding"),
        (dict(answer_share=0.5), "answer_share: expected no prompt_loss"),
        (dict(answer_share=1.5, prompt_loss=False), "answer_share: expected a share"),
        (dict(turn_share=0.5, prompt_loss=False), "turn_share: expected a share from 0 to 1 beside answer_share"),
        (dict(gate_input="embedding", lm_loss=False, order=-1.0), "order: expected 0 or more, found -1"),
        (dict(order=0.5), "order, composite_cut: expected no lm_loss"),
        (dict(gate_input="embedding", gate_stream=32), "gate_depth"),
        (dict(gate_input="embedding", gate_stream=24, gate_depth=2), "multiple of 32"),
        (dict(gate_input="embedding", gate_stream=32, gate_depth=1, gate_rounds=2), "gate_depth 2 or more"),
        (dict(gate_input="embedding", gate_stream=32, gate_depth=1, gate_turns=4096), "gate_turns of 0 to 4,095"),
        (dict(gate_stream=32, gate_depth=2), "no gate_depth, gate_rounds or gate_turns for another"),
    ],
)
def test_what_gates_ahead_need_is_said(tmp_path, world, how, said):
    train = lambda: train_gates(  # noqa: E731
        world["base"], world["bank"], TASKS, tmp_path / "gates", GateTraining(**SETTINGS, **how), dtype="float32"
    )
    with pytest.raises(InputError, match=said):
        train()
    assert not (tmp_path / "gates").exists()


if __name__ == "__main__":
    import conftest  # noqa: F401  (the same strictness as in every test)

    main(*sys.argv[1:])
