"""Settings of training that cannot be meant are refused before anything is read."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from worlds import NAMES

from meteora_jax.config import InputError
from meteora_jax.examples import Example
from meteora_jax.training.data import Batches, Layout, Mixture, plan
from meteora_jax.training.settings import (
    AdapterTraining,
    BankTraining,
    GateTraining,
    LoRA,
    Objective,
    Optimization,
    Schedule,
    Validating,
)
from meteora_jax.training.validation import Validation


@pytest.mark.parametrize(
    ("make", "said"),
    [
        *((lambda x=x: Optimization(learning_rate=x), "learning_rate: expected a number above 0") for x in (0.0, -1.0)),
        *((lambda x=x: Optimization(learning_rate=x), "learning_rate") for x in (math.nan, math.inf)),
        *((lambda x=x: Schedule(clip=x), "clip: expected a norm above 0") for x in (0.0, -1.0, math.nan)),
        *((lambda x=x: Schedule(warmup=x), "warmup: expected a share from 0 to 1") for x in (-0.1, 2.0, math.nan)),
        *((lambda x=x: LoRA(alpha=x), "alpha: expected a number above 0") for x in (0.0, -4.0, math.nan)),
        *((lambda x=x: BankTraining(epochs=x), "epochs: expected a number above 0") for x in (0.0, math.nan)),
        (lambda: Objective(beta=math.nan), "beta: expected 0 or more, found nan"),
        (lambda: GateTraining(temperature=0.0), "temperature: expected a number above 0"),
        (lambda: GateTraining(adapter_learning_rate=-1.0), "adapter_learning_rate: expected a number above 0"),
        *((lambda k=k: k(seed=-1), "seed: expected at least 0, found -1") for k in (GateTraining, BankTraining)),
        (lambda: AdapterTraining(name="a", seed=-1), "seed: expected at least 0, found -1"),
        *((lambda n=n: AdapterTraining(name=n), "name: expected a printable name") for n in ("", "a/b", "a\nb", " a")),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_refused(make, said):
    with pytest.raises(InputError, match=said):
        make()


def test_what_can_be_meant_is_taken():
    assert Schedule(clip=math.inf, warmup=0.0).clip == math.inf
    assert (Schedule(warmup=1.0).warmup, LoRA(alpha=1e-3).alpha) == (1.0, 1e-3)
    assert Optimization(learning_rate=1e-9).steps == 1000
    assert AdapterTraining(name="Ünï 1.5", seed=20251201).name == "Ünï 1.5"


@pytest.mark.parametrize(("steps", "count", "due"), [(9, 8, 8), (3, 8, 3), (70, 8, 8), (1, 8, 1), (560, 8, 8)])
def test_as_many_validations_as_asked(steps, count, due):
    settings = BankTraining(optimization=Optimization(steps=steps), validating=Validating(validations=count))
    found = [step for step in range(steps + 2) if Validation({}, settings).due(step)]
    assert len(found) == due
    assert found[-1] == steps
    assert found[0] >= 1


def test_a_run_whose_composites_seldom_fit_goes_on(world):
    """One composite of 28 fits here: a hundred in a row that do not are met sooner or later."""

    def example(name: str, i: int) -> Example:
        return Example(f"{name} {i} {'apples ' * (56 if i < 67 else 0)}\n", "y")

    tasks = {name: [example(name, i) for i in range(100)] for name in NAMES[:3]}
    labels = {name: i for i, name in enumerate(tasks)}
    how = dict(max_length=256, prompt_loss=False, composite=0.9)
    mixture = Mixture(tasks, labels, world["model"].tokenizer, 2, **how)
    chosen, rng = mixture.chosen(), np.random.default_rng(9)
    lengths = [len(mixture.composite_of(chosen, rng).tokens) for _ in range(400)]
    assert 0.005 < np.mean(np.asarray(lengths) <= 256) < 0.08
    batches = Batches(mixture, chosen, Layout(rows=2, width=256, shards=1, packing=True))
    assert sum(1 for _ in itertools.islice(batches, 12)) == 12


def test_composites_that_never_fit_are_refused(world):
    tasks = {name: [Example("apples " * 10, "y")] * 4 for name in NAMES[:3]}
    how = dict(max_length=100, prompt_loss=False, composite=0.5)
    mixture = Mixture(tasks, {n: i for i, n in enumerate(tasks)}, world["model"].tokenizer, 2, **how)
    with pytest.raises(InputError, match="expected room for 3 tasks or more in one sequence of 100 tokens, found none"):
        plan(mixture, mixture.chosen(), 4, packing=True, multiple=1, shards=1)
