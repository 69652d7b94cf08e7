"""Token lists of different lengths as one array, in few shapes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jax.sharding import Mesh

from meteora_jax.routing import BoundRouter
from meteora_jax.sharding import pad_rows, place_rows, rows_multiple


def bucket(length: int) -> int:
    """The padded length: 16, 24, 32, 48, 64, 96 ...: few compiled shapes, at most half wasted."""
    size = 16
    while size < length:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return size


def rows_within(tokens: int, length: int, most: int) -> int:
    """How many rows, at most `most` and at least one, of lists so long have at most so many tokens when padded."""
    return max(1, min(most, tokens // bucket(length)))


def pad_prompts(prompts: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Token lists -> int32 [B, T] padded on the right to a bucket, and their lengths int32 [B]."""
    lengths = np.asarray([len(p) for p in prompts], np.int32)
    tokens = np.zeros((len(prompts), bucket(int(lengths.max()))), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    return tokens, lengths


def pad_batch(
    prompts: Sequence[Sequence[int]], router: BoundRouter | None, mesh: Mesh | None
) -> tuple[np.ndarray, np.ndarray, BoundRouter | None]:
    """`pad_prompts`, with empty rows (length 0) up to what the mesh divides, and the router for all rows."""
    (tokens, lengths), router = fill_rows(pad_prompts(prompts), router, mesh)
    return tokens, lengths, router


def fill_rows(
    batch: tuple[np.ndarray, np.ndarray], router: BoundRouter | None, mesh: Mesh | None
) -> tuple[tuple[np.ndarray, np.ndarray], BoundRouter | None]:
    """Of `pad_batch`, for what was padded to one length before."""
    tokens, lengths = batch
    multiple = rows_multiple(mesh)
    rows = -(-len(lengths) // multiple) * multiple
    extra = rows - len(lengths)
    router = router if mesh is None else place_rows(pad_rows(router, rows), mesh)
    return (np.pad(tokens, [(0, extra), (0, 0)]), np.pad(lengths, (0, extra))), router
