"""Gate training on several meshes of one host's devices, one after another: tokens/s, MFU, speed-up, checkpoints.

    python scripts/bench_scaling.py --shape llama3-8b --mesh 1x1x1 2x1x1 4x1x1 1x4x1 1x1x4 --json scaling.json
    XLA_FLAGS=--xla_force_host_platform_device_count=8 python scripts/bench_scaling.py --shape tiny --mesh 1x1x1 2x2x2

Weights and tokens are random; a mesh is data x fsdp x tensor. Rows are per share of the batch (data x fsdp), so a
larger mesh does more work in the same time: weak scaling, as gate training is run. MFU counts the FLOPs of
`meteora_jax.training.watch` (recomputation is not counted) against `peak_flops` of the device.
"""

import dataclasses
import datetime
import functools
import json
import shlex
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx
from rich.console import Console
from rich.table import Table

from meteora_jax.config import InputError, LlamaConfig
from meteora_jax.io import hf_config
from meteora_jax.model.layout import lay_out
from meteora_jax.planning import SHAPES, abstract_model, collectives, shape_of, spread
from meteora_jax.quantization import Quantization
from meteora_jax.routing.gates import GateParam, Gates
from meteora_jax.sharding import make_mesh, place_rows, rows_multiple, use_mesh
from meteora_jax.training.checkpoints import Checkpoints
from meteora_jax.training.data import Batch, Layout
from meteora_jax.training.gate_loss import GateLoss
from meteora_jax.training.settings import Objective
from meteora_jax.training.step import initial_state, make_step, optimizer
from meteora_jax.training.watch import flops_per_pair, flops_per_token, peak_flops

TINY = dict(
    model_type="llama", rms_norm_eps=1e-5, tie_word_embeddings=False, vocab_size=256, hidden_size=64,
    intermediate_size=128, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=4,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Scaling:
    """What to time."""

    shape: str
    """tiny, or a name of `meteora plan`: llama2-7b, llama2-13b, llama3-8b, llama3-70b."""
    mesh: tuple[str, ...] = ("1x1x1",)
    """DATAxFSDPxTENSOR, one after the other; the first is what the others are compared with."""
    rows: int = 8
    """Sequences a share of the batch."""
    width: int = 1024
    """Tokens of each."""
    layers: int | None = None
    """Of the model, all of the shape's unless given."""
    weights: Literal["bf16", "int8", "fp8", "int4"] = "bf16"
    """How the base is stored; bf16: unquantised."""
    adapters: int = 28
    rank: int = 8
    top_k: int = 2
    steps: int = 10
    """Timed, after three that are not; the median counts."""
    remat: Literal["nothing", "all", "dots"] = "all"
    """What is recomputed in the backward pass."""
    checkpoint: bool = False
    """Time saving the state on each mesh, and restoring it on the next."""
    json: Path | None = None


@dataclasses.dataclass(frozen=True)
class Trained:
    """Seconds of a step, and what is in the program."""

    seconds: float
    compiling: float
    collectives: dict[str, int]
    memory_gb: float | None
    saved: float | None
    restored: float | None


def random_on(abstract: Any, seed: int) -> Any:
    """Small values, evenly spread, on the devices that an abstract state names; of whole numbers any that the type has.
    Each is a hash of its place: `jax.random` takes several times a large matrix's memory."""

    def draw(seed: jax.Array, x: Any) -> jax.Array:
        bits = jnp.broadcast_to(seed, x.shape)
        for axis in range(x.ndim):  # murmur3's finaliser
            bits = (bits ^ jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)) * jnp.uint32(0x85EBCA6B)
            bits = (bits ^ (bits >> 13)) * jnp.uint32(0xC2B2AE35)
            bits = bits ^ (bits >> 16)
        if jnp.issubdtype(x.dtype, jnp.integer):
            unsigned = jnp.dtype(f"uint{8 * x.dtype.itemsize}")
            return jax.lax.bitcast_convert_type(bits.astype(unsigned), x.dtype)
        return (0.07 * ((bits >> 8).astype(jnp.float32) / (1 << 24) - 0.5)).astype(x.dtype)

    leaves, tree = jax.tree.flatten(abstract)
    jitted = (jax.jit(functools.partial(draw, x=x), out_shardings=x.sharding) for x in leaves)
    return jax.tree.unflatten(tree, [f(np.uint32(1000 * seed + i)) for i, f in enumerate(jitted)])


