"""scripts/quality.py: its plan of jobs, the order in which they run, and its tables. No job is run here."""

import importlib.util
import json
import shlex
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import tyro

from meteora_jax.cli import Command
from meteora_jax.config import InputError

SCRIPT = Path(__file__).parents[1] / "scripts" / "quality.py"
NAMES = tuple("abcdef")


@pytest.fixture(scope="module")
def quality() -> Any:
    spec = importlib.util.spec_from_file_location("quality", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["quality"] = module
    sys.path.insert(0, str(SCRIPT.parent))
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(SCRIPT.parent))
    del sys.modules["quality"]


def settings(quality, tmp_path, **more):
    return quality.Quality(base=Path("base"), tasks=Path("tasks"), out=tmp_path / "out", **more)


def test_every_job_is_a_command_that_meteora_takes(quality, tmp_path):
    for more in ({}, {"dtype": "bfloat16", "remat": "none"}, {"remat": "dots"}):
        for job in quality.plan(settings(quality, tmp_path, **more), NAMES):
            config = (tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes)
            command: Any = tyro.cli(Command, args=list(job.arguments), config=config)
            if job.name in ("evaluate baselines", "evaluate composite-baselines"):
                folder = tmp_path / "out"
                loras = ("lora-f-r8", "lora-f-r48", "lora-b-r8", "lora-b-r48")
                assert command.system_bank == tuple(f"{lora}={folder / lora}" for lora in loras)
            if job.name == "bank":
                assert command.what.task == NAMES


def test_jobs_come_after_what_they_need_and_the_adapters_are_one_job(quality, tmp_path):
    jobs = quality.plan(settings(quality, tmp_path), NAMES)
    names = [job.name for job in jobs]
    assert len(set(names)) == len(names)
    for i, job in enumerate(jobs):
        assert set(job.after) <= set(names[:i]), job.name
    by_name = {job.name: job for job in jobs}
    assert [j.name for j in jobs if j.arguments[:2] == ("train", "bank")] == ["bank"]
    assert {j.name for j in jobs if j.gpus == 0} == {"bank-small", "index"}
    small = by_name["bank-small"].arguments
    assert small[4:] == ("a", "b")  # without the last four
    assert names[:3] == ["bank", "bank-small", "gates"]
    assert "retrieval-fusion" in " ".join(by_name["evaluate retrieval"].arguments)
    assert "--unseen" in by_name["evaluate retrieval"].arguments
    assert by_name["evaluate baselines"].after == ("bank", "lora-f-r8", "lora-f-r48", "lora-b-r8", "lora-b-r48")


@pytest.mark.parametrize(
    ("parts", "jobs"),
    [
        (("single",), {"bank", "gates", "evaluate single", "evaluate plain"}),
        (("composite",), {"bank", "gates", *(f"evaluate composite{e}" for e in ("", "-plain", "-warm"))}),
        (("retrieval",), {"bank", "gates", "index", "evaluate retrieval"}),
        (("forms",), {"bank", "gates-meteora", "evaluate gates-meteora"}),
        (("growth",), {"bank", "bank-small", "gates-small", "gates-grown", "evaluate gates-grown"}),
    ],
)  # fmt: skip
def test_parts_choose_jobs(quality, tmp_path, parts, jobs):
    assert {j.name for j in quality.plan(settings(quality, tmp_path, parts=parts), NAMES)} == jobs


def test_few_tasks_do_not_grow_and_unknown_parts_are_refused(quality, tmp_path):
    names = {j.name for j in quality.plan(settings(quality, tmp_path), NAMES[:5])}
    assert not any("small" in n or "grown" in n for n in names)
    with pytest.raises(InputError, match="found kittens"):
        quality.plan(settings(quality, tmp_path, parts=("kittens",)), NAMES)


def job(quality, tmp_path, name, after=(), gpus=1, shares=False):
    return quality.Job(name, ("evaluate",), tmp_path / "made" / name, after, gpus, shares)


