"""PHATGOOSE: own gates trained one adapter at a time, kept with the bank, and compared by the router."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from hooked import read_adapters, routed_logits, softmax_of_best
from safetensors.numpy import load_file, save_file
from transformers import LlamaForCausalLM

import converters
import meteora_jax as mj
from meteora_jax.bank import OwnGateParam
from meteora_jax.cli import main
from meteora_jax.config import GROUPS, InputError
from meteora_jax.io.bank import load_bank
from meteora_jax.io.base import load_base
from meteora_jax.io.model_state import assemble
from meteora_jax.training.own_gate import OwnGate, _alone

TOKENS = np.random.default_rng(3).integers(3, 300, (2, 11)).tolist()


def own_gated(world: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The world's bank with random gates of three adapters' own, in a new folder; birch has none."""
    shutil.copytree(world["bank"], folder)
    description = json.loads((folder / "bank.json").read_text())
    tensors, rng = load_file(folder / "weights.safetensors"), np.random.default_rng(7)
    for i, adapter in enumerate(description["adapters"]):
        if adapter["name"] == "birch":
            continue
        adapter["own_gate"] = True
        for p in adapter["targets"]:
            width = description["base_shapes"][p][0]
            own = tensors.setdefault(f"{p}.own_gate", np.zeros((description["num_layers"], 4, width), np.float32))
            own[:, i] = 0.3 + 2 * rng.standard_normal(own[:, i].shape)  # far from standard
    save_file(tensors, folder / "weights.safetensors")
    (folder / "bank.json").write_text(json.dumps(description))
    return {"bank": folder, "tensors": tensors, "model": mj.load(world["base"], folder, dtype="float32")}


@pytest.fixture(scope="module")
def gated(world, tmp_path_factory):
    return own_gated(world, tmp_path_factory.mktemp("own") / "bank")


def standard(z: torch.Tensor) -> torch.Tensor:
    return (z - z.mean(-1, keepdim=True)) / z.std(-1, correction=0, keepdim=True)


def rule_of(tensors, top_k):
    """One that knows which projection it is at by how often it was asked."""
    order, calls = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], [0]

    def rule(x, adapters):
        layer, p = divmod(calls[0], 7)
        calls[0] += 1
        own = tensors.get(f"{order[p]}.own_gate")
        scores = torch.full((len(x), 4), -torch.inf, dtype=x.dtype)
        for i, adapter in enumerate(adapters):
            if adapter is not None and own is not None and own[layer, i].any():
                v = torch.from_numpy(own[layer, i]).to(x.dtype)
                scores[:, i] = standard(x) @ standard(v) / x.shape[1] ** 0.5
        return softmax_of_best(scores, top_k)

    return rule


def test_the_router_is_the_paper_s_formula(world, gated):
    ours = np.asarray(gated["model"].logits(TOKENS, mj.Phatgoose(2)))
    for row, mine in zip(TOKENS, ours, strict=True):
        (theirs,) = routed_logits(world["hf_folder"], world["peft"], rule_of(gated["tensors"], 2), [row])
        np.testing.assert_allclose(mine, theirs, atol=2e-4)
    (trace,) = gated["model"].generate([TOKENS[0]], mj.Phatgoose(2), max_new_tokens=2)
    assert set(np.unique(trace.routing.indices)) == {-1, 0, 2, 3}, "birch has no gate of its own"


def test_a_model_packed_for_inference_reads_the_same(gated):
    from meteora_jax.execution import ExecutionConfig
    from meteora_jax.model.layout import pack, with_execution

    model = gated["model"]
    graph = with_execution(model.graph, model.weights, ExecutionConfig("gpu", dense_width=64))
    packed = pack(graph, model.weights)
    routers = [mj.Phatgoose(2), mj.Spectr(2)]
    (tokens, expected), bound = (TOKENS, model.logits(TOKENS, routers)), model.bind(routers, 2)
    positions = jnp.broadcast_to(jnp.arange(11, dtype=jnp.int32), (2, 11))
    module = nnx.merge(*packed)
    whole = nnx.jit(lambda m: m.logits(m(jnp.asarray(tokens, jnp.int32), positions, bound).hidden, bound))
    np.testing.assert_allclose(whole(module), expected, atol=1e-4)


