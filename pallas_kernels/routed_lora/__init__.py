"""The routed LoRA product: every token adds the low-rank updates of the adapters that its routing names."""

from pallas_kernels.routed_lora.api import LoraBank, routed_lora

__all__ = ["LoraBank", "routed_lora"]
