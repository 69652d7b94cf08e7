"""Compiled programs that tests share: between workers, with the processes they start, and with the next run.

JAX's persistent cache, in pytest's own cache folder (`pytest --cache-clear` empties it). A program's key is its HLO,
the compiler's options and the versions of jax and XLA, so that a changed program is compiled anew.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax._src import cache_key  # JAX has no public interface of a cache's keys and files
from jax._src import compilation_cache as programs
from jax._src.lib import xla_client
from jax._src.lru_cache import LRUCache

from meteora_jax import compilation_cache

KEPT_DAYS = 14  # a program that nobody asked for in so long is removed


def use(config: pytest.Config) -> None:
    """Switches the cache on for this process and, by the environment, for those that it starts.

    Of no effect with `-p no:cacheprovider`, which leaves pytest no folder.
    """
    if getattr(config, "cache", None) is None:
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(compilation_cache.VARIABLE, str(config.cache.mkdir("programs")))
        folder = compilation_cache.folder()
    assert folder is not None
    folder.mkdir(exist_ok=True)
    if getattr(config, "workerinput", {}).get("workerid", "gw0") == "gw0":  # once, not by every worker
        remove_old(folder, time.time() - KEPT_DAYS * 86400)
    settings = {
        "jax_compilation_cache_dir": str(folder),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_enable_xla_caches": "none",
    }
    for name, value in settings.items():
        jax.config.update(name, value)
        os.environ[name.upper()] = str(value)
    LRUCache.get, LRUCache.put = read, write
    programs.is_cache_used = of_this_machine(programs.is_cache_used)
    cache_key._hash_accelerator_config = as_alone(cache_key._hash_accelerator_config)


def remove_old(folder: Path, before: float) -> None:
    for file in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):  # another run's was here
            if file.stat().st_mtime < before:
                file.unlink()


def of_this_machine(is_used: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """Leaves programs for described devices (TPUs that are not there) out: XLA cannot read them back."""

    def used(backend: Any) -> bool:
        return backend is jax.devices()[0].client and is_used(backend)

    return used


def as_alone(hash_devices: Callable[[Any, np.ndarray], None]) -> Callable[[Any, np.ndarray], None]:
    """A key says how many devices its process has. Here programs of one device have the key of a process with one, as
    those that tests start."""
    client = xla_client.make_cpu_client(num_devices=1)
    alone = np.asarray(client.devices())

    def hashed(hash_object: Any, devices: np.ndarray) -> None:
        cpu = devices.size == 1 and devices.flat[0].platform == "cpu"
        hash_devices(hash_object, alone if cpu else devices)

    return hashed


def read(cache: LRUCache, key: str) -> bytes | None:
    """An entry; one that a killed process left torn, or that is being written, is a miss and no warning."""
    file = cache.path / f"{key}-cache"
    try:
        content = file.read_bytes()
        programs.decompress_executable(content)
    except FileNotFoundError:
        return None
    except Exception:  # zstd's, zstandard's or zlib's, whichever JAX found
        file.unlink(missing_ok=True)
        return None
    with contextlib.suppress(FileNotFoundError):
        os.utime(file)  # it was asked for
    return content


def write(cache: LRUCache, key: str, content: bytes) -> None:
    """All of an entry or nothing; JAX writes in place, where another worker may read."""
    file = cache.path / f"{key}-cache"
    part = file.with_name(f"{key}.{os.getpid()}.part")
    part.write_bytes(content)
    part.replace(file)
