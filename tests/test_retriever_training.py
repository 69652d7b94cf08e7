"""Contrastive training: the loss equals its formula in torch, runs repeat and resume, and learning helps."""

import copy
import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from meshes import every_device
from test_encoder import sentence_folder

from converters.hf_encoder import import_encoder
from meteora_jax.cli.train_retriever import cut_line
from meteora_jax.config import InputError
from meteora_jax.retriever.encoder import TextEncoder
from meteora_jax.retriever.index import Index
from meteora_jax.retriever.settings import RetrieverTraining
from meteora_jax.retriever.training import (
    PairSampler,
    chosen_adapters,
    contrastive_loss,
    train_retriever,
    write_curves,
)

SETTINGS = RetrieverTraining(
    steps=6, batch_size=4, learning_rate=1e-3, warmup=0.1, temperature=0.1, share=1.0, hard_negatives=1, refresh=2,
    bare=0.3, max_length=32, instruction="", save_every=3, seed=0,
)  # fmt: skip
SUBJECTS = ("cat", "dog", "bird", "fish", "horse", "cow", "goat", "hen")
PROFILES = {
    "colours": [f"What colour is the {s}?" for s in SUBJECTS],
    "counting": [f"How many of them are a {s}?" for s in SUBJECTS],
    "eating": [f"Name what the {s} likes to eat." for s in SUBJECTS],
    "sleeping": [f"Does the {s} sleep at night?" for s in SUBJECTS],
}


@pytest.fixture
def encoder(tmp_path) -> TextEncoder:
    sentence_folder(tmp_path / "hf", "bert")
    import_encoder(tmp_path / "hf", tmp_path / "start")
    return TextEncoder.load(tmp_path / "start")


def torch_loss(anchors, candidates, adapters, others, temperature):
    """The formula, anchor by anchor, in float64."""
    cosine = torch.nn.functional.cosine_similarity
    losses = []
    for i, anchor in enumerate(anchors):
        positive = cosine(anchor, candidates[i], dim=0) / temperature
        negatives = [
            cosine(anchor, c, dim=0) / temperature
            for j, c in enumerate(candidates)
            if j != i and others[j] != adapters[i]
        ]
        losses.append(-torch.log(positive.exp() / (positive.exp() + sum(n.exp() for n in negatives))))
    return torch.stack(losses).mean()


def test_the_loss_and_its_gradient_equal_the_formula():
    rng = np.random.default_rng(0)
    anchors, candidates = rng.standard_normal((5, 8)), rng.standard_normal((9, 8))
    adapters, others = np.asarray([0, 1, 0, 2, 3], np.int32), np.asarray([0, 1, 0, 2, 3, 1, 1, 0, 4], np.int32)
    a, c = (torch.tensor(z, requires_grad=True) for z in (anchors, candidates))
    want = torch_loss(a, c, adapters, others, 0.2)
    want.backward()

    def call(x, y):
        return contrastive_loss(x, y, jnp.asarray(adapters), jnp.asarray(others), jnp.float32(0.2))[0]

    given = (jnp.asarray(z, jnp.float32) for z in (anchors, candidates))
    value, gradients = jax.value_and_grad(call, (0, 1))(*given)
    assert abs(float(value) - want.item()) <= 1e-5
    assert np.abs(np.asarray(gradients[0]) - a.grad.numpy()).max() <= 1e-5
    assert np.abs(np.asarray(gradients[1]) - c.grad.numpy()).max() <= 1e-5


def test_pairs_share_an_adapter_and_hard_negatives_do_not():
    sampler = PairSampler(PROFILES, dataclasses.replace(SETTINGS, bare=0.0, batch_size=6, hard_negatives=2))
    rng = np.random.default_rng(0)
    sampler.search(rng.standard_normal((len(sampler.texts), 5)).astype(np.float32))
    texts, adapters = sampler.batch(7)
    assert len(texts) == len(adapters) == 6 + 6 + 12
    assert np.array_equal(adapters[:6], adapters[6:12])
    assert (np.repeat(adapters[:6], 2) != adapters[12:]).all()
    assert all(t in list(PROFILES.values())[a] for t, a in zip(texts, adapters, strict=True))
    assert all(x != y for x, y in zip(texts[:6], texts[6:12], strict=True))
    assert (texts, adapters.tolist()) == (sampler.batch(7)[0], sampler.batch(7)[1].tolist())
    assert sampler.batch(8)[0] != texts


