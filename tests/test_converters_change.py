"""A bank changed in place is, byte for byte, the bank that an import of the same PEFT folders makes."""

import dataclasses
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from test_cli import refused, run
from test_converters_vocab import write_adapter
from tiny import assert_refused, edit_json, tiny_llama, tiny_peft

import converters
from converters.own_folders import read_bank
from meteora_jax.config import PROJECTIONS, BankConfig, read_json
from meteora_jax.gate_config import GateConfig, TokenRouterForm
from meteora_jax.io.gates import fresh_gates, load_gates, save_gates

# peft warns of biases where the base has none, mistakes them for tensors that were lost, and of invocations
pytestmark = pytest.mark.filterwarnings(
    "ignore:`lora_bias=True` was passed", "ignore:Adapter 'default'", "ignore:aLoRA"
)
ADAPTERS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4},
    "narrow": {"r": 2, "target_modules": ["q_proj", "v_proj"]},
    "pattern": {"r": 2, "rank_pattern": {"1.mlp.up_proj": 9, "o_proj": 6}, "target_modules": ["up_proj", "o_proj"]},
    "rslora": {"r": 8, "use_rslora": True, "lora_alpha": 3, "target_modules": ["down_proj", "k_proj"]},
    "dora": {"r": 3, "use_dora": True, "target_modules": ["q_proj", "gate_proj"]},
    "bias": {"r": 3, "lora_bias": True, "target_modules": ["v_proj"]},
    "waits": {"r": 5, "alora_invocation_tokens": [40, 7, 40], "target_modules": ["q_proj"]},
    "ends": {"target_modules": ["embed_tokens", "lm_head", "v_proj"], "rank_pattern": {"lm_head": 7, "v_proj": 2}},
    "rows": {"trainable_token_indices": {"embed_tokens": [7, 5], "lm_head": [9, 17, 0]}},
}  # fmt: skip


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A base, and PEFT folders that differ in every way that a bank's arrays follow; one is bfloat16."""
    folder = tmp_path_factory.mktemp("fleet")
    _, hf = tiny_llama(folder)
    converters.import_base(hf, folder / "base")
    peft = {}
    for seed, (name, options) in enumerate(ADAPTERS.items(), start=1):
        if name in ("ends", "rows"):
            peft[name] = write_adapter(folder, hf, name, seed, **options)[1]
        else:
            dtype = torch.float32 if name == "rslora" else torch.bfloat16
            peft[name] = tiny_peft(folder, hf, name, seed=seed, dtype=dtype, **options)
    converters.import_adapters(folder / "bank", folder / "base", peft)
    return {"folder": folder, "hf": hf, "base": folder / "base", "peft": peft, "bank": folder / "bank"}


def imported(fleet: dict[str, Any], dest: Path, *names: str) -> Path:
    converters.import_adapters(dest, fleet["base"], {n: fleet["peft"][n] for n in names})
    return dest


def files_of(folder: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in folder.iterdir()}


def assert_same(changed: Path, fresh: Path) -> None:
    assert files_of(changed) == files_of(fresh)
    assert [p.name for p in changed.parent.iterdir() if p.name.startswith(".")] == []


@pytest.mark.parametrize(
    "gone", [("pattern", "dora", "ends"), ("rslora", "bias", "rows"), ("plain", "narrow", "waits")]
)
def test_without_adapters_and_with_them_again(tmp_path: Path, fleet: dict[str, Any], gone: tuple[str, ...]):
    rest = [n for n in ADAPTERS if n not in gone]
    bank = Path(shutil.copytree(fleet["bank"], tmp_path / "bank"))
    converters.remove_adapters(bank, gone)
    assert_same(bank, imported(fleet, tmp_path / "without", *rest))
    converters.add_adapters(bank, {n: fleet["peft"][n] for n in gone}, fleet["base"])
    assert_same(bank, imported(fleet, tmp_path / "with", *rest, *gone))


def test_many_at_once_and_the_stored_type_follows(tmp_path: Path, fleet: dict[str, Any]):
    """Of bfloat16 adapters alone the bank is bfloat16, beside a float32 one float32, and so back again."""
    bank = imported(fleet, tmp_path / "bank", "narrow", "dora")
    assert read_bank(bank)[1].dtype("q_proj.a").name == "bfloat16"
    converters.add_adapters(bank, [(n, fleet["peft"][n]) for n in ("rslora", "rows", "plain")], fleet["base"])
    assert_same(bank, imported(fleet, tmp_path / "more", "narrow", "dora", "rslora", "rows", "plain"))
    assert read_bank(bank)[1].dtype("q_proj.a").name == "float32"
    converters.remove_adapters(bank, ["rslora", "rows", "narrow"])
    assert_same(bank, imported(fleet, tmp_path / "fewer", "dora", "plain"))
    converters.take_adapters(bank, tmp_path / "taken", ["plain"])
    assert_same(tmp_path / "taken", imported(fleet, tmp_path / "one", "plain"))