def run(quality, tmp_path, monkeypatch, jobs, failing=(), **more):
    """(names in the order of their start, names that failed, {name: slots})."""
    started, slots = [], {}
    gate = threading.Lock()

    def one(self, job, own):
        with gate:
            started.append(job.name)
            slots[job.name] = own
        return job.name not in failing

    monkeypatch.setattr(quality.Runner, "_job", one)
    failed = quality.Runner(settings(quality, tmp_path, **more)).run(jobs)
    return started, failed, slots


def test_the_first_of_the_plan_gets_the_next_free_gpu(quality, tmp_path, monkeypatch):
    make = lambda *args, **how: job(quality, tmp_path, *args, **how)  # noqa: E731
    jobs = [make("bank"), make("gates", ("bank",)), make("index", gpus=0), make("lora-1"), make("lora-2")]
    started, failed, slots = run(quality, tmp_path, monkeypatch, jobs, gpus=(3,), per_gpu=1)
    assert [n for n in started if n != "index"] == ["bank", "gates", "lora-1", "lora-2"]
    assert not failed
    assert slots["index"] == []
    assert slots["gates"] == [3]


def test_a_failed_job_fails_what_needs_it_and_no_other(quality, tmp_path, monkeypatch):
    make = lambda *args, **how: job(quality, tmp_path, *args, **how)  # noqa: E731
    jobs = [make("bank"), make("gates", ("bank",)), make("judge", ("gates",)), make("other"), make("there")]
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "there").touch()
    started, failed, _ = run(quality, tmp_path, monkeypatch, jobs, failing=("bank",))
    assert sorted(started) == ["bank", "other"]  # what is there is not made again
    assert failed == ["bank", "gates", "judge"]


def test_a_job_of_two_gpus_waits_for_both(quality, tmp_path, monkeypatch):
    make = lambda *args, **how: job(quality, tmp_path, *args, **how)  # noqa: E731
    jobs = [make("first"), make("wide", gpus=2), make("last")]
    started, failed, slots = run(quality, tmp_path, monkeypatch, jobs, gpus=(0, 1))
    assert started == ["first", "wide", "last"]
    assert sorted(slots["wide"]) == [0, 0, 1, 1]
    runner = quality.Runner(settings(quality, tmp_path, gpus=(0, 1)))
    whole, part = runner._environment([0, 0, 1, 1]), runner._environment([1])
    assert (whole["CUDA_VISIBLE_DEVICES"], whole["XLA_PYTHON_CLIENT_MEM_FRACTION"]) == ("0,1", "0.9")
    assert (part["CUDA_VISIBLE_DEVICES"], part["XLA_PYTHON_CLIENT_MEM_FRACTION"]) == ("1", "0.45")
    assert runner._environment([])["JAX_PLATFORMS"] == "cpu"
    assert not failed


def test_evaluations_share_a_gpu_and_a_training_waits_until_it_is_empty(quality, tmp_path):
    runner = quality.Runner(settings(quality, tmp_path, gpus=(0, 1), per_gpu=2))
    training = job(quality, tmp_path, "train")
    evaluation = job(quality, tmp_path, "judge", shares=True)
    assert runner._slots(training) == [0, 0]
    runner.free = [1, 1, 0]
    assert runner._slots(evaluation) == [1]
    assert runner._slots(training) == [1, 1]
    runner.free = [0, 1]
    assert runner._slots(training) == []
    assert len(runner._slots(evaluation)) == 1


def test_a_run_that_is_stopped_ends_its_jobs_and_begins_no_other(quality, tmp_path, monkeypatch):
    monkeypatch.setattr(quality, "METEORA", ("-c", "import time; time.sleep(300)"))
    runner = quality.Runner(settings(quality, tmp_path))
    threading.Timer(2, runner.stop).start()
    jobs = [job(quality, tmp_path, "long"), job(quality, tmp_path, "later", ("long",)), job(quality, tmp_path, "other")]
    assert runner.run(jobs) == ["long", "later", "other"]
    (record,) = [json.loads(line) for line in (tmp_path / "out" / "jobs.jsonl").read_text().splitlines()]
    assert (record["job"], record["status"]) == ("long", -15)
    assert record["seconds"] < 60


