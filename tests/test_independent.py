"""Independent gates: columns as NumPy computes them from transformers' activations, the same whatever the bank, joined.

Run as a script it is a process with the devices.
"""

import copy
import itertools
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from peft import PeftModel
from test_sharding import devices
from test_training import TASKS, unpacked
from test_training_mesh import ROWS, packed
from tiny import edit_json
from worlds import NAMES

import converters
import meteora_jax as mj
from meteora_jax.checkpoint import join_gates, load_background, load_base, load_gates, save_gates
from meteora_jax.cli import main as meteora
from meteora_jax.config import GROUPS, InputError
from meteora_jax.gate_config import GateConfig
from meteora_jax.sharding import make_mesh
from meteora_jax.training.data import Batches, Mixture, plan
from meteora_jax.training.independent import FORM, RIDGE, Columns, IndependentTraining, padded, train_independent_gates

SETTINGS = IndependentTraining(batch_size=8, max_length=64, texts=12, length=24)
FIRST = {"qkv": "self_attn.q_proj", "o": "self_attn.o_proj", "gate_up": "mlp.up_proj", "down": "mlp.down_proj"}


def train(world, bank, dest, settings=SETTINGS, **how):
    return train_independent_gates(world["base"], bank, TASKS, dest, settings, dtype="float32", **how)


@pytest.fixture(scope="module")
def folder(world, tmp_path_factory):
    return tmp_path_factory.mktemp("independent")


@pytest.fixture(scope="module")
def told(world, folder):
    """What the training of the whole bank reports; the gates are in folder / "all"."""
    return train(world, world["bank"], folder / "all")


def inputs(hf, sequences):
    """{(group, layer): float64 [tokens, I]} as transformers computes them, sequence by sequence."""
    found = {(g, layer): [] for g in GROUPS for layer in range(hf.config.num_hidden_layers)}
    hooks = []
    for (g, layer), rows in found.items():
        module = hf.get_submodule(f"model.layers.{layer}.{FIRST[g]}")
        hooks.append(module.register_forward_pre_hook(lambda _, x, rows=rows: rows.append(x[0][0].double().numpy())))
    for tokens in sequences:
        with torch.no_grad():
            hf(torch.tensor([[int(t) for t in tokens]]))
    for hook in hooks:
        hook.remove()
    return {key: np.concatenate(rows) for key, rows in found.items()}


def test_columns_equal_numpy_on_what_transformers_computes(world, folder, told):
    config, gates = load_gates(folder / "all", world["model"].config, NAMES)
    assert (config.form, config.background) == (FORM, told["background"])
    texts = load_background(folder / "all")
    assert len(texts) == 12
    assert all(text[0] == 1 for text in texts)
    texts = [t for t in texts if len(t) >= 8]
    for i, name in enumerate(NAMES[:2]):
        mixture = Mixture({name: TASKS[name]}, {name: 0}, world["model"].tokenizer, 2, max_length=64, prompt_loss=True)
        chosen = mixture.chosen()
        layout = plan(mixture, chosen, 8, packing=True, multiple=1, shards=1)
        batches = itertools.islice(Batches(mixture, chosen, layout), 3)  # twenty examples, eight at a time
        sequences = [s.tokens for batch in batches for s in unpacked(batch)]
        bare = inputs(world["hf"], sequences), inputs(world["hf"], texts)
        alone = PeftModel.from_pretrained(copy.deepcopy(world["hf"]), world["peft"][name])
        adapted = inputs(alone.base_model.model, sequences), inputs(alone.base_model.model, texts)
        for group, layer in bare[0]:
            x, y = (np.concatenate([b[group, layer], a[group, layer]]) for b, a in zip(bare, adapted, strict=True))
            apart, middle = x.mean(0) - y.mean(0), (x.mean(0) + y.mean(0)) / 2
            s = (np.cov(x.T, bias=True) + np.cov(y.T, bias=True)) / 2
            spread = np.sqrt(np.diag(s))
            r = s / np.outer(spread, spread) + RIDGE * np.eye(len(s))
            v = np.linalg.solve(r, apart / spread) / spread
            w = v / np.sqrt(apart @ v)
            assert np.allclose(gates[group][layer, :, i], w, rtol=2e-3, atol=2e-3 * np.abs(w).max())
            assert np.isclose(gates[f"{group}.bias"][layer, i], -middle @ w, rtol=5e-3, atol=5e-3)


