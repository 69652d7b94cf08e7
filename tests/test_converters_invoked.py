"""Adapters that a token sequence switches on (aLoRA): peft's logits and tokens, mixtures, round trips, refusals."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from test_converters_vocab import OPTIONS, WEIGHTS, logits_of, write_adapter
from tiny import assert_refused, edit_json, tiny_llama, tiny_peft
from transformers import LlamaForCausalLM

import meteora_jax as mj
from converters import export_adapter, export_gates, export_merged, import_adapters, import_base
from meteora_jax.cli import main
from meteora_jax.config import PROJECTIONS, InputError
from meteora_jax.gate_config import GateConfig
from meteora_jax.io.gates import save_gates
from meteora_jax.routing.alora import NEVER, activation
from meteora_jax.routing.retrieval import Composed
from meteora_jax.training.gates import train_gates
from meteora_jax.training.settings import GateTraining

# peft warns of biases where the base has none, and mistakes them for tensors that were lost
pytestmark = pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed", "ignore:Adapter 'default'")
INVOCATION = [40, 7, 40]
PROMPTS = {
    "once": [5, 6, 40, 7, 40, 300, 17],
    "absent": [5, 6, 40, 7, 41, 300, 17, 40, 7],
    "twice": [5, 40, 7, 40, 6, 9, 40, 7, 40, 300],
    "overlapping": [5, 40, 7, 40, 7, 40, 300],
    "first": [40, 7, 40, 5, 6],
    "last": [5, 6, 9, 12, 40, 7, 40],
    "too short": [7, 40],
}
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Two adapters with invocations (one with biases, which peft can have there), a plain one, one of the ends."""
    folder = tmp_path_factory.mktemp("invoked")
    _, hf = tiny_llama(folder)
    import_base(hf, folder / "base")
    wait: dict[str, Any] = {"target_modules": ALL, "alora_invocation_tokens": INVOCATION}
    theirs, adapters = {}, {}
    for seed, (name, options) in enumerate(
        {
            "waits": wait,
            "biased": {**wait, "r": 5, "lora_bias": True, "alora_invocation_tokens": [9]},
            "plain": {"target_modules": ALL, "r": 4},
            "ends": OPTIONS["alone"],
        }.items()
    ):
        theirs[name], adapters[name] = write_adapter(folder, hf, name, seed, **options)
    import_adapters(folder / "bank", folder / "base", adapters)
    model = mj.load(folder / "base", folder / "bank", dtype="float32")
    return {"folder": folder, "hf": hf, "model": model, "adapters": adapters, "theirs": theirs}


def test_activation_is_the_start_of_the_last_occurrence():
    found = {name: activation(prompt, INVOCATION) for name, prompt in PROMPTS.items()}
    assert found == {
        "once": 2, "absent": NEVER, "twice": 6, "overlapping": 3, "first": 0, "last": 4, "too short": NEVER,
    }  # fmt: skip


@pytest.mark.parametrize("name", PROMPTS)
def test_logits_and_tokens_equal_peft(world: dict[str, Any], name: str):
    model, theirs, prompt = world["model"], world["theirs"]["waits"], PROMPTS[name]
    want, bare = logits_of(theirs, [prompt]), np.asarray(model.logits([prompt], None))
    ours = np.asarray(model.logits([prompt], mj.Fixed("waits")))
    assert np.abs(ours - want).max() <= 1e-4
    start = activation(prompt, INVOCATION)
    assert np.abs(ours - bare)[:, :start].max(initial=0.0) <= 1e-6
    assert start == NEVER or np.abs(ours - bare)[:, start:].max(axis=2).min() > 0.1
    done = model.generate([prompt], mj.Fixed("waits"), max_new_tokens=12)[0]
    said = theirs.generate(input_ids=torch.tensor([prompt]), max_new_tokens=12, do_sample=False, pad_token_id=0)
    assert done.token_ids == [t for t in said[0, len(prompt) :].tolist() if t != 2]
    assert done.routing is not None
    acted = (done.routing.indices == 0).all(axis=(1, 2, 3))[:-1]  # the last token was never read
    assert acted.tolist() == [i >= start for i in range(len(acted))]
    assert np.array_equal(done.routing.weights[:-1, 0, 0, 0], acted)


def test_biases_wait_too(world: dict[str, Any]):
    prompt = PROMPTS["twice"]
    want = logits_of(world["theirs"]["biased"], [prompt])
    assert np.abs(np.asarray(world["model"].logits([prompt], mj.Fixed("biased"))) - want).max() <= 1e-4


