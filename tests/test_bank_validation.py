"""The validation of a bank: what its split and its composites hold, how they are scored, what they decide."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flat_settings import changed, flat
from flax import nnx
from test_side_by_side import NAMES, SMALL, TASKS, parts, random_bank, sequences

import meteora_jax as mj
from meteora_jax.config import InputError
from meteora_jax.evaluation.tasks import Example
from meteora_jax.training.data import Layout, collate
from meteora_jax.training.sequences import NO_TASK, compose, encode
from meteora_jax.training.settings import BankTraining
from meteora_jax.training.side_by_side import task_routing
from meteora_jax.training.step import initial_state, optimizer
from meteora_jax.training.validation import (
    Validation,
    repeated_prompts,
    split_validation,
    validation_composites,
)


def test_a_random_cut_of_prompts_is_the_validation_split(world):
    settings = flat(BankTraining, **{**SMALL, "validation_min": 4, "validation_max": 6, "validation_share": 0.5})
    doubled = {n: [*examples, *examples[:10], Example("x" * 900, "y")] for n, examples in TASKS.items()}
    training, split = split_validation(doubled, settings, world["model"].tokenizer, 2, 200)
    for i, name in enumerate(NAMES):
        texts = [world["model"].tokenizer.decode(s.tokens[~s.loss]) for s in split[name]]
        assert len(set(texts)) == 6
        assert not set(texts) & {e.prompt for e in training[name]}
        assert {e.prompt for e in doubled[name]} == set(texts) | {e.prompt for e in training[name]}
        assert all((s.tasks == i).all() and s.loss.any() for s in split[name])
    for name, count in repeated_prompts(doubled, training, split).items():
        every = [*TASKS[name], *TASKS[name][:10]]
        assert count == len(every) - len([e for e in every if e in training[name]]) - 6 > 0
    again, _ = split_validation(doubled, settings, world["model"].tokenizer, 2, 200)
    other, _ = split_validation(doubled, changed(settings, seed=1), world["model"].tokenizer, 2, 200)
    assert training == again != other
    few = {**TASKS, "birch": TASKS["birch"][:4]}
    with pytest.raises(InputError, match="birch: expected more than 4 examples"):
        split_validation(few, settings, world["model"].tokenizer, 2, 200)


def begun(tmp_path, world, held, settings, bank=None, composites=()):
    _, graph, params, frozen = parts(tmp_path, world, bank or random_bank(world))
    state = initial_state(params, optimizer(8, 1e-2, 0.0, 1.0, each=True), None)
    validation = Validation(held, settings, composites=composites)
    state = validation.first(state, None)
    validation.begin(graph, state, Layout(2, 128, 1, True), jnp.float32, None, run=None, start=0)
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


def test_validation_composites_hold_what_training_does_not_see(world):
    settings = flat(BankTraining, **SMALL, validation_composites=5, composite_sizes=(2, 3), composite_shots=1)
    how = world["model"].tokenizer, 2, 400
    training, _ = split_validation(TASKS, settings, *how)
    drawn = validation_composites(TASKS, training, settings, *how)
    again = validation_composites(TASKS, training, settings, *how)
    assert [s.tokens.tolist() for s in drawn] == [s.tokens.tolist() for s in again]
    assert len(drawn) == 5

    def question(e):
        return e.prompt.split(" [/INST]")[0].removeprefix("[INST] ") + " "

    seen = {question(e) for examples in training.values() for e in examples}
    away = {question(e) for examples in TASKS.values() for e in examples} - seen
    for s in drawn:
        text = world["model"].tokenizer.decode(s.tokens)
        assert any(q in text for q in away)
        assert not any(q in text for q in seen)
        assert 2 <= len(set(s.tasks.tolist()) - {NO_TASK}) <= 3
    assert validation_composites(TASKS, training, changed(settings, validation_composites=0), *how) == []
    with pytest.raises(InputError, match="validation_composites: expected 0 where composite is 0, found 5"):
        changed(settings, composite=0.0)


@pytest.mark.exhaustive("trains once more; test_metrics and test_tasks have the score")
def test_parts_of_composites_are_scored_by_who_predicts_them(tmp_path, world):
    """Against a whole forward pass of each; a part is right if its adapter's every token is the likeliest."""
    model, graph, params, frozen = parts(tmp_path, world, random_bank(world))
    llama = nnx.merge(graph, params, frozen)
    held = {n: [encode(e, i, model.tokenizer, 2, prompt_loss=False) for e in TASKS[n][:2]] for i, n in enumerate(NAMES)}
    drawn = [[(TASKS[NAMES[i]][k], i) for i in which] for k, which in enumerate([(0, 1), (1, 0), (0,)])]
    composites = [compose(d, model.tokenizer, 2, prompt_loss=False) for d in drawn]

    def logits_of(s):
        batch = jax.tree.map(jnp.asarray, collate([s]))
        hidden = llama(batch.tokens, batch.positions, task_routing(batch.tasks)).hidden
        return np.asarray(llama.logits(hidden, None), np.float64)[0]

    first = composites[0]  # its first adapter's part becomes what the model says
    for t in np.flatnonzero(first.loss):
        if first.tasks[t - 1] == 0:
            first.tokens[t] = logits_of(first)[t - 1].argmax()
    right, losses = ([[] for _ in NAMES] for _ in range(2))
    for s in composites:
        logits = logits_of(s)
        logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        for i in range(3):
            at = [t for t in np.flatnonzero(s.loss) if s.tasks[t - 1] == i]
            losses[i] += [-logp[t - 1, s.tokens[t]] for t in at]
            right[i] += [all(logits[t - 1].argmax() == s.tokens[t] for t in at)] if at else []
    validation, frozen, state = begun(tmp_path, world, held, flat(BankTraining, **SMALL), composites=composites)
    exact, loss = validation.scores(frozen, state.params)
    assert any(right[0])
    assert not all(right[0])
    assert right[2] == []
    np.testing.assert_allclose(exact[1][:2], [np.mean(r) for r in right[:2]], rtol=1e-6)
    np.testing.assert_allclose(loss[1][:2], [np.mean(x) for x in losses[:2]], atol=1e-5)
    assert np.isnan(exact[1][2])
    assert np.isnan(loss[1][2])
    alone, _, _ = begun(tmp_path, world, held, flat(BankTraining, **SMALL))
    for one, other in zip(alone.scores(frozen, state.params), (exact, loss), strict=True):
        np.testing.assert_allclose(one[0], other[0], atol=1e-5)


