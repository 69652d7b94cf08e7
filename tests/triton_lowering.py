"""Run as a program: lowers every Triton kernel for CUDA and compiles it to machine code for Hopper, without a GPU.

    JAX_PLATFORMS=cpu python tests/triton_lowering.py

Prints a line a kernel with what ptxas says of it; exits 1 on the first that is refused. tests/test_kernels_triton.py
starts it where the extra `gpu` is installed.
"""

# pyright: reportMissingImports=false
# (triton and jax-triton are optional)

from __future__ import annotations

import concurrent.futures
import functools
import itertools
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import jax_triton
import triton
from jax_triton import triton_lib

sys.path.insert(0, str(Path(__file__).parents[1]))

from pallas_kernels.decode_step import choosing, operands, triton_gpu
from pallas_kernels.paged_attention import QUERY_BLOCK, StepTokens, paged_attention
from pallas_kernels.quantized_matmul import QuantizedWeight
from pallas_kernels.quantized_matmul import triton_gpu as quantised_gpu
from pallas_kernels.routed_lora import LoraBank
from pallas_kernels.routed_lora.triton_gpu import add_lora, silu_lora, topk_gated_lora
from pallas_kernels.topk_gating import TopK

HOPPER = 90
LIMIT = 227 * 1024  # shared memory of a block
PTXAS = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
compile_ptx = triton_lib.compile_ttir_to_ptx_inplace


def ptxas(*arguments):
    """Triton's own step, and then the assembler's report of registers and spills."""
    result = compile_ptx(*arguments)
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as source:
        source.write(result.binary)
        source.flush()
        command = [str(PTXAS), "-v", "--gpu-name=sm_90a", source.name, "-o", "/dev/null"]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers, spills = re.search(r"Used (\d+) registers", report), re.search(r"(\d+) bytes spill stores", report)
    assert registers is not None, report
    assert result.shared_mem_bytes <= LIMIT, f"{result.name}: {result.shared_mem_bytes} bytes of shared memory"
    tensor_cores = sorted(set(re.findall(r"wgmma\.mma_async|mma\.sync", result.binary)))
    print(f"  {result.name}: {registers[1]} registers, {spills[1] if spills else 0} bytes spilt, "
          f"{result.shared_mem_bytes} shared, {' '.join(tensor_cores) or 'no tensor cores'}")  # fmt: skip
    return result


triton_lib.compile_ttir_to_ptx_inplace = ptxas
jax_triton.triton_call = functools.partial(jax_triton.triton_call, compute_capability=HOPPER)

QKV, GATE_UP, DOWN = (4096, (4096, 1024, 1024)), (4096, (14336, 14336)), (14336, (4096,))


def lower(f, *arguments) -> None:
    text = jax.jit(f).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    assert "triton_kernel_call" in text, "no Triton kernel in the program"


def main() -> None:
    array = jax.ShapeDtypeStruct
    for rows, (width, splits), adapters, rank in [
        (1, QKV, 28, 8),
        (32, DOWN, 28, 8),
        (64, GATE_UP, 28, 8),
    ]:
        print(f"gated, triton: {rows} {width}->{splits} {adapters} of rank {rank} bfloat16")
        bank = LoraBank(
            array((len(splits), adapters, rank, width), jnp.bfloat16),
            array((adapters, rank, sum(splits)), jnp.bfloat16),
            array((len(splits), adapters), jnp.float32),
            splits,
        )
        product = array((rows, len(splits) * 256), jnp.float32)
        rule = TopK(array((rows,), jnp.int32), array((rows,), jnp.float32), 2)
        run = functools.partial(topk_gated_lora, gates=adapters)
        lower(run, product, bank, rule, array((rows, sum(splits)), jnp.bfloat16))
    many_tokens()
    attentions()
    decode_steps()
    rankings()
    quantised_products()
    once_in_threads()
    kept_on_disk()


def kept_on_disk() -> None:
    """A process that finds a kernel in JAX's compilation cache does not compile it, and lowers the same program."""
    array, found = jax.ShapeDtypeStruct, []
    tokens = StepTokens(*(array(s, jnp.int32) for s in ((5,), (5, 512), (0,), (5,))))
    given = array((5, 4, 128), jnp.bfloat16), array((64, 16, 4, 128), jnp.bfloat16), tokens
    attend = functools.partial(paged_attention, first_block=7, implementation="triton")

    def counting(*arguments):
        found.append(arguments)
        return compile_ptx(*arguments)

    triton_lib.compile_ttir_to_ptx_inplace = counting
    texts = []
    with tempfile.TemporaryDirectory() as folder:
        jax.config.update("jax_compilation_cache_dir", folder)
        for _ in range(2):
            triton_lib._COMPILED_KERNEL_CACHE.clear()  # as another process begins
            jax.clear_caches()
            texts.append(jax.jit(attend).trace(*given).lower(lowering_platforms=("cuda",)).as_text())
            print(f"kept on disk: {len(found)} kernels compiled")
        jax.config.update("jax_compilation_cache_dir", None)
    triton_lib.compile_ttir_to_ptx_inplace = ptxas
    assert len(found) == len(triton_lib._COMPILED_KERNEL_CACHE) == 2, "a kernel on disk was compiled again"
    assert texts[0] == texts[1]


