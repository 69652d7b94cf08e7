"""What the command line refuses: one line and status 1; wrong usage is status 2."""

import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_cli import refused, run
from tiny import edit_json, tiny_llama

import converters
import meteora_jax as mj
from meteora_jax.cli import main
from meteora_jax.config import InputError


def broken(world, tmp_path, kind, change):
    """A copy of one of the world's folders, changed."""
    copy = tmp_path / f"broken_{kind}"
    shutil.copytree(world[kind], copy)
    change(copy)
    return copy


def truncate(folder):
    file = folder / "weights.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def reshape(folder):
    tensors = load_file(folder / "weights.safetensors")
    key = next(k for k in tensors if "up_proj" in k)
    tensors[key] = np.swapaxes(tensors[key], -1, -2).copy()
    save_file(tensors, folder / "weights.safetensors")


def drop(folder):
    tensors = load_file(folder / "weights.safetensors")
    tensors.pop(next(k for k in tensors if "down_proj" in k))
    save_file(tensors, folder / "weights.safetensors")


CHANGES = {
    "truncated": (truncate, "weights.safetensors: expected a complete safetensors file"),
    "reshaped": (reshape, "up_proj"),
    "dropped": (drop, "found no such tensor"),
    "no_weights": (lambda f: (f / "weights.safetensors").unlink(), "expected a file, found none"),
}


@pytest.mark.parametrize("kind", ["base", "bank", "gates"])
@pytest.mark.parametrize("change", CHANGES)
def test_damaged_folders_are_refused(tmp_path, capsys, world, kind, change):
    damage, said = CHANGES[change]
    folders = {k: world[k] for k in ("base", "bank", "gates")}
    folders[kind] = broken(world, tmp_path, kind, damage)
    line = refused(capsys, "generate", "x", *(w for k, v in folders.items() for w in (f"--{k}", v)))
    assert said in line
    assert f"broken_{kind}" in line


def test_wrong_companions_are_refused(tmp_path, capsys, world):
    _, other = tiny_llama(tmp_path, hidden_size=32, folder="other")
    converters.import_base(other, tmp_path / "base")
    line = refused(capsys, "generate", "x", "--base", tmp_path / "base", "--bank", world["bank"])
    assert "bank.json: base_shapes.q_proj: expected (32, 32)" in line
    foreign = broken(
        world, tmp_path, "gates", lambda f: edit_json(f / "gates.json", names=["apple", "birch", "cedar", "elm"])
    )
    line = refused(capsys, "generate", "x", "--base", world["base"], "--bank", world["bank"], "--gates", foreign)
    assert "gates.json: names" in line
    assert "'daisy'" in line
    assert "'elm'" in line


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["generate", "x", "--base", "nowhere"], "nowhere/config.json: expected a file, found none"),
        (["import", "base", "nowhere", "dest"], "nowhere"),
        (["import", "adapters", "dest", "apple", "--base", "b"], "expected NAME=PEFT_DIR, found 'apple'"),
        (["inspect", "."], "expected config.json, bank.json, gates.json, index.json or encoder.json"),
        (["demo", "--assets", "nowhere"], "expected the demo's adapters"),
    ],
)
def test_missing_input_is_refused(tmp_path, capsys, monkeypatch, args, said):
    monkeypatch.chdir(tmp_path)
    assert said in refused(capsys, *args)
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_was_not_imported_is_told_the_import(tmp_path, capsys, world):
    hf, gguf, several = world["hf_folder"], tmp_path / "my model.gguf", tmp_path / "several"
    gguf.touch()
    several.mkdir()
    (several / "model-Q4.gguf").touch()
    for folder, found, source in (
        (hf, "a Hugging Face model", hf),
        (gguf, "a .gguf file", f"'{gguf}'"),
        (several, "model-Q4.gguf", several / "model-Q4.gguf"),
    ):
        said = f"{folder}: expected a BASE folder, found {found}: make one with `meteora import base {source} BASE`"
        assert refused(capsys, "generate", "x", "--base", folder) == f"error: {said}"
        assert refused(capsys, "import", "adapters", tmp_path / "new", "a=b", "--base", folder) == f"error: {said}"
        with pytest.raises(InputError) as refusal:
            mj.load(folder)
        assert str(refusal.value) == said
    damaged = broken(world, tmp_path, "base", lambda f: (f / "weights.safetensors").unlink())
    assert "weights.safetensors: expected a file, found none" in refused(capsys, "generate", "x", "--base", damaged)


def test_adapters_that_were_not_imported_are_told_the_import(tmp_path, capsys, world):
    adapter = tmp_path / "my-adapters" / "poems"
    shutil.copytree(world["peft"]["apple"], adapter)
    for folder, found in ((adapter, "a PEFT adapter"), (adapter.parent, "a folder of PEFT adapters")):
        command = f"meteora import adapters BANK poems={adapter} --base BASE"
        said = f"{folder}: expected a BANK folder, found {found}: make one with `{command}`"
        for words in (
            ["generate", "x", "--base", world["base"], "--bank", folder],
            ["bank", "list", folder],
            ["export", "adapter", folder, "apple", tmp_path / "out"],
            ["train", "gates", "--base", world["base"], "--bank", folder, "--tasks", tmp_path, "--out", tmp_path / "g"],
        ):
            assert refused(capsys, *words) == f"error: {said}"
        for slots in (None, 2):
            with pytest.raises(InputError) as refusal:
                mj.load(world["base"], folder, adapter_slots=slots)
            assert str(refusal.value) == said


