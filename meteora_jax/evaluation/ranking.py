"""Adapters ranked by task: the loss of each on examples of each task."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from meteora_jax.evaluation.systems import Model
from meteora_jax.examples import Example
from meteora_jax.model.likelihood import score
from meteora_jax.padding import bucket, pad_batch, rows_within
from meteora_jax.routing.fixed import Fixed
from meteora_jax.sharding import fetch, place_rows, use_mesh

ROWS, TOKENS = 8, 8192  # of a batch, at most: sequences, and tokens with their padding


def rank_adapters(
    model: Model, tasks: Mapping[str, Sequence[Example]], progress: Callable[[str, int, int], None] | None = None
) -> dict[str, dict[str, float]]:
    """{task: {adapter: mean loss of the next token over the responses of the task's examples}}.

    Args:
        tasks: their examples, best those that no adapter was trained on. progress: called with every task that is done.
    """
    losses: dict[str, dict[str, float]] = {}
    for done, (task, examples) in enumerate(tasks.items(), start=1):
        rows = [_tokens(model, example) for example in examples]
        losses[task] = {name: _loss(model, rows, Fixed(name)) for name in model.adapter_names}
        if progress is not None:
            progress(task, done, len(tasks))
    return losses


def _tokens(model: Model, example: Example) -> tuple[list[int], int]:
    """Prompt and response, cut to the context, and the prompt's length."""
    prompt = model.encode(list(example.messages) or example.prompt)
    response = model.tokenizer(example.response, add_special_tokens=False)["input_ids"]
    return (prompt + list(response))[: model.config.max_position_embeddings], len(prompt)


def _loss(model: Model, rows: Sequence[tuple[list[int], int]], router: Fixed) -> float:
    """Over all response tokens."""
    total, count = 0.0, 0
    ordered = sorted(rows, key=lambda row: bucket(len(row[0])), reverse=True)  # a batch is as long as its first
    while ordered:
        together = rows_within(TOKENS, len(ordered[0][0]), ROWS)
        some, ordered = ordered[:together], ordered[together:]
        total += float(np.sum(_losses(model, some + some[-1:] * (together - len(some)), router)[: len(some)]))
        count += sum(max(len(row) - first, 0) for row, first in some)  # a prompt may fill the context
    return total / max(count, 1)


def _losses(model: Model, rows: Sequence[tuple[list[int], int]], router: Fixed) -> np.ndarray:
    """Each row's summed loss of its response, [B]."""
    bound = router.bind([router] * len(rows), model.adapter_names)
    tokens, lengths, bound = pad_batch([row for row, _ in rows], bound, model.mesh)
    judged = [np.arange(first, len(row), dtype=np.int32) for row, first in rows]
    width = bucket(max(map(len, judged)))
    at, targets = np.zeros((len(tokens), width), np.int32), np.zeros((len(tokens), width), np.int32)
    for b, places in enumerate(judged):
        at[b, : len(places)], targets[b, : len(places)] = places - 1, tokens[b, places]
    with use_mesh(model.mesh):
        given = place_rows((tokens, lengths, at, targets), model.mesh)
        logprobs = fetch(score(model.graph, model.weights, *given, bound)[0])
    return np.asarray([-np.sum(own[: len(places)]) for own, places in zip(logprobs, judged, strict=False)])
