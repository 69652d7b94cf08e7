"""How XLA compiles for a CPU in tests: fast, as most programs run a few times on tiny arrays.

A step of the engine takes 2.2 s of one core to compile by XLA's own settings, 1.1 s by `OPTIONS` and 0.4 s without
LLVM's optimiser. Without it (level 0) gradients of a loss through a choice made before the layers were NaN or wrong
(jax 0.10.2), so only programs that go forward do without; levels 1 to 3 agree with torch.
"""

from __future__ import annotations

import functools
from typing import Any

FLAGS = "--xla_backend_optimization_level=1"  # in XLA_FLAGS, which libtpu reads as well: it ends at a flag of CPUs
OPTIONS = [  # of this process, and of those that import conftest
    ("xla_cpu_use_fusion_emitters", False),  # they are half of the time
    ("xla_cpu_parallel_codegen_split_count", 1),  # a worker has one core
]
FORWARD = {  # most of the time
    f"jit_{name}" for name in ("run_steps", "all_logits", "_logits", "score", "observed", "hidden_states")
}


def use() -> None:
    """Programs for CPUs are compiled with these from here on."""
    from jax._src import compiler  # JAX has no public interface for options of programs that others compile
    from jax._src.lib.mlir import ir

    compile_or_get = compiler.compile_or_get_cached

    @functools.wraps(compile_or_get)
    def compile_fast(backend: Any, computation: ir.Module, devices: Any, options: Any, *rest: Any, **more: Any) -> Any:
        name = ir.StringAttr(computation.operation.attributes["sym_name"]).value
        if backend.platform == "cpu":
            options.env_option_overrides = [*OPTIONS, *options.env_option_overrides]
        if backend.platform == "cpu" and name in FORWARD:
            options.executable_build_options.debug_options.xla_backend_optimization_level = 0
        return compile_or_get(backend, computation, devices, options, *rest, **more)

    compiler.compile_or_get_cached = compile_fast
