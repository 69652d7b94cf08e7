"""Attention over keys and values that lie in blocks, wherever each sequence was given them."""

from pallas_kernels.paged_attention.api import EMPTY, QUERY_BLOCK, StepTokens, paged_attention, write_pages

__all__ = ["EMPTY", "QUERY_BLOCK", "StepTokens", "paged_attention", "write_pages"]
