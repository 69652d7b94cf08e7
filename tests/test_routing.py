"""Routing equals DESIGN's formula in NumPy float64, PEFT's own models, and does not depend on a bank's order."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from extent import ALL, parameters
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from tiny import tiny_peft
from transformers import LlamaForCausalLM
from worlds import NAMES

import converters
import meteora_jax as mj
from meteora_jax.config import GROUPS, PROJECTIONS, InputError
from meteora_jax.gate_config import GateConfig
from meteora_jax.io.gates import save_gates
from meteora_jax.routing import bind, refuse
from meteora_jax.routing.gates import ProjectionGates
from pallas_kernels.routed_lora import LoraBank, routed_lora
from pallas_kernels.topk_gating.api import top_k

ROWS = [[5, 6, 7, 8, 9, 300, 17], [11, 12, 13], list(range(40, 60))]


def gated_float64(x, gate, a, b, scale, chosen, temperature):
    """DESIGN.md's formula for one projection, token by token. x [M, I], gate [I, A], a [A, R, I], b [A, R, O]."""
    y = np.zeros((x.shape[0], b.shape[2]))
    for m, row in enumerate(x):
        g = row @ gate
        idx = sorted(range(len(g)), key=lambda i: (-g[i], i))[:chosen]
        s = g[idx] / temperature
        w = np.exp(s - s.max())
        w /= w.sum()
        for weight, i in zip(w, idx, strict=True):
            y[m] += weight * scale[i] * ((row @ a[i].T) @ b[i])
    return y


@jax.jit
def gated_update(router, x, gate, bank):
    routing = router.route(x, ProjectionGates(gate))
    return routed_lora(x, bank, routing, jnp.zeros((*x.shape[:2], sum(bank.splits)))), routing.weights


SIZES = st.tuples(st.integers(1, 3), st.integers(3, 9), st.integers(1, 5))  # adapters a token, of the bank; rank
FEW_SIZES = st.sampled_from([(1, 3, 1), (1, 6, 2), (2, 4, 5), (2, 9, 1), (3, 3, 3), (3, 7, 4)])  # each is a program


