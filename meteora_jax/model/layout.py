"""How a whole model's weights lie: by device, packed for inference, and as the base's file has them."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import jax
from flax import nnx

from meteora_jax.bank import BaseParam
from meteora_jax.config import GROUPS
from meteora_jax.execution import ExecutionConfig
from meteora_jax.model.llama import Llama
from meteora_jax.model.lora_linear import column_shards
from meteora_jax.model.packed_linear import packed
from pallas_kernels.quantized_matmul.weight import turn, turn_back


def lay_out(model: Llama, tensor: int) -> None:
    """Says how the groups' columns will lie on a mesh of that tensor axis; their weights must be placed so."""
    for group in GROUPS:
        getattr(model.layers, group).shards = column_shards(model.config, group, tensor)


def with_execution(graph: Any, weights: Any, execution: ExecutionConfig) -> Any:
    """The graph definition of the same model, run otherwise; its weights stay."""
    model = nnx.merge(graph, weights)
    model.execution = execution
    return nnx.split(model)[0]


def pack(graph: Any, weights: Any, release: Collection[str] = ()) -> tuple[Any, Any]:
    """The model with every group as `packed` has it: what `mj.load` gives a GPU in 16 bit.

    release: groups whose kernel's memory is given back as soon as there is another; `weights` is then of no more use.
    """
    model = nnx.merge(graph, weights)
    for group in GROUPS:
        linear = getattr(model.layers, group)
        setattr(model.layers, group, packed(linear, model.has_gates, model.execution, model.dtype))
        if group in release and getattr(model.layers, group) is not linear:
            linear.kernel[...].delete()
    turns = model.lm_head_scale is not None and not model.head_turned and model.execution.step is not None
    if model.lm_head is not None and turns:
        model.lm_head, model.head_turned = BaseParam(turn(model.lm_head[...], 0), axes=("vocab", "model")), True
    return nnx.split(model)


def base_arrays(graph: Any, weights: Any) -> dict[tuple[str, ...], jax.Array]:
    """The base's weights by path, as `load_base` has them: the model's own arrays, but for packed weights, whose rows
    are copied."""
    model = nnx.merge(graph, weights)
    base = (item for item in nnx.to_flat_state(weights) if isinstance(item[1], BaseParam) and item[0][-1] != "values")
    found = {tuple(map(str, path)): x[...] for path, x in base}
    for group in GROUPS:
        found["layers", group, "kernel"] = getattr(model.layers, group).base_kernel()
    if model.lm_head is not None and model.head_turned:
        found["lm_head",] = turn_back(model.lm_head[...], 0)
    return found
