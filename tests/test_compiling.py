"""The options that tests compile with reach XLA: a newer JAX that does without the hook would only be slow."""

from __future__ import annotations

import time
from typing import Any

import jax
import pytest
from jax._src import compiler

pytestmark = pytest.mark.skipif(jax.default_backend() != "cpu", reason="they are a CPU's")


@pytest.mark.parametrize(("name", "level"), [("run_steps", 0), ("step", 1)])
def test_only_what_goes_forward_does_without_the_optimiser(monkeypatch, name: str, level: int):
    found: list[Any] = []
    compile_and_load = compiler.backend_compile_and_load

    def record(backend: Any, module: Any, devices: Any, options: Any, *rest: Any) -> Any:
        found.append((options.executable_build_options.debug_options, options.env_option_overrides))
        return compile_and_load(backend, module, devices, options, *rest)

    monkeypatch.setattr(compiler, "backend_compile_and_load", record)

    def function(x: jax.Array) -> jax.Array:
        return x + time.time_ns() % 2**20  # in no cache

    function.__name__ = name
    jax.jit(function).lower(jax.ShapeDtypeStruct((), "float32")).compile()
    ((flags, overrides),) = found
    assert flags.xla_backend_optimization_level == level
    assert ("xla_cpu_use_fusion_emitters", False) in overrides