def test_gates_train_as_torch_differentiates(world):
    """Of one adapter, in the model that trains: the loss's gradient by every gate of its own."""
    config, weights = load_base(world["base"], "float32")
    bank = _alone(load_bank(world["bank"], config, "float32"), 3)
    rng = np.random.default_rng(1)
    for z in bank.own_gate.values():
        z[:] = 0.3 * rng.standard_normal(z.shape)
    model = nnx.merge(*assemble(config, weights, bank, None, "float32"))
    graph, trained, rest = nnx.split(model, OwnGateParam, ...)
    tokens = jnp.asarray(TOKENS, jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(11, dtype=jnp.int32), tokens.shape)
    router = OwnGate().bind([OwnGate()] * 2, bank.names)

    def loss(trained: Any) -> jax.Array:
        model = nnx.merge(graph, trained, rest)
        logits = model.logits(model(tokens, positions, router).hidden, router)
        logp = jax.nn.log_softmax(logits[:, :-1])
        return -jnp.mean(jnp.take_along_axis(logp, tokens[:, 1:, None], axis=2))

    gradient = nnx.to_pure_dict(jax.jit(jax.grad(loss))(trained))["layers"]
    expected = torch_gradients(world, bank.own_gate)
    for group, projections in GROUPS.items():
        for at, p in enumerate(projections):
            for layer in range(config.num_layers if p in expected else 0):
                ours = gradient[group]["own_gate"][layer, at, 0]
                np.testing.assert_allclose(ours, expected[p][layer], atol=2e-6)
    assert set(expected) == {"o_proj", "k_proj", "down_proj"}


def torch_gradients(world, own_gate) -> dict[str, list[np.ndarray]]:
    model = LlamaForCausalLM.from_pretrained(world["hf_folder"]).double().eval()
    gates: dict[str, list[torch.Tensor]] = {}
    for name, module in model.named_modules():
        if not name.endswith("_proj"):
            continue
        (adapter,) = read_adapters({"daisy": world["peft"]["daisy"]}, name)
        if adapter is None:
            continue
        p, layer = name.rpartition(".")[2], int(name.split(".")[2])
        v = torch.tensor(own_gate[p][layer, 0], dtype=torch.float64, requires_grad=True)
        gates.setdefault(p, []).append(v)

        def add(module, inputs, output, v=v, adapter=adapter):
            x = inputs[0]
            return output + torch.sigmoid(x @ v)[..., None] * (x @ adapter.delta.T)

        module.register_forward_hook(add)
    logits, wanted = model(torch.tensor(TOKENS)).logits[:, :-1], torch.tensor(TOKENS)[:, 1:]
    torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), wanted.reshape(-1)).backward()
    return {p: [v.grad.numpy() for v in vs] for p, vs in gates.items()}


def test_a_command_trains_one_and_the_bank_keeps_it(world, gated, tmp_path):
    task = tmp_path / "tasks" / "apple"
    task.mkdir(parents=True)
    lines = [json.dumps({"prompt": f"How many? {n}", "response": str(n * 3)}) for n in range(12)]
    (task / "train.jsonl").write_text("\n".join(lines) + "\n")
    main([
        "train", "adapter", "--base", str(world["base"]), "--tasks", str(tmp_path / "tasks"), "--task", "apple",
        "--name", "birch", "--own-gate", str(gated["bank"]), "--out", str(tmp_path / "out"), "--steps", "3",
        "--batch-size", "2", "--learning-rate", "5e-3", "--dtype", "float32",
    ])  # fmt: skip
    before, after = (load_file(folder / "weights.safetensors") for folder in (gated["bank"], tmp_path / "out"))
    for key, was in before.items():
        own = after.pop(key)
        if key in ("q_proj.own_gate", "v_proj.own_gate"):  # where birch has a part
            assert np.abs(own[:, 1]).max() > 1e-3
            own[:, 1] = 0
        np.testing.assert_array_equal(own, was)
    assert not after
    model = mj.load(world["base"], tmp_path / "out", dtype="float32")
    assert all(adapter.own_gate for adapter in model.bank.adapters)


def test_banks_that_change_keep_own_gates(gated, tmp_path):
    bank = Path(shutil.copytree(gated["bank"], tmp_path / "bank"))
    converters.remove_adapters(bank, ["apple"])
    left = load_file(bank / "weights.safetensors")
    np.testing.assert_array_equal(left["o_proj.own_gate"], gated["tensors"]["o_proj.own_gate"][:, 1:])
    converters.remove_adapters(bank, ["cedar", "daisy"])  # birch is left, which has none
    assert not any(key.endswith("own_gate") for key in load_file(bank / "weights.safetensors"))
    fewer = dataclasses.replace(gated["model"]).remove_adapter("apple")
    assert fewer.bank.own_gates == ("k_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert np.isfinite(np.asarray(fewer.logits(TOKENS, mj.Phatgoose(1)))).all()


def test_an_export_says_that_the_own_gate_stays(gated, tmp_path, capsys):
    for name in ("apple", "birch"):
        main(["export", "adapter", str(gated["bank"]), name, str(tmp_path / name)])
        said = "its own gate stays in the bank alone" in capsys.readouterr().out
        assert said == (name == "apple")


def test_a_bank_without_own_gates_is_refused(world):
    with pytest.raises(InputError, match="train adapter --own-gate"):
        world["model"].logits(TOKENS, mj.Phatgoose(1))
