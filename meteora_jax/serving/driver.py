"""The thread that moves the engine on, and what reaches the event loop of it.

The loop never waits for the device, nor for the engine's lock: what it wants goes into a queue that the thread reads
between two steps, and what comes of a step is handed over in one call for all requests.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from meteora_jax.engine import EngineCore, FinishReason, Handle, Progress, Request
from meteora_jax.engine.adapter_versions import AdapterGone
from meteora_jax.routing import RouterArgument, weight_share
from meteora_jax.serving.errors import AdapterChanged, ApiError, EngineFailed

LOG = logging.getLogger(__name__)


SHOWN = 4  # of a token's adapters
# Seconds that tokens behind a response's first may wait for each other: an event a token for each of many clients takes
# the interpreter from the engine's thread for longer than a step of the device.
GATHER = 0.025
EACH = 0.0004  # the same a stream, if that is more: an event takes 0.08 ms to write, so a fifth of a core at most
# Streams that are told in one round of the loop of tokens nobody presses for: between two rounds it reads requests,
# which would wait until all of many clients are written to.
AT_ONCE = 8
# Numbers of adapters in a trace -> the names among them, and for each number its place in these.
Named = Callable[[np.ndarray], tuple[Sequence[str], np.ndarray]]


@dataclasses.dataclass(frozen=True)
class TokenShares:
    """Who drew a token: the largest shares of adapters in the pass that did, and the base's own."""

    largest: tuple[tuple[str, float], ...]
    base: float


@dataclasses.dataclass
class Piece:
    """What a response got since the last piece. shares: of each new token; None: not traced."""

    tokens: list[int]
    logprobs: list[Any]
    shares: list[TokenShares] | None
    finish_reason: FinishReason | None


class Stream:
    """One response, as the event loop sees it."""

    def __init__(self, request: Request, router: RouterArgument, driver: Driver, news: asyncio.Event):
        self.request, self.router, self._driver, self._news = request, router, driver, news
        self.progress: Progress | None = None  # the loop reads it once it is done
        self.error: ApiError | None = None
        self.done = False
        self._pieces: list[Piece] = []

    def pop(self) -> Piece | None:
        """What came since the last call; None: nothing.

        Raises:
            ApiError: the request failed.
        """
        if self.error is not None:
            raise self.error
        if not self._pieces:
            return None
        first, *rest = self._pieces
        self._pieces = []
        for piece in rest:
            first.tokens += piece.tokens
            first.logprobs += piece.logprobs
            if first.shares is not None and piece.shares is not None:
                first.shares += piece.shares
            first.finish_reason = piece.finish_reason
        return first

    def cancel(self) -> None:
        """Nobody waits for it any more: its row and blocks are others'. Does nothing once it is done."""
        if not self.done:
            self._driver.cancel(self)

    def take(self, piece: Piece | ApiError) -> None:
        """Adds what came; whoever waits for it is woken by `wake`."""
        if isinstance(piece, ApiError):
            self.error, self.done = piece, True
        else:
            self._pieces.append(piece)
            self.done = piece.finish_reason is not None

    def wake(self) -> None:
        """Lets whoever waits look at what came."""
        self._news.set()


class Watch:
    """A stream's handle, and how much of it was handed over. The thread's alone."""

    def __init__(self, stream: Stream, handle: Handle, named: Named):
        self.stream, self.handle, self._named = stream, handle, named
        self._tokens = self._logprobs = 0
        self._rows, self._pieces = 0, 0  # of the routing: positions and arrays that were read
        self._shares: list[TokenShares] = []

    @property
    def pressing(self) -> bool:
        """Whether somebody waits for what there is: for a first token, or for the end."""
        return not self._tokens or self.handle.done

    def news(self) -> Piece | ApiError | None:
        """What came since the last call; None: nothing."""
        progress = self.handle.progress
        if progress.failure is not None:
            LOG.error("a request's adapters cannot be read: %s", progress.failure)
            return ApiError(500, "the request's adapter cannot be read", code="adapter_failed")
        tokens = progress.tokens[self._tokens :]
        if not tokens and progress.finish_reason is None:
            return None
        logprobs = progress.logprobs[self._logprobs :]
        self._logprobs += len(logprobs)
        shares = self._new_shares(progress, len(tokens)) if progress.request.trace else None
        self._tokens += len(tokens)
        return Piece(list(tokens), list(logprobs), shares, progress.finish_reason)

    def _new_shares(self, progress: Progress, count: int) -> list[TokenShares]:
        """Of the positions that drew the next tokens: each is the one before the token's own."""
        wanted = len(progress.request.prompt) - 1 + self._tokens
        for indices, weights in progress.routing[self._pieces :]:
            skipped = max(0, min(len(indices), wanted + len(self._shares) - self._rows))
            if skipped < len(indices):
                names, numbers = self._named(indices[skipped:])
                self._shares += token_shares(names, weight_share(numbers, weights[skipped:], len(names)))
            self._rows += len(indices)
            self._pieces += 1
        found, self._shares = self._shares[:count], self._shares[count:]
        return found + [TokenShares((), 1.0)] * (count - len(found))  # the base alone is not traced


