"""`meteora plan train | evaluate | serve`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from meteora_jax.cli.report import check_counts, console, status, write_json
from meteora_jax.config import InputError, read_json
from meteora_jax.gate_config import FormName
from meteora_jax.io import hf_config
from meteora_jax.quantization import Quantization, WeightFormat

if TYPE_CHECKING:
    from meteora_jax import engine_plan, planning


@dataclass(frozen=True)
class Plan:
    """Compile gate training, evaluation or a server's engine for TPUs that are not there, or gate training for GPUs:
    memory, FLOPs, collectives, time. Needs meteora-jax[tpu], or [gpu]."""

    what: tyro.conf.Positional[Literal["train", "evaluate", "serve"]]
    """What to plan: a training step; prefill and decoding; or how many requests a server holds, and their tokens/s."""
    base: str
    """BASE folder, or llama2-7b, llama2-13b, llama3-8b, llama3-70b."""
    topology: str
    """As libtpu names it: v5p:4x4x4, v5e:4x4, v4:4x4x4, v6e:4x4, tpu7x:2x2x1; or GPUs of one host: h100:2, h200:1,
    a100:8 (of 80 GB)."""
    weights: WeightFormat | None = None
    """Of the projections, as `meteora quantize` would store them; by default as the base's are."""
    adapters: int = 28
    """Of the bank."""
    rank: int = 8
    """Of each adapter, at all seven projections."""
    top_k: int = 2
    """Adapters a token."""
    rows: int | None = None
    """Rows of the batch; one for each device of data x fsdp unless given, and for serve 32."""
    width: int = 2048
    """Tokens of a row; evaluate and serve: of a prompt."""
    new_tokens: int = 64
    """Longest response, for evaluate and serve."""
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
    recipe: FormName = "token-router"
    """As of `meteora train gates`: whose gates, and what a training step computes."""
    mfu: float = 0.4
    """Share of the peak FLOP/s that the expected time supposes."""
    json: Path | None = None
    """Write the figures here too."""


def plan(command: Plan) -> None:
    """Runs `meteora plan train | evaluate | serve`."""
    from meteora_jax.engine_plan import plan_generation, plan_serving
    from meteora_jax.model.lora_linear import column_shards
    from meteora_jax.planning import plan_training, shape_of
    from meteora_jax.sharding import make_mesh, rows_multiple
    from meteora_jax.topologies import GPUS, topology_devices
    from meteora_jax.training.recipes import RECIPES

    check_counts(
        adapters=command.adapters, rank=command.rank, top_k=command.top_k, rows=command.rows, width=command.width,
        new_tokens=command.new_tokens, accumulate=command.accumulate,
    )  # fmt: skip
    if command.top_k > command.adapters:
        raise InputError(f"--top-k: expected at most the {command.adapters} adapters, found {command.top_k}")
    if not 0 < command.mfu <= 1:
        raise InputError(f"mfu: expected a share above 0 and at most 1, found {command.mfu}")
    file = Path(command.base) / "config.json"
    config = hf_config.from_hf(read_json(file), str(file)) if file.is_file() else shape_of(command.base)
    if command.weights is not None:
        if config.quantization is not None:
            raise InputError(f"weights: expected none beside a base that is quantised, found {command.weights}")
        config = dataclasses.replace(config, quantization=Quantization.of(command.weights))
    if command.what != "train" and command.topology.partition(":")[0] in GPUS:
        raise InputError(f"topology: expected a TPU's for {command.what} (of GPUs train), found {command.topology}")
    mesh = make_mesh(command.data, command.fsdp, command.tensor, topology_devices(command.topology))
    if uncut := [g for g in ("qkv", "gate_up") if command.tensor > 1 and column_shards(config, g, command.tensor) == 1]:
        why = f"{config.num_heads} heads, {config.num_kv_heads} kv heads and {config.intermediate_size} units"
        line = f"columns of {' and '.join(uncut)} will cross devices: tensor {command.tensor} does not divide {why}"
        status.print(line, highlight=False, soft_wrap=True)
    status.print("compiling; this takes minutes", highlight=False)
    recipe = RECIPES[command.recipe]
    shape: dict[str, Any] = dict(width=command.width, mfu=command.mfu, top_k=command.top_k)
    of = config, command.adapters, command.rank, mesh
    if command.what == "serve":
        rows = command.rows or 32 * rows_multiple(mesh)
        served = plan_serving(*of, rows=rows, new_tokens=command.new_tokens, form=recipe.form, **shape)
        _show_serving(served, command.mfu)
        own = {"requests": served.requests, "fits": served.fits}
        write_json(command.json, {**dataclasses.asdict(served), **own})
        return
    if command.what == "train":
        rows = command.rows or rows_multiple(mesh) * command.accumulate
        plans = [
            plan_training(*of, rows=rows, accumulate=command.accumulate, remat=command.remat, recipe=recipe, **shape)
        ]
    else:
        rows = command.rows or rows_multiple(mesh)
        plans = list(plan_generation(*of, rows=rows, new_tokens=command.new_tokens, form=recipe.form, **shape))
    for found in plans:
        _show(found, command.mfu)
    figures = [
        {
            **dataclasses.asdict(found), "needed": found.needed, "excess": found.excess, "fits": found.fits,
            "advice": found.advice(),
        }
        for found in plans
    ]  # fmt: skip
    write_json(command.json, figures[0] if command.what == "train" else {f["what"]: f for f in figures})


