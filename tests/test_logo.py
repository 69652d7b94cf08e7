"""LoGo: one pass of transformers' own model in float64 says which adapters a prompt gets, and how much of each."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from hooked import Adapter, read_adapters, routed_logits
from transformers import LlamaForCausalLM

import meteora_jax as mj
from meteora_jax import probing
from meteora_jax.config import InputError
from meteora_jax.engine import EngineCore
from meteora_jax.evaluation.problems import Problem
from meteora_jax.evaluation.systems import System, routing_kind
from meteora_jax.model import layout
from meteora_jax.model.rope import sequence_positions
from meteora_jax.routing.logo import Probe, observe_scores
from meteora_jax.routing.scores import GroupScores

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


def test_prompts_of_many_lengths_take_few_programs(world, monkeypatch):
    """A job's prompts in full passes of a few shapes, equal prompts once; each chooses as it does alone."""
    model, rng = world["model"], np.random.default_rng(3)
    prompts = [rng.integers(3, 300, n).tolist() for n in (*range(5, 189, 4), 41, 7)]
    shapes, run = [], probing._pass
    monkeypatch.setattr(
        probing, "_pass", lambda graph, weights, tokens, *rest: (
            shapes.append(tokens.shape), run(graph, weights, tokens, *rest))[1],
    )  # fmt: skip
    routers = model.after_pass(mj.Logo(2), [*prompts, *prompts])
    assert shapes == [(8, 256), (8, 256), (16, 128), (16, 64)]
    assert routers[: len(prompts)] == routers[len(prompts) :]
    for place in (0, 20, 47):  # of the shortest, one between, and one of a length that others have
        (alone,) = model.after_pass([mj.Logo(2)], [prompts[place]])
        assert [n for n, _ in alone.adapters] == [n for n, _ in routers[place].adapters]
        weights = [[w for _, w in r.adapters] for r in (alone, routers[place])]
        np.testing.assert_allclose(*weights, atol=1e-5)


def test_a_pass_is_full_but_for_the_last():
    found = list(probing.passes([700, 9, 65, 4000, *[30] * 40, 513, 200]))
    assert [(len(p.places), p.rows, p.length) for p in found] == [
        (1, 1, 4096), (2, 2, 1024), (8, 8, 256), (32, 32, 64), (3, 4, 64),
    ]  # fmt: skip
    assert sorted(place for p in found for place in p.places) == list(range(46))
    assert next(probing.passes([1] * 5)).rows == 16


def test_a_packed_model_says_the_same(world):
    """As accelerators have it: A's are rows behind the base's kernel."""
    model = mj.load(world["base"], world["bank"], world["gates"], dtype="float32")
    routers = [mj.Logo(2), mj.Logo(2, "inverse-entropy", "down_proj", 1)]
    plain = model.after_pass(routers, PROMPTS)
    graph, weights = layout.pack(model.graph, model._spectra)
    packed = dataclasses.replace(model, graph=graph, weights=weights).after_pass(routers, PROMPTS)
    for one, other in zip(plain, packed, strict=True):
        assert [n for n, _ in one.adapters] == [n for n, _ in other.adapters]
        np.testing.assert_allclose(*([w for _, w in r.adapters] for r in (one, other)), atol=1e-5)


def test_a_pass_reads_adapters_at_one_token(world):
    """What a pass computes beside the base does not grow with the prompt."""
    model, last = world["model"], jnp.zeros((2,), jnp.int32)

    def operations(length: int, router: Probe | None) -> float:
        def run(weights, tokens):
            llama = nnx.merge(model.graph, weights)
            observe = None if router is None else observe_scores
            return llama(tokens, sequence_positions(tokens, last), router, observe=observe)

        tokens = jax.ShapeDtypeStruct((2, length), jnp.int32)
        return jax.jit(run).lower(model._spectra, tokens).cost_analysis()["flops"]

    for score in ("spectr", "inverse-entropy"):
        short, long = (operations(n, Probe(score, last)) - operations(n, None) for n in (16, 64))
        assert 0 < long < 1.1 * short


def test_systems_with_as_many_adapters_are_asked_together(world):
    routers, problem = (mj.Logo(2), mj.Logo(2, within=("apple",)), mj.Logo(3)), Problem("0", "a", "?", "!")
    first, second, third = (
        routing_kind(System("logo", world["model"], lambda _, r=router: r), problem) for router in routers
    )
    assert first == second != third


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


def test_a_choice_of_a_whole_request_comes_to_the_host_once_a_token(world, monkeypatch):
    """Not for every layer and projection: of 20 adapters in 30 layers that is 34 KB a token."""
    model, run, shapes = world["model"], EngineCore._run, []

    def running(self, *given):
        result = run(self, *given)
        shapes.append(result.trace[0].shape)
        return result

    monkeypatch.setattr(EngineCore, "_run", running)
    for trace in (True, "response"):
        for completion in model.generate(PROMPTS, mj.Logo(2), max_new_tokens=3, routing=trace):
            assert completion.routing.indices.shape[1:] == (3, 7, 2)
        if trace == "response":
            assert {tokens for _, _, tokens, _, _ in shapes} <= {2, 8}  # of rows, not of prompts
        assert {(layers, projections) for _, layers, _, projections, _ in shapes} == {(1, 1)}
        shapes.clear()


def test_the_most_certain_adapter_has_the_highest_inverse_entropy():
    """Outputs so far apart that float32 finds no entropy at all."""
    outputs = jnp.asarray([[[200.0, 0.0, 0.0]], [[1.0, 0.0, 0.0]]])  # [A, R, O]
    group: Any = SimpleNamespace(b=outputs, splits=(3,), share=None, scale=jnp.ones((1, 2)))
    found = GroupScores._inverse_entropy(group, jnp.ones((1, 1, 1, 2, 1)))[0, 0, 0]
    assert np.isfinite(found).all()
    assert found[0] > found[1] > 0
