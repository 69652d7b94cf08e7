"""Tensor parallelism: what crosses devices, and that nothing of the layout shows in results or files."""

import dataclasses
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from extent import ALL
from flat_settings import flat
from meshes import mesh_of
from safetensors.numpy import load_file
from tiny import tiny_llama, tiny_peft

import meteora_jax as mj
from converters import import_adapters, import_base
from meteora_jax.config import PROJECTIONS, read_json
from meteora_jax.evaluation.tasks import Example
from meteora_jax.execution import ExecutionConfig
from meteora_jax.gate_config import GateConfig
from meteora_jax.io import hf_config
from meteora_jax.io.gates import save_gates
from meteora_jax.model.layout import with_execution
from meteora_jax.model.lora_linear import column_shards
from meteora_jax.planning import COLLECTIVES
from meteora_jax.sharding import shard_order

SHAPE = dict(hidden_size=64, intermediate_size=96, num_attention_heads=8, num_key_value_heads=4, head_dim=8)
ROWS = [[5, 6, 7, 8, 9, 300, 17], [7, 7, 40, 41, 319, 5, 0, 3]]
BANK, PLAIN = ("dora", "plain", "biased"), ("plain", "small")  # gradients of DoRA and biases are not trained
MESHES = {"1x1x4": (1, 1, 4), "2x1x2": (2, 1, 2)}
TASKS = {n: [Example(f"{n} {i} and more\n", f"{i} {n}") for i in range(8)] for n in PLAIN}
STEPS = 4
# peft warns of biases where the base has none, and mistakes them for tensors that were lost
pytestmark = pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed", "ignore:Adapter 'default'")


def test_columns_are_dealt_out_to_the_parts():
    assert shard_order((4, 2, 2), 2).tolist() == [0, 1, 4, 6, 2, 3, 5, 7]
    assert shard_order((3,), 1).tolist() == [0, 1, 2]
    config = hf_config.from_hf({"model_type": "llama", "vocab_size": 320, "num_hidden_layers": 3, **SHAPE})
    cuts = {t: [column_shards(config, group, t) for group in ("qkv", "o", "gate_up", "down")] for t in (1, 2, 4, 8, 5)}
    # eight devices would share four kv heads; five divide nothing
    assert cuts == {1: [1] * 4, 2: [2, 1, 2, 1], 4: [4, 1, 4, 1], 8: [1, 1, 8, 1], 5: [1] * 4}


def answers(folder: Path, mesh: Any) -> dict[str, np.ndarray]:
    """Logits by every kind of router, and tokens decoded after a prompt, in float32; with --all logits in bfloat16."""
    from meteora_jax.routing.retrieval import Composed

    load = lambda dtype: mj.load(folder / "base", folder / "bank", folder / "gates", mesh=mesh, dtype=dtype)  # noqa: E731
    model, found = load("float32"), {}
    fusion = Composed((("plain", 0.4), ("biased", 0.6)), True)
    routers = {"gates": mj.Gates(2), "requests": [mj.Fixed(dict.fromkeys(BANK, 1 / 3)), fusion]}
    for name, router in routers.items():
        logits = model.logits(ROWS, router)
        found[name] = np.concatenate([np.asarray(row)[: len(ids)] for row, ids in zip(logits, ROWS, strict=True)])
    found["said"] = np.asarray([c.token_ids for c in model.generate(ROWS, routers["gates"], 8)])
    found["asked"] = np.asarray([c.token_ids for c in model.generate(ROWS, routers["requests"], 8)])
    if mesh is not None:  # each device its share of the steps, as where kernels serve it
        graph = with_execution(model.graph, model.weights, ExecutionConfig(shares=True))
        shared = dataclasses.replace(model, graph=graph)
        for name, router in (("said", "gates"), ("asked", "requests")):
            again = np.asarray([c.token_ids for c in shared.generate(ROWS, routers[router], 8)])
            assert np.array_equal(again, found[name]), name
    if ALL:
        found["half"] = np.asarray(load("bfloat16").logits(ROWS[:1], routers["gates"]))[0]
    return found


def train(folder: Path, mesh: Any, dest: Path, run: Path | None = None) -> None:
    """Gates and adapters together, into `dest`; with a `run` its checkpoints are kept, and gone on from."""
    from meteora_jax.training.gates import train_gates
    from meteora_jax.training.settings import Checkpointing, GateTraining

    settings = flat(GateTraining, steps=STEPS, batch_size=4, rows=4, learning_rate=2e-3, max_length=60)
    keep = Checkpointing(run=run, save_every=2, keep=9)
    train_gates(
        folder / "base", folder / "trainable", TASKS, dest / "gates", settings, dtype="float32", mesh=mesh,
        checkpointing=keep, new_bank=dest / "bank",
    )  # fmt: skip


def crossings(compiled: Any, loops: int) -> dict[str, list[int]]:
    """{collective: [in the layers' forward, recomputed or backward, elsewhere]}; loops: scans around a layer, its own
    included."""
    found = {name: [0, 0, 0] for name in COLLECTIVES}
    for line in compiled.as_text().splitlines():
        match = re.search(rf" ({'|'.join(COLLECTIVES)})(?:-start)?\(", line)
        if match is None:
            continue
        name = (re.search(r'op_name="([^"]*)"', line) or [""])[0]
        layers = len(re.findall("closed_call|eval_jaxpr", name)) >= loops  # as jax 0.10 and 0.12 call a scan's body
        found[match[1]][0 if layers and "transpose" not in name else 1 if layers else 2] += 1
    return found


