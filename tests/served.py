"""A server around a tiny model, in this process, on a free port: what the tests of serving talk to."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator
from typing import Any

import meteora_jax as mj
from meteora_jax.engine import EngineCore, EngineSize
from meteora_jax.serving.models import Fleet
from meteora_jax.serving.run import in_thread
from meteora_jax.serving.server import Server
from meteora_jax.serving.settings import Settings

SIZE = EngineSize(rows=4, tokens=68, blocks=64, block_size=8)
PROFILES = {
    "apple": ["What is one plus two?", "How many apples are three apples?"],
    "birch": ["Translate to French: a tree", "Translate to French: a leaf"],
    "cedar": ["Is this sentence positive?", "Is that review negative?"],
}


def make_core(fleet: Fleet, size: EngineSize = SIZE) -> EngineCore:
    """An engine of few programs."""
    model = fleet.model
    core = EngineCore(model.graph, model.weights, model.config, size, decode=model.decode_tokens, pool=model.pool)
    core.row_sizes, core.table_sizes, core.prompt_sizes = core.row_sizes[-1:], core.table_sizes[-1:], (80,)
    return core


def make_slow(fleet: Fleet) -> EngineCore:
    """An engine that is long at it, one token at a time: its answers can be stopped under way."""
    core = make_core(fleet)
    step = core.step
    core.scheduler.limits = type(core.scheduler.limits)(4, 68, 1)

    def slow() -> bool:
        time.sleep(0.01)
        return step()

    core.step = slow
    return core


@dataclasses.dataclass
class Alone:
    """What the model says by itself, through an engine whose programs are the server's."""

    model: mj.Meteora
    core: EngineCore

    def __call__(self, prompt: Any, router: Any, most: int = 12, **options: Any) -> mj.Completion:
        model = self.model
        looked_up: Any = model.look_up([router], 1, lambda: [model.request_texts(prompt)])
        (own,), (found,) = looked_up
        asked = model.request(model.encode(prompt), own, most, **options)
        done = self.core.submit(asked).wait()
        return model.completion(done, model.decode(done.tokens), found)


@dataclasses.dataclass
class Served:
    """A server that runs, and where."""

    server: Server
    url: str

    def client(self, **options: Any) -> Any:
        """OpenAI's own."""
        import openai

        given = {"api_key": "none", "max_retries": 0, "timeout": 60.0} | options
        return openai.OpenAI(base_url=f"{self.url}/v1", **given)


@contextlib.contextmanager
def serving(
    model: mj.Meteora, settings: Settings | None = None, make: Any = make_core, index: Any = None
) -> Iterator[Served]:
    """Serves a model under the name "tiny"."""
    server = Server(Fleet(model, index, "tiny"), make, settings or Settings(grace=2))
    with in_thread(server) as url:
        yield Served(server, url)


def settled(served: Served, seconds: float = 20.0) -> None:
    """Waits until nothing is under way, and checks that no block is held."""
    core, end = served.server.driver.core, time.monotonic() + seconds
    while (core.busy or served.server.driver.live) and time.monotonic() < end:
        time.sleep(0.01)
    assert not core.busy
    assert not served.server.driver.live
    assert not served.server.driver._watched
    assert core.scheduler.cache.pool.available == core.size.blocks
    core.scheduler.cache.pool.check()
