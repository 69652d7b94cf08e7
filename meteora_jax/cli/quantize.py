"""`meteora quantize`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import tyro

from meteora_jax.cli.report import Conversion
from meteora_jax.quantization import WeightFormat


@dataclass(frozen=True)
class Quantize(Conversion):
    """Write a base again with its weights in 8 or 4 bits, to be loaded like any other."""

    base: tyro.conf.Positional[Path]
    """BASE folder."""
    dest: tyro.conf.Positional[Path]
    """BASE folder to make."""
    weights: WeightFormat
    """Of the seven projections: int8 or fp8 (e4m3) with a scale an output column, or int4 with a scale and a zero for
    each group of 128 inputs."""
    head: bool = False
    """Put the head in 8 bit as well."""
    embedding: bool = False
    """Put the embedding in 8 bit as well."""


def quantize(command: Quantize) -> None:
    """Runs `meteora quantize`."""
    import converters

    convert = partial(
        converters.quantize_base, command.base, command.dest, command.weights, command.head, command.embedding
    )
    done = command.run("quantize", convert)
    worst, error = done.worst
    kept = done.config.quantization
    assert kept is not None
    sizes = f"{done.bytes_before / 1e6:,.1f} MB -> {done.bytes_after / 1e6:,.1f} MB"
    errors = f"relative error of the weights {done.error:.2%}, at most {error:.2%} ({worst})"
    report = {"base": str(command.dest), "quantization": asdict(kept)}
    report |= {"bytes": done.bytes_after, "bytes_before": done.bytes_before}
    report |= {"error": done.error, "worst": {"tensor": worst, "error": error}}
    command.tell(f"{command.dest}: {kept}; {sizes}; {errors}", report)
