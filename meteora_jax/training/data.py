"""Examples to batches: tokens, which of them carry loss, and the adapter that each belongs to."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from meteora_jax.config import InputError
from meteora_jax.evaluation.composite import answer_pieces, question_pieces
from meteora_jax.evaluation.tasks import Example
from meteora_jax.kv_cache import EMPTY

NO_TASK = -1  # a token that no gate is judged on


@dataclasses.dataclass(frozen=True)
class Tokenized:
    """One training sequence: tokens int32 [T], loss bool [T] (is this token predicted?), tasks int32 [T]."""

    tokens: np.ndarray
    loss: np.ndarray
    tasks: np.ndarray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Sequences side by side, padded on the right.

    tokens int32 [B, T]; positions int32 [B, T], EMPTY for padding; loss bool [B, T]; tasks int32 [B, T].
    """

    tokens: Any
    positions: Any
    loss: Any
    tasks: Any


def encode(example: Example, task: int, tokenizer: Any, end: int, *, prompt_loss: bool) -> Tokenized:
    """prompt + response + end token; prompt and response are tokenized apart, as generation will see them."""
    prompt = list(tokenizer(example.prompt)["input_ids"])
    response = [*tokenizer(example.response, add_special_tokens=False)["input_ids"], end]
    tokens = np.asarray(prompt + response, np.int32)
    loss = np.full(len(tokens), prompt_loss)
    loss[len(prompt) :] = True
    loss[0] = False  # nothing predicts the first token
    return Tokenized(tokens, loss, np.full(len(tokens), task, np.int32))


def compose(parts: Sequence[tuple[Example, int]], tokenizer: Any, end: int, *, prompt_loss: bool) -> Tokenized:
    """Several tasks in one sequence, a zero-shot composite problem: all prompts, then "1. answer" lines.

    Every token is labelled with the task of the part that it belongs to, so gates learn to switch inside one
    sequence; the end token belongs to none.
    """
    tokens: list[int] = list(tokenizer("")["input_ids"])  # what the tokenizer puts first, if anything
    tasks = [NO_TASK] * len(tokens)
    loss = [False] * len(tokens)

    def add(text: str, task: int, predicted: bool) -> None:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        tokens.extend(ids)
        tasks.extend([task] * len(ids))
        loss.extend([predicted] * len(ids))

    examples = [example for example, _ in parts]
    for pieces, predicted in ((question_pieces(examples), prompt_loss), (answer_pieces(examples), True)):
        for piece, (_, task) in zip(pieces, parts, strict=True):
            add(piece, task, predicted)
    tokens.append(end)
    tasks.append(NO_TASK)
    loss.append(True)
    loss[0] = False
    return Tokenized(np.asarray(tokens, np.int32), np.asarray(loss), np.asarray(tasks, np.int32))


def collate(sequences: Sequence[Tokenized]) -> Batch:
    """Pads sequences on the right to the next power of two, 64 at least: each width compiles a step of its own."""
    width = max(64, 1 << (max(len(s.tokens) for s in sequences) - 1).bit_length())
    shape = (len(sequences), width)
    tokens, tasks = np.zeros(shape, np.int32), np.full(shape, NO_TASK, np.int32)
    positions, loss = np.full(shape, EMPTY, np.int32), np.zeros(shape, bool)
    for b, s in enumerate(sequences):
        n = len(s.tokens)
        tokens[b, :n], tasks[b, :n], loss[b, :n], positions[b, :n] = s.tokens, s.tasks, s.loss, np.arange(n)
    return Batch(tokens, positions, loss, tasks)


def mixture(
    tasks: Mapping[str, Sequence[Example]],
    names: Sequence[str],
    tokenizer: Any,
    end: int,
    *,
    batch_size: int,
    max_length: int,
    composite: float,
    seed: int,
    prompt_loss: bool,
) -> Iterator[Batch]:
    """Endless batches, every task equally often, each task shuffled anew every epoch.

    Args:
        tasks: {adapter name: its training examples}; labels are positions in `names` (the bank's order).
        composite: share of batches made of composite-3 sequences (three tasks in one).
        max_length: longer sequences are passed over.

    Sixteen batches are drawn at a time and cut by length, so that little is lost to padding.
    """
    rng = np.random.default_rng(seed)
    empty = [n for n in names if not tasks.get(n)]
    if empty:
        raise InputError(f"tasks: expected training examples for every adapter, found none for {', '.join(empty)}")
    streams = {n: _shuffled(tasks[n], rng) for n in names}
    window = 16

    def draw() -> Tokenized:
        while True:
            name = names[int(rng.integers(len(names)))]
            s = encode(next(streams[name]), names.index(name), tokenizer, end, prompt_loss=prompt_loss)
            if len(s.tokens) <= max_length:
                return s

    def draw_composite() -> Tokenized:
        while True:
            picked = [names[i] for i in map(int, rng.choice(len(names), size=min(3, len(names)), replace=False))]
            parts = [(next(streams[n]), names.index(n)) for n in picked]
            s = compose(parts, tokenizer, end, prompt_loss=prompt_loss)
            if len(s.tokens) <= max_length:
                return s

    while True:
        kinds = rng.random(window) < composite
        plain = sorted((draw() for _ in range(batch_size * int((~kinds).sum()))), key=lambda s: len(s.tokens))
        mixed = sorted((draw_composite() for _ in range(batch_size * int(kinds.sum()))), key=lambda s: len(s.tokens))
        groups = [g[i : i + batch_size] for g in (plain, mixed) for i in range(0, len(g), batch_size)]
        for i in rng.permutation(len(groups)):
            yield collate(groups[int(i)])


def _shuffled(examples: Sequence[Example], rng: np.random.Generator) -> Iterator[Example]:
    while True:
        for i in rng.permutation(len(examples)):
            yield examples[int(i)]
