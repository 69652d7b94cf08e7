"""The devices of a command: its mesh, and its part in a run over several hosts."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from meteora_jax.config import InputError


@dataclass(frozen=True, kw_only=True)
class Devices:
    """Options of a command that runs on a mesh; the same command is given on every host."""

    data: int = -1
    """Mesh axis that splits batches; -1 takes the devices that the others leave."""
    fsdp: int = 1
    """Mesh axis that splits batches and weights."""
    tensor: int = 1
    """Mesh axis that splits the work of each projection."""
    distributed: bool = False
    """One process of several (TPU pod, Slurm, MPI, or the three options below)."""
    coordinator: str | None = None
    """HOST:PORT of process 0, with --distributed."""
    processes: int | None = None
    """How many processes, with --distributed."""
    process: int | None = None
    """Which of them this is, from 0, with --distributed."""


def make_devices_mesh(command: Devices) -> Any:
    """Joins the other processes if there are any; the mesh over all devices, None for a single one.

    Raises:
        InputError: the axes do not multiply to the devices, or the options of several processes lack --distributed.
    """
    import jax

    from meteora_jax.sharding import initialize_distributed, make_mesh

    if command.distributed:
        initialize_distributed(command.coordinator, command.processes, command.process)
    elif (command.coordinator, command.processes, command.process) != (None, None, None):
        raise InputError("coordinator, processes, process: expected --distributed beside them, found it missing")
    mesh = make_mesh(command.data, command.fsdp, command.tensor)
    return mesh if len(jax.devices()) > 1 else None


def quiet_libtpu() -> None:
    """Where there is no TPU, names one to libtpu if nobody has: it would else say on stderr that it found none,
    whatever the platform that JAX takes then. Its log levels do not reach these lines."""
    if not glob.glob("/dev/accel*") and not glob.glob("/dev/vfio/[0-9]*"):
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
        os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")


def is_first_process() -> bool:
    """Whether this process is the one that writes files and prints."""
    import jax

    return jax.process_index() == 0


def as_the_first_says(choices: Sequence[bool]) -> list[bool]:
    """Process 0's choices, in every process."""
    import jax

    if jax.process_count() == 1:
        return list(choices)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.broadcast_one_to_all(np.asarray(choices, bool))).tolist()
