"""What adapters cost: the bare base and the base with adapters timed in one run, in alternation, as medians.

    python scripts/bench.py --shape tiny                                             # any machine, a minute or two
    python scripts/bench.py --shape llama-3-8b --what decode --batch 1 8 32 --json decode.json --picture decode.png
    python scripts/bench.py --shape llama-3-8b --what kernel --batch 1 8 32 2048     # every implementation, alone

Weights are random. `kernel` times one projection group, base product included, over the weights of several layers, so
that none stays in a cache, and names the fastest implementations of each shape. "ratio" is the time with adapters
divided by that of the bare base; "roofline" is the least time that the arithmetic and the bytes need, at the rates
measured at the start of the run, divided by the time.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import Any

import jax
import jax.numpy as jnp
import tyro
from bench_kernels import bench_kernel
from bench_models import bench_model
from bench_settings import Bench, llama
from bench_tables import LABELS, draw, show
from bench_timing import console, device_rates

from meteora_jax.config import InputError
from meteora_jax.execution import default_dtype


def main(bench: Bench) -> None:
    """Measures, prints and writes the records; those measured before an error are written too."""
    config = llama(bench.shape)
    if bench.routing != "gates" and "train" in bench.what:
        raise InputError(f"--what train: expected --routing gates, found {bench.routing}")
    if bench.routing == "given" and set(bench.what) != {"kernel"}:
        raise InputError(f"--routing given: expected --what kernel, found {', '.join(bench.what)}")
    if bench.layers is not None:
        config = dataclasses.replace(config, num_layers=bench.layers)
    dtype = jnp.dtype(default_dtype(bench.dtype))
    rates = device_rates(dtype)
    console.print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {dtype.name}: a product reaches "
                  f"{rates.flops / 1e12:.3g} TFLOP/s, a copy {rates.bytes / 1e9:.3g} GB/s")  # fmt: skip
    records: list[dict[str, Any]] = []
    sources = [bench_kernel] if "kernel" in bench.what else []
    if set(bench.what) - {"kernel"}:
        sources.append(bench_model)
    try:
        for source in sources:
            for record in source(bench, config, dtype, rates):
                records.append(record)
                if bench.json:  # at once: the machine may be taken away
                    bench.json.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
                what = " ".join(str(record[k]) for k in LABELS if k in record)
                error = (
                    f"  differs from the reference by {record['error']:.1e} of the update" if "error" in record else ""
                )
                console.print(f"[dim]{what} {record['batch']}x{record['sequence']} {record['ratio']:.3f}{error}")
    finally:
        if records:
            show(records, console)
            if bench.picture:
                draw(records, bench.picture)


if __name__ == "__main__":
    try:
        main(tyro.cli(Bench, description=__doc__))
    except InputError as e:
        sys.exit(f"error: {e}")