@pytest.mark.exhaustive("rows alone are compared with peft above, ragged batches in test_generation")
def test_ragged_batches_equal_peft_row_by_row(world: dict[str, Any]):
    model = world["model"]
    rows = [*PROMPTS.values(), *PROMPTS.values()]
    names = ["waits", "plain", "biased", "waits", None, "ends", "waits"] * 2
    names = [*names[1:], names[0]]
    routers = [mj.Fixed(name) if name else None for name in names]
    together = np.asarray(model.logits(rows, routers))
    said = [c.token_ids for c in model.generate(rows, routers, max_new_tokens=8)]
    bare = LlamaForCausalLM.from_pretrained(world["hf"], attn_implementation="eager").eval()
    for i, (row, name) in enumerate(zip(rows, names, strict=True)):
        theirs = world["theirs"][name] if name else bare
        assert np.abs(together[i, : len(row)] - logits_of(theirs, [row])[0]).max() <= 1e-4
        want = theirs.generate(input_ids=torch.tensor([row]), max_new_tokens=8, do_sample=False, pad_token_id=0)
        assert said[i] == [t for t in want[0, len(row) :].tolist() if t != 2]


@pytest.mark.parametrize("fused", [False, True], ids=["mixture", "fusion"])
@pytest.mark.exhaustive("two programs more than the tests of aLoRA above")
def test_a_composition_is_without_an_adapter_that_waits(world: dict[str, Any], fused: bool):
    """Before its start the others compose alone; from a first token on it is as an adapter without an invocation."""
    model, prompt = world["model"], PROMPTS["once"]
    weights = {"waits": 0.4, "plain": 0.6}
    router = Composed(tuple(weights.items()), fused)
    ours = np.asarray(model.logits([prompt], router))
    others = np.asarray(model.logits([prompt], Composed((("plain", 0.6),), fused)))
    assert np.abs(ours - others)[:, :2].max() <= 1e-5
    assert np.abs(ours - others)[:, 2:].max(axis=2).min() > 0.1
    folder = world["folder"]
    if not (folder / "always").exists():
        for name in weights:
            settings = json.loads((world["adapters"][name] / "adapter_config.json").read_text())
            (folder / "always" / name).mkdir(parents=True)
            (folder / "always" / name / WEIGHTS).write_bytes((world["adapters"][name] / WEIGHTS).read_bytes())
            settings["alora_invocation_tokens"] = None
            (folder / "always" / name / "adapter_config.json").write_text(json.dumps(settings))
        import_adapters(folder / "bank2", folder / "base", {name: folder / "always" / name for name in weights})
    always = mj.load(folder / "base", folder / "bank2", dtype="float32")
    first = [PROMPTS["first"]]
    assert np.abs(np.asarray(model.logits(first, router)) - np.asarray(always.logits(first, router))).max() <= 1e-5


def test_a_mixture_with_an_adapter_of_the_ends(world: dict[str, Any]):
    """Embedding and head do not wait: before the start it is the other adapter alone."""
    model, prompt = world["model"], PROMPTS["once"]
    ours = np.asarray(model.logits([prompt], mj.Fixed({"waits": 0.5, "ends": 0.5})))
    others = np.asarray(model.logits([prompt], mj.Fixed({"ends": 0.5})))
    assert np.abs(ours - others)[:, :2].max() <= 1e-5
    assert np.abs(ours - others)[:, 2:].max(axis=2).min() > 0.1


def test_round_trip(world: dict[str, Any], tmp_path: Path):
    folder, dest = world["folder"], tmp_path / "out"
    for name in ("waits", "biased"):
        raw = export_adapter(folder / "bank", name, dest, overwrite=True)
        assert raw == json.loads((world["adapters"][name] / "adapter_config.json").read_text())
        ours, before = load_file(dest / WEIGHTS), load_file(world["adapters"][name] / WEIGHTS)
        assert ours.keys() == before.keys()
        assert all(torch.equal(ours[key], before[key]) for key in ours)
        fresh = LlamaForCausalLM.from_pretrained(world["hf"], attn_implementation="eager")
        rows = [PROMPTS["once"]]
        assert np.array_equal(
            logits_of(PeftModel.from_pretrained(fresh, dest).eval(), rows), logits_of(world["theirs"][name], rows)
        )
    bank = json.loads((folder / "bank" / "bank.json").read_text())
    assert [a["invocation"] for a in bank["adapters"]] == [INVOCATION, [9], [], []]
    bank["adapters"][0]["peft_config"] = {}  # settings derived from the tensors say it too
    (tmp_path / "bank").mkdir()
    (tmp_path / "bank" / "bank.json").write_text(json.dumps(bank))
    (tmp_path / "bank" / "weights.safetensors").write_bytes((folder / "bank" / "weights.safetensors").read_bytes())
    assert export_adapter(tmp_path / "bank", "waits", dest, overwrite=True)["alora_invocation_tokens"] == INVOCATION
    bank["adapters"][1]["invocation"] = [8]
    (tmp_path / "bank" / "bank.json").write_text(json.dumps(bank))
    with pytest.raises(InputError, match=r"alora_invocation_tokens: expected \[8\] \(the bank's\), found \[9\]"):
        export_adapter(tmp_path / "bank", "biased", dest, overwrite=True)


