"""Adapters trained side by side are adapters trained alone, and of each the best is kept.

Run as a script it trains a bank on one device and on two.
"""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from extent import parameters
from flat_settings import changed, flat
from flax import nnx
from test_sharding import devices

import meteora_jax as mj
from meteora_jax.cli import main as main_command
from meteora_jax.config import PROJECTIONS, InputError
from meteora_jax.evaluation.tasks import Example
from meteora_jax.io.checkpoint import load_bank, save_bank, take_adapters
from meteora_jax.model.lora_linear import AdapterParam
from meteora_jax.training.adapter import fresh_bank
from meteora_jax.training.bank import train_bank
from meteora_jax.training.data import NO_TASK, Batches, Layout, Mixture, Tokenized, collate, compose, encode, plan
from meteora_jax.training.settings import BankTraining, Checkpointing
from meteora_jax.training.side_by_side import Average, BoundTasks, ByTask, clip_each, shares_of
from meteora_jax.training.step import gradients, initial_state, make_step, optimizer
from meteora_jax.training.trainer import Callbacks
from meteora_jax.training.validation import Validation, beside, hold_back, packed

NAMES = ("apple", "birch", "cedar")
WORDS = ("How many apples?", "Which sentence follows", "The lazy dog")
TASKS = {
    name: [Example(f"[INST] {word} number {i} [/INST]\n", f"{word[:6]} {i % 3}") for i in range(20)]
    for name, word in zip(NAMES, WORDS, strict=True)
}
SMALL = dict(steps=8, batch_size=8, learning_rate=1e-2, max_length=200, rank=4, alpha=8.0, composite=0.3, validations=4)


def random_bank(world, names=NAMES, seed=0):
    """Fresh adapters whose B is not zero, so that all gradients are alive."""
    bank = fresh_bank(world["model"].config, names, 4, 8.0, PROJECTIONS, seed)
    rng = np.random.default_rng(9)
    b = {p: (0.1 * rng.standard_normal(x.shape)).astype(np.float32) for p, x in bank.b.items()}
    return dataclasses.replace(bank, b=b)


def of_one(bank, i):
    """A bank of the i-th adapter alone."""
    one = lambda held: {p: x[:, i : i + 1] for p, x in held.items()}  # noqa: E731
    config = dataclasses.replace(bank.config, adapters=bank.config.adapters[i : i + 1])
    return dataclasses.replace(bank, a=one(bank.a), b=one(bank.b), scale=one(bank.scale), config=config)


def parts(tmp_path, world, bank):
    """The model's graph, the adapters' parameters and the rest."""
    save_bank(tmp_path / bank.names[0], bank)
    model = mj.load(world["base"], tmp_path / bank.names[0], dtype="float32")
    return model, *nnx.split(nnx.merge(model.graph, model.weights), AdapterParam, ...)


def sequences(world, task, count=5, prompt_loss=False):
    """Of different lengths for each task, so that the adapters' counts differ."""
    tokenizer = world["model"].tokenizer
    examples = [Example(e.prompt, e.response * (task + 1)) for e in TASKS[NAMES[task]][: count + task]]
    return [encode(e, task, tokenizer, 2, prompt_loss=prompt_loss) for e in examples]


def in_rows(parts, rows=8, width=192):
    (batch,) = packed(parts, Layout(rows, width, 1, True))
    return jax.tree.map(jnp.asarray, batch)


def alone(s):
    return Tokenized(s.tokens, s.loss, np.where(s.tasks == NO_TASK, NO_TASK, 0).astype(np.int32))


def own(tree, i):
    """The i-th adapter's part of every leaf, lora_a [L, P, A, R, I] and lora_b [L, A, R, O]."""
    return [np.asarray(x)[..., i : i + 1, :, :] for x in jax.tree.leaves(tree)]


