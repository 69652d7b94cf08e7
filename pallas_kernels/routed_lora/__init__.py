"""The routed LoRA product: every token adds the low-rank updates of the adapters that its routing names."""

from pallas_kernels.routed_lora.api import add_routed_lora
from pallas_kernels.routed_lora.reference import routed_lora

__all__ = ["add_routed_lora", "routed_lora"]