def once_in_threads() -> None:
    """Threads that lower programs of one kernel compile it once."""
    found: list[int] = []

    def counting(*arguments):
        found.append(threading.get_ident())
        time.sleep(0.2)  # the others come meanwhile
        return compile_ptx(*arguments)

    array, before = jax.ShapeDtypeStruct, len(triton_lib._COMPILED_KERNEL_CACHE)
    tokens = StepTokens(*(array(s, jnp.int32) for s in ((3,), (3, 512), (0,), (3,))))
    pages, heads = array((64, 16, 4, 128), jnp.bfloat16), array((3, 4, 128), jnp.bfloat16)
    triton_lib.compile_ttir_to_ptx_inplace = counting
    futures: list[concurrent.futures.Future[None]] = []
    with concurrent.futures.ThreadPoolExecutor(3) as threads:
        for first in range(3):  # not the same program, or JAX lowers it once
            attend = functools.partial(paged_attention, first_block=first, implementation="triton")
            futures.append(threads.submit(lower, attend, heads, pages, tokens))
    triton_lib.compile_ttir_to_ptx_inplace = ptxas
    for future in futures:
        future.result()
    kernels = len(triton_lib._COMPILED_KERNEL_CACHE) - before
    print(f"three programs of {kernels} kernels in three threads: {len(found)} compiled")
    assert len(found) == kernels > 0, "a kernel was compiled more than once"


def many_tokens() -> None:
    """Of a Llama-3-8B's prompts, whole and a share of two; of a SmolLM2-135M, whose A * R has a rest."""
    array = jax.ShapeDtypeStruct
    for run, rows, splits, adapters, rank in (
        (silu_lora, 16384, (14336, 14336), 28, 8), (silu_lora, 1000, (7168, 7168), 28, 8),
        (silu_lora, 300, (1536, 1536), 5, 3), (add_lora, 16384, (4096, 1024, 1024), 28, 8),
        (add_lora, 16384, (4096,), 28, 8), (add_lora, 300, (576, 192, 192), 5, 3),
    ):  # fmt: skip
        print(f"{run.__name__} of prompts: {rows} of {splits}, {adapters} of rank {rank} bfloat16")
        total, p = sum(splits), len(splits)
        bank = LoraBank(None, array((adapters, rank, total), jnp.bfloat16), array((p, adapters), jnp.float32), splits)
        routing = array((rows, p, 2), jnp.int32), array((rows, p, 2), jnp.float32)
        shrink, base = array((rows, p, adapters, rank), jnp.float32), array((rows, total), jnp.bfloat16)
        rest = (base,) if p == 1 else ()
        lower(run, bank, *routing, shrink, base, *rest)


def decode_steps() -> None:
    """The launches of a layer of Llama-3-8B, bare and adapted, by gates and by a choice given; and a wide bank's."""
    array, layers = jax.ShapeDtypeStruct, 32

    def half(*shape: int) -> jax.ShapeDtypeStruct:
        return array((layers, *shape), jnp.bfloat16)

    for epilogue, (width, splits), norm in [
        ("qkv", QKV, True), ("residual", (4096, (4096,)), False), ("silu", GATE_UP, True), ("residual", DOWN, False)
    ]:  # fmt: skip
        for rows, adapters, rank, how in [
            *((rows, 28, 8, how) for rows in (1, 8, 32, 64, 128, 256) for how in ("gates", "given")),
            (64, 28, 8, "fused"), (1, 0, 0, ""), (32, 0, 0, ""), (8, 256, 16, "gates"), (8, 256, 16, "given"),
        ]:  # fmt: skip
            print(f"decode_step {rows} {width}->{splits} {adapters} of rank {rank} {how} bfloat16")
            p, wide, some = len(splits), adapters * rank > 512, max(1, adapters)
            group = operands.Group(
                half(sum(splits) + 256 * p, width), half(p, some, rank, width) if wide else None,
                half(some, rank, sum(splits)), array((layers, p, some), jnp.float32), splits,
                1e-5 if norm else None, 256, some, 0,
            )  # fmt: skip
            trace = (layers, rows, 7, 2) if how == "gates" else (1,)
            pages = array((layers * 512, 16, 16, 128), jnp.bfloat16)
            state = operands.StepState(pages, array(trace, jnp.int32), array(trace, jnp.float32), 512)
            limits = array((rows,), jnp.int32), array((rows,), jnp.float32)
            given = array((rows, 2), jnp.int32), array((rows, 2), jnp.float32)
            choice = operands.Choice(2, *limits) if how == "gates" else operands.Choice(2, None, None, *given)
            if how == "fused":
                choice = operands.Choice(2, None, None, *given, array((rows,), jnp.bool))
            choice = choice if adapters else None

            def step(x, squares, group, state, choice, angles, slots, residual, scales, epilogue=epilogue):
                stream = operands.ResidualStream(residual, x, squares)
                if epilogue == "qkv":
                    own = dict(angles=angles, slots=slots, head_dim=128)
                    return triton_gpu.qkv_step(1, stream, group, state, choice, **own)
                if epilogue == "silu":
                    return triton_gpu.silu_step(1, stream, group, state, choice)
                following = dict(next_scale=scales, next_layer=1)
                return triton_gpu.residual_step(1, x, group, state, choice, residual=residual, **following)

            angle, x = array((rows, 64), jnp.float32), array((max(8, rows), width), jnp.bfloat16)
            residual, squares = array((rows, 4096), jnp.bfloat16), array((rows, 128), jnp.float32)
            own = (angle, angle), array((rows,), jnp.int32), residual, half(4096)
            lower(step, x, squares, group, state, choice, *own)


