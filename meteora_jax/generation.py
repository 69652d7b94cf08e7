"""A batch of prompts through an engine: the text of each response as it becomes certain, and the whole at the end."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from flax import nnx
from jax.sharding import Mesh

from meteora_jax.completion import Delta
from meteora_jax.config import PROJECTIONS, LlamaConfig
from meteora_jax.engine import EngineCore, EngineSize, Handle, Progress, Request
from meteora_jax.engine.adapter_pool import AdapterPool
from meteora_jax.engine.memory import fitting
from meteora_jax.engine.replicas import Replicas
from meteora_jax.routing import NO_ADAPTER
from meteora_jax.sharding import Params, data_parts
from meteora_jax.text import TextStream

ROWS = 256  # sequences at once
BLOCK_SIZE = 16
LEAST_BLOCKS = 128


class Engines:
    """The engine that a model's calls share. It is replaced by one with more blocks when a call needs them."""

    def __init__(
        self, graph: nnx.GraphDef, weights: Params, config: LlamaConfig, mesh: Mesh | None, decode: Any,
        pool: AdapterPool | None = None,
    ):  # fmt: skip
        self._model, self._config, self._mesh, self._decode = (graph, weights), config, mesh, decode
        self._pool = pool
        self._engine: EngineCore | Replicas | None = None
        # adapters that come and go do so on the whole mesh at once
        self._parts = () if mesh is None or pool is not None else data_parts(mesh)

    def holding(self, requests: Sequence[Request]) -> EngineCore | Replicas:
        """An engine in which the longest of these requests have room together, up to ROWS and the device's memory; on a
        mesh with a data axis as many engines, each with room for its share of the longest.

        Raises:
            InputError: the longest alone does not fit.
        """
        slots = sorted((len(r.prompt) + r.max_new_tokens for r in requests), reverse=True)
        slots = slots[:: max(1, len(self._parts))][:ROWS]
        wanted = [-(-n // BLOCK_SIZE) for n in slots]
        blocks = LEAST_BLOCKS
        while blocks < sum(wanted):
            blocks *= 2
        found = self._engine
        if found is not None and not found.failed and found.size.blocks >= blocks:
            if isinstance(found, Replicas):
                found.refresh(self._model[1])
            return found
        if found is not None and (found.failed or not found.serving):
            self._engine = found = None  # its memory goes before the next one's comes
        graph, weights = self._model

        def made(weights: Params, mesh: Mesh | None) -> EngineCore:
            tokens, most = fitting(graph, weights, self._config, ROWS, BLOCK_SIZE, wanted[0], mesh)
            size = EngineSize(ROWS, tokens, min(blocks, most), BLOCK_SIZE)
            return EngineCore(
                graph, weights, self._config, size, mesh=mesh, decode=self._decode, pool=self._pool, few_programs=True
            )

        engine = Replicas(self._parts, made, weights) if len(self._parts) > 1 else made(weights, self._mesh)
        if found is None:
            self._engine = engine
        return engine


@dataclasses.dataclass(frozen=True)
class Ended:
    """What became of a request, and its text."""

    index: int
    progress: Progress
    text: str


def pieces(
    engine: EngineCore | Replicas, requests: Sequence[Request], decode: Callable[[Sequence[int]], str], stream: bool
) -> Iterator[Delta | Ended]:
    """`Delta`s as text becomes certain, if `stream`; and each request as it ends."""
    handles: list[Handle] = []
    try:
        for request in requests:  # one by one, so that those before a refusal are cancelled
            handles.append(engine.submit(request))
        texts = [TextStream(decode, r.stop) for r in requests]
        seen = [0] * len(requests)
        left = list(range(len(requests)))
        while left:
            engine.advance(handles[left[0]])
            ended = [i for i in left if handles[i].done]
            for i in ended:
                handles[i].check()
            for i in left if stream else ended:
                fresh = handles[i].progress.tokens[seen[i] :]
                seen[i] += len(fresh)
                if (text := texts[i].push(fresh)) and stream:
                    yield Delta(i, text)
            for i in ended:
                if (rest := texts[i].finish()) and stream:
                    yield Delta(i, rest)
                yield Ended(i, handles[i].progress, texts[i].text)
            left = [i for i in left if i not in set(ended)]
    finally:
        for h in handles:  # whoever stops reading wants no more
            h.cancel()


def routing_of(progress: Progress) -> tuple[list[int], np.ndarray, np.ndarray] | None:
    """(tokens, indices and weights [T, L, P, C]) of prompt and response, or of the response alone as the request says.

    The last token of a response was not read unless its end token followed. None where no router acted.
    """
    own = progress.request.trace == "response"
    recorded = progress.routing
    if not recorded and own and progress.router is not None:  # a response whose tokens were never read
        shape = (0, 1, len(PROJECTIONS), 1)
        recorded = [(np.zeros(shape, np.int32), np.zeros(shape, np.float32))]
    if not recorded:
        return None
    width = max(indices.shape[-1] for indices, _ in recorded)
    tokens = [*(() if own else progress.request.prompt), *progress.tokens]
    read = len(tokens) - (progress.finish_reason != "end")
    out = []
    for part, fill in ((0, NO_ADAPTER), (1, 0.0)):
        arrays = [piece[part] for piece in recorded]
        pads = [np.pad(z, [(0, 0)] * 3 + [(0, width - z.shape[-1])], constant_values=fill) for z in arrays]
        joined = np.concatenate(pads)[:read]
        out.append(np.pad(joined, [(0, len(tokens) - len(joined))] + [(0, 0)] * 3, constant_values=fill))
    return tokens, out[0], out[1]
