"""Run as a program: compiles the TPU kernels, and a backward pass, for a chip that is not there.

    JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 python tests/tpu_compile.py v5e:2x2

Prints a line a shape, with METEORA_TEST_ALL in the environment of three shapes more, each with its gradients; exits 1
on the first that Mosaic refuses. tests/test_kernels_tpu.py starts it.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from extent import ALL
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

sys.path.insert(0, str(Path(__file__).parents[1]))

from meteora_jax.engine_plan import EnginePrograms
from meteora_jax.planning import shape_of
from meteora_jax.routing import Routing
from meteora_jax.sharding import make_mesh
from pallas_kernels.routed_lora.api import Implementation, LoraBank, routed_lora

LLAMA_QKV, LLAMA_DOWN, SMOL_QKV = (4096, (4096, 1024, 1024)), (14336, (4096,)), (576, (576, 192, 192))
SHAPES: list[tuple[Implementation, tuple[int, int], tuple[int, tuple[int, ...]], str]] = [
    ("tpu_gathered", (8, 1), LLAMA_DOWN, "bfloat16"),
    ("tpu_gathered", (4, 300), LLAMA_QKV, "bfloat16"),
    ("tpu_dense", (2048, 1), LLAMA_QKV, "bfloat16"),
    ("tpu_dense", (40, 1), SMOL_QKV, "float32"),
]
MORE: list[tuple[Implementation, tuple[int, int], tuple[int, tuple[int, ...]], str]] = [
    ("tpu_gathered", (1, 1), LLAMA_QKV, "bfloat16"),
    ("tpu_gathered", (3, 1), SMOL_QKV, "float32"),
    ("tpu_dense", (8, 1), LLAMA_DOWN, "bfloat16"),
]


def main(topology: str) -> None:
    jax.config.update("jax_enable_compilation_cache", False)  # XLA cannot read such programs back
    device = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]
    mesh = Mesh(np.array([device]), ("device",))
    place = NamedSharding(mesh, PartitionSpec())
    array = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=place)  # noqa: E731
    adapters, rank, choices = 28, 8, 2
    for name, (groups, tokens), (width, splits), dtype in SHAPES + MORE * ALL:

        def loss(x, a, b, weights, scale, base, indices, name=name, splits=splits):
            bank, routing = LoraBank(a, b, scale, splits), Routing(indices, weights)
            y = routed_lora(x, bank, routing, base, implementation=name)
            return jnp.sum(y.astype(jnp.float32) ** 2)

        shared = (groups, 1) if tokens > 1 else (groups, tokens)
        arguments = [
            array((groups, tokens, width), dtype),
            array((len(splits), adapters, rank, width), dtype),
            array((adapters, rank, sum(splits)), dtype),
            array((*shared, len(splits), choices), jnp.float32),
            array((len(splits), adapters), jnp.float32),
            array((groups, tokens, sum(splits)), dtype),
            array((*shared, len(splits), choices), jnp.int32),
        ]
        with jax.set_mesh(mesh):
            # the backward pass is XLA's own and the same behind every kernel: once by default
            backward = ALL or dtype == "float32"
            lowered = jax.jit(jax.value_and_grad(loss, argnums=range(6)) if backward else loss).lower(*arguments)
            assert "tpu_custom_call" in lowered.as_text(), "no Pallas kernel in the program"
            memory = lowered.compile().memory_analysis()
        print(f"{topology} {device.device_kind} {name} {groups}x{tokens} {width}->{splits} {dtype}: "
              f"{memory.temp_size_in_bytes / 1e6:.1f} MB beside the arguments")  # fmt: skip


def engine_steps(topology: str) -> None:
    """Eight decoding steps of 64 rows, two layers of Llama-3-8B's shape: JAX's kernel reads the cache where it lies."""
    device = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]
    config = dataclasses.replace(shape_of("llama3-8b"), num_layers=2, vocab_size=4096)
    programs = EnginePrograms(config, 8, 8, make_mesh(devices=[device]), rows=64)
    compiled, _ = programs.compiled(2048, 40)
    assert "tpu_custom_call" in compiled.as_text(), "no Pallas kernel in the program"
    cache, beside = programs.state_bytes(2048), compiled.memory_analysis().temp_size_in_bytes
    assert beside < cache / 10, f"{beside} bytes: the cache is copied"
    print(f"{topology} {device.device_kind} the engine: {beside / 1e6:.1f} MB beside a cache of {cache / 1e6:.0f} MB")


if __name__ == "__main__":
    main(sys.argv[1])
    engine_steps(sys.argv[1])