@pytest.mark.parametrize(
    ("accumulate", "prompt_loss"),
    parameters([(1, False), (1, True), (2, False), (2, True)], [(2, True)], "the other one has both options"),
)
def test_gradients_side_by_side_are_those_alone(tmp_path, world, prompt_loss, accumulate):
    """Each adapter by itself, in a model with no other, with the loss of `train adapter`, one sequence a row."""
    bank = random_bank(world)
    _, graph, params, frozen = parts(tmp_path, world, bank)
    every = [sequences(world, i, prompt_loss=prompt_loss) for i in range(3)]
    mixed = [s for group in zip(*(g[:5] for g in every), strict=True) for s in group] + every[1][5:] + every[2][5:]
    how = dict(dtype=jnp.float32, remat=False, accumulate=accumulate)
    losses, grads = gradients(graph, frozen, params, in_rows(mixed), ByTask(), 0.0, **how)
    total = 0.0
    for i in range(3):
        model, graph1, params1, frozen1 = parts(tmp_path, world, of_one(bank, i))
        batch = jax.tree.map(jnp.asarray, collate([alone(s) for s in every[i]]))
        router = model.bind(mj.Fixed(NAMES[i]), len(every[i]))
        expected, expected_grads = gradients(
            graph1, frozen1, params1, batch, router, 0.0, dtype=jnp.float32, remat=False
        )
        total += float(expected.loss)
        for found, right in zip(own(grads, i), jax.tree.leaves(expected_grads), strict=True):
            assert np.abs(right).max() > 1e-3
            assert np.abs(found - right).max() <= 1e-5
    assert np.isclose(float(losses.loss), total, atol=1e-5)
    assert np.isclose(float(losses.lm), total / 3, atol=1e-5)


@pytest.mark.exhaustive("the optimiser, on the gradients compared above")
def test_updates_side_by_side_are_those_alone(tmp_path, world):
    """Three steps of clipping and Adam; one adapter's gradient is far beyond the limit, another's below it."""
    bank = random_bank(world)
    _, graph, params, frozen = parts(tmp_path, world, bank)
    every = [sequences(world, i) for i in range(3)]
    tx = lambda each: optimizer(3, 1e-2, 0.0, 2.4, each=each)  # noqa: E731
    how = dict(beta=0.0, dtype=jnp.float32, remat=True)
    _, grads = gradients(
        graph,
        frozen,
        params,
        in_rows([s for group in every for s in group]),
        ByTask(),
        0.0,
        dtype=jnp.float32,
        remat=False,
    )
    norms = [np.sqrt(sum((x**2).sum() for x in own(grads, i))) for i in range(3)]
    assert min(norms) < 2.4 < max(norms), norms  # or the limit would do nothing, or all that it can
    state = initial_state(params, tx(True), None)
    step = make_step(graph, state, tx(True), **how)
    for _ in range(3):
        state, _ = step(frozen, state, in_rows([s for group in every for s in group]), ByTask())
    for i in range(3):
        model, graph1, params1, frozen1 = parts(tmp_path, world, of_one(bank, i))
        before = jax.tree.map(np.asarray, params1)
        state1 = initial_state(params1, tx(False), None)
        step1 = make_step(graph1, state1, tx(False), **how)
        batch = jax.tree.map(jnp.asarray, collate([alone(s) for s in every[i]]))
        for _ in range(3):
            state1, _ = step1(frozen1, state1, batch, model.bind(mj.Fixed(NAMES[i]), len(every[i])))
        for found, right, old in zip(own(state.params, i), *map(jax.tree.leaves, (state1.params, before)), strict=True):
            assert np.abs(right - old).max() > 5e-3
            # where a gradient is all rounding, Adam makes a step of it all the same
            off = np.abs(found - right)
            assert np.quantile(off, 0.99) <= 1e-5
            assert off.max() <= 2e-3


def test_each_adapter_is_clipped_by_its_own_norm():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 3, 4, 2, 5)).astype(np.float32), rng.standard_normal((2, 4, 2, 6)).astype(np.float32)
    a[:, :, 1], b[:, 1] = a[:, :, 1] * 1e-3, b[:, 1] * 1e-3
    a[:, :, 2], b[:, 2] = 0, 0
    found: Any = clip_each(1.0).update({"lora_a": jnp.asarray(a), "lora_b": jnp.asarray(b)}, optax.EmptyState())[0]
    for i in range(4):
        norm = np.sqrt((a[:, :, i] ** 2).sum() + (b[:, i] ** 2).sum())
        factor = 1 / max(1.0, float(norm))
        assert np.allclose(found["lora_a"][:, :, i], factor * a[:, :, i], atol=1e-6)
        assert np.allclose(found["lora_b"][:, i], factor * b[:, i], atol=1e-6)


