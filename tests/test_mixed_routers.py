"""Rows of all kinds of router in one batch of the engine: each has what it has alone, which transformers computes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hooked import arrow, routed_logits, scores_of, softmax_of_best, spectr
from test_logo import norm, weights_of
from test_phatgoose import own_gated, rule_of
from worlds import NAMES

import meteora_jax as mj
from meteora_jax.cli import main
from meteora_jax.config import PROJECTIONS, AdapterInfo, BankConfig, InputError
from meteora_jax.engine import EngineCore, EngineSize
from meteora_jax.engine.step import run_steps
from meteora_jax.evaluation.problems import Problem
from meteora_jax.evaluation.systems import Given, check_routes, make_system
from meteora_jax.gate_config import GateConfig
from meteora_jax.routing.alora import Invoked
from meteora_jax.routing.known import bind_known
from meteora_jax.routing.named import named_router, read_router
from meteora_jax.routing.retrieval import Composed
from meteora_jax.training.own_gate import OwnGate

PROMPTS = [np.random.default_rng(i).integers(3, 300, 9 + 4 * i).tolist() for i in range(8)]
NEW = 5


def by(score, top_k, temperature=1.0):
    def rule(x, adapters):
        return softmax_of_best(scores_of(x, adapters, score), top_k, temperature)

    return rule


def lag(k, top_k):
    def rule(x, adapters):
        first, scores = (scores_of(x, adapters, score) for score in (arrow, spectr))
        return softmax_of_best(torch.where(softmax_of_best(first, k) > 0, scores, -torch.inf), top_k)

    return rule


def cedar(x, adapters):
    return torch.tensor([[0.0, 0.0, 1.0, 0.0]], dtype=x.dtype).expand(len(x), -1)


ROUTERS = {  # one a prompt, and what it is in float64
    mj.Arrow(2): by(arrow, 2), mj.Arrow(1, 0.3): by(arrow, 1), mj.Spectr(2, 0.7): by(spectr, 2, 0.7),
    mj.Lag(1, k=2): lag(2, 1), mj.Fixed("cedar"): cedar, mj.Lag(2, k=3): lag(3, 2),
}  # fmt: skip


@pytest.fixture(scope="module")
def routed(world, tmp_path_factory):
    """The model of a bank with own gates; the routers, one a prompt, and their rules."""
    gated = own_gated(world, tmp_path_factory.mktemp("own") / "bank")
    model, rules = gated["model"], dict(ROUTERS)
    rules[mj.Phatgoose(2)] = rule_of(gated["tensors"], 2)
    (chosen,) = model.after_pass([mj.Logo(2)], [PROMPTS[len(rules)]])  # of the prompt alone, without its response
    mixture = weights_of(world, "model.layers.2.self_attn.q_proj", norm, 2, PROMPTS[len(rules)])
    rules[chosen] = lambda x, _: torch.from_numpy(mixture).expand(len(x), 4)
    return model, rules


@pytest.fixture(scope="module")
def served(routed):
    """The tokens of each prompt, all in one engine at once."""
    model, rules = routed
    engine = EngineCore(model.graph, model.weights, model.config, EngineSize(8, 264, 64, 8), few_programs=True)
    routers = zip(PROMPTS, rules, strict=True)
    handles = [engine.submit(model.request(prompt, router, NEW)) for prompt, router in routers]
    before = run_steps._cache_size()
    engine.drain()
    assert run_steps._cache_size() - before <= 3, "no program for every set of kinds that is left"
    assert engine.counters.dispatches <= NEW + 1, "all are read and decoded together"
    return [handle.progress.tokens for handle in handles]


def test_a_mixed_batch_is_one_by_one(world, routed, served):
    model, rules = routed
    rows = [prompt + tokens for prompt, tokens in zip(PROMPTS, served, strict=True)]
    together = np.asarray(model.logits(rows, list(rules)))
    for row, ours, rule, prompt, tokens in zip(rows, together, rules.values(), PROMPTS, served, strict=True):
        (alone,) = routed_logits(world["hf_folder"], world["peft"], rule, [row])
        np.testing.assert_allclose(ours[: len(row)], alone, atol=3e-4)
        likeliest = alone[len(prompt) - 1 : -1].argmax(axis=1)
        ended = np.isin(likeliest, model.config.eos_token_ids)
        assert tokens == likeliest[: len(tokens)].tolist()
        assert not ended[: len(tokens)].any()
        assert len(tokens) == NEW or alone[-1].argmax() in model.config.eos_token_ids


def test_a_name_makes_a_router(world):
    names = world["model"].adapter_names
    assert named_router("arrow", names) == mj.Arrow(4)
    assert named_router("arrow", names[:3]) == mj.Arrow(3)
    assert named_router("lag", names, 2, 0.5, names[:2]) == mj.Lag(top_k=2, temperature=0.5, within=names[:2])
    assert named_router("logo", names, 2) == mj.Logo(2)
    assert named_router("uniform", names) == mj.Fixed(dict.fromkeys(names, 0.25))
    assert read_router("spectr", None, names, 1) == mj.Spectr(1)
    for text, said in (("a=1,a=2", "expected each adapter once, found 'a' twice"), ("a,b", "NAME=WEIGHT, found 'a'")):
        with pytest.raises(InputError, match=said):
            read_router(text, None, ("a", "b"))
    assert read_router("arrow", None, ("arrow", "b")) == mj.Fixed("arrow"), "an adapter hides a router of its name"
    for arguments, words in (
        (("best", names), "expected one of arrow"), (("arrow", ()), "expected a bank"),
        (("logo", names, 1, 0.5), "no temperature"), (("uniform", names, 2), "expected all"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=words):
            named_router(*arguments)


def test_generate_takes_its_name(world, capsys):
    options = ["--base", str(world["base"]), "--bank", str(world["bank"]), "--max-new-tokens", "3"]
    main(["generate", "hello there", *options, "--router", "arrow", "--gate-top-k", "2"])
    text = capsys.readouterr().out
    (expected,) = world["model"].generate(["hello there"], mj.Arrow(2), max_new_tokens=3)
    assert text == f"{expected.text}\n"


def test_systems_have_these_names(world):
    given = Given(world["model"])
    problem = Problem("apple/test/0", "apple", "hello", "so")
    for name, router in {
        "arrow-top2": mj.Arrow(2), "spectr-top1-t0.5": mj.Spectr(1, 0.5), "lag-top2": mj.Lag(top_k=2),
        "logo-k2": mj.Logo(2), "phatgoose-top2": mj.Phatgoose(2), "uniform": mj.Fixed(dict.fromkeys(NAMES, 0.25)),
        "arrow-top2-unseen": mj.Arrow(2, within=NAMES[1:]), "logo-k3-unseen": mj.Logo(3, within=NAMES[1:]),
        "uniform-unseen": mj.Fixed(dict.fromkeys(NAMES[1:], 1 / 3)),
    }.items():  # fmt: skip
        assert make_system(name, given).route(problem) == router
    for name in ("arrow-top2-k3", "logo-top2", "uniform-top2", "arrow-top0"):
        with pytest.raises(InputError, match=r"--systems: .*found"):
            make_system(name, given)
    with pytest.raises(InputError, match="arrow-top5: expected at most 4"):
        check_routes([make_system("arrow-top5", given)], [problem])


def test_routers_of_the_same_rows_are_joined_once():
    import jax
    from test_gated_model import small

    from meteora_jax.engine.batch import JoinedRouters, join_routers

    model, joined = small("float32"), JoinedRouters()
    rows = [model.request([5], router, 1).router for router in (mj.Fixed("cedar"), None, mj.Gates(2))]
    first = joined.of(rows, 4, ())
    assert joined.of(list(rows), 4, ()) is first
    for other, count, beside in ((rows[::-1], 4, ()), (rows, 8, ()), (rows[:1], 4, ()), (rows, 4, rows[:1])):
        found, wanted = joined.of(other, count, beside), join_routers(other, count, beside)
        assert found is not first
        same = jax.tree.map(lambda x, y: bool((x == y).all()), found, wanted)
        assert all(jax.tree.leaves(same))


@pytest.mark.parametrize(
    "routers",
    [
        [mj.Gates(2), None],
        [mj.Gates(1, within=("apple", "cedar")), None],
        [mj.Fixed({"apple": 0.5, "elm": 1.0}), None],
        [Composed((("apple", 1.0), ("cedar", 1.0)), True), None],
        [mj.Arrow(2), mj.Spectr(1)],
        [mj.Lag(1, k=3), None],
        [mj.Fixed("apple"), mj.Gates(2)],
        [mj.Fixed("waits"), None],
        [OwnGate(), None],
    ],
    ids=repr,
)
def test_routers_are_bound_on_the_host(routers):
    """An array made on the device would be read once the device is through with the steps before it."""
    import jax

    names = (*NAMES, "elm")
    invoked = [AdapterInfo("waits", 2, PROJECTIONS, "", "", {}, invocation=(7, 8))]
    infos = [AdapterInfo(name, 2, PROJECTIONS, "", "", {}) for name in names]
    waits = routers[0] == mj.Fixed("waits")
    bank = BankConfig(tuple(invoked if waits else infos), dict.fromkeys(PROJECTIONS, 2), 1, {})
    gates = None if waits else GateConfig(names, 2, 1.0, None)
    bound = bind_known(routers, bank, gates, 2, [[5, 7, 8], [5]])
    assert isinstance(bound, Invoked) == waits
    assert {type(leaf) for leaf in jax.tree.leaves(bound)} == {np.ndarray}
