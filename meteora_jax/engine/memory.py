"""What an engine takes of a device's memory: its cache, counted from the arrays that it makes, and a step's own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from meteora_jax.config import GROUPS, PROJECTIONS, InputError, LlamaConfig
from meteora_jax.engine.step import new_state
from meteora_jax.execution import platform
from meteora_jax.sharding import Params, tensor_shards, use_mesh
from pallas_kernels.paged_attention import reference
from pallas_kernels.routed_lora import api as routed_lora

USABLE = 0.95  # of what a device has left: the rest is fragments and the runtime's own
LARGE = 1 << 14  # blocks beside which what a layout pads is little
STEP_TOKENS = (8192, 4096, 2048, 1024, 512)  # prompt tokens of a step, the most for which memory is left
TRACED = 32  # choices of a token whose trace is counted, where a router may choose more
DISPATCHES = 2  # whose results are on the device at once


def free_bytes(mesh: Mesh | None) -> int | None:
    """What each device of the mesh (of all hosts), or the first one, has left; None where that is not known."""
    devices: Sequence[Any] = jax.local_devices()[:1] if mesh is None else list(mesh.local_devices)
    stats = [device.memory_stats() for device in devices]
    found = [s["bytes_limit"] - s["bytes_in_use"] for s in stats if s and "bytes_limit" in s]
    free = min(found) if found else None
    if mesh is not None and mesh.is_multi_process:
        from jax.experimental import multihost_utils

        kib = np.asarray(-1 if free is None else free >> 10, np.int32)
        least = int(np.min(multihost_utils.process_allgather(kib)))
        free = None if least < 0 else least << 10
    return free


def state_bytes(
    graph: nnx.GraphDef, weights: Params, blocks: int, block_size: int, rows: int, mesh: Mesh | None
) -> int:
    """What an engine's state takes of one device, as it is laid out there; weights may be shapes."""
    with use_mesh(mesh):
        made = new_state.lower(graph, weights, blocks, block_size, rows).compile()
    return made.memory_analysis().output_size_in_bytes


def block_bytes(graph: nnx.GraphDef, weights: Params, block_size: int, mesh: Mesh | None) -> int:
    """What one more block of the cache takes of one device: all layers' keys and values, and a token router's own."""
    both = [state_bytes(graph, weights, blocks, block_size, 1, mesh) for blocks in (LARGE, LARGE // 2)]
    return (both[0] - both[1]) // (LARGE - LARGE // 2)


def step_bytes(
    graph: nnx.GraphDef, weights: Params, config: LlamaConfig, rows: int, tokens: int, mesh: Mesh | None
) -> int:
    """A bound on what a step of so many rows and prompt tokens takes beside its arguments, from the shapes.

    Of a token: the residual stream, the widest group's output in the model's type and float32, and what routing makes
    of the bank: its shrink, the weighted one and the product that both come from. Of a row: logits in float32, as often
    as sampling rewrites them. Beside these what attention and the chosen adapters gather at a time, a layer's widest
    kernel where it is copied or widened, and the traces of the dispatches that are under way.
    """
    model = nnx.merge(graph, weights)
    size, tensor = jnp.dtype(model.dtype).itemsize, tensor_shards(mesh)
    every = rows + tokens
    widest = max(sum(config.projection_shape(p)[1] for p in group) for group in GROUPS.values())
    inputs = max(config.projection_shape(p)[0] for p in PROJECTIONS)
    shrunk = 0
    for group in GROUPS:
        a = getattr(model.layers, group).lora_a
        if a is not None:
            shrunk = max(shrunk, math.prod(a.shape[-4:-1]))
    stream = config.hidden_size * (2 * size + 8)
    token = stream + (widest * (size + 4) + inputs * size) / tensor + 12 * shrunk
    logits = 4 * 4 * rows * config.vocab_size
    trace = DISPATCHES * 8 * every * config.num_layers * len(PROJECTIONS) * min(model.adapters, TRACED)
    gathered = 3 * max(reference.GATHERED, routed_lora.GATHERED)
    kernel = 2 * size * widest * inputs // tensor
    return int(every * token) + logits + trace + gathered + kernel


def fitting(
    graph: nnx.GraphDef, weights: Params, config: LlamaConfig, rows: int, block_size: int, least: int,
    mesh: Mesh | None, tokens: int | None = None,
) -> tuple[int, int]:  # fmt: skip
    """(tokens of a step, blocks beside it) that the devices' memory holds, alike on all hosts.

    Args:
        least: blocks that there must be. tokens: of a step; None: the first of STEP_TOKENS that leaves so many blocks,
            1,024 on a CPU.

    Returns:
        Any number of blocks where the memory is not known.

    Raises:
        InputError: so many blocks do not fit; one line with what is needed and found.
    """
    sizes = [tokens] if tokens is not None else [1024] if platform() == "cpu" else [*STEP_TOKENS]
    sizes = [n for n in sizes if tokens is not None or n >= 2 * rows] or [2 * rows]
    free = free_bytes(mesh)
    if free is None:
        return sizes[0], 1 << 30
    block = block_bytes(graph, weights, block_size, mesh)
    needed = 0
    for size in sizes:
        step = step_bytes(graph, weights, config, rows, size, mesh)
        needed = step + least * block
        if needed <= USABLE * free:
            return size, int((USABLE * free - step) / block)
    what = f"{least} blocks of {block_size} tokens, {block} bytes each, and a step of {sizes[-1]} prompt tokens"
    raise InputError(
        f"memory: expected {needed / 2**30:.2f} GiB of a device beside the weights ({what}), found "
        f"{USABLE * free / 2**30:.2f} GiB"
    )
