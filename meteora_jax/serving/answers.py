"""From pieces of the engine's responses to texts, log probabilities and who acted."""

from __future__ import annotations

import asyncio
import collections
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import numpy as np

from meteora_jax.api import Meteora
from meteora_jax.routing import RoutingTrace
from meteora_jax.routing.retrieval import Found
from meteora_jax.serving.driver import Piece, Stream, TokenShares
from meteora_jax.serving.errors import ApiError
from meteora_jax.serving.guides import GrammarGuide
from meteora_jax.serving.metrics import Metrics
from meteora_jax.serving.spelling import Place, Spelling, Spelt
from meteora_jax.text import TextStream

FINISH = {"end": "stop", "stop": "stop", "length": "length"}
Likely = tuple[float, Sequence[tuple[int, float]]]  # a token's log probability, and the likeliest tokens' with theirs


async def pieces(
    streams: Sequence[Stream], news: asyncio.Event, deadline: float
) -> AsyncGenerator[tuple[int, Piece], None]:
    """(which stream, what came of it) until all are done; whoever stops reading cancels what is left.

    Raises:
        ApiError: a request failed, or the deadline (of the loop's clock) passed.
    """
    left, late = set(range(len(streams))), False

    def expire() -> None:
        nonlocal late
        late = True
        news.set()

    timer = asyncio.get_running_loop().call_at(deadline, expire)  # one for all waits: they are many
    try:
        while left:
            news.clear()
            for i in sorted(left):
                if (piece := streams[i].pop()) is not None:
                    if piece.finish_reason is not None:
                        left.discard(i)
                    yield i, piece
            if left and late:
                raise ApiError(504, "the request took longer than the server allows", code="timeout")
            if left:
                await news.wait()
    finally:
        timer.cancel()
        for stream in streams:
            stream.cancel()


def chat_logprobs(place: Place, tokens: Sequence[int], likely: Sequence[Likely], top: int) -> dict[str, Any]:
    """OpenAI's `logprobs` of a chat choice. place: of the first token, then of what follows the last."""

    def entry(spelt: Spelt, logprob: float) -> dict[str, Any]:
        return {"token": spelt.shown, "logprob": logprob, "bytes": list(spelt.raw)}

    content = []
    for token, (own, best) in zip(tokens, likely, strict=False):
        begins, (spelt, _) = place.begins, place.take(token)
        others = [entry(place.spelling.of(other, begins), logprob) for other, logprob in best[:top]]
        content.append({**entry(spelt, own), "top_logprobs": others})
    return {"content": content, "refusal": None}


def text_logprobs(place: Place, tokens: Sequence[int], likely: Sequence[Likely | None], top: int) -> dict[str, Any]:
    """OpenAI's `logprobs` of a text choice. place: as `chat_logprobs`. A prompt's first token has none."""
    found: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for token, said in zip(tokens, likely, strict=False):
        begins, (spelt, offset) = place.begins, place.take(token)
        found["tokens"].append(spelt.shown)
        found["text_offset"].append(offset)
        found["token_logprobs"].append(None if said is None else said[0])
        if said is None:
            found["top_logprobs"].append(None)
            continue
        best: dict[str, float] = {}
        for other, logprob in said[1][:top]:
            best.setdefault(place.spelling.of(other, begins).shown, logprob)
        best.setdefault(spelt.shown, said[0])
        found["top_logprobs"].append(best)
    return found


class Answer:
    """One response as it comes: its text, log probabilities, and who wrote it."""

    def __init__(
        self, model: Meteora, stream: Stream, found: Found, metrics: Metrics, began: float, spelling: Spelling
    ):
        self.model, self.stream, self.found = model, stream, found
        self.begins = stream.request.decode is None  # whether its text continues no prompt's
        self.place = Place(spelling, begins=self.begins)  # of the next token that log probabilities are told of
        self.text = TextStream(stream.request.decode or model.decode_tokens, stream.request.stop)
        self.tokens: list[int] = []
        self.logprobs: list[Likely] = []
        self.finish_reason: str | None = None
        self.led: collections.Counter[str | None] = collections.Counter()
        self.routing: list[dict[str, Any]] = []
        self._metrics, self._last = metrics, began

    def take(self, piece: Piece) -> str:
        """Adds a piece; the text that became certain by it.

        Raises:
            ApiError: the response was ended by the server, or could not follow its grammar.
        """
        now = time.perf_counter()
        if piece.tokens:
            if not self.tokens:
                self._metrics.first.observe(now - self._last)
            else:
                self._metrics.between.observe((now - self._last) / len(piece.tokens))
            self._last = now
        self.tokens += piece.tokens
        self.logprobs += piece.logprobs
        self.routing = []
        if piece.shares is not None:
            self.routing = [self._led(*one) for one in zip(piece.tokens, piece.shares, strict=True)]
        text = self.text.push(piece.tokens) if piece.tokens else ""
        if piece.finish_reason is None:
            return text
        self._metrics.finished.labels(piece.finish_reason).inc()
        guide = self.stream.request.guide
        if isinstance(guide, GrammarGuide) and guide.failure:
            raise ApiError(500, "the response could not follow its response_format", code="grammar_failed")
        if piece.finish_reason == "cancelled":
            raise ApiError(503, "the server ended this request", code="cancelled")
        self.finish_reason = FINISH[piece.finish_reason]
        return text + self.text.finish()

    def _led(self, token: int, shares: TokenShares) -> dict[str, Any]:
        """`replies.TokenRouting` of one token."""
        leader = shares.largest[0][0] if shares.largest and shares.largest[0][1] >= shares.base else None
        self.led[leader] += 1
        self._metrics.led.labels(leader or "").inc()
        rounded = ((name, round(share, 4)) for name, share in shares.largest)
        weights = [[name, share] for name, share in rounded if share]
        return {"text": self.model.tokenizer.decode([token]), "adapter": leader, "weights": weights}

    def meteora(self, tokens: list[dict[str, Any]] | None, full: bool) -> dict[str, Any]:
        """`replies.Meteora`: of a chunk, or with the end of the response of all of it."""
        found: dict[str, Any] = {} if tokens is None else {"tokens": tokens}
        if self.finish_reason is not None:
            total = max(1, sum(self.led.values()))
            found["led"] = [{"adapter": name, "share": count / total} for name, count in self.led.most_common()]
            found["retrieved"] = [{"adapter": name, "similarity": like} for name, like in self.found]
            if full and self.stream.progress is not None:
                trace = self.model.completion(self.stream.progress, self.text.text, self.found).routing
                found["trace"] = None if trace is None else trace_json(trace)
        return found


def trace_json(trace: RoutingTrace) -> dict[str, Any]:
    """`replies.Meteora.trace`."""
    return {
        "tokens": list(trace.tokens), "prompt_length": trace.prompt_length, "adapters": list(trace.adapter_names),
        "projections": list(trace.projections), "indices": trace.indices.tolist(),
        "weights": np.round(trace.weights.astype(np.float64), 5).tolist(),
    }  # fmt: skip
