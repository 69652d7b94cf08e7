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
from pallas_kernels.quantized_matmul.weight import in_words, turn, turn_back, word_block


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
    tied = model.lm_head is None
    scale = model.embed_scale if tied else model.lm_head_scale
    step = None if model.execution.shares else model.execution.step
    if scale is not None and step and not model.head_words and word_block(model.config.hidden_size, 0):
        head = in_words(model.embed[...], 0) if tied else turn(model.lm_head[...], 0)
        head, model.head_words = BaseParam(head, axes=("vocab", "model")), True
        model.embed, model.lm_head = (head, None) if tied else (model.embed, head)
    return nnx.split(model)


def base_arrays(graph: Any, weights: Any) -> dict[tuple[str, ...], jax.Array]:
    """The base's weights by path, as `load_base` has them: the model's own arrays, but for packed weights, whose rows
    are copied."""
    model = nnx.merge(graph, weights)
    base = (item for item in nnx.to_flat_state(weights) if isinstance(item[1], BaseParam) and item[0][-1] != "values")
    found = {tuple(map(str, path)): x[...] for path, x in base}
    for group in GROUPS:
        parts = getattr(model.layers, group).base_parts()
        found |= {("layers", group, name): value for name, value in parts.items()}
    return found | plain_head(model)


def plain_head(model: Llama) -> dict[tuple[str, ...], jax.Array]:
    """By path, as the base's file has it: the matrix of the logits, where it lies in words."""
    if not model.head_words:
        return {}
    if model.lm_head is None:
        return {("embed",): in_words(model.embed[...], 0, back=True)}
    return {("lm_head",): turn_back(model.lm_head[...], 0)}
