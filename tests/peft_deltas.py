"""What an adapter adds to each kernel: as a bank holds it, and as peft computes it."""

from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from meteora_jax.config import PROJECTIONS, BankConfig, read_json

LAYERS = 3


def module_of(projection: str) -> str:
    return f"{'self_attn' if projection[0] in 'qkvo' else 'mlp'}.{projection}"


def bank_deltas(bank: Path) -> dict[str, dict[tuple[int, str], torch.Tensor]]:
    """{adapter: {(layer, projection): scale * B @ A, [O, I]}} of every module that a bank's tensors stand for."""
    weights = load_file(bank / "weights.safetensors")
    config = BankConfig.from_json(read_json(bank / "bank.json"), "bank.json")
    assert {path: tuple(t.shape) for path, t in weights.items()} == config.weight_shapes()
    deltas: dict[str, dict[tuple[int, str], torch.Tensor]] = {name: {} for name in config.names}
    for p in config.ranks:
        a, b, scale = (weights[f"{p}.{part}"] for part in ("a", "b", "scale"))
        assert scale.dtype == torch.float32
        for layer in range(config.num_layers):
            for index, name in enumerate(config.names):
                delta = scale[layer, index] * b[layer, index].float().T @ a[layer, index].float()
                if scale[layer, index] == 0:
                    assert not a[layer, index].any()
                    assert not b[layer, index].any()
                else:
                    deltas[name][layer, p] = delta
    return deltas


def peft_deltas(hf: Path, adapter: Path) -> dict[tuple[int, str], torch.Tensor]:
    model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(hf), adapter)
    deltas = {}
    for layer in range(LAYERS):
        for p in PROJECTIONS:
            module = model.base_model.model.get_submodule(f"model.layers.{layer}.{module_of(p)}")
            if hasattr(module, "get_delta_weight"):
                deltas[layer, p] = module.get_delta_weight("default").detach()
    return deltas


def assert_same_deltas(found: dict[tuple[int, str], torch.Tensor], expected: dict[tuple[int, str], torch.Tensor]):
    assert found.keys() == expected.keys()
    for key, delta in expected.items():
        torch.testing.assert_close(found[key], delta, rtol=1e-5, atol=1e-6)
