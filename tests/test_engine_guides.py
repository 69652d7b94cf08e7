"""Responses that a guide restricts, among others that nobody does."""

from __future__ import annotations

import dataclasses

import numpy as np
from test_engine import SMALL, engine, request


class Multiples:
    """Allows multiples of a number alone, of a response's n-th token those that are n more; keeps what it was asked."""

    def __init__(self, number: int, vocabulary: int):
        self.number, self.vocabulary, self.asked = number, vocabulary, []

    def tokens(self, place: int) -> np.ndarray:
        return np.arange(place + 3, self.vocabulary, self.number)

    def allow(self, tokens):
        self.asked.append(list(tokens))
        allowed = np.zeros((-(-self.vocabulary // 32),), np.uint32)
        for token in self.tokens(len(tokens)):
            allowed[token // 32] |= np.uint32(1 << token % 32)
        return allowed


def test_a_guide_restricts_its_own_response_alone(world):
    """Nine requests on few blocks, so that some are thrown out and read again; every third has a guide."""
    model = world["model"]
    vocabulary = model.config.vocab_size
    texts = [np.random.default_rng(i).integers(3, 300, 30).tolist() for i in range(9)]
    asked = [request(model, text, None, 40, temperature=2.0, seed=5) for text in texts]
    free, used = engine(model), engine(model)
    guides = {i: Multiples(7 + i, vocabulary) for i in range(0, 9, 3)}
    mixed = [dataclasses.replace(one, guide=guides.get(i)) for i, one in enumerate(asked)]
    alone, handles = ([core.submit(one) for one in all_] for core, all_ in ((free, asked), (used, mixed)))
    free.drain()
    used.drain()
    assert used.scheduler.preemptions > 0
    for i, (handle, unbound) in enumerate(zip(handles, alone, strict=True)):
        tokens = handle.progress.tokens
        if i not in guides:
            assert tokens == unbound.progress.tokens
            continue
        assert len(tokens) == 40
        assert all(token in guides[i].tokens(place) for place, token in enumerate(tokens))
        assert all(tokens[: len(seen)] == seen for seen in guides[i].asked)
    used.scheduler.cache.pool.check()
    assert used.scheduler.cache.pool.available == SMALL.blocks


def test_the_likeliest_allowed_token_is_the_models_own(world):
    model = world["model"]
    text = list(range(20, 40))
    guide = Multiples(11, model.config.vocab_size)
    used = engine(model)
    tokens = used.submit(dataclasses.replace(request(model, text, None, 5), guide=guide)).wait().tokens
    logits = np.asarray(model.logits([text + tokens], None))[0]
    for place, token in enumerate(tokens):
        allowed = guide.tokens(place)
        assert token == allowed[logits[len(text) - 1 + place][allowed].argmax()]