def token_shares(names: Sequence[str], shares: np.ndarray) -> list[TokenShares]:
    """`TokenShares` of rows [T, A]."""
    order = np.argsort(-shares, axis=1, kind="stable")[:, :SHOWN]
    largest_first: list[list[float]] = np.take_along_axis(shares, order, axis=1).tolist()
    numbers: list[list[int]] = order.tolist()
    found = []
    for places, values, total in zip(numbers, largest_first, shares.sum(axis=1).tolist(), strict=True):
        largest = tuple((names[i], value) for i, value in zip(places, values, strict=True) if value > 0)
        found.append(TokenShares(largest, max(0.0, 1.0 - total) if largest else 1.0))
    return found


class Driver:
    """Owns the engine: only its thread touches it.

    make: a new engine; called in the thread, at the start and once more after a failure. named: who an engine's traces
    speak of. gone: called in the loop when the engine failed a second time, and nothing can be served any more.
    """

    def __init__(self, make: Callable[[], EngineCore], named: Named, gone: Callable[[], None]):
        self._make, self._named, self._gone = make, named, gone
        self.core: EngineCore = make()  # None between two engines
        self.size = self.core.size
        self.restarts = 0
        self.dead = False
        self.live: set[Stream] = set()  # the loop's
        self.failures: list[BaseException] = []
        self.step_seconds = 0.0
        self._handed_over = 0.0  # when everything was, last
        self.skipped = 0  # prompt tokens that the prefix cache had, of finished requests
        self._late: deque[Stream] = deque()  # the loop's: streams that are woken next
        self._commands: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        self._watched: dict[Stream, Watch] = {}
        self.loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Begins to serve; what comes of it is handed to this loop."""
        self.loop = loop
        self._thread.start()

    def submit(self, request: Request, router: RouterArgument, news: asyncio.Event) -> Stream:
        """Queues a request, in the loop; `news` is set whenever something of it came. router: what it was bound from.

        Raises:
            ApiError: nothing is served any more.
        """
        if self.dead:
            raise EngineFailed
        stream = Stream(request, router, self, news)
        self.live.add(stream)
        self._commands.put(("submit", stream))
        return stream

    def cancel(self, stream: Stream) -> None:
        """Ends a request, in the loop."""
        self._commands.put(("cancel", stream))

    async def call(self, work: Callable[[], Any]) -> Any:
        """Lets the thread do something between two steps, and awaits what it returns."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()
        self._commands.put(("call", (work, future)))
        return await future

    def replace(self, make: Callable[[], EngineCore], named: Named) -> None:
        """Another engine in the place of this one, in the thread, while no request is under way."""
        assert not self._watched
        before = self._make
        self.core = None  # pyright: ignore[reportAttributeAccessIssue]  its memory goes before the next one's comes
        try:
            self.core = make()
        except Exception:
            self.core = before()
            raise
        self._make, self._named = make, named

    async def stop(self) -> None:
        """Ends the thread; what is under way is cancelled."""
        self._commands.put(("stop", None))
        if self._thread.ident is not None:
            await asyncio.get_running_loop().run_in_executor(None, self._thread.join)

    def _run(self) -> None:
        idle = False
        while self._obey(idle):
            began = time.perf_counter()
            try:
                idle = not self.core.step()
            except Exception as e:
                self._failed(e)
                idle = False
                if self.dead:
                    return
            self.step_seconds += time.perf_counter() - began
            self._hand_over()

    def _obey(self, wait: bool) -> bool:
        """Carries out what the loop asked for; wait: until it asks for something. False: it is over."""
        while True:
            try:
                what, about = self._commands.get(block=wait)
            except queue.Empty:
                return True
            wait = False
            if what == "stop":
                for watch in self._watched.values():
                    watch.handle.cancel()
                self._hand_over()
                return False
            if what == "submit":
                self._submit(about)
            elif what == "cancel":
                if (watch := self._watched.get(about)) is not None:
                    watch.handle.cancel()
            else:
                self._call(*about)

    def _submit(self, stream: Stream) -> None:
        try:
            handle = self.core.submit(stream.request)
        except AdapterGone:
            self._tell([(stream, AdapterChanged())])
            return
        except Exception as e:
            LOG.error("a request was refused by the engine: %s", e)
            self._tell([(stream, ApiError(400, str(e)))])
            return
        stream.progress = handle.progress
        self._watched[stream] = Watch(stream, handle, self._named)

    def _call(self, work: Callable[[], Any], future: asyncio.Future[Any]) -> None:
        try:
            result, error = work(), None
        except Exception as e:
            result, error = None, e
        assert self.loop is not None

        def settle() -> None:
            if future.cancelled():
                return
            if error is None:
                future.set_result(result)
            else:
                future.set_exception(error)

        self.loop.call_soon_threadsafe(settle)

    def _hand_over(self) -> None:
        pressing: list[tuple[Stream, Piece | ApiError]] = []
        others: list[tuple[Stream, Piece | ApiError]] = []
        now = time.perf_counter()
        if due := now - self._handed_over >= max(GATHER, EACH * len(self._watched)):
            self._handed_over = now
        for stream, watch in list(self._watched.items()):
            first = watch.pressing
            if (due or first) and (piece := watch.news()) is not None:
                (pressing if first else others).append((stream, piece))
                if isinstance(piece, ApiError) or piece.finish_reason is not None:
                    self.skipped += watch.handle.progress.skipped
                    del self._watched[stream]
        self._tell(pressing, others)

    def _failed(self, error: Exception) -> None:
        """Ends everything that was under way, and begins again with a new engine, once."""
        LOG.error("the engine's step failed", exc_info=error)
        self.failures.append(error)
        self.dead = self.restarts > 0
        self._tell([(stream, EngineFailed()) for stream in self._watched])
        self._watched.clear()
        if not self.dead:
            self.restarts = 1
            try:
                self.core = None  # pyright: ignore[reportAttributeAccessIssue]  its memory goes first
                self.core = self._make()
                LOG.warning("the engine was started again")
                return
            except Exception as e:
                LOG.error("the engine could not be started again", exc_info=e)
        self.dead = True
        waiting = []
        while True:
            try:
                what, about = self._commands.get(block=False)
            except queue.Empty:
                break
            if what == "submit":
                waiting.append((about, EngineFailed()))
            elif what == "call":
                self._call(_refuse, about[1])
        self._tell(waiting)
        assert self.loop is not None
        self.loop.call_soon_threadsafe(self._end)

    def _end(self) -> None:
        for stream in list(self.live):  # submitted while the thread ended
            stream.take(EngineFailed())
            stream.wake()
        self.live.clear()
        self._gone()

    def _tell(self, pressing: Sequence[tuple[Stream, Any]], others: Sequence[tuple[Stream, Any]] = ()) -> None:
        if (pressing or others) and self.loop is not None:
            self.loop.call_soon_threadsafe(self._deliver, pressing, others)

    def _deliver(self, pressing: Sequence[tuple[Stream, Any]], others: Sequence[tuple[Stream, Any]]) -> None:
        for stream, piece in (*pressing, *others):
            stream.take(piece)
            if stream.done:
                self.live.discard(stream)
        for stream, _ in pressing:
            stream.wake()
        if others:
            resting = not self._late
            self._late.extend(stream for stream, _ in others)
            if resting:
                self._wake()

    def _wake(self) -> None:
        """Wakes the next streams, and in the loop's next round those behind them."""
        assert self.loop is not None
        for _ in range(min(AT_ONCE, len(self._late))):
            self._late.popleft().wake()
        if self._late:
            self.loop.call_soon(self._wake)


def _refuse() -> None:
    raise EngineFailed
