"""LoGo: one pass of transformers' own model in float64 says which adapters a prompt gets, and how much of each."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hooked import Adapter, read_adapters, routed_logits
from transformers import LlamaForCausalLM

import meteora_jax as mj
from meteora_jax.config import InputError

PROMPTS = [np.random.default_rng(i).integers(3, 300, n).tolist() for i, n in enumerate((11, 7))]


def norm(output: torch.Tensor) -> float:
    return output.norm().item()


def inverse_entropy(output: torch.Tensor) -> float:
    p = torch.softmax(output, dim=0)
    return 1 / -(p * p.log()).sum().item()


def weights_of(world, module: str, score, k: int, prompt: list[int]) -> np.ndarray:
    """[A], by an adapter's whole dW on the module's input at the last token."""
    model = LlamaForCausalLM.from_pretrained(world["hf_folder"]).double().eval()
    inputs = []
    model.get_submodule(module).register_forward_hook(lambda _, given, output: inputs.append(given[0][0, -1]))
    with torch.no_grad():
        model(torch.tensor([prompt]))
    adapters = read_adapters(world["peft"], module)
    scores = np.array([score(a.delta @ inputs[0]) if isinstance(a, Adapter) else 0.0 for a in adapters])
    scores[np.argsort(-scores)[k:]] = 0
    return scores / scores.sum()


@pytest.mark.parametrize(
    ("router", "module", "score"),
    [
        (mj.Logo(2), "model.layers.2.self_attn.q_proj", norm),  # apple and birch alone have a part
        (mj.Logo(2, "inverse-entropy", "down_proj", 1), "model.layers.1.mlp.down_proj", inverse_entropy),
    ],
    ids=["norm", "entropy"],
)
def test_a_prompt_s_mixture(world, router, module, score):
    model = world["model"]
    ours = np.asarray(model.logits(PROMPTS, router))
    completions = model.generate(PROMPTS, router, max_new_tokens=3)
    for prompt, mine, completion in zip(PROMPTS, ours, completions, strict=True):
        weights = weights_of(world, module, score, 2, prompt)
        traced = np.zeros(4)
        traced[completion.routing.indices[0, 0, 0]] = completion.routing.weights[0, 0, 0]
        np.testing.assert_allclose(traced, weights, atol=1e-5)
        constant = torch.from_numpy(weights)
        (theirs,) = routed_logits(
            world["hf_folder"], world["peft"], lambda x, _, w=constant: w.expand(len(x), 4), [prompt]
        )
        np.testing.assert_allclose(mine[: len(prompt)], theirs, atol=2e-4)


def test_it_stands_beside_others_and_within(world):
    model = world["model"]
    routers = [mj.Logo(1, within=("birch",)), mj.Fixed("birch")]
    first, second = model.logits([PROMPTS[0]] * 2, routers)
    np.testing.assert_allclose(first, second, atol=1e-5)


def test_bad_arguments_are_refused(world):
    for arguments in ({"k": 0}, {"score": "best"}, {"projection": "lm_head"}, {"layer": 0.5}, {"within": "birch"}):
        with pytest.raises(InputError, match=f"Logo: {next(iter(arguments))}"):
            mj.Logo(**arguments)
    for router, words in (
        (mj.Logo(layer=3), "layer: expected one of 3"), (mj.Logo(within=("nobody",)), "found 'nobody'"),
        (mj.Logo(within=("cedar",)), "expected one that adapters change"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=words):
            world["model"].logits(PROMPTS, router)
