"""A run may be killed at any moment and goes on as if nothing had happened; damaged checkpoints are refused.

METEORA_KILLS=10 kills that many runs instead of one, or three with --all. Run as a script it is a run of training.
"""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from extent import examples
from flat_settings import flat
from meshes import environment, mesh_of
from safetensors.numpy import load_file
from test_training_mesh import free_port, together
from worlds import NAMES

from meteora_jax.config import InputError, Preempted
from meteora_jax.evaluation.tasks import Example, load_split
from meteora_jax.sharding import initialize_distributed, make_mesh
from meteora_jax.training.adapter import train_adapter
from meteora_jax.training.checkpoints import Checkpoints
from meteora_jax.training.data import Layout
from meteora_jax.training.gates import train_gates
from meteora_jax.training.settings import AdapterTraining, Checkpointing, GateTraining
from meteora_jax.training.trainer import Callbacks

KILLS = int(os.environ.get("METEORA_KILLS", examples(1, 3)))
STEPS, EVERY = 12, 4
LAYOUT = Layout(rows=4, width=64, shards=1, packing=True)


def train(base: str, bank: str, tasks: str, dest: str, run: str, mesh: Any = None, progress: Any = None) -> Any:
    """A run's last record."""
    settings = flat(
        GateTraining, steps=STEPS, batch_size=8, learning_rate=2e-3, composite=0.25, max_length=200, rows=4, warmup=0.2
    )
    return train_gates(
        base, bank, {n: load_split(Path(tasks), n, "train") for n in NAMES}, dest, settings, dtype="float32", mesh=mesh,
        checkpointing=Checkpointing(run=Path(run), save_every=EVERY, keep=2), callbacks=Callbacks(progress=progress),
    )  # fmt: skip


def main(*arguments: str) -> None:
    """A run in a process of its own: one that kills itself DELAY seconds after its step KILL_AT, or one of two hosts
    (COORDINATOR, INDEX)."""
    *folders, how, which = arguments
    if ":" in how:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        initialize_distributed(how, 2, int(which))
        train(*folders, mesh=make_mesh(4, 1, 1))
        return

    def progress(step: int, _: dict[str, Any]) -> None:
        if step == int(how):
            threading.Timer(float(which), lambda: os.kill(os.getpid(), signal.SIGKILL)).start()

    train(*folders, progress=progress)


@pytest.fixture(scope="module")
def place(world, tmp_path_factory) -> tuple[Path, list[str]]:
    """A folder, and the first arguments of `train`."""
    folder = tmp_path_factory.mktemp("runs")
    for name in NAMES:
        (folder / "tasks" / name).mkdir(parents=True)
        lines = [json.dumps({"prompt": f"[INST] {name} {i} [/INST]\n", "response": f"{i}"}) for i in range(20)]
        (folder / "tasks" / name / "train.jsonl").write_text("\n".join(lines) + "\n")
    return folder, [str(world["base"]), str(world["bank"]), str(folder / "tasks")]


def in_folder(place, name: str) -> list[str]:
    """The arguments of the run of that name."""
    folder, start = place
    return [*start, str(folder / name), str(folder / f"{name}-run")]


