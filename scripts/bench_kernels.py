"""`bench.py --what kernel`: every implementation of a projection group's routed LoRA, base product included."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from bench_settings import Bench
from bench_timing import Timed, alternate, console, measurement, random_arrays
from least import Work, adapter_work, group_work

from meteora_jax.config import GROUPS, InputError, LlamaConfig
from meteora_jax.routing import Routing
from pallas_kernels.routed_lora import LoraBank, packing, routed_lora
from pallas_kernels.routed_lora.reference import einsum_float32
from pallas_kernels.routed_lora.triton_gpu import topk_gated_lora
from pallas_kernels.topk_gating import TopK, topk_gating

XLA = ("reference", "masked", "gathered", "grouped")
PACKED = {"packed_reference": "reference", "packed_masked": "masked", "packed_triton": "triton"}  # behind one product
AVAILABLE = {
    "cpu": (*XLA, "packed_reference"),
    "gpu": (*XLA, *PACKED),
    "tpu": (*XLA, "tpu_gathered", "tpu_dense", "packed_reference"),
}


def follow_product(
    x: jax.Array, packed: jax.Array, bank: LoraBank, rule: TopK, base: jax.Array, name: str
) -> jax.Array:
    """base + the update of x [M, I] behind its product with gates and A's packed [P, N, I]."""
    adapters, rank, _ = bank.b.shape
    first = packing.first_a_row(adapters)
    product = einsum_float32(x.dtype, "mi,pni->mpn", x, packed)
    if name == "triton":
        return topk_gated_lora(product.reshape(len(product), -1), bank, rule, base, adapters)[0]
    routing = Routing(*topk_gating(product[..., :adapters], rule))
    shrink = product[..., first : first + adapters * rank].reshape(*product.shape[:2], adapters, rank)
    return routed_lora(
        x, bank, routing, base, shrink=shrink, implementation="masked" if name == "masked" else "reference"
    )


def bench_kernel(bench: Bench, config: LlamaConfig, dtype: jnp.dtype, rates: Work) -> Iterator[dict[str, Any]]:
    """Every implementation of a projection group, over the weights of several layers."""
    backend = jax.default_backend()
    names = bench.implementation or AVAILABLE[backend]
    if unknown := sorted(set(names) - set(AVAILABLE[backend])):
        raise InputError(f"--implementation: expected {', '.join(AVAILABLE[backend])}; found {', '.join(unknown)}")
    if bench.routing != "gates":
        names = [name for name in names if name not in PACKED]
    layers, size, array = bench.layers or 8, jnp.dtype(dtype).itemsize, jax.ShapeDtypeStruct
    cases = itertools.product(bench.group, bench.adapters, bench.rank, bench.top_k)
    for group, adapters, rank, top_k in cases:
        projections = GROUPS[group]
        splits = tuple(config.projection_shape(p)[1] for p in projections)
        (i, _), o, count = config.projection_shape(projections[0]), sum(splits), len(projections)
        shapes = {"w": (i, o), "a": (count, adapters, rank, i), "b": (adapters, rank, o), "gate": (i, count, adapters)}
        arrays = {k: array(s, jnp.float32 if k == "gate" else dtype) for k, s in shapes.items()}
        weights = [random_arrays(arrays, seed) for seed in range(layers)]
        packed = [packing.pack_gates_and_a(w["gate"], w["a"]) for w in weights]
        scale = jnp.full((count, adapters), 20.0)  # makes updates about as large as what they are added to
        lengths = bench.sequence if bench.routing == "request" else (1,)
        for groups, tokens in ((b, s) for b in bench.batch for s in lengths):
            x = random_arrays(array((groups, tokens, i), dtype), 99)
            choices = min(top_k, adapters)
            counts, ones = jnp.full((groups,), choices, jnp.int32), jnp.ones((groups,), jnp.float32)
            key = jax.random.key(7)
            shared = jax.random.randint(key, (groups, 1, count, choices), 0, adapters, jnp.int32)
            given = Routing(shared, jnp.full(shared.shape, 1 / choices, jnp.float32))
            rule = TopK(counts, ones, choices)

            def bare(x, weights):
                return [x @ w["w"] for w in weights]

            def adapted(x, weights, packed, given, rule, name, splits=splits, scale=scale):
                ys = []
                for w, gate_and_a in zip(weights, packed, strict=True):
                    y, bank = x @ w["w"], LoraBank(w["a"], w["b"], scale, splits)
                    if name in PACKED:
                        ys.append(follow_product(x[:, 0], gate_and_a, bank, rule, y[:, 0], PACKED[name])[:, None])
                        continue
                    routing = given
                    if bench.routing == "gates":
                        gate = w["gate"].astype(x.dtype)
                        logits = jnp.einsum("gsi,ipa->gpa", x, gate, preferred_element_type=jnp.float32)
                        routing = Routing(*(z[:, None] for z in topk_gating(logits, rule)))
                    ys.append(routed_lora(x, bank, routing, y, implementation=name))
                return ys

            arguments = (x, weights, packed, given, rule)
            bare_call = jax.jit(bare)
            programs = {"bare": Timed(lambda _, call=bare_call, x=x, w=weights: call(x, w), calls=layers)}
            base, wanted = (
                f(*arguments[:n])[0].astype(jnp.float32)
                for f, n in ((bare_call, 2), (jax.jit(functools.partial(adapted, name="reference")), 5))
            )
            errors = {}
            for name in names:
                call = jax.jit(functools.partial(adapted, name=name))
                try:
                    y = jax.block_until_ready(call(*arguments))[0].astype(jnp.float32)
                except (NotImplementedError, jax.errors.JaxRuntimeError) as e:
                    console.print(
                        f"{group} {groups}x{tokens} A={adapters} R={rank} {name}: not timed: {e}", markup=False
                    )
                    continue
                errors[name] = float(jnp.linalg.norm(y - wanted) / jnp.linalg.norm(wanted - base))
                programs[name] = Timed(lambda _, call=call, arguments=arguments: call(*arguments), calls=layers)
            times = alternate(programs, bench.seconds / 2)
            rows = groups * tokens
            work = group_work(config, group, rows, size)
            work += adapter_work(config, group, rows, min(adapters, groups * choices), choices, rank, size)
            for name, ms in times.items():
                if name != "bare":
                    yield measurement(
                        ms, times["bare"], work, rates, what="kernel", shape=bench.shape,
                        top_k=top_k, adapters=adapters, rank=rank, batch=groups, sequence=tokens, group=group,
                        routing=bench.routing, implementation=name, error=errors[name],
                    )  # fmt: skip
