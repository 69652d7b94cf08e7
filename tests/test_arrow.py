"""Arrow: against peft's own, general-knowledge subtraction too, and against singular vectors of whole matrices."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from hooked import arrow, routed_logits, scores_of, softmax_of_best
from peft.tuners.lora.arrow import ArrowLoraLinearLayer, create_arrow_model
from peft.tuners.lora.config import ArrowConfig
from tiny import tiny_llama, tiny_peft
from transformers import LlamaForCausalLM

import converters
import meteora_jax as mj
from meteora_jax.bank import AdapterBank
from meteora_jax.cli import main
from meteora_jax.config import PROJECTIONS, InputError
from meteora_jax.spectra import spectra

TOKENS = np.random.default_rng(3).integers(3, 300, (2, 11)).tolist()


@pytest.fixture(scope="module")
def alike(tmp_path_factory):
    """Adapters of one shape, as peft's Arrow wants them: three tasks' and two of general knowledge."""
    folder = tmp_path_factory.mktemp("alike")
    _, hf = tiny_llama(folder)
    names = ("one", "two", "three", "wiki", "web")
    peft = {name: tiny_peft(folder, hf, name, seed=i + 1, lora_alpha=2 + i) for i, name in enumerate(names)}
    converters.import_base(hf, folder / "base")
    converters.import_adapters(folder / "bank", folder / "base", peft)
    return {"hf": hf, "peft": peft, "base": folder / "base", "bank": folder / "bank", "folder": folder}


def peft_logits(alike, monkeypatch: pytest.MonkeyPatch, general: list[str], **config) -> np.ndarray:
    # its power iteration is far from the singular vector after 15 rounds where two values are close
    monkeypatch.setattr(ArrowLoraLinearLayer.top_right_singular_vec_from_BA, "__defaults__", (600, 1e-8))
    paths = {name: str(path) for name, path in alike["peft"].items()}
    tasks = [paths[name] for name in ("one", "two", "three")]
    base = LlamaForCausalLM.from_pretrained(alike["hf"])
    settings = ArrowConfig(use_gks=bool(general), rng_seed=1, **config)
    model = create_arrow_model(base, tasks, settings, [paths[name] for name in general] or None).eval()
    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits.numpy()


def bank_of_tasks(alike, general: list[str]) -> Path:
    bank = alike["folder"] / f"bank-{len(general)}"
    if general:
        main(["bank", "subtract", str(alike["bank"]), str(bank), *general, "--base", str(alike["base"])])
    else:
        converters.take_adapters(alike["bank"], bank, ["one", "two", "three"])
    return bank


@pytest.mark.parametrize("general", [[], ["wiki", "web"]], ids=["plain", "general knowledge subtracted"])
def test_it_is_pefts(alike, monkeypatch, general):
    theirs = peft_logits(alike, monkeypatch, general, top_k=2, router_temperature=0.5)
    model = mj.load(alike["base"], bank_of_tasks(alike, general), dtype="float32")
    assert model.adapter_names == ("one", "two", "three")
    ours = np.asarray(model.logits(TOKENS, mj.Arrow(2, 0.5)))
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    plain = np.asarray(model.logits(TOKENS, None))
    assert np.abs(ours - plain).max() > 0.1


def test_what_cannot_be_subtracted_is_refused(alike, world):
    from meteora_jax.io.bank import load_bank

    bank = load_bank(world["bank"], world["model"].config, "float32")
    with pytest.raises(InputError, match="expected adapters of one rank"):
        bank.less(["apple"], "bank")
    bank = load_bank(alike["bank"], world["model"].config, "float32")
    for general, words in (
        (["nobody"], "expected one of one, two"),
        ([], "found none"),
        (bank.names, "and others"),
        (["wiki", "web", "wiki"], "each general adapter once, found wiki, web, wiki"),
    ):
        with pytest.raises(InputError, match=words):
            bank.less(general, "bank")
    gated = dataclasses.replace(bank, own_gate={"q_proj": np.ones((3, 5, 48), np.float32)})
    with pytest.raises(InputError, match="LoRA matrices alone, found DoRA, biases, own gates"):
        gated.less(["wiki"], "bank")


@pytest.mark.parametrize("within", [None, ("apple", "cedar")])
def test_it_is_the_singular_vectors_of_whole_matrices(world, within):
    """Adapters of several ranks, scales and places: who has no part at a projection is not chosen there."""
    allowed = [within is None or name in within for name in world["peft"]]

    def rule(x, adapters):
        mine = [adapter if may else None for adapter, may in zip(adapters, allowed, strict=True)]
        return softmax_of_best(scores_of(x, mine, arrow), 2)

    expected = routed_logits(world["hf_folder"], world["peft"], rule, TOKENS)
    ours = np.asarray(world["model"].logits(TOKENS, mj.Arrow(2, within=within)))
    np.testing.assert_allclose(ours, np.stack(expected), atol=2e-4)


def test_spectra_of_padded_and_empty_adapters():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 3, 4, 9)).astype("f"), rng.standard_normal((2, 3, 4, 3)).astype("f")  # O < R
    a[:, 1, 2:], b[:, 1, 2:], b[:, 2] = 0, 0, 0  # one of rank 2, one that was never trained
    scale = np.array([[2, -1, 1]] * 2)
    first, r = spectra(a, b, scale)
    assert not first[:, 2].any()
    x = rng.standard_normal(9)
    for layer, i in np.ndindex(2, 3):
        delta = scale[layer, i] * b[layer, i].T.astype("d") @ a[layer, i]
        shrunk = a[layer, i] @ x
        assert np.linalg.norm(r[layer, i] @ shrunk) == pytest.approx(np.linalg.norm(delta @ x), rel=1e-5, abs=1e-9)
        if i < 2:
            v = np.linalg.svd(delta)[2][0]
            assert abs(first[layer, i] @ shrunk) == pytest.approx(abs(v @ x), rel=1e-4)


def test_an_adapter_that_comes_later_is_chosen_too(alike):
    model = mj.load(alike["base"], bank_of_one(alike), dtype="float32").add_adapter(alike["peft"]["two"], "two")
    both = mj.load(alike["base"], bank_of_two(alike), dtype="float32")
    np.testing.assert_array_equal(model.logits(TOKENS, mj.Arrow(2)), both.logits(TOKENS, mj.Arrow(2)))


def bank_of_one(alike) -> Path:
    converters.take_adapters(alike["bank"], alike["folder"] / "first", ["one"])
    return alike["folder"] / "first"


def bank_of_two(alike) -> Path:
    converters.take_adapters(alike["bank"], alike["folder"] / "both", ["one", "two"])
    return alike["folder"] / "both"


def test_bad_arguments_are_refused(world):
    for arguments, words in (
        ({"top_k": 0}, "top_k"),
        ({"temperature": 0.0}, "temperature"),
        ({"within": ()}, "within"),
    ):
        with pytest.raises(InputError, match=f"Arrow: {words}"):
            mj.Arrow(**arguments)
    for router, words in ((mj.Arrow(5), "at most 4"), (mj.Arrow(1, within=("nobody",)), "found 'nobody'")):
        with pytest.raises(InputError, match=words):
            world["model"].logits(TOKENS, router)


def test_the_bank_holds_no_more_than_before(alike, world):
    """What routers read is made when adapters are put into a model: folders are as they were."""
    from meteora_jax.io.bank import load_bank

    bank = load_bank(alike["bank"], world["model"].config, "float32")
    assert isinstance(bank, AdapterBank)
    assert set(bank.config.weight_shapes()) == {f"{p}.{part}" for p in PROJECTIONS for part in ("a", "b", "scale")}
