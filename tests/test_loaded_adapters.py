"""Adapters added to a loaded model and removed from it: what `load` makes of the changed folders, array by array."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_converters_change import fleet, imported  # noqa: F401 - a fixture
from tiny import tiny_llama, tiny_peft

import converters
import meteora_jax as mj
from meteora_jax.config import GROUPS, BankConfig, InputError, read_json
from meteora_jax.execution import ExecutionConfig
from meteora_jax.gate_config import GateConfig, TokenRouterForm
from meteora_jax.io import model_bank
from meteora_jax.io.gates import change_columns, fresh_gates, save_gates
from meteora_jax.model.layout import pack, with_execution
from meteora_jax.sharding import make_mesh

pytestmark = pytest.mark.filterwarnings(
    "ignore:`lora_bias=True` was passed", "ignore:Adapter 'default'", "ignore:aLoRA"
)
ROWS = [[5, 6, 40, 7, 40, 300, 17], [7, 7, 40, 41, 319]]
FORMS = pytest.mark.parametrize("form", [None, TokenRouterForm(32, 2)], ids=["meteora", "token router"])


def arrays(model: mj.Meteora) -> dict[tuple[str, ...], np.ndarray]:
    return {tuple(map(str, path)): np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(model.weights)}


def assert_same(changed: mj.Meteora, fresh: mj.Meteora) -> None:
    """The same description, the same program, the same bits."""
    assert changed.bank == fresh.bank
    assert changed.gates == fresh.gates
    assert changed.graph == fresh.graph
    found, wanted = arrays(changed), arrays(fresh)
    assert found.keys() == wanted.keys()
    for path, array in wanted.items():
        assert found[path].dtype == array.dtype, path
        np.testing.assert_array_equal(found[path].astype(np.float32), array.astype(np.float32), err_msg=str(path))


def load(fleet: dict[str, Any], dest: Path, *names: str, **options: Any) -> mj.Meteora:  # noqa: F811
    return mj.load(fleet["base"], imported(fleet, dest, *names), **{"dtype": "float32", **options})


def test_every_kind_of_adapter_comes_and_goes(tmp_path: Path, fleet: dict[str, Any]):  # noqa: F811
    """Ranks grow and shrink, DoRA, biases and adapters of the vocabulary bring their arrays and take them away."""
    model = load(fleet, tmp_path / "bank", "narrow", "pattern")
    names = ["narrow", "pattern"]
    for name in ("rslora", "dora", "bias", "waits", "ends", "rows"):
        model, names = model.add_adapter(fleet["peft"][name], name), [*names, name]
    fresh = load(fleet, tmp_path / "all", *names)
    assert_same(model, fresh)
    for name in ("rows",):
        np.testing.assert_array_equal(*(m.logits(ROWS, mj.Fixed(name)) for m in (model, fresh)))
    for name in ("pattern", "ends", "rslora", "dora"):
        model = model.remove_adapter(name)
        names.remove(name)
    fresh = load(fleet, tmp_path / "few", *names)
    assert_same(model, fresh)


def test_a_base_gets_its_first_adapter_and_shares_its_own_arrays(tmp_path: Path, fleet: dict[str, Any]):  # noqa: F811
    bare = mj.load(fleet["base"], dtype="bfloat16")
    one = bare.add_adapter(fleet["peft"]["plain"], "plain")
    assert_same(one, load(fleet, tmp_path / "bank", "plain", dtype="bfloat16"))
    assert bare.adapter_names == ()
    assert one.weights["embed"][...] is bare.weights["embed"][...]
    both = one.add_adapter(imported(fleet, tmp_path / "other", "narrow", "rslora"), "rslora")  # of a bank
    assert_same(both, load(fleet, tmp_path / "both", "plain", "rslora", dtype="bfloat16"))


def with_gates(world: dict[str, Any], folder: Path, form: Any, null: bool) -> mj.Meteora:
    """The world's bank with random gates of that form."""
    config, rng = world["model"].config, np.random.default_rng(7)
    described = GateConfig(world["model"].adapter_names, 2, 1.0, form, null)
    fresh = fresh_gates(form, config, described.columns, 0)
    save_gates(folder, described, {k: rng.standard_normal(g.shape).astype(np.float32) for k, g in fresh.items()})
    return mj.load(world["base"], world["bank"], folder, dtype="float32")