def train(s: Scaling, config: LlamaConfig, sizes: tuple[int, int, int], store: Path) -> Trained:
    """Times training on one mesh."""
    mesh = make_mesh(*sizes, devices=jax.devices()[: int(np.prod(sizes))])
    abstract, bank = abstract_model(config, s.adapters, s.rank)
    lay_out(abstract, sizes[2])
    graph, state = nnx.split(abstract)
    weights = random_on(spread(state, mesh), 0)
    graph, params, frozen = nnx.split(nnx.merge(graph, weights), GateParam, ...)
    tx = optimizer(1000, 1e-4, 0.0, 0.3)
    train_state = initial_state(params, tx, mesh)
    del weights, params
    rows = s.rows * rows_multiple(mesh)
    rng = np.random.default_rng(0)
    columns = np.broadcast_to(np.arange(s.width, dtype=np.int32), (rows, s.width))
    batch = Batch(
        tokens=rng.integers(0, config.vocab_size, (rows, s.width), dtype=np.int32), positions=columns,
        segments=np.ones((rows, s.width), np.int32), loss=columns > 0,
        tasks=rng.integers(0, s.adapters, (rows, s.width), dtype=np.int32),
    )  # fmt: skip
    gates = Gates(s.top_k)
    router = place_rows(jax.tree.map(np.asarray, gates.bind([gates] * rows, bank.names)), mesh)
    batch = place_rows(batch, mesh)
    remat: Any = {"nothing": False, "all": True, "dots": "dots"}[s.remat]
    step: Any = make_step(
        graph, train_state, tx, GateLoss(Objective(beta=50.0)), dtype=jnp.bfloat16, remat=remat, mesh=mesh
    )
    restored = saved = None
    identity = {"shape": s.shape}
    if s.checkpoint:
        checkpoints = Checkpoints(store, 1, identity)
        began = time.perf_counter()
        found = checkpoints.restore(train_state)
        if found:
            train_state = jax.block_until_ready(found.state)
            restored = time.perf_counter() - began
        checkpoints.close()
    times, loss = [], float("nan")
    with use_mesh(mesh):
        began = time.perf_counter()
        compiled = step.lower(frozen, train_state, batch, router).compile()
        compiling = time.perf_counter() - began
        print(f"{sizes}: compiled in {compiling:.0f} s", flush=True)
        loss = np.nan
        for _ in range(3 + s.steps):
            began = time.perf_counter()
            train_state, losses = compiled(frozen, train_state, batch, router)
            loss = float(losses.loss)
            times.append(time.perf_counter() - began)
    if not np.isfinite(loss):
        raise InputError(f"{s.shape} on {sizes}: expected a finite loss, found {loss}")
    if s.checkpoint:
        shutil.rmtree(store, ignore_errors=True)
        checkpoints = Checkpoints(store, 1, identity)
        began = time.perf_counter()
        checkpoints.save(1, train_state, Layout(rows, s.width, 1, True), {0: "{}"})
        checkpoints.wait()
        saved = time.perf_counter() - began
        checkpoints.close()
    stats = jax.devices()[0].memory_stats() or {}
    memory = stats.get("peak_bytes_in_use", 0) / 1e9 or None
    return Trained(statistics.median(times[3:]), compiling, collectives(compiled), memory, saved, restored)


def main(s: Scaling) -> None:
    """Times every mesh, prints a table, writes the records."""
    known = s.shape == "tiny" or s.shape in SHAPES
    if not known:
        raise InputError(f"--shape: expected tiny or one of {', '.join(SHAPES)}, found {s.shape}")
    config = hf_config.from_hf(TINY, "tiny") if s.shape == "tiny" else shape_of(s.shape)
    if s.layers is not None:
        config = dataclasses.replace(config, num_layers=s.layers)
    if s.weights != "bf16":
        config = dataclasses.replace(config, quantization=Quantization.of(s.weights, False))
    _, bank = abstract_model(config, s.adapters, s.rank)
    per_token = flops_per_token(config, bank, chosen=s.top_k, gates="meteora", train_adapters=False)
    per_token += flops_per_pair(config) * (s.width + 1) / 2
    kind = jax.devices()[0].device_kind
    peak = peak_flops(kind)
    console = Console(width=None if sys.stdout.isatty() else 150)
    records: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in s.mesh:
            sizes = tuple(int(n) for n in name.split("x"))
            if len(sizes) != 3 or int(np.prod(sizes)) > len(jax.devices()):
                raise InputError(f"--mesh: expected DATAxFSDPxTENSOR of {len(jax.devices())} devices, found {name}")
            try:
                done = train(s, config, sizes, Path(folder) / "checkpoints")
            except jax.errors.JaxRuntimeError as e:  # out of memory, mostly: the other meshes are still worth a try
                console.print(f"{name}: not timed: {str(e).splitlines()[0][:200]}", markup=False)
                continue
            devices, rows = int(np.prod(sizes)), s.rows * sizes[0] * sizes[1]
            speed = rows * s.width / done.seconds
            records.append({
                "what": "train gates", "shape": s.shape, "layers": config.num_layers, "weights": s.weights,
                "adapters": s.adapters, "rank": s.rank, "top_k": s.top_k,
                "mesh": name, "devices": devices, "rows": rows, "width": s.width, "remat": s.remat,
                "ms": 1e3 * done.seconds, "tokens_per_second": speed,
                "mfu": speed * per_token / (devices * peak) if peak else None,
                "speedup": speed / records[0]["tokens_per_second"] if records else 1.0,
                **{k: v for k, v in dataclasses.asdict(done).items() if k != "seconds"},
                "device": kind, "jax": jax.__version__, "date": datetime.date.today().isoformat(),
                "command": shlex.join(["python", *sys.argv]),
            })  # fmt: skip
            console.print(f"{name}: {speed:,.0f} tokens/s", highlight=False)
            if s.json:
                s.json.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
    table = Table("mesh", "rows x width", "ms", "tokens/s", "MFU", "speed-up", "GB", "compiling", "save", "restore",
                  "collectives", title=f"{s.shape} on {kind}, {per_token / 1e9:.4g} GFLOPs a token")  # fmt: skip

    def seconds(value: float | None) -> str:
        return "" if value is None else f"{value:.1f} s"

    for r in records:
        table.add_row(
            r["mesh"], f"{r['rows']}x{r['width']}", f"{r['ms']:.1f}", f"{r['tokens_per_second']:,.0f}",
            f"{r['mfu']:.1%}" if r["mfu"] else "", f"{r['speedup']:.2f}", f"{r['memory_gb'] or 0:.0f}",
            seconds(r["compiling"]), seconds(r["saved"]), seconds(r["restored"]),
            " ".join(f"{k} {n}" for k, n in r["collectives"].items() if n),
        )  # fmt: skip
    console.print(table)


if __name__ == "__main__":
    try:
        main(tyro.cli(Scaling, description=__doc__))
    except InputError as error:
        sys.exit(f"error: {error}")
