"""What `generate` and `stream` give."""

from __future__ import annotations

import dataclasses

from meteora_jax.engine.request import FinishReason
from meteora_jax.routing import RoutingTrace


@dataclasses.dataclass(frozen=True, repr=False)
class Completion:
    """One response.

    token_ids exclude the end token; `text` ends before a stop string, whose tokens token_ids still hold.
    routing covers prompt and response; None where no router acted, or with `routing=False`. logprobs: of each token its
    own log probability in nats and the likeliest tokens' (token id, theirs); empty unless asked for. prompt_length: in
    tokens. finish_reason: "end" (the end token), "stop" (a stop text), "length" or "cancelled".
    """

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    prompt_length: int
    routing: RoutingTrace | None
    logprobs: tuple[tuple[float, tuple[tuple[int, float], ...]], ...] = ()

    def __repr__(self) -> str:
        routed = "" if self.routing is None else ", routed"
        shown = self.text if len(self.text) <= 60 else f"{self.text[:59]}…"
        tokens = f"{self.prompt_length} + {len(self.token_ids)} tokens"
        return f"Completion({shown!r}, {tokens}, finish_reason={self.finish_reason!r}{routed})"


@dataclasses.dataclass(frozen=True)
class Delta:
    """A piece of streamed text: `text` is to be appended to response `index`."""

    index: int
    text: str
