"""Compiled programs that tests share are read back, whole ones alone."""

import os
import time
from pathlib import Path

import jax
import pytest
from jax._src import compilation_cache as programs
from jax._src.lru_cache import LRUCache
from program_cache import read, remove_old, write

on_a_cpu = pytest.mark.skipif(jax.default_backend() != "cpu", reason="a GPU's programs are not shared")


@on_a_cpu
def test_what_was_compiled_is_read_and_computes_the_same(request: pytest.FixtureRequest):
    if not request.config.pluginmanager.has_plugin("cacheprovider"):
        pytest.skip("pytest has no folder")
    hits: list[str] = []

    def listen(name: str, **_: object) -> None:
        hits.append(name)

    jax.monitoring.register_event_listener(listen)
    try:
        found = []
        for _ in range(2):  # a function of its own each time, which JAX compiles anew
            hits.clear()
            found.append(float(jax.jit(lambda x: 3 * x + 4)(5.0)))
    finally:
        jax.monitoring.unregister_event_listener(listen)
    assert found == [19.0, 19.0]
    assert "/jax/compilation_cache/cache_hits" in hits


def test_a_torn_entry_is_a_miss_and_goes(tmp_path: Path):
    cache, content = LRUCache(str(tmp_path), max_size=-1), programs.compress_executable(bytes(range(200)))
    assert read(cache, "key") is None
    write(cache, "key", content)
    assert read(cache, "key") == content
    (file,) = tmp_path.iterdir()
    file.write_bytes(content[:-5])
    assert read(cache, "key") is None
    assert not file.exists()


def test_what_nobody_asked_for_is_removed(tmp_path: Path):
    cache, now = LRUCache(str(tmp_path), max_size=-1), time.time()
    for key, age in (("old", 3000), ("read", 3000), ("new", 0)):
        write(cache, key, programs.compress_executable(key.encode()))
        os.utime(tmp_path / f"{key}-cache", (now - age, now - age))
    read(cache, "read")
    remove_old(tmp_path, now - 2000)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["new-cache", "read-cache"]