def test_the_mean_over_steps_counts_recent_ones_most():
    """Against the definition: a plain mean while there are few, then each counts 0.75 of its successor."""
    seen = np.random.default_rng(0).standard_normal((12, 3)).astype(np.float32)
    average = Average({"w": jnp.zeros(3)}, jnp.int32(0))
    mean = seen[0]
    for k, x in enumerate(seen, start=1):
        average = average.after({"w": jnp.asarray(x)}, 0.75)
        # from the fourth on, the newest counts a quarter
        mean = seen[:k].mean(0) if k <= 4 else 0.75 * mean + 0.25 * x
        assert np.allclose(average.params["w"], mean, atol=1e-6)
    assert int(average.steps) == 12


def test_an_absent_adapter_gets_no_gradient(tmp_path, world):
    _, graph, params, frozen = parts(tmp_path, world, random_bank(world))
    batch = in_rows(sequences(world, 0) + sequences(world, 2))
    losses, grads = gradients(graph, frozen, params, batch, ByTask(), 0.0, dtype=jnp.float32, remat=False)
    assert all(not x.any() for x in own(grads, 1))
    assert all(np.abs(x).max() > 1e-4 for i in (0, 2) for x in own(grads, i))
    assert np.isclose(float(losses.loss), 2 * float(losses.lm), rtol=1e-6)


@pytest.mark.exhaustive("a training step more")
def test_a_composite_counts_what_each_adapter_predicts(tmp_path, world):
    """Against log-probabilities of a whole forward pass: a token belongs to the adapter at work before it."""
    model, graph, params, frozen = parts(tmp_path, world, random_bank(world))
    s = compose([(TASKS[n][0], i) for i, n in enumerate(NAMES)], model.tokenizer, 2, prompt_loss=False)
    batch = jax.tree.map(jnp.asarray, collate([s]))
    losses, grads = gradients(graph, frozen, params, batch, ByTask(), 0.0, dtype=jnp.float32, remat=False)
    llama = nnx.merge(graph, params, frozen)
    out = llama(batch.tokens, batch.positions, BoundTasks(batch.tasks))
    logits = np.asarray(llama.logits(out.hidden, None), np.float64)[0]
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    means = []
    for i in range(3):
        at = [t for t in range(1, len(s.tokens)) if s.loss[t] and s.tasks[t - 1] == i]
        means.append(-np.mean([logp[t - 1, s.tokens[t]] for t in at]))
    assert s.tasks[-1] == NO_TASK  # the end token is the last adapter's to predict
    assert np.isclose(float(losses.loss), sum(means), atol=1e-5)
    assert all(np.abs(x).max() > 1e-4 for i in range(3) for x in own(grads, i))


def test_no_task_routes_to_no_adapter():
    routing = BoundTasks(jnp.asarray([[0, NO_TASK, 2]], jnp.int32)).route(jnp.zeros((1, 3, 2)), None)
    assert routing.indices.shape == (1, 3, 1, 1)
    assert routing.indices[0, :, 0, 0].tolist() == [0, mj.routing.NO_ADAPTER, 2]
    assert routing.weights[0, :, 0, 0].tolist() == [1.0, 0.0, 1.0]


# What is drawn, and what is held back


