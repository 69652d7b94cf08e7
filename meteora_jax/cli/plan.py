"""`meteora plan train`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from meteora_jax.cli.report import console, status, write_json
from meteora_jax.config import InputError, LlamaConfig, read_json


@dataclass(frozen=True)
class Plan:
    """Compile gate training for TPUs that are not there: memory, FLOPs, collectives, time. Needs meteora-jax[tpu]."""

    what: tyro.conf.Positional[Literal["train"]]
    """What to plan."""
    base: str
    """BASE folder, or llama2-7b, llama2-13b, llama3-8b, llama3-70b."""
    topology: str
    """As libtpu names it: v5p:4x4x4, v5e:4x4, v4:4x4x4, v6e:4x4, tpu7x:2x2x1."""
    adapters: int = 28
    """Of the bank."""
    rank: int = 8
    """Of each adapter, at all seven projections."""
    top_k: int = 2
    """Adapters a token."""
    rows: int | None = None
    """Rows of the batch; one for each device of data x fsdp unless given."""
    width: int = 2048
    """Tokens of a row."""
    data: int = -1
    """Mesh axis that splits batches; -1 takes the devices that the others leave."""
    fsdp: int = 1
    """Mesh axis that splits batches and weights."""
    tensor: int = 1
    """Mesh axis that splits the work of each projection."""
    accumulate: int = 1
    """Parts that a step's batch is worked off in."""
    remat: bool = True
    """Recompute activations in the backward pass."""
    mfu: float = 0.4
    """Share of the peak FLOP/s that the expected time supposes."""
    json: Path | None = None
    """Write the figures here too."""


def plan(command: Plan) -> None:
    """Runs `meteora plan train`."""
    from meteora_jax.sharding import make_mesh, rows_multiple
    from meteora_jax.training.plan import GIB, plan_training, shape_of, topology_devices

    if not 0 < command.mfu <= 1:
        raise InputError(f"mfu: expected a share above 0 and at most 1, found {command.mfu}")
    file = Path(command.base) / "config.json"
    config = LlamaConfig.from_hf(read_json(file), str(file)) if file.is_file() else shape_of(command.base)
    mesh = make_mesh(command.data, command.fsdp, command.tensor, topology_devices(command.topology))
    status.print("compiling; this takes minutes", highlight=False)
    found = plan_training(
        config, command.adapters, command.rank, mesh, rows=command.rows or rows_multiple(mesh) * command.accumulate,
        width=command.width, mfu=command.mfu, top_k=command.top_k, accumulate=command.accumulate, remat=command.remat,
    )  # fmt: skip
    show = lambda *line: console.print(*line, highlight=False, soft_wrap=True)  # noqa: E731
    axes = " x ".join(f"{k} {n}" for k, n in found.mesh.items())
    show(f"{found.devices} devices ({found.device_kind}), {axes}; {found.rows} rows of {found.width} tokens a step")
    room = f" of {found.memory / GIB:.0f} GiB" if found.memory else ""
    parts = f"weights and optimiser {found.weights / GIB:.2f} GiB, temporary {found.temporary / GIB:.2f} GiB"
    show(f"memory a device: {parts}{room}")
    show("collectives in the program: " + ", ".join(f"{n} {k}" for k, n in found.collectives.items()))
    if found.seconds is not None:
        rate = found.rows * found.width / found.seconds
        time = f"at MFU {command.mfu:.0%}: {found.seconds:.3f} s, {rate:,.0f} tokens/s"
        show(f"{found.flops:.3g} FLOPs a device and step; {time}")
    if found.fits is not None:
        show("fits" if found.fits else f"does not fit: {found.advice()}")
    write_json(command.json, {**dataclasses.asdict(found), "fits": found.fits, "advice": found.advice()})
