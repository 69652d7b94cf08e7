"""From gate logits to the k adapters of a token and their weights."""

from pallas_kernels.topk_gating.api import NO_ADAPTER, TopK, topk_gating

__all__ = ["NO_ADAPTER", "TopK", "topk_gating"]
