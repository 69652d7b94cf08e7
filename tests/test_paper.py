"""scripts/paper: every command of every table is one that meteora takes. None is run here."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from meteora_jax.cli import parse
from meteora_jax.cli.comparison import read_systems
from meteora_jax.cli.evaluate import Evaluate
from meteora_jax.cli.train import TrainAdapter, TrainGates
from meteora_jax.evaluation.systems import of_a_family

SCRIPTS = sorted((Path(__file__).parents[1] / "scripts" / "paper").glob("*.sh"))
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
    if script.stem == "growth":
        (tmp_path / "out" / "gates-small").mkdir()
        described = {"format": "meteora-gates-1", "names": ["a", "b"], "top_k": 2, "temperature": 1.0}
        (tmp_path / "out" / "gates-small" / "gates.json").write_text(json.dumps(described))
    env = os.environ | {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "SAID": str(tmp_path / "said"), "BASE": "base",
        "TASKS": str(tmp_path / "tasks"), "OUT": str(tmp_path / "out"),
    }  # fmt: skip
    done = subprocess.run([script], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    commands = [parse(json.loads(line)) for line in (tmp_path / "said").read_text().splitlines()]
    for command in commands:
        if isinstance(command, Evaluate):
            names, folders = read_systems(command.systems, "abcdef")
            assert all(name in folders or of_a_family(name) for name in names)
    if script.stem == "growth":
        assert [c.extend for c in commands if isinstance(c, TrainGates)] == [tmp_path / "out" / "gates-small"]
    if script.stem == "single_and_composites":
        loras = [c.settings for c in commands if isinstance(c, TrainAdapter)]
        assert sorted((s.name, s.lora.rank, s.mixture) for s in loras) == [
            ("lora-b-r48", 48, "balanced"), ("lora-b-r8", 8, "balanced"),
            ("lora-f-r48", 48, "natural"), ("lora-f-r8", 8, "natural"),
        ]  # fmt: skip
        assert all(c.systems.count("=") == 4 for c in commands if isinstance(c, Evaluate))
