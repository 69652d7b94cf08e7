"""The token router: against torch in float64, packed, ragged, cached, on a mesh; its files; what its training needs."""

import dataclasses
import functools
import itertools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from extent import parameters
from flat_settings import changed, flat
from flax import nnx
from gate_gradients import loss_and_gradients
from meshes import mesh_of
from test_training import TASKS
from test_training_mesh import BETA, ROWS, packed, sequences
from worlds import NAMES

import converters
import meteora_jax as mj
from meteora_jax.config import InputError
from meteora_jax.engine.step import observe_routing
from meteora_jax.evaluation.tasks import Example
from meteora_jax.execution import ExecutionConfig
from meteora_jax.gate_config import GateConfig, TokenRouterForm
from meteora_jax.io.bank import load_bank, save_bank
from meteora_jax.io.gates import fresh_gates, gate_shapes, load_gates, save_gates, split_gates
from meteora_jax.model.layout import pack, with_execution
from meteora_jax.routing.gates import BoundGates, GateParam
from meteora_jax.sharding import fetch, place_rows, use_mesh
from meteora_jax.training.data import Mixture
from meteora_jax.training.gate_loss import gate_loss
from meteora_jax.training.gates import train_gates
from meteora_jax.training.recipes import RECIPES, recipe_of, settled
from meteora_jax.training.sequences import CUT
from meteora_jax.training.settings import Checkpointing, GateTraining, Objective
from meteora_jax.training.step import gradients
from pallas_kernels.paged_attention import EMPTY

FORM = TokenRouterForm(width=64, depth=3)
PROMPTS = [[5, 6, 7, 8, 9, 300, 17], [11, 12, 13], list(range(40, 75)), [200]]


def arrays_of(form, config, seed=9):
    """Small enough that rounding does not blow up in their softmax, the look-up so sharp that it decides."""
    rng = np.random.default_rng(seed)
    size = lambda key: 3.0 if key.endswith("lookup") else 0.2  # noqa: E731
    draw = lambda key, shape: size(key) * rng.standard_normal(shape)  # noqa: E731
    return {key: draw(key, shape).astype(np.float32) for key, shape in gate_shapes(form, config, len(NAMES)).items()}


@pytest.fixture(scope="module")
def routed(world, tmp_path_factory):
    """GATES folder, its arrays, the model."""
    folder = tmp_path_factory.mktemp("routed") / "gates"
    arrays = arrays_of(FORM, world["model"].config)
    save_gates(folder, GateConfig(NAMES, 2, 1.0, FORM), arrays)
    return folder, arrays, mj.load(world["base"], world["bank"], folder, dtype="float32")