def test_what_is_refused(world: dict[str, Any], tmp_path: Path):
    folder, model, dest = world["folder"], world["model"], tmp_path / "out"
    base, bank, gates = folder / "base", folder / "bank", tmp_path / "gates"
    said = "expected an adapter that acts on every token, found waits, which acts from its invocation on"
    assert_refused(lambda: export_merged(base, bank, "waits", dest), dest, said)
    zeros = {p: np.zeros((3, model.config.projection_shape(p)[0], 2)) for p in PROJECTIONS}
    save_gates(gates, GateConfig(("waits", "plain"), 2, 1.0), zeros)
    two = tmp_path / "two"
    import_adapters(two, base, {name: world["adapters"][name] for name in ("waits", "plain")})
    assert_refused(lambda: export_gates(base, two, gates, dest), dest, "invocation: expected none", "found waits")
    gated = mj.load(base, two, gates, dtype="float32")
    for router in ("gates if loaded", [mj.Fixed("waits"), mj.Gates(1)]):
        with pytest.raises(
            InputError, match="waits act from their invocation on, of which a choice by token knows nothing"
        ):
            gated.logits([PROMPTS["once"], PROMPTS["twice"]], router)
    assert gated.logits([PROMPTS["once"]], mj.Fixed("waits")).shape == (1, 7, 320)
    with pytest.raises(InputError, match="prompts: expected the tokens in which waits are invoked, found none"):
        gated.bind(mj.Fixed("waits"), 1)

    hf, plain = world["hf"], tiny_peft(tmp_path, world["hf"], "plain")
    cases: list[tuple[Path, dict[str, Any], str]] = [
        (plain, {"alora_invocation_tokens": [320]}, "alora_invocation_tokens: expected token ids below 320, found 320"),
        (plain, {"alora_invocation_tokens": "5 6"}, "alora_invocation_tokens: expected token ids, found '5 6'"),
        (plain, {"alora_invocation_tokens": [True]}, "alora_invocation_tokens: expected token ids, found [True]"),
        (
            tiny_peft(tmp_path, hf, "dora", use_dora=True), {"alora_invocation_tokens": [5]},
            "alora_invocation_tokens: expected none with use_dora, found [5]",
        ),
        (
            write_adapter(tmp_path, hf, "head", **OPTIONS["head"])[1], {"alora_invocation_tokens": [5]},
            "alora_invocation_tokens: expected none with lm_head, found [5]",
        ),
        (
            write_adapter(tmp_path, hf, "rows", **OPTIONS["list"])[1], {"alora_invocation_tokens": [5]},
            "alora_invocation_tokens: expected none with model.embed_tokens, found [5]",
        ),
    ]  # fmt: skip
    for source, settings, message in cases:
        edit_json(source / "adapter_config.json", **settings)
        assert_refused(lambda s=source: import_adapters(dest, base, {"a": s}), dest, message)


def test_an_empty_invocation_is_none(world: dict[str, Any], tmp_path: Path):
    """As in peft, which then makes a plain LoRA of it."""
    source = tiny_peft(tmp_path, world["hf"], "plain")
    edit_json(source / "adapter_config.json", alora_invocation_tokens=[])
    bank = import_adapters(tmp_path / "bank", world["folder"] / "base", {"a": source})
    assert bank.invoked == ()


def test_training_gates_and_the_command_line(world: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    base, two = str(world["folder"] / "base"), str(tmp_path / "bank")
    pairs = [f"{name}={world['adapters'][name]}" for name in ("waits", "plain")]
    main(["import", "adapters", two, *pairs, "--base", base])
    assert f"waits: rank 3, {' '.join(ALL)}, from tokens 40 7 40 on" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"expected adapters that act on every token \(gates choose for each\), found"):
        train_gates(base, two, {}, tmp_path / "gates", GateTraining())