def test_small_tasks_are_drawn_less_than_large_ones(world):
    lengths = {"small": np.full(10, 20), "large": np.full(1000, 50), "long": np.full(100, 500)}
    shares = shares_of(lengths, tokens=2000, epochs=4.0)
    assert shares == pytest.approx({"small": 40 / 84, "large": 40 / 84, "long": 4 / 84})
    lopsided = {"apple": 0.7, "birch": 0.2, "cedar": 0.1}
    labels = {n: i for i, n in enumerate(NAMES)}
    mixture = Mixture(
        TASKS, labels, world["model"].tokenizer, 2, max_length=128, prompt_loss=False, shares=lopsided
    )  # fmt: skip
    chosen = mixture.chosen()
    layout = plan(mixture, chosen, 8, packing=True, multiple=1, shards=1)
    stream, seen, count = Batches(mixture, chosen, layout), np.zeros(3), 0
    for _ in range(60):
        batch = next(stream)
        starts = batch.tasks[batch.positions == 0]
        seen, count = seen + np.bincount(starts, minlength=3), count + 1
    assert np.abs(seen / seen.sum() - [0.7, 0.2, 0.1]).max() < 0.02
    assert 5 <= seen.sum() / count <= 11
    composites = dataclasses.replace(mixture, composite=1.0, shares={"apple": 0.98, "birch": 0.01, "cedar": 0.01})
    rng = np.random.default_rng(0)
    drawn = composites.draw_composite(chosen, rng, 400)
    assert set(np.unique(drawn.tasks)) == {NO_TASK, 0, 1, 2}


def test_a_random_cut_of_prompts_is_held_back(world):
    settings = flat(BankTraining, **{**SMALL, "held_least": 4, "held_most": 6, "held_back": 0.5})
    doubled = {n: [*examples, *examples[:10], Example("x" * 900, "y")] for n, examples in TASKS.items()}
    left, held = hold_back(doubled, settings, world["model"].tokenizer, 2, 200)
    for i, name in enumerate(NAMES):
        texts = [world["model"].tokenizer.decode(s.tokens[~s.loss]) for s in held[name]]
        assert len(set(texts)) == 6
        assert not set(texts) & {e.prompt for e in left[name]}
        assert {e.prompt for e in doubled[name]} == set(texts) | {e.prompt for e in left[name]}
        assert all((s.tasks == i).all() and s.loss.any() for s in held[name])
    for name, count in beside(doubled, left, held).items():
        every = [*TASKS[name], *TASKS[name][:10]]
        assert count == len(every) - len([e for e in every if e in left[name]]) - 6 > 0
    again, _ = hold_back(doubled, settings, world["model"].tokenizer, 2, 200)
    other, _ = hold_back(doubled, changed(settings, seed=1), world["model"].tokenizer, 2, 200)
    assert left == again != other
    few = {**TASKS, "birch": TASKS["birch"][:4]}
    with pytest.raises(InputError, match="birch: expected more than 4 examples"):
        hold_back(few, settings, world["model"].tokenizer, 2, 200)


# Validation


def begun(tmp_path, world, held, settings, bank=None, composites=()):
    _, graph, params, frozen = parts(tmp_path, world, bank or random_bank(world))
    state = initial_state(params, optimizer(8, 1e-2, 0.0, 1.0, each=True), None)
    validation = Validation(held, settings, composites=composites)
    state = validation.first(state, None)
    validation.begin(graph, state, Layout(2, 128, 1, True), jnp.float32, None, None, 0)
    return validation, frozen, state


def test_scores_are_those_of_each_adapter_asked_by_name(tmp_path, world):
    """Teacher-forced through the public API, one sequence at a time."""
    settings = flat(BankTraining, **SMALL)
    tokenizer = world["model"].tokenizer
    held = {n: [encode(e, i, tokenizer, 2, prompt_loss=False) for e in TASKS[n][: 7 - i]] for i, n in enumerate(NAMES)}
    validation, frozen, state = begun(tmp_path, world, held, settings)
    model = mj.load(world["base"], tmp_path / "apple", dtype="float32")
    # make some sequences exact: their responses become what the model says
    for i, name in enumerate(NAMES):
        for s in held[name][: i + 2]:
            start = int(np.argmax(s.loss))
            for t in range(start, len(s.tokens)):
                logits = np.asarray(model.logits([s.tokens[:t].tolist()], mj.Fixed(name)))
                s.tokens[t] = logits[0, -1].argmax()
    validation, frozen, state = begun(tmp_path, world, held, settings)
    (exact,), (loss,) = validation.scores(frozen, state.params)
    for i, name in enumerate(NAMES):
        right, losses = [], []
        for s in held[name]:
            logits = np.asarray(model.logits([s.tokens.tolist()], mj.Fixed(name)), np.float64)[0]
            logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            at = np.flatnonzero(s.loss)
            losses += [-logp[t - 1, s.tokens[t]] for t in at]
            right.append(all(logits[t - 1].argmax() == s.tokens[t] for t in at))
        assert (exact[i], sum(right)) == (np.float32(np.mean(right)), i + 2)
        assert np.isclose(loss[i], np.mean(losses), atol=1e-5)


