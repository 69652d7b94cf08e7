"""How programs are compiled: what XLA is told on a GPU."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
from jax.core import Tracer

from meteora_jax.execution import platform

# XLA's own Triton matrix products copy a layer's weights out of the stack before they read them (a decoding step of
# Llama-3-8B takes 11.4 ms with them), and gave NaN in training; cuBLAS reads the stack where it lies.
GPU_OPTIONS: Mapping[str, Any] = MappingProxyType(
    {"xla_gpu_enable_triton_gemm": False, "xla_gpu_enable_dynamic_slice_fusion": True}
)


class Jit:
    """`jax.jit` of a function, with `gpu_options` where the program is for a GPU.

    Inside another traced function the options are that one's to give: JAX takes them at the top alone.
    """

    def __init__(self, function: Callable[..., Any], *, gpu_options: Mapping[str, Any] = GPU_OPTIONS, **options: Any):
        functools.update_wrapper(self, function)
        self._plain = jax.jit(function, **options)
        self._gpu = functools.cache(lambda: jax.jit(function, compiler_options=dict(gpu_options), **options))

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


def jit(**options: Any) -> Callable[[Callable[..., Any]], Jit]:
    """Decorator: `Jit` with the options of `jax.jit`."""
    return lambda function: Jit(function, **options)
