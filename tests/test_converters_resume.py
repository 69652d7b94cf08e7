"""Imports that were killed go on: the result is the same bit for bit, and what was done is not done again."""

import os
import shutil
import signal
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
from tiny import tiny_llama, tiny_peft

from converters import import_adapters, import_base, peft_bank, quantize_base, rules
from converters.peft_folder import PeftAdapter
from meteora_jax.config import InputError

KILLED_AT = 9  # tensors, of which two are saved at a time
SCRIPT = """
import os, signal, sys
from converters import import_base, rules

rules.SAVE_BYTES = int(sys.argv[3])
def stop(key, done, total):
    return done == int(sys.argv[4]) and os.kill(os.getpid(), signal.SIGKILL)

import_base(sys.argv[1], sys.argv[2], progress=stop)
"""


@pytest.fixture
def copied(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The keys whose values were converted."""
    keys: list[str] = []
    copy = rules.copy_tensor

    def spy(source, *rest):
        keys.append(source.key)
        return copy(source, *rest)

    monkeypatch.setattr(rules, "copy_tensor", spy)
    return keys


def kill_import(hf: Path, dest: Path, at: int = KILLED_AT) -> Path:
    """Runs an import that SIGKILL ends after `at` tensors; what it leaves."""
    command = [sys.executable, "-c", SCRIPT, str(hf), str(dest), str(20_000), str(at)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run(command, env=environment, timeout=120).returncode == -signal.SIGKILL
    assert not dest.exists()
    return dest.with_name(f".{dest.name}.partial")


def test_a_killed_import_goes_on(tmp_path: Path, copied: list[str]):
    _, hf = tiny_llama(tmp_path, max_shard_size="100KB")
    import_base(hf, tmp_path / "whole")
    total = len(copied)
    partial = kill_import(hf, tmp_path / "base")
    partial = kill_import(hf, tmp_path / "base", at=total - 3)  # killed again, later
    copied.clear()
    told: list[tuple[int, int]] = []
    import_base(hf, tmp_path / "base", progress=lambda key, done, n: told.append((done, n)))
    assert 3 <= len(copied) < total / 2
    assert told == [(done, total) for done in range(total - len(copied) + 1, total + 1)]
    assert not partial.exists()
    files = {path.name: path.read_bytes() for path in (tmp_path / "base").iterdir()}
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}


@pytest.mark.parametrize("change", ["source", "type", "weights", "journal"])
def test_another_conversion_starts_anew(tmp_path: Path, copied: list[str], change: str):
    model, hf = tiny_llama(tmp_path)
    import_base(hf, tmp_path / "whole", dtype="bfloat16" if change == "type" else None)
    total = len(copied)
    partial = kill_import(hf, tmp_path / "base")
    assert (partial / "weights.safetensors").exists()
    if change == "source":  # the same values under another time stamp: how could one know?
        model.save_pretrained(hf)
    elif change == "weights":
        os.truncate(partial / "weights.safetensors", 1000)
    elif change == "journal":
        (partial / "journal").write_bytes(b"\xff\xfe 3\n9\n")
    copied.clear()
    import_base(hf, tmp_path / "base", dtype="bfloat16" if change == "type" else None)
    assert len(copied) == total
    whole, base = (tmp_path / name / "weights.safetensors" for name in ("whole", "base"))
    assert base.read_bytes() == whole.read_bytes()


def test_a_damaged_file_is_not_believed_at_a_second_kill(tmp_path: Path, copied: list[str]):
    """The journal speaks of the file that was lost; it must not vouch for the one that replaced it."""
    _, hf = tiny_llama(tmp_path)
    partial = kill_import(hf, tmp_path / "base")
    (partial / "weights.safetensors").unlink()
    kill_import(hf, tmp_path / "base", at=1)
    copied.clear()
    import_base(hf, tmp_path / "base")
    resumed = len(copied)
    import_base(hf, tmp_path / "whole")
    assert len(copied) - resumed == resumed + 1
    whole, base = (tmp_path / name / "weights.safetensors" for name in ("whole", "base"))
    assert base.read_bytes() == whole.read_bytes()


def test_an_interrupted_import_keeps_its_work_and_a_refused_one_does_not(
    tmp_path: Path, monkeypatch, copied: list[str]
):
    _, hf = tiny_llama(tmp_path)
    monkeypatch.setattr(rules, "SAVE_BYTES", 1)

    def stop(error: type[BaseException]):
        def progress(key: str, done: int, total: int) -> None:
            if done == KILLED_AT:
                raise error

        return progress

    for error, kept in ((KeyboardInterrupt, KILLED_AT), (RuntimeError, 0)):
        dest = tmp_path / error.__name__
        with pytest.raises(error):
            import_base(hf, dest, progress=stop(error))
        assert dest.with_name(f".{dest.name}.partial").exists() == bool(kept)
        copied.clear()
        import_base(hf, dest)
        first = len(copied)
        import_base(hf, tmp_path / f"{error.__name__} whole")
        assert len(copied) - first == first + kept


ADAPTERS = """
import os, signal, sys
from converters import import_adapters, rules

rules.SAVE_BYTES = 1
def stop(name, done, total):
    return done == total // 2 + int(sys.argv[3]) and os.kill(os.getpid(), signal.SIGKILL)

import_adapters(sys.argv[1], sys.argv[2], [(str(i), f) for i, f in enumerate(sys.argv[4:])], progress=stop)
"""


def kill_adapters(bank: Path, base: Path, folders: list[Path], at: int) -> None:
    """Runs an import that SIGKILL ends after it has written `at` adapters."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", ADAPTERS, str(bank), str(base), str(at), *map(str, folders)]
    assert subprocess.run(command, env=environment, timeout=120).returncode == -signal.SIGKILL
    assert not bank.exists()


