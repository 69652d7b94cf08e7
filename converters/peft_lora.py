"""PEFT LoRA folders -> BANK: all adapters of one base, stacked and zero-padded to a common rank.

Format: `adapter_config.json` (peft's `LoraConfig`) and `adapter_model.safetensors`; `lora_A` [r, I], `lora_B` [O, r],
y = x W^T + scale * x A^T B^T. Tensors decide what an adapter holds; settings are cross-checked against them, and
a setting that this importer cannot honour is refused by name, whatever peft itself would make of it.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias, cast

import numpy as np

from converters.base_folder import common_dtype
from converters.folders import new_folder, sha256, write_json
from converters.hf_llama import module_name
from converters.peft_export import CONFIG, WEIGHTS
from converters.peft_settings import LoraSettings, read_settings
from converters.rules import Progress, copy_tensor
from converters.tensor_files import FLOATS, SourceTensor, TensorWriter, dtype_name, read_safetensors
from meteora_jax.config import PROJECTIONS, AdapterInfo, BankConfig, InputError, LlamaConfig, read_json

Adapters: TypeAlias = Iterable[tuple[str, str | os.PathLike[str]]]  # (name, PEFT folder)

_KEY = re.compile(
    r"(?:base_model\.model\.)?(?P<module>model\.layers\.(?P<layer>0|[1-9][0-9]*)\.(?P<name>(?:self_attn|mlp)\.\w+))"
    r"\.lora_(?P<half>[AB])(?:\.default)?\.weight"
)
_PROJECTION_OF = {module_name(p): p for p in PROJECTIONS}
_UNSUPPORTED_TENSORS = {
    "lora_magnitude_vector": "DoRA is not supported",
    "lora_embedding_": "adapters on embeddings are not supported",
    "embed_tokens": "adapters on embeddings and saved embeddings are not supported",
    "lm_head": "adapters on the head and saved heads are not supported",
    "modules_to_save": "saved modules are not supported",
    ".bias": "biases are not supported",
    "base_layer": "an adapter file that holds base weights is not supported",
}


@dataclasses.dataclass(frozen=True)
class _Adapter:
    """A PEFT folder after every check of its settings and headers."""

    name: str
    folder: Path
    raw: dict[str, Any]
    settings: LoraSettings
    halves: dict[tuple[int, str, str], SourceTensor]  # (layer, projection, "A" or "B")

    @property
    def modules(self) -> list[tuple[int, str]]:
        return sorted({(layer, p) for layer, p, _ in self.halves})

    @property
    def inputs(self) -> tuple[Path, Path]:
        return self.folder / CONFIG, self.folder / WEIGHTS

    def rank_of(self, projection: str) -> int:
        """The largest rank over the layers; 0 where the adapter does not touch the projection."""
        shapes = (t.shape for (_, p, half), t in self.halves.items() if p == projection and half == "A")
        return max((shape[0] for shape in shapes), default=0)


def import_adapters(
    dest: str | os.PathLike[str],
    base: str | os.PathLike[str],
    adapters: Mapping[str, str | os.PathLike[str]] | Adapters,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> BankConfig:
    """Imports PEFT folders into one bank, in the order given.

    Args:
        dest: the BANK folder to make.
        base: the BASE folder that the adapters were trained on; only its `config.json` is read.
        adapters: {name: PEFT folder}, or (name, PEFT folder) pairs.
        overwrite: replace a `dest` that holds something, once the new one is complete.
        progress: called after each adapter with (name, done, total).

    Raises:
        InputError: everything that is wrong with the names, settings and tensors of all folders; `dest` is then as
            it was.
    """
    config_file = Path(base) / "config.json"
    config = LlamaConfig.from_hf(read_json(config_file), str(config_file))
    pairs = cast("Adapters", adapters.items() if isinstance(adapters, Mapping) else adapters)
    named = [(name, Path(folder)) for name, folder in pairs]
    problems = _check_names([name for name, _ in named])
    loaded: list[_Adapter] = []
    for name, folder in named:
        try:
            loaded.append(_read_adapter(name, folder, config))
        except InputError as e:
            problems += e.problems
    if problems:
        # The values of the sound folders are read too: one error then holds all there is to mend.
        raise InputError(problems + [p for adapter in loaded for p in _check_values(adapter)])
    bank = _describe_bank(loaded, config)
    with new_folder(dest, overwrite, [config_file, *(path for a in loaded for path in a.inputs)]) as partial:
        dtype = common_dtype({t.dtype for a in loaded for t in a.halves.values()})
        shapes = bank.weight_shapes()
        specs = {p: (np.dtype(np.float32) if p.endswith(".scale") else dtype, shapes[p]) for p in shapes}
        writer = TensorWriter(partial / "weights.safetensors", specs)
        for index, adapter in enumerate(loaded):
            problems += _write_adapter(writer, index, adapter)
            if progress is not None:
                progress(adapter.name, index + 1, len(loaded))
        if problems:
            raise InputError(problems)
        write_json(partial / "bank.json", bank.to_json())
    return bank


def _check_names(names: Sequence[str]) -> list[str]:
    problems = [] if names else ["adapters: expected at least one, found none"]
    for name in dict.fromkeys(names):
        if not name or name != name.strip() or not name.isprintable() or any(c in name for c in "/\\="):
            problems.append(f"adapter {name!r}: expected a printable name without '/', '\\' or '=', found {name!r}")
        if (count := names.count(name)) > 1:
            problems.append(f"adapter {name!r}: expected once, found {count} times")
    return problems


def _describe_bank(adapters: Sequence[_Adapter], config: LlamaConfig) -> BankConfig:
    ranks = {p: max(a.rank_of(p) for a in adapters) for p in PROJECTIONS}
    infos = tuple(
        AdapterInfo(
            name=a.name,
            rank=max(map(a.rank_of, PROJECTIONS)),
            targets=tuple(p for p in PROJECTIONS if a.rank_of(p)),
            source=a.folder.resolve().name,
            sha256=sha256(a.folder / WEIGHTS),
            peft_config=a.raw,
            dtype=dtype_name(common_dtype({t.dtype for t in a.halves.values()})),
        )
        for a in adapters
    )
    base_shapes = {p: config.projection_shape(p) for p in PROJECTIONS}
    return BankConfig(infos, {p: r for p, r in ranks.items() if r}, config.num_layers, base_shapes)


def _write_adapter(writer: TensorWriter, index: int, adapter: _Adapter) -> list[str]:
    """Fills the adapter's slices; rows beyond its rank and modules it lacks stay zero, scale 0 included."""
    problems = []
    for layer, p in adapter.modules:
        a, b = adapter.halves[layer, p, "A"], adapter.halves[layer, p, "B"]
        rank = a.shape[0]
        problems += copy_tensor(a, writer.slice(f"{p}.a", layer, index)[:rank])
        problems += copy_tensor(b, writer.slice(f"{p}.b", layer, index)[:rank].T)
        scale = adapter.settings.scale_of(f"model.layers.{layer}.{module_name(p)}")
        writer.slice(f"{p}.scale", layer, index)[0] = scale
    return problems


