"""NVIDIA GPUs: routing by rules that epilogues do not have, asked for between a decoding step's product and epilogue.

Who chooses by scores of the shrinks (Arrow, SpectR, LAG) ranks them in one launch, `rank_kernel`; what else there is
XLA computes from the group's input, logits and shrinks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels.decode_step.operands import Choice, Group, StepState
from pallas_kernels.launch import launch
from pallas_kernels.quantized_matmul import triton_gpu as quantized_gpu
from pallas_kernels.routed_lora.triton_gpu import power
from pallas_kernels.topk_gating import TopK

BLOCK = 8192  # values of factors that a program holds at a time
shape = jax.ShapeDtypeStruct


@dataclasses.dataclass(frozen=True)
class Shrinks:
    """The shrinks of a group's input, where a product has left them.

    product: float32 [at least M, O + P packed], or summands of it below each other. squares: of the residual stream;
    None where no norm is before the group.
    """

    layer: int
    rows: int
    width: int
    product: jax.Array
    squares: jax.Array | None
    group: Group

    def rank(
        self, rule: TopK, arrow: jax.Array | None, spectr: jax.Array | None, allowed: jax.Array | None = None,
        candidates: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:  # fmt: skip
        """The best adapters of every row and projection, and the softmax of their scores.

        Args:
            rule: each row's number of adapters and temperature.
            arrow, spectr: the vectors float32 [L, P, A, R] and matrices [L, P, A, R, R] of `scores`; by the matrices
                where there are any, among the best by the vectors where there are both.
            allowed: bool [M, A], the adapters that each row may choose; None: all.
            candidates: int32 [M], how many of the best by the vectors may be chosen.

        Returns:
            indices int32 and weights float32, [M, P, C]; -1 and 0 where nobody is left.
        """
        group = self.group
        assert group.b is not None
        assert group.scale is not None
        adapters, rank, _ = group.b.shape[1:]
        number = jnp.full((1,), self.layer, jnp.int32)
        out = self.rows, len(group.splits), rule.k
        given = (
            self.squares, group.scale, arrow, spectr, None if allowed is None else allowed.astype(jnp.int32), candidates
        )  # fmt: skip
        read = (number if z is None else z for z in given)  # an array in the place of one that is not read
        indices, weights = launch(
            "pallas_kernels.decode_step.rank_kernels", "rank_kernel", number, self.product, *read, rule.counts,
            rule.temperatures, out=(shape(out, jnp.int32), shape(out, jnp.float32)), grid=out[:2],
            M=self.rows, I=self.width, P=out[1], NORM=self.squares is not None, EPS=group.eps or 0.0,
            PARTS=1 if self.squares is None else self.squares.shape[1], ROW=self.product.shape[1],
            SPLITS=quantized_gpu.summands(group.w, self.rows), START=group.columns + group.first_shrink,
            PACKED=group.packed, A=adapters, AP=power(adapters), R=rank, RP=power(rank), C=out[2], CP=power(out[2]),
            ARROW=arrow is not None, SPECTR=spectr is not None, ALLOWED=allowed is not None,
            BS=max(1, min(power(rank), BLOCK // (power(adapters) * power(rank)))),
        )  # fmt: skip
        return indices, weights


# What makes a choice by rules that epilogues do not have, of a layer, the first projection of one of its groups, the
# group's input [M, I], its gates' logits float32 [M, P, G] and, where A's are packed, its shrinks float32 [M, P, A, R],
# and these as they lie: a routing given for each projection.
Chooser = Callable[[int, int, jax.Array, jax.Array, jax.Array | None, Shrinks | None], Choice]


def ask(
    choice: Chooser, layer: int, rows: int, x: jax.Array, product: jax.Array, squares: jax.Array | None, group: Group,
    state: StepState,
) -> tuple[Choice, StepState]:  # fmt: skip
    """What a Chooser makes of a group's product, and the state with that traced; arguments as `triton_gpu` has them."""
    p, splits = len(group.splits), quantized_gpu.summands(group.w, rows)
    behind = product[: splits * rows, group.columns :].reshape(splits, rows, p, group.packed)
    behind, width, x = jnp.sum(behind, axis=0), x.shape[1], x[:rows]
    if squares is not None:
        factor = jax.lax.rsqrt(jnp.sum(squares, axis=1, keepdims=True) / width + (group.eps or 0.0))
        x, behind = (x.astype(jnp.float32) * factor).astype(x.dtype), behind * factor[..., None]
    shrinks = lying = None
    if group.a is None and group.b is not None:
        adapters, rank, _ = group.b.shape[1:]
        shrinks = behind[..., group.first_shrink : group.first_shrink + adapters * rank]
        shrinks = shrinks.reshape(rows, p, adapters, rank)
        lying = Shrinks(layer, rows, width, product, squares, group)
    chosen = choice(layer, group.first_projection, x, behind[..., : group.gates], shrinks, lying)
    own = layer, slice(None), slice(group.first_projection, group.first_projection + p)
    indices, weights = state.indices.at[own].set(chosen.indices), state.weights.at[own].set(chosen.weights)
    return chosen, dataclasses.replace(state, indices=indices, weights=weights)
