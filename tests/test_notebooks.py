"""The notebooks are Jupytext Markdown, and run with the demo's model as a reader would run them."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.md"))
DEMO = ROOT / "runs" / "demo"
MOST = 240  # seconds


@pytest.mark.parametrize("path", NOTEBOOKS, ids=[p.stem for p in NOTEBOOKS])
def test_jupytext_reads_it_as_cells(path):
    jupytext = pytest.importorskip("jupytext", reason="the extra docs is not installed")
    notebook = jupytext.read(path)
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    assert len(code) >= 3
    assert code == [block.code.rstrip() for block in blocks(path)]
    assert notebook.metadata["kernelspec"]["language"] == "python"


def blocks(path: Path) -> list:
    from documented import blocks_of

    return [block for block in blocks_of(path) if block.language == "python"]


@pytest.mark.exhaustive("the demo's model in four notebooks, minutes; its steps are run at a tiny size elsewhere")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=[p.stem for p in NOTEBOOKS])
def test_it_runs_in_under_four_minutes(path, tmp_path):
    if not (DEMO / "bank" / "bank.json").exists():
        pytest.skip(f"{DEMO} is not here; scripts/demo.sh makes it")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "demo").symlink_to(DEMO)
    (tmp_path / "scripts").symlink_to(ROOT / "scripts")
    script = "\n".join(block.code for block in blocks(path))
    started = time.monotonic()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "METEORA_CACHE": ""}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=MOST
    )
    assert done.returncode == 0, done.stderr[-2000:]
    print(f"{path.stem}: {time.monotonic() - started:.0f} s\n{done.stdout}")
