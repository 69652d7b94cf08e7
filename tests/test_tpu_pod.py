"""The launch recipes, with stand-ins for gcloud, xpk, srun and meteora: the same command everywhere, results once."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "scripts" / "tpu_pod"
SCRIPTS = sorted([*FOLDER.glob("*.sh"), FOLDER / "slurm.sbatch"])
COMMAND = ["evaluate", "--base", "inputs/base", "--systems", 'base,it\'s "two" words', "--out", "runs/x y"]
TRAIN = ["train", "gates", "--base", "inputs/base", "--out", "runs/x y"]

# Records each call; plays the bucket gs:// by a folder, and two hosts one after another.
STAND_IN = """#!/usr/bin/env python3
import json, os, pathlib, shutil, subprocess, sys
name, args = os.path.basename(sys.argv[0]), sys.argv[1:]
with open(os.environ["CALLS"], "a") as file:
    file.write(json.dumps([name, *args]) + "\\n")
place = lambda a: a.replace("gs://", os.environ["BUCKETS"] + "/")
paths = [place(a) for a in args if not a.startswith("--")][2:]
if name == "meteora":
    out = pathlib.Path(args[args.index("--out") + 1])
    out.mkdir(parents=True, exist_ok=True)
    earlier = (out / "records.jsonl").read_text() if (out / "records.jsonl").exists() else ""
    if os.environ.get("HOST", "0") == "0":  # process 0 writes the results
        (out / "records.jsonl").write_text(earlier + "line\\n")
        written = out.with_name(".table")  # comes whole into its place, as old as it is by then
        written.write_text("{}")
        if "SLOW" in os.environ:
            import time; time.sleep(float(os.environ["SLOW"]))
        written.rename(out / "table.json")
        if args[0] == "train":  # goes on from the newest checkpoint: two steps more, the newest two kept
            from time import sleep
            run = pathlib.Path(args[args.index("--run") + 1] if "--run" in args else f"{out}-run")
            (run / "checkpoints").mkdir(parents=True, exist_ok=True)
            step = max([int(p.name) for p in (run / "checkpoints").iterdir()], default=0)
            for step in (step + 1, step + 2):
                part = run / "checkpoints" / f"{step}.orbax-checkpoint-tmp"
                part.mkdir()
                (part / "weights").write_text(f"step {step}")
                sleep(float(os.environ.get("SLOW", 0)))
                part.rename(run / "checkpoints" / str(step))
                shutil.rmtree(run / "checkpoints" / str(step - 2), ignore_errors=True)
                with (run / "log.jsonl").open("a") as file:
                    file.write(f"{step}\\n")
                sleep(float(os.environ.get("SLOW", 0)))
    sys.exit(int(os.environ.get("STATUS", 0)))
if args[:2] == ["storage", "ls"]:
    sys.exit(not os.path.exists(place(args[2])))
if args[:2] == ["storage", "rsync"]:
    if "--delete-unmatched-destination-objects" in args:
        shutil.rmtree(paths[1], ignore_errors=True)
    shutil.copytree(*paths, dirs_exist_ok=True)
if args[:2] == ["storage", "cp"]:
    os.makedirs(os.path.dirname(paths[1]), exist_ok=True)
    shutil.copy(*paths)
if args[:2] == ["storage", "rm"]:
    shutil.rmtree(paths[0])
if name == "srun":
    for host in ("0", "1"):
        subprocess.run(args[1:], check=True, env={**os.environ, "HOST": host})
