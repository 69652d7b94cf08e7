"""`meteora serve`: an OpenAI-compatible server."""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from meteora_jax.cli.report import progress_bar, status
from meteora_jax.config import InputError


@dataclass(frozen=True)
class Serve:
    """Serve OpenAI's API: the base, its adapters, and routers that choose among them, each under its name.

    Models: the base's name, each adapter's, and as far as loaded gates, retrieve, retrieve:K, gates-within:K.
    SIGTERM ends the server once what is under way is done. docs/serve.md has the details.
    """

    base: Path
    """BASE folder."""
    bank: Path | None = None
    """BANK folder."""
    gates: Path | None = None
    """GATES folder."""
    index: Path | None = None
    """INDEX folder: the request's text finds its adapters."""
    name: str | None = None
    """What the base is called as a model; by default as its folder."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 is every one."""
    port: int = 8000
    """0: any free one."""
    api_key_file: Path | None = None
    """SHA-256 digests of the keys that clients must have, a line each, as sha256sum prints them."""
    allow_origin: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A web page's origin that may call the server from a browser; may be given several times."""
    max_rows: int = 64
    """Responses that decode at once."""
    max_tokens: int | None = None
    """Of prompts and responses in one step; by default 1,024 on a CPU, 8,192 on an accelerator."""
    blocks: int | None = None
    """Of the cache, 16 positions each; by default what the device's memory holds."""
    max_waiting: int = 1024
    """Responses that may wait beyond those that decode; more are refused with status 429."""
    max_body: int = 4 << 20
    """Bytes of a request."""
    timeout: float = 600.0
    """Seconds that a request may take."""
    read_timeout: float = 30.0
    """Seconds that its body may take to come."""
    write_timeout: float = 30.0
    """Seconds that a client may take to accept a piece of its answer."""
    grace: float = 30.0
    """Seconds that requests may go on after SIGTERM."""
    warm_up: Annotated[tuple[int, ...], tyro.conf.arg(metavar="[N ...]")] = (1,)
    """Numbers of requests at once whose programs are compiled before the server listens; none: compiled when needed."""
    warm_page: tyro.conf.Suppress[bool] = False
    """The demo's: compile what the page asks first, in place of what other clients do; see `serving.run.warm_up`."""
    adapter_slots: int | None = None
    """The bank stays on disk, and so many of its adapters are on the device at a time; others come as requests name
    them. Without, all are on the device, and an update makes another engine."""
    adapter_rank: int | None = None
    """Of the slots, where adapters are to come whose rank is beyond the bank's."""
    allow_adapter_updates: bool = False
    """Serve /v1/load_lora_adapter and /v1/unload_lora_adapter."""
    adapter_root: Path | None = None
    """Folder below which adapters may be loaded from."""
    log_prompts: bool = False
    """Write what is asked into the log."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Of weights and activations: bfloat16 on an accelerator, float32 on a CPU unless given."""


def load_fleet(command: Serve) -> Any:
    """The model and index of the command's folders."""
    from meteora_jax.loading import load
    from meteora_jax.retriever.index import Index
    from meteora_jax.retriever.ranking import read_ranking
    from meteora_jax.serving.models import Fleet
    from meteora_jax.serving.run import base_name

    with status.status("loading"):
        model = load(
            command.base, command.bank, command.gates, dtype=command.dtype, adapter_slots=command.adapter_slots,
            adapter_rank=command.adapter_rank,
        )  # fmt: skip
        index = None if command.index is None else Index.load(command.index)
        if index is not None:
            index.query(["warm up"], 1)  # what it has to learn, it learns now
        ranking = None if command.index is None else read_ranking(command.index)
    return Fleet(model, index, base_name(command.base, command.name), ranking).checked()


def make_server(command: Serve) -> Any:
    """The `Server` of the command's folders and limits, warm if it is to be, which nobody has reached yet."""
    try:
        from meteora_jax.serving import run
        from meteora_jax.serving.limits import read_keys
        from meteora_jax.serving.server import Server
        from meteora_jax.serving.settings import Settings
    except ModuleNotFoundError as e:
        raise InputError(f"serve: needs {e.name}, found none: pip install 'meteora-jax[serve]'") from None
    keys = () if command.api_key_file is None else read_keys(command.api_key_file)
    if command.adapter_root is not None and not command.adapter_root.is_dir():
        raise InputError(f"--adapter-root: expected a folder, found {command.adapter_root}")
    settings = Settings(
        keys, command.max_body, command.max_waiting, command.timeout, command.read_timeout, command.write_timeout,
        command.grace, command.allow_origin, command.log_prompts, command.adapter_root, command.allow_adapter_updates,
    )  # fmt: skip
    server = Server(
        load_fleet(command), run.engine_maker(command.max_rows, command.max_tokens, command.blocks), settings
    )
    if command.warm_up:
        with progress_bar("warm-up") as progress:
            took = run.warm_up(server, command.warm_up, progress, command.warm_page)
        status.print(f"warm after {took:.1f} s", highlight=False)
    return server


def serve(command: Serve) -> None:
    """Runs `meteora serve`."""
    try:
        from meteora_jax.serving import run
        from meteora_jax.serving.models import names
    except ModuleNotFoundError as e:
        raise InputError(f"serve: needs {e.name}, found none: pip install 'meteora-jax[serve]'") from None
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    logging.getLogger("meteora_jax").setLevel(logging.INFO)
    bound = run.listen(command.host, command.port)  # a port that is taken is known before anything is loaded
    try:
        server = make_server(command)
        host, port = bound.getsockname()[:2]
        listed = ", ".join(name for name, _ in names(server.fleet))
        status.print(f"serving http://{host}:{port} (models: {listed})", highlight=False, soft_wrap=True)
        served = run.run(server, bound)
    finally:
        bound.close()
    if not served:
        raise InputError("serve: the engine failed a second time; the log above says how")
