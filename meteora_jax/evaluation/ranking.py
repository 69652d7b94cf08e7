"""Adapters ranked by task: the loss of each on examples of each task."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from meteora_jax.evaluation.systems import Model
from meteora_jax.examples import Example
from meteora_jax.execution import jit
from meteora_jax.padding import bucket, pad_batch
from meteora_jax.routing import BoundRouter
from meteora_jax.routing.fixed import Fixed
from meteora_jax.sharding import Params, fetch, place_rows, use_mesh
from pallas_kernels.paged_attention import EMPTY

ROWS = 4  # sequences at once: each has its logits


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
    ordered = sorted(rows, key=lambda row: bucket(len(row[0])))
    for start in range(0, len(ordered), ROWS):
        some = ordered[start : start + ROWS]
        some = some + some[-1:] * (ROWS - len(some))  # one shape
        bound = router.bind([router] * ROWS, model.adapter_names)
        tokens, lengths, bound = pad_batch([row for row, _ in some], bound, model.mesh)
        starts = np.pad(np.asarray([first for _, first in some], np.int32), (0, len(lengths) - ROWS))
        with use_mesh(model.mesh):
            given = place_rows((tokens, lengths, starts), model.mesh)
            found = fetch(_losses(model.graph, model.weights, *given, bound))
        total += float(np.sum(found[: len(ordered[start : start + ROWS])]))
        count += sum(len(row) - first for row, first in ordered[start : start + ROWS])
    return total / max(count, 1)


@jit(static_argnames=("graph",))
def _losses(
    graph: nnx.GraphDef, weights: Params, tokens: jax.Array, lengths: jax.Array, starts: jax.Array, router: BoundRouter
) -> jax.Array:
    """float32 [B], each row's summed loss of its response."""
    model = nnx.merge(graph, weights)
    columns = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :]
    positions = jnp.where(columns < lengths[:, None], columns, EMPTY)
    logits = model.logits(model(tokens, positions, router).hidden, router)[:, :-1]
    logp = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], axis=2)[..., 0]
    judged = (columns[:, 1:] >= starts[:, None]) & (columns[:, 1:] < lengths[:, None])
    return -jnp.sum(jnp.where(judged, logp, 0.0), axis=1)