def test_which_adapters_are_trained_on_is_fixed_by_the_seed():
    names = [f"n{i}" for i in range(10)]
    assert chosen_adapters(names, 0.4, 3) == chosen_adapters(names[::-1], 0.4, 3)
    assert len(chosen_adapters(names, 0.4, 3)) == 4
    assert chosen_adapters(names, 0.4, 3) != chosen_adapters(names, 0.4, 4)


def test_training_helps_and_only_the_chosen_are_seen(tmp_path, encoder):
    settings = dataclasses.replace(
        SETTINGS, steps=30, save_every=30, learning_rate=3e-3, hard_negatives=0, bare=0.0, batch_size=8
    )
    report = train_retriever(encoder, PROFILES, tmp_path / "out", settings, tmp_path / "checkpoints")
    losses = [r["loss"] for r in report["steps"]]
    assert np.mean(losses[-8:]) < 0.6 * np.mean(losses[:8])
    trained = TextEncoder.load(tmp_path / "out")
    accuracy = []
    for e in (encoder, trained):
        halves = {n: inputs[:4] for n, inputs in PROFILES.items()}
        index = Index.build(halves, "cosine", e)
        queries = [(t, n) for n, inputs in PROFILES.items() for t in inputs[4:]]
        found = index.query([t for t, _ in queries], k=1).names
        accuracy.append(np.mean([f[0] == n for f, (_, n) in zip(found, queries, strict=True)]))
    assert accuracy[1] >= accuracy[0]
    assert accuracy[1] > 0.8
    assert json.loads((tmp_path / "out" / "training.json").read_text())["trained"] == sorted(PROFILES)
    write_curves(report, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_inputs_that_are_not_read_to_their_end_are_counted(tmp_path, encoder):
    long = {**PROFILES, "eating": [*PROFILES["eating"], "Name what it likes. " * 40]}
    cut = []
    settings = dataclasses.replace(SETTINGS, steps=1, save_every=1)
    report = train_retriever(encoder, long, tmp_path / "out", settings, tmp_path / "points", begun=cut.append)
    assert cut == [{"eating": 1}] == [report["cut"]]
    assert cut_line(report["cut"], long, 32).endswith("their ends are not read: eating 1 of 9")
    assert encoder.cut(["short", "word " * 2000], "behind this: ") == [1]
    assert cut_line({}, long, 32) == ""


@pytest.mark.exhaustive("a mesh once more; test_training_mesh has one")
def test_four_devices_compute_what_one_does(tmp_path, encoder, monkeypatch):
    """Rows split over the devices: the same vectors, and every anchor meets the negatives of all devices."""
    settings = dataclasses.replace(SETTINGS, batch_size=4, steps=3)  # with hard negatives 4 + 4 + 4 texts
    texts = [t for inputs in PROFILES.values() for t in inputs]

    def computed(name: str) -> tuple[np.ndarray, list[float]]:
        report = train_retriever(encoder, PROFILES, tmp_path / name, settings, tmp_path / f"{name}-checkpoints")
        return encoder.encode(texts), [r["loss"] for r in report["steps"]]

    vectors, losses = computed("one")
    monkeypatch.setattr(jax, "devices", lambda: every_device()[:4])  # of which it makes its mesh itself
    monkeypatch.setattr(jax, "local_devices", jax.devices)
    found, found_losses = computed("four")
    assert np.abs(found - vectors).max() < 1e-5
    assert np.allclose(found_losses, losses, atol=1e-3)


@pytest.mark.exhaustive("the encoder's resume; test_training_resume has that of gates")
def test_a_run_that_was_cut_off_ends_as_if_it_had_not(tmp_path, encoder):
    whole = train_retriever(encoder, PROFILES, tmp_path / "whole", SETTINGS, tmp_path / "a")

    def kill(step, record):
        if step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_retriever(encoder, PROFILES, tmp_path / "cut", SETTINGS, tmp_path / "b", kill)
    assert not (tmp_path / "cut").exists()
    steps = []
    resumed = train_retriever(
        encoder, PROFILES, tmp_path / "cut", SETTINGS, tmp_path / "b", lambda step, record: steps.append(step)
    )
    assert steps == [4, 5, 6]
    assert [r["loss"] for r in resumed["steps"]] == [r["loss"] for r in whole["steps"]]
    texts = ["What colour is it?", "How many?"]
    ours, want = (TextEncoder.load(tmp_path / f).encode(texts) for f in ("cut", "whole"))
    assert np.array_equal(ours, want)
    with pytest.raises(InputError, match=r"run.json: temperature: expected 0.2 \(this run's\), found 0.1"):
        train_retriever(
            encoder, PROFILES, tmp_path / "x", dataclasses.replace(SETTINGS, temperature=0.2), tmp_path / "b"
        )


def test_a_damaged_checkpoint_is_one_line(tmp_path, encoder):
    train_retriever(encoder, PROFILES, tmp_path / "whole", SETTINGS, tmp_path / "points")
    newest = max((tmp_path / "points" / "steps").iterdir(), key=lambda folder: int(folder.name))
    for file in newest.rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    with pytest.raises(InputError, match=f"{newest}: expected a whole checkpoint, found a damaged one .*--no-resume"):
        train_retriever(encoder, PROFILES, tmp_path / "again", SETTINGS, tmp_path / "points")
    shutil.rmtree(newest)
    train_retriever(encoder, PROFILES, tmp_path / "again", SETTINGS, tmp_path / "points")
    weights = [(tmp_path / name / "weights.safetensors").read_bytes() for name in ("whole", "again")]
    assert weights[0] == weights[1]


def test_checkpoints_of_another_run_are_refused(tmp_path, encoder):
    """Of another encoder or tokenizer, of other texts or fewer, with a run.json that was cut short or is gone;
    --no-resume starts over."""
    settings, points = dataclasses.replace(SETTINGS, steps=1, save_every=1, hard_negatives=0), tmp_path / "points"

    def steps(encoder: TextEncoder, profiles: dict[str, list[str]], **how: bool) -> list[int]:
        done = []
        train_retriever(
            encoder, profiles, tmp_path / "out", settings, points, lambda step, record: done.append(step), **how
        )
        return done

    other = dataclasses.replace(encoder, weights=jax.tree.map(lambda x: x + 0.01, encoder.weights))
    assert steps(encoder, PROFILES) == [1]
    assert steps(encoder, PROFILES) == []
    texts = {name: [text.replace("cat", "ant") for text in inputs] for name, inputs in PROFILES.items()}
    fewer = {name: inputs[:4] for name, inputs in PROFILES.items()}
    tokenizer = copy.deepcopy(encoder.tokenizer)
    tokenizer.add_tokens(["colour"])
    read = dataclasses.replace(encoder, tokenizer=tokenizer)
    said = r"points/run.json: {}: expected '.*' \(this run's\), found '.*'"
    for key, changed, profiles in (
        ("encoder", other, PROFILES), ("profiles", encoder, texts), ("profiles", encoder, fewer),
        ("tokens", read, PROFILES),
    ):  # fmt: skip
        with pytest.raises(InputError, match=said.format(key)) as info:
            steps(changed, profiles)
        assert info.value.problems[-1] == "--no-resume starts over, --checkpoints names another folder"
    for content in ("{", "[]", None):
        (points / "run.json").unlink()
        if content is not None:
            (points / "run.json").write_text(content)
        with pytest.raises(InputError, match=r"points/run.json: expected .*, found"):
            steps(encoder, PROFILES)
        (points / "run.json").touch()
    assert steps(other, fewer, resume=False) == [1]
    assert steps(other, fewer) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (dict(steps=0), "steps: expected at least 1"),
        (dict(batch_size=1), "batch_size: expected at least 2"),
        (dict(share=0.0), "share: expected a number"),
        (dict(temperature=0.0), "temperature: expected a number"),
        (dict(learning_rate=-1.0), "learning_rate: expected a positive"),
    ],
)
def test_bad_settings_are_refused(change, said):
    with pytest.raises(InputError, match=said):
        dataclasses.replace(SETTINGS, **change)


def test_bad_profiles_are_refused(tmp_path, encoder):
    for profiles, said in (({"a": ["x"], "b": ["y", "z"]}, "expected two inputs"), ({"a": ["x", "y"]}, "two adapters")):
        with pytest.raises(InputError, match=said):
            train_retriever(encoder, profiles, tmp_path / "out", SETTINGS, tmp_path / "checkpoints")
    assert not (tmp_path / "out").exists()
