"""Adapters added to a loaded model and removed from it: what `load` makes of the changed folders, array by array."""

import dataclasses
import gc
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from extent import ALL, parameters
from flax import nnx
from test_converters_change import fleet, imported  # noqa: F401 - a fixture
from tiny import tiny_llama, tiny_peft

import converters
import meteora_jax as mj
from meteora_jax import api
from meteora_jax.config import GROUPS, BankConfig, InputError, read_json
from meteora_jax.execution import ExecutionConfig
from meteora_jax.gate_config import GateConfig, TokenRouterForm
from meteora_jax.io import adapter_change, model_bank
from meteora_jax.io.adapter_change import AdapterChange
from meteora_jax.io.gates import change_columns, fresh_gates, save_gates
from meteora_jax.model.layout import pack, with_execution
from meteora_jax.model.packed_linear import PackedLinear
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
    one = mj.load(fleet["base"], dtype="bfloat16")
    bare = dataclasses.replace(one)
    assert one.add_adapter(fleet["peft"]["plain"], "plain") is one
    assert_same(one, load(fleet, tmp_path / "bank", "plain", dtype="bfloat16"))
    assert bare.adapter_names == ()
    assert one.weights["embed"][...] is bare.weights["embed"][...]
    assert np.isfinite(np.asarray(bare.logits(ROWS))).all()
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
    more = dataclasses.replace(model).add_adapter(new, "new")
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
    more = dataclasses.replace(world["model"]).add_adapter(new, "new")
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
        more = dataclasses.replace(model)
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
        more = dataclasses.replace(before).add_adapter(new, "new")
        kernels = [getattr(nnx.merge(more.graph, more.weights).layers, g) for g in GROUPS]
        assert [type(k).__name__ for k in kernels] == ["PackedLinear"] * 4
        assert [k.wide for k in kernels] == [width == 36] * 4
        unpacked = dataclasses.replace(model, graph=loaded).add_adapter(new, "new")
        wanted = pack(unpacked.graph, unpacked.weights)
        assert_same(more, dataclasses.replace(unpacked, graph=wanted[0], weights=wanted[1]))
        assert_same(more.remove_adapter("new"), before)
        if dtype == "float32":  # in 16 bit a choice between near-equals may turn with a product's shape
            np.testing.assert_allclose(before.logits(ROWS), more.logits(ROWS), atol=2e-5)


def live_bytes() -> int:
    return sum(a.nbytes for a in jax.live_arrays() if not a.is_deleted())


SAME = "the same steps as plain; test_packed_models_are_packed_anew compares what becomes of packed arrays"


@pytest.mark.parametrize("packs", parameters([False, True], [False], SAME), ids=["plain", "packed"])
def test_a_change_needs_memory_for_one_array_more(tmp_path: Path, world: dict[str, Any], monkeypatch: Any, packs: bool):
    """At no time more than the model, one array and the adapter that comes or goes, also of a model that answered."""
    live = []

    def counted(work: Any) -> Any:
        def measured(*given: Any) -> Any:
            found = work(*given)
            live.append(live_bytes())
            return found

        return measured

    model = mj.load(world["base"], world["bank"], world["gates"], dtype="float32")
    if packs:
        loaded = with_execution(model.graph, model.weights, ExecutionConfig(dense_width=512))
        model.graph, model.weights = pack(loaded, model.weights, release=GROUPS)
        del loaded
    for owner, name in ((AdapterChange, "_replace"), (adapter_change, "packed"), (PackedLinear, "base_parts")):
        monkeypatch.setattr(owner, name, counted(getattr(owner, name)))
    names = model.adapter_names
    gc.collect()
    before = live_bytes()
    new = tiny_peft(tmp_path, world["hf_folder"], "new", seed=9, r=8)
    for change in (lambda: model.add_adapter(new, "new"), lambda: model.remove_adapter("new")):
        start = live_bytes()
        model.generate([[5, 6, 7]], max_new_tokens=1)
        live.clear()
        change()
        gc.collect()
        layers = [leaf[...].nbytes for path, leaf in nnx.to_flat_state(model.weights) if path[0] == "layers"]
        arrays_of_bank = [array.nbytes for array in in_bank(model).values()]
        largest, bank = max(layers if packs else arrays_of_bank), sum(arrays_of_bank)
        assert len(live) > (16 if packs else 11)
        assert max(live) <= max(start, live_bytes()) + largest + bank // 4  # of four or five adapters
        assert bank > 3 * largest or packs  # a second bank would not have had room
    assert model.adapter_names == names
    assert live_bytes() == before


def in_bank(model: mj.Meteora) -> dict[tuple[str, ...], jax.Array]:
    """By path, what has an axis of adapters."""
    leaves = nnx.to_flat_state(model.weights)
    return {tuple(map(str, path)): leaf[...] for path, leaf in leaves if path[-1] in model_bank.ADAPTER_AXES}


