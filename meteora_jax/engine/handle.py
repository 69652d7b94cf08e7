"""What who submitted a request holds of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from meteora_jax.engine.request import Progress
from meteora_jax.text import Decode, TextStream


class Serving(Protocol):
    """What a handle asks of its engine."""

    def advance(self, handle: Handle | None) -> None:
        """One round for the sake of a request."""
        ...

    def cancel(self, handle: Handle) -> None:
        """Ends a request."""
        ...


class Handle:
    """A request that was submitted: its tokens as they come, and its end."""

    def __init__(self, engine: Serving, progress: Progress, decode: Decode | None):
        self.engine, self.progress = engine, progress
        decode = progress.request.decode or decode
        self._stops = TextStream(decode, progress.request.stop) if progress.request.stop and decode else None

    @property
    def done(self) -> bool:
        """Whether nothing more will come."""
        return self.progress.finish_reason is not None

    def tokens(self) -> Iterator[list[int]]:
        """The response's new tokens, piece by piece, until its end."""
        seen = 0
        while True:
            done = self.done
            if len(self.progress.tokens) > seen:
                piece = self.progress.tokens[seen:]
                seen += len(piece)
                yield piece
            elif done:
                self.check()
                return
            else:
                self.engine.advance(self)

    def wait(self) -> Progress:
        """The finished request."""
        while not self.done:
            self.engine.advance(self)
        self.check()
        return self.progress

    def check(self) -> None:
        """Raises InputError: the request's adapters could not be read."""
        if self.progress.failure is not None:
            raise self.progress.failure

    def cancel(self) -> None:
        """Ends the request; what it has said stays."""
        self.engine.cancel(self)

    def _take(self, tokens: list[int]) -> bool:
        """Adds tokens, as far as no stop string ends the response in them; whether one did."""
        if self._stops is None:
            self.progress.tokens += tokens
            return False
        self._stops.push(tokens)
        self.progress.tokens = list(self._stops.tokens)
        return self._stops.stopped
