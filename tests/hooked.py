"""transformers' own model in float64 whose projections add routed adapters by hooks: what routers are compared with."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM


class Adapter(NamedTuple):
    """One adapter at one projection: a [R, I], b [O, R], of PEFT's file; scale as PEFT has it."""

    a: torch.Tensor
    b: torch.Tensor
    scale: float

    @property
    def delta(self) -> torch.Tensor:
        """dW [O, I]."""
        return self.scale * self.b @ self.a


# x [T, I] and the adapters of a projection (None: one has no part there) -> weights [T, A]
Rule = Callable[[torch.Tensor, Sequence[Adapter | None]], torch.Tensor]


def read_adapters(folders: Mapping[str, Path], module: str) -> list[Adapter | None]:
    """Of each PEFT folder its adapter at a module such as model.layers.0.mlp.up_proj, float64."""
    found: list[Adapter | None] = []
    for folder in folders.values():
        tensors = load_file(folder / "adapter_model.safetensors")
        settings = json.loads((folder / "adapter_config.json").read_text())
        key = f"base_model.model.{module}.lora_"
        if f"{key}A.weight" not in tensors:
            found.append(None)
            continue
        a, b = (tensors[f"{key}{part}.weight"].double() for part in "AB")
        rank = settings["r"] ** 0.5 if settings.get("use_rslora") else settings["r"]
        found.append(Adapter(a, b, settings["lora_alpha"] / rank))
    return found


def routed_logits(
    hf_folder: Path, folders: Mapping[str, Path], rule: Rule, tokens: Sequence[Sequence[int]]
) -> list[np.ndarray]:
    """Logits [T, V] of each sequence with every projection routed by the rule."""
    model = LlamaForCausalLM.from_pretrained(hf_folder).double().eval()
    for name, module in model.named_modules():
        if not (name.endswith("_proj") and isinstance(module, torch.nn.Linear)):
            continue
        adapters = read_adapters(folders, name)

        def add(module, inputs, output, adapters=adapters):
            x = inputs[0][0]
            weights = rule(x, adapters)
            for weight, adapter in zip(weights.T, adapters, strict=True):
                if adapter is not None:
                    output = output + weight[None, :, None] * (x @ adapter.delta.T)[None]
            return output

        module.register_forward_hook(add)
    with torch.no_grad():
        return [model(torch.tensor([row])).logits[0].numpy() for row in tokens]


def softmax_of_best(scores: torch.Tensor, top_k: int, temperature: float = 1.0) -> torch.Tensor:
    """Weights [T, A] of scores [T, A], of which -inf is never chosen."""
    weights = torch.zeros_like(scores)
    for t, row in enumerate(scores):
        best = [i for i in sorted(range(len(row)), key=lambda i: -row[i]) if row[i] > -torch.inf][:top_k]
        if best:
            weights[t, best] = torch.softmax(row[best] / temperature, dim=0)
    return weights


def scores_of(
    x: torch.Tensor, adapters: Sequence[Adapter | None], score: Callable[[torch.Tensor, Adapter], torch.Tensor]
) -> torch.Tensor:
    """[T, A], -inf where an adapter has no part."""
    none = torch.full((len(x),), -torch.inf, dtype=x.dtype)
    return torch.stack([none if adapter is None else score(x, adapter) for adapter in adapters], dim=1)


def arrow(x: torch.Tensor, adapter: Adapter) -> torch.Tensor:
    """|v . x| by the whole dW's singular value decomposition."""
    return (x @ torch.linalg.svd(adapter.delta).Vh[0]).abs()


def spectr(x: torch.Tensor, adapter: Adapter) -> torch.Tensor:
    """||dW x||."""
    return (x @ adapter.delta.T).norm(dim=1)
