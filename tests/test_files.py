"""Folders that are written whole: what a killed process leaves, and what nobody replaces."""

import errno
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from converters.folders import new_folder
from meteora_jax.config import InputError
from meteora_jax.io import files
from meteora_jax.io.files import (
    change_alone,
    refuse_foreign,
    refuse_unwritable,
    whole_file,
    whole_folder,
    write_json,
)

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


# The same without a conversion: killed while it writes, or while it deletes what it has replaced.
WRITES = """
import os, shutil, signal, sys
from meteora_jax.io.files import whole_folder

def kill(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)

with whole_folder(sys.argv[1]) as folder:
    (folder / "new").write_text("x")
    {kill}
"""


@pytest.mark.parametrize("kill", ["kill()", "shutil.rmtree = kill"])
def test_what_a_killed_writer_leaves_the_next_one_removes(tmp_path: Path, kill: str):
    if kill != "kill()" and sys.platform != "linux":
        pytest.skip("swaps two folders in one call")
    dest = tmp_path / "dest"
    dest.mkdir()
    (dest / "old").write_text("x")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", WRITES.format(kill=kill), dest]
    assert subprocess.run(command, env=environment, timeout=120).returncode == -signal.SIGKILL
    assert len(os.listdir(tmp_path)) == 2
    with whole_folder(dest) as folder:
        assert sorted(os.listdir(tmp_path)) == sorted(["dest", folder.name])
        (folder / "newer").write_text("x")
    assert os.listdir(dest) == ["newer"]
    assert os.listdir(tmp_path) == ["dest"]


def test_what_another_may_be_writing_stays(tmp_path: Path, monkeypatch):
    dest, mark = tmp_path / "dest", files._mark()
    others = ["dest.more", ".dest.settings", ".dest.partial", ".dest.abcdefgh", f".dest.more.abcdefgh{mark}"]
    for name in others:
        (tmp_path / name).mkdir()
    with whole_folder(dest) as mine:
        with whole_folder(dest):  # another writer of the same folder
            pass
        (mine / "file").write_text("x")
    assert os.listdir(dest) == ["file"]
    assert sorted(os.listdir(tmp_path)) == sorted(["dest", *others])
    monkeypatch.setattr(files, "_mark", lambda: ".01234567.partial")  # of another host, whose locks are not seen here
    abandoned = tmp_path / f".dest.abcdefgh{mark}"
    abandoned.mkdir()
    with whole_folder(dest):
        pass
    assert abandoned.exists()
    monkeypatch.undo()
    with whole_folder(dest):
        pass
    assert not abandoned.exists()


def test_where_folders_cannot_be_locked_nothing_is_taken_for_a_leftover(tmp_path: Path, monkeypatch):
    def no_locks(*args):
        raise OSError(errno.EBADF, "Bad file descriptor")

    monkeypatch.setattr(files.fcntl, "flock", no_locks)
    abandoned = tmp_path / f".dest.abcdefgh{files._mark()}"
    abandoned.mkdir()
    with whole_folder(tmp_path / "dest") as mine:
        assert not mine.name.endswith(".partial")
        (mine / "file").write_text("x")
    assert os.listdir(tmp_path / "dest") == ["file"]
    monkeypatch.undo()
    with whole_folder(tmp_path / "dest"):
        pass
    assert sorted(os.listdir(tmp_path)) == ["dest"]


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


def test_a_link_stays_and_what_it_points_to_is_replaced(tmp_path: Path):
    real, link = tmp_path / "disk" / "real", tmp_path / "link"
    real.parent.mkdir()
    link.symlink_to("disk/real")
    for text in ("first", "second"):  # where nothing is yet, and in the place of a file
        with whole_file(link) as partial:
            partial.write_text(text)
        assert link.is_symlink()
        assert real.read_text() == text
        assert text == "first" or real.stat().st_mode & 0o777 == 0o640
        real.chmod(0o640)
    assert os.listdir(real.parent) == ["real"]
    with pytest.raises(InputError, match=f"{tmp_path}/disk: expected a file, found a folder"), whole_file(real.parent):
        pass


