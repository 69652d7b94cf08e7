"""How a program runs: one frozen value, made once from platform, dtype and mesh, held by the model and passed down."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.sharding import AbstractMesh, Mesh
from jax.typing import DTypeLike

from pallas_kernels.decode_step.triton_gpu import StepLimits

MANY_TOKENS = 512  # for which a product's operations cost more than its weights' bytes
FILLING_TOKENS = 128  # of which two tiles, with a few thousand columns, have programs enough for a chip
# What cuDNN's attention may be used for on a GPU: "packed" training sequences.
Fused = Literal["packed"]
Platform = Literal["cpu", "gpu", "tpu"]
Dtype = Literal["float32", "bfloat16", "float16"]


def platform() -> str:
    """What a program traced now will run on, "cpu", "gpu" or "tpu": the devices of `use_mesh`, else the default."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def default_dtype(dtype: Dtype | None = None) -> Dtype:
    """What weights and activations are, unless the caller says: float32 on a CPU, bfloat16 on an accelerator.

    A CPU has no fast bfloat16.
    """
    return dtype or ("float32" if platform() == "cpu" else "bfloat16")


@functools.cache
def has_triton() -> bool:
    """Whether the extra `gpu` is installed."""
    return all(map(importlib.util.find_spec, ("jax_triton", "triton")))


@dataclasses.dataclass(frozen=True)
class ExecutionConfig:
    """Which implementation serves what. `Llama.execution` is static: models that run otherwise are other programs.

    platform: what the routed LoRA product's implementation is chosen for.
    step: decoding steps by cuBLAS and Triton, and of how many rows; None: XLA's. Where there are any, `pack`
        packs gates and A's behind the kernels' rows.
    fused_attention: what cuDNN attends to, where the model's heads allow it.
    triton: whether few tokens are routed and adapted by one Triton launch behind a packed weight's product.
    epilogue_tokens: from so many tokens on, which are not a step's of the kernels, a packed weight's adapters are one
        Triton launch behind the base's product, which takes silu(gate) * up or adds the residual stream; None: never.
    shares: whether on a mesh every device runs its own share of a step's layers (`model.shares`), so that kernels
        serve it; else XLA splits them.
    ragged: whether JAX's kernel attends to a step's tokens on TPUs, of the heads that it serves.
    dense_width: A * R of a bank up to which every adapter's shrink is taken with the gates.
    fp8_tokens: from so many tokens on inference multiplies fp8 weights with activations rounded to fp8, a scale a
        token; None: never.
    """

    platform: Platform = "cpu"
    step: StepLimits | None = None
    fused_attention: tuple[Fused, ...] = ()
    triton: bool = False
    epilogue_tokens: int | None = None
    shares: bool = False
    ragged: bool = False
    dense_width: int = 512
    fp8_tokens: int | None = None

    @property
    def kernels(self) -> bool:
        """Whether attention of a step may be what the partitioner of a mesh cannot split."""
        return self.step is not None or self.ragged or self.platform == "cpu"

    def reads_filled(self, mesh: Mesh | AbstractMesh | None) -> bool:
        """Whether attention of a step reads no more of a table than is filled: then one width of tables serves all."""
        return self.step is not None or (self.platform == "cpu" and mesh is None)

    @classmethod
    def of(
        cls, platform: str, dtype: Any, mesh: Mesh | AbstractMesh | None = None, triton: bool = True
    ) -> ExecutionConfig:
        """What was timed fastest on "cpu", "gpu" or "tpu" (docs/performance.md); triton: with the extra `gpu`."""
        if platform not in ("gpu", "tpu"):
            return cls("cpu")
        alone = mesh is None or mesh.size == 1
        # an fsdp axis would gather a layer's weights anew at every step
        shares = mesh is not None and not alone and mesh.shape.get("fsdp", 1) == 1
        if platform == "tpu":
            return cls("tpu", shares=shares, ragged=alone or shares)
        shares &= triton
        return cls(
            "gpu",
            step=StepLimits() if triton and (alone or shares) else None,
            fused_attention=("packed",) if jnp.dtype(dtype).itemsize == 2 else (),
            triton=triton,
            epilogue_tokens=FILLING_TOKENS if triton and (alone or shares) else None,
            shares=shares,
            fp8_tokens=MANY_TOKENS if jnp.dtype(dtype) == jnp.bfloat16 and alone else None,
        )

    @classmethod
    def here(cls, dtype: Any, mesh: Mesh | None = None, triton: bool | None = None) -> ExecutionConfig:
        """The same for the mesh's devices, or those of this process."""
        kind = platform() if mesh is None else mesh.devices.flat[0].platform
        found = cls.of(kind, dtype, mesh, has_triton() if triton is None else triton)
        device = jax.local_devices()[0] if mesh is None else mesh.devices.flat[0]
        capability = float(device.compute_capability) if found.platform == "gpu" else 0.0
        if found.fused_attention and capability < 8.0:  # before Ampere
            found = dataclasses.replace(found, fused_attention=())
        if found.fp8_tokens and capability < 8.9:  # before Ada
            found = dataclasses.replace(found, fp8_tokens=None)
        return found

    def packs(self, dtype: DTypeLike, mesh: Mesh | AbstractMesh | None) -> bool:
        """Whether models of this type are packed for inference: on GPUs in 16 bit, and on meshes that kernels serve."""
        return self.platform == "gpu" and jnp.dtype(dtype).itemsize == 2 and (mesh is None or self.shares)


# XLA's own Triton matrix products copy a layer's weights out of the stack before they read them (a decoding step of
# Llama-3-8B takes 11.4 ms with them), and gave NaN in training; cuBLAS reads the stack where it lies.
# Where XLA counts too little memory it computes values again from what was updated in place by then: a decoding step
# took one from the tokens left twice, and a response never got its last token (docs/lab-notes-speed.md).
GPU_OPTIONS: Mapping[str, Any] = MappingProxyType(
    {
        "xla_gpu_enable_triton_gemm": False,
        "xla_gpu_enable_dynamic_slice_fusion": True,
        "xla_disable_hlo_passes": "rematerialization",
    }
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