def test_a_column_is_the_same_bits_in_every_bank_and_columns_can_be_joined(world, folder, told):
    parts = {"left": ("daisy", "birch"), "right": ("birch", "cedar", "apple")}
    for part, names in parts.items():
        converters.import_adapters(folder / part, world["base"], {n: world["peft"][n] for n in names})
        train(world, folder / part, folder / f"{part}-gates")
    config = world["model"].config
    _, whole = load_gates(folder / "all", config, NAMES)
    for part, names in parts.items():
        _, own = load_gates(folder / f"{part}-gates", config, names)
        for key, columns in own.items():
            assert np.array_equal(columns, whole[key][..., [NAMES.index(n) for n in names]]), (part, key)
    given = [folder / "left-gates", folder / "right-gates"]
    assert join_gates(given, folder / "joined", world["base"], world["bank"]) == []
    for file in ("gates.json", "weights.safetensors", "background.json"):
        assert (folder / "joined" / file).read_bytes() == (folder / "all" / file).read_bytes()
    assert join_gates(given, folder / "fewer", world["base"], folder / "left") == ["cedar", "apple"]
    model = mj.load(world["base"], folder / "left", folder / "fewer", dtype="float32")
    assert model.gates.names == ("daisy", "birch")


def test_tokens_go_to_their_own_adapter(world, folder, told):
    """By the share of a prompt's tokens, layers and projections; one of four by chance."""
    model = mj.load(world["base"], world["bank"], folder / "all", dtype="float32")
    assert model.gates.form == FORM
    shares = []
    for i, name in enumerate(NAMES):
        prompts = [e.prompt for e in TASKS[name][15:18]]
        done = model.generate(prompts, mj.Gates(1), max_new_tokens=2)
        chosen = np.concatenate([c.routing.indices[4 : c.prompt_length].ravel() for c in done])
        shares.append(float((chosen == i).mean()))
        assert told["columns"][name]["distance"] > 1
        assert told["columns"][name]["batches"] == 3
    assert np.mean(shares) > 0.35, shares


def test_what_cannot_be_joined_is_named(world, folder, told, tmp_path):
    config, base, bank = world["model"].config, world["base"], world["bank"]
    other = IndependentTraining(batch_size=8, max_length=64, texts=12, length=24, seed=1)
    train(world, bank, tmp_path / "other", other)
    for folders, said in (
        ([folder / "all", tmp_path / "other"], "background: expected"),
        ([world["gates"]], "expected gates trained with --independent"),
        ([], "expected at least one GATES folder"),
    ):
        with pytest.raises(InputError, match=said):
            join_gates(folders, tmp_path / "x", base, bank)
    described, arrays = load_gates(folder / "all", config, NAMES)
    texts = load_background(folder / "all")
    fewer = GateConfig(NAMES[:2], 2, 1.0, FORM, described.background)
    save_gates(tmp_path / "fewer", fewer, {k: v[..., :2] for k, v in arrays.items()}, texts)
    with pytest.raises(InputError, match=r"cedar: expected a column.*daisy: expected a column"):
        join_gates([tmp_path / "fewer"], tmp_path / "x", base, bank)
    save_gates(tmp_path / "moved", described, {k: v + 1 for k, v in arrays.items()}, texts)
    with pytest.raises(InputError, match="apple: expected the column that an earlier folder has"):
        join_gates([folder / "all", tmp_path / "moved"], tmp_path / "x", base, bank)
    (tmp_path / "moved" / "background.json").write_text(json.dumps(texts[1:]))
    with pytest.raises(InputError, match=r"expected the tokens that gates\.json names"):
        load_background(tmp_path / "moved")
    edit_json(tmp_path / "moved" / "gates.json", background=7)
    with pytest.raises(InputError, match="background"):
        load_background(tmp_path / "moved")
    assert not (tmp_path / "x").exists()


