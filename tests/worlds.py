"""Small loaded models with everything inside: what the tests of routing, generation and training run on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from tiny import tiny_llama, tiny_peft

import converters
import meteora_jax as mj
from meteora_jax.config import PROJECTIONS, LlamaConfig, read_json
from meteora_jax.gate_config import GateConfig
from meteora_jax.io import hf_config
from meteora_jax.io.gates import save_gates

NAMES = ("apple", "birch", "cedar", "daisy")
RANKS = (4, 2, 8, 4)
# per adapter: which projections it touches
TARGETS = (
    list(PROJECTIONS),
    ["q_proj", "v_proj"],
    ["gate_proj", "up_proj", "down_proj"],
    ["o_proj", "k_proj", "down_proj"],
)


def random_gates(config: LlamaConfig, adapters: int, seed: int = 5) -> dict[str, np.ndarray]:
    """{projection: float32 [L, I, A]}, large enough that choices are clear-cut."""
    rng = np.random.default_rng(seed)

    def shape(p: str) -> tuple[int, int, int]:
        return config.num_layers, config.projection_shape(p)[0], adapters

    return {p: rng.standard_normal(shape(p)).astype(np.float32) for p in PROJECTIONS}


def make_world(tmp_path: Path, **overrides: Any) -> dict[str, Any]:
    """A tiny base with a bank of mixed ranks and targets and random gates, in every format on the way.

    Returns:
        hf (the torch model), hf_folder, peft ({name: folder}), base, bank, gates (our folders), gate_arrays.
    """
    hf, hf_folder = tiny_llama(tmp_path, **overrides)
    peft = {
        name: tiny_peft(
            tmp_path,
            hf_folder,
            name,
            seed=i + 1,
            r=rank,
            lora_alpha=3 if name == "cedar" else rank + i,
            target_modules=targets,
            use_rslora=name == "cedar",
        )
        for i, (name, rank, targets) in enumerate(zip(NAMES, RANKS, TARGETS, strict=True))
    }
    base, bank, gates = tmp_path / "base", tmp_path / "bank", tmp_path / "gates"
    converters.import_base(hf_folder, base)
    converters.import_adapters(bank, base, peft)
    config = hf_config.from_hf(read_json(base / "config.json"))
    arrays = random_gates(config, len(NAMES))
    save_gates(gates, GateConfig(NAMES, 2, 1.0), arrays)
    return {
        "hf": hf, "hf_folder": hf_folder, "peft": peft, "base": base, "bank": bank, "gates": gates,
        "gate_arrays": arrays, "model": mj.load(base, bank, gates, dtype="float32"),
    }  # fmt: skip
