"""Devices that are not there, for a compiler to make programs for: TPU slices by libtpu, GPUs of one host by XLA's CUDA
compiler."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
from typing import Any

from meteora_jax.config import InputError

GIB = 1 << 30
# Memory of one device by the beginning of its `device_kind` (the makers' data sheets; a TPU7x chip is two devices; of a
# GPU what its driver leaves).
MEMORY = {
    "NVIDIA H200": 139, "NVIDIA H100": 79, "NVIDIA A100": 79, "TPU7x": 96, "TPU v6 lite": 32, "TPU v5 lite": 16,
    "TPU v5": 95, "TPU v4": 32,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Gpu:
    """What XLA's compiler asks of a GPU. bandwidth: bytes a second; cache: bytes; clock: GHz; shared: bytes of shared
    memory of a multiprocessor, and the most that a block of threads may have."""

    kind: str
    capability: tuple[int, int]
    cores: int
    bandwidth: int
    cache: int
    clock: float
    shared: tuple[int, int]

    def target(self) -> str:
        """XLA's `GpuTargetConfigProto` as text."""
        major, minor = self.capability
        memory = next(n for kind, n in MEMORY.items() if self.kind.startswith(kind)) * GIB
        return f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: {self.shared[0]} shared_memory_per_block_optin: {self.shared[1]}
  threads_per_core_limit: 2048 core_count: {self.cores} fpus_per_core: {128 if major >= 9 else 64}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {self.bandwidth} l2_cache_size: {self.cache} clock_rate_ghz: {self.clock}
  device_memory_size: {memory} cuda_compute_capability {{ major: {major} minor: {minor} }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 patch: 0 }} device_description_str: "{self.kind}"
"""


_H100 = Gpu("NVIDIA H100 80GB HBM3", (9, 0), 132, 3_350_000_000_000, 52428800, 1.98, (233472, 232448))
GPUS = {  # the makers' data sheets and CUDA's device properties
    "a100": Gpu("NVIDIA A100-SXM4-80GB", (8, 0), 108, 2_039_000_000_000, 41943040, 1.41, (167936, 166912)),
    "h100": _H100,
    "h200": dataclasses.replace(_H100, kind="NVIDIA H200", bandwidth=4_800_000_000_000),
}


def topology_devices(topology: str) -> list[Any]:
    """Devices of a TPU topology such as v5p:4x4x4, described by libtpu, or so many GPUs of one host: h100:2.

    Raises:
        InputError: what describes it is not installed, or knows no such topology.
    """
    name, _, count = topology.partition(":")
    if name in GPUS:
        return _gpus(topology, GPUS[name], count)
    if importlib.util.find_spec("libtpu") is None and "TPU_LIBRARY_PATH" not in os.environ:
        raise InputError("topology: expected libtpu to describe it, found none: pip install 'meteora-jax[tpu]'")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no TPU to ask about itself,
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # and none to lock against another process
    from jax.experimental import topologies

    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)
    except Exception as e:  # libtpu's own errors share no class
        reason = " ".join(str(e).split())[:200]
        raise InputError(f"topology: expected one that libtpu describes, found {topology!r} ({reason})") from None


def has_cuda_compiler() -> bool:
    """Whether XLA's compiler for NVIDIA GPUs is installed; it needs none of them."""
    if importlib.util.find_spec("jax_plugins") is None:
        return False
    return importlib.util.find_spec("jax_plugins.xla_cuda13") is not None


def _gpus(topology: str, gpu: Gpu, count: str) -> list[Any]:
    if not re.fullmatch("[1-9][0-9]?", count):
        raise InputError(f"topology: expected GPUS:COUNT as in h100:2, found {topology!r}")
    if not has_cuda_compiler():
        raise InputError("topology: expected XLA's compiler for GPUs, found none: pip install 'meteora-jax[gpu]'")
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # it would ask a driver
    from jax.experimental import topologies

    described = topologies.get_topology_desc(platform="cuda", target_config=gpu.target(), topology=f"1x1x{count}")
    return list(described.devices)


def memory_of(device_kind: str) -> int | None:
    """Bytes of a device's memory; None where it is not known."""
    return next((n * GIB for name, n in MEMORY.items() if device_kind.startswith(name)), None)
