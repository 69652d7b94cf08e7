"""Launches Triton kernels through jax-triton (the extra `gpu`), also so that XLA may put them into CUDA graphs."""

from __future__ import annotations

import collections
import functools
import importlib
import threading
from collections.abc import Hashable, Mapping
from types import MappingProxyType
from typing import Any

import jax

from pallas_kernels.kernel_cache import kept

# Of a kernel, by what it is compiled from: threads that compile programs of the same kernels would each compile them.
_COMPILING: collections.defaultdict[Hashable, threading.Lock] = collections.defaultdict(threading.Lock)
# What of a launch is no part of the kernel.
_PLACES = frozenset(("grid", "out_shapes", "input_output_aliases", "zeroed_outputs", "serialized_metadata"))
CAPTURABLE = "triton_kernel_call_ffi"  # jaxlib's second entry to the same launcher, the one that may be captured


def launch(
    module: str, kernel: str, *arrays: jax.Array, out: tuple[jax.ShapeDtypeStruct, ...], grid: tuple[int, ...],
    warps: int = 4, aliases: Mapping[int, int] = MappingProxyType({}), **constants: Hashable,
) -> tuple[jax.Array, ...]:  # fmt: skip
    """Launches a kernel by its module's and its own name.

    Args:
        arrays: the kernel's first parameters.
        out: shapes and dtypes of the arrays that it writes, its next parameters.
        grid: programs, one to three numbers. warps: of 32 threads, in a program.
        aliases: {input: output}: the output starts as that input, in its place.
        constants: its `tl.constexpr` parameters.

    Returns:
        What it wrote, as `out` has it.

    Raises:
        NotImplementedError: the extra `gpu` is not installed.
    """
    try:
        import jax_triton  # pyright: ignore[reportMissingImports]  # the extra gpu

        kernels = importlib.import_module(module)
    except ImportError as e:
        raise NotImplementedError(
            f"Triton kernels: expected the extra `gpu` (pip install meteora-jax[gpu]), found no {e.name}"
        ) from e
    _lower_capturable()
    results = jax_triton.triton_call(
        *arrays, kernel=getattr(kernels, kernel), out_shape=out, grid=grid, num_warps=warps, name=kernel,
        input_output_aliases=dict(aliases), custom_call_target_name=CAPTURABLE, **constants,
    )  # fmt: skip
    return tuple(results)


@functools.cache
def _lower_capturable() -> None:
    """jax-triton 0.3.1 knows the older entry alone: its calls of the other are given what that one reads.

    Source of the attributes: jaxlib's own use of the entry (jax/_src/pallas/triton/pallas_call_registration.py).
    """
    import jax_triton  # pyright: ignore[reportMissingImports]
    import triton  # pyright: ignore[reportMissingImports]
    from jax.interpreters import mlir
    from jax_triton import triton_lib  # pyright: ignore[reportMissingImports]

    ir: Any = importlib.import_module("jaxlib.mlir.ir")
    versions = f"{triton.__version__} {jax_triton.__version__}"
    triton_lib.compile_ttir_inplace = kept(triton_lib.compile_ttir_inplace, triton_lib.CompilationResult, versions)
    lower = functools.partial(triton_lib.triton_kernel_call_lowering, triton_lib.get_cuda_backend)

    def rule(ctx: Any, *arguments: Any, **params: Any) -> Any:
        types = tuple(str(aval.dtype) for aval in (*ctx.avals_in, *ctx.avals_out))
        with _COMPILING[types, tuple((k, v) for k, v in sorted(params.items()) if k not in _PLACES)]:
            results = lower(ctx, *arguments, **params)
        if params["custom_call_target_name"] == CAPTURABLE:
            first = results[0]
            call = (first[0] if isinstance(first, list | tuple) else first).owner
            opaque = ir.StringAttr(call.attributes["backend_config"]).value_bytes
            call.attributes["backend_config"] = ir.StringAttr.get("")
            call.attributes["api_version"] = ir.IntegerAttr.get(ir.IntegerType.get_signless(32), 1)
            call.attributes["mhlo.backend_config"] = ir.DictAttr.get(
                {"name": ir.StringAttr.get(params["name"]), "opaque": ir.StringAttr.get(opaque)}
            )
        return results

    mlir.register_lowering(triton_lib.triton_kernel_call_p, rule, platform="cuda")
