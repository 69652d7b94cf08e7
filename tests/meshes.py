"""Meshes of the test process' own CPU devices. Who makes a mesh of all devices, or none, has the first one alone."""

import math
import os
from typing import Any

import jax
from jax.sharding import Mesh

COUNT = 8  # they share one pool of threads, and cost a process of one device nothing that was measured
every_device = jax.devices


def use() -> None:
    """Gives this process its devices; before its first computation."""
    jax.config.update("jax_num_cpu_devices", COUNT)

    def first(*backend: Any) -> list[jax.Device]:
        return every_device(*backend)[:1]

    jax.devices = jax.local_devices = first


def mesh_of(data: int, fsdp: int, tensor: int) -> Mesh:
    """A mesh of the first devices."""
    from meteora_jax.sharding import make_mesh  # here: conftest installs the import hook first

    return make_mesh(data, fsdp, tensor, devices=every_device()[: math.prod((data, fsdp, tensor))])


def environment(count: int) -> dict[str, str]:
    """That of a process with `count` CPU devices, which compiles as this one does."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}"
    return {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
