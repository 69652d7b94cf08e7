"""`meteora train gates` from the command line: its report, its options and its refusals."""

import json
import re
import subprocess
import sys

from test_cli import refused, run
from worlds import NAMES

import meteora_jax as mj
from meteora_jax.gate_config import GateConfig, TokenRouterForm
from meteora_jax.io.gates import SHARED_BY_ADAPTERS, load_gates, save_gates


def test_train_gates(tmp_path, capsys, world):
    for name in NAMES:
        folder = tmp_path / "tasks" / name
        folder.mkdir(parents=True)
        lines = [json.dumps({"prompt": f"{name} {i}\n", "response": f"{i}"}) for i in range(8)]
        lines += [json.dumps({"prompt": f"{name} " * 60, "response": "long"})] * (name in ("apple", "cedar"))
        (folder / "train.jsonl").write_text("\n".join(lines) + "\n")
    options = ["--base", world["base"], "--bank", world["bank"], "--tasks", tmp_path / "tasks", "--out", tmp_path / "g"]
    lost = (
        "2 of 34 sequences are longer than --max-length (here 60 tokens) and are not used: apple 1 of 9, cedar 1 of 9"
    )
    status, out, noted = run(
        capsys, "train", "gates", *options, "--recipe", "meteora", "--steps", 2, "--batch-size", 2,
        "--json", tmp_path / "r.json", "--max-length", 60,
    )  # fmt: skip
    assert status == 0
    assert f"train gates: {lost}" in noted
    assert lost in out
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["step"] == 2
    assert report["unused"]["too_long"] == {"apple": 1, "cedar": 1}
    assert mj.load(world["base"], world["bank"], tmp_path / "g", dtype="float32").gates.form is None
    # the recommendation without further flags, then an extension, whose form and loss are those of what it extends
    short = ["--steps", 2, "--max-length", 256]
    for name, more in (("g", []), ("grown", ["--extend", tmp_path / "part"])):
        status, _, _ = run(capsys, "train", "gates", *options[:-1], tmp_path / name, *short, *more, "--no-resume",
                           "--json", tmp_path / "r.json")  # fmt: skip
        assert status == 0
        assert "lm" not in json.loads((tmp_path / "r.json").read_text())
        config, arrays = load_gates(tmp_path / name, world["model"].config, NAMES)
        assert config.form == TokenRouterForm(width=128, depth=4)
        old = {k: v if k in SHARED_BY_ADAPTERS else v[..., :2] for k, v in arrays.items()}
        save_gates(tmp_path / "part", GateConfig(NAMES[:2], 2, 1.0, config.form), old)
    line = refused(capsys, "train", "gates", *options, "--extend", tmp_path / "part", "--recipe", "meteora")
    assert "form: expected one of the recipe meteora, found token-router" in line
    status, out, _ = run(
        capsys, "train", "adapter", "--base", world["base"], "--tasks", tmp_path / "tasks", "--task", "apple", "birch",
        "--name", "fig", "--out", tmp_path / "fig", "--steps", 2, "--batch-size", 2, "--rank", 3,
    )  # fmt: skip
    assert status == 0
    assert "2 steps" in out
    (adapter,) = mj.load(world["base"], tmp_path / "fig", dtype="float32").bank.adapters
    assert (adapter.name, adapter.rank, adapter.peft_config["lora_alpha"]) == ("fig", 3, 6.0)
    (tmp_path / "tasks" / "birch" / "train.jsonl").write_text('{"prompt": "x"}\n')
    line = refused(capsys, "train", "gates", *options)
    assert "birch/train.jsonl" in line
    assert "response" in line


def shown(capsys, *command):
    """The options of a command by its --help, and the whole text."""
    status, out, _ = run(capsys, *command, "--help")
    assert status == 0
    return set(re.findall(r"^(?:│ |  )(--[a-z][a-z-]*)", out, re.MULTILINE)), out  # a box on a terminal alone


def test_train_gates_has_few_options_and_shows_its_recipe_s_values(tmp_path, capsys):
    options, text = shown(capsys, "train", "gates")
    assert {"--base", "--recipe", "--resume", "--remat"} <= options
    assert len(options) <= 25, sorted(options)
    assert 1 < len(shown(capsys, "evaluate")[0]) <= 18
    assert "Updates. (default: 5000)" in text
    assert "Updates. (default: 15000)" in shown(capsys, "train", "gates", "--recipe", "meteora")[1]
    assert "Updates. (default: 15000)" in shown(capsys, "train", "gates", "--recipe=meteora")[1]
    assert not options & {
        "--beta",
        "--warmup",
        "--start-weight",
        "--segment-weight",
        "--composite-cut",
        "--composite-sizes",
        "--response-weight",
    }
    line = refused(capsys, "train", "gates", "--extend", tmp_path / "none")
    assert "gates.json" in line


def test_a_bar_s_thread_draws_only_once_grain_is_imported():
    inside = "with _callbacks('x', GateTraining()): assert 'grain' in sys.modules"
    named = "from meteora_jax.cli.train import GateTraining, _callbacks"
    code = f"import sys; {named}; assert 'grain' not in sys.modules\n{inside}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