"""


@pytest.fixture
def checkout(tmp_path):
    """A folder with the scripts alone, stand-ins on PATH, and a file of calls."""
    shutil.copytree(FOLDER, tmp_path / "checkout" / "scripts" / "tpu_pod")
    (tmp_path / "bin").mkdir()
    for name in ("gcloud", "xpk", "srun", "meteora"):
        (tmp_path / "bin" / name).write_text(STAND_IN)
        (tmp_path / "bin" / name).chmod(0o755)
    return tmp_path


def run(checkout, script, *args, status=0, **environment):
    variables = {
        "PATH": f"{checkout / 'bin'}:{os.environ['PATH']}",
        "HOME": str(checkout),
        "CALLS": str(checkout / "calls"),
        "BUCKETS": str(checkout / "buckets"),
        **environment,
    }
    done = subprocess.run(
        [checkout / "checkout" / "scripts" / "tpu_pod" / script, *args],
        env=variables, cwd=checkout / "checkout", capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == status, done.stderr
    file = checkout / "calls"
    calls = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return calls, done


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_scripts_parse_and_are_executable(script):
    subprocess.run(["bash", "-n", script], check=True)
    assert os.access(script, os.X_OK)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="needs shellcheck on PATH")
def test_shellcheck_finds_nothing():
    subprocess.run(["shellcheck", "-s", "bash", *SCRIPTS], check=True)


def test_a_host_runs_the_command_as_one_of_many(checkout):
    calls, _ = run(checkout, "on_host.sh", *COMMAND)
    assert calls == [["meteora", *COMMAND, "--distributed"]]


def test_a_host_without_out_or_with_a_failing_command_says_so(checkout):
    _, done = run(checkout, "on_host.sh", "evaluate", status=2)
    assert "--out: expected a folder" in done.stderr
    run(checkout, "on_host.sh", *COMMAND, status=3, STATUS="3")
    run(checkout, "on_host.sh", *COMMAND, status=3, STATUS="3", STORE="gs://bucket/x")


@pytest.mark.exhaustive("waits for shell scripts")
def test_results_are_sent_by_the_host_that_wrote_them_and_fetched_by_all(checkout):
    store, out = checkout / "buckets" / "bucket" / "x", checkout / "checkout" / "runs" / "x y"
    inputs = checkout / "buckets" / "bucket" / "inputs" / "base"
    inputs.mkdir(parents=True)
    (inputs / "config.json").write_text("{}")
    where = {"STORE": "gs://bucket/x", "INPUTS": "gs://bucket/inputs"}
    run(checkout, "on_host.sh", *COMMAND, **where)
    assert (checkout / "checkout" / "inputs" / "base" / "config.json").exists()
    assert (store / "records.jsonl").read_text() == "line\n"
    assert (store / "table.json").exists()
    shutil.rmtree(out)  # another host, another disk
    (checkout / "calls").unlink()
    calls, _ = run(checkout, "on_host.sh", *COMMAND, HOST="1", **where)
    assert (out / "records.jsonl").read_text() == "line\n"
    assert not [c for c in calls if c[1:3] == ["storage", "cp"]]
    run(checkout, "on_host.sh", *COMMAND, **where)  # the job goes on
    assert (store / "records.jsonl").read_text() == "line\nline\n"


def test_results_are_sent_while_the_command_runs(checkout):
    calls, _ = run(checkout, "on_host.sh", *COMMAND, STORE="gs://bucket/x", SYNC="1", SLOW="4")
    sent = [c[3] for c in calls if c[1:3] == ["storage", "cp"]]
    assert sent[0] == "runs/x y/records.jsonl"
    assert sent.index("runs/x y/table.json") > 0
    assert sent.count("runs/x y/table.json") == 1


def test_a_training_that_lost_its_disk_goes_on_from_the_checkpoints_in_the_store(checkout):
    store, runs = checkout / "buckets" / "bucket" / "x-run", checkout / "checkout" / "runs"
    where = {"STORE": "gs://bucket/x/", "SYNC": "1"}
    calls, _ = run(checkout, "on_host.sh", *TRAIN, SLOW="1.2", **where)
    assert not [c for c in calls if "orbax-checkpoint-tmp" in c[-1]]
    kept = store / "checkpoints"
    assert sorted(os.listdir(kept)) == ["1", "2"]
    assert {p.read_text() for p in kept.glob("*/weights")} == {"step 1", "step 2"}
    (kept / "2" / ".whole").unlink()  # the host went while it sent this one
    for folder in (runs / "x y", runs / "x y-run"):
        shutil.rmtree(folder)
    (checkout / "calls").unlink()
    calls, _ = run(checkout, "on_host.sh", *TRAIN, HOST="1", **where)
    assert os.listdir(runs / "x y-run" / "checkpoints") == ["1"]
    assert (runs / "x y-run" / "log.jsonl").read_text() == "1\n2\n"
    assert not [c for c in calls if c[1:3] in (["storage", "cp"], ["storage", "rm"])]  # its copies are not sent
    run(checkout, "on_host.sh", *TRAIN, **where)
    assert sorted(os.listdir(kept)) == ["2", "3"]  # steps 2 and 3: the training removed the first
    assert all((kept / step / ".whole").exists() for step in "23")
    assert not list(runs.glob("**/.whole"))
    assert (store / "log.jsonl").read_text() == "1\n2\n2\n3\n"


def test_a_run_folder_of_another_name_is_kept_beside_the_results(checkout):
    run(checkout, "on_host.sh", *TRAIN, "--run", "runs/other", STORE="gs://bucket/x")
    assert (checkout / "buckets" / "bucket" / "x-run" / "checkpoints" / "2" / "weights").read_text() == "step 2"


def test_what_could_not_be_sent_is_sent_the_next_time_and_at_last_an_error(checkout):
    name, fails = checkout / "bin" / "gcloud", 'if args[:2] == ["storage", "cp"] and {}:\n    sys.exit(1)\n'
    where = {"STORE": "gs://bucket/x", "SYNC": "1"}
    before, paths, after = name.read_text().partition("paths =")
    mark = 'os.environ["HOME"] + "/failed"'
    once = f'not os.path.exists({mark}) and not open({mark}, "w").close()'
    name.write_text(before + fails.format(once) + paths + after)
    _, done = run(checkout, "on_host.sh", *COMMAND, SLOW="2", **where)
    assert "not all could be sent" in done.stderr
    assert (checkout / "buckets" / "bucket" / "x" / "records.jsonl").read_text() == "line\n"
    name.write_text(before + fails.format(True) + paths + after)
    run(checkout, "on_host.sh", *COMMAND, status=1, **where)


def spoken(text, checkout, **environment):
    """What bash makes of a command that was handed to it as text: the arguments of meteora."""
    (checkout / "calls").unlink(missing_ok=True)
    (checkout / "meteora-jax").unlink(missing_ok=True)
    (checkout / "meteora-jax").symlink_to(checkout / "checkout")
    text = text.replace("/meteora-jax/scripts", f"{checkout}/checkout/scripts")
    variables = {
        "PATH": f"{checkout / 'bin'}:{os.environ['PATH']}", "HOME": str(checkout), "CALLS": str(checkout / "calls"),
        "BUCKETS": str(checkout / "buckets"), **environment,
    }  # fmt: skip
    subprocess.run(["bash", "-c", text], check=True, cwd=checkout, env=variables, timeout=60)
    calls = [json.loads(line) for line in (checkout / "calls").read_text().splitlines()]
    return next(c for c in calls if c[0] == "meteora")


def test_gcloud_gives_every_worker_the_same_command(checkout):
    for folder in ("x", "x-run"):
        (checkout / "buckets" / "bucket" / folder).mkdir(parents=True)
    calls, done = run(
        checkout,
        "gcloud.sh",
        *COMMAND,
        TPU="slice",
        ZONE="zone",
        STORE="gs://bucket/x",
        INPUTS="gs://bucket/in",
        KEEP="1",
    )
    ssh = [c for c in calls if "ssh" in c]
    assert len(ssh) == 1
    assert ssh[0][ssh[0].index("--worker") + 1] == "all"
    assert "results: runs/x" in done.stdout
    assert calls[-1][1:] == ["storage", "rsync", "--recursive", "gs://bucket/x", "runs/x"]
    assert ["gcloud", "storage", "rsync", "--recursive", "gs://bucket/x-run", "runs/x-run"] in calls
    text = ssh[0][ssh[0].index("--command") + 1]
    assert spoken(text, checkout) == ["meteora", *COMMAND, "--distributed"]
    _, done = run(checkout, "gcloud.sh", *COMMAND, TPU="slice", ZONE="zone", status=1)
    assert "STORE: gs:// folder of the results" in done.stderr


def test_xpk_gets_the_same_command(checkout):
    calls, _ = run(
        checkout, "xpk.sh", *COMMAND, CLUSTER="c", WORKLOAD="w", TYPE="v5litepod-16", IMAGE="i", STORE="gs://bucket/x",
        XPK_FLAGS="--project p",
    )  # fmt: skip
    (call,) = calls
    assert call[:3] == ["xpk", "workload", "create"]
    assert call[call.index("--project") + 1] == "p"
    assert spoken(call[call.index("--command") + 1], checkout) == ["meteora", *COMMAND, "--distributed"]


def test_slurm_starts_a_process_a_gpu_and_needs_no_store(checkout):
    calls, _ = run(
        checkout, "slurm.sbatch", *COMMAND, SLURM_SUBMIT_DIR=str(checkout / "checkout"), STORE="gs://bucket/x"
    )
    assert [c for c in calls if c[0] == "meteora"] == 2 * [["meteora", *COMMAND, "--distributed"]]
    assert not [c for c in calls if c[0] == "gcloud"]
    assert (checkout / "checkout" / "runs" / "x y" / "records.jsonl").read_text() == "line\n"