@settings(max_examples=60, deadline=None)
@given(SIZES if ALL else FEW_SIZES, st.sampled_from([0.5, 1.0, 20.0]), st.booleans(), st.integers(0, 2**31))
def test_gated_update_equals_the_formula(sizes, temperature, ties, seed):
    rng, (chosen, adapters, rank) = np.random.default_rng(seed), sizes
    inner, splits = 12, (6, 4)
    x = rng.standard_normal((2, 3, inner))
    gate = rng.standard_normal((inner, 2, adapters))
    if ties:  # whole columns equal: the choice among them is the lowest index; small integers keep ties exact
        x, gate = rng.integers(-2, 3, x.shape) * 1.0, rng.integers(-2, 3, gate.shape) * 1.0
        gate[:, :, adapters // 2 :] = gate[:, :, :1]
    a = rng.standard_normal((2, adapters, rank, inner))
    b = rng.standard_normal((adapters, rank, sum(splits)))
    scale = rng.uniform(0.5, 2, (2, adapters))

    def f32(z: np.ndarray) -> jax.Array:
        return jnp.asarray(z.astype(np.float32))

    names = tuple(f"n{i}" for i in range(adapters))
    router = bind(mj.Gates(chosen, temperature), names, batch=2, gated=names)
    ours, weights = map(
        np.asarray, gated_update(router, f32(x), f32(gate), LoraBank(f32(a), f32(b), f32(scale), splits))
    )
    ours = ours.reshape(6, -1)
    flat, columns = x.reshape(6, -1), np.split(b, [6], axis=2)
    want = [gated_float64(flat, gate[:, p], a[p], columns[p], scale[p], chosen, temperature) for p in range(2)]
    want = np.concatenate(want, 1)
    assert np.abs(ours - want).max() <= 1e-4 * max(1, np.abs(want).max())
    assert np.allclose(weights.sum(-1), 1, atol=1e-6)


@given(st.lists(st.lists(st.integers(-3, 3), min_size=4, max_size=4), min_size=6, max_size=6), st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_top_k_breaks_ties_to_the_lowest_index(rows, k):
    values, indices = top_k(jnp.asarray(rows, jnp.float32), k)
    order = np.argsort(-np.asarray(rows), axis=-1, kind="stable")[:, :k]
    assert np.array_equal(np.asarray(indices), order)
    assert np.array_equal(np.asarray(values), np.take_along_axis(np.asarray(rows, np.float32), order, -1))


def torch_gated_logits(world, row: list[int], chosen: int, temperature: float) -> np.ndarray:
    """The whole model with gates, transcribed in float64: hooks on transformers' own layers."""
    hf = LlamaForCausalLM.from_pretrained(world["hf_folder"]).double().eval()
    model = PeftModel.from_pretrained(hf, world["peft"][NAMES[0]], adapter_name=NAMES[0])
    for name in NAMES[1:]:
        model.load_adapter(world["peft"][name], name)
    deltas = {}  # (layer, projection, adapter) -> [I, O]
    for key, module in model.named_modules():
        if hasattr(module, "lora_A"):
            layer, projection = int(key.split("layers.")[1].split(".")[0]), key.split(".")[-1]
            for name in module.lora_A:
                deltas[layer, projection, name] = module.get_delta_weight(name).detach().double().T
    bare = LlamaForCausalLM.from_pretrained(world["hf_folder"]).double().eval()
    gates = {p: torch.from_numpy(g).double() for p, g in world["gate_arrays"].items()}

    def hook(layer: int, projection: str):
        def add(module, inputs, output):
            x = inputs[0]
            g = x @ gates[projection][layer]
            s, idx = g.topk(chosen, dim=-1)
            w = torch.softmax(s / temperature, dim=-1)
            dense = torch.zeros_like(g).scatter(-1, idx, w)
            for i, name in enumerate(NAMES):
                if (layer, projection, name) in deltas:
                    output = output + dense[..., i : i + 1] * (x @ deltas[layer, projection, name])
            return output

        return add

    for i, layer in enumerate(bare.model.layers):
        for projection in PROJECTIONS:
            block = layer.mlp if projection in ("gate_proj", "up_proj", "down_proj") else layer.self_attn
            getattr(block, projection).register_forward_hook(hook(i, projection))
    with torch.no_grad():
        return bare(torch.tensor([row])).logits[0].numpy()


@pytest.mark.parametrize(("chosen", "temperature"), [(1, 1.0), (2, 1.0), (3, 15.0)])
def test_gated_model_equals_a_float64_transcription(world, chosen, temperature):
    ours = np.asarray(world["model"].logits(ROWS, mj.Gates(chosen, temperature)))
    for row, logits in zip(ROWS, ours, strict=True):
        assert np.abs(logits[: len(row)] - torch_gated_logits(world, row, chosen, temperature)).max() <= 2e-4


PEFT_OPTIONS = {
    "lora": dict(),
    "rslora": dict(use_rslora=True, r=8, lora_alpha=11),
    "rank_pattern": dict(rank_pattern={"q_proj": 2, "layers.1.mlp.down_proj": 7}),
    "alpha_pattern": dict(alpha_pattern={"v_proj": 5, "layers.0.self_attn.o_proj": 31}),
    "both_patterns_rslora": dict(
        rank_pattern={"up_proj": 6}, alpha_pattern={"up_proj": 3}, use_rslora=True, lora_alpha=3
    ),
    "two_targets": dict(target_modules=["q_proj", "v_proj"]),
    "regex_targets": dict(target_modules=r".*layers\.[02]\.mlp\.(up|down)_proj"),
    "all_linear": dict(target_modules="all-linear"),
    "some_layers": dict(layers_to_transform=[1]),
}


@pytest.mark.parametrize("option", PEFT_OPTIONS)
def test_one_fixed_adapter_equals_peft_merged_and_unmerged(tmp_path, world, option):
    folder = tiny_peft(tmp_path, world["hf_folder"], "one", seed=9, **PEFT_OPTIONS[option])
    converters.import_adapters(tmp_path / "bank", world["base"], {"one": folder})
    model = mj.load(world["base"], tmp_path / "bank", dtype="float32")
    ours = np.asarray(model.logits(ROWS, mj.Fixed("one")))
    peft = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(world["hf_folder"]), folder).eval()
    merged = None
    for unmerged in (True, False):
        torch_model = peft if unmerged else (merged := peft.merge_and_unload())
        for row, logits in zip(ROWS, ours, strict=True):
            with torch.no_grad():
                want = torch_model(torch.tensor([row])).logits[0].numpy()
            assert np.abs(logits[: len(row)] - want).max() <= 1e-4
    assert merged is not None
    bare = np.asarray(model.logits(ROWS, None))
    assert np.abs(ours - bare)[0, : len(ROWS[0])].max() > 1e-2  # the adapter does something


def test_every_adapter_of_a_mixed_bank_equals_peft(world):
    for name in NAMES:
        ours = np.asarray(world["model"].logits(ROWS, mj.Fixed(name)))
        hf = LlamaForCausalLM.from_pretrained(world["hf_folder"])
        peft = PeftModel.from_pretrained(hf, world["peft"][name]).eval()
        for row, logits in zip(ROWS, ours, strict=True):
            with torch.no_grad():
                assert np.abs(logits[: len(row)] - peft(torch.tensor([row])).logits[0].numpy()).max() <= 1e-4


def test_a_mixture_equals_the_sum_of_its_deltas(world):
    """Linear in the weights at the first layer only; so compare with PEFT's own weighted combination."""
    hf = LlamaForCausalLM.from_pretrained(world["hf_folder"])
    peft = PeftModel.from_pretrained(hf, world["peft"]["apple"], adapter_name="apple")
    peft.load_adapter(world["peft"]["daisy"], "daisy")
    peft.add_weighted_adapter(["apple", "daisy"], [0.3, 0.9], "mix", combination_type="cat")
    peft.set_adapter("mix")
    ours = np.asarray(world["model"].logits(ROWS, mj.Fixed({"apple": 0.3, "daisy": 0.9})))
    for row, logits in zip(ROWS, ours, strict=True):
        with torch.no_grad():
            assert np.abs(logits[: len(row)] - peft.eval()(torch.tensor([row])).logits[0].numpy()).max() <= 1e-4


@pytest.mark.parametrize("seed", parameters(range(3), [0], "another order"))
def test_bank_order_and_padding_change_nothing(tmp_path, world, seed):
    """Another order of the bank (its gates still in the old one) and a wider unrelated rank: the same logits."""
    order = np.random.default_rng(seed).permutation(len(NAMES))
    names = tuple(NAMES[i] for i in order)
    wide = tiny_peft(tmp_path, world["hf_folder"], "wide", r=16, seed=3)
    folders = {n: world["peft"][n] for n in names}
    converters.import_adapters(tmp_path / "bank", world["base"], folders)
    shuffled = mj.load(world["base"], tmp_path / "bank", world["gates"], dtype="float32")
    want = np.asarray(world["model"].logits(ROWS))
    assert shuffled.adapter_names == names
    assert np.abs(np.asarray(shuffled.logits(ROWS)) - want).max() <= 2e-4
    converters.import_adapters(tmp_path / "padded", world["base"], {**folders, "wide": wide})
    padded = mj.load(world["base"], tmp_path / "padded", dtype="float32")
    for name in NAMES:
        ours, before = (np.asarray(m.logits(ROWS, mj.Fixed(name))) for m in (padded, shuffled))
        assert np.abs(ours - before).max() <= 1e-4


def test_an_adapter_that_no_gate_chooses_changes_nothing(tmp_path, world):
    """Its gate column repeats the first adapter's, and ties go to the lowest index: with C = 1 it never acts."""
    extra = tiny_peft(tmp_path, world["hf_folder"], "extra", seed=77)
    converters.import_adapters(tmp_path / "bank", world["base"], {**world["peft"], "extra": extra})
    gates = {p: np.concatenate([g, g[..., :1]], -1) for p, g in world["gate_arrays"].items()}
    save_gates(tmp_path / "gates", GateConfig((*NAMES, "extra"), 1, 1.0), gates)
    grown = mj.load(world["base"], tmp_path / "bank", tmp_path / "gates", dtype="float32")
    want = np.asarray(world["model"].logits(ROWS, mj.Gates(1)))
    assert np.abs(np.asarray(grown.logits(ROWS, mj.Gates(1))) - want).max() <= 1e-4


def test_a_mixed_batch_equals_its_rows(world):
    model = world["model"]
    routers = [
        mj.Gates(2),
        mj.Fixed("birch"),
        None,
        mj.Gates(1),
        mj.Gates(3, 15.0),
        mj.Fixed({"apple": 0.5, "cedar": 2}),
    ]
    rows = [ROWS[0], ROWS[1], ROWS[2], ROWS[2], ROWS[0], ROWS[1]]
    together = np.asarray(model.logits(rows, routers))
    for row, router, logits in zip(rows, routers, together, strict=True):
        alone = np.asarray(model.logits([row], [router]))[0]
        assert np.abs(logits[: len(row)] - alone[: len(row)]).max() <= 1e-4


def test_a_row_without_a_router_is_the_bare_base(world):
    model = world["model"]
    mixed = np.asarray(model.logits([ROWS[0], ROWS[0]], [None, mj.Gates(2)]))
    bare = np.asarray(model.logits([ROWS[0]], None))
    assert np.abs(mixed[0] - bare[0]).max() <= 1e-6
    assert np.abs(mixed[1] - bare[0]).max() > 1e-2


def test_trace_holds_what_the_gates_chose(world):
    done = world["model"].generate([ROWS[0], ROWS[1]], [mj.Gates(2), None], max_new_tokens=5)
    trace = done[0].routing
    shape = (len(ROWS[0]) + len(done[0].token_ids), 3, len(PROJECTIONS), 2)
    assert trace.indices.shape == trace.weights.shape == shape
    assert (trace.prompt_length, trace.adapter_names) == (len(ROWS[0]), NAMES)
    fed = trace.indices[:-1] if done[0].finish_reason == "length" else trace.indices
    assert fed.min() >= 0
    assert fed.max() < len(NAMES)
    assert done[1].routing is None, "no router acted on the base's row"
    # the first layer's first group sees nothing but the token: recompute it
    llama = world["hf"].model
    x = llama.layers[0].input_layernorm(llama.embed_tokens(torch.tensor(ROWS[0]))).detach().numpy()
    for p, projection in enumerate(GROUPS["qkv"]):
        logits = x @ world["gate_arrays"][projection][0]
        want = np.argsort(-logits, axis=-1, kind="stable")[:, :2]
        assert np.array_equal(trace.indices[: len(ROWS[0]), 0, p], want)


@pytest.mark.parametrize(
    ("router", "said"),
    [
        (mj.Fixed("elm"), "'elm'"),
        ([mj.Fixed("apple")], "found 1"),
        ("apple", "found 'apple'"),
        (mj.Fixed, "Phatgoose, Logo, None or a list of them, found <class"),
        (mj.Gates(9), "at most 4"),
    ],
)
def test_bad_routers_are_refused(world, router, said):
    with pytest.raises(InputError, match="expected") as refusal:
        world["model"].logits(ROWS, router)
    assert said in str(refusal.value)


def test_a_refusal_names_all_routers_that_there_are():
    kinds = (getattr(mj, name) for name in mj.__all__)
    methods = "bind", "router", "after_pass"
    there = {k.__name__ for k in kinds if isinstance(k, type) and any(callable(getattr(k, m, None)) for m in methods)}
    with pytest.raises(InputError) as refusal:
        refuse(3)
    named = str(refusal.value).removeprefix("router: expected ").partition(", None")[0].split(", ")
    assert set(named) == there - {"Meteora", "Router", "Routing"}  # what has routers, the protocol, and what they make


def test_gates_without_gates_are_refused(world):
    model = mj.load(world["base"], world["bank"], dtype="float32")
    with pytest.raises(InputError, match="expected trained gates"):
        model.logits(ROWS, mj.Gates())
    with pytest.raises(InputError, match="expected a bank"):
        mj.load(world["base"], dtype="float32").logits(ROWS, mj.Fixed("apple"))
    with pytest.raises(InputError, match="top_k: expected at least 1"):
        mj.Gates(0)
