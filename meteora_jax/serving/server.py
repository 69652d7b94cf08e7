"""One server: what is served, by which engine, within which limits."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from meteora_jax.engine import EngineCore
from meteora_jax.serving.answers import Answer
from meteora_jax.serving.asking import Work
from meteora_jax.serving.driver import Driver, Stream
from meteora_jax.serving.errors import ApiError, dump
from meteora_jax.serving.guides import Grammars
from meteora_jax.serving.metrics import Metrics
from meteora_jax.serving.models import Fleet, is_model, named
from meteora_jax.serving.schemas import Asked
from meteora_jax.serving.settings import Settings
from meteora_jax.serving.spelling import Spelling

LOG = logging.getLogger(__name__)
T = TypeVar("T")
Make = Callable[[Fleet], EngineCore]


class Gone(ApiError):
    """The client left; nobody reads this."""

    def __init__(self) -> None:
        super().__init__(499, "the client closed the connection")


class Server:
    """The state behind the routes. make: an engine for a fleet."""

    def __init__(self, fleet: Fleet, make: Make, settings: Settings):
        self.fleet, self.make, self.settings = fleet, make, settings
        self.created, self.draining = int(time.time()), False
        self.metrics = Metrics()
        config = fleet.model.config
        self.grammars = Grammars(fleet.model.tokenizer, config.vocab_size, config.eos_token_ids)
        self.spelling = Spelling(fleet.model.tokenizer)
        self.driver = Driver(lambda: make(self.fleet), named(fleet), self._engine_gone)
        self.metrics.watch(self)
        self.on_gone: Callable[[], None] = _nothing  # told when nothing can be served any more
        self.abort: Callable[[Scope], None] = _ignore  # drops a client's connection, told by whoever listens
        self._reserved = 0  # responses whose request is being read
        self._mean_seconds = 1.0
        # one thread each: tokenizing and retrieving; scoring prompts on the device
        self._reader = ThreadPoolExecutor(1, "reader")
        self._scorer = ThreadPoolExecutor(1, "scorer")
        self.changes = asyncio.Lock()  # held while adapters change
        self._open = asyncio.Event()
        self._open.set()

    @property
    def positions(self) -> int:
        """How many positions one request can have."""
        return self.driver.size.blocks * self.driver.size.block_size

    async def start(self) -> None:
        """Begins to serve."""
        self.driver.start(asyncio.get_running_loop())

    async def stop(self) -> None:
        """Ends the engine; what is under way is cancelled."""
        await self.driver.stop()
        self._reader.shutdown(cancel_futures=True)
        self._scorer.shutdown(cancel_futures=True)

    def _engine_gone(self) -> None:
        self.on_gone()

    async def read(self, work: Callable[[], T]) -> T:
        """Runs what tokenizes or retrieves, away from the loop."""
        return await asyncio.get_running_loop().run_in_executor(self._reader, work)

    async def score(self, work: Callable[[], T]) -> T:
        """Runs what scores prompts, away from the loop and the engine's thread."""
        return await asyncio.get_running_loop().run_in_executor(self._scorer, work)

    @contextlib.asynccontextmanager
    async def closed(self) -> AsyncIterator[None]:
        """Within, no request is under way and none comes; those that arrive wait.

        Raises:
            ApiError: the requests under way did not end in time.
        """
        self._open.clear()
        try:
            deadline = time.monotonic() + self.settings.timeout
            while self.driver.live or self._reserved:
                if time.monotonic() > deadline:
                    raise ApiError(503, "requests are still under way; try again later")
                await asyncio.sleep(0.02)
            yield
        finally:
            self._open.set()

    @contextlib.asynccontextmanager
    async def admitted(self, count: int) -> AsyncIterator[None]:
        """Room for so many responses in the queue, kept until the block ends.

        Raises:
            ApiError: 429 where there is none, 400 where there never is, 503 while the server ends or after its engine
                failed for good.
        """
        if self.draining or self.driver.dead:
            raise ApiError(503, "the server is shutting down", headers={"retry-after": "5", "connection": "close"})
        await self._open.wait()
        ahead, rows = len(self.driver.live) + self._reserved, self.driver.size.rows
        most = rows + self.settings.max_waiting
        if count > most:  # there will never be room: nobody should wait for it
            raise ApiError(400, f"expected at most {most} responses of one request (n of each prompt), found {count}")
        if ahead + count > most:
            wait = max(1, round(self._mean_seconds * max(0, ahead - rows) / rows))
            said = f"expected at most {most} responses under way, found {ahead} and {count} of this request"
            raise ApiError(429, said, code="queue_full", headers={"retry-after": str(min(wait, 60))})
        self._reserved += count
        try:
            yield
        finally:
            self._reserved -= count

    async def work(self, count: int, make: Callable[[], Work]) -> tuple[Work, list[Stream], asyncio.Event]:
        """A client's request, read and given to the engine."""
        async with self.admitted(count):
            work = await self.read(make)
            news = asyncio.Event()
            submitted = [
                self.driver.submit(request, work.routers[work.owner(i)], news)
                for i, request in enumerate(work.requests)
            ]
            return work, submitted, news

    def answers(self, work: Work, streams: list[Stream], began: float) -> list[Answer]:
        """The responses to come."""
        return [
            Answer(work.model, s, work.found[work.owner(i)], self.metrics, began, self.spelling)
            for i, s in enumerate(streams)
        ]

    def note(self, route: str, body: Asked, status: int, began: float, answers: list[Answer], prompts: Any) -> None:
        """Counts a request, and writes its line into the log."""
        seconds = time.perf_counter() - began
        known = status == 200 or is_model(self.fleet, body.model)  # names that nobody has are no labels
        self.metrics.requests.labels(route, body.model if known else "", str(status)).inc()
        if status == 200:
            self.metrics.seconds.observe(seconds)
            self._mean_seconds += 0.1 * (seconds - self._mean_seconds)
        asked = f" asked {prompts!r:.2000}" if self.settings.log_prompts else ""
        written = sum(len(answer.tokens) for answer in answers)
        LOG.info("%s model=%r status=%d tokens=%d seconds=%.3f%s", route, body.model, status, written, seconds, asked)


