"""How a base's matrices are stored in 8 or 4 bits: which tensors, of which shape and type."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

WeightFormat = Literal["int8", "fp8", "int4"]
WEIGHT_FORMATS: tuple[WeightFormat, ...] = ("int8", "fp8", "int4")
GROUP_SIZE = 128  # of int4, as GPTQ and AWQ have it
Stored = tuple[tuple[int, ...], str]  # a tensor's shape and type
# What safetensors calls the types of stored tensors; fp8 lies there as its bits, which every reader can take a part of.
STORED_TYPES = {"int8": "I8", "uint8": "U8", "float8_e4m3fn": "U8", "float32": "F32"}
ITEM_BYTES = {"int8": 1, "uint8": 1, "float8_e4m3fn": 1, "float32": 4}


@dataclasses.dataclass(frozen=True)
class Quantization:
    """How a base's matrices are stored, see `pallas_kernels.quantized_matmul`; norms and biases are as they were.

    weights: of the projections. group_size: inputs that share a scale in int4, or the largest part of it that divides a
    projection's; None in 8 bit, where each output column has its own. head, embedding: whether they are stored in 8
    bit as well (fp8 beside fp8, else int8), with a scale a token.
    """

    weights: WeightFormat
    group_size: int | None = None
    head: bool = False
    embedding: bool = False

    @classmethod
    def of(cls, weights: WeightFormat, head: bool = False, embedding: bool = False) -> Quantization:
        """As `meteora quantize` writes them."""
        return cls(weights, GROUP_SIZE if weights == "int4" else None, head, embedding)

    @classmethod
    def from_json(cls, raw: object) -> Quantization | None:
        """What `dataclasses.asdict` made; None where it is none of these formats."""
        if not isinstance(raw, dict) or raw.keys() != {"weights", "group_size", "head", "embedding"}:
            return None
        size, grouped = raw["group_size"], raw["weights"] == "int4"
        even = isinstance(size, int) and size > 0 and size % 2 == 0
        ends = all(isinstance(raw[end], bool) for end in ("head", "embedding"))
        known = raw["weights"] in WEIGHT_FORMATS and ends and (even if grouped else size is None)
        return cls(**raw) if known else None

    @property
    def eight_bit(self) -> str:
        """The type of values in 8 bit."""
        return "float8_e4m3fn" if self.weights == "fp8" else "int8"

    def parts(self, width: int, total: int) -> dict[str, Stored]:
        """What a kernel [I = width, O = total] is stored as, by the ends of its names."""
        if self.group_size is None:
            return {"kernel": ((width, total), self.eight_bit), "kernel_scale": ((total,), "float32")}
        groups = width // math.gcd(width, self.group_size)
        return {
            "kernel": ((width // 2, total), "uint8"),
            "kernel_scale": ((groups, total), "float32"), "kernel_zero": ((groups, total), "uint8"),
        }  # fmt: skip

    def vocab_parts(self, vocab: int, width: int) -> dict[str, Stored]:
        """The same of the embedding [V, D] and the head [D, V], by their own names; those that are quantised."""
        ends = ("embed.embedding", (vocab, width), self.embedding), ("lm_head.kernel", (width, vocab), self.head)
        found: dict[str, Stored] = {}
        for path, shape, quantized in ends:
            if quantized:
                found |= {path: (shape, self.eight_bit), f"{path}_scale": ((vocab,), "float32")}
        return found

    def __str__(self) -> str:
        """In words: int4 in groups of 128, head int8."""
        groups = "" if self.group_size is None else f" in groups of {self.group_size}"
        ends = (f"{end} {self.eight_bit}" for end in ("head", "embedding") if getattr(self, end))
        return ", ".join((f"{self.weights}{groups}", *ends))
