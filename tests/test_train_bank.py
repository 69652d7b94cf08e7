"""Whole runs that train a bank: what they learn, keep and write, on one device and on two."""

import json
from typing import Any

import jax
import numpy as np
import pytest
from flat_settings import flat
from meshes import mesh_of
from test_side_by_side import NAMES, SMALL, TASKS, WORDS, own

import meteora_jax as mj
from converters import take_adapters
from meteora_jax.cli import main as main_command
from meteora_jax.config import InputError
from meteora_jax.io.bank import load_bank
from meteora_jax.training.bank import train_bank
from meteora_jax.training.settings import BankTraining, Checkpointing
from meteora_jax.training.trainer import Callbacks
from meteora_jax.training.validation import Validation, split_validation


def trained(world, dest, run=None, **more):
    callbacks = Callbacks(**{k: more.pop(k) for k in ("progress", "validated") if k in more})
    how: Any = dict(mesh=more.pop("mesh", None), checkpointing=run or Checkpointing(), callbacks=callbacks)
    return train_bank(world["base"], TASKS, dest, flat(BankTraining, **{**SMALL, **more}), dtype="float32", **how)


def test_a_bank_learns_and_becomes_peft_folders(tmp_path, world):
    import converters

    records = []
    final = trained(
        world,
        tmp_path / "bank",
        Checkpointing(run=tmp_path / "run", save_every=20),
        steps=40,
        learning_rate=2e-2,
        validated=records.append,
    )
    assert [r["step"] for r in records] == [10, 20, 30, 40]
    assert records[-1]["loss"] < 0.7 * records[0]["loss"]
    log = [json.loads(line) for line in (tmp_path / "run" / "validation.jsonl").read_text().splitlines()]
    assert log == records
    bank = load_bank(tmp_path / "bank", world["model"].config, np.float32)
    assert bank.names == NAMES
    for name, kept in final["kept"].items():  # the bank holds what scored so
        at = next(r for r in records if r["step"] == kept["step"])
        assert at["tasks"][name] == {"exact": kept["exact"], "loss": kept["loss"], "better": True}
        scores = [(-r["tasks"][name]["exact"], r["tasks"][name]["loss"]) for r in records]
        assert (-kept["exact"], kept["loss"]) == min(scores)
    converters.export_adapter(tmp_path / "bank", "birch", tmp_path / "peft")
    converters.import_adapters(tmp_path / "again", world["base"], {"birch": tmp_path / "peft"})
    again = load_bank(tmp_path / "again", world["model"].config, np.float32)
    assert all(np.array_equal(again.a[p][:, 0], bank.a[p][:, 1]) for p in bank.a)
    # the scores are those of the folder that was written
    model = mj.load(world["base"], tmp_path / "bank", dtype="float32")
    _, held = split_validation(TASKS, flat(BankTraining, **{**SMALL, "steps": 40}), model.tokenizer, 2, 200)
    for name in NAMES:
        losses = []
        for s in held[name]:
            logits = np.asarray(model.logits([s.tokens.tolist()], mj.Fixed(name)), np.float64)[0]
            logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            losses += [-logp[t - 1, s.tokens[t]] for t in np.flatnonzero(s.loss)]
        assert np.isclose(np.mean(losses), final["kept"][name]["loss"], atol=1e-4)


@pytest.mark.exhaustive("a training more")
def test_the_ema_is_what_is_scored_and_kept(tmp_path, world, monkeypatch):
    seen, scored, judge = [], [], Validation.judge

    def watched(self, step, frozen, state):
        seen.append(jax.tree.map(np.asarray, state.params))
        state = judge(self, step, frozen, state)
        scored.append((jax.tree.map(np.asarray, state.best), self.scores(frozen, state.best.params)))
        return state

    monkeypatch.setattr(Validation, "judge", watched)
    trained(world, tmp_path / "bank", ema=0.9, steps=6, validations=6)
    for best, ((exact,), (loss,)) in scored:
        assert np.array_equal(exact, best.exact)
        assert np.allclose(loss, best.loss, atol=1e-5)
        for i, step in enumerate(best.step):  # so few steps count alike
            means = [np.mean(x, axis=0) for x in zip(*(own(params, i) for params in seen[:step]), strict=True)]
            for found, right, last in zip(own(best.params, i), means, own(seen[step - 1], i), strict=True):
                assert np.allclose(found, right, atol=1e-6)
                assert step == 1 or np.abs(found - last).max() > 1e-4


