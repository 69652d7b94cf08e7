"""Run as a program: compiles decoding and a prompt of Llama-3-8B for an H200 that is not there, and reads the programs.

    JAX_PLATFORMS=cpu python tests/gpu_compile.py

Needs the extra `gpu` (XLA's CUDA compiler), no GPU and no Triton: a launch is any custom call with the same operands,
results and aliases. Prints what one layer takes; exits 1 where XLA copies what a launch changes in place, or a prompt's
weights.
tests/test_decode_step.py starts it where the extra is installed.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import os
import re
import sys
from pathlib import Path
from typing import Any

os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"  # it would ask a driver

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, SingleDeviceSharding

sys.path.insert(0, str(Path(__file__).parents[1]))

import meteora_jax as mj
from meteora_jax import execution
from meteora_jax.config import PROJECTIONS, AdapterInfo, BankConfig, LlamaConfig
from meteora_jax.engine.step import PromptTokens, StepRows, new_state, run_steps
from meteora_jax.execution import ExecutionConfig
from meteora_jax.gate_config import TokenRouterForm
from meteora_jax.model import layout
from meteora_jax.model.llama import Llama
from meteora_jax.model.routed_llama import gated_llama
from meteora_jax.planning import abstract_model, shape_of, spread
from meteora_jax.quantization import Quantization
from meteora_jax.routing.gates import GateParam
from meteora_jax.sharding import spec, use_mesh
from meteora_jax.training.data import Batch
from meteora_jax.training.gate_loss import GateLoss
from meteora_jax.training.settings import Objective
from meteora_jax.training.step import initial_state, make_step, optimizer
from pallas_kernels.decode_step import choosing, triton_gpu
from pallas_kernels.paged_attention import QUERY_BLOCK
from pallas_kernels.paged_attention import triton_gpu as attention_gpu
from pallas_kernels.quantized_matmul import triton_gpu as quantised_gpu
from pallas_kernels.routed_lora import triton_gpu as routed_gpu

# What the compiler asks of a GPU; source: the vendor's data sheet and CUDA's device properties.
H200 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 memory_bandwidth: 4800000000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 151397597184 shared_memory_per_block_optin: 232448 cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 patch: 0 } device_description_str: "NVIDIA H200"
"""
LAYERS = 4
GPU = ExecutionConfig.of("gpu", "bfloat16")
array = jax.ShapeDtypeStruct


def stand_in(module: str, kernel: str, *arrays: Any, out: Any, aliases: Any = None, **rest: Any) -> Any:
    call = jax.ffi.ffi_call(
        "triton_kernel_call", jax.tree.leaves(out), input_output_aliases=aliases or {}, custom_call_api_version=2,
        legacy_backend_config=kernel,
    )  # fmt: skip
    results = call(*arrays)
    return tuple(results) if isinstance(out, tuple) else results[0]


def llama_3_8b(
    form: TokenRouterForm | None = None,
    execution: ExecutionConfig = GPU,
    quantization: Quantization | None = None,
    tensor: int = 1,
) -> tuple[Any, Any, BankConfig]:
    """Graph and shapes of a model of LAYERS layers, gates and A's behind its kernels' rows, and its bank."""
    config = LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_layers=LAYERS, num_heads=32, num_kv_heads=8,
        head_dim=128, rms_norm_eps=1e-5, rope_theta=500000.0, rope_scaling=None, max_position_embeddings=8192,
        tie_word_embeddings=False, attention_bias=False, mlp_bias=False, bos_token_id=None, eos_token_ids=(),
        quantization=quantization,
    )  # fmt: skip
    infos = tuple(AdapterInfo(f"adapter_{i}", 8, PROJECTIONS, "", "", {}) for i in range(28))
    shapes = {p: config.projection_shape(p) for p in PROJECTIONS}
    bank = BankConfig(infos, dict.fromkeys(PROJECTIONS, 8), LAYERS, shapes)

    def make() -> Llama:
        model = gated_llama(config, bank, form, jnp.bfloat16, nnx.Rngs(0), execution)
        layout.lay_out(model, tensor)
        return nnx.merge(*layout.pack(*nnx.split(model)))

    model = nnx.eval_shape(make)
    return *nnx.split(model), bank


