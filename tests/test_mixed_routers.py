"""Rows of all kinds of router in one batch of the engine: each has what it has alone, which transformers computes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hooked import arrow, routed_logits, scores_of, softmax_of_best, spectr

import meteora_jax as mj
from meteora_jax.engine import EngineCore, EngineSize

PROMPTS = [np.random.default_rng(i).integers(3, 300, 9 + 4 * i).tolist() for i in range(6)]
NEW = 5


def by(score, top_k, temperature=1.0):
    def rule(x, adapters):
        return softmax_of_best(scores_of(x, adapters, score), top_k, temperature)

    return rule


def lag(k, top_k):
    def rule(x, adapters):
        first, scores = (scores_of(x, adapters, score) for score in (arrow, spectr))
        return softmax_of_best(torch.where(softmax_of_best(first, k) > 0, scores, -torch.inf), top_k)

    return rule


def cedar(x, adapters):
    return torch.tensor([[0.0, 0.0, 1.0, 0.0]], dtype=x.dtype).expand(len(x), -1)


ROUTERS = {  # one a prompt, and what it is in float64
    mj.Arrow(2): by(arrow, 2), mj.Arrow(1, 0.3): by(arrow, 1), mj.Spectr(2, 0.7): by(spectr, 2, 0.7),
    mj.Lag(2, 1): lag(2, 1), mj.Fixed("cedar"): cedar, mj.Lag(3, 2): lag(3, 2),
}  # fmt: skip


@pytest.fixture(scope="module")
def served(world):
    """The tokens of each prompt, all in one engine at once."""
    model = world["model"]
    engine = EngineCore(model.graph, model.weights, model.config, EngineSize(8, 160, 64, 8))
    routers = zip(PROMPTS, ROUTERS, strict=True)
    handles = [engine.submit(model.request(prompt, router, NEW)) for prompt, router in routers]
    engine.drain()
    assert engine.counters.dispatches <= NEW + 1, "all are read and decoded together"
    return [handle.progress.tokens for handle in handles]


def test_a_mixed_batch_is_one_by_one(world, served):
    model = world["model"]
    rows = [prompt + tokens for prompt, tokens in zip(PROMPTS, served, strict=True)]
    together = np.asarray(model.logits(rows, list(ROUTERS)))
    for row, ours, rule, prompt, tokens in zip(rows, together, ROUTERS.values(), PROMPTS, served, strict=True):
        (alone,) = routed_logits(world["hf_folder"], world["peft"], rule, [row])
        np.testing.assert_allclose(ours[: len(row)], alone, atol=3e-4)
        likeliest = alone[len(prompt) - 1 : -1].argmax(axis=1)
        ended = np.isin(likeliest, model.config.eos_token_ids)
        assert tokens == likeliest[: len(tokens)].tolist()
        assert not ended[: len(tokens)].any()
        assert len(tokens) == NEW or alone[-1].argmax() in model.config.eos_token_ids