def test_a_name_changes_and_nothing_else(tmp_path: Path, fleet: dict[str, Any]):
    bank = imported(fleet, tmp_path / "bank", "waits", "rows")
    converters.rename_adapter(bank, "waits", "attend")
    renamed = {"attend": fleet["peft"]["waits"], "rows": fleet["peft"]["rows"]}
    converters.import_adapters(tmp_path / "fresh", fleet["base"], renamed)
    assert_same(bank, tmp_path / "fresh")


def test_a_bank_of_training_keeps_what_it_holds(tmp_path: Path, world: dict[str, Any]):
    """Its adapters are of no files and say no type: what the file holds is what counts."""
    from meteora_jax.io.bank import load_bank, save_bank
    from meteora_jax.training.adapter import fresh_bank

    config = world["model"].config
    trained = fresh_bank(config, ["one", "two", "three"], 4, 8.0, ["q_proj", "up_proj"], 0)
    save_bank(tmp_path / "bank", trained)
    converters.add_adapters(tmp_path / "bank", {"apple": world["peft"]["apple"]}, world["base"])
    converters.remove_adapters(tmp_path / "bank", ["two", "apple"])
    left = load_bank(tmp_path / "bank", config, np.float32)
    assert left.names == ("one", "three")
    assert left.config.ranks == trained.config.ranks
    for p, a in trained.a.items():
        np.testing.assert_array_equal(left.a[p], a[:, [0, 2]])
        np.testing.assert_array_equal(left.scale[p], trained.scale[p][:, [0, 2]])


def test_shapes_suffice_unless_the_adapter_needs_the_base(tmp_path: Path, fleet: dict[str, Any]):
    bank = imported(fleet, tmp_path / "bank", "plain")
    for name, why in (
        ("dora", "DoRA's norms"),
        ("ends", "tensors at its vocabulary"),
        ("rows", "tensors at its vocabulary"),
        ("waits", "the invocation"),
    ):
        call = functools.partial(converters.add_adapters, bank, {name: fleet["peft"][name]})
        assert_refused(call, bank, str(fleet["peft"][name]), "--base BASE", why)
    converters.add_adapters(bank, {n: fleet["peft"][n] for n in ("pattern", "rslora", "bias")})
    assert_same(bank, imported(fleet, tmp_path / "fresh", "plain", "pattern", "rslora", "bias"))


def test_what_is_refused_leaves_the_bank(tmp_path: Path, capsys: pytest.CaptureFixture[str], fleet: dict[str, Any]):
    bank = imported(fleet, tmp_path / "bank", "plain", "narrow")
    before = files_of(bank)
    _, other = tiny_llama(tmp_path, hidden_size=32, folder="other")
    stranger = tiny_peft(tmp_path, other, "stranger")
    claims = tiny_peft(tmp_path, fleet["hf"], "claims")
    edit_json(claims / "adapter_config.json", base_model_name_or_path="someone/Other-7B")
    edit_json(bank / "bank.json", base={"names": {"name": "my/Tiny-1M"}, "revision": None, "norms_sha256": "00"})
    before = files_of(bank)
    for words, said in (
        (["add", bank, f"plain={fleet['peft']['rslora']}"], "a name that no adapter of the bank has, found 'plain'"),
        (["add", bank, f"a/b={fleet['peft']['rslora']}"], "expected a printable name"),
        (["add", bank, "new=" + str(tmp_path / "nowhere")], "adapter_config.json: expected a file, found none"),
        (["add", bank, f"new={stranger}"], "for this base, found"),
        (["add", bank, f"new={claims}"], "expected my/Tiny-1M (this base), found someone/Other-7B (--any-base"),
        (["add", bank, f"new={fleet['peft']['dora']}", "--base", fleet["base"]], "norms_sha256: expected the base's"),
        (["remove", bank, "zinnia"], "expected an adapter's name (plain, narrow), found 'zinnia'"),
        (["remove", bank, "plain", "plain"], "plain: expected once, found 2 times"),
        (["remove", bank, "plain", "narrow"], "expected an adapter that stays"),
        (["rename", bank, "zinnia", "new"], "expected an adapter's name (plain, narrow), found 'zinnia'"),
        (["rename", bank, "plain", "narrow"], "expected a name that no adapter of the bank has, found 'narrow'"),
        (["rename", bank, "plain", "a=b"], "expected a printable name"),
        (["remove", tmp_path / "none", "plain"], "bank.json: expected a file, found none"),
        (["list", tmp_path / "none"], "bank.json: expected a file, found none"),
    ):  # fmt: skip
        assert said in refused(capsys, "bank", *words)
        assert files_of(bank) == before, words
    assert not (tmp_path / "none").exists()