def test_each_adapters_best_is_kept(tmp_path, world, monkeypatch):
    held = {n: sequences(world, i, 2) for i, n in enumerate(NAMES)}
    validation, frozen, state = begun(tmp_path, world, held, flat(BankTraining, **SMALL))
    script = {  # (exact, loss) of each adapter
        2: ([0.5, 0.0, 0.0], [1.0, 3.0, 2.0]),
        4: ([0.5, 0.2, 0.0], [1.1, 9.0, 1.5]),  # a worse loss; more right; a better loss
        6: ([0.4, 0.2, 0.0], [0.1, 9.0, 1.5]),  # fewer right; the same; the same
    }
    params = {}
    assert [s for s in range(1, 9) if validation.due(s)] == [2, 4, 6, 8]
    for step, scores in script.items():
        monkeypatch.setattr(validation, "scores", lambda *_, s=scores: tuple(np.asarray([x], np.float32) for x in s))
        state = dataclasses.replace(state, params=jax.tree.map(lambda x, k=step: jnp.full_like(x, k), state.params))
        params[step] = state.params
        state = validation.judge(step, frozen, state)
    for x in jax.tree.leaves(state.best.params):
        kept = np.moveaxis(np.asarray(x), -3, 0).reshape(3, -1)
        assert (kept == np.asarray([2, 4, 4])[:, None]).all()
    summary = validation.summary(state.best)
    assert summary["birch"] == {"step": 4, "exact": 0.2, "loss": 9.0}
    assert summary["apple"]["step"] == 2
    assert [r["tasks"]["cedar"]["better"] for r in validation.records] == [True, True, False]


# Whole runs


def trained(world, dest, run=None, **more):
    callbacks = Callbacks(**{k: more.pop(k) for k in ("progress", "validated") if k in more})
    how: Any = dict(mesh=more.pop("mesh", None), checkpointing=run or Checkpointing(), callbacks=callbacks)
    return train_bank(world["base"], TASKS, dest, flat(BankTraining, **{**SMALL, **more}), dtype="float32", **how)


def test_a_bank_learns_and_becomes_peft_folders(tmp_path, world):
    import converters

    told = []
    final = trained(
        world,
        tmp_path / "bank",
        Checkpointing(run=tmp_path / "run", save_every=20),
        steps=40,
        learning_rate=2e-2,
        validated=told.append,
    )
    assert [r["step"] for r in told] == [10, 20, 30, 40]
    assert told[-1]["loss"] < 0.7 * told[0]["loss"]
    log = [json.loads(line) for line in (tmp_path / "run" / "validation.jsonl").read_text().splitlines()]
    assert log == told
    bank = load_bank(tmp_path / "bank", world["model"].config, np.float32)
    assert bank.names == NAMES
    for name, kept in final["kept"].items():  # the bank holds what scored so
        at = next(r for r in told if r["step"] == kept["step"])
        assert at["tasks"][name] == {"exact": kept["exact"], "loss": kept["loss"], "better": True}
        scores = [(-r["tasks"][name]["exact"], r["tasks"][name]["loss"]) for r in told]
        assert (-kept["exact"], kept["loss"]) == min(scores)
    converters.export_adapter(tmp_path / "bank", "birch", tmp_path / "peft")
    converters.import_adapters(tmp_path / "again", world["base"], {"birch": tmp_path / "peft"})
    again = load_bank(tmp_path / "again", world["model"].config, np.float32)
    assert all(np.array_equal(again.a[p][:, 0], bank.a[p][:, 1]) for p in bank.a)
    # the scores are those of the folder that was written
    model = mj.load(world["base"], tmp_path / "bank", dtype="float32")
    _, held = hold_back(TASKS, flat(BankTraining, **{**SMALL, "steps": 40}), model.tokenizer, 2, 200)
    for name in NAMES:
        losses = []
        for s in held[name]:
            logits = np.asarray(model.logits([s.tokens.tolist()], mj.Fixed(name)), np.float64)[0]
            logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            losses += [-logp[t - 1, s.tokens[t]] for t in np.flatnonzero(s.loss)]
        assert np.isclose(np.mean(losses), final["kept"][name]["loss"], atol=1e-4)