def test_the_mean_of_both_kinds_decides(tmp_path, world, monkeypatch):
    held = {n: sequences(world, i, 2) for i, n in enumerate(NAMES)}
    both = [compose([(TASKS[n][0], i) for i, n in enumerate(NAMES)], world["model"].tokenizer, 2, prompt_loss=False)]
    validation, frozen, state = begun(tmp_path, world, held, flat(BankTraining, **SMALL), composites=both)
    nan = np.nan
    script = {  # (exact, loss), each alone and in composites
        2: ([[0.6, 0.5, 0.3], [0.0, 0.0, nan]], [[1.0, 2.0, 1.0], [3.0, 2.0, nan]]),
        4: ([[0.5, 0.5, 0.4], [0.3, 0.0, nan]], [[1.5, 3.0, 1.0], [1.0, 0.5, nan]]),  # each is better by its mean
        6: ([[0.7, 0.5, 0.3], [0.0, 0.0, nan]], [[0.1, 1.9, 0.1], [3.0, 1.7, nan]]),  # none is
    }
    for step, scores in script.items():
        monkeypatch.setattr(validation, "scores", lambda *_, s=scores: tuple(np.asarray(x, np.float32) for x in s))
        state = validation.judge(step, frozen, state)
    kept = validation.summary(state.best)
    assert [kept[n]["step"] for n in NAMES] == [4, 4, 4]
    assert kept["apple"] == {"step": 4, "exact": 0.4, "loss": 1.25}
    assert kept["cedar"]["exact"] == 0.4
    tasks = validation.records[1]["tasks"]
    assert (tasks["apple"]["exact_alone"], tasks["apple"]["exact_in_composites"]) == (0.5, 0.3)
    assert tasks["cedar"]["loss_in_composites"] is None