@pytest.mark.parametrize(
    ("form", "null"), [(None, False), (TokenRouterForm(32, 2), True)], ids=["meteora", "token router"]
)
def test_gates_choose_as_before_and_never_what_they_do_not_know(
    tmp_path: Path, world: dict[str, Any], form: Any, null: bool
):
    model = with_gates(world, tmp_path / "gates", form, null)
    new = tiny_peft(tmp_path, world["hf_folder"], "new", seed=9, r=8)
    more = model.add_adapter(new, "new")
    assert (more.adapter_names[-1], more.gates) == ("new", model.gates)
    # all of the gates' choices at once, so that a column too many would show
    np.testing.assert_allclose(*(m.logits(ROWS, mj.Gates(4, 9.0)) for m in (model, more)), atol=2e-5)
    fresh = mj.load(world["base"], dtype="float32").add_adapter(new, "new")
    mixed = more.logits(ROWS, [mj.Fixed("new"), mj.Gates(4, 9.0)])
    np.testing.assert_allclose(mixed[0], fresh.logits(ROWS, mj.Fixed("new"))[0], atol=2e-5)
    np.testing.assert_allclose(mixed[1], model.logits(ROWS, mj.Gates(4, 9.0))[1], atol=2e-5)
    for router, said in (
        (mj.Gates(1, within=("new",)), "within: expected one of apple, birch, cedar, daisy, found 'new'"),
        (mj.Gates(5), "at most 4"),
    ):
        with pytest.raises(InputError) as refusal:
            more.logits(ROWS, router)
        assert said in str(refusal.value)
    assert_same(more.remove_adapter("new"), model)


def test_an_index_finds_what_gates_do_not_know(tmp_path: Path, world: dict[str, Any]):
    new = tiny_peft(tmp_path, world["hf_folder"], "new", seed=9, r=8)
    more = world["model"].add_adapter(new, "new")
    index = mj.Index.build({"new": ["the quick fox"], "apple": ["the quick dog"], "birch": ["quick apples"]})
    (found,) = more.generate(["the quick fox"], mj.GatesWithin(index, 3, 2), max_new_tokens=2)
    assert found.routing.retrieved[0][0] == "new"
    assert set(np.unique(found.routing.indices)) <= {-1, 0, 1}
    with pytest.raises(InputError, match="expected at least 2 adapters that gates have a column of, found apple"):
        more.generate(["the quick fox dog"], mj.GatesWithin(index, 2, 2, exclude=("birch",)), max_new_tokens=2)


@FORMS
def test_removal_takes_the_column_along(tmp_path: Path, world: dict[str, Any], form: Any):
    """As `bank remove --gates` and a load."""
    model = with_gates(world, tmp_path / "gates", form, null=True)
    bank = tmp_path / "bank"
    converters.import_adapters(bank, world["base"], world["peft"])
    names = list(model.adapter_names)
    for gone in ("cedar", "apple"):  # the first shrinks the rank
        model = model.remove_adapter(gone)
        names.remove(gone)
        change_columns(tmp_path / "gates", BankConfig.from_json(read_json(bank / "bank.json"), "bank"), {gone: None})
        converters.remove_adapters(bank, [gone])
        fresh = mj.load(world["base"], bank, tmp_path / "gates", dtype="float32")
        assert_same(model, fresh)
    np.testing.assert_array_equal(model.logits(ROWS), fresh.logits(ROWS))
    new = tiny_peft(tmp_path, world["hf_folder"], "new", seed=9, r=8)
    alone = model.add_adapter(new, "new").remove_adapter("birch").remove_adapter("daisy")
    assert (alone.adapter_names, alone.gates) == (("new",), None)
    with pytest.raises(InputError, match="expected trained gates beside 'gates'"):
        alone.logits(ROWS, "gates")