def test_a_killed_import_of_adapters_goes_on(tmp_path: Path):
    _, hf = tiny_llama(tmp_path)
    base, bank = tmp_path / "base", tmp_path / "bank"
    import_base(hf, base)
    folders = [tiny_peft(tmp_path, hf, f"a{i}", seed=i, r=2 + i, use_dora=i == 1) for i in range(3)]
    adapters = [(str(i), folder) for i, folder in enumerate(folders)]
    import_adapters(tmp_path / "whole", base, adapters)
    told: list[str] = []
    for pairs, expected in ((adapters, ["2"]), (adapters[::-1], ["2", "1", "0"])):
        kill_adapters(bank, base, folders, 2)
        told.clear()
        import_adapters(bank, base, pairs, progress=lambda name, done, total: told.append(name))
        assert told == [*(f"{name} checked" for name, _ in pairs), *expected]
        assert sorted(p.name for p in bank.iterdir()) == ["bank.json", "weights.safetensors"]
        if pairs is adapters:
            for name in ("bank.json", "weights.safetensors"):
                assert (bank / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
        shutil.rmtree(bank)


def test_forty_adapters_killed_twice_keep_no_headers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The same command goes on, and no more than the one that is being written has its headers in memory."""
    _, hf = tiny_llama(tmp_path)
    base, bank = tmp_path / "base", tmp_path / "bank"
    import_base(hf, base)
    made = [tiny_peft(tmp_path, hf, f"a{i}", seed=i, r=2 + 2 * i) for i in range(2)]
    folders = []
    for i in range(40):
        folders.append(tmp_path / f"copy{i}")
        shutil.copytree(made[i % 2], folders[-1])
    adapters = [(str(i), folder) for i, folder in enumerate(folders)]
    kill_adapters(bank, base, folders, 11)
    kill_adapters(bank, base, folders, 29)
    live: weakref.WeakSet[PeftAdapter] = weakref.WeakSet()
    most, told = 0, []
    read = peft_bank.read_adapter

    def spy(*given) -> PeftAdapter:
        nonlocal most
        live.add(found := read(*given))
        most = max(most, len(live))
        return found

    monkeypatch.setattr(peft_bank, "read_adapter", spy)
    monkeypatch.setattr(PeftAdapter, "__hash__", object.__hash__)
    import_adapters(bank, base, adapters, progress=lambda name, done, total: told.append((name, done, total)))
    assert [name for name, *_ in told[40:]] == [str(i) for i in range(29, 40)]
    assert [(done, total) for _, done, total in told] == [(n, 80) for n in (*range(1, 41), *range(70, 81))]
    assert most <= 2  # the one before goes when the next has come
    import_adapters(tmp_path / "whole", base, adapters)
    for name in ("bank.json", "weights.safetensors"):
        assert (bank / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_folder_that_changes_while_others_are_imported_is_refused(tmp_path: Path):
    _, hf = tiny_llama(tmp_path)
    base, bank = tmp_path / "base", tmp_path / "bank"
    import_base(hf, base)
    folders = {name: tiny_peft(tmp_path, hf, name, seed=i) for i, name in enumerate(("first", "second"))}

    def change(name: str, done: int, total: int) -> None:
        if name == "first":
            os.utime(folders["second"] / "adapter_model.safetensors", (1, 1))

    with pytest.raises(InputError, match="second: expected the files that were checked, found others since"):
        import_adapters(bank, base, folders, progress=change)
    assert not bank.exists()


QUANTIZE = """
import os, signal, sys
from converters import quantize_base, rules

rules.SAVE_BYTES = 1
def stop(key, done, total):
    return done == 9 and os.kill(os.getpid(), signal.SIGKILL)

quantize_base(sys.argv[1], sys.argv[2], sys.argv[3], embedding=True, progress=stop)
"""


def test_a_killed_quantisation_goes_on(tmp_path: Path):
    """Its report, too, is of all tensors; another format begins anew."""
    _, hf = tiny_llama(tmp_path)
    import_base(hf, tmp_path / "base")
    told: list[int] = []
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    for killed, asked in (("int4", "int4"), ("fp8", "int8")):
        base, dest, whole = (tmp_path / name for name in ("base", f"{asked}-killed", f"{asked}-whole"))
        expected = quantize_base(base, whole, asked, embedding=True)
        command = [sys.executable, "-c", QUANTIZE, str(base), str(dest), killed]
        assert subprocess.run(command, env=environment, timeout=120).returncode == -signal.SIGKILL
        assert not dest.exists()
        told.clear()
        found = quantize_base(base, dest, asked, embedding=True, progress=lambda key, done, total: told.append(done))
        assert told[0] == (10 if killed == asked else 1)
        assert found == expected
        files = {path.name: path.read_bytes() for path in dest.iterdir()}
        assert files == {path.name: path.read_bytes() for path in whole.iterdir()}