def _nothing() -> None:
    """Nobody has to be told."""


def _ignore(scope: Scope) -> None:
    """Nobody holds the connection."""


def reply_id(kind: str) -> str:
    """An id for a reply, as chatcmpl-..."""
    return f"{kind}-{uuid.uuid4().hex}"


def usage_of(work: Work, answers: list[Answer]) -> dict[str, Any]:
    """`replies.Usage`."""
    read, written = sum(map(len, work.prompts)), sum(len(answer.tokens) for answer in answers)
    cached: dict[int, int] = {}  # of a prompt, which counts once however many responses it has
    for i, answer in enumerate(answers):
        if answer.stream.progress is not None:
            at = work.owner(i)
            found = min(answer.stream.progress.skipped, len(work.prompts[at]))  # after a preemption a response's too
            cached[at] = min(cached.get(at, found), found)
    details = {"cached_tokens": sum(cached.values())}
    return {
        "prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written,
        "prompt_tokens_details": details,
    }  # fmt: skip


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """What `work` returns; it is cancelled when the client leaves before.

    Raises:
        Gone: the client left.
    """
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise Gone
    finally:
        for one in (task, gone):
            one.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events. A client that leaves, or does not take what is sent in time, ends them."""

    media_type = "text/event-stream"

    def __init__(self, server: Server, events: AsyncIterator[bytes]):
        super().__init__(headers={"cache-control": "no-store", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._server, self._events = server, events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the events until their end."""
        try:
            await unless_gone(receive, self._send(send))
        except Gone:
            pass
        except (TimeoutError, OSError):
            self._server.abort(scope)

    async def _send(self, send: Send) -> None:
        start = {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
        async with (
            contextlib.aclosing(self._events) as events,  # pyright: ignore[reportArgumentType]
            patience(self._server.settings.write_timeout) as waiting,
        ):
            with waiting:
                await send(start)
            async for event in events:
                with waiting:
                    await send({"type": "http.response.body", "body": event, "more_body": True})
            with waiting:
                await send({"type": "http.response.body", "body": b"", "more_body": False})


class Waiting:
    """What a block waits for, for the time that it is entered."""

    def __init__(self) -> None:
        self.since: float | None = None
        self._now = asyncio.get_running_loop().time

    def __enter__(self) -> None:
        self.since = self._now()

    def __exit__(self, *error: object) -> None:
        self.since = None


@contextlib.asynccontextmanager
async def patience(seconds: float) -> AsyncGenerator[Waiting]:
    """Gives what to enter while one waits; TimeoutError ends a wait of so many seconds, or of a quarter more.

    One timer for all of them: a timeout for each token of a stream costs as much as sending it.
    """
    loop, waiting = asyncio.get_running_loop(), Waiting()

    def look() -> None:
        nonlocal timer
        if waiting.since is not None and loop.time() - waiting.since >= seconds:
            limit.reschedule(loop.time())
        else:
            timer = loop.call_later(seconds / 4, look)

    async with asyncio.timeout(None) as limit:
        timer = loop.call_later(seconds / 4, look)
        try:
            yield waiting
        finally:
            timer.cancel()


def event(value: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + dump(value) + b"\n\n"


DONE = b"data: [DONE]\n\n"


async def reply(request: HttpRequest, work: Coroutine[Any, Any, Response]) -> Response:
    """The response that `work` makes, unless the client leaves before."""
    return await unless_gone(request.receive, work)