def done(capsys: pytest.CaptureFixture[str], *words: Any) -> str:
    """What a command that succeeds prints."""
    status, out, err = run(capsys, *words)
    assert status == 0, err
    return out


def gates_of(tmp_path: Path, bank: Path, form: TokenRouterForm | None = None, top_k: int = 2) -> Path:
    """Random gates of a bank's adapters, in another order than the bank's."""
    config = BankConfig.from_json(read_json(bank / "bank.json"), "bank")
    rng = np.random.default_rng(3)
    fresh = fresh_gates(form, config, len(config.names), 0)
    arrays = {k: rng.standard_normal(g.shape).astype(np.float32) for k, g in fresh.items()}
    save_gates(tmp_path / "gates", GateConfig(config.names[::-1], top_k, 1.0, form), arrays)
    return tmp_path / "gates"


@pytest.mark.parametrize("form", [None, TokenRouterForm(32, 2)], ids=["meteora", "token router"])
def test_columns_go_and_change_their_names_with_the_bank(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], fleet: dict[str, Any], form: Any
):
    bank = imported(fleet, tmp_path / "bank", "plain", "narrow", "rslora", "pattern")
    gates = gates_of(tmp_path, bank, form, top_k=3)
    config = BankConfig.from_json(read_json(bank / "bank.json"), "bank")
    _, before = load_gates(gates, config, config.names[::-1])
    done(capsys, "bank", "remove", bank, "narrow", "rslora", "--gates", gates)
    done(capsys, "bank", "rename", bank, "plain", "simple", "--gates", gates)
    after = BankConfig.from_json(read_json(bank / "bank.json"), "bank")
    assert after.names == ("simple", "pattern")
    described, columns = load_gates(gates, after, ("pattern", "simple"))
    assert described == GateConfig(("pattern", "simple"), 2, 1.0, form)  # no more than there are
    for name, was in before.items():
        whole = columns[name].shape == was.shape
        np.testing.assert_array_equal(columns[name], was if whole else was[..., [0, 3]])
    assert sum(columns[n].shape != was.shape for n, was in before.items()) == (7 if form is None else 2)


def test_gates_that_do_not_fit_are_refused_with_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], fleet: dict[str, Any]
):
    bank = imported(fleet, tmp_path / "bank", "plain", "narrow", "rslora")
    gates, other = gates_of(tmp_path, bank), imported(fleet, tmp_path / "other", "plain", "pattern")
    before = files_of(other), files_of(gates)
    said = refused(capsys, "bank", "remove", other, "plain", "--gates", gates)
    assert "expected adapters of the bank, found columns of rslora, narrow: gates of another bank" in said
    assert "gates of another bank" in refused(capsys, "bank", "rename", other, "plain", "p", "--gates", gates)
    assert (files_of(other), files_of(gates)) == before
    converters.add_adapters(bank, {"bias": fleet["peft"]["bias"]})
    told = ["generate", "x", "--base", fleet["base"], "--bank", bank, "--gates", gates]
    assert "no gate for 'bias' (meteora train gates --extend" in refused(capsys, *told)
    converters.remove_adapters(bank, ["bias", "narrow"])
    assert "a gate for 'narrow' (meteora bank remove and rename --gates" in refused(capsys, *told)
    done(capsys, "bank", "remove", bank, "narrow", "--gates", gates)  # of the gates alone
    assert GateConfig.from_json(read_json(gates / "gates.json"), "gates").names == ("rslora", "plain")


