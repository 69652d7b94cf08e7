"""A plan's figures are those of the arrays and formulas; the TPU compiler itself is asked only where libtpu is."""

import dataclasses
import glob
import importlib.util
import json
import os
import re
import subprocess
import sys

import jax
import pytest
from extent import parameters

from meteora_jax import cli
from meteora_jax.cli import main
from meteora_jax.config import InputError
from meteora_jax.engine_plan import plan_generation, plan_serving
from meteora_jax.io import hf_config
from meteora_jax.planning import OutOfMemory, Plan, plan_training, shape_of
from meteora_jax.sharding import make_mesh
from meteora_jax.topologies import has_cuda_compiler, topology_devices
from meteora_jax.training.recipes import RECIPES

NO_LIBTPU = importlib.util.find_spec("libtpu") is None
TINY = hf_config.from_hf(
    dict(
        model_type="llama", vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )
)  # fmt: skip


def test_memory_and_flops_of_one_device():
    found = plan_training(TINY, 4, 8, make_mesh(devices=jax.devices()[:1]), rows=2, width=64, mfu=0.5)
    inputs = {"q": 64, "k": 64, "v": 64, "o": 64, "gate": 64, "up": 64, "down": 96}
    outputs = {"q": 64, "k": 32, "v": 32, "o": 64, "gate": 96, "up": 96, "down": 64}
    base = sum(2 * inputs[p] * outputs[p] for p in inputs) + 2 * 320 * 64 + 2 * 2 * 64 + 64
    bank = 2 * 4 * 8 * sum(inputs[p] + outputs[p] for p in inputs)
    gates = 2 * 4 * sum(inputs.values())
    # bfloat16 base and bank; float32 gates with two moments, scales, what scores are made of, and the batch
    scores = 4 * 2 * 7 * 4 * (8 + 8 * 8)
    expected = 2 * (base + bank) + 4 * 3 * gates + 4 * 2 * 7 * 4 + scores + 2 * 64 * (4 * 4 + 1)
    assert expected <= found.weights <= expected + 4096
    assert found.temporary > 0
    assert (found.memory, found.fits, found.seconds, found.devices) == (None, None, None, 1)
    assert set(found.collectives.values()) == {0}


def test_training_a_token_router_holds_the_model_that_its_step_does_not_read():
    mesh = make_mesh(devices=jax.devices()[:1])
    found = plan_training(TINY, 4, 8, mesh, rows=2, width=64, mfu=0.5, recipe=RECIPES["token-router"])
    assert found.weights >= sum(found.parts.values())
    assert found.parts["base"] > 2e5
    assert found.parts["adapters"] > 1e5


def test_generation_holds_weights_and_cache():
    mesh = make_mesh(devices=jax.devices()[:1])
    trained = plan_training(TINY, 4, 8, mesh, rows=2, width=64, mfu=0.5)
    prefill, decoding = plan_generation(TINY, 4, 8, mesh, rows=2, width=64, mfu=0.5, new_tokens=16)
    gates = 2 * 4 * sum({"q": 64, "k": 64, "v": 64, "o": 64, "gate": 64, "up": 64, "down": 96}.values())
    # no optimiser and another batch; keys and values bfloat16 of five blocks of 16 slots a row
    cache = 2 * 2 * (2 * 5 * 16) * 2 * 16 * 2
    expected = trained.weights - 4 * 2 * gates - 2 * 64 * (4 * 4 + 1) + cache
    assert 0 <= prefill.weights - expected <= 4096
    assert 0 <= prefill.weights - decoding.weights <= 4096  # the prompts' tokens
    assert decoding.flops < prefill.flops
    assert (prefill.what, decoding.what) == ("prefill", "decoding")