def computed(model, mesh=None, accumulate=1, remat=True, **how):
    """Losses and the gates' gradients of two sequences a row."""
    graph, params, frozen = nnx.split(nnx.merge(model.graph, model.weights), GateParam, ...)
    router = place_rows(jax.tree.map(np.asarray, model.bind(mj.Gates(2), ROWS // accumulate)), mesh)
    loss = gate_loss(Objective(beta=BETA, **how))
    run = jax.jit(
        lambda frozen, params, batch, router: gradients(
            graph, frozen, params, batch, router, loss, dtype=jnp.float32, remat=remat, accumulate=accumulate
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
        assert np.abs(grad).max() > 2e-4
        assert np.abs(found[name] - grad).max() <= 1e-5 * max(1.0, np.abs(grad).max()), name


@pytest.fixture(scope="module")
def expected(world, routed):
    return loss_and_gradients(world, routed[1], sequences(), BETA, 2)


def test_loss_and_gradients_of_packed_rows_equal_torch_sequence_by_sequence(routed, expected):
    check(computed(routed[2]), expected)


EVERY_TERM = dict(lm_loss=False, response_weight=0.2, start_weight=0.3, segment_weight=0.4)


@pytest.mark.exhaustive("two forms of the step that is compared with torch above")
def test_in_parts_and_without_recomputing_it_is_the_same(routed, expected):
    check(computed(routed[2], accumulate=4, remat=False), expected)


@pytest.mark.parametrize(
    "how",
    parameters(
        [
            dict(lm_loss=False),
            dict(response_weight=0.7),
            dict(response_weight=0.6, start_weight=0.4),
            dict(lm_loss=False, response_weight=0.2, segment_weight=0.4),
            EVERY_TERM,
        ],
        [EVERY_TERM],
        "some of the terms that are compared together",
    ),
)
def test_the_gate_term_alone_and_what_responses_count_in_it(world, routed, how):
    _, arrays, model = routed
    lm, gate, grads = loss_and_gradients(world, arrays, sequences(), BETA, 2, **how)
    found = computed(model, accumulate=2, **how)
    assert (float(found["lm"]) == 0) == ("lm_loss" in how)
    assert 0 < sum(int(s.loss.sum()) for s in sequences()) < sum(len(s.loss) for s in sequences())
    check({**found, "lm": lm}, (lm, gate, grads))


@pytest.mark.exhaustive("a mesh once more; test_training_mesh and test_sharding have one")
def test_eight_devices_compute_and_generate_as_one(world, routed, expected):
    folder, _, model = routed
    mesh = mesh_of(2, 2, 2)
    shared = mj.load(world["base"], world["bank"], folder, mesh=mesh, dtype="float32")
    check(computed(shared, mesh), expected)
    said = [[c.token_ids for c in m.generate(PROMPTS, mj.Gates(2), max_new_tokens=8)] for m in (shared, model)]
    assert said[0] == said[1]


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


def test_a_ragged_batch_decoded_with_the_cache_routes_as_each_sequence_at_once(routed):
    model = routed[2]
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


@pytest.mark.exhaustive("mixed batches are in test_routing")
def test_gates_and_other_routers_in_one_batch(routed):
    model = routed[2]
    routers = [mj.Gates(2), mj.Fixed("cedar"), None, mj.Gates(1)]
    together = model.generate(PROMPTS, routers, max_new_tokens=6)
    alone = {i: model.generate(PROMPTS, routers[i], max_new_tokens=6)[i] for i in range(4)}
    assert [c.token_ids for c in together] == [alone[i].token_ids for i in range(4)]


@pytest.mark.parametrize("width", parameters([512, 1], [512], "test_gated_model packs those of a wide bank"))
def test_packed_weights_serve_what_the_router_chose(routed, width):
    """Not those of a wide bank: no gates' columns, no A's."""
    model = routed[2]
    graph = with_execution(model.graph, model.weights, ExecutionConfig(dense_width=width))
    graph, weights = pack(graph, model.weights)
    held = nnx.merge(graph, weights).layers
    assert (held.o.packed_rows > 0) == (width > 1)
    found = whole(dataclasses.replace(model, graph=graph, weights=weights), PROMPTS[2], mj.Gates(2))
    expected = whole(model, PROMPTS[2], mj.Gates(2))
    n = len(PROMPTS[2])
    assert np.array_equal(found[0][:n], expected[0][:n])
    assert np.allclose(found[1][:n], expected[1][:n], atol=1e-4)
    assert np.allclose(found[2][:n], expected[2][:n], atol=1e-4 * np.abs(expected[2]).max())


SETTINGS = dict(steps=4, batch_size=8, learning_rate=3e-2, max_length=100, beta=5.0)


def test_a_recipe_is_that_of_what_is_extended_unless_it_contradicts(tmp_path, world, routed):
    folder = routed[0]
    assert recipe_of(None) == RECIPES["token-router"]
    assert recipe_of("meteora") == RECIPES["meteora"]
    assert recipe_of(None, folder) == dataclasses.replace(RECIPES["token-router"], form=FORM)
    assert recipe_of("token-router", folder).form == FORM
    assert recipe_of(None, world["gates"]) == RECIPES["meteora"]
    with pytest.raises(InputError, match="form: expected one of the recipe meteora, found token-router"):
        recipe_of("meteora", folder)
    with pytest.raises(InputError, match="form: expected one of the recipe token-router, found meteora"):
        recipe_of("token-router", world["gates"])
    with pytest.raises(InputError, match="lm_loss: expected a token router"):
        changed(recipe_of(None, world["gates"]), lm_loss=False)


def test_a_recipe_s_rows_belong_to_its_batch_size():
    recipe = RECIPES["token-router"]
    longer = changed(recipe, steps=9000)
    assert settled(longer, recipe) == longer
    assert settled(changed(recipe, batch_size=64), recipe).drawing.rows is None


def test_the_original_s_layout_refuses_a_token_router_by_name(tmp_path, world, routed):
    with pytest.raises(InputError, match=r"form: expected MeteoRA's own gates .*, found a token router"):
        converters.export_gates(world["base"], world["bank"], routed[0], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_gates_of_both_forms_are_described(tmp_path, routed):
    described = GateConfig(NAMES, 2, 1.0).to_json()
    assert described == {"format": "meteora-gates-1", "names": NAMES, "top_k": 2, "temperature": 1.0}
    own = json.loads((routed[0] / "gates.json").read_text())
    assert own == {**described, "names": list(NAMES), "format": "meteora-gates-3", "form": "token-router", "width": 64,
                   "depth": 3}  # fmt: skip
    assert GateConfig.from_json(own, "x") == GateConfig(NAMES, 2, 1.0, FORM)
    for change, said in (
        ({"form": "sideways"}, "malformed"),
        ({"width": 48}, "width: expected a multiple of 32 from 32 to 4064, found 48"),
        ({"depth": 1}, "depth: expected 2 to 256, found 1"),
        ({"depth": "3"}, "depth: expected"),
        ({"names": None}, "malformed"),
        ({"format": "meteora-gates-4"}, "expected 'meteora-gates-1' or '-3'"),
    ):
        with pytest.raises(InputError, match=f"GATES/gates.json: .*{said}"):
            GateConfig.from_json({**own, **change}, "GATES/gates.json")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"form": {"input": "prefix-mean", "carry": True}},
            "the sequence's mean .* with carried logits",
        ),
        ({"form": {"shared": True}}, "gates shared in a group"),
        ({"form": {"bias": True}}, "biases"),
        ({"form": {"stream": 64}}, "gates with a stream beside the layers"),
        ({"form": {"input": "stream", "stream": 64}}, "gates that read a stream alone"),
        ({"form": {"input": "embedding", "stream": 128, "depth": 4}}, "a token router of one hop"),
        ({"form": {"input": "embedding", "stream": 128, "depth": 4, "rounds": 2}}, "does not count 16 segments"),
        ({"form": {"shared": True, "bias": True}, "background": "0" * 64}, "independent columns"),
    ],
)
def test_forms_that_are_gone_are_refused_by_name(change, said):
    raw = {"format": "meteora-gates-2", "names": NAMES, "top_k": 2, "temperature": 1.0, **change}
    with pytest.raises(InputError, match=f"G/gates.json: form: .*found .*{said}.*`meteora train gates`"):
        GateConfig.from_json(raw, "G/gates.json")


def test_a_token_router_of_the_former_format_loads(tmp_path, world, routed):
    former = {
        "embed": "read", "qkv_embed": "look", "qkv": "own", "gate_up": "up", "task": "out", "previous": "before",
        "lookup": "point", "segment": "number", "hop": "again",
    }  # fmt: skip
    parts = {key: key.removeprefix("token_router.") for key in routed[1]}
    name = lambda key: f"ahead.{former.get(parts[key], parts[key])}"  # noqa: E731
    save_gates(tmp_path / "gates", GateConfig(NAMES, 2, 1.0, FORM), {name(k): v for k, v in routed[1].items()})
    form = {"input": "embedding", "stream": 64, "depth": 3, "rounds": 2, "turns": 16}
    described = {"format": "meteora-gates-2", "names": NAMES, "top_k": 2, "temperature": 1.0, "form": form}
    (tmp_path / "gates" / "gates.json").write_text(json.dumps(described))
    config, arrays = load_gates(tmp_path / "gates", world["model"].config, NAMES)
    assert config.form == FORM
    assert arrays.keys() == routed[1].keys()
    assert all(np.array_equal(arrays[k], v) for k, v in routed[1].items())


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


@pytest.mark.exhaustive("a training; the examples it learns from are compared above")
def test_a_token_router_learns_alone_from_what_is_cut_short(tmp_path, world):
    how = dict(form=TokenRouterForm(width=32, depth=2), lm_loss=False, prompt_loss=False, segment_weight=0.5,
               response_weight=0.5, composite=0.5, composite_cut=0.5, composite_sizes=(2, 3),
               max_length=400)  # fmt: skip
    settings = flat(GateTraining, **{**SETTINGS, "steps": 40, "learning_rate": 1e-2, **how})
    final = train_gates(world["base"], world["bank"], TASKS, tmp_path / "gates", settings, dtype="float32",
                        checkpointing=Checkpointing(log=tmp_path / "log.jsonl"))  # fmt: skip
    first = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[0])
    assert "lm" not in {*first, *final}  # a loss that there is not
    assert final["gate"] < 0.7 * first["gate"]
    config, arrays = load_gates(tmp_path / "gates", world["model"].config, NAMES)
    assert config.form == settings.form
    begun = fresh_gates(config.form, world["model"].config, len(NAMES), 0)
    moved = ("token_router.previous", "token_router.segment", "token_router.hop")
    assert all(np.abs(arrays[name] - begun[name]).max() > 1e-3 for name in moved)
    model = mj.load(world["base"], world["bank"], tmp_path / "gates", dtype="float32")
    (c,) = model.generate(PROMPTS[:1], mj.Gates(2), max_new_tokens=3)
    assert (c.routing.indices == c.routing.indices[:, :1, :1]).all()  # one choice for all layers and projections
    # no layer runs, so the router is that of any bank with these names
    bank = load_bank(world["bank"], world["model"].config, np.float32)
    other = dataclasses.replace(bank, b={p: 1 - 2 * b for p, b in bank.b.items()})
    save_bank(tmp_path / "bank", other)
    train_gates(world["base"], tmp_path / "bank", TASKS, tmp_path / "same", settings, dtype="float32")
    assert (tmp_path / "same/weights.safetensors").read_bytes() == (tmp_path / "gates/weights.safetensors").read_bytes()


def test_a_token_router_chooses_once(monkeypatch, routed):
    """Not once a group: all layers and projections get one choice, whoever else is in the batch."""
    calls, route = [], BoundGates.route
    monkeypatch.setattr(BoundGates, "route", lambda self, x, gate: calls.append(x.shape) or route(self, x, gate))
    model, widths = routed[2], itertools.count(513)
    ids = np.asarray([[5, 6, 7, 8], [9, 10, 11, 12]], np.int32)
    for router in (mj.Gates(2), [mj.Gates(1), mj.Fixed("cedar")]):
        calls.clear()
        execution = ExecutionConfig(dense_width=next(widths))  # one that nobody had: a program is traced
        graph = with_execution(model.graph, model.weights, execution)
        dataclasses.replace(model, graph=graph).logits(ids, router)
        assert len(calls) == 1, calls
