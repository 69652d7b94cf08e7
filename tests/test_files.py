"""Folders that are written whole: what a killed process leaves, and what nobody replaces."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from converters.folders import new_folder
from meteora_jax.config import InputError
from meteora_jax.io.files import refuse_foreign

# Replaces what stands at argv[1] and is killed there.
SCRIPT = """
import os, shutil, signal, sys
from converters.folders import new_folder
from meteora_jax.io import files

def kill(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)

with new_folder(sys.argv[1], True, []) as folder:
    (folder / "new").write_text("x")
    {kill_at} = kill
"""
KILLS = {"files._swap": "old", "shutil.rmtree": "new"}  # where it is killed -> what stands in the place then


@pytest.mark.skipif(sys.platform != "linux", reason="swaps two folders in one call")
@pytest.mark.parametrize("kill_at", KILLS)
def test_what_a_killed_replacement_leaves_the_next_one_removes(tmp_path: Path, kill_at: str):
    dest = tmp_path / "dest"
    dest.mkdir()
    (dest / "old").write_text("x")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", SCRIPT.format(kill_at=kill_at), dest]
    assert subprocess.run(command, env=environment, timeout=120).returncode == -signal.SIGKILL
    assert os.listdir(dest) == [KILLS[kill_at]]
    assert len(os.listdir(tmp_path)) == 2
    with new_folder(dest, True, []) as folder:
        (folder / "newer").write_text("x")
    assert os.listdir(dest) == ["newer"]
    assert os.listdir(tmp_path) == ["dest"]


def test_what_is_not_ones_own_is_not_replaced(tmp_path: Path):
    folder = tmp_path / "folder"
    refuse_foreign(folder, "bank.json", "weights.safetensors")
    folder.mkdir()
    refuse_foreign(folder, "bank.json", "weights.safetensors")
    (folder / "thesis.txt").write_text("x")
    with pytest.raises(InputError, match=r"expected bank\.json in what is replaced, found thesis\.txt and no bank"):
        refuse_foreign(folder, "bank.json", "weights.safetensors")
    (folder / "bank.json").write_text("{}")
    with pytest.raises(InputError, match=r"nothing but bank\.json, weights\.safetensors in .*, found thesis\.txt"):
        refuse_foreign(folder, "bank.json", "weights.safetensors")
    (folder / "thesis.txt").unlink()
    refuse_foreign(folder, "bank.json", "weights.safetensors")
    with pytest.raises(InputError, match="expected a folder or nothing, found a file"):
        refuse_foreign(folder / "bank.json", "bank.json")