def test_a_server_has_the_blocks_that_memory_leaves():
    """A row's prompts and responses take five blocks; a device a little larger has as many more as go into it."""
    mesh = make_mesh(devices=jax.devices()[:1])
    how = dict(rows=2, width=64, new_tokens=16, mfu=0.5)
    block = 2 * 16 * 2 * 2 * 16 * 2  # layers, positions, keys and values, kv heads, width, bfloat16
    found = plan_serving(TINY, 4, 8, mesh, memory=10 * 2**20, **how)
    assert found.block_bytes == block
    used = found.weights + found.temporary + found.blocks * block
    assert 0.6 * 10 * 2**20 < used <= 0.95 * 10 * 2**20
    assert (found.requests, found.fits) == (found.blocks // 5, True)
    assert (found.step, found.rate) == (None, None)  # a CPU's rates are not known
    with pytest.raises(InputError, match="topology: expected devices whose memory is known, found cpu"):
        plan_serving(TINY, 4, 8, mesh, **how)


def test_what_does_not_fit_is_told_what_to_grow():
    plan = Plan("training", 8, "x", {"data": 8, "fsdp": 1, "tensor": 1}, 8, 2048, 90, 5, 80, 1.0, 1.0, {})
    assert not plan.fits
    assert "grow fsdp" in plan.advice()
    assert "grow tensor" in dataclasses.replace(plan, weights=10, temporary=90).advice()
    assert "--accumulate" in dataclasses.replace(plan, weights=10, temporary=90, rows=64).advice()
    assert dataclasses.replace(plan, weights=10).advice() == ""


@pytest.mark.parametrize(
    ("message", "needed", "available"),
    [
        (
            "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO "
            "temporaries (39.14T) exceeds available HBM (15.75G). HLO module: jit_step.",
            39.14 * 2**40, 15.75 * 2**30,
        ),
        (
            "RESOURCE_EXHAUSTED: XLA:TPU compile error. Ran out of memory in memory space hbm. Used 20.50G of "
            "15.75G hbm. Exceeded hbm capacity by 4.75G.",
            20.5 * 2**30, 15.75 * 2**30,
        ),
        ("RESOURCE_EXHAUSTED: (15.75G) exceeds available HBM (15.75G).", 15.75 * 2**30 + 1, 15.75 * 2**30),
    ],
)  # fmt: skip
def test_the_compilers_refusals_are_read(message, needed, available):
    found = OutOfMemory.from_message(message)
    assert found is not None
    assert (found.needed, found.available) == (int(needed), available)
    assert OutOfMemory.from_message("INTERNAL: (1.0G) exceeds available HBM (0.5G)") is None
    assert OutOfMemory.from_message("RESOURCE_EXHAUSTED: quota") is None


def test_without_libtpu_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    with pytest.raises(InputError, match=re.escape("pip install 'meteora-jax[tpu]'")):
        topology_devices("v5e:2x2")


@pytest.mark.skipif(NO_LIBTPU, reason="needs libtpu (meteora-jax[tpu])")
@pytest.mark.parametrize(("what", "key"), [("train", None), ("evaluate", "prefill")])
def test_what_the_compiler_refuses_does_not_fit(what, key, tmp_path, capsys):
    """That is the answer to the question, not an error: by how much, and which axis to grow."""
    options = ["--topology", "v5e:2x2", "--recipe", "meteora", "--width", "128"]
    options += ["--json", str(tmp_path / "plan.json")]
    main(["plan", what, "--base", "llama3-8b", *options])
    found = json.loads((tmp_path / "plan.json").read_text())
    found = found[key] if key else found
    assert found["fits"] is False
    assert found["collectives"] is None
    assert found["memory"] == 15.75 * 2**30
    assert found["excess"] == found["weights"] + found["temporary"] - found["memory"] > 0
    assert found["weights"] > 15.2e9  # each device holds the base, two bytes a weight
    said = capsys.readouterr().out
    assert f"does not fit: needs {found['needed'] / 2**30:.2f} GiB of 15.75 GiB a device, " in said
    assert f"{found['excess'] / 2**30:.2f} GiB too much; " in said
    assert found["advice"] in said
    assert "grow" in found["advice"]


@pytest.mark.skipif(NO_LIBTPU or bool(glob.glob("/dev/accel*")), reason="needs libtpu without a TPU")
def test_libtpu_is_quiet_where_there_is_no_tpu():
    """Its lines about a TPU that it did not find are none of a CPU's user's business."""
    env = {k: v for k, v in os.environ.items() if k != "JAX_PLATFORMS" and not k.startswith("TPU_")}
    program = "from meteora_jax.cli.devices import quiet_libtpu; quiet_libtpu(); import jax; jax.devices()"
    quiet = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True)
    assert (quiet.returncode, quiet.stderr) == (0, "")


