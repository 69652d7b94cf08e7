"""What tests of broken folders share: an adapter to break, an import that must not harm, and the logits to compare."""

import contextlib
import copy
import dataclasses
import json
import resource
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM
from transformers.utils import logging

from converters.hf_llama import module_name
from meteora_jax.config import ENDS, BankConfig, InputError, read_json

CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
INDEX = "model.safetensors.index.json"
IDS = torch.tensor([[5, 6, 7, 8, 9, 300, 17]])
MEMORY = 48 << 10  # KiB that the high-water mark may rise in one import
VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 4, 3.5, -2.5, float("nan"), float("inf"), 10**30, "", "x", "none", "all", "(",
    "lora_only", "all-linear", "q_proj", ".*q_proj", ".*", "gaussian", "pissa", "eva", "CAUSAL_LM", "SEQ_CLS",
    [], [0], [1], [7], ["q_proj"], ["q_proj", "v_proj"], ["lm_head"], ["embed_tokens"], [None], {},
    {"q_proj": 2}, {"layers.1.*": 3}, {"(": 2}, {"q_proj": "x"}, {"q_proj": -1}, {"x": {"y": []}},
]  # fmt: skip


@dataclasses.dataclass
class Folder:
    """A sound adapter in memory, to be broken and written."""

    tensors: dict[str, torch.Tensor]
    config: dict[str, Any]
    pickled: bool
    after: list[Callable[[Path], None]] = dataclasses.field(default_factory=list)  # breaks the written files

    def write(self, path: Path) -> None:
        path.mkdir()
        (path / CONFIG).write_text(json.dumps(self.config))
        if self.pickled:
            torch.save(self.tensors, path / PICKLED)
        else:
            sound = {k: v.contiguous() for k, v in self.tensors.items() if isinstance(v, torch.Tensor)}
            save_file(sound, path / WEIGHTS)
        for damage in self.after:
            damage(path)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """peft and transformers say a lot about broken folders."""
    level = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    logging.set_verbosity(level)


def logits(model: torch.nn.Module) -> np.ndarray:
    with torch.no_grad():
        return model(IDS).logits[0].numpy()


def bank_logits(model: LlamaForCausalLM, bank: Path) -> np.ndarray:
    """Logits of a torch model whose weights are changed as bank.json's format says."""
    model = copy.deepcopy(model)
    tensors = load_file(bank / "weights.safetensors")
    config = BankConfig.from_json(read_json(bank / "bank.json"), "bank.json")
    assert {k: tuple(t.shape) for k, t in tensors.items()} == config.weight_shapes()
    with torch.no_grad():
        for p in config.ranks:
            for layer in range(config.num_layers):

                def part(kind, p=p, layer=layer):
                    return tensors[f"{p}.{kind}"][layer, 0].float()

                linear: Any = model.get_submodule(f"model.layers.{layer}.{module_name(p)}")
                linear.weight += part("scale") * (part("b").T @ part("a"))
                if p in config.dora:
                    linear.weight *= 1 + part("dora")[:, None]
                if p in config.lora_bias:
                    linear.bias += part("scale") * part("bias")
        for end, held in config.vocab_adapters.items():
            weight: Any = model.get_submodule(ENDS[end]).weight  # [V, D]
            if held.rank:
                left, right = ("a", "b") if end == "embed" else ("b", "a")
                weight += tensors[f"{end}.scale"][0] * tensors[f"{end}.{left}"][0].T @ tensors[f"{end}.{right}"][0]
            for row, token in enumerate(held.tokens[0]):
                weight[token] = tensors[f"{end}.rows"][0, row]
    return logits(model)


def tree(root: Path) -> dict[str, int]:
    return {str(p.relative_to(root)): p.lstat().st_size for p in root.rglob("*")}


def attempt(call: Callable[[], Any], root: Path, dest: Path) -> InputError | None:
    """Runs an import: refused in one line, or done; nothing else changes below `root`, and memory stays flat."""
    before, peak = tree(root), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refusal = None
    try:
        call()
    except InputError as e:
        refusal = e
    assert refusal is None or ("\n" not in str(refusal) and 10 < len(str(refusal)) < 20_000)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < MEMORY
    after = {k: v for k, v in tree(root).items() if not k.startswith(str(dest.relative_to(root)))}
    assert after == before
    assert dest.exists() == (refusal is None)
    return refusal