def compiled(device: Any, function: Any, graph: Any, *given: Any, donate: tuple[int, ...] = (), **static: Any) -> str:
    """The optimised program of a function of a graph and arrays."""
    place = lambda x: array(x.shape, x.dtype, sharding=SingleDeviceSharding(device))  # noqa: E731
    own = lambda *given: function(graph, *given, **static)  # noqa: E731
    jitted = jax.jit(own, donate_argnums=donate)
    lowered = jitted.trace(*jax.tree.map(place, given)).lower(lowering_platforms=("cuda",))
    text = lowered.compile(compiler_options=dict(execution.GPU_OPTIONS) | {"xla_gpu_autotune_level": 0}).as_text()
    assert text is not None
    return text


BLOCK_SIZE, TABLE = 16, 36


def state_of(graph: Any, weights: Any, rows: int) -> Any:
    """Shapes of the engine's state with room for 576 positions a row."""
    return jax.eval_shape(lambda w: new_state(graph, w, rows * TABLE, BLOCK_SIZE, rows), weights)


def step_rows(rows: int) -> StepRows:
    counted = array((rows,), jnp.int32)
    return StepRows(counted, array((rows,), bool), array((rows, TABLE), jnp.int32), counted, None)


def decoding(
    device: Any, router: Any, rows: int, form: TokenRouterForm | None, quantization: Quantization | None = None
) -> str:
    """The optimised program of decoding steps."""
    graph, weights, bank = llama_3_8b(form, quantization=quantization)
    bound = router.bind([router] * rows, bank.names) if router is not None else None
    rest = step_rows(rows), None, bound, array((1,), jnp.int32)
    how: dict[str, Any] = dict(steps=8, logprobs=None, trace=True)
    return compiled(
        device, run_steps.__wrapped__, graph, weights, state_of(graph, weights, rows), *rest, donate=(1,), **how
    )


