"""The server as a Ray Serve deployment: the same routes, in as many replicas as Ray is asked for.

    serve run scripts/ray_serve/config.yaml                                # replicas and autoscaling as that file says
    serve run scripts.ray_serve.deploy:app base=runs/base bank=runs/bank replicas=2 gpus=1

Each replica has a model and an engine of its own; Ray's proxy spreads the requests, starts a replica anew whose engine
has failed for good, and adds and takes away replicas by the requests under way.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import tyro
from fastapi import FastAPI
from ray import serve
from ray.serve import Application

from meteora_jax.cli.serve import Serve, make_server
from meteora_jax.config import InputError

# Options of `meteora serve` that the process around Ray's replicas has in its stead.
RAYS_OWN = ("host", "port", "write_timeout", "grace")


@serve.deployment
@serve.ingress()
class Meteora:
    """One replica."""

    def __init__(self, command: Serve):
        self.server = make_server(command)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """What Ray sends requests to; its lifespan starts and ends the engine's thread."""
        from meteora_jax.serving.app import make_app

        return make_app(self.server)

    def check_health(self) -> None:
        """Ray asks from time to time, and replaces a replica that raises.

        Raises:
            RuntimeError: the engine has failed a second time.
        """
        if self.server.driver.dead:
            raise RuntimeError("the engine has failed")


def read_command(args: Mapping[str, Any]) -> Serve:
    """`meteora serve`'s options by their names, "max-rows" or "max_rows"; true is a flag, a list are several values.

    Raises:
        InputError: an option that is Ray's own here, or that replicas cannot share.
    """
    names = {str(name).replace("-", "_"): value for name, value in args.items()}
    if ours := [name for name in RAYS_OWN if name in names]:
        raise InputError(f"{ours[0]}: expected Ray's own setting in its place (README.md), found one of meteora serve")
    if names.get("allow_adapter_updates"):
        raise InputError("allow_adapter_updates: expected none, as an update reaches one replica alone; found it")
    words: list[str] = []
    for name, value in names.items():
        flag = f"--{name.replace('_', '-')}"
        if value is True or value == "true":
            words.append(flag)
        elif isinstance(value, list) and name == "warm_up":
            words += [flag, *map(str, value)]
        elif isinstance(value, list):
            words += [word for one in value for word in (flag, str(one))]
        elif value is not False and value not in ("false", None):
            words += [flag, str(value)]
    return tyro.cli(Serve, args=words, prog="serve run deploy:app")


def app(args: Mapping[str, Any]) -> Application:
    """What `serve run` and `serve deploy` build; a config file may say otherwise about all but the server's options.

    A replica is given as many requests as decode at once; others wait in Ray's queue.

    Args:
        args: the options of `meteora serve`; beside them replicas (1 unless given) and gpus (of each; none).
    """
    replicas, gpus = int(args.get("replicas", 1)), float(args.get("gpus", 0))
    command = read_command({name: value for name, value in args.items() if name not in ("replicas", "gpus")})
    replica: Any = Meteora  # a deployment, which its decorators do not tell type checkers
    deployment = replica.options(
        num_replicas=replicas, ray_actor_options={"num_gpus": gpus}, max_ongoing_requests=command.max_rows,
        max_queued_requests=command.max_waiting,
    )  # fmt: skip
    return deployment.bind(command)