def _check_values(adapter: _Adapter) -> list[str]:
    return [p for t in adapter.halves.values() for p in copy_tensor(t, np.empty(t.shape, t.dtype))]


def _read_adapter(name: str, folder: Path, config: LlamaConfig) -> _Adapter:
    """One folder with its settings and headers checked. Raises InputError with all that is wrong."""
    problems: list[str] = []
    settings, raw = None, {}
    try:
        raw = read_json(folder / CONFIG)
        settings = read_settings(raw, f"{folder / CONFIG}")
    except InputError as e:
        problems += e.problems
    try:
        halves = _collect_halves(_read_tensors(folder), config, settings)
    except InputError as e:
        raise InputError([*problems, *e.problems]) from None
    if settings is not None:
        problems += _cross_check(settings, {(layer, p) for layer, p, _ in halves}, config, f"{folder / CONFIG}")
    if problems or settings is None:
        raise InputError(problems)
    return _Adapter(name, folder, raw, settings, halves)


def _read_tensors(folder: Path) -> list[SourceTensor]:
    path = folder / WEIGHTS
    if not path.exists() and (folder / "adapter_model.bin").exists():
        raise InputError(f"{folder}: expected {WEIGHTS}, found adapter_model.bin (pickle, not supported)")
    tensors = read_safetensors(path, str(path))
    if not tensors:
        raise InputError(f"{path}: expected LoRA tensors, found none")
    return tensors


