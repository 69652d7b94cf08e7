"""Profiles, queries and an encoder for the tests of the index."""

import numpy as np

PROFILES = {
    "translate": ["Translate to German: the house is red", "Translate to German: I am hungry"],
    "sentiment": ["What a film! Is this positive or negative?", "I fell asleep. Is this positive or negative?"],
    "count": ["How many apples are 3 apples and 4 apples?", "How many pears are 2 pears and 9 pears?", "Count: 1 2 3"],
}


QUERIES = ["Translate to German: my cat sleeps", "How many plums are 5 plums and 6 plums?", "Dull. Is this positive?"]


class Letters:
    """An encoder that anybody can check: how often each letter occurs."""

    calls = 0

    def encode(self, texts, instruction):
        self.calls += 1
        texts = [instruction + t for t in texts]
        return np.asarray([[t.lower().count(chr(97 + i)) for i in range(26)] for t in texts], np.float32)

    def cut(self, texts, instruction):
        return []

    def save(self, folder):
        raise NotImplementedError