@pytest.mark.exhaustive("a training more")
def test_a_mean_over_steps_is_what_is_scored_and_kept(tmp_path, world, monkeypatch):
    seen, scored, judge = [], [], Validation.judge

    def watched(self, step, frozen, state):
        seen.append(jax.tree.map(np.asarray, state.params))
        state = judge(self, step, frozen, state)
        scored.append((jax.tree.map(np.asarray, state.best), self.scores(frozen, state.best.params)))
        return state

    monkeypatch.setattr(Validation, "judge", watched)
    trained(world, tmp_path / "bank", average=0.9, steps=6, validations=6)
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

    how: dict[str, Any] = dict(average=0.9, held_composites=2)
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
        lines = [json.dumps(dataclasses.asdict(e)) for e in examples]
        (tmp_path / "tasks" / name / "train.jsonl").write_text("\n".join(lines) + "\n")
    command = ["train", "bank", "--base", world["base"], "--tasks", tmp_path / "tasks", "--out", tmp_path / "bank",
               "--steps", 2, "--rows", 2, "--max-length", 100, "--rank", 2, "--targets", "q_proj", "down_proj",
               "--json", tmp_path / "report.json", "--validations", 1, "--composite", 0.2, "--composite-sizes", 2, 2,
               "--held-composites", 2]  # fmt: skip
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
    with pytest.raises(InputError, match="expected an adapter 'zinnia'"):
        take_adapters(world["bank"], tmp_path / "none", ["zinnia"])
    with pytest.raises(InputError, match="each once, found apple apple"):
        take_adapters(world["bank"], tmp_path / "none", ["apple", "apple"])
    assert not (tmp_path / "none").exists()


def main(base: str, dest: str) -> None:
    from meteora_jax.sharding import make_mesh

    for name, mesh in {"one": None, "two": make_mesh(2, 1, 1), "parts": make_mesh(1, 1, 2)}.items():
        final = trained({"base": base}, Path(dest) / name, mesh=mesh, rows=2)
        (Path(dest) / f"{name}.json").write_text(json.dumps(final["kept"]))


@pytest.mark.exhaustive("a mesh once more; test_training_mesh has one")
def test_two_devices_train_the_same_bank(tmp_path, world):
    done = subprocess.run(
        [sys.executable, __file__, str(world["base"]), str(tmp_path)],
        env=devices(2), capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    banks = {k: load_bank(tmp_path / k, world["model"].config, np.float32) for k in ("one", "two", "parts")}
    kept = {k: json.loads((tmp_path / f"{k}.json").read_text()) for k in banks}
    for k in ("two", "parts"):
        for name, best in kept["one"].items():
            assert kept[k][name]["step"] == best["step"]
            assert kept[k][name]["loss"] == pytest.approx(best["loss"], abs=1e-3)
        for p, b in banks["one"].b.items():
            assert np.abs(b).max() > 1e-2
            off = np.abs(b - banks[k].b[p])  # Adam makes whole steps of gradients that are all rounding
            assert np.median(off) <= 2e-5
            assert np.quantile(off, 0.99) <= 5e-4


if __name__ == "__main__":
    import conftest  # noqa: F401  (the same strictness as in every test)

    main(*sys.argv[1:])
