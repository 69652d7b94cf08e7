"""The devices of a command: its mesh, and its part in a run over several hosts."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import tyro

from meteora_jax.config import InputError

if TYPE_CHECKING:
    from jax.sharding import Mesh


@dataclass(frozen=True, kw_only=True)
class Devices:
    """Options of a command that runs on a mesh; the same command is given on every host."""

    mesh: tuple[int, int, int] = (-1, 1, 1)
    """Devices along the axes data (splits batches), fsdp (batches and weights) and tensor (the work of each
    projection); -1 takes those that the others leave."""
    distributed: Annotated[tuple[str, ...] | None, tyro.conf.arg(metavar="[HOST:PORT COUNT INDEX]")] = None
    """One process of several. A TPU pod, Slurm and MPI say which; elsewhere HOST:PORT of process 0, how many there are,
    and which this is, from 0."""


def make_devices_mesh(command: Devices) -> Mesh | None:
    """Joins the other processes if there are any; the mesh over all devices, None for a single one.

    Raises:
        InputError: the axes do not multiply to the devices, or --distributed is malformed.
    """
    import jax

    from meteora_jax.sharding import initialize_distributed, make_mesh

    if command.distributed:
        initialize_distributed(*_cluster(command.distributed))
    elif command.distributed is not None:
        initialize_distributed()
    mesh = make_mesh(*command.mesh)
    return mesh if len(jax.devices()) > 1 else None


def make_replica_mesh(command: Devices) -> tuple[Mesh | None, bool]:
    """`make_devices_mesh` for work of which processes may each do a share: this process' own part of the mesh along its
    data axis, and whether that is a part; the whole mesh where fsdp or tensor reach over several processes.

    Raises:
        InputError: as `make_devices_mesh`.
    """
    import jax

    from meteora_jax.sharding import make_mesh

    mesh, own = make_devices_mesh(command), jax.local_devices()
    if mesh is None or jax.process_count() == 1:
        return mesh, False
    each = mesh.shape["fsdp"] * mesh.shape["tensor"]
    if len(own) % each or len(own) * jax.process_count() != mesh.size:
        return mesh, False
    part = make_mesh(len(own) // each, mesh.shape["fsdp"], mesh.shape["tensor"], devices=own)
    return part if len(own) > 1 else None, True


def _cluster(words: Sequence[str]) -> tuple[str, int, int]:
    """The values of --distributed."""
    try:
        address, count, index = words
        return address, int(count), int(index)
    except ValueError as e:
        raise InputError(f"--distributed: expected HOST:PORT COUNT INDEX or nothing, found {' '.join(words)}") from e


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
