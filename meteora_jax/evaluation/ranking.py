"""Adapters ranked by task: the loss of each on examples of each task."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from meteora_jax.config import InputError
from meteora_jax.evaluation.systems import Model
from meteora_jax.examples import Example
from meteora_jax.model.likelihood import score
from meteora_jax.padding import bucket, pad_batch, rows_within
from meteora_jax.routing.fixed import Fixed
from meteora_jax.sharding import fetch, place_rows, use_mesh

ROWS, TOKENS = 8, 8192  # of a batch, at most: sequences, and tokens with their padding


def rank_adapters(
    model: Model,
    tasks: Mapping[str, Sequence[Example]],
    progress: Callable[[str, int, int], None] | None = None,
    losses: dict[str, dict[str, float]] | None = None,
) -> dict[str, dict[str, float]]:
    """{task: {adapter: mean loss of the next token over the responses of the task's examples}}.

    Args:
        tasks: their examples, best those that no adapter was trained on. progress: called with every task that is done.
        losses: what is known already, in whose place nothing is computed; what is found is added to it.

    Raises:
        InputError: no response of a task has a token in the context, or an adapter's loss is no finite number.
    """
    losses = {} if losses is None else losses
    rows = {task: [_tokens(model, example) for example in own] for task, own in tasks.items() if task not in losses}
    if silent := [task for task, own in rows.items() if all(len(row) <= first for row, first in own)]:
        raise InputError(
            f"{', '.join(silent)}: expected examples whose prompts leave room for a response in the context of "
            f"{model.config.max_position_embeddings} tokens, found none"
        )
    for done, task in enumerate(tasks, start=1):
        if task in rows:
            found = {name: _loss(model, rows[task], Fixed(name)) for name in model.adapter_names}
            if strange := [name for name, loss in found.items() if not math.isfinite(loss)]:
                raise InputError(f"{task}: expected finite losses, found {found[strange[0]]} with {', '.join(strange)}")
            losses[task] = found
        if progress is not None:
            progress(task, done, len(tasks))
    return losses


def digest(tasks: Mapping[str, Sequence[Example]]) -> str:
    """Of the tasks' names and examples."""
    found = hashlib.sha256()
    for task, examples in tasks.items():
        for example in examples:
            found.update(f"{task}\0{example.key}\0{example.response}\0".encode())
    return found.hexdigest()[:16]


def _tokens(model: Model, example: Example) -> tuple[list[int], int]:
    """Prompt and response, cut to the context, and the first token whose loss counts: the response's, but nothing
    predicts a sequence's own first."""
    prompt = model.encode(list(example.messages) or example.prompt)
    response = model.tokenizer(example.response, add_special_tokens=False)["input_ids"]
    return (prompt + list(response))[: model.config.max_position_embeddings], max(len(prompt), 1)


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
