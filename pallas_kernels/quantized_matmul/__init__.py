"""Products with weights in 8 and 4 bits."""

from pallas_kernels.quantized_matmul.api import quantized_matmul
from pallas_kernels.quantized_matmul.weight import QuantizedWeight

__all__ = ["QuantizedWeight", "quantized_matmul"]
