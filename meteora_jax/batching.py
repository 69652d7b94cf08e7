"""Continuous batching for callers: prompts come and go, each with its own router, and share one engine."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, cast

from meteora_jax.api import Meteora
from meteora_jax.arguments import Arguments
from meteora_jax.completion import Completion
from meteora_jax.engine import EngineCore, EngineSize, Handle, Sampling
from meteora_jax.engine.memory import fitting
from meteora_jax.engine.request import GREEDY
from meteora_jax.generation import LEAST_BLOCKS
from meteora_jax.prompts import Prompt, encode, read_prompt
from meteora_jax.routing import RouterArgument
from meteora_jax.routing.retrieval import Found
from meteora_jax.text import TextStream


class Pending:
    """A prompt that was submitted: `Engine.submit` gives it."""

    def __init__(self, model: Meteora, handle: Handle, retrieved: Found):
        self._model, self.handle, self._retrieved = model, handle, retrieved

    def stream(self) -> Iterator[str]:
        """The response's text, piece by piece, as it becomes certain."""
        text = TextStream(self._model.decode_tokens, self.handle.progress.request.stop)
        for tokens in self.handle.tokens():
            if piece := text.push(tokens):
                yield piece
        if piece := text.finish():
            yield piece

    def result(self) -> Completion:
        """The whole response, once it is there; who waits moves all requests on."""
        done = self.handle.wait()
        text = TextStream(self._model.decode_tokens, done.request.stop)
        text.push(done.tokens)
        text.finish()
        return self._model.completion(done, text.text, self._retrieved)

    def cancel(self) -> None:
        """Ends it; `result` gives what was said until then, with finish_reason "cancelled"."""
        self.handle.cancel()


class Engine:
    """Requests come and go while others decode; a response depends on none of its neighbours.

    Who waits for a result moves all requests on. `step` does the same for whoever has a thread for it. Adapters are
    those that the model has now: what `add_adapter` and `remove_adapter` change, an engine made after them has. With
    adapter slots it has it at once.
    """

    def __init__(
        self,
        model: Meteora,
        max_tokens: int | None = None,
        blocks: int | None = None,
        max_rows: int = 256,
        block_size: int = 16,
        prefix_cache: bool = True,
    ):
        """Takes the memory of the cache at once.

        Args:
            max_tokens: of prompts and responses in one step; None: 1,024 on a CPU, 8,192 on an accelerator or fewer
                where its memory is small. Fewer make those who decode wait less for those who come.
            blocks: of the cache, `block_size` positions each; None: what is left of the device's memory, and room for
                8 whole contexts where that is not known.
            max_rows: requests that decode at once; more wait.
            prefix_cache: whether what several requests begin with is read once.

        Raises:
            InputError: a size that is no whole number of at least 1, fewer max_tokens than rows and 16; too little
                memory.

        Examples:
            >>> engine = mj.Engine(model, max_tokens=64, blocks=128, max_rows=4)
        """
        with Arguments("Engine") as given:
            for name, value in (("max_rows", max_rows), ("block_size", block_size)):
                given.whole(name, value)
            given.whole("max_tokens", max_tokens, none=True)
            given.whole("blocks", blocks, none=True)
        if max_tokens is None or blocks is None:
            least = LEAST_BLOCKS if blocks is None else blocks
            how = model.graph, model.weights, model.config, max_rows, block_size, least, model.mesh
            max_tokens, fits = fitting(*how, max_tokens)
            most = -(-8 * model.config.max_position_embeddings // block_size)
            blocks = max(LEAST_BLOCKS, min(most, fits)) if blocks is None else blocks
        size = EngineSize(max_rows, max_tokens, blocks, block_size)
        self.model = model = dataclasses.replace(model)  # whose changes do not reach what was submitted here
        self.core = EngineCore(
            model.graph, model.weights, model.config, size, mesh=model.mesh, decode=model.decode_tokens,
            prefix_cache=prefix_cache, pool=model.pool,
        )  # fmt: skip

    def submit(
        self,
        prompt: Prompt | Sequence[int],
        router: RouterArgument = "gates if loaded",
        sampling: Sampling = GREEDY,
        max_new_tokens: int = 64,
        stop: str | Sequence[str] = (),
        logprobs: int | None = None,
        routing: bool = False,
    ) -> Pending:
        """Queues one prompt; the arguments are those of `Meteora.generate`.

        Args:
            prompt: a text, messages {"role", "content"}, or token ids.
            router: who chooses the adapters of this request.
            sampling: how tokens are drawn; greedy by default.
            max_new_tokens: of the response, at most.
            stop: texts that end a response, or one text.
            logprobs: log probabilities (nats) of so many of the likeliest tokens beside each token's own.
            routing: whether the routing is recorded; beginnings that are known are read again for it.

        Raises:
            InputError: as `Meteora.generate`; a prompt and response that the cache has no room for.

        Examples:
            >>> first = engine.submit("Name a fruit.", router=mj.Fixed("winowhy"), max_new_tokens=4)
            >>> second = engine.submit("Name a tool.", sampling=mj.Sampling(0.8, seed=1), max_new_tokens=4)
            >>> "".join(second.stream()), first.result().text
        """
        with Arguments("Engine") as given:
            given.whole("max_new_tokens", max_new_tokens)
            given.whole("logprobs", logprobs, most=self.model.config.vocab_size, none=True)
            given.stops((stop,) if isinstance(stop, str) else stop)
        read: Any = read_prompt(prompt, "prompt")
        one: Any = [router]
        routers, (found,) = self.model.look_up(one, 1, lambda: [self.model.request_texts(read)])
        (own,) = cast("list[RouterArgument]", routers)
        stop = (stop,) if isinstance(stop, str) else tuple(stop)
        request = self.model.request(
            encode(self.model.tokenizer, read, "prompt"), own, max_new_tokens, sampling, stop, logprobs, trace=routing
        )
        return Pending(self.model, self.core.submit(request), found)

    def step(self) -> bool:
        """One round for everyone; False: there was nothing to do."""
        return self.core.step()
