"""Adapters on the embedding and the head: peft's logits and tokens, round trips, routing by request, refusals."""

import json
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from extent import parameters
from meshes import mesh_of
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny import assert_refused, edit_json, edit_safetensors, tiny_llama, tiny_peft
from transformers import LlamaForCausalLM

import meteora_jax as mj
from converters import describe_adapters, export_adapter, export_merged, import_adapters, import_base
from meteora_jax.config import InputError
from meteora_jax.routing.retrieval import Composed

ROWS = [[5, 6, 7, 8, 9, 300, 17], [7, 7, 40, 41, 319, 5, 0]]
WEIGHTS = "adapter_model.safetensors"
PEFT_TIES = "Model has `tie_word_embeddings=True`"  # and an adapter on one of the tied matrices: peft's warning
OPTIONS: dict[str, dict[str, Any]] = {
    "embed": {"target_modules": ["q_proj", "embed_tokens"]},
    "head": {"target_modules": ["up_proj", "lm_head"]},
    "both": {
        "target_modules": ["embed_tokens", "lm_head", "v_proj"], "use_rslora": True,
        "rank_pattern": {"lm_head": 7, "embed_tokens": 2}, "alpha_pattern": {"model.embed_tokens": 3},
    },
    "alone": {"target_modules": ["embed_tokens", "lm_head"]},
    "regex": {"target_modules": r".*\.(0\.self_attn\.q_proj|embed_tokens)"},
    "list": {"trainable_token_indices": [7, 5, 319]},
    "dict": {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [7, 5], "lm_head": [9, 17, 0]}},
    "same rows": {"trainable_token_indices": {"embed_tokens": [319, 5], "lm_head": [319, 5]}},
    "embed rows": {"trainable_token_indices": {"embed_tokens": [7, 5]}},
    "head rows": {"trainable_token_indices": {"lm_head": [9, 300]}},
    "rows and head": {"target_modules": ["q_proj", "lm_head"], "trainable_token_indices": [7, 300]},
}  # fmt: skip


def write_adapter(
    tmp_path: Path, hf: Path, name: str, seed: int = 1, lora: float = 1.0, **options: Any
) -> tuple[Any, Path]:
    """(peft's model, its folder); retrained rows are random too, and LoRA, `lora` times as large (0: none)."""
    settings: dict[str, Any] = {"r": 3, "lora_alpha": 8, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    base = LlamaForCausalLM.from_pretrained(hf, attn_implementation="eager")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", PEFT_TIES)
        model = get_peft_model(base, LoraConfig(**{**settings, **options})).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, p in model.named_parameters():
            if "lora_" in key and lora:
                p.copy_(lora * torch.randn(p.shape, generator=generator) / p.shape[0] ** 0.5)
            elif "trainable_tokens" in key:
                p.copy_(torch.randn(p.shape, generator=generator))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Setting `save_embedding_layers`")
        model.save_pretrained(tmp_path / name)  # with a copy of the base's matrix beside a LoRA on it
    return model, tmp_path / name


def logits_of(model: Any, rows: list[list[int]] = ROWS) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(rows)).logits.numpy()


