"""What an adapter's way to the device costs before its slot, of any base's shape; no model is made.

    python scripts/bench_staging.py --shape llama-3-8b --rank 16
    python scripts/bench_staging.py --shape llama-3-8b --rank 16 --folder /dev/shm/staging

host: read, checked and laid out as a slot has it. sent: that, and until the device has it. Milliseconds an adapter, by
one thread and by as many as a pool has. Adapters lie in memory in bfloat16; with --folder in a file, in float32.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from bench_pool import RandomBank, written
from bench_settings import llama
from bench_timing import console
from flax import nnx

from meteora_jax.config import InputError
from meteora_jax.engine.copies import READERS
from meteora_jax.engine.slot_weights import SlotWeights
from meteora_jax.engine.staging import Layout, Staged
from meteora_jax.io.stored_bank import StoredBank, empty_slots
from meteora_jax.model.llama import Llama


@dataclasses.dataclass(frozen=True)
class BenchStaging:
    """Milliseconds an adapter, in bfloat16."""

    shape: Literal["tiny", "smollm2-135m", "llama-3-8b"]
    """Shape of the base."""
    rank: int = 16
    """Of every adapter."""
    count: int = 24
    """Adapters that are timed."""
    folder: Path | None = None
    """Where a BANK folder is written and read from."""


class HostOnly(Layout):
    """Of which nothing is sent."""

    def send(self, arrays: Mapping[str, np.ndarray]) -> Staged:
        return {}

    def shared(self) -> bool:
        return False


def main(settings: BenchStaging) -> None:
    """Measures and prints."""
    config, dtype, several = llama(settings.shape), np.dtype(jnp.bfloat16), 3
    bank: StoredBank = RandomBank(config, several, settings.rank, dtype)
    if settings.folder is not None and isinstance(bank, RandomBank):
        bank = written(settings.folder, bank, config, dtype)
    described = empty_slots(bank.config, 1)
    graph, state = nnx.split(nnx.eval_shape(lambda: Llama(config, described, dtype=dtype, rngs=nnx.Rngs(0))))
    console.print(f"{jax.devices()[0].device_kind}, {'memory' if settings.folder is None else 'folder'}")
    for kind in ("host", "sent"):
        slots = SlotWeights(graph, state, config, None, router=False)
        if kind == "host":
            slots.layout.__class__ = HostOnly

        def stage(i: int, slots: SlotWeights = slots) -> int:
            return len(slots.stage(bank.adapter(i % several), {}))

        for threads in (1, READERS):
            with ThreadPoolExecutor(threads) as readers:
                list(readers.map(stage, range(2 * threads)))  # makes their memory
                start, cpu = time.perf_counter(), time.process_time()
                list(readers.map(stage, range(settings.count)))
                each = (time.perf_counter() - start) / settings.count * 1e3
                busy = (time.process_time() - cpu) / settings.count * 1e3
            console.print(f"{kind}, {threads} at once: {each:.1f} ms an adapter, {busy:.1f} of a core")


if __name__ == "__main__":
    try:
        main(tyro.cli(BenchStaging, description=__doc__))
    except InputError as e:
        sys.exit(f"error: {e}")