def test_gates_stay_usable_beside_adapters_of_the_vocabulary_and_of_an_invocation(
    tmp_path: Path,
    fleet: dict[str, Any],  # noqa: F811
):
    bank, rng = imported(fleet, tmp_path / "bank", "plain", "narrow"), np.random.default_rng(7)
    config = mj.load(fleet["base"]).config
    for form in (None, TokenRouterForm(32, 2)):
        gates = {k: rng.standard_normal(g.shape).astype(np.float32) for k, g in fresh_gates(form, config, 2, 0).items()}
        save_gates(tmp_path / "gates", GateConfig(("plain", "narrow"), 2, 1.0, form), gates)
        model = mj.load(fleet["base"], bank, tmp_path / "gates", dtype="float32")
        more = model
        for name in ("ends", "waits", "rows"):
            more = more.add_adapter(fleet["peft"][name], name)
        if form is None:
            np.testing.assert_allclose(*(m.logits(ROWS) for m in (model, more)), atol=2e-5)
        else:
            before, after = (m.generate(ROWS, max_new_tokens=3) for m in (model, more))
            assert [c.token_ids for c in before] == [c.token_ids for c in after]
        with pytest.raises(InputError, match="expected gates in a batch of their own: ends, rows change"):
            more.logits(ROWS, [mj.Gates(), mj.Fixed("ends")])


def test_packed_models_are_packed_anew(tmp_path: Path, world: dict[str, Any]):
    """Kernels with gates and A's behind their rows, as on a GPU; a bank that grows wide changes its layout."""
    new = tiny_peft(tmp_path, world["hf_folder"], "new", seed=9, r=8)
    for width, dtype in ((512, "float32"), (36, "bfloat16")):  # of 36, 4 adapters of rank 8 are not wide, 5 are
        model = mj.load(world["base"], world["bank"], world["gates"], dtype=dtype)
        loaded = with_execution(model.graph, model.weights, ExecutionConfig(dense_width=width))
        before = dataclasses.replace(model, **dict(zip(("graph", "weights"), pack(loaded, model.weights), strict=True)))
        more = before.add_adapter(new, "new")
        kernels = [getattr(nnx.merge(more.graph, more.weights).layers, g) for g in GROUPS]
        assert [type(k).__name__ for k in kernels] == ["PackedLinear"] * 4
        assert [k.wide for k in kernels] == [width == 36] * 4
        unpacked = dataclasses.replace(model, graph=loaded).add_adapter(new, "new")
        wanted = pack(unpacked.graph, unpacked.weights)
        assert_same(more, dataclasses.replace(unpacked, graph=wanted[0], weights=wanted[1]))
        assert_same(more.remove_adapter("new"), before)
        if dtype == "float32":  # in 16 bit a choice between near-equals may turn with a product's shape
            np.testing.assert_allclose(before.logits(ROWS), more.logits(ROWS), atol=2e-5)
    freed = more.remove_adapter("new", release=True)
    assert_same(freed, before)
    kernels = [leaf for path, leaf in nnx.to_flat_state(more.weights) if path[-1] == "kernel"]
    assert [kernel[...].is_deleted() for kernel in kernels] == [True] * 4


