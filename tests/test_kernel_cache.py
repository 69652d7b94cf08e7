"""Triton kernels on disk, with a stand-in for Triton's compiler (tests/triton_lowering.py has the real one)."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import pytest

from pallas_kernels.kernel_cache import FOLDER, kept


@dataclasses.dataclass
class Kernel:
    """As jax-triton's `CompilationResult`."""

    binary: str
    name: str
    shared_mem_bytes: int
    ttgir: str | None = None
    llir: str | None = None


class Compiler:
    """Counts what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[Any, ...]] = []

    def __call__(self, *given: Any) -> Kernel:
        self.asked.append(given)
        return Kernel(f".ptx of {given[0]}", "add", 64, "ttgir", "llir")


@pytest.fixture
def folder(tmp_path: Path):
    before = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    yield tmp_path / FOLDER
    jax.config.update("jax_compilation_cache_dir", before)


class Backend:
    """As Triton's, of one assembler."""

    def __init__(self, assembler: str):
        self.assembler = assembler

    def hash(self) -> str:
        return self.assembler


NEW = Backend("ptxas 13.0")
ONE = "module", NEW, "warps=4", 90, "cuda"


def test_a_kernel_is_compiled_once_for_all_processes(folder: Path):
    first, second = Compiler(), Compiler()
    made = kept(first, Kernel, "3.6")(*ONE)
    assert (made.binary, made.llir) == (".ptx of module", "llir")
    found = kept(second, Kernel, "3.6")(*ONE)
    assert (len(first.asked), len(second.asked)) == (1, 0)
    assert found == Kernel(".ptx of module", "add", 64)
    assert [path.suffix for path in folder.iterdir()] == [".json"]


@pytest.mark.parametrize(
    ("given", "versions"),
    [
        (("other", NEW, "warps=4", 90, "cuda"), "3.6"),
        (("module", NEW, "warps=8", 90, "cuda"), "3.6"),
        (("module", NEW, "warps=4", 80, "cuda"), "3.6"),
        (("module", Backend("ptxas 12.8"), "warps=4", 90, "cuda"), "3.6"),
        (ONE, "3.7"),
    ],
)
def test_what_makes_another_kernel(given: tuple[Any, ...], versions: str, folder: Path):
    kept(Compiler(), Kernel, "3.6")(*ONE)
    other = Compiler()
    kept(other, Kernel, versions)(*given)
    assert other.asked == [given]
    assert len(list(folder.iterdir())) == 2


@pytest.mark.parametrize("torn", ["", '{"binary": ".ptx', "[]", '{"binary": 1, "name": "add", "shared_mem_bytes": 64}'])
def test_a_torn_file_is_compiled_again(torn: str, folder: Path):
    kept(Compiler(), Kernel, "3.6")(*ONE)
    (file,) = folder.iterdir()
    whole = file.read_text()
    file.write_text(torn)
    again = Compiler()
    assert kept(again, Kernel, "3.6")(*ONE).binary == ".ptx of module"
    assert len(again.asked) == 1
    assert file.read_text() == whole


def test_who_dumps_every_stage_has_each_compiled(folder: Path, monkeypatch: pytest.MonkeyPatch):
    kept(Compiler(), Kernel, "3.6")(*ONE)
    monkeypatch.setenv("JAX_TRITON_DUMP_DIR", str(folder))
    assert kept(Compiler(), Kernel, "3.6")(*ONE).llir == "llir"


def test_nothing_is_kept_without_a_folder(folder: Path):
    rocm = (*ONE[:4], "rocm")
    for given in (rocm, rocm):  # its binary is the name of a file that ends with the process
        kept(other := Compiler(), Kernel, "3.6")(*given)
        assert other.asked == [given]
    assert not folder.exists()
    folder.write_text("a file where the folder should be")
    kept(Compiler(), Kernel, "3.6")(*ONE)
    jax.config.update("jax_compilation_cache_dir", None)
    own = kept(off := Compiler(), Kernel, "3.6")
    assert own(*ONE) == own(*ONE)
    assert len(off.asked) == 2
