"""The layout of the original MeteoRA's checkpoints.

The release of arXiv 2405.13053: `model.safetensors`, single or sharded, every key behind `base_model.model.`;
each projection holds `base_layer.weight` [O, I], `lora_A.weight` [A*R, I] and `lora_B.weight` [O, A*R], adapter after
adapter, and `moe_gate.weight` [A, I]. That order is the release's own code's (github.com/NJUDeepEngine/meteora):
`merge_lora_weights` joins the adapters' A by rows and their B by columns one after the other, and the layer reads
rows i*R to (i+1)*R of A, and those columns of B, as adapter i. Neither names nor scale are in the file: names follow
the training's task order, and the scale is alpha / R for every adapter.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

from converters.base_folder import OpenedBase
from converters.hf_llama import copy_tokenizer, llama_rules, module_name, read_weights, untie
from converters.rules import TRANSPOSE, Placement, Rule, plan
from converters.tensor_files import SourceTensor
from meteora_jax.config import PROJECTIONS, InputError, LlamaConfig, read_json
from meteora_jax.io import hf_config

PREFIX = "base_model.model."
_GATE = "moe_gate.weight"


def is_checkpoint(src: Path) -> bool:
    """Whether a folder's weights are those of the original MeteoRA: some projection has its gate."""
    try:
        return any(t.key.startswith(PREFIX) and t.key.endswith(_GATE) for t in read_weights(src)[1])
    except InputError:
        return False


def open_base(src: Path) -> OpenedBase:
    """The base inside a checkpoint; adapters and gates are left. Raises InputError as `hf_llama.open_base`."""
    raw = read_json(src / "config.json")
    files, tensors, remarks = read_weights(src)
    config, untied = untie(hf_config.from_hf(raw), tensors, PREFIX)
    paths = config.weight_shapes()
    rules = [
        rule if rule.path is None or rule.path in paths else Rule(rule.pattern, None, why="not of the base")
        for rule in meteora_rules(config)
    ]
    inputs, tokenizer = [*files, src / "config.json"], lambda folder: copy_tokenizer(src, folder)
    return OpenedBase(config, rules, tensors, inputs, tokenizer, base_names(raw), remarks=[*remarks, *untied])


def base_names(raw: object) -> dict[str, str]:
    """What config.json calls the base; the folder's own name is the checkpoint's."""
    name = raw.get("_name_or_path") if isinstance(raw, dict) else None
    return {"config.json _name_or_path": name} if isinstance(name, str) else {}


def meteora_rules(config: LlamaConfig) -> list[Rule]:
    """The original's keys: the base's (paths as in BASE), `p.gate`, `p.lora_a` and `p.lora_b`."""
    rules = []
    for rule in llama_rules(config):
        pattern = rule.pattern
        if (rule.path or "").endswith((".kernel", ".bias")) and rule.layered:
            module, _, kind = pattern.rpartition(".")
            pattern = f"{module}.base_layer.{kind}"
        same_as = PREFIX + rule.same_as if rule.same_as else None
        rules.append(Rule(PREFIX + pattern, rule.path, rule.transform, same_as))
    for p in PROJECTIONS:
        module = f"{PREFIX}model.layers.{{layer}}.{module_name(p)}"
        rules.append(Rule(f"{module}.{_GATE}", f"{p}.gate", TRANSPOSE))
        rules.append(Rule(f"{module}.lora_A.weight", f"{p}.lora_a"))
        rules.append(Rule(f"{module}.lora_B.weight", f"{p}.lora_b"))
    return rules


def checkpoint_shapes(config: LlamaConfig, adapters: int, rank: int) -> dict[str, tuple[int, ...]]:
    """The shape of every path of `meteora_rules`, layers stacked in front."""
    shapes, n = config.weight_shapes(), config.num_layers
    for p in PROJECTIONS:
        i, o = config.projection_shape(p)
        shapes |= {f"{p}.gate": (n, i, adapters), f"{p}.lora_a": (n, adapters * rank, i)}
        shapes |= {f"{p}.lora_b": (n, o, adapters * rank)}
    return shapes


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint after its headers were checked; `given` is the BASE that it must agree with."""

    config: LlamaConfig
    config_file: Path
    given: Path | None
    files: Sequence[Path]
    tensors: Sequence[SourceTensor]
    adapters: int
    rank: int
    placements: Sequence[Placement]


def read_checkpoint(src: Path, base: str | os.PathLike[str] | None) -> Checkpoint:
    """The checked headers of `src`. Raises InputError: everything that is wrong with them."""
    given = Path(base) if base is not None and Path(base).exists() else None
    config_file = (given or src) / "config.json"
    config = hf_config.from_hf(read_json(config_file), str(config_file))
    files, tensors, _ = read_weights(src)
    config = config if given else untie(config, tensors, PREFIX)[0]
    adapters, rank = _count(tensors, files[0].name)
    placements = plan(meteora_rules(config), tensors, checkpoint_shapes(config, adapters, rank), files[0].name)
    return Checkpoint(config, config_file, given, files, tensors, adapters, rank, placements)


def gate_shapes(config: LlamaConfig, adapters: int) -> dict[str, tuple[int, ...]]:
    """[L, I, A] by projection, as GATES has them."""
    return {p: (config.num_layers, config.projection_shape(p)[0], adapters) for p in PROJECTIONS}


def _count(tensors: Sequence[SourceTensor], file: str) -> tuple[int, int]:
    """(adapters, rank) as the first gate and the first lora_A say; `plan` holds all others to them."""
    gate = next((t for t in tensors if t.key.endswith(_GATE) and len(t.shape) == 2), None)
    lora = next((t for t in tensors if t.key.endswith("lora_A.weight") and len(t.shape) == 2), None)
    if gate is None or lora is None or not gate.shape[0]:
        raise InputError(f"{file}: {_GATE}: expected gates [A, I] and lora_A [A*R, I] as in MeteoRA, found none")
    adapters, rows = gate.shape[0], lora.shape[0]
    if not rows or rows % adapters:
        raise InputError(f"{lora.where}: expected a multiple of {adapters} rows (the gates'), found {rows}")
    return adapters, rows // adapters
