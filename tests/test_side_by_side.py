"""Adapters trained side by side learn what they would learn alone."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from extent import parameters
from flax import nnx

import meteora_jax as mj
from meteora_jax.bank import AdapterParam
from meteora_jax.config import PROJECTIONS
from meteora_jax.evaluation.tasks import Example
from meteora_jax.io.bank import save_bank
from meteora_jax.training import step as training_step
from meteora_jax.training.adapter import fresh_bank
from meteora_jax.training.data import Batches, Layout, Mixture, collate, plan, rounded
from meteora_jax.training.loss import NextTokenLoss
from meteora_jax.training.sequences import NO_TASK, Tokenized, compose, encode
from meteora_jax.training.side_by_side import EMA, SideBySideLoss, clip_each, shares_of, task_routing
from meteora_jax.training.step import initial_state, make_step, optimizer
from meteora_jax.training.validation import packed

NAMES = ("apple", "birch", "cedar")
WORDS = ("How many apples?", "Which sentence follows", "The lazy dog")
TASKS = {
    name: [Example(f"[INST] {word} number {i} [/INST]\n", f"{word[:6]} {i % 3}") for i in range(20)]
    for name, word in zip(NAMES, WORDS, strict=True)
}
gradients = jax.jit(training_step.gradients, static_argnums=(0, 5), static_argnames=("dtype", "remat", "accumulate"))
SMALL = dict(steps=8, batch_size=8, learning_rate=1e-2, max_length=200, rank=4, alpha=8.0, composite=0.3, validations=4)


def random_bank(world, names=NAMES, seed=0):
    """Fresh adapters whose B is not zero, so that all gradients are alive."""
    bank = fresh_bank(world["model"].config, names, 4, 8.0, PROJECTIONS, seed)
    rng = np.random.default_rng(9)
    b = {p: (0.1 * rng.standard_normal(x.shape)).astype(np.float32) for p, x in bank.b.items()}
    return dataclasses.replace(bank, b=b)


def of_one(bank, i):
    """A bank of the i-th adapter alone."""

    def one(stacked):
        return {p: x[:, i : i + 1] for p, x in stacked.items()}

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


def rows_alone(every, i):
    """The i-th task's sequences, one a row, in as many rows and columns as any task needs: one program for all."""
    most, width = max(map(len, every)), rounded(max(len(s.tokens) for group in every for s in group))
    empty = Tokenized(np.zeros(0, np.int32), np.zeros(0, bool), np.zeros(0, np.int32))
    rows = [*map(alone, every[i]), *[empty] * (most - len(every[i]))]
    return jax.tree.map(jnp.asarray, collate(rows, width))


def own(tree, i):
    """The i-th adapter's part of every leaf, lora_a [L, P, A, R, I] and lora_b [L, A, R, O]."""
    return [np.asarray(x)[..., i : i + 1, :, :] for x in jax.tree.leaves(tree)]


@pytest.mark.parametrize(
    ("accumulate", "prompt_loss"),
    parameters([(1, False), (1, True), (2, False), (2, True)], [(2, True)], "the updates below have the rest together"),
)
def test_gradients_side_by_side_are_those_alone(tmp_path, world, prompt_loss, accumulate):
    """Each adapter by itself, in a model with no other, with the loss of `train adapter`, one sequence a row."""
    bank = random_bank(world)
    _, graph, params, frozen = parts(tmp_path, world, bank)
    every = [sequences(world, i, prompt_loss=prompt_loss) for i in range(3)]
    mixed = [s for group in zip(*(g[:5] for g in every), strict=True) for s in group] + every[1][5:] + every[2][5:]
    how = dict(dtype=jnp.float32, remat=False, accumulate=accumulate)
    losses, grads = gradients(graph, frozen, params, in_rows(mixed), None, SideBySideLoss(), **how)
    total = 0.0
    for i in range(3):
        model, graph1, params1, frozen1 = parts(tmp_path, world, of_one(bank, i))
        batch = rows_alone(every, i)
        router = model.bind(mj.Fixed(NAMES[i]), len(batch.tokens))
        expected, expected_grads = gradients(
            graph1, frozen1, params1, batch, router, NextTokenLoss(), dtype=jnp.float32, remat=False
        )
        total += float(expected.loss)
        for found, right in zip(own(grads, i), jax.tree.leaves(expected_grads), strict=True):
            assert np.abs(right).max() > 1e-3
            assert np.abs(found - right).max() <= 1e-5
    assert np.isclose(float(losses.loss), total, atol=1e-5)
    assert np.isclose(float(losses.lm), total / 3, atol=1e-5)


