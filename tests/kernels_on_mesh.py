"""Run as a program with TRITON_INTERPRET=1 on two CPU devices: the engine's steps by the kernels on a tensor axis say
what one device says by XLA. tests/test_shares.py starts it.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from batches import answer
from flax import nnx
from test_gated_model import small
from triton_interpreter import RAN, interpret

import meteora_jax as mj
from meteora_jax.execution import ExecutionConfig
from meteora_jax.gate_config import TokenRouterForm
from meteora_jax.io.model_state import column_orders
from meteora_jax.model import layout
from meteora_jax.model.layout import base_arrays
from meteora_jax.model.routed_llama import RoutedCache
from meteora_jax.routing.retrieval import Composed
from meteora_jax.sharding import make_mesh, place, sharding
from pallas_kernels.decode_step import triton_gpu
from pallas_kernels.decode_step.triton_gpu import StepLimits
from pallas_kernels.routed_lora import packing

FEW = ExecutionConfig(step=StepLimits(rows=8, programs=1), shares=True)  # no prompts
PROMPTS = [[5, 6, 7, 8, 9, 300, 17], [11, 12, 13], [200], [3, 4]]


def on_mesh(model: mj.Meteora, mesh: Any, execution: ExecutionConfig, pack: bool = True) -> mj.Meteora:
    """The model's arrays on the mesh, each group's columns in the devices' parts."""
    graph = layout.with_execution(model.graph, model.weights, execution)
    module = nnx.merge(graph, model.weights)
    layout.lay_out(module, mesh.shape["tensor"])
    graph, state = nnx.split(module)
    orders, leaves = column_orders(model.config, mesh.shape["tensor"]), []
    for path, leaf in nnx.to_flat_state(state):
        value = np.asarray(leaf[...])
        if path[0] == "layers" and path[1] in orders and path[-1] in ("kernel", "lora_b"):
            value = value[..., orders[path[1]]]
        leaves.append((path, leaf.replace(place(value, sharding(mesh, leaf.get_metadata("axes"), value.shape)))))
    state = nnx.from_flat_state(leaves)
    graph, state = layout.pack(graph, state) if pack else (graph, state)
    return dataclasses.replace(model, graph=graph, weights=state, mesh=mesh)


def agree(one: mj.Meteora, mesh: mj.Meteora, routers: Any, kernels: set[str], steps: int = 2) -> None:
    """Tokens are those of one device, and so is the routing."""
    prompts = PROMPTS[: len(routers)]
    wanted, traced, expected = answer(one, prompts, routers, steps)
    RAN.clear()
    found, routing, engine = answer(mesh, prompts, routers, steps)
    assert kernels <= set(RAN), (kernels, set(RAN))
    assert found == wanted, routers
    for own, other in zip(routing or [], traced or [], strict=True):
        assert (own is None) == (other is None)
        if own is not None and other is not None:
            np.testing.assert_array_equal(own[0], other[0])
            np.testing.assert_allclose(own[1], other[1], atol=1e-4)
    cache = engine._state.cache
    if isinstance(cache, RoutedCache):
        for own, other in zip(*(jax.tree.leaves(e._state.cache.router) for e in (engine, expected)), strict=True):
            np.testing.assert_allclose(own, other, atol=1e-4)
    pages = getattr(cache, "model", cache).pages
    assert {s.data.shape[2] for s in pages.addressable_shards} == {pages.shape[2] // 2}, "heads are not split"


def main(everything: bool) -> None:
    """Without `everything` what a decoding step has most often: gates, named adapters, none, a token router."""
    interpret()
    packing.ROWS = 64  # fewer blocks of zeros to interpret
    mesh = make_mesh(1, 1, 2, devices=jax.devices()[:2])
    named = mj.Fixed({"cedar": 0.7, "apple": 0.4})
    epilogues = {*triton_gpu.KERNELS.values(), "decode_kernel"}

    model = small("float32", layers=1, null=True, smaller=True)
    held = on_mesh(model, mesh, FEW)
    agree(model, held, [None, named, mj.Gates(2)], epilogues)
    routed = small("float32", TokenRouterForm(width=64, depth=2), layers=1, null=True, smaller=True)
    agree(routed, on_mesh(routed, mesh, FEW), [mj.Gates(1, 3.0), None, mj.Fixed("birch")], epilogues)
    half = small("float16", layers=1, null=True, smaller=True)  # a prompt's, of each device's half of the columns
    prompts = on_mesh(half, mesh, ExecutionConfig(epilogue_tokens=8, shares=True))
    RAN.clear()
    wanted, found = (one.logits(PROMPTS, mj.Gates(2)) for one in (half, prompts))
    np.testing.assert_allclose(found, wanted, atol=2e-2)
    assert sorted(RAN) == ["add_expand_kernel"] * 6 + ["silu_expand_kernel"] * 2, RAN
    if not everything:
        return
    # what XLA chooses between product and epilogue, and matrices averaged
    fused = Composed((("cedar", 0.7), ("apple", 0.4)), True)
    agree(model, held, [mj.Lag(2, k=3), fused, None], {*epilogues, "weigh_kernel"})
    whole = base_arrays(held.graph, held.weights)["layers", "qkv", "kernel"]
    order = column_orders(model.config, 2)["qkv"]
    np.testing.assert_array_equal(whole, base_arrays(model.graph, model.weights)["layers", "qkv", "kernel"][..., order])
    np.testing.assert_allclose(held.logits(PROMPTS, mj.Gates(2)), model.logits(PROMPTS, mj.Gates(2)), atol=1e-4)
    wide = on_mesh(model, mesh, dataclasses.replace(FEW, dense_width=8))
    agree(model, wide, [mj.Gates(2), mj.Gates(1)], {*epilogues, "shrink_kernel"})


if __name__ == "__main__":
    main(sys.argv[1:] == ["all"])
    print("the same")