def _show_serving(found: engine_plan.ServingPlan, mfu: float) -> None:
    from meteora_jax.engine_plan import BLOCK_SIZE
    from meteora_jax.topologies import GIB

    def show(line: str) -> None:
        console.print(line, highlight=False, soft_wrap=True)

    axes = " x ".join(f"{k} {n}" for k, n in found.mesh.items())
    asked = f"requests of {found.width} tokens and {found.new_tokens} new ones"
    show(f"serving: {found.devices} devices ({found.device_kind}), {axes}; {found.rows} {asked}")
    parts = f"weights {found.weights / GIB:.2f} GiB, temporary {found.temporary / GIB:.2f} GiB"
    show(f"  memory a device: {parts} of {(found.memory or 0) / GIB:.4g} GiB")
    size = f"{found.blocks} of {BLOCK_SIZE} positions and {found.block_bytes / 2**20:.3g} MiB"
    show(f"  blocks that fit: {size}, {found.blocks * BLOCK_SIZE:,} positions: {found.requests} such requests at once")
    if found.step and found.prompt_rate and found.rate:
        show(f"  a decoding step of {found.rows} rows: at least {1e3 * found.step:.2f} ms, bound by {found.bound}")
        show(f"  prompts at MFU {mfu:.0%}: {found.prompt_rate:,.0f} tokens/s; in all {found.rate:,.0f} new tokens/s")
    show("  fits" if found.fits else f"  does not fit: {found.rows} rows; fewer rows, or grow tensor")


def _show(found: planning.Plan, mfu: float) -> None:
    from meteora_jax.topologies import GIB

    def show(line: str) -> None:
        console.print(line, highlight=False, soft_wrap=True)

    axes = " x ".join(f"{k} {n}" for k, n in found.mesh.items())
    tokens = f"{found.rows} rows of {found.width} tokens" if found.what != "decoding" else f"{found.rows} rows, a token"
    show(f"{found.what}: {found.devices} devices ({found.device_kind}), {axes}; {tokens} a step")
    memory = f" of {found.memory / GIB:.4g} GiB" if found.memory else ""
    rest = "optimiser" if found.what == "training" else "cache" if found.what == "decoding" else "prompts"
    parts = f"weights and {rest} {found.weights / GIB:.2f} GiB, temporary {found.temporary / GIB:.2f} GiB"
    show(f"  memory a device: {parts}{memory}")
    if found.parts:
        show("  of these: " + ", ".join(f"{what} {n / GIB:.2f} GiB" for what, n in found.parts.items() if n))
    if found.collectives is not None:
        show("  collectives in the program: " + ", ".join(f"{n} {k}" for k, n in found.collectives.items()))
    time = ""
    if found.seconds is not None:
        rate = found.rows * found.width / found.seconds
        time = f"; at MFU {mfu:.0%}: {found.seconds:.3f} s, {rate:,.0f} tokens/s"
    show(f"  {found.flops:.3g} FLOPs a device and step{time}")
    if found.fits is False and found.excess is not None:
        sizes = f"needs {found.needed / GIB:.2f} GiB{memory} a device, {found.excess / GIB:.2f} GiB too much"
        show(f"  does not fit: {sizes}; {found.advice()}")
    elif found.fits:
        show("  fits")
