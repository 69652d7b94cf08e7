"""Users of a server, for `bench_serve.py`: a process of its own, so that it shares no interpreter with the server.

Reads one line of JSON (`Asked`), says "ready", begins at the next line, and prints what became of every request.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Asked:
    """host, port: of the server. users: for each, the bodies (of /v1/completions, with stream and include_usage) that
    it sends one after the other."""

    host: str
    port: int
    users: Sequence[Sequence[dict[str, Any]]]


@dataclasses.dataclass(frozen=True)
class Answered:
    """One request, on the machine's monotonic clock in seconds: when it was sent, when its first token came and its
    last, and how many tokens there were."""

    sent: float
    first: float
    last: float
    tokens: int


async def ask(asked: Asked, body: dict[str, Any]) -> Answered:
    """Sends one request and reads its events; the bare socket costs the least that a client can.

    Raises:
        RuntimeError: the server refused it, or its stream broke off.
    """
    content = json.dumps(body).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {asked.host}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(content)}\r\nConnection: close\r\n\r\n"
    )
    sent = time.perf_counter()
    reader, writer = await asyncio.open_connection(asked.host, asked.port)
    writer.write(head.encode() + content)
    status = await reader.readline()
    if b" 200 " not in status:
        raise RuntimeError(f"{status!r} {await reader.read()!r}"[:500])
    first = last = 0.0
    usage = b""
    async for line in reader:
        if not line.startswith(b"data: {"):
            continue
        if b'"choices":[]' in line:
            usage = line
            continue
        last = time.perf_counter()
        first = first or last
    writer.close()
    if not usage:
        raise RuntimeError("a stream ended before its usage came")
    return Answered(sent, first, last, json.loads(usage[6:])["usage"]["completion_tokens"])


async def play(asked: Asked) -> list[Answered]:
    """All users at once."""

    async def user(bodies: Sequence[dict[str, Any]]) -> list[Answered]:
        return [await ask(asked, body) for body in bodies]

    found = await asyncio.gather(*map(user, asked.users))
    return [one for own in found for one in own]


if __name__ == "__main__":
    given = Asked(**json.loads(sys.stdin.readline()))
    print("ready", flush=True)
    sys.stdin.readline()
    print(json.dumps([dataclasses.astuple(one) for one in asyncio.run(play(given))]), flush=True)
