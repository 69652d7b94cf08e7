"""Triton's interpreter in the place of a GPU, for programs that start with TRITON_INTERPRET=1.

Everything but a launch's last call is the packages' own code: tiles, grids, order of arguments.
"""

# pyright: reportMissingImports=false
# (triton is optional)

from __future__ import annotations

import functools
import importlib
import sys
import threading
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

import compiling

from pallas_kernels.decode_step import choosing
from pallas_kernels.decode_step import triton_gpu as step_gpu
from pallas_kernels.paged_attention import triton_gpu as paged_gpu
from pallas_kernels.quantized_matmul import triton_gpu as quantized_gpu
from pallas_kernels.routed_lora import triton_gpu as routed_gpu

LAUNCHES: list[str] = []  # the kernels that were launched, or traced in a program
RAN: list[str] = []  # the kernels whose results were needed; one traced before runs without being launched again
ONE_AT_A_TIME = threading.Lock()  # the interpreter is one for all devices' threads


def interpret() -> None:
    """Launches of every kernel run in the interpreter from here on, and programs for CPUs are compiled fast."""
    compiling.use()
    correct_interpreter()
    step_gpu.launch = choosing.launch = paged_gpu.launch = quantized_gpu.launch = launch
    routed_gpu.launch = functools.partial(launch, "pallas_kernels.routed_lora.triton_kernels")


def launch(
    module: str, kernel: str, *arrays: Any, out: Any, grid: tuple[int, ...], warps: int = 4, aliases: Any = None,
    **constants: Any,
) -> Any:  # fmt: skip
    """`pallas_kernels.launch.launch`; outputs start as NaN, or as a wild index, or as the input they alias."""
    LAUNCHES.append(kernel)
    inputs = {place: i for i, place in (aliases or {}).items()}
    if "ASM" in constants:
        constants["ASM"] = False  # the interpreter knows no assembly

    def run(*arrays: Any) -> tuple[np.ndarray, ...]:
        with ONE_AT_A_TIME:
            RAN.append(kernel)
            results = []
            for place, shape in enumerate(out):
                wild = np.nan if jnp.issubdtype(shape.dtype, jnp.floating) else 10**6
                start = arrays[inputs[place]] if place in inputs else np.full(shape.shape, wild, shape.dtype)
                results.append(to_torch(start))
            getattr(importlib.import_module(module), kernel)[grid](*map(to_torch, arrays), *results, **constants)
            return tuple(map(to_numpy, results))

    if any(isinstance(z, jax.core.Tracer) for z in arrays):
        return jax.pure_callback(run, out, *arrays)
    return tuple(map(jnp.asarray, run(*arrays)))


# what torch has no NumPy dtype for, by its bits
BITS = {"bfloat16": (ml_dtypes.bfloat16, np.int16), "float8_e4m3fn": (ml_dtypes.float8_e4m3fn, np.uint8)}


def to_torch(array: Any) -> Any:
    import torch

    array = np.array(array)
    if array.dtype.name not in BITS:
        return torch.from_numpy(array)
    return torch.from_numpy(array.view(BITS[array.dtype.name][1])).view(getattr(torch, array.dtype.name))


def to_numpy(tensor: Any) -> np.ndarray:
    import torch

    if tensor.dtype != torch.bfloat16:
        return tensor.numpy()
    return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)


def correct_interpreter() -> None:
    """What Triton's interpreter has wrong or slow."""
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    multiply, convert, patch_tensor = builder.create_dot, builder.cast_impl, interpreter._patch_lang_tensor

    def dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        """It keeps bfloat16 as 16 bits and multiplies matrices of it as if they were integers."""

        def widen(block: Any) -> Any:
            if block.dtype.scalar != tl.bfloat16:
                return block
            return interpreter.TensorHandle((block.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

        return multiply(self, widen(a), widen(b), *rest)

    def cast(self: Any, source: Any, kind: Any) -> Any:
        """It takes integers that become bfloat16 for the bits of one."""
        if kind.scalar == tl.bfloat16 and source.dtype.scalar.is_int():
            source = interpreter.TensorHandle(source.data.astype(np.float32), tl.float32)
        return convert(self, source, kind)

    def patch(tensor: Any, scope: Any) -> None:
        """A loop's bound that was read from memory is an array of one element, which NumPy takes for no number."""
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(np.reshape(self.handle.data, ())))

    builder.create_dot, builder.cast_impl, interpreter._patch_lang_tensor = dot, cast, patch
    # It puts its functions into the language, which calls of a device function do again: here once.
    import pallas_kernels.routed_lora.triton_kernels as kernels

    functions: tuple[Any, ...] = (kernels.project, tl.zeros)  # of `tl`, and of `tl.core`
    for function in functions:
        interpreter._patch_lang(function.fn)
    interpreter._patch_lang = lambda function: interpreter._LangPatchScope()
