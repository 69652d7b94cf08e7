"""Blocks found again by what is in them: tokens, everything before them, and what acted on them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from meteora_jax.engine.blocks import BlockPool


class PrefixCache:
    """Full blocks of earlier sequences, for later ones that begin alike.

    A block's key is a digest of its tokens, of the key before it, and at the start of the sequence's `identity`: what
    decided about adapters (none, a named routing, gates with their settings). Keys and values of two sequences with the
    same key are the same, so the second reads nothing of what they share. enabled: whether anything is kept.
    """

    def __init__(self, blocks: int, block_size: int, enabled: bool = True):
        self.block_size, self.enabled = block_size, enabled
        self.pool = BlockPool(blocks, self._known, self._forget)
        self._blocks: dict[bytes, int] = {}  # key -> block
        self._keys: dict[int, bytes] = {}  # block -> key

    def keys(self, tokens: Sequence[int], identity: bytes, known: Sequence[bytes] = ()) -> list[bytes]:
        """The keys of the full blocks of a sequence, the first of which are `known` already."""
        if not self.enabled:
            return []
        size, found = self.block_size, list(known)
        key = found[-1] if found else hashlib.blake2b(identity, digest_size=16).digest()
        array = np.asarray(tokens, np.int32)
        for start in range(len(found) * size, len(array) - size + 1, size):
            key = hashlib.blake2b(key + array[start : start + size].tobytes(), digest_size=16).digest()
            found.append(key)
        return found

    def match(self, keys: Sequence[bytes], tokens: int) -> list[int]:
        """The blocks of the longest known beginning, now held, of a sequence that has so many tokens to read; the last
        token is always read, as its logits are wanted."""
        blocks = []
        for key in keys[: max(0, tokens - 1) // self.block_size]:
            if (block := self._blocks.get(key)) is None:
                break
            self.pool.share(block)
            blocks.append(block)
        return blocks

    def publish(self, keys: Sequence[bytes], blocks: Sequence[int]) -> None:
        """Blocks that are full (or will be before any later step reads them), by their keys; known keys stay."""
        for key, block in zip(keys, blocks, strict=False):
            if key not in self._blocks and block not in self._keys:
                self._blocks[key], self._keys[block] = block, key

    def _known(self, block: int) -> bool:
        return block in self._keys

    def _forget(self, block: int) -> None:
        del self._blocks[self._keys.pop(block)]