def rankings() -> None:
    """Of a Llama-3-8B's q k v and down, by each rule; adapters of rank 8, 16 and 64."""
    array, rows = jax.ShapeDtypeStruct, 32
    for (width, splits), adapters, rank, rule in [
        (QKV, 28, 8, "arrow"), (QKV, 28, 8, "spectr"), (DOWN, 28, 16, "lag"), (QKV, 8, 64, "lag")
    ]:  # fmt: skip
        print(f"rank {rows} {width}->{splits} {adapters} of rank {rank} by {rule}")
        p, packed = len(splits), 32 + adapters * rank
        group = operands.Group(
            array((2, sum(splits) + p * packed, width), jnp.bfloat16), None,
            array((2, adapters, rank, sum(splits)), jnp.bfloat16), array((2, p, adapters), jnp.float32), splits,
            1e-5 if p > 1 else None, packed, adapters, 0,
        )  # fmt: skip
        vectors, matrices = (array((2, p, adapters, *(rank,) * n), jnp.float32) for n in (1, 2))
        own = array((rows,), jnp.int32), array((rows,), jnp.float32)
        limits = (array((rows, adapters), bool), own[0]) if rule == "lag" else (None, None)

        def run(product, squares, group, counts, temperatures, arrow, spectr, allowed, candidates, width=width):
            lying = choosing.Shrinks(1, rows, width, product, squares, group)
            return lying.rank(TopK(counts, temperatures, 4), arrow, spectr, allowed, candidates)

        product = array((rows, sum(splits) + p * packed), jnp.float32)
        squares = array((rows, 128), jnp.float32) if p > 1 else None
        given = (None if rule == "spectr" else vectors), (None if rule == "arrow" else matrices)
        lower(run, product, squares, group, *own, *given, *limits)


def quantised_products() -> None:
    """Of a Llama-3-8B's matrices and head, by the tiles that are chosen."""
    array = jax.ShapeDtypeStruct
    for kind, rows, (width, total, behind) in itertools.product(
        ("int8", "float8_e4m3fn", "uint8"), (1, 16, 32, 64), ((4096, 6144, 768), (14336, 4096, 0))
    ):
        print(f"quantised product {rows} {width}->{total} {kind}, {behind} rows behind")
        packed = kind == "uint8"
        scale = array((2, width // 128, total) if packed else (2, total), jnp.float32)
        zero = array((2, total, width // 64), jnp.uint8) if packed else None
        weight = QuantizedWeight(array((2, total, width // (1 + packed)), kind), scale, zero, turned=True, words=True)
        rest = array((2, behind, width), jnp.bfloat16) if behind else None
        run = functools.partial(quantised_gpu.product, 1, rows=rows)
        lower(run, array((max(8, rows), width), jnp.bfloat16), weight, rest)


def attentions() -> None:
    """Steps that decode and read prompts: of a Llama-3-8B, with eight query heads a key head, a token router's."""
    array = jax.ShapeDtypeStruct
    for rows, runs, heads, kv, width, kind in [
        (1, 0, 32, 8, 128, jnp.bfloat16), (64, 0, 32, 8, 128, jnp.bfloat16), (64, 4, 32, 8, 128, jnp.bfloat16),
        (64, 1024, 32, 8, 128, jnp.bfloat16), (64, 512, 64, 8, 128, jnp.bfloat16), (8, 32, 32, 8, 128, jnp.float32),
        (64, 128, 4, 4, 32, jnp.bfloat16), (64, 128, 1, 1, 256, jnp.bfloat16), (64, 128, 1, 1, 256, jnp.float32),
    ]:  # fmt: skip
        print(f"paged_attention {rows} and {runs} runs, {heads} heads, {kv} of keys, {width} {jnp.dtype(kind).name}")
        count = rows + runs * QUERY_BLOCK
        tokens = StepTokens(*(array(s, jnp.int32) for s in ((count,), (rows, 512), (runs,), (rows,))))
        pages = array((4096, 16, 2 * kv, width), kind)
        attend = functools.partial(paged_attention, first_block=512, implementation="triton")
        lower(attend, array((count, heads, width), kind), pages, tokens)


if __name__ == "__main__":
    main()
