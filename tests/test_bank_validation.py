"""Composites of held-back examples in the validation of a bank: what they are made of, how scored, what they decide."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flat_settings import changed, flat
from flax import nnx
from test_train_bank import NAMES, SMALL, TASKS, begun, parts, random_bank, sequences

from meteora_jax.config import InputError
from meteora_jax.training.data import NO_TASK, collate, compose, encode
from meteora_jax.training.settings import BankTraining
from meteora_jax.training.side_by_side import BoundTasks
from meteora_jax.training.validation import composites_of, hold_back


def test_held_composites_are_made_of_what_training_does_not_see(world):
    settings = flat(BankTraining, **SMALL, held_composites=5, composite_sizes=(2, 3), composite_shots=1)
    how = world["model"].tokenizer, 2, 400
    left, _ = hold_back(TASKS, settings, *how)
    made = composites_of(TASKS, left, settings, *how)
    again = composites_of(TASKS, left, settings, *how)
    assert [s.tokens.tolist() for s in made] == [s.tokens.tolist() for s in again]
    assert len(made) == 5
    question = lambda e: e.prompt.split(" [/INST]")[0].removeprefix("[INST] ") + " "  # noqa: E731
    seen = {question(e) for examples in left.values() for e in examples}
    away = {question(e) for examples in TASKS.values() for e in examples} - seen
    for s in made:
        text = world["model"].tokenizer.decode(s.tokens)
        assert any(q in text for q in away)
        assert not any(q in text for q in seen)
        assert 2 <= len(set(s.tasks.tolist()) - {NO_TASK}) <= 3
    assert composites_of(TASKS, left, changed(settings, held_composites=0), *how) == []
    with pytest.raises(InputError, match="held_composites: expected 0 where composite is 0, found 5"):
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
        hidden = llama(batch.tokens, batch.positions, BoundTasks(batch.tasks)).hidden
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
    told = validation.records[1]["tasks"]
    assert (told["apple"]["exact_alone"], told["apple"]["exact_in_composites"]) == (0.5, 0.3)
    assert told["cedar"]["loss_in_composites"] is None