def test_a_plan_s_programs_are_not_kept_on_disk(monkeypatch):
    """XLA cannot read them back: the same plan again would warn of every one."""
    used: list[bool] = []
    monkeypatch.setattr(cli.compilation_cache, "use", lambda: used.append(True))
    monkeypatch.setattr(cli, "ACTIONS", dict.fromkeys(cli.ACTIONS, lambda command: None))
    main(["plan", "train", "--base", "llama3-8b", "--topology", "v5e:2x2"])
    assert not used
    main(["bank", "list", "bank"])
    assert used


def test_a_plan_refuses_what_it_cannot_compile(capsys):
    with pytest.raises(InputError, match=r"llama3-8b.*found 'llama9'"):
        shape_of("llama9")
    with pytest.raises(InputError, match="expected a multiple of data x fsdp x accumulate = 3, found 2"):
        plan_training(TINY, 4, 8, make_mesh(devices=jax.devices()[:1]), rows=2, width=64, mfu=0.5, accumulate=3)
    for option, value, said in (
        ("--rank", "0", "--rank: expected 1 or more, found 0"),
        ("--adapters", "-1", "--adapters: expected 1 or more, found -1"),
        ("--rows", "0", "--rows: expected 1 or more, found 0"),
        ("--width", "0", "--width: expected 1 or more, found 0"),
        ("--new-tokens", "0", "--new-tokens: expected 1 or more, found 0"),
        ("--accumulate", "0", "--accumulate: expected 1 or more, found 0"),
        ("--top-k", "0", "--top-k: expected 1 or more, found 0"),
        ("--top-k", "29", "--top-k: expected at most the 28 adapters, found 29"),
    ):
        with pytest.raises(SystemExit, match="1"):
            main(["plan", "evaluate", "--base", "llama3-8b", "--topology", "v5e:2x2", option, value])
        assert said in capsys.readouterr().err
    with pytest.raises(SystemExit, match="1"):
        main(["plan", "train", "--base", "llama3-8b", "--topology", "kitten:2x2"])
    assert "topology: expected one that libtpu describes, found 'kitten:2x2'" in capsys.readouterr().err


def test_gpus_that_cannot_be_planned_for_are_refused(monkeypatch, capsys):
    for topology in ("h100", "h100:0", "a100:2x2"):
        with pytest.raises(InputError, match=f"topology: expected GPUS:COUNT as in h100:2, found '{topology}'"):
            topology_devices(topology)
    with pytest.raises(SystemExit, match="1"):
        main(["plan", "serve", "--base", "llama3-8b", "--topology", "h100:2"])
    said = capsys.readouterr().err
    assert "topology: expected a TPU's for serve (of GPUs train), found h100:2" in " ".join(said.split())
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=re.escape("pip install 'meteora-jax[gpu]'")):
        topology_devices("h100:2")


