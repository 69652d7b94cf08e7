"""Time and peak memory of importing a base and its adapters, and of reading the same bytes with safetensors alone.

    python scripts/bench_import.py runs/bench_import --json runs/bench_import.json

Makes a synthetic base of Llama 3 8B's shape (bfloat16, shards of about 5 GB) and PEFT adapters on all its projections,
imports both, and reads the same files tensor by tensor with safetensors; each job is a process of its own and starts
with the files out of the page cache. Peak memory is the kernel's own (VmHWM): pages of mapped files count. Twice the
base's size is needed on disk; all of it is deleted at the end.
"""

import dataclasses
import functools
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import tyro

from converters.hf_llama import llama_rules, module_name
from converters.tensor_files import TensorWriter
from meteora_jax.config import PROJECTIONS, LlamaConfig
from meteora_jax.io import hf_config

SHARD_BYTES = 5_000_000_000
LLAMA3_8B = LlamaConfig(
    vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_layers=32, num_heads=32, num_kv_heads=8,
    head_dim=128, rms_norm_eps=1e-5, rope_theta=500000.0, rope_scaling=None, max_position_embeddings=8192,
    tie_word_embeddings=False, attention_bias=False, mlp_bias=False, bos_token_id=128000, eos_token_ids=(128001,),
)  # fmt: skip
JOBS = {
    "safetensors, base": "from safetensors import safe_open\nfor path in sys.argv[1:]:\n"
    "    with safe_open(path, 'np') as file:\n        for key in file.keys(): file.get_tensor(key)",
    "meteora, base": "from converters import import_base; import_base(*sys.argv[1:])",
    "meteora, base, dry run": "from converters import plan_base; plan_base(sys.argv[1])",
    "meteora, adapters": "from converters import import_adapters\n"
    "import_adapters(*sys.argv[1:3], [(str(i), f) for i, f in enumerate(sys.argv[3:])])",
}
JOBS["safetensors, adapters"] = JOBS["safetensors, base"]
MEASURED = (
    "import json, sys, time; import ml_dtypes, numpy; start = time.perf_counter()\n{}\n"
    "peak = next(line for line in open('/proc/self/status') if line.startswith('VmHWM'))\n"
    "print(json.dumps([time.perf_counter() - start, int(peak.split()[1]) * 1024]))"
)


@dataclass(frozen=True)
class BenchImport:
    folder: tyro.conf.Positional[Path]
    """Folder for the files; created, must not exist yet."""
    layers: int = 32
    """Of the base; 32 is Llama 3 8B."""
    adapters: int = 28
    """PEFT folders."""
    rank: int = 8
    """Of every adapter."""
    json: Path | None = None
    """Write the figures here too."""


@functools.cache
def few_million_values() -> np.ndarray:
    return np.random.default_rng(0).normal(0, 0.02, 1 << 22).astype(ml_dtypes.bfloat16)


def random_values(count: int) -> np.ndarray:
    """bfloat16 values of about 0.02; the same few million again and again, since drawing 8 billion takes minutes."""
    return np.resize(few_million_values(), count)


def write_base(folder: Path, config: LlamaConfig) -> list[Path]:
    """A Hugging Face folder; its weight files."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(hf_config.to_hf(config)))
    shapes: dict[str, tuple[int, ...]] = {}
    for rule in llama_rules(config):
        if rule.path is not None:
            whole = config.weight_shapes()[rule.path]
            for layer in range(config.num_layers) if rule.layered else (None,):
                shapes[rule.pattern.format(layer=layer)] = rule.transform.source_shape(
                    whole[1:] if rule.layered else whole
                )
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    size = 0
    for key, shape in sorted(shapes.items()):
        size += 2 * int(np.prod(shape))
        if size > SHARD_BYTES:
            shards.append({})
            size = 2 * int(np.prod(shape))
        shards[-1][key] = shape
    names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        write_tensors(folder / name, shard)
    weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return [folder / name for name in names]


def write_adapter(folder: Path, config: LlamaConfig, rank: int) -> Path:
    """A PEFT folder; its weight file."""
    folder.mkdir(parents=True)
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": list(PROJECTIONS)}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    shapes = {}
    for layer in range(config.num_layers):
        for p in PROJECTIONS:
            module = f"base_model.model.model.layers.{layer}.{module_name(p)}"
            inputs, outputs = config.projection_shape(p)
            shapes |= {f"{module}.lora_A.weight": (rank, inputs), f"{module}.lora_B.weight": (outputs, rank)}
    write_tensors(folder / "adapter_model.safetensors", shapes)
    return folder / "adapter_model.safetensors"


def write_tensors(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    writer = TensorWriter(path, {key: (np.dtype(ml_dtypes.bfloat16), shape) for key, shape in shapes.items()})
    for key, shape in shapes.items():
        writer.slice(key)[...] = random_values(int(np.prod(shape))).reshape(shape)
    writer.sync()


def run(job: str, files: list[Path], arguments: list[Any]) -> dict[str, Any]:
    """Seconds, peak bytes and bytes of the files, of a job in a process of its own."""
    for path in files:
        with open(path, "rb") as f:
            os.fsync(f.fileno())
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    command = [sys.executable, "-c", MEASURED.format(JOBS[job]), *map(str, arguments)]
    out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    seconds, peak = json.loads(out.splitlines()[-1])
    size = sum(path.stat().st_size for path in files)
    print(f"{job:24} {size / 1e9:6.2f} GB  {seconds:7.1f} s  peak {peak / 1e9:5.2f} GB", flush=True)
    return {"job": job, "bytes": size, "seconds": seconds, "peak_bytes": peak}


def main(command: BenchImport) -> None:
    config = dataclasses.replace(LLAMA3_8B, num_layers=command.layers)
    folder = command.folder
    folder.mkdir(parents=True)
    rows = []
    try:
        start = time.perf_counter()
        shards = write_base(folder / "hf", config)
        adapters = [write_adapter(folder / "peft" / str(i), config, command.rank) for i in range(command.adapters)]
        print(f"files written in {time.perf_counter() - start:.0f} s; load {os.getloadavg()[0]:.1f}", flush=True)
        rows.append(run("meteora, base, dry run", shards, [folder / "hf"]))
        rows.append(run("safetensors, base", shards, shards))
        rows.append(run("meteora, base", shards, [folder / "hf", folder / "base"]))
        rows.append(run("safetensors, adapters", adapters, adapters))
        folders = [path.parent for path in adapters]
        rows.append(run("meteora, adapters", adapters, [folder / "bank", folder / "base", *folders]))
    finally:
        shutil.rmtree(folder)
    if command.json is not None:
        command.json.write_text(json.dumps({"layers": command.layers, "jobs": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(BenchImport))