def test_bad_prompts_are_refused(capsys, world):
    base = ["--base", world["base"]]
    assert "prompt 0: expected a text" in refused(capsys, "generate", "", *base)
    assert "expected at most" in refused(capsys, "generate", "many words " * 200, *base)
    assert "expected a bank" in refused(capsys, "generate", "x", *base, "--gates", world["gates"])


@pytest.mark.parametrize("none", [[], ["--bank", "BANK"], ["--bank", "BANK", "--router", "none"]])
def test_a_routing_that_there_is_not_is_refused_before_the_answer(capsys, world, none):
    words = [world["bank"] if word == "BANK" else word for word in none]
    status, out, err = run(capsys, "generate", "x", "--base", world["base"], *words, "--show-routing")
    assert (status, out) == (1, "")
    assert err == "error: --show-routing: expected a router that picks adapters, found the bare base\n"


INDEX, GATES = ["--index", "nowhere"], ["--gates", "nowhere"]


@pytest.mark.parametrize(
    ("given", "router"),
    [
        ([], "none"),
        (GATES, "gates"),
        ([*INDEX, *GATES], "gates-within"),
        ([*INDEX, *GATES, "--router", "gates"], "gates"),
        ([*INDEX, "--router", "apple"], "apple"),
    ],
)
def test_options_that_a_router_does_not_heed_are_refused(capsys, world, given, router):
    words = ["generate", "x", "--base", world["base"], "--bank", world["bank"], *given]
    for option, value in (("--compose", "fusion"), ("--weights", "similarity")):
        line = refused(capsys, *words, option, value)
        assert line == f"error: {option}: expected --router retrieval beside it, found {router!r}"
    line = refused(capsys, *words, "--retrieve", 7)
    if router == "gates-within":  # the next thing that is wrong
        assert "nowhere/gates.json: expected a file, found none" in line
    else:
        assert line == f"error: --retrieve: expected --router retrieval or gates-within beside it, found {router!r}"


def test_a_selection_has_no_weights(capsys, world):
    words = ["generate", "x", "--base", world["base"], "--bank", world["bank"], *INDEX]
    line = refused(capsys, *words, "--compose", "selection", "--weights", "uniform")
    assert line == "error: --weights: expected --compose mixture or fusion beside it, found 'selection'"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--router", "aple"], "phatgoose, logo, uniform or one of apple, birch, cedar, daisy, found 'aple'"),
        (["--router", "apple=1,elm=2"], "or one of apple, birch, cedar, daisy, found 'elm'"),
        (["--router", "gates"], "router: expected gates beside 'gates', found none"),
        (["--router", "retrieval"], "--router: expected --index beside 'retrieval', found none"),
        (["--router", "gates-within", *INDEX], "nowhere/index.json: expected a file, found none"),
        (["--router", "gates-within", "--index", "INDEX"], "expected --gates beside 'gates-within', found none"),
        (["--index", "INDEX", "--gate-top-k", "2"], "--gate-temperature: expected --router gates, found 'retrieval'"),
        (["--router", "apple", *GATES], "nowhere/gates.json: expected a file, found none"),
        (["--router", "apple=1,birch=nan"], "Fixed: birch: expected a finite weight, found nan"),
        (["--stop", "a", "--stop", ""], "--stop: expected a text, found an empty one"),
    ],
)
def test_a_router_that_there_is_not_is_refused_before_the_base_is_read(tmp_path, capsys, world, given, said):
    (tmp_path / "index.json").touch()
    words = [tmp_path if word == "INDEX" else word for word in given]
    line = refused(capsys, "generate", "x", "--base", tmp_path / "nothing", "--bank", world["bank"], *words)
    assert said in line
    assert "nothing" not in line


def test_wrong_usage_is_status_2(capsys):
    assert run(capsys, "generate", "x")[0] == 2
    assert run(capsys, "no-such-command")[0] == 2
    for words in (
        [],
        ["generate"],
        ["import"],
        ["import", "base"],
        ["import", "adapters"],
        ["train"],
        ["inspect"],
        ["demo"],
    ):
        status, out, _ = run(capsys, *words, "--help")
        assert status == 0
        assert "usage" in out


def test_a_full_device_is_one_line(capsys, world, monkeypatch):
    told = [
        "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 45.00GiB with allocator GPU_0_bfc. [name='jit_x']",
        "INTERNAL: something else",
    ]

    def full(*_: object, **__: object) -> None:
        raise jax.errors.JaxRuntimeError(told[0])

    monkeypatch.setattr(mj.Meteora, "stream", full)
    monkeypatch.setattr(mj.Meteora, "generate", full)
    words = ["generate", "x", "--base", world["base"]]
    line = refused(capsys, *words)
    assert line.startswith("error: device memory: expected room for what this takes, found too little (Out of memory ")
    assert "45.00GiB" in line
    assert "jit_x" not in line
    told.pop(0)
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        main([str(word) for word in words])