@pytest.mark.skipif(not has_cuda_compiler(), reason="needs XLA's compiler for GPUs (meteora-jax[gpu])")
def test_training_over_int4_compiles_for_two_gpus_that_are_not_there(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(hf_config.to_hf(TINY)))
    options = ["--topology", "h100:2", "--data", "1", "--fsdp", "2", "--width", "128", "--recipe", "meteora"]
    options += ["--weights", "int4", "--json", str(tmp_path / "plan.json")]
    main(["plan", "train", "--base", str(tmp_path), *options])
    found = json.loads((tmp_path / "plan.json").read_text())
    assert (found["devices"], found["device_kind"], found["memory"]) == (2, "NVIDIA H100 80GB HBM3", 79 * 2**30)
    assert found["fits"]
    assert found["collectives"]["all-gather"] > 0
    assert found["parts"]["scales"] > 0
    # the batch, and what the compiler pads
    assert found["weights"] == pytest.approx(sum(found["parts"].values()), rel=0.15)
    said = capsys.readouterr().out
    assert "of these: base" in said


@pytest.mark.skipif(NO_LIBTPU, reason="needs libtpu (meteora-jax[tpu])")
def test_a_tpu_step_compiles_without_a_tpu(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(hf_config.to_hf(TINY)))
    options = ["--topology", "v5e:2x2", "--data", "1", "--fsdp", "2", "--tensor", "2", "--width", "128"]
    options += ["--recipe", "meteora"]
    main(["plan", "train", "--base", str(tmp_path), "--json", str(tmp_path / "plan.json"), *options])
    found = json.loads((tmp_path / "plan.json").read_text())
    assert (found["devices"], found["device_kind"], found["rows"]) == (4, "TPU v5 lite", 2)
    assert found["fits"]
    assert found["weights"] >= sum(found["parts"].values())
    assert found["collectives"]["all-gather"] > 0


@pytest.mark.exhaustive("compiles ten programs; the counting is tested on a CPU by default")
@pytest.mark.skipif(NO_LIBTPU, reason="needs libtpu (meteora-jax[tpu])")
def test_a_server_is_planned_for_a_tpu_that_is_not_there(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(hf_config.to_hf(TINY)))
    options = ["--topology", "v5e:2x2", "--tensor", "2", "--width", "128", "--rows", "4", "--new-tokens", "32"]
    options += ["--recipe", "meteora"]
    main(["plan", "serve", "--base", str(tmp_path), "--json", str(tmp_path / "plan.json"), *options])
    found = json.loads((tmp_path / "plan.json").read_text())
    assert (found["devices"], found["device_kind"], found["rows"]) == (4, "TPU v5 lite", 4)
    assert found["fits"]
    used = found["weights"] + found["temporary"] + found["blocks"] * found["block_bytes"]
    assert 0.6 * 16 * 2**30 < used <= 0.95 * 16 * 2**30
    assert found["block_bytes"] >= 2 * 16 * 2 * 1 * 16 * 2  # one of two kv heads a device, and what its layout pads
    # a decoding step reads the weights and what its rows have in the cache, at 819 GB/s
    assert found["bound"] == "memory"
    assert found["step"] == pytest.approx((found["weights"] + 4 * 9 * found["block_bytes"]) / 819e9)
    assert "blocks that fit" in capsys.readouterr().out


@pytest.mark.skipif(NO_LIBTPU, reason="needs libtpu (meteora-jax[tpu])")
@pytest.mark.parametrize(
    ("topology", "chips"),
    parameters([("v5e:4x4", 16), ("v5e:16x16", 256)], [("v5e:4x4", 16)], "takes minutes"),
)
def test_evaluation_of_an_8b_model_compiles_for_a_pod(topology, chips, tmp_path):
    options = ["--topology", topology, "--tensor", "4", "--width", "256", "--json", str(tmp_path / "plan.json")]
    options += ["--recipe", "meteora"]
    main(["plan", "evaluate", "--base", "llama3-8b", "--adapters", "28", *options])
    found = json.loads((tmp_path / "plan.json").read_text())
    for what in ("prefill", "decoding"):
        assert (found[what]["devices"], found[what]["mesh"]) == (chips, {"data": chips // 4, "fsdp": 1, "tensor": 4})
        assert found[what]["fits"]
        assert found[what]["collectives"]["all-reduce"] > 0
        # a quarter of 16 GB of base weights, and the bank's and gates' share
        assert 4.0e9 < found[what]["weights"] < 5.5e9
