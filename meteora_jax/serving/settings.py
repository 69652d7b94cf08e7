"""How a server is run."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from meteora_jax.arguments import Arguments


@dataclasses.dataclass(frozen=True)
class Settings:
    """Limits and habits of one server. Times are in seconds, sizes in bytes.

    keys: SHA-256 digests of the API keys; empty: nobody is asked for one. max_waiting: requests that may wait beyond
    the rows that decode. timeout: of a whole request. read_timeout: until a body has come; write_timeout: until a
    client takes what is sent to it. grace: how long requests may go on after SIGTERM. log_prompts: whether the log
    shows what was asked. origins: of web pages that may call from a browser.
    """

    keys: tuple[bytes, ...] = ()
    max_body: int = 4 << 20
    max_waiting: int = 1024
    timeout: float = 600.0
    read_timeout: float = 30.0
    write_timeout: float = 30.0
    grace: float = 30.0
    origins: tuple[str, ...] = ()
    log_prompts: bool = False
    adapter_root: Path | None = None
    adapter_updates: bool = False

    def __post_init__(self):
        with Arguments("serve") as given:
            given.whole("max_body", self.max_body)
            given.whole("max_waiting", self.max_waiting, least=0)
            for name in ("timeout", "read_timeout", "write_timeout"):
                given.number(name, getattr(self, name), "a positive number of seconds", lambda t: t > 0)
            given.number("grace", self.grace, "0 or more seconds", lambda t: t >= 0)
            if self.adapter_updates and self.adapter_root is None:
                given.add("allow-adapter-updates: expected --adapter-root beside it, found none")