def test_a_pipe_gets_what_no_file_can_take_the_place_of(tmp_path: Path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    with whole_file(pipe) as partial:
        partial.write_text("all of it")
    assert os.read(reader, 100) == b"all of it"
    assert pipe.is_fifo()
    os.close(reader)
    assert os.listdir(tmp_path) == ["pipe"]


def test_standard_output_in_a_file_keeps_what_was_said_before(tmp_path: Path):
    script = """if True:
        import sys
        from meteora_jax.io.files import write_json
        print("before", flush=True)
        write_json("/dev/stdout", [1])
        print("after")
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    (tmp_path / "link").symlink_to("/dev/stdout")
    for name in ("/dev/stdout", str(tmp_path / "link")):
        with (tmp_path / "out").open("wb") as out:  # as the shell's >, where every opening begins at 0
            command = [sys.executable, "-c", script.replace("/dev/stdout", name)]
            subprocess.run(command, env=environment, stdout=out, check=True, timeout=120)
        assert (tmp_path / "out").read_text().split() == ["before", "[", "1", "]", "after"]
    assert (tmp_path / "link").is_symlink()


def test_a_descriptor_may_be_a_socket_and_what_it_does_not_take_is_said(tmp_path: Path):
    ours, theirs = socket.socketpair()
    with ours, theirs:
        write_json(f"/proc/self/fd/{theirs.fileno()}", [1])
        assert ours.recv(100) == b"[\n 1\n]\n"
    with (tmp_path / "out").open("wb") as out:
        script = """if True:
            import resource, signal, sys, tempfile
            from meteora_jax.io.files import whole_file
            with whole_file("/dev/stdout") as written:
                written.write_bytes(bytes(5000))
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))  # the first write takes a part
        """
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, "-c", script]
        done = subprocess.run(command, env=environment, stdout=out, stderr=subprocess.PIPE, timeout=120)
    assert done.returncode == 1
    assert b"InputError: /dev/stdout: cannot be written (File too large)" in done.stderr


def test_a_path_that_is_no_utf_8_is_written_as_json_s_escape(tmp_path: Path):
    name = os.fsdecode(b"bank\xff")
    write_json(tmp_path / "x.json", [name, "\u00e9"])
    assert json.loads((tmp_path / "x.json").read_text("utf-8")) == [name, "\u00e9"]
    assert "\u00e9" in (tmp_path / "x.json").read_text("utf-8")


def test_a_mount_point_is_refused_before_any_work(tmp_path: Path, monkeypatch):
    folder = tmp_path / "folder"
    folder.mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == folder)
    with pytest.raises(InputError, match="expected a folder that can be replaced, found a mount point"):
        refuse_foreign(folder, "bank.json")
    with pytest.raises(InputError, match="found a mount point"), new_folder(folder, True, []):
        pytest.fail("work has begun")


def test_a_folder_that_cannot_be_renamed_leaves_nothing_beside_it(tmp_path: Path, monkeypatch):
    new, dest = tmp_path / "new", tmp_path / "dest"
    for folder in (new, dest):
        folder.mkdir()
        (folder / "file").write_text(folder.name)

    def busy(*args):
        raise OSError(errno.EBUSY, "Device or resource busy")

    monkeypatch.setattr(files, "_swap", lambda *args: False)
    monkeypatch.setattr(files.os, "rename", busy)
    with pytest.raises(OSError, match="busy"):
        files.put_in_place(new, dest)
    assert sorted(os.listdir(tmp_path)) == ["dest", "new"]
    assert (dest / "file").read_text() == "dest"


def test_one_process_changes_a_folder_at_a_time(tmp_path: Path):
    folder = tmp_path / "folder"
    folder.mkdir()
    with change_alone(folder):
        with pytest.raises(InputError, match="expected one change at a time"), change_alone(folder):
            pytest.fail("two are at work")
        with whole_folder(folder) as new:  # which the one at work may replace
            (new / "file").write_text("x")
    with change_alone(folder):
        assert os.listdir(folder) == ["file"]
    with pytest.raises(InputError, match="cannot be read"), change_alone(tmp_path / "none"):
        pass


def test_what_could_not_be_written_is_refused_before_any_work(tmp_path: Path, monkeypatch):
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to("file/x.json")
    refuse_unwritable("--json", "/dev/stdout")
    refuse_unwritable("--json", tmp_path / "new" / "folder" / "x.json")
    refuse_unwritable("--json", tmp_path / "file")
    refuse_unwritable("--out", tmp_path / "new" / "folder", folder=True)
    for path, folder, said in (
        (tmp_path, False, f"--x: expected a file, found the folder {tmp_path}"),
        (tmp_path / "file" / "x.json", False, f"--x: expected a folder, found the file {tmp_path}/file"),
        (tmp_path / "link", False, f"--x: expected a folder, found the file {tmp_path}/file"),
        (tmp_path / "file", True, f"--x: expected a folder, found the file {tmp_path}/file"),
        (tmp_path / "file" / "below", True, f"--x: expected a folder, found the file {tmp_path}/file"),
    ):
        with pytest.raises(InputError, match=said):
            refuse_unwritable("--x", path, folder=folder)
    monkeypatch.setattr(files.os, "access", lambda *args: False)  # a file's place is taken by one that is made beside
    with pytest.raises(InputError, match="--x: expected a folder that can be written to, found"):
        refuse_unwritable("--x", tmp_path / "file")
