"""scripts/paper and scripts/demo: every command of every script is one that meteora takes. None is run here."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from meteora_jax.cli import parse
from meteora_jax.cli.comparison import read_systems
from meteora_jax.cli.evaluate import Evaluate
from meteora_jax.cli.export import ExportAdapter
from meteora_jax.cli.importing import ImportBase
from meteora_jax.cli.train import TrainAdapter, TrainBank, TrainGates
from meteora_jax.evaluation.systems import of_a_family

ROOT = Path(__file__).parents[1] / "scripts"
SCRIPTS = sorted((ROOT / "paper").glob("*.sh"))
DEMO = sorted((ROOT / "demo").glob("*.sh"))
DEMO_ADAPTERS = sorted((ROOT / "demo" / "adapters").glob("*/adapter_config.json"))
ECHO = """#!/usr/bin/env python3
import json, os, sys
print(json.dumps(sys.argv[1:]), file=open(os.environ["SAID"], "a"))
"""


@pytest.mark.parametrize("script", SCRIPTS, ids=[s.stem for s in SCRIPTS])
def test_commands_are_ones_that_meteora_takes(tmp_path, script):
    for name in "abcdef":
        (tmp_path / "tasks" / name).mkdir(parents=True)
        (tmp_path / "tasks" / name / "train.jsonl").touch()
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "meteora").write_text(ECHO)
    (tmp_path / "bin" / "meteora").chmod(0o755)
    names = [{"name": name} for name in "abcdef"]
    if script.stem != "adapters":
        (tmp_path / "out" / "bank").mkdir(parents=True)
        (tmp_path / "out" / "bank" / "bank.json").write_text(json.dumps({"adapters": names}))
    grown = [tmp_path / "out" / f"grown-by-{added}" for added in (2, 4)]
    for folder in grown if script.stem == "growth" else ():
        (folder / "old").mkdir(parents=True)
        described = {"format": "meteora-gates-1", "names": ["a", "b"], "top_k": 2, "temperature": 1.0}
        (folder / "old" / "gates.json").write_text(json.dumps(described))
    env = os.environ | {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "SAID": str(tmp_path / "said"), "BASE": "base",
        "TASKS": str(tmp_path / "tasks"), "OUT": str(tmp_path / "out"),
        "ADDED": "2 4", "SEED": "3",
    }  # fmt: skip
    done = subprocess.run([script], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    commands = [parse(json.loads(line)) for line in (tmp_path / "said").read_text().splitlines()]
    for command in commands:
        if isinstance(command, Evaluate):
            names, folders = read_systems(command.systems, "abcdef")
            assert all(name in folders or of_a_family(name) for name in names)
    seeds = {c.settings.seed for c in commands if isinstance(c, TrainAdapter | TrainBank | TrainGates)}
    assert seeds <= ({0, 1, 3} if script.stem == "run_to_run" else {3})
    if script.stem == "growth":
        trained = [c for c in commands if isinstance(c, TrainGates) and c.extend]
        assert [(c.extend, c.replay) for c in trained] == [(folder / "old", folder / "replay") for folder in grown]
        assert [sorted(p.name for p in folder.glob("replay/*")) for folder in grown] == [list("abcd"), list("ab")]
    if script.stem == "single_and_composites":
        loras = [c.settings for c in commands if isinstance(c, TrainAdapter)]
        assert sorted((s.name, s.lora.rank, s.mixture) for s in loras) == [
            ("lora-b-r48", 48, "balanced"), ("lora-b-r8", 8, "balanced"),
            ("lora-f-r48", 48, "natural"), ("lora-f-r8", 8, "natural"),
        ]  # fmt: skip
        assert all(c.systems.count("=") == 4 for c in commands if isinstance(c, Evaluate))


PYTHON = """#!/usr/bin/env python3
import json, os, sys
if sys.argv[1:3] == ["-m", "meteora_jax.cli"]:
    print(json.dumps(sys.argv[3:]), file=open(os.environ["SAID"], "a"))
elif sys.argv[1] == "scripts/paper/general_background.py":
    base, background = sys.argv[2:]
    open(background, "x")
else:  # what rounds the gates
    assert sys.argv[1] == "-", sys.argv
    compile(sys.stdin.read(), "script", "exec")
"""


@pytest.mark.parametrize("script", DEMO, ids=[s.stem for s in DEMO])
def test_the_demo_s_commands_are_ones_that_meteora_takes(tmp_path, script):
    """With all the variables that shorten it, each of which gives an option its value."""
    (tmp_path / "python").write_text(PYTHON)
    (tmp_path / "python").chmod(0o755)
    (tmp_path / "base.gguf").touch()
    (tmp_path / "tasks").mkdir()
    (tmp_path / "work" / "gates-run").mkdir(parents=True)
    (tmp_path / "work" / "gates-run" / "log.jsonl").touch()
    paths = {"GGUF": "base.gguf", "TASKS": "tasks", "OUT": "out", "WORK": "work", "SAID": "said", "PYTHON": "python"}
    given = {name: str(tmp_path / path) for name, path in paths.items()} | {"STEPS": "7", "ROWS": "2", "EACH": "3"}
    done = subprocess.run([script], env=os.environ | given, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    commands = [parse(json.loads(line)) for line in (tmp_path / "said").read_text().splitlines()]
    (training,) = (c for c in commands if isinstance(c, TrainBank | TrainGates))
    assert training.settings.optimization.steps == 7
    if script.stem == "train_gates":
        assert [c.limit for c in commands if isinstance(c, Evaluate)] == [3]
        assert isinstance(training, TrainGates)
        assert training.background == (str(tmp_path / "work" / "background.jsonl"), "self")
        assert (tmp_path / "work" / "background.jsonl").exists()
        (named,) = {json.loads(p.read_text())["base_model_name_or_path"] for p in DEMO_ADAPTERS}
        assert [c.name for c in commands if isinstance(c, ImportBase)] == [named]  # or its adapters are refused
    else:
        assert training.settings.drawing.rows == 2
        assert len(training.task) == len([c for c in commands if isinstance(c, ExportAdapter)]) == 8
