"""scripts/bench.py on a CPU: every field of a record, the picture, and what it refuses."""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "bench.py"
FIELDS = {"what", "shape", "adapters", "rank", "top_k", "batch", "sequence", "ms", "ms_bare", "ratio", "device", "jax"}


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), "--shape", "tiny", "--seconds", "0.01", "--layers", "1", *arguments]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(SCRIPT.parents[1])}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)


@pytest.mark.exhaustive("runs a benchmark")
def test_records_and_picture(tmp_path: Path):
    records, picture = tmp_path / "records.json", tmp_path / "picture.png"
    small = ("--batch", "2", "--sequence", "16", "--adapters", "3", "--group", "o")
    result = bench("--what", "kernel", "decode", *small, "--json", str(records), "--picture", str(picture))
    assert result.returncode == 0, result.stderr
    assert "fastest for o 2x1, 3 of rank 8, top-2" in result.stdout
    found = json.loads(records.read_text())
    assert [r.get("implementation") for r in found] == [
        "reference",
        "masked",
        "gathered",
        "grouped",
        "packed_reference",
        None,
    ]
    for record in found:
        assert FIELDS | {"date", "command", "roofline", "gb_per_s", "tflop_per_s"} <= set(record)
        assert record["ms"] > 0
        assert math.isclose(record["ratio"], record["ms"] / record["ms_bare"])
        assert record.get("error", 0) < 1e-5
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.exhaustive("runs a benchmark")
def test_settings_side_by_side(tmp_path: Path):
    records = tmp_path / "records.json"
    small = ("--batch", "2", "--sequence", "16", "--adapters", "3", "--json", str(records), "--profile")
    result = bench("--what", "prefill", "decode", "--settings", "xla", "plain", *small)
    assert result.returncode == 0, result.stderr
    assert "fastest adapted by " in result.stdout
    assert "us each" in result.stdout
    found = [(r["what"], r["model"], r["setting"]) for r in json.loads(records.read_text())]
    every = itertools.product(("prefill", "decode"), ("bare", "adapted"), ("today", "xla", "plain"))
    assert sorted(found) == sorted(every)


@pytest.mark.exhaustive("runs a benchmark")
def test_mixtures_side_by_side(tmp_path: Path):
    records = tmp_path / "records.json"
    small = ("--batch", "2", "--sequence", "16", "--adapters", "6", "--json", str(records))
    result = bench("--what", "decode", "--routing", "request", "--top-k", "3", "1", *small)
    assert result.returncode == 0, result.stderr
    three, one = json.loads(records.read_text())
    assert (three["top_k"], one["top_k"]) == (3, 1)
    assert three["ms_bare"] == one["ms_bare"]  # one bare model, measured in turns with both
    assert three["gb_per_s"] * three["ms"] > one["gb_per_s"] * one["ms"]  # six adapters' bytes, two adapters'


def test_a_setting_that_there_is_not_is_refused_in_a_line():
    result = bench("--what", "decode", "--settings", "step")
    assert result.returncode == 1
    assert result.stderr.strip().splitlines()[-1].startswith("error: --settings: expected all or some of today")


def test_prompts_that_are_no_whole_runs_are_refused_in_a_line():
    result = bench("--what", "decode", "--sequence", "8")
    assert result.returncode == 1
    wanted = "error: --sequence: expected a multiple of 16 with prefill and decode, found 8"
    assert result.stderr.strip().splitlines()[-1] == wanted


def test_an_implementation_of_another_device_is_refused_in_a_line():
    result = bench("--what", "kernel", "--implementation", "packed_triton")
    assert result.returncode == 1
    assert result.stderr.strip().splitlines()[-1].startswith("error: --implementation: expected reference, masked")