@pytest.mark.exhaustive("the bank's resume; test_training_resume has that of gates")
def test_a_killed_run_ends_bit_for_bit_as_the_whole_one(tmp_path, world):
    class Killed(Exception):
        pass

    def progress(step, record):
        if step == 7:
            raise Killed

    how: dict[str, Any] = dict(ema=0.9, validation_composites=2)
    whole = trained(world, tmp_path / "whole", Checkpointing(run=tmp_path / "whole-run", save_every=3), **how)
    with pytest.raises(Killed):
        trained(
            world,
            tmp_path / "killed",
            Checkpointing(run=tmp_path / "killed-run", save_every=3),
            progress=progress,
            **how,
        )
    assert not (tmp_path / "killed").exists()
    again = trained(world, tmp_path / "killed", Checkpointing(run=tmp_path / "killed-run", save_every=3), **how)
    assert again["resumed_at"] == 6
    assert again["kept"] == whole["kept"]
    for file in ("killed/weights.safetensors", "killed-run/validation.jsonl"):
        assert (tmp_path / file).read_bytes() == (tmp_path / file.replace("killed", "whole")).read_bytes()


@pytest.mark.exhaustive("a training more, by the command line")
def test_the_command_trains_all_tasks_of_a_folder(tmp_path, world, capsys):
    for name, examples in TASKS.items():
        (tmp_path / "tasks" / name).mkdir(parents=True)
        lines = [json.dumps({"prompt": e.prompt, "response": e.response}) for e in examples]
        (tmp_path / "tasks" / name / "train.jsonl").write_text("\n".join(lines) + "\n")
    command = ["train", "bank", "--base", world["base"], "--tasks", tmp_path / "tasks", "--out", tmp_path / "bank",
               "--steps", 2, "--rows", 2, "--max-length", 100, "--rank", 2, "--targets", "q_proj", "down_proj",
               "--json", tmp_path / "report.json", "--validations", 1, "--composite", 0.2, "--composite-sizes", 2, 2,
               "--validation-composites", 2]  # fmt: skip
    main_command([str(word) for word in command])
    said = capsys.readouterr().out
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["tasks"] == list(report["kept"]) == list(NAMES)
    assert report["settings"]["alpha"] == 4.0
    assert report["settings"]["prompt_loss"] is False
    assert all(f"{name}: step 2, exact " in said for name in NAMES)
    main_command(["export", "bank", str(tmp_path / "bank"), str(tmp_path / "two"), "cedar", "apple"])
    assert load_bank(tmp_path / "two", world["model"].config, np.float32).names == ("cedar", "apple")
    with pytest.raises(SystemExit) as refusal:
        main_command([str(word) for word in [*command, "--task", "apple", "apple"]])
    assert refusal.value.code == 1
    assert "expected tasks, each once, found apple apple" in capsys.readouterr().err


def test_some_of_a_banks_adapters_become_a_bank(tmp_path, world):
    take_adapters(world["bank"], tmp_path / "few", ["daisy", "apple"])
    old, new = (load_bank(b, world["model"].config, np.float32) for b in (world["bank"], tmp_path / "few"))
    assert new.names == ("daisy", "apple")
    assert [a.sha256 for a in new.config.adapters] == [old.config.adapters[i].sha256 for i in (3, 0)]
    ids = world["model"].encode(WORDS[0])
    model = mj.load(world["base"], tmp_path / "few", dtype="float32")
    for name in new.names:
        found, right = (np.asarray(m.logits([ids], mj.Fixed(name))) for m in (model, world["model"]))
        assert np.abs(found - right).max() <= 1e-5
    with pytest.raises(InputError, match="found 'zinnia'"):
        take_adapters(world["bank"], tmp_path / "none", ["zinnia"])
    with pytest.raises(InputError, match="apple: expected once, found 2 times"):
        take_adapters(world["bank"], tmp_path / "none", ["apple", "apple"])
    assert not (tmp_path / "none").exists()


@pytest.mark.exhaustive("a mesh once more; test_training_mesh has one")
def test_two_devices_train_the_same_bank(tmp_path, world):
    meshes = {"one": None, "two": mesh_of(2, 1, 1), "parts": mesh_of(1, 1, 2)}
    kept = {k: trained(world, tmp_path / k, mesh=mesh, rows=2)["kept"] for k, mesh in meshes.items()}
    banks = {k: load_bank(tmp_path / k, world["model"].config, np.float32) for k in meshes}
    for k in ("two", "parts"):
        for name, best in kept["one"].items():
            assert kept[k][name]["step"] == best["step"]
            assert kept[k][name]["loss"] == pytest.approx(best["loss"], abs=1e-3)
        for p, b in banks["one"].b.items():
            assert np.abs(b).max() > 1e-2
            off = np.abs(b - banks[k].b[p])  # Adam makes whole steps of gradients that are all rounding
            assert np.median(off) <= 2e-5
            assert np.quantile(off, 0.99) <= 5e-4
