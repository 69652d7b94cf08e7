"""How programs are compiled: the platform they are for, and what XLA is told beside them."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.core import Tracer

# XLA's own Triton matrix products copy a layer's weights out of the stack before they read them (a decoding step of
# Llama-3-8B takes 11.4 ms with them), and gave NaN in training; cuBLAS reads the stack where it lies.
GPU_OPTIONS: dict[str, Any] = {"xla_gpu_enable_triton_gemm": False, "xla_gpu_enable_dynamic_slice_fusion": True}


class Step(NamedTuple):
    """How a GPU takes a decoding step of at most `rows` rows: products by cuBLAS, the rest in Triton kernels."""

    rows: int
    captured: bool = True  # launches may become part of CUDA graphs


# The first that fits serves a step; none: XLA does. Where there are any, `AdaptedLinear.prepare` puts gates and A's
# behind the kernels' rows. Entered from `scripts/bench.py --what decode --settings all`: docs/performance.md.
STEPS: tuple[Step, ...] = (Step(64),)


def step_form(rows: int) -> Step | None:
    """The entry of `STEPS` for a batch of one token a row, on one GPU with the extra `gpu`."""
    mesh = jax.sharding.get_abstract_mesh()
    if not STEPS or platform() != "gpu" or not (mesh.empty or mesh.size == 1):
        return None
    if not all(map(importlib.util.find_spec, ("jax_triton", "triton"))):
        return None
    return next((step for step in STEPS if rows <= step.rows), None)


def platform() -> str:
    """What a program traced now will run on, "cpu", "gpu" or "tpu": the devices of `use_mesh`, else the default."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def default_dtype(dtype: str | None = None) -> str:
    """What weights and activations are, unless the caller says: float32 on a CPU, bfloat16 on an accelerator.

    A CPU has no fast bfloat16.
    """
    return dtype or ("float32" if platform() == "cpu" else "bfloat16")


class Jit:
    """`jax.jit` of a function, with `GPU_OPTIONS` where the program is for a GPU.

    Inside another traced function the options are that one's to give: JAX takes them at the top alone.
    """

    def __init__(self, function: Callable[..., Any], **options: Any):
        functools.update_wrapper(self, function)
        self._plain = jax.jit(function, **options)
        self._gpu = functools.cache(lambda: jax.jit(function, compiler_options=GPU_OPTIONS, **options))

    def _compiled(self, *given: Any) -> Any:
        traced = any(isinstance(x, Tracer) for x in jax.tree.leaves(given))
        return self._gpu() if platform() == "gpu" and not traced else self._plain

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._compiled(args, kwargs)(*args, **kwargs)

    def lower(self, *args: Any, **kwargs: Any) -> Any:
        """As `jax.jit`'s."""
        return self._compiled(args, kwargs).lower(*args, **kwargs)

    def _cache_size(self) -> int:
        return self._compiled()._cache_size()

    def clear_cache(self) -> None:
        """As `jax.jit`'s: the next call traces anew."""
        programs: list[Any] = [self._plain, *([self._gpu()] if self._gpu.cache_info().currsize else [])]
        for program in programs:
            program.clear_cache()


def jit(**options: Any) -> Callable[[Callable[..., Any]], Jit]:
    """Decorator: `Jit` with the options of `jax.jit`."""
    return lambda function: Jit(function, **options)
