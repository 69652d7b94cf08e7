"""A batch of prompts through an engine of just their size: what tests of programs compare."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from meteora_jax.engine import EngineCore, EngineSize
from meteora_jax.generation import routing_of

Trace = tuple[np.ndarray, np.ndarray]


def answer(
    model: Any, prompts: Sequence[Sequence[int]], router: Any, steps: int
) -> tuple[list[list[int]], list[Trace] | None, EngineCore]:
    """Greedy tokens and routing of each prompt, and the engine that made them."""
    routers = list(router) if isinstance(router, list) else [router] * len(prompts)
    rows = len(prompts)
    blocks = sum(-(-(len(p) + steps) // 16) for p in prompts)
    engine = EngineCore(model.graph, model.weights, model.config, EngineSize(rows, rows + 256, blocks), mesh=model.mesh)
    engine.row_sizes, engine.table_sizes = (rows,), (blocks,)
    own = zip(prompts, routers, strict=True)
    handles = [engine.submit(model.request(p, r, steps, trace=True)) for p, r in own]
    engine.drain()
    found = [routing_of(h.progress) for h in handles]
    routings: Any = None if all(r is None for r in found) else [None if r is None else r[1:] for r in found]
    return [h.progress.tokens for h in handles], routings, engine
