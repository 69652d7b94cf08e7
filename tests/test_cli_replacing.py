"""Commands that replace a folder refuse one that is not theirs, before any work, and lose nobody's files."""

import json
import shutil
from pathlib import Path

import pytest
from test_cli import refused, run
from test_retrieval import PROFILES
from worlds import NAMES


@pytest.fixture
def tasks(tmp_path):
    for name in NAMES:
        folder = tmp_path / "tasks" / name
        folder.mkdir(parents=True)
        lines = [json.dumps({"prompt": f"{name} {i}\n", "response": f"{i}"}) for i in range(8)]
        (folder / "train.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path / "tasks"


def held(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def precious(folder: Path, **own: str) -> Path:
    """A folder with somebody's work, and with `own` files."""
    (folder / "chapters").mkdir(parents=True)
    (folder / "thesis.txt").write_text("x")
    (folder / "chapters" / "one.txt").write_text("y")
    for name, text in own.items():
        (folder / f"{name}.json").write_text(text)
    return folder


def commands(world, tasks: Path, dest: Path) -> dict[str, tuple[str, list]]:
    """{command: (the description of what it writes to `dest`, its words)}."""
    shared = ["--base", world["base"], "--tasks", tasks, "--steps", 1]
    train = [*shared, "--out", dest]
    bank = ["--bank", world["bank"], "--recipe", "meteora", "--batch-size", 1]
    own = ["--task", "apple", "--name", "apple", "--rank", 2]
    return {
        "export bank": ("bank", ["export", "bank", world["bank"], dest, "apple"]),
        "train gates": ("gates", ["train", "gates", *train, *bank]),
        "train adapter": ("bank", ["train", "adapter", *train, *own]),
        "own gate": ("bank", ["train", "adapter", *train, *own[:4], "--own-gate", world["bank"]]),
        "train bank": ("bank", ["train", "bank", *train, "--task", "apple"]),
        "new bank": ("bank", ["train", "gates", *shared, *bank, "--out", dest.parent / "g", "--new-bank", dest]),
        "index build": ("index", ["index", "build", dest, "--profiles", dest.parent / "profiles.json"]),
    }


@pytest.mark.parametrize(
    "command",
    ["export bank", "train gates", "train adapter", "own gate", "train bank", "new bank", "index build"],
)
def test_somebody_s_folder_stays(tmp_path, capsys, monkeypatch, world, tasks, command):
    def trains(*args, **kwargs):
        raise AssertionError("work was begun")

    monkeypatch.setattr("meteora_jax.training.trainer.Trainer.run", trains)
    (tmp_path / "profiles.json").write_text(json.dumps(PROFILES))
    dest = precious(tmp_path / "proj")
    kind, words = commands(world, tasks, dest)[command]
    before = held(dest)
    line = refused(capsys, *words)
    assert f"proj: expected {kind}.json in what is replaced, found chapters and no {kind}.json" in line
    assert held(dest) == before
    (dest / f"{kind}.json").write_text("{}")
    line = refused(capsys, *words)
    assert f"proj: expected nothing but {kind}.json, " in line
    assert line.endswith("found chapters")
    assert held(dest) == before | {f"{kind}.json": b"{}"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["profiles.json", "proj", "tasks"]


def test_a_bank_s_or_an_index_s_other_files_stay(tmp_path, capsys, world):
    bank, gates, index = (tmp_path / name for name in ("bank", "gates", "index"))
    shutil.copytree(world["bank"], bank)
    shutil.copytree(world["gates"], gates)
    (tmp_path / "profiles.json").write_text(json.dumps(PROFILES))
    assert run(capsys, "index", "build", index, "--profiles", tmp_path / "profiles.json")[0] == 0
    for folder in (bank, index):
        (folder / "notes.txt").write_text("x")
    before = held(tmp_path)
    for words in (
        ("bank", "add", bank, f"elm={world['peft']['apple']}"),
        ("bank", "remove", bank, "daisy", "--gates", gates),
        ("bank", "rename", bank, "daisy", "elm", "--gates", gates),
        ("index", "add", index, "--describe", "jokes=Tells a joke"),
        ("index", "remove", index, "daisy"),
    ):
        assert "found notes.txt" in refused(capsys, *words)
    (bank / "notes.txt").rename(gates / "notes.txt")
    for words in (("remove", bank, "daisy"), ("rename", bank, "daisy", "elm")):
        assert f"{gates}: expected nothing but gates.json" in refused(capsys, "bank", *words, "--gates", gates)
    (gates / "notes.txt").rename(bank / "notes.txt")
    assert held(tmp_path) == before


def test_one_s_own_folders_are_replaced(tmp_path, capsys, world):
    dest = tmp_path / "two"
    for names in (["apple", "birch"], ["cedar"]):
        assert run(capsys, "export", "bank", world["bank"], dest, *names)[0] == 0
        assert [a["name"] for a in json.loads((dest / "bank.json").read_text())["adapters"]] == names


def test_a_run_inside_what_is_replaced_is_refused(tmp_path, capsys, world, tasks):
    words = commands(world, tasks, tmp_path / "g")["train gates"][1]
    line = refused(capsys, *words, "--run", tmp_path / "g" / "run")
    assert "--run: expected a folder outside --out, which is replaced whole, found" in line
    line = refused(capsys, *words, "--new-bank", tmp_path / "g")
    assert "--new-bank: expected a folder outside --out" in line
    line = refused(capsys, *words, "--new-bank", tmp_path / "bank", "--run", tmp_path / "bank" / "run")
    assert "--run: expected a folder outside --new-bank" in line
    line = refused(capsys, *words, "--json", tmp_path / "g" / "report.json")
    assert "--json: expected a file outside --out, which is replaced whole, found" in line
    for command in (["export", "bank", world["bank"], tmp_path / "b", "apple"], ["index", "build", tmp_path / "b"]):
        line = refused(capsys, *command, "--json", tmp_path / "b" / "report.json")
        assert f"--json: expected a file outside of {tmp_path}/b, which is written as a whole" in line
    assert [path.name for path in tmp_path.iterdir()] == ["tasks"]


def test_an_own_gate_takes_no_settings_of_an_adapter(tmp_path, capsys, world, tasks):
    words = commands(world, tasks, tmp_path / "bank")["own gate"][1]
    assert "--rank, --alpha, --targets: expected none beside --own-gate" in refused(capsys, *words, "--rank", 64)
