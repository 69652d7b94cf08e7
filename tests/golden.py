"""What transformers and peft compute of the real SmolLM2-135M-Instruct, in float64; `python tests/golden.py` writes it.

`fixtures/golden/real_model.json` has the packages' versions, the prompts' tokens and transformers' 64 greedy ones after
each; `real_model.npz` the last hidden states of every token. lm_head is the embedding, known by its SHA-256 as
the package `gguf` reads it; so every logit of transformers is known, within 1e-5, from 576 numbers a token.
"""

from __future__ import annotations

import copy
import hashlib
import importlib.metadata
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np

from meteora_jax.cli.demo import ASSETS, GGUF_NAME

if TYPE_CHECKING:
    import torch

GGUF = ASSETS.parents[1] / "runs" / "demo" / "download" / GGUF_NAME
GOLDEN = Path(__file__).parent / "fixtures" / "golden" / "real_model"
PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):",
    "Once upon a time, in 1984,",
    "[INST] Which is heavier, a ton of feathers or a ton of bricks? [/INST]\n",
    "Water boils at",
    "1 2 3 4 5 6",
    "Dear Sir or Madam,",
    "Q: Who wrote Hamlet?\nA:",
    "Ünïcödé text: 漢字",
    "import numpy as np\n",
)
ADAPTERS = ("winowhy", "object_counting")
NEW = 64  # greedy tokens after each prompt
PACKAGES = ("transformers", "peft", "torch", "gguf", "numpy")


def embedding() -> np.ndarray:
    """float32 [V, D], by `gguf`, which takes seconds to read the file's tokens: the model's lm_head as well."""
    (tensor,) = (t for t in gguf.GGUFReader(GGUF).tensors if t.name == "token_embd.weight")
    return gguf.dequantize(tensor.data, tensor.tensor_type)


def logits_of(hidden: np.ndarray, head: np.ndarray) -> np.ndarray:
    """float64 [T, V] of float32 [T, D] and [V, D]."""
    return hidden.astype(np.float64) @ head.astype(np.float64).T


def from_gguf() -> Any:
    """transformers' float32 model, by its own reading of the file."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(GGUF.parent, gguf_file=GGUF.name, dtype=torch.float32).eval()


def hidden_and_logits(model: Any, row: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """transformers' [T, D] after the last norm and [T, V], in the model's own type."""
    import torch

    with torch.no_grad():
        hidden = model.model(torch.tensor([row])).last_hidden_state
        return hidden[0].numpy(), model.lm_head(hidden)[0].numpy()


def with_adapter(model: Any, name: str) -> Any:
    """A copy of transformers' model, with one of the demo's adapters as peft puts it there."""
    from peft import PeftModel

    whole = PeftModel.from_pretrained(copy.deepcopy(model), ASSETS / "adapters" / name).eval()
    return whole.to(model.dtype).get_base_model()


def adapter_prompts() -> dict[str, str]:
    """{adapter: a test problem of its task}."""
    tests = {t["task"]: t["prompt"] for t in json.loads((ASSETS / "problems.json").read_text())["tests"]}
    return {name: tests[name] for name in ADAPTERS}


def greedy(model: Any, rows: list[list[int]]) -> torch.Tensor:
    """[B, NEW] tokens after rows that are padded on the left, with transformers' own cache."""
    import torch

    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(r)) + r for r in rows])
    mask = torch.tensor([[0] * (longest - len(r)) + [1] * len(r) for r in rows])
    positions, past, done = (mask.cumsum(1) - 1).clamp(min=0), None, []
    for _ in range(NEW):
        with torch.no_grad():
            out = model(
                ids, attention_mask=mask, position_ids=positions, past_key_values=past, use_cache=True, logits_to_keep=1
            )
        ids, past, positions = out.logits[:, -1].argmax(-1, keepdim=True), out.past_key_values, positions[:, -1:] + 1
        mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
        done.append(ids)
    return torch.cat(done, dim=1)


def read() -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The two files: what the JSON holds, and {prompt's number or adapter's name: float32 [T, D]}."""
    with np.load(GOLDEN.with_suffix(".npz")) as arrays:
        return json.loads(GOLDEN.with_suffix(".json").read_text()), dict(arrays)


def write() -> None:
    """Computes everything; a few minutes of one core."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(GGUF.parent, gguf_file=GGUF.name)
    single = from_gguf()
    double, head, hidden = copy.deepcopy(single).double(), embedding(), {}
    assert head.dtype == np.float32

    def keep(key: str, states: np.ndarray, logits: np.ndarray) -> None:
        hidden[key] = states.astype(np.float32)
        assert np.abs(logits_of(hidden[key], head) - logits).max() < 1e-5

    rows = [tokenizer(p)["input_ids"] for p in PROMPTS]
    prompts = []
    for i, (text, row, new) in enumerate(zip(PROMPTS, rows, greedy(single, rows).tolist(), strict=True)):
        states, logits = hidden_and_logits(double, row + new)
        keep(str(i), states[: len(row)], logits[: len(row)])
        choices = logits[len(row) - 1 : -1]
        assert choices.argmax(-1).tolist() == new  # greedy of float64 as well, and no cache changes it
        best = np.sort(choices, -1)[:, -2:]
        error = np.abs(hidden_and_logits(single, row)[1] - logits[: len(row)]).max()
        numbers = {"least_margin": float((best[:, 1] - best[:, 0]).min()), "error_of_float32": float(error)}
        prompts.append({"text": text, "token_ids": row, "greedy": new, **numbers})
        print(prompts[-1], flush=True)
    adapters = {
        name: {"text": text, "token_ids": tokenizer(text)["input_ids"]} for name, text in adapter_prompts().items()
    }
    for name, prompt in adapters.items():
        keep(name, *hidden_and_logits(with_adapter(double, name), prompt["token_ids"]))
    content = {
        "made_by": "python tests/golden.py",
        "versions": {p: importlib.metadata.version(p) for p in PACKAGES},
        "embedding_sha256": hashlib.sha256(head.tobytes()).hexdigest(),
        "gguf_sha256": hashlib.sha256(GGUF.read_bytes()).hexdigest(),
        "prompts": prompts,
        "adapters": adapters,
    }
    GOLDEN.parent.mkdir(parents=True, exist_ok=True)
    GOLDEN.with_suffix(".json").write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n")
    np.savez_compressed(GOLDEN.with_suffix(".npz"), **hidden)


if __name__ == "__main__":
    write()
