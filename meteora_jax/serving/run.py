"""A server from its folders to its end: load, warm up, listen, end at a signal."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import sys
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from types import FrameType
from typing import Any

import uvicorn
from starlette.types import Scope
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from meteora_jax.batching import Engine
from meteora_jax.config import InputError
from meteora_jax.engine import EngineCore, Sampling
from meteora_jax.engine.scheduler import Limits
from meteora_jax.routing.named import NAMED
from meteora_jax.serving.app import make_app
from meteora_jax.serving.models import Fleet, names, resolve
from meteora_jax.serving.server import Server

LOG = logging.getLogger(__name__)
SWITCH = 0.0005  # seconds
MAX_HEAD = 64 << 10  # bytes of a request's line and headers
Progress = Callable[[int, int, str], None]


def engine_maker(
    max_rows: int, max_tokens: int | None, blocks: int | None, prefix_cache: bool = True
) -> Callable[[Fleet], EngineCore]:
    """How `Server` makes its engines; the sizes are `Engine`'s."""

    def make(fleet: Fleet) -> EngineCore:
        return Engine(fleet.model, max_tokens, blocks, max_rows, prefix_cache=prefix_cache).core

    return make


def warm_up(server: Server, rows: Sequence[int], progress: Progress, page: bool = False) -> float:
    """Compiles what the first requests need: the base, an adapter and the routers that gates and index are loaded for,
    greedy and sampled, by up to so many requests as `rows` says, whenever each of them comes. Routers of the bank alone
    compile when they are first asked for. page: in place of these, what the page asks at first: greedy, with the
    routing of every token. Returns the seconds it took.

    Raises:
        InputError: numbers of requests that are none.
    """
    if strange := [n for n in rows if not 1 <= n <= server.driver.size.rows]:
        raise InputError(f"--warm-up: expected numbers from 1 to --max-rows, found {strange[0]}")
    began, fleet, core = time.perf_counter(), server.fleet, server.driver.core
    routers, kinds = [], set()
    for name, _ in names(fleet):
        if name in NAMED and name not in fleet.model.adapter_names:
            continue
        adapter = name in fleet.model.adapter_names
        if not (adapter and "adapter" in kinds):
            routers.append((name, resolve(fleet, name)))
            kinds.add("adapter" if adapter else name)
    ids = [0] * min(32, server.positions // 4)
    todo = [
        (count, *one, t) for count in sorted(set(rows)) for one in routers for t in ((0.0,) if page else (0.0, 1.0))
    ]
    for done, (count, name, router, temperature) in enumerate(todo, start=1):
        found, _ = fleet.model.look_up(router, 1, lambda: ["warm up"])
        own: Any = found[0] if isinstance(found, list) else found
        # a token behind the prompt, several steps in one dispatch, and single ones as before every end
        most = min(1 + Limits.steps + Limits.steps // 2, server.positions - len(ids))
        asked = fleet.model.request(ids, own, most, Sampling(temperature), trace=page)
        core.warm([asked] * count)
        progress(done, len(todo), f"{name}, {count} at once")
    return time.perf_counter() - began


class Listener(uvicorn.Server):
    """uvicorn, with signals that end the server well: SIGTERM and SIGINT let requests finish within the grace."""

    def __init__(self, config: uvicorn.Config, server: Server):
        super().__init__(config)
        self._served = server
        self.failed = False
        server.on_gone, server.abort = self._engine_gone, self._abort

    def _engine_gone(self) -> None:
        self.failed = self.should_exit = True

    def _abort(self, scope: Scope) -> None:
        """Drops the connection of a client that takes nothing any more: closing it would wait for that client."""
        for connection in list(self.server_state.connections):
            if getattr(connection, "client", None) == tuple(scope["client"] or ()):
                getattr(connection, "transport").abort()  # noqa: B009

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """uvicorn's own raises the signal again at the end, so that the status would not be 0."""
        try:
            before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGTERM, signal.SIGINT)}
        except ValueError:  # not the main thread
            before = {}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A first signal: no request is taken any more. A second one: none is waited for."""
        self.force_exit = self.should_exit
        self._served.draining = self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Waits for what is under way, as long as the grace lasts."""
        self._served.draining = True
        await super().shutdown(sockets)


def listen(host: str, port: int) -> socket.socket:
    """A bound socket.

    Raises:
        InputError: the address cannot be had.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as e:
        raise InputError(f"--host, --port: expected an address that is free, found {host}:{port} ({e})") from None


class Protocol(HttpToolsProtocol):
    """uvicorn's, with an end to what a request's head may have: its parser in C sets none."""

    _head = 0  # bytes read of a head that is not complete; -1: it is

    def on_message_begin(self) -> None:
        """As the parser calls it."""
        super().on_message_begin()
        self._head = max(0, self._head)

    def on_headers_complete(self) -> None:
        """As the parser calls it."""
        super().on_headers_complete()
        self._head = -1

    def data_received(self, data: bytes) -> None:
        """Closes the connection where a head has grown beyond MAX_HEAD."""
        super().data_received(data)
        if self._head >= 0 and (size := self._head + len(data)) <= MAX_HEAD:
            self._head = size
        elif self._head >= 0:
            self.transport.abort()


def listener(server: Server) -> Listener:
    """uvicorn around a server's app."""
    config = uvicorn.Config(
        make_app(server), access_log=False, log_config=None, server_header=False, lifespan="on",
        timeout_graceful_shutdown=max(1, round(server.settings.grace)), timeout_keep_alive=30,
        http=Protocol,
    )  # fmt: skip
    return Listener(config, server)


def run(server: Server, bound: socket.socket) -> bool:
    """Serves until a signal; False: the engine failed for good."""
    own = listener(server)
    _serve(own, bound)
    return not own.failed


def _serve(own: Listener, bound: socket.socket) -> None:
    """Until it is told to end. Meanwhile a thread gives the interpreter away sooner than by default: the engine's needs
    it several times a step, and would wait 5 ms for it each time while the event loop writes to many clients."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH)
    try:
        with asyncio.Runner(loop_factory=own.config.get_loop_factory()) as runner:
            runner.run(own.serve([bound]))
    finally:
        sys.setswitchinterval(before)


@contextlib.contextmanager
def in_thread(server: Server, host: str = "127.0.0.1") -> Iterator[str]:
    """Serves on a free port beside the caller's own work; gives the address."""
    import threading

    bound = listen(host, 0)
    own = listener(server)
    thread = threading.Thread(target=lambda: _serve(own, bound), name="http")
    thread.start()
    try:
        while not own.started and thread.is_alive():
            time.sleep(0.01)
        yield f"http://{host}:{bound.getsockname()[1]}"
    finally:
        own.should_exit = True
        thread.join()


def base_name(folder: Any, given: str | None) -> str:
    """What the base is called: as given, else as its folder."""
    return given or folder.resolve().name
