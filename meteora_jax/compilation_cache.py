"""Compiled programs on disk: JAX's persistent cache, so that the next process starts without compiling again.

It is in the user's cache folder, in `METEORA_CACHE` if that is set, and off where that is empty. Who has given JAX a
folder already (`JAX_COMPILATION_CACHE_DIR`) keeps it. Programs that compile in less than a second are not kept.
Triton's kernels lie beside them (`pallas_kernels.kernel_cache`).
"""

from __future__ import annotations

import hashlib
import os
import platform
from pathlib import Path

import jax

VARIABLE = "METEORA_CACHE"


def folder() -> Path | None:
    """Where programs are kept; None where they are not. A machine's own: a CPU's programs use what that CPU has."""
    asked = os.environ.get(VARIABLE)
    if asked == "":
        return None
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "meteora_jax"
    return (Path(asked) if asked else home) / f"programs-{_machine()}"


def use() -> None:
    """Switches the cache on for this process; of no effect where JAX has one already.

    JAX takes what it cannot read or write for a miss: a file that a killed process left torn is a warning, and the
    program is compiled. Processes may share the folder: a file is written once, and one that is read while it is
    written is such a miss.
    """
    where = folder()
    if where is None or getattr(jax.config, "jax_compilation_cache_dir"):  # noqa: B009 - JAX does not declare it
        return
    from jax.experimental.compilation_cache import compilation_cache as programs

    try:
        where.mkdir(parents=True, exist_ok=True)
    except OSError:  # a home that nobody may write to, as in containers: nothing is kept
        return
    jax.config.update("jax_compilation_cache_dir", str(where))
    programs.reset_cache()  # JAX decides once, at the first program, whether there is a cache


def _machine() -> str:
    """A digest of what the processor can do."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        known = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    except OSError:
        known = platform.processor()
    return hashlib.sha256(f"{platform.machine()} {known}".encode()).hexdigest()[:8]