def test_updates_side_by_side_are_those_alone(tmp_path, world):
    """Three steps of clipping and Adam; one adapter's gradient is far beyond the limit, another's below it."""
    bank = random_bank(world)
    _, graph, params, frozen = parts(tmp_path, world, bank)
    every = [sequences(world, i) for i in range(3)]

    def tx(each):
        return optimizer(3, 1e-2, 0.0, 2.4, each=each)

    how = dict(dtype=jnp.float32, remat=True)
    _, grads = gradients(
        graph,
        frozen,
        params,
        in_rows([s for group in every for s in group]),
        None,
        SideBySideLoss(),
        dtype=jnp.float32,
        remat=False,
    )
    norms = [np.sqrt(sum((x**2).sum() for x in own(grads, i))) for i in range(3)]
    assert min(norms) < 2.4 < max(norms), norms  # or the limit would do nothing, or all that it can
    state = initial_state(params, tx(True), None)
    step = make_step(graph, state, tx(True), SideBySideLoss(), **how)
    for _ in range(3):
        state, _ = step(frozen, state, in_rows([s for group in every for s in group]), None)
    for i in range(3):
        model, graph1, params1, frozen1 = parts(tmp_path, world, of_one(bank, i))
        before = jax.tree.map(np.asarray, params1)
        state1 = initial_state(params1, tx(False), None)
        step1 = make_step(graph1, state1, tx(False), NextTokenLoss(), **how)
        batch = rows_alone(every, i)
        for _ in range(3):
            state1, _ = step1(frozen1, state1, batch, model.bind(mj.Fixed(NAMES[i]), len(batch.tokens)))
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


def test_the_ema_counts_recent_steps_most():
    """Against the definition: a plain mean while there are few, then each counts 0.75 of its successor."""
    seen = np.random.default_rng(0).standard_normal((12, 3)).astype(np.float32)
    ema = EMA({"w": jnp.zeros(3)}, jnp.int32(0))
    mean = seen[0]
    for k, x in enumerate(seen, start=1):
        ema = ema.after({"w": jnp.asarray(x)}, 0.75)
        # from the fourth on, the newest counts a quarter
        mean = seen[:k].mean(0) if k <= 4 else 0.75 * mean + 0.25 * x
        assert np.allclose(ema.params["w"], mean, atol=1e-6)
    assert int(ema.steps) == 12


def test_an_absent_adapter_gets_no_gradient(tmp_path, world):
    _, graph, params, frozen = parts(tmp_path, world, random_bank(world))
    batch = in_rows(sequences(world, 0) + sequences(world, 2))
    losses, grads = gradients(graph, frozen, params, batch, None, SideBySideLoss(), dtype=jnp.float32, remat=False)
    assert all(not x.any() for x in own(grads, 1))
    assert all(np.abs(x).max() > 1e-4 for i in (0, 2) for x in own(grads, i))
    assert np.isclose(float(losses.loss), 2 * float(losses.lm), rtol=1e-6)


def test_a_composite_counts_what_each_adapter_predicts(tmp_path, world):
    """Against log-probabilities of a whole forward pass: a token belongs to the adapter at work before it."""
    model, graph, params, frozen = parts(tmp_path, world, random_bank(world))
    s = compose([(TASKS[n][0], i) for i, n in enumerate(NAMES)], model.tokenizer, 2, prompt_loss=False)
    batch = jax.tree.map(jnp.asarray, collate([s]))
    losses, grads = gradients(graph, frozen, params, batch, None, SideBySideLoss(), dtype=jnp.float32, remat=False)
    llama = nnx.merge(graph, params, frozen)
    routing = task_routing(batch.tasks)
    whole = nnx.jit(lambda llama: llama.logits(llama(batch.tokens, batch.positions, routing).hidden, None))
    logits = np.asarray(whole(llama), np.float64)[0]
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    means = []
    for i in range(3):
        at = [t for t in range(1, len(s.tokens)) if s.loss[t] and s.tasks[t - 1] == i]
        means.append(-np.mean([logp[t - 1, s.tokens[t]] for t in at]))
    assert s.tasks[-1] == NO_TASK  # the end token is the last adapter's to predict
    assert np.isclose(float(losses.loss), sum(means), atol=1e-5)
    assert all(np.abs(x).max() > 1e-4 for i in range(3) for x in own(grads, i))


def test_no_task_routes_to_no_adapter():
    routing = task_routing(jnp.asarray([[0, NO_TASK, 2]], jnp.int32))
    assert routing.indices.shape == (1, 3, 1, 1)
    assert routing.indices[0, :, 0, 0].tolist() == [0, mj.routing.NO_ADAPTER, 2]
    assert routing.weights[0, :, 0, 0].tolist() == [1.0, 0.0, 1.0]


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