def _collect_halves(
    tensors: Sequence[SourceTensor], config: LlamaConfig, settings: LoraSettings | None
) -> dict[tuple[int, str, str], SourceTensor]:
    """{(layer, projection, half): tensor}, every name, type and shape checked (ranks only where settings are sound)."""
    problems: list[str] = []
    halves: dict[tuple[int, str, str], SourceTensor] = {}
    for tensor in tensors:
        match = _KEY.fullmatch(tensor.key)
        projection = _PROJECTION_OF.get(match["name"]) if match else None
        if match is None or projection is None:
            problems.append(
                f"{tensor.where}: expected lora_A or lora_B of {', '.join(PROJECTIONS)}, found {_why(tensor)}"
            )
            continue
        slot = (int(match["layer"]), projection, match["half"])
        if slot[0] >= config.num_layers:
            problems.append(f"{tensor.where}: expected layers 0 to {config.num_layers - 1}, found layer {slot[0]}")
        elif slot in halves:
            problems.append(f"{tensor.where}: expected once, found also in {halves[slot].key}")
        else:
            halves[slot] = tensor
            problems += _check_half(tensor, slot, match["module"], config, settings)
    for layer, projection, half in halves:
        other = "B" if half == "A" else "A"
        if (layer, projection, other) not in halves:
            tensor = halves[layer, projection, half]
            wanted = tensor.key.replace(f".lora_{half}.", f".lora_{other}.")
            problems.append(f"{tensor.file}: {wanted}: expected the partner of lora_{half}, found none")
    if problems:
        raise InputError(problems)
    return halves


def _why(tensor: SourceTensor) -> str:
    reason = next((why for part, why in _UNSUPPORTED_TENSORS.items() if part in tensor.key), "an unknown tensor")
    return f"{dtype_name(tensor.dtype)} {tensor.shape} ({reason})"


def _check_half(
    tensor: SourceTensor,
    slot: tuple[int, str, str],
    module: str,
    config: LlamaConfig,
    settings: LoraSettings | None,
) -> list[str]:
    problems = []
    _, projection, half = slot
    inputs, outputs = config.projection_shape(projection)
    rank_axis = 0 if half == "A" else 1
    if settings is not None:
        rank = settings.rank_of(module)
    else:
        rank = tensor.shape[rank_axis] if len(tensor.shape) == 2 else "r"
    expected = (rank, inputs) if half == "A" else (outputs, rank)
    if tensor.shape != expected:
        problems.append(f"{tensor.where}: expected shape {expected} for this base, found {tensor.shape}")
    if dtype_name(tensor.dtype) not in FLOATS:
        problems.append(f"{tensor.where}: expected type {', '.join(FLOATS)}, found {dtype_name(tensor.dtype)}")
    return problems


def _cross_check(settings: LoraSettings, found: set[tuple[int, str]], config: LlamaConfig, file: str) -> list[str]:
    """Where what the settings select is not what the tensors hold."""
    problems = []
    for p in PROJECTIONS:
        name = module_name(p)
        selected = {n for n in range(config.num_layers) if settings.selects(f"model.layers.{n}.{name}")}
        held = {layer for layer, projection in found if projection == p}
        if missing := sorted(selected - held):
            problems.append(f"{file}: target_modules: expected tensors of {name} in layers {missing}, found none")
        if extra := sorted(held - selected):
            problems.append(f"{file}: target_modules: expected no tensors of {name} in layers {extra}, found some")
    return problems
