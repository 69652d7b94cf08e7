"""Layers on a tensor axis inside `jax.shard_map`: every device runs its share of them as a narrower model of its own.

A share has some of the heads with their keys and values, and some of F. q k v, gate and up are its own columns, each
adapter's A whole and B's own columns. o and down take a share of the input, so base, gates' logits and shrinks are
summands: one all-reduce a group, of the product in a decoding step, of base and update where the routing is known
before. Everything else that a layer computes is a device's own, or the same on all; so what serves one device serves
them all: kernels of decoding steps, attention over its own heads' blocks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jax.sharding import PartitionSpec

from meteora_jax.config import GROUPS, LlamaConfig
from meteora_jax.model.lora_linear import GROUP_SIDES, column_shards
from meteora_jax.model.paged_cache import PagedCache
from meteora_jax.routing import BoundRouter
from meteora_jax.sharding import on_each, partitioned_mesh, spec

# Layers and their config, x, what all layers share, cache, router -> x, cache, what was observed.
Run = Callable[[Any, LlamaConfig, jax.Array, Any, Any, Any], tuple[jax.Array, Any, Any]]


def refusal(config: LlamaConfig, shares: int) -> str | None:
    """Why a tensor axis of so many devices cannot have a share each; None where it can."""
    if config.quantization is not None and shares > 1:
        return "a quantised base is not split by hand"
    if any(column_shards(config, group, shares) != shares for group in ("qkv", "gate_up")):
        sizes = f"{config.num_heads} heads, {config.num_kv_heads} kv heads, {config.intermediate_size} units"
        return f"tensor: expected a divisor of {sizes}, found {shares}"
    return None


def narrow(layers: Any, config: LlamaConfig, shares: int) -> LlamaConfig:
    """Makes of layers, whose arrays are one device's, what they are there; the config of that narrower model."""
    if shares == 1:
        return config
    for group in GROUPS:
        linear = getattr(layers, group)
        linear.share = "inputs" if GROUP_SIDES[group][0] == "inner" else "outputs"
        if linear.share == "outputs":
            linear.splits, linear.shards = tuple(o // shares for o in linear.splits), 1
            linear.base_rows = sum(linear.splits)
    heads = {"num_heads": config.num_heads // shares, "num_kv_heads": config.num_kv_heads // shares}
    own = dataclasses.replace(config, intermediate_size=config.intermediate_size // shares, **heads)
    layers.config = own
    return own


def run_shares(
    layers: Any, config: LlamaConfig, x: jax.Array, where: Any, cache: PagedCache | None, router: BoundRouter | None,
    run: Run,
) -> tuple[jax.Array, PagedCache | None, Any]:  # fmt: skip
    """`run` on every device of `use_mesh`'s mesh, each with its share of the layers.

    Args:
        x: [B, T, D]; whole sequences are split over the data axis, a step's tokens, which have a cache, are not. where,
            router: pytrees, whose arrays have B or 1 as their first dimension.
    """
    mesh = partitioned_mesh()
    assert mesh is not None
    graph, state = nnx.split(layers)
    leaves = nnx.to_flat_state(state)
    rows = PartitionSpec()
    if cache is None:
        rows = PartitionSpec(*spec(("batch", None, None), x.shape, mesh.shape)[:1])

    def by_row(tree: Any) -> Any:
        return jax.tree.map(lambda z: rows if z.ndim and z.shape[0] == x.shape[0] else PartitionSpec(), tree)

    def own(arrays: list[jax.Array], x: jax.Array, where: Any, cache: Any, router: Any) -> Any:
        held = [(path, leaf.replace(z)) for (path, leaf), z in zip(leaves, arrays, strict=True)]
        layers = nnx.merge(graph, nnx.from_flat_state(held))
        return run(layers, narrow(layers, config, mesh.shape["tensor"]), x, where, cache, router)

    weights = [spec(leaf.get_metadata("axes"), leaf.shape, mesh.shape) for _, leaf in leaves]
    pages = jax.tree.map(lambda z: spec((None, None, "heads", None), z.shape, mesh.shape), cache)
    return on_each(
        own, (weights, rows, by_row(where), pages, by_row(router)), (rows, pages, PartitionSpec(None, *rows)),
        [leaf[...] for _, leaf in leaves], x, where, cache, router,
    )  # fmt: skip


def run_alike(module: nnx.Module, *given: Any) -> Any:
    """`module(*given)` on every device of `use_mesh`'s mesh, each with all of everything; without a mesh, here."""
    if partitioned_mesh() is None:
        return module(*given)  # pyright: ignore[reportCallIssue]
    graph, state = nnx.split(module)
    whole = PartitionSpec()
    return on_each(lambda state, given: nnx.merge(graph, state)(*given), whole, whole, state, given)