def test_a_command_that_was_killed_between_gates_and_bank_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], fleet: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    bank = imported(fleet, tmp_path / "bank", "plain", "narrow", "rslora")
    gates = gates_of(tmp_path, bank)

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    for words, between, names in (
        (["remove", bank, "narrow"], "no gate for 'narrow'", ("plain", "rslora")),
        (["rename", bank, "plain", "simple"], "no gate for 'plain', a gate for 'simple'", ("simple", "rslora")),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(converters, f"{words[0]}_adapter{'s' if words[0] == 'remove' else ''}", killed)
            assert run(capsys, "bank", *words, "--gates", gates)[0] == 130
        told = ["generate", "x", "--base", fleet["base"], "--bank", bank, "--gates", gates]
        assert between in refused(capsys, *told).splitlines()[-1]
        done(capsys, "bank", *words, "--gates", gates)
        assert BankConfig.from_json(read_json(bank / "bank.json"), "bank").names == names
        assert set(GateConfig.from_json(read_json(gates / "gates.json"), "gates").names) == set(names)


KILLED = """
import os, signal, sys
import converters.tensor_files as files, meteora_jax.io.files as io
place, count, bank, name, peft = sys.argv[1], int(sys.argv[2]), *sys.argv[3:]
owner, attribute = (files.TensorWriter, "slice") if place == "write" else (io, "_swap")
was, calls = getattr(owner, attribute), 0
def now(*given):
    global calls
    calls += 1
    if place != "after" and calls == count:
        os.kill(os.getpid(), signal.SIGKILL)
    done = was(*given)
    if place == "after":
        os.kill(os.getpid(), signal.SIGKILL)
    return done
setattr(owner, attribute, now)
import converters
converters.add_adapters(bank, {name: peft})
"""


@pytest.mark.skipif(sys.platform != "linux", reason="one system call swaps folders on Linux alone")
@pytest.mark.parametrize(("place", "count"), [("write", 20), ("swap", 1), ("after", 1)])
def test_a_killed_addition_leaves_a_whole_bank(tmp_path: Path, fleet: dict[str, Any], place: str, count: int):
    bank, fresh = imported(fleet, tmp_path / "bank", "plain"), imported(fleet, tmp_path / "fresh", "plain", "narrow")
    before = files_of(bank)
    told = [sys.executable, "-c", KILLED, place, str(count), str(bank), "narrow", str(fleet["peft"]["narrow"])]
    done = subprocess.run(told, cwd=Path(__file__).parents[1], env=os.environ, check=False, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert files_of(bank) == (files_of(fresh) if place == "after" else before)
    if place != "after":
        converters.add_adapters(bank, {"narrow": fleet["peft"]["narrow"]})
        assert files_of(bank) == files_of(fresh)


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], fleet: dict[str, Any]):
    bank = imported(fleet, tmp_path / "bank", "plain")
    pairs = [f"{n}={fleet['peft'][n]}" for n in ("waits", "ends")]
    said = done(capsys, "bank", "add", bank, *pairs, "--base", fleet["base"], "--json", tmp_path / "report.json")
    assert "waits: rank 5, q_proj" in said
    assert f"{bank}: 3 adapters: plain waits ends" in said
    assert json.loads((tmp_path / "report.json").read_text())["adapters"][1]["invocation"] == [40, 7, 40]
    done(capsys, "bank", "remove", bank, "plain")
    done(capsys, "bank", "rename", bank, "ends", "both")
    said = done(capsys, "bank", "list", bank, "--json", tmp_path / "list.json")
    assert [word in said for word in ("waits", "both", "plain", "40 7 40")] == [True, True, False, True]
    assert [a["name"] for a in json.loads((tmp_path / "list.json").read_text())["adapters"]] == ["waits", "both"]


def test_the_description_of_a_part_is_that_of_its_import(fleet: dict[str, Any]):
    """Without a file: ranks, DoRA, biases and vocabulary follow from the description but for rank patterns."""
    whole = converters.describe_adapters(fleet["base"], fleet["peft"])[0]
    names = [n for n in ADAPTERS if n not in ("pattern", "ends")]
    part = converters.describe_adapters(fleet["base"], {n: fleet["peft"][n] for n in names})[0]

    def never(*_: Any) -> int:
        raise AssertionError("no rank pattern")

    found = whole.take([whole.names.index(n) for n in names], never)
    assert found == part
    assert list(found.ranks) == [p for p in PROJECTIONS if p in found.ranks]
    rest = whole.take([whole.names.index("pattern"), whole.names.index("ends")], lambda i, place: 1)
    assert dataclasses.replace(found.join(rest), ranks={}).names == (*names, "pattern", "ends")


def test_a_change_has_memory_for_an_adapter_and_not_for_the_bank(tmp_path, fleet):
    """What is allocated while a bank of 48 gains, renames and loses one: less than two adapters have."""
    large = tiny_peft(tmp_path, fleet["hf"], "large", seed=5, r=64)
    size = (large / "adapter_model.safetensors").stat().st_size
    bank = tmp_path / "bank"
    converters.import_adapters(bank, fleet["base"], {"a0": large})
    raw, tensors = read_json(bank / "bank.json"), load_file(bank / "weights.safetensors")
    raw["adapters"] = [{**raw["adapters"][0], "name": f"a{i}"} for i in range(48)]
    save_file({key: np.repeat(t, 48, axis=1) for key, t in tensors.items()}, bank / "weights.safetensors")
    (bank / "bank.json").write_text(json.dumps(raw))
    for change in (
        lambda: converters.add_adapters(bank, {"new": large}), lambda: converters.rename_adapter(bank, "new", "other"),
        lambda: converters.remove_adapters(bank, ["a7"]),
    ):  # fmt: skip
        tracemalloc.start()
        change()
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 2 * size
    assert read_bank(bank)[0].names == (*(f"a{i}" for i in range(48) if i != 7), "other")