@pytest.mark.filterwarnings(f"ignore:{PEFT_TIES}")
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(
    "name",
    parameters(OPTIONS, ["both", "regex", "dict", "same rows", "rows and head"], "alone what the others have together"),
)
def test_logits_tokens_and_round_trip_equal_peft(tmp_path: Path, name: str, tied: bool):
    _, hf = tiny_llama(tmp_path, tie_word_embeddings=tied)
    base, bank, dest = (tmp_path / f for f in ("base", "bank", "out"))
    import_base(hf, base)
    theirs, folder = write_adapter(tmp_path, hf, "adapter", **OPTIONS[name])
    call = partial(import_adapters, bank, base, {"a": folder})
    if (
        tied and name == "rows and head"
    ):  # peft ties nothing to a head that is LoRA's: which rows count is anyone's guess
        assert_refused(call, bank, "trainable_token_indices: expected a head tied to the retrained rows")
        return
    call()
    model = mj.load(base, bank, dtype="float32")
    want, bare = logits_of(theirs), np.asarray(model.logits(ROWS, None))
    assert np.abs(want - bare).max() > 0.1
    assert np.abs(np.asarray(model.logits(ROWS, mj.Fixed("a"))) - want).max() <= 1e-4
    done = model.generate([ROWS[0]], mj.Fixed("a"), max_new_tokens=12)[0].token_ids
    said = theirs.generate(input_ids=torch.tensor([ROWS[0]]), max_new_tokens=12, do_sample=False, pad_token_id=0)
    assert done == [t for t in said[0, len(ROWS[0]) :].tolist() if t != 2]

    raw = export_adapter(bank, "a", dest)
    assert raw == json.loads((folder / "adapter_config.json").read_text())
    ours, before = load_file(dest / WEIGHTS), load_file(folder / WEIGHTS)
    assert ours.keys() == {key for key in before if "base_layer" not in key}
    assert all(torch.equal(ours[key], before[key]) for key in ours)
    fresh = LlamaForCausalLM.from_pretrained(hf, attn_implementation="eager")
    assert np.array_equal(logits_of(PeftModel.from_pretrained(fresh, dest).eval()), want)
    import_adapters(tmp_path / "again", base, {"a": dest})
    files = [load_file(f / "weights.safetensors") for f in (bank, tmp_path / "again")]
    assert all(torch.equal(files[0][key], files[1][key]) for key in files[0])


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A base and a bank of four adapters: three that differ at the ends, one of the layers alone."""
    folder = tmp_path_factory.mktemp("ends")
    _, hf = tiny_llama(folder)
    import_base(hf, folder / "base")
    adapters = {
        "a": write_adapter(folder, hf, "a", 1, **OPTIONS["alone"])[1],
        "b": write_adapter(folder, hf, "b", 2, **OPTIONS["alone"], r=5, lora_alpha=7)[1],
        "rows": write_adapter(folder, hf, "rows", 3, **OPTIONS["dict"])[1],
        "plain": tiny_peft(folder, hf, "plain"),
    }
    import_adapters(folder / "bank", folder / "base", adapters)
    model = mj.load(folder / "base", folder / "bank", dtype="float32")
    return {"folder": folder, "hf": hf, "model": model, "adapters": adapters}


def merged_logits(world: dict[str, Any], weights: dict[str, float], fused: bool) -> np.ndarray:
    """Of the base with the LoRA of its ends, composed as the formulas say, added to its two matrices."""
    model = LlamaForCausalLM.from_pretrained(world["hf"], attn_implementation="eager").double().eval()
    scale, parts = {"a": 8 / 3, "b": 7 / 5}, {}
    for name in weights:
        found = load_file(world["adapters"][name] / WEIGHTS)
        parts[name] = {key.partition("base_model.model.")[2]: t.double() for key, t in found.items()}
    keys = {
        "embed": ("model.embed_tokens.lora_embedding_A", "model.embed_tokens.lora_embedding_B"),
        "head": ("lm_head.lora_A.weight", "lm_head.lora_B.weight"),
    }
    for end, (a, b) in keys.items():
        each = [(w, scale[n], parts[n][a], parts[n][b]) for n, w in weights.items()]
        if fused:
            rank = max(len(a) for _, _, a, _ in each)

            def pad(t, rank=rank):
                return torch.nn.functional.pad(t, (0, 0, 0, rank - len(t)))

            delta = sum(w * s * pad(b.T) for w, s, _, b in each).T @ sum(w * pad(a) for w, _, a, _ in each)
        else:
            delta = sum(w * s * b @ a for w, s, a, b in each)
        with torch.no_grad():
            weight = model.model.embed_tokens.weight if end == "embed" else model.lm_head.weight
            weight += delta.T if end == "embed" else delta
    return logits_of(model)


@pytest.mark.parametrize("fused", [False, True], ids=["mixture", "fusion"])
def test_compositions_follow_their_formulas(world: dict[str, Any], fused: bool):
    weights = {"a": 0.4, "b": 0.6}
    router = Composed(tuple(weights.items()), True) if fused else mj.Fixed(weights)
    ours = np.asarray(world["model"].logits(ROWS, router))
    assert np.abs(ours - merged_logits(world, weights, fused)).max() <= 1e-4
    assert np.abs(ours - merged_logits(world, weights, not fused)).max() > 0.1


def test_retrained_rows_mix_by_weight(world: dict[str, Any], tmp_path: Path):
    """Half of an adapter's rows and half of the base's, at both ends."""
    _, folder = write_adapter(tmp_path, world["hf"], "rows", 3, lora=0.0, **OPTIONS["dict"])
    found = load_file(folder / WEIGHTS)
    rows = {key.partition("base_model.model.")[2]: t for key, t in found.items()}
    model = LlamaForCausalLM.from_pretrained(world["hf"], attn_implementation="eager").eval()
    with torch.no_grad():
        for module, ids in (("model.embed_tokens", [7, 5]), ("lm_head", [9, 17, 0])):
            weight: Any = model.get_submodule(module).weight
            mine = rows[f"{module}.token_adapter.trainable_tokens_delta"]
            weight[ids] = 0.5 * weight[ids] + 0.5 * mine
    import_adapters(tmp_path / "bank", world["folder"] / "base", {"rows": folder})
    alone = mj.load(world["folder"] / "base", tmp_path / "bank", dtype="float32")
    ours = np.asarray(alone.logits(ROWS, mj.Fixed({"rows": 0.5})))
    assert np.abs(ours - logits_of(model)).max() <= 1e-4


@pytest.mark.exhaustive("six prompts; one adapter a kind is in the test above")
def test_every_prompt_has_its_own(world: dict[str, Any]):
    model = world["model"]
    routers = [mj.Fixed("a"), None, Composed((("b", 1.0),), False), mj.Fixed("rows"), mj.Fixed("plain")]
    rows = [ROWS[i % 2] for i in range(len(routers))]
    together = np.asarray(model.logits(rows, routers))
    said = [c.token_ids for c in model.generate(rows, routers, max_new_tokens=6)]
    for i, (row, router) in enumerate(zip(rows, routers, strict=True)):
        alone = np.asarray(model.logits([row], [router]))[0]
        assert np.abs(together[i] - alone).max() <= 1e-4
        assert said[i] == model.generate([row], [router], max_new_tokens=6)[0].token_ids
    assert len({t.tobytes() for t in together[::2]}) == 3


@pytest.mark.exhaustive("a mesh once more; test_sharding has one")
def test_a_mesh_gives_the_same(world: dict[str, Any]):
    folder, routers = world["folder"], [mj.Fixed("a"), mj.Fixed({"b": 0.5, "rows": 0.5})]
    model = mj.load(folder / "base", folder / "bank", mesh=mesh_of(1, 2, 2), dtype="float32")
    assert "tensor" in str(model.weights["head_adapters"]["lora_b"][...].sharding.spec)
    found, want = (np.asarray(m.logits(ROWS, routers)) for m in (model, world["model"]))
    assert np.abs(found - want).max() <= 1e-4


def test_half_precision(world: dict[str, Any]):
    model = mj.load(world["folder"] / "base", world["folder"] / "bank", dtype="bfloat16")
    for name in ("a", "rows"):
        ours, want = (np.asarray(m.logits(ROWS, mj.Fixed(name))) for m in (model, world["model"]))
        assert np.abs(ours - want).mean() <= 0.05 * np.abs(want).mean()


def test_gates_are_refused_where_none_stands(world: dict[str, Any], tmp_path: Path):
    from meteora_jax.config import PROJECTIONS
    from meteora_jax.gate_config import GateConfig
    from meteora_jax.io.gates import save_gates

    folder, config = world["folder"], world["model"].config
    zeros = {p: np.zeros((3, config.projection_shape(p)[0], 4)) for p in PROJECTIONS}
    save_gates(tmp_path / "gates", GateConfig(("a", "b", "rows", "plain"), 2, 1.0), zeros)
    model = mj.load(folder / "base", folder / "bank", tmp_path / "gates", dtype="float32")
    said = "router: expected one that names the adapters of a request .* a, b, rows change the embedding or the head"
    for router in ("gates if loaded", [mj.Fixed("a"), mj.Gates(1)]):
        with pytest.raises(InputError, match=said):
            model.logits(ROWS, router)
        with pytest.raises(InputError, match=said):
            model.generate(ROWS, router, max_new_tokens=2)
    assert np.asarray(model.logits(ROWS, mj.Fixed("plain"))).shape == (2, 7, 320)


def test_what_is_refused(tmp_path: Path):
    _, hf = tiny_llama(tmp_path)
    base, dest = tmp_path / "base", tmp_path / "bank"
    import_base(hf, base)
    cases: list[tuple[str, dict[str, Any], Any, str]] = [
        ("embed", {"use_dora": True}, None, "use_dora: expected false with an adapter on model.embed_tokens"),
        ("head", {"lora_bias": True}, None, "lora_bias: expected false with an adapter on lm_head"),
        ("embed", {"trainable_token_indices": [3]}, None, "expected none of model.embed_tokens with a LoRA on it"),
        ("list", {"trainable_token_indices": [3, 3, 4]}, None, "expected different token ids"),
        ("list", {"trainable_token_indices": [3, 4, -1]}, None, "expected different token ids"),
        ("list", {"trainable_token_indices": "5"}, None, "expected different token ids"),
        ("list", {"trainable_token_indices": {"q_proj": [3]}}, None, "expected ids by embed_tokens, lm_head"),
        ("list", {"trainable_token_indices": [3, 4, 320]}, None, "expected token ids below 320, found 320"),
        ("list", {"trainable_token_indices": [3]}, None, "trainable_tokens_delta: expected shape (1, 48)"),
        ("list", {"trainable_token_indices": None}, None, "trainable_tokens_delta: expected shape (0, 48)"),
        (
            "dict", {}, lambda t: t.pop("base_model.model.lm_head.token_adapter.trainable_tokens_delta"),
            "trainable_token_indices: expected 3 rows of lm_head, found none",
        ),
        ("embed", {"target_modules": ["q_proj"]}, None, "target_modules: expected none on model.embed_tokens"),
        ("embed", {}, lambda t: t.pop("base_model.model.model.embed_tokens.lora_embedding_B"), "found no lora_B"),
        ("embed", {"r": 4}, None, "lora_embedding_A: expected shape (4, 320)"),
        ("embed", {}, lambda t: t["base_model.model.model.embed_tokens.base_layer.weight"].add_(1), "of the base"),
        (
            "head", {}, lambda t: t.update({"base_model.model.lm_head.lora_embedding_A": torch.ones(3, 48)}),
            "lm_head.lora_embedding_A: expected lora_A or lora_B of q_proj",
        ),
        ("head", {}, lambda t: t["base_model.model.lm_head.lora_B.weight"].fill_(torch.nan), "expected finite values"),
    ]  # fmt: skip
    for number, (name, settings, edit, said) in enumerate(cases):
        _, folder = write_adapter(tmp_path, hf, f"adapter{number}", **OPTIONS[name])
        edit_json(folder / "adapter_config.json", **settings)
        if edit is not None:
            edit_safetensors(folder / WEIGHTS, edit)
        assert_refused(lambda f=folder: import_adapters(dest, base, {"a": f}), dest, said)


def test_reports_and_exports(world: dict[str, Any], tmp_path: Path):
    folder = world["folder"]
    _, plans = describe_adapters(folder / "base", {"a": world["adapters"]["a"], "rows": world["adapters"]["rows"]})
    to = {row.key.partition("base_model.model.")[2]: (row.to, row.how) for row in plans["a"]}
    assert to["lm_head.lora_B.weight"] == ("head.b[0]", "transposed, scale 2.66667")
    assert to["lm_head.base_layer.weight"] == (None, "dropped: must equal the base's")
    rows = {row.to for row in plans["rows"]}
    assert {"embed.rows[1]", "head.rows[1]"} <= rows
    assert world["model"].bank.vocab_adapter_names == ("a", "b", "rows")
    said = "expected an adapter of the layers, found a, which changes the embedding or the head"
    call = partial(export_merged, folder / "base", folder / "bank", "a", tmp_path / "out")
    assert_refused(call, tmp_path / "out", said)
    export_merged(folder / "base", folder / "bank", "plain", tmp_path / "out")
    bank = json.loads((folder / "bank" / "bank.json").read_text())
    (tmp_path / "bank").mkdir()
    (tmp_path / "bank" / "weights.safetensors").write_bytes((folder / "bank" / "weights.safetensors").read_bytes())
    for changes, said in (
        ({"vocab_shape": [321, 48]}, "vocab_shape: expected (320, 48) (the base's), found (321, 48)"),
        ({"vocab_shape": None}, "expected a bank's description, found a malformed one"),
        ({"ends": {"tail": bank["ends"]["head"]}}, "expected a bank's description, found a malformed one"),
        ({"ends": {**bank["ends"], "head": {"rank": 9, "tokens": [[]] * 4}}}, "head.a: expected shape (4, 9, 48)"),
    ):
        (tmp_path / "bank" / "bank.json").write_text(json.dumps(bank | changes))
        with pytest.raises(InputError) as error:
            mj.load(folder / "base", tmp_path / "bank")
        assert said in str(error.value)