def columns(base, mesh):
    """Of one packed batch against random texts."""
    config, weights = load_base(base, np.dtype(np.float32))
    made = Columns(config, weights, np.dtype(np.float32), mesh)
    rng = np.random.default_rng(3)
    texts = [rng.integers(3, 320, int(n)).tolist() for n in rng.integers(8, 40, 30)]
    made.read_background(padded(texts, ROWS), ROWS)
    w, b, distance = made.column(made.moments(None, [packed()], ROWS), made.background)
    return {**w, **{f"{g}.bias": x for g, x in b.items()}, "distance": np.asarray(distance)}


def on_eight_devices(base: str, bank: str, background: str, dest: str) -> None:
    mesh = make_mesh(2, 2, 2)
    np.savez(f"{dest}.npz", **columns(base, mesh))
    train_independent_gates(base, bank, TASKS, dest, SETTINGS, dtype="float32", mesh=mesh, background=background)


def test_eight_devices_make_the_same_columns(world, folder, told, tmp_path):
    command = [sys.executable, __file__, *map(str, (world["base"], world["bank"], folder / "all", tmp_path / "eight"))]
    done = subprocess.run(command, env=devices(8), capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-4000:]
    found, expected = np.load(tmp_path / "eight.npz"), columns(world["base"], None)
    assert found.keys() == expected.keys()
    for key, column in expected.items():
        assert np.allclose(found[key], column, rtol=1e-3, atol=1e-3 * np.abs(column).max()), key
    _, gates = load_gates(tmp_path / "eight", world["model"].config, NAMES)
    assert all(np.isfinite(g).all() for g in gates.values())
    assert load_background(tmp_path / "eight") == load_background(folder / "all")


def test_the_command_line_trains_and_joins(world, folder, told, tmp_path, capsys):
    tasks = tmp_path / "tasks"
    for name in NAMES:
        (tasks / name).mkdir(parents=True)
        lines = [json.dumps({"prompt": e.prompt, "response": e.response}) for e in TASKS[name]]
        (tasks / name / "train.jsonl").write_text("\n".join(lines) + "\n")
    common = ["--base", str(world["base"]), "--bank", str(world["bank"])]
    out = ["--tasks", str(tasks), "--out", str(tmp_path / "gates"), "--dtype", "float32", "--batch-size", "8"]
    train = ["train", "gates", *common, *out, "--independent", "--max-length", "64"]
    meteora([*train, "--background", str(folder / "all"), "--json", str(tmp_path / "said.json")])
    assert "deviations from the background" in capsys.readouterr().out
    said = json.loads((tmp_path / "said.json").read_text())
    assert said["columns"] == told["columns"]
    assert (tmp_path / "gates" / "weights.safetensors").read_bytes() == (
        folder / "all" / "weights.safetensors"
    ).read_bytes()
    meteora(["join", str(tmp_path / "joined"), str(tmp_path / "gates"), *common])
    assert capsys.readouterr().out.split()[1:] == list(NAMES)
    for more, reason in (
        (["--composite", "0.3"], "--composite: expected none beside --independent"),
        (["--gate-input", "prefix-mean"], "--gate-input: expected none"),
        (["--extend", str(folder / "all")], "--extend: expected none"),
    ):
        with pytest.raises(SystemExit) as status:
            meteora([*train, *more])
        assert status.value.code == 1
        assert reason in capsys.readouterr().err
    with pytest.raises(SystemExit):
        meteora(["train", "gates", *common, *out, "--background", str(folder / "all")])
    assert "--background: expected --independent" in capsys.readouterr().err


if __name__ == "__main__":
    import conftest  # noqa: F401  (the same strictness as in every test)

    on_eight_devices(*sys.argv[1:])