def test_tables_show_each_system_and_task_once(quality, tmp_path):
    q = settings(quality, tmp_path, parts=("single", "composite", "retrieval"), device="a machine")
    jobs = quality.plan(q, NAMES)
    cell = lambda accuracy: {"accuracy": accuracy, "problems": 10, "loraretriever": {}}  # noqa: E731
    tables = {
        "evaluate single": {"a": {"base": cell(0.1), "oracle": cell(0.5), "gates-top1": cell(0.4)},
                            "b": {"base": {"rougeL": 0.25, "problems": 8}}},
        "evaluate retrieval": {"a": {"gates-top1": cell(0.9), "gates-top2-unseen": cell(0.2)}},
        "evaluate composite-warm": {
            "composite_3": {"gates-top2": {"attempted": 9, "correct": 4, "rougeL": 0.1, "problems": 5}}
        },
    }  # fmt: skip
    for job in jobs:
        if job.name in tables:
            job.makes.parent.mkdir(parents=True)
            job.makes.write_text(json.dumps({"tasks": tables[job.name]}))
    records = quality.collect(q, jobs, 6)
    quality.tell(q, jobs, records)
    assert json.loads((q.out / "records.json").read_text()) == records
    assert {(r["device"], r["adapters"]) for r in records} == {("a machine", 6)}
    text = (q.out / "table.md").read_text()
    assert "| gates-top1 | 1 | 40.0 |" in text  # the first that judged it, once
    assert "| gates-top2-unseen | 1 | 20.0 |" in text
    assert "| gates-top2 at temperature 15 |  |  | 9 | 4 |" in text
    assert "| task | problems | base | oracle | gates-top1 |" in text
    assert "| a | 10 | 10.0 | 50.0 | 40.0 |" in text
    assert "| b, ROUGE-L | 8 | 25.0 |  |  |" in text
    assert "composite_3, ROUGE-L" not in text
    assert "| mean accuracy | | 10.0 | 50.0 | 40.0 |" in text


def test_a_composite_without_the_hub_s_tasks_has_substitutes(quality, tmp_path):
    tasks = tmp_path / "tasks"
    q = quality.Quality(base=Path("base"), tasks=tasks, out=tmp_path / "out", composite="3,10,own.jsonl")
    small, ten, file = quality.composites(q).split(",")
    assert (small, file) == ("3", "own.jsonl")
    assert [quality.COMPOSITE_10.get(task, task) for task in quality.COMPOSITES[10]] == ten.split("+")
    for name in quality.COMPOSITE_10:
        (tasks / name).mkdir(parents=True)
    assert quality.composites(q) == "3,10,own.jsonl"


def test_variants_choose_among_gates(quality, tmp_path):
    q = settings(quality, tmp_path, parts=("growth", "forms"), variants=("gates-grown", "gates-meteora"))
    made = [j.name for j in quality.plan(q, NAMES) if j.arguments[:2] == ("train", "gates")]
    assert made == ["gates-small", "gates-grown", "gates-meteora"]


def test_a_dry_run_prints_commands(tmp_path):
    for name in NAMES[:2]:
        (tmp_path / "tasks" / name).mkdir(parents=True)
        (tmp_path / "tasks" / name / "train.jsonl").write_text('{"prompt": "p", "response": "r"}\n')
    command = [sys.executable, str(SCRIPT), "--base", "base", "--tasks", str(tmp_path / "tasks"), "--out", "out"]
    done = subprocess.run([*command, "--dry-run"], capture_output=True, text=True, timeout=120, cwd=SCRIPT.parents[1])
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [shlex.split(line) for line in done.stdout.splitlines()]
    assert lines[0][:3] == ["meteora", "train", "bank"]
    assert {line[1] for line in lines} == {"train", "index", "evaluate"}
