"""The layout of a packed weight: behind a base kernel's rows, for each projection its gates and its A matrices as rows.

One product then gives a projection group's output, its gate logits and its shrinks.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

GATES = 32  # the gates' rows of a projection are padded to a multiple of this ...
ROWS = 256  # ... and all its rows to a multiple of this: matrix units want whole tiles


def first_a_row(gates: int) -> int:
    """Where a projection's A rows begin, behind the rows of its gates."""
    return -(-gates // GATES) * GATES


def pack_gates_and_a(gate: Float[Array, "I P G"], a: Float[Array, "P A R I"]) -> Float[Array, "P N I"]:
    """Gates and A's as rows, zero-padded, in a's dtype; N a multiple of 256 (28 adapters of rank 8: 256).

    G: columns of the gates, one for each adapter and any for the null choice behind them.
    """
    projections, adapters, rank, width = a.shape
    columns = gate.shape[-1]
    first = first_a_row(columns)
    gates = jnp.pad(gate.transpose(1, 2, 0).astype(a.dtype), ((0, 0), (0, first - columns), (0, 0)))
    rows = a.reshape(projections, adapters * rank, width)
    padding = -(first + adapters * rank) % ROWS
    return jnp.concatenate([gates, jnp.pad(rows, ((0, 0), (0, padding), (0, 0)))], axis=1)
