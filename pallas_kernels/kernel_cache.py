"""Triton kernels compiled for NVIDIA GPUs on disk, beside JAX's compiled programs.

Lowering a program compiles its Triton kernels, and only then JAX looks whether it has the program. So without this
every process compiles them anew: most of what a start on a GPU takes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

FOLDER = "triton-kernels"


def kept(compile_kernel: Callable[..., Any], result: Callable[..., Any], versions: str) -> Callable[..., Any]:
    """jax-triton's `compile_ttir_inplace`, which first looks on disk, and puts there what it had to compile.

    A kernel is known by all that its code is made from: Triton's intermediate language, options, device and versions. A
    file that cannot be read is compiled again; a folder that cannot be written keeps nothing. Only where JAX has a
    compilation cache.

    Args:
        result: jax-triton's `CompilationResult`. versions: of what compiles.
    """

    def own(module: Any, backend: Any, options: Any, compute_capability: Any, platform: str) -> Any:
        given = module, backend, options, compute_capability, platform
        folder = getattr(jax.config, "jax_compilation_cache_dir", None)
        if platform != "cuda" or not folder or os.environ.get("JAX_TRITON_DUMP_DIR"):  # who dumps wants each stage
            return compile_kernel(*given)
        # backend.hash(): the assembler's version, which the version of PTX follows
        said = "\n".join((versions, backend.hash(), str(compute_capability), repr(options), str(module)))
        file = Path(folder) / FOLDER / f"{hashlib.sha256(said.encode()).hexdigest()}.json"
        found = _read(file)
        if found is not None:
            return result(**found, ttgir=None, llir=None)
        made = compile_kernel(*given)
        _write(file, {"binary": made.binary, "name": made.name, "shared_mem_bytes": made.shared_mem_bytes})
        return made

    return own


def _read(file: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return None
    types = {"binary": str, "name": str, "shared_mem_bytes": int}
    whole = isinstance(found, dict) and found.keys() == types.keys()
    return found if whole and all(isinstance(found[k], kind) for k, kind in types.items()) else None


def _write(file: Path, kernel: dict[str, Any]) -> None:
    part = file.with_name(f"{file.name}.{os.getpid()}-{threading.get_ident()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(kernel), encoding="utf-8")
        part.replace(file)
    except OSError:
        with contextlib.suppress(OSError):
            part.unlink()