def test_a_release_needs_memory_for_one_array_more(tmp_path: Path, world: dict[str, Any], monkeypatch: Any):
    """At no time more than the model, its largest new array and the adapter that comes."""
    made = model_bank._rebuilt
    live: list[int] = []

    def counted(*arguments: Any) -> jax.Array:
        array = made(*arguments)
        live.append(sum(a.nbytes for a in jax.live_arrays() if not a.is_deleted()))
        return array

    monkeypatch.setattr(model_bank, "_rebuilt", counted)
    model = mj.load(world["base"], world["bank"], dtype="float32")
    before, names = sum(a.nbytes for a in jax.live_arrays() if not a.is_deleted()), model.adapter_names
    new = tiny_peft(tmp_path, world["hf_folder"], "new", seed=9, r=8)
    model = model.add_adapter(new, "new", release=True)
    after = sum(a.nbytes for a in jax.live_arrays() if not a.is_deleted())
    leaves = nnx.to_flat_state(model.weights)
    changed = [leaf[...].nbytes for path, leaf in leaves if path[-1] in model_bank.ADAPTER_AXES]
    assert len(live) == len(changed) > 8
    assert before < after
    assert max(live) <= after + max(changed)
    assert sum(changed) > 3 * max(changed)  # a second bank would not have had room
    live.clear()
    model = model.remove_adapter("new", release=True)
    assert max(live) <= after + max(changed)
    assert model.adapter_names == names


def test_released_arrays_are_gone_and_others_are_not(tmp_path: Path, fleet: dict[str, Any]):  # noqa: F811
    model = load(fleet, tmp_path / "bank", "plain", "narrow")
    more = model.add_adapter(fleet["peft"]["rslora"], "rslora", release=True)
    deleted = {str(path[-1]) for path, leaf in nnx.to_flat_state(model.weights) if leaf[...].is_deleted()}
    assert deleted == {"lora_a", "lora_b", "lora_scale", "lora_arrow", "lora_spectr"}
    assert_same(more, load(fleet, tmp_path / "fresh", "plain", "narrow", "rslora"))


def test_what_is_refused(tmp_path: Path, world: dict[str, Any]):
    model = world["model"]
    _, other = tiny_llama(tmp_path, hidden_size=32, folder="other")
    stranger = tiny_peft(tmp_path, other, "stranger")
    one = mj.load(world["base"], dtype="float32").add_adapter(world["peft"]["apple"], "apple")
    for call, said in (
        (lambda: model.add_adapter(world["peft"]["apple"], "apple"), "expected one that no adapter has, found 'apple'"),
        (lambda: model.add_adapter(world["peft"]["apple"], "a/b"), "expected a printable name"),
        (lambda: model.add_adapter(tmp_path / "nowhere", "new"), "adapter_config.json: expected a file, found none"),
        (lambda: model.add_adapter(world["bank"], "new"), "expected an adapter's name (apple, birch, cedar, daisy)"),
        (lambda: model.add_adapter(stranger, "new"), "for this base, found"),
        (lambda: model.remove_adapter("zinnia"), "expected an adapter's (apple, birch, cedar, daisy), found 'zinnia'"),
        (lambda: one.remove_adapter("apple"), "expected an adapter that stays, found 'apple' alone"),
        (lambda: dataclasses.replace(model, folder=None).add_adapter(stranger, "new"), "expected a model of mj.load"),
    ):
        with pytest.raises(InputError) as refusal:
            call()
        assert said in str(refusal.value)
        assert "\n" not in str(refusal.value)


def test_on_a_mesh_of_one(tmp_path: Path, fleet: dict[str, Any]):  # noqa: F811
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    model = load(fleet, tmp_path / "bank", "plain", "rows", mesh=mesh)
    more = model.add_adapter(fleet["peft"]["rslora"], "rslora").remove_adapter("plain")
    fresh = load(fleet, tmp_path / "fresh", "rows", "rslora", mesh=mesh)
    assert_same(more, fresh)
    for (_, one), (_, other) in zip(*(nnx.to_flat_state(m.weights) for m in (more, fresh)), strict=True):
        assert one[...].sharding.is_equivalent_to(other[...].sharding, jnp.ndim(other[...]))
