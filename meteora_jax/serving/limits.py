"""What stands before every route: API keys, the size of bodies, and how long they may take to come."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import os
import re
from pathlib import Path

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from meteora_jax.config import InputError
from meteora_jax.serving.errors import ApiError
from meteora_jax.serving.settings import Settings

GUARDED = ("/v1/", "/tokenize", "/detokenize", "/tokenizer_info")  # probes, scrapers and the page need no key


def read_keys(path: str | os.PathLike[str]) -> tuple[bytes, ...]:
    """The digests of a key file: a line a key, its SHA-256 in hexadecimal as `sha256sum` prints it, and a remark.

    Raises:
        InputError: a line that is none (all of them), or no key at all.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise InputError(f"{path}: expected a file of keys' digests, found none that can be read ({e})") from None
    keys, problems = [], []
    for number, line in enumerate(lines, start=1):
        word = line.split("#")[0].split()[:1]
        if not word:
            continue
        if re.fullmatch("[0-9a-fA-F]{64}", word[0]):
            keys.append(bytes.fromhex(word[0]))
        else:  # the line may be the key itself: it is not repeated
            problems.append(f"{path}:{number}: expected a SHA-256 digest of 64 hexadecimal digits, found another word")
    if problems or not keys:
        raise InputError(problems or [f"{path}: expected at least one key's digest, found none"])
    return tuple(keys)


def knows(keys: tuple[bytes, ...], authorization: bytes) -> bool:
    """Whether a header names one of the keys; every digest is compared, each in constant time."""
    scheme, _, key = authorization.partition(b" ")
    digest = hashlib.sha256(key.strip()).digest()
    found = False
    for known in keys:
        found |= hmac.compare_digest(known, digest)
    return found and scheme.lower() == b"bearer"


class Gatekeeper:
    """ASGI: refuses requests without a key, with too large a body, or whose body does not come."""

    def __init__(self, app: ASGIApp, settings: Settings):
        self.app, self.settings = app, settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            self._check(scope)
        except ApiError as e:
            await e.response()(scope, receive, send)
            return
        size, whole = 0, False

        async def limited() -> Message:
            nonlocal size, whole
            if whole:
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), self.settings.read_timeout)
            except TimeoutError:
                raise HTTPException(408, "the request's body did not come in time", {"connection": "close"}) from None
            if message["type"] == "http.request":
                size += len(message.get("body", b""))
                whole = not message.get("more_body", False)
                if size > self.settings.max_body:
                    raise HTTPException(413, self._too_large(), {"connection": "close"})
            return message

        await self.app(scope, limited, send)

    def _check(self, scope: Scope) -> None:
        headers = dict(scope["headers"])
        keys = self.settings.keys if scope["path"].startswith(GUARDED) else ()
        if keys and not knows(keys, headers.get(b"authorization", b"")):
            said = {"www-authenticate": "Bearer"}
            raise ApiError(401, "expected a valid API key (Authorization: Bearer KEY)", headers=said)
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length[:20]) > self.settings.max_body:
            raise ApiError(413, self._too_large(), headers={"connection": "close"})

    def _too_large(self) -> str:
        return f"expected a body of at most {self.settings.max_body} bytes, found more"