def prompt(device: Any, router: Any, length: int, rows: int = 8, quantization: Quantization | None = None) -> str:
    """The optimised program of a step that reads a prompt beside rows that decode.

    So many rows that XLA has no reason to pad the products: it does where length + rows is no multiple of 8.
    """
    graph, weights, bank = llama_3_8b(quantization=quantization)
    bound = router.bind([router] * rows, bank.names) if router is not None else None
    tokens, of_rows = array((length,), jnp.int32), array((rows,), jnp.int32)
    read = PromptTokens(tokens, tokens, array((length // QUERY_BLOCK,), jnp.int32), of_rows, of_rows, of_rows)
    rest = step_rows(rows), read, bound, array((1,), jnp.int32)
    how: dict[str, Any] = dict(steps=1, logprobs=None, trace=False)
    return compiled(device, run_steps.__wrapped__, graph, weights, state_of(graph, weights, rows), *rest, **how)


def readers_of_kernels(text: str) -> list[str]:
    """What reads the stacked kernels in the loop over layers."""
    (name,) = set(re.findall(r" while\(.*?body=(%[\w.\-]+)", text))
    (body,) = [part for part in re.split(r"\n(?=%|ENTRY)", text) if part.startswith(name + " ")]
    _, weights, _ = llama_3_8b()
    stacks = [",".join(map(str, leaf.shape)) for path, leaf in nnx.to_flat_state(weights) if path[-1] == "kernel"]
    found = rf"(%\S+) = bf16\[(?:{'|'.join(stacks)})\]\S* get-tuple-element\("
    kernels = re.findall(found, body)
    assert len(kernels) == 4, kernels
    reads = re.compile(rf" = (?!.* tuple\().*\(.*(?:{'|'.join(map(re.escape, kernels))})[,)]")
    return [line.strip() for line in body.splitlines() if reads.search(line)]


def products_of_training(device: Any, remat: Any) -> dict[int, int]:
    """Products with results of so many columns, q k v's and gate up's, in a step of gate training."""
    config = dataclasses.replace(shape_of("llama3-8b"), num_layers=2)
    # attention by XLA, as cuDNN's asks for a GPU
    abstract, bank = abstract_model(config, 28, 8, execution=dataclasses.replace(GPU, fused_attention=()))
    graph, params, frozen = nnx.split(abstract, GateParam, ...)
    tx = optimizer(1000, 1e-4, 0.0, 0.3)
    state = jax.eval_shape(lambda p: initial_state(p, tx, None), params)
    numbers, rows = array((4, 512), jnp.int32), 4
    batch = Batch(tokens=numbers, positions=numbers, segments=numbers, loss=array((4, 512), bool), tasks=numbers)
    place = lambda tree: jax.tree.map(lambda x: array(x.shape, x.dtype, sharding=SingleDeviceSharding(device)), tree)  # noqa: E731
    step = make_step(graph, state, tx, GateLoss(Objective(beta=50.0)), dtype=jnp.bfloat16, remat=remat)
    jitted = jax.jit(step.__wrapped__, donate_argnums=1)  # pyright: ignore[reportFunctionMemberAccess]
    given = map(place, (frozen, state, batch, mj.Gates(2).bind([mj.Gates(2)] * rows, bank.names)))
    lowered = jitted.trace(*given).lower(lowering_platforms=("cuda",))
    text = lowered.compile(compiler_options=dict(execution.GPU_OPTIONS) | {"xla_gpu_autotune_level": 0}).as_text()
    assert text is not None
    found = re.findall(r"= \(bf16\[2048,(\d+)\][^\n]*? custom-call\([^\n]*?__cublas", text)
    return {columns: found.count(str(columns)) for columns in (6144, 28672)}


def quantised() -> None:
    """Decoding steps launch a product more a group, and one for the head, and copy nothing; prompts multiply in fp8."""
    versioned = H200 + "runtime_version { major: 13 minor: 0 patch: 0 }"  # without one XLA knows no products of fp8
    (device,) = topologies.get_topology_desc(platform="cuda", target_config=versioned, topology="1x1x1").devices
    for weights, router, rows in (("fp8", None, 1), ("int4", mj.Gates(2), 8)):
        how = Quantization.of(weights, head=True)
        text = decoding(device, router, rows, None, how)
        (body,) = [part for part in re.split(r"\n(?=%|ENTRY)", text) if "triton_kernel_call" in part]
        launches = len(re.findall('custom_call_target="triton_kernel_call"', body))
        copies = len(re.findall(r" copy\(", body))
        print(f"{weights}, {rows} rows: {launches} launches, {copies} copies")
        assert (launches, copies) == (10 * LAYERS + 1, 0), f"{weights}: expected a product a group and one for the head"
    text = prompt(device, None, 2048, quantization=Quantization.of("fp8"))
    products = text.count('custom_call_target="__cublas$lt$matmul$f8"')
    print(f"fp8, a prompt: {products} products of fp8 a layer")
    assert products == 4, "a prompt's products are not of fp8"


def on_two_gpus() -> None:
    """A decoding step of a tensor axis compiles, for kernels on each device's share of the layers."""
    devices = topologies.get_topology_desc(platform="cuda", target_config=H200, topology="1x1x2").devices
    mesh = Mesh(np.asarray(devices).reshape(1, 1, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    how, router, rows = ExecutionConfig.of("gpu", "bfloat16", mesh), mj.Gates(2), 4
    bound = router.bind([router] * rows, tuple(f"adapter_{i}" for i in range(28)))
    with use_mesh(mesh):
        graph, weights, _ = llama_3_8b(TokenRouterForm(width=128, depth=4), how, tensor=2)
        given = state_of(graph, weights, rows), step_rows(rows), None, bound, array((1,), jnp.int32)

        def place(x: Any) -> Any:
            names = (None, None, "heads", None) if len(x.shape) == 4 else (None,) * len(x.shape)
            return array(x.shape, x.dtype, sharding=NamedSharding(mesh, spec(names, x.shape, mesh.shape)))

        def own(*given: Any) -> Any:
            return run_steps.__wrapped__(graph, *given, steps=8, logprobs=None, trace=True)

        jitted = jax.jit(own, donate_argnums=1)
        lowered = jitted.trace(spread(weights, mesh), *jax.tree.map(place, given)).lower(lowering_platforms=("cuda",))
        lowered.compile(compiler_options=dict(execution.GPU_OPTIONS) | {"xla_gpu_autotune_level": 0})
    print("two GPUs: a decoding step compiles")


def read_after_change(text: str) -> list[str]:
    """Instructions that read an array behind its update in place by a scatter, in the order of the program."""
    found = []
    for part in re.split(r"\n(?=%|ENTRY)", text):
        changed: set[str] = set()
        for line in part.splitlines():
            _, equals, instruction = line.partition(" = ")
            operands = re.findall(r"%[\w.\-]+", instruction.partition(", metadata=")[0])
            if equals and changed & set(operands):
                found.append(line.strip())
            if operands and re.search(r"scatter\S* = .* (fusion|scatter)\(", line):
                changed.add(operands[0])
    return found


def little_memory() -> None:
    """Decoding steps where the cache leaves XLA no memory, which then computes values again, read no state that the
    step has changed by then."""
    topology = H200.replace("151397597184", "8000000000")
    (device,) = topologies.get_topology_desc(platform="cuda", target_config=topology, topology="1x1x1").devices
    graph, weights, bank = llama_3_8b()
    state = jax.eval_shape(lambda w: new_state(graph, w, 36864, BLOCK_SIZE, 256), weights)  # 4.8 GB a cache
    for router in (None, mj.Gates(2)):
        bound = router.bind([router] * 8, bank.names) if router is not None else None
        rest = step_rows(8), None, bound, array((1,), jnp.int32)
        how: dict[str, Any] = dict(steps=1, logprobs=None, trace=False)
        text = compiled(device, run_steps.__wrapped__, graph, weights, state, *rest, donate=(1,), **how)
        late = read_after_change(text)
        assert not late, "state is read behind its update in place\n" + "\n".join(late)
    print("little memory: no state is read behind its update in place")


def main() -> None:
    quantised_gpu.launch = stand_in
    jax.config.update("jax_enable_compilation_cache", False)  # XLA cannot read such programs back
    (device,) = topologies.get_topology_desc(platform="cuda", target_config=H200, topology="1x1x1").devices
    triton_gpu.launch = attention_gpu.launch = choosing.launch = stand_in
    routed_gpu.launch = functools.partial(stand_in, "")
    for router, rows, form in (
        (None, 1, None),
        (mj.Gates(2), 1, None),
        (mj.Gates(2), 8, None),
        (mj.Gates(2), 32, None),
        (mj.Gates(2), 8, TokenRouterForm(width=128, depth=4)),
        (mj.Spectr(4), 8, None),
    ):
        text = decoding(device, router, rows, form)
        (body,) = [part for part in re.split(r"\n(?=%|ENTRY)", text) if "triton_kernel_call" in part]
        names = re.findall(r" (fusion|copy|while|custom-call)\(", body)
        launches = len(re.findall('custom_call_target="triton_kernel_call"', body))
        products = len(re.findall(r"calls=%dynamic-slice-fusion", body))
        depth = form.depth if form else 0
        scored = isinstance(router, mj.Spectr)
        kind = "SpectR" if scored else "bare" if router is None else "adapted"
        what = f"{kind}{', token router' if form else ''}, {rows} rows"
        rest = len(names) - launches - products
        print(
            f"{what}: {launches / LAYERS:g} launches a layer, {products / LAYERS:g} products, {rest} beside the layers"
        )
        assert products == 4 * (LAYERS + depth), f"{what}: products that do not read their layer in place"
        own = 2 * (depth + 2) if form else 0  # attention of the token router and of its two hops
        own += 4 * LAYERS if scored else 0  # a group's ranking
        assert launches == 6 * LAYERS + own, what
        assert collections.Counter(names)["copy"] == 0, f"{what}: a copy of what a launch changes in place"
        assert rest <= (90 if form else 24), what  # most are the router's, whose weights are cast before the loop
    for router, products in ((None, 4), (mj.Fixed("adapter_3"), 8), (mj.Gates(2), 8)):
        name = "bare" if router is None else type(router).__name__
        readers = readers_of_kernels(prompt(device, router, 2048))
        in_place = sum("calls=%dynamic-slice-fusion" in line for line in readers)
        print(f"{name}, a prompt: {in_place} products a layer, {len(readers) - in_place} copies of kernels")
        assert in_place == len(readers) == products, f"{name}: a layer of a kernel is copied\n" + "\n".join(readers)
    for remat, products in ((True, 4), ("dots", 2)):  # the base's and the update, and both again where recomputed
        counted = products_of_training(device, remat)
        print(f"training, remat {remat}: {counted} products of so many columns a layer, forward and backward")
        assert set(counted.values()) == {products}, f"remat {remat}: a product runs more than it must"
    quantised()
    little_memory()
    if jax.__version_info__ >= (0, 11):  # XLA before does not compile that step without the GPUs
        on_two_gpus()


if __name__ == "__main__":
    main()