def test_what_was_begun_ends_as_it_began(tmp_path: Path, world: dict[str, Any]):
    """Streams and engines keep the model that they were begun with; so does a copy."""
    new = tiny_peft(tmp_path, world["hf_folder"], "new", seed=9, r=8)
    model, asked = mj.load(world["base"], world["bank"], dtype="float32"), [mj.Fixed("daisy"), mj.Fixed("birch")]
    how: dict[str, Any] = dict(router=asked, max_new_tokens=12)
    texts = ["How many apples", "The quick brown fox"]
    wanted, before = model.generate(texts, **how), dataclasses.replace(model)
    running, waiting = model.stream(texts, **how), model.stream(texts, **how)
    next(running)
    engine = mj.Engine(model, max_tokens=64, blocks=64, max_rows=4)
    first = engine.submit(texts[0], asked[0], max_new_tokens=12, routing=True)
    engine.step()
    model.add_adapter(new, "new").remove_adapter("apple").remove_adapter("birch")
    assert model.adapter_names == ("cedar", "daisy", "new")
    second = engine.submit(texts[1], asked[1], max_new_tokens=12, routing=True)
    for said in ([*running][-1], [*waiting][-1], [first.result(), second.result()], before.generate(texts, **how)):
        assert isinstance(said, list)
        for one, other in zip(said, wanted, strict=True):
            assert one.token_ids == other.token_ids
            assert one.routing.adapter_names == other.routing.adapter_names == world["model"].adapter_names
            np.testing.assert_array_equal(one.routing.indices, other.routing.indices)
    assert model.generate(texts, mj.Fixed("daisy"), max_new_tokens=12)[0].token_ids == wanted[0].token_ids
    with pytest.raises(InputError, match="birch"):
        model.generate(texts, **how)


def test_what_routers_read_of_a_bank_is_computed_once_a_change(world: dict[str, Any], monkeypatch: Any):
    model, fill, calls = mj.load(world["base"], world["bank"], dtype="float32"), api.fill_spectra, []
    monkeypatch.setattr(api, "fill_spectra", lambda *given: (calls.append(given), fill(*given)))
    for _ in range(2):
        model.stream(ROWS, mj.Arrow(2))
        list(model.completions(ROWS, mj.Arrow(2), max_new_tokens=1))
    assert len(calls) == 1
    model.remove_adapter("apple")
    found = model.logits(ROWS, mj.Arrow(2))
    assert len(calls) == 2
    alone = mj.load(world["base"], world["bank"], dtype="float32").remove_adapter("apple")
    np.testing.assert_array_equal(found, alone.logits(ROWS, mj.Arrow(2)))


@pytest.mark.parametrize("packs", parameters([False, True], [False], SAME), ids=["plain", "packed"])
def test_whatever_stops_a_change_leaves_the_model_as_it_was(
    tmp_path: Path,
    fleet: dict[str, Any],  # noqa: F811
    monkeypatch: Any,
    packs: bool,
):
    """At every step in turn: unpacking, each array, packing. Ranks that grow and shrink, arrays that come and go."""
    bank, rng = imported(fleet, tmp_path / "bank", "narrow", "rslora", "plain"), np.random.default_rng(7)
    gates = fresh_gates(None, mj.load(fleet["base"]).config, 3, 0)
    gates = {k: rng.standard_normal(g.shape).astype(np.float32) for k, g in gates.items()}
    save_gates(tmp_path / "gates", GateConfig(("narrow", "rslora", "plain"), 2, 1.0, None), gates)
    model = mj.load(fleet["base"], bank, tmp_path / "gates", dtype="float32")
    if packs:
        loaded = with_execution(model.graph, model.weights, ExecutionConfig(dense_width=512))
        model.graph, model.weights = pack(loaded, model.weights)
    else:
        model.add_adapter(fleet["peft"]["dora"], "dora")
    whole, left = dataclasses.replace(model), 0
    steps = {(AdapterChange, "_replace"): True, (adapter_change, "packed"): True, (PackedLinear, "base_parts"): True}

    def stopping(work: Any) -> Any:
        def stopped(*given: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                raise MemoryError("RESOURCE_EXHAUSTED")
            return work(*given)

        return stopped

    for owner, name in steps:
        monkeypatch.setattr(owner, name, stopping(getattr(owner, name)))
    changes: list[Any] = [
        lambda m: m.add_adapter(fleet["peft"]["bias"], "bias"), lambda m: m.remove_adapter("rslora"),
        lambda m: m.remove_adapter("dora" if "dora" in m.adapter_names else "narrow"),
    ]  # fmt: skip
    for change in changes if ALL else changes[packs:2]:
        step = 0
        for step in range(1, 99, 1 if ALL else 9):
            left = step
            try:
                change(model)
            except MemoryError:
                assert_same(model, whole)
            else:
                break
        assert step > (20 if packs else 12)  # each of them was reached
        np.testing.assert_array_equal(*(m.logits(ROWS) for m in (dataclasses.replace(whole), whole)))
        left, fresh = 0, dataclasses.replace(whole)
        assert_same(model, change(fresh))
        model = dataclasses.replace(whole)


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