def counts(mesh: Any) -> dict[str, dict[str, list[int]]]:
    from meteora_jax import engine_plan, planning

    seen: list[dict[str, list[int]]] = []

    def collect(compiled: Any) -> dict[str, int]:
        seen.append(crossings(compiled, 2 if len(seen) == 2 else 1))  # decoding steps are a scan of their own
        return dict(Counter())

    plain, planning.collectives = planning.collectives, collect
    config = hf_config.from_hf({"model_type": "llama", "vocab_size": 320, "num_hidden_layers": 3, **SHAPE})
    planning.plan_training(config, 4, 4, mesh, rows=4, width=32, mfu=0.5)
    engine_plan.plan_generation(config, 4, 4, mesh, rows=4, width=32, mfu=0.5)
    planning.collectives = plain
    return dict(zip(("training", "prefill", "decoding"), seen, strict=True))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base whose heads four devices share, two banks and gates."""
    folder = tmp_path_factory.mktemp("parallel")
    hf = tiny_llama(folder, attention_bias=True, **SHAPE)[1]
    import_base(hf, folder / "base")
    options = {
        "dora": {"use_dora": True, "r": 3},
        "plain": {},
        "biased": {"lora_bias": True, "r": 6},
        "small": {"r": 2},
    }
    peft = {name: tiny_peft(folder, hf, name, seed=i, **o) for i, (name, o) in enumerate(options.items())}
    import_adapters(folder / "bank", folder / "base", {name: peft[name] for name in BANK})
    import_adapters(folder / "trainable", folder / "base", {name: peft[name] for name in PLAIN})
    config, rng = hf_config.from_hf(read_json(folder / "base" / "config.json")), np.random.default_rng(0)
    shape = lambda p: (3, config.projection_shape(p)[0], 3)  # noqa: E731
    gates = {p: (0.2 * rng.standard_normal(shape(p))).astype(np.float32) for p in PROJECTIONS}
    save_gates(folder / "gates", GateConfig(BANK, 2, 1.0), gates)
    return folder


@pytest.fixture(scope="module")
def trained(folder: Path) -> Path:
    """What training on the tensor axis wrote."""
    train(folder, mesh_of(1, 1, 4), folder / "trained", folder / "run")
    return folder / "trained"


def test_a_tensor_axis_computes_what_one_device_does(folder: Path):
    found = answers(folder, mesh_of(1, 1, 4))
    for name, want in answers(folder, None).items():
        if name in ("said", "asked"):
            assert np.array_equal(found[name], want)
        elif name == "half":
            assert np.abs(found[name] - want).mean() <= 0.05 * np.abs(want).mean()
        else:
            assert np.abs(found[name] - want).max() <= 1e-5 * np.abs(want).max(), name


@pytest.mark.parametrize("mesh", MESHES)
def test_what_crosses_devices(mesh: str):
    """One all-reduce a row-parallel group forward, one a column-parallel group backward; nothing is moved about."""
    for what, crossings in counts(mesh_of(*MESHES[mesh])).items():
        if mesh == "2x1x2" and what != "training":
            continue  # an engine is split along the tensor axis alone: its rows share one cache
        assert crossings["all-to-all"] == crossings["collective-permute"] == crossings["reduce-scatter"] == [0, 0, 0]
        assert crossings["all-gather"][:2] == [0, 0], what
        forward, backward, _ = crossings["all-reduce"]
        judged = mesh == "2x1x2" and what == "training"  # the gate's loss and gradient are summed over the batch
        assert forward == 2 + judged, what
        # o and down once more, and two of the backward pass
        assert backward == (4 + judged if what == "training" else 0), what


@pytest.mark.exhaustive("two trainings on and off a tensor axis")
def test_trained_adapters_are_saved_in_the_projections_order(folder: Path, trained: Path, tmp_path: Path):
    train(folder, None, tmp_path)
    for kind in ("bank", "gates"):
        ours, want = (load_file(f / kind / "weights.safetensors") for f in (trained, tmp_path))
        assert ours.keys() == want.keys()
        errors = {key: np.abs(ours[key] - want[key]) for key in want}
        # Adam makes steps of nearly equal size of gradients that are nothing but rounding: a few entries in a hundred
        assert all(e.max() <= 5e-4 and (e > 1e-5).mean() <= 0.02 for e in errors.values()), kind
    start, end = (load_file(f / "weights.safetensors") for f in (folder / "trainable", tmp_path / "bank"))
    assert np.abs(end["k_proj.b"] - start["k_proj.b"]).max() > 1e-3


@pytest.mark.exhaustive("two trainings on and off a tensor axis")
def test_a_run_goes_on_without_the_tensor_axis(folder: Path, trained: Path, tmp_path: Path):
    last = folder / "run" / "checkpoints" / str(STEPS)
    last.rename(folder / "run" / "checkpoints" / "moved")
    (folder / "run" / "checkpoints" / "moved").rename(tmp_path / "moved")
    train(folder, None, tmp_path, folder / "run")
    ours, want = (load_file(f / "bank" / "weights.safetensors") for f in (tmp_path, trained))
    assert all(np.abs(ours[key] - want[key]).max() <= 1e-5 for key in want)