def killed(place, name: str, kill_at: int, delay: float) -> subprocess.CompletedProcess:
    command = [sys.executable, __file__, *in_folder(place, name), str(kill_at), str(delay)]
    return subprocess.run(command, env=environment(1), capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def whole(place) -> Path:
    """The gates of a run that nothing interrupted."""
    assert train(*in_folder(place, "whole"))["step"] == STEPS
    return place[0] / "whole"


@pytest.mark.exhaustive("a training more")
def test_a_run_leaves_curves_scalars_and_a_map(place, whole):
    run = place[0] / "whole-run"
    for picture in ("curves.png", "gate_accuracy.png"):
        assert (run / picture).read_bytes().startswith(b"\x89PNG")
    (events,) = (run / "tensorboard").iterdir()
    raw = events.read_bytes()
    for scalar in ("lm", "entropy", "accuracy_of_task/birch", "adapter_load/cedar", "accuracy/down_proj/02"):
        assert scalar.encode() in raw
    records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == list(range(1, STEPS + 1))
    found = sorted(p.name for p in (run / "checkpoints").iterdir() if p.name.isdigit())
    assert found == sorted([str(STEPS - EVERY), str(STEPS)])


def test_killed_runs_end_bit_for_bit_as_the_whole_one(place, whole, caplog):
    folder = place[0]
    rng, reached, resumed = random.Random(KILLS), 0, []

    def end() -> None:
        caplog.clear()
        with jax.log_compiles():
            resumed.append(train(*in_folder(place, "killed"))["resumed_at"])
        if jax.config.jax_compilation_cache_dir:  # what comes back is the step of what began
            assert "Persistent compilation cache hit for 'jit_step'" in caplog.text
        assert resumed[-1] >= reached
        assert (folder / "killed" / "weights.safetensors").read_bytes() == (whole / "weights.safetensors").read_bytes()
        found, expected = (
            [json.loads(line) for line in (folder / f"{name}-run" / "log.jsonl").read_text().splitlines()]
            for name in ("killed", "whole")
        )
        assert [(r["step"], r["lm"], r["gate"]) for r in found] == [(r["step"], r["lm"], r["gate"]) for r in expected]

    for _ in range(KILLS):
        if reached >= STEPS - EVERY:  # too near the end to be killed before it; the next one starts over
            end()
            shutil.rmtree(folder / "killed-run")
            reached = 0
        first = reached + 1 if KILLS > 1 else 2 * EVERY + 1  # a single one comes after a save
        kill_at = rng.randint(first, min(reached + 2 * EVERY + 2, STEPS - 2))
        done = killed(place, "killed", kill_at, rng.random() * 0.1)
        assert done.returncode in (0, -signal.SIGKILL), done.stderr[-2000:]  # 0: done before the clock was
        saved = [int(p.name) for p in (folder / "killed-run" / "checkpoints").iterdir() if p.name.isdigit()]
        reached = max(saved, default=0)
        assert reached >= kill_at - 2 * EVERY  # a save is complete before the next one begins
    end()
    assert max(resumed) > 0


@pytest.mark.exhaustive("a training more")
def test_a_finished_run_writes_its_gates_again(place, whole):
    """Nothing is trained; not even the log is needed."""
    shutil.copytree(place[0] / "whole-run", place[0] / "again-run")
    (place[0] / "again-run" / "log.jsonl").unlink()
    final = train(*in_folder(place, "again"))
    assert (final["step"], final["resumed_at"]) == (STEPS, STEPS)
    assert (place[0] / "again" / "weights.safetensors").read_bytes() == (whole / "weights.safetensors").read_bytes()


@pytest.mark.exhaustive("two trainings on meshes")
def test_a_run_goes_on_on_another_mesh(place, whole, caplog):
    assert killed(place, "moved", kill_at=2 * EVERY + 2, delay=0.0).returncode == -signal.SIGKILL
    with jax.log_compiles():
        final = train(*in_folder(place, "moved"), mesh=mesh_of(2, 2, 2))
    assert len(re.findall(r"Compiling jit\(step\)", caplog.text)) == 1  # once a run, whatever the batches hold
    assert EVERY <= final["resumed_at"] <= 2 * EVERY + 2
    expected, found = load_file(whole / "weights.safetensors"), load_file(place[0] / "moved" / "weights.safetensors")
    for p in expected:
        assert np.abs(expected[p]).max() > 1e-3
        assert np.abs(expected[p] - found[p]).max() <= 1e-5, p


def test_two_hosts_train_and_one_goes_on(place):
    """Each host draws half of the rows; the checkpoint holds both positions, and one device alone goes on with both."""
    folder, address = place[0], f"127.0.0.1:{free_port()}"
    command = [sys.executable, __file__, *in_folder(place, "pair"), address]
    together([[*command, str(i)] for i in range(2)], environment(2))
    expected = load_file(folder / "pair" / "weights.safetensors")
    shutil.rmtree(folder / "pair-run" / "checkpoints" / str(STEPS))
    assert train(*in_folder(place, "pair"))["resumed_at"] == STEPS - EVERY
    found = load_file(folder / "pair" / "weights.safetensors")
    for p in expected:
        assert np.abs(expected[p]).max() > 1e-3
        assert np.abs(expected[p] - found[p]).max() <= 1e-5, p


def test_sigterm_saves_and_says_so(place):
    folder, (base, bank, tasks) = place
    run = folder / "ended-run"
    command = [
        "train", "gates", "--base", base, "--bank", bank, "--tasks", tasks, "--out", str(folder / "ended"),
        "--recipe", "meteora", "--steps", "5000", "--batch-size", "4", "--max-length", "64",
    ]  # fmt: skip
    program = [sys.executable, str(Path(__file__).with_name("command.py")), *command]
    process = subprocess.Popen(program, env=environment(1), stderr=subprocess.PIPE)
    while not (run / "log.jsonl").is_file() or (run / "log.jsonl").read_bytes().count(b"\n") < 3:
        assert process.poll() is None, process.stderr.read()[-4000:]
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    message = process.communicate(timeout=120)[1].decode()
    assert process.returncode == Preempted.status == 75
    (saved,) = [p.name for p in (run / "checkpoints").iterdir() if p.name.isdigit()]
    assert f"preempted: step {saved} is saved in" in message
    assert not (folder / "ended").exists()


# Checkpoints by themselves


def state(value: float) -> dict[str, jax.Array]:
    return {
        "gate": jnp.full((3, 50, 7), value) + jnp.arange(7, dtype=jnp.float32)[None, None],
        "count": jnp.int32(value),
    }


@pytest.fixture
def saved(tmp_path) -> Path:
    """Checkpoints of steps 10, 20 and 30 in a folder that keeps three."""
    checkpoints = Checkpoints(tmp_path / "checkpoints", 3, {"seed": 1})
    for step in (5, 10, 20, 30):
        checkpoints.save(step, state(step), LAYOUT, {0: f"at {step}"})
    checkpoints.close()
    return tmp_path / "checkpoints"


def restored(folder: Path, identity={"seed": 1}):  # noqa: B006 (read only)
    checkpoints = Checkpoints(folder, 3, identity)
    try:
        return checkpoints.restore(state(0.0))
    finally:
        checkpoints.close()


def test_the_newest_checkpoint_comes_back(saved):
    found = restored(saved)
    assert (found.step, found.position, found.refused) == (30, {0: "at 30"}, ())
    jax.tree.map(np.testing.assert_array_equal, found.state, state(30.0))
    assert sorted(p.name for p in saved.iterdir() if p.name.isdigit()) == ["10", "20", "30"]


def largest(folder: Path) -> Path:
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def truncate(folder: Path) -> None:
    file = largest(folder / "state")
    os.truncate(file, file.stat().st_size // 2)


def flip(folder: Path) -> None:
    file = largest(folder / "state")
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 0x55
    file.write_bytes(raw)


def garble(folder: Path) -> None:
    for file in (folder / "run").rglob("*"):
        if file.is_file():
            file.write_text(file.read_text()[:-20])


def empty(folder: Path) -> None:
    for file in sorted((folder / "state").rglob("*"), reverse=True):
        file.unlink() if file.is_file() else file.rmdir()


@pytest.mark.parametrize("damage", [truncate, flip, garble, empty])
def test_a_damaged_checkpoint_is_refused_by_name_and_the_one_before_is_used(saved, damage):
    damage(saved / "30")
    found = restored(saved)
    assert found.step == 20
    jax.tree.map(np.testing.assert_array_equal, found.state, state(20.0))
    (refused,) = found.refused
    assert refused.startswith(f"{saved / '30'}: damaged (")
    assert (saved / "damaged-30").is_dir()
    checkpoints = Checkpoints(saved, 3, {"seed": 1})
    checkpoints.save(30, state(31.0), LAYOUT, {0: "again"})  # its step is free again
    checkpoints.close()
    assert restored(saved).position == {0: "again"}


def test_only_damaged_checkpoints_are_refused_all(saved):
    for step in (10, 20, 30):
        truncate(saved / str(step))
    with pytest.raises(InputError) as info:
        restored(saved)
    for step in (10, 20, 30):
        assert f"{saved / str(step)}: damaged" in str(info.value)


def test_a_run_with_another_chat_template_is_another_run(place, tmp_path):
    """It does not go on, and --no-resume leaves nothing of the run before in TensorBoard's folder."""
    base, run = tmp_path / "base", tmp_path / "run"
    shutil.copytree(place[1][0], base)
    chats = [Example("q", f"{i}", messages=({"role": "user", "content": f"q {i}"},)) for i in range(4)]
    settings = flat(AdapterTraining, name="new", steps=1, batch_size=2, rank=2)

    def steps(**how: bool) -> list[int]:
        done = []
        train_adapter(
            base, {"chats": chats}, tmp_path / "new", settings, dtype="float32",
            checkpointing=Checkpointing(run=run, **how), callbacks=Callbacks(progress=lambda n, _: done.append(n)),
        )  # fmt: skip
        return done

    assert (steps(), steps()) == ([1], [])
    template = base / "chat_template.jinja"
    template.write_text(template.read_text() + "{# corrected #}")
    with pytest.raises(InputError, match=r"checkpoints/1: tokenizer: expected '\w+' \(this run's\), found '\w+'"):
        steps()
    (said,) = (run / "checkpoints" / "1" / "run").glob("metadata")
    record = json.loads(said.read_text())
    del record["identity"]["tokenizer"]  # as before it was said
    said.write_text(json.dumps(record))
    assert steps() == []
    (run / "tensorboard" / "notes.txt").touch()
    assert steps(resume=False) == [1]
    assert sorted(p.name.split(".")[0] for p in (run / "tensorboard").iterdir()) == ["events", "notes"]


def test_checkpoints_that_lack_a_later_key_go_on(saved):
    def step(identity: dict[str, Any]) -> int:
        checkpoints = Checkpoints(saved, 3, identity, later=("tokenizer",))
        found = checkpoints.restore(state(0.0)).step
        if found == 30:
            checkpoints.save(40, state(40.0), LAYOUT, {0: "at 40"})
        checkpoints.close()
        return found

    assert (step({"seed": 1, "tokenizer": "a"}), step({"seed": 1, "tokenizer": "a"})) == (30, 40)
    with pytest.raises(InputError, match=r"40: tokenizer: expected 'b' \(this run's\), found 'a'"):
        restored(saved, {"seed": 1, "tokenizer": "b"})


def test_checkpoints_of_another_run_are_refused(saved):
    with pytest.raises(InputError, match=r"30: seed: expected 2 \(this run's\), found 1"):
        restored(saved, {"seed": 2})
    assert (saved / "30").is_dir()


def test_no_checkpoint_is_no_error(tmp_path):
    assert restored(tmp_path / "none") is None


def test_a_folder_takes_one_run_at_a_time(tmp_path):
    """As when a run is begun again before SIGTERM has ended it."""
    first = (
        "import sys; from pathlib import Path; from meteora_jax.training.checkpoints import Checkpoints\n"
        "held = Checkpoints(Path(sys.argv[1]) / 'checkpoints', 1, {}); print('held', flush=True); input()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", first, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    try:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(InputError, match=f"{tmp_path}: expected no other process to train here, found one"):
            Checkpoints(tmp_path / "checkpoints", 1, {})
    finally:
        other.kill()
        other.communicate()
    again = Checkpoints(tmp_path / "checkpoints", 1, {})  # a killed process holds nothing
    Checkpoints(tmp_path / "checkpoints", 1, {}).close()
    again.close()


if __name__ == "__main__":
    import compiling
    import without_torch  # noqa: F401  (begins sooner)

    compiling.use()
    main(*sys.argv[1:])
