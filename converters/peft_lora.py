"""PEFT LoRA folders -> BANK: all adapters of one base, stacked and zero-padded to a common rank.

Format: `adapter_config.json` (peft's `LoraConfig`) and `adapter_model.safetensors`; `lora_A` [r, I], `lora_B` [O, r],
y = x W^T + scale * x A^T B^T. Tensors decide what an adapter holds; settings are cross-checked against them, and
a setting that this importer cannot honour is refused by name, whatever peft itself would make of it.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias, cast

import numpy as np

from converters.base_folder import common_dtype
from converters.folders import new_folder, sha256, write_json
from converters.hf_llama import module_name
from converters.rules import Progress, copy_tensor
from converters.tensor_files import FLOATS, SourceTensor, TensorWriter, dtype_name, read_safetensors
from meteora_jax.config import PROJECTIONS, AdapterInfo, BankConfig, InputError, LlamaConfig, read_json

Adapters: TypeAlias = Iterable[tuple[str, str | os.PathLike[str]]]  # (name, PEFT folder)

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

# Settings that say how an adapter is computed, and are read below.
_READ = (
    "peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules",
    "exclude_modules", "layers_to_transform", "layers_pattern", "init_lora_weights", "task_type",
)  # fmt: skip
# Settings that leave a trained adapter's output as it is: notes, training, initialisation (`init_lora_weights` says
# whether the base changed), and details of features that have a switch of their own.
_WITHOUT_EFFECT = (
    "auto_mapping", "base_model_name_or_path", "revision", "peft_version", "inference_mode", "lora_dropout",
    "runtime_config", "eva_config", "corda_config", "lora_ga_config", "megatron_core", "qalora_group_size",
)  # fmt: skip
# Settings that change the output, with the values that mean "off" and the reason for a refusal.
_REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "use_dora": ((False,), "DoRA's magnitudes are not supported"),
    "bias": (("none",), "trained biases of the base are not supported"),
    "lora_bias": ((False,), "biases of lora_B are not supported"),
    "fan_in_fan_out": ((False,), "transposed base weights (Conv1D) do not occur in LLaMA"),
    "modules_to_save": ((None, []), "retrained modules of the base are not supported"),
    "trainable_token_indices": ((None,), "retrained token embeddings are not supported"),
    "ensure_weight_tying": ((False,), "adapters on tied embeddings are not supported"),
    "target_parameters": ((None, []), "adapters on bare parameters are not supported"),
    "layer_replication": ((None, []), "a base with replicated layers is another base"),
    "alora_invocation_tokens": ((None,), "adapters that a token switches on are not supported"),
    "arrow_config": ((None,), "Arrow routing between adapters is not supported"),
    "kasa_config": ((None,), "KaSA's singular values are not supported"),
    "monteclora_config": ((None,), "MonteCLoRA's sampled weights are not supported"),
    "velora_config": ((None,), "VeLoRA is not supported"),
    "use_bdlora": ((None, False), "block-diagonal adapters are not supported"),
    "use_qalora": ((False,), "QA-LoRA's pooled inputs are not supported"),
    "megatron_config": ((None,), "tensor-parallel Megatron layers are not supported"),
    "loftq_config": ((None, {}), "LoftQ changes the base's weights"),
}
# Initialisations that leave the base's weights alone; pissa, olora, corda, loftq and lora_ga do not.
_PLAIN_INITS = (True, False, "gaussian", "eva", "orthogonal")

_MOST = 3e38  # near float32's largest

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
class LoraSettings:
    """What `adapter_config.json` says about the computation; a module is named like `model.layers.0.mlp.up_proj`."""

    rank: int
    alpha: float
    rslora: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    target: str | tuple[str, ...]
    exclude: str | tuple[str, ...]
    layers: tuple[int, ...] | None
    layers_pattern: tuple[str, ...]

    def rank_of(self, module: str) -> int:
        return _look_up(self.rank_pattern, module, self.rank)

    def scale_of(self, module: str) -> float:
        rank, alpha = self.rank_of(module), _look_up(self.alpha_pattern, module, self.alpha)
        return alpha / (math.sqrt(rank) if self.rslora else rank)

    def selects(self, module: str) -> bool:
        """Whether peft would put an adapter on this module (`check_target_module_exists`)."""
        if _names(self.exclude, module):
            return False
        if self.target == "all-linear":
            return True
        if not _names(self.target, module):
            return False
        return self.layers is None or self._layer_of(module) in self.layers

    def _layer_of(self, module: str) -> int | None:
        patterns = [rf"(?:^|.*?\.){p}\.([0-9]+)\." for p in self.layers_pattern] or [r".*?\.[^.]*\.([0-9]+)\."]
        found = next((m for p in patterns if (m := re.match(p, module))), None)
        return int(found[1]) if found else None


def _names(setting: str | Sequence[str], module: str) -> bool:
    """peft's matching: a string is a regex for the whole name; a list holds names or their dotted ends."""
    if isinstance(setting, str):
        return re.fullmatch(setting, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in setting)


def _look_up(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """The first pattern, in the file's order, that matches the module or a dotted end (peft's `get_pattern_key`)."""
    return next((v for p, v in patterns.items() if re.match(rf"(.*\.)?({p})$", module)), default)


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


def read_settings(raw: Any, file: str) -> LoraSettings:
    """Reads `adapter_config.json`.

    Raises:
        InputError: another method than LoRA, settings that are not supported, unknown or malformed; all of them.
    """
    if not isinstance(raw, Mapping):
        raise InputError(f"{file}: expected an object, found {type(raw).__name__}")
    return _SettingsReader(raw, file).read()


class _SettingsReader:
    """Collects every problem of an `adapter_config.json` before it raises once."""

    def __init__(self, raw: Mapping[str, Any], file: str):
        self.raw, self.file, self.problems = raw, file, []

    def refuse(self, key: str, expected: str, found: Any) -> None:
        self.problems.append(f"{self.file}: {key}: expected {expected}, found {found!r:.200}")

    def read(self) -> LoraSettings:
        if self.raw.get("peft_type") != "LORA":
            raise InputError(f"{self.file}: peft_type: expected 'LORA', found {self.raw.get('peft_type')!r}")
        self.check_features()
        target, exclude = self.modules("target_modules"), self.modules("exclude_modules")
        if self.raw.get("target_modules") is None:
            self.refuse("target_modules", "module names, a regex or 'all-linear'", None)
        settings = LoraSettings(
            rank=self.number("r", self.raw.get("r"), int),
            alpha=self.number("lora_alpha", self.raw.get("lora_alpha"), float),
            rslora=self.flag("use_rslora"),
            rank_pattern=self.patterns("rank_pattern", int),
            alpha_pattern=self.patterns("alpha_pattern", float),
            target="all-linear" if isinstance(target, str) and target.lower() == "all-linear" else target or (),
            exclude=exclude or (),
            layers=self.layers(),
            layers_pattern=self.layers_pattern(),
        )
        if isinstance(target, str) and (settings.layers is not None or settings.layers_pattern):
            self.refuse("layers_to_transform", "none beside a target_modules that is a string", settings.layers)
        if settings.layers_pattern and settings.layers is None:
            self.refuse("layers_pattern", "layers_to_transform beside it", list(settings.layers_pattern))
        if self.problems:
            raise InputError(self.problems)
        return settings

    def check_features(self) -> None:
        for key, value in self.raw.items():
            if key in _REFUSED:
                off, reason = _REFUSED[key]
                if not _is_one_of(value, off):
                    self.refuse(key, f"{off[0]!r} ({reason})", value)
            elif key not in _READ and key not in _WITHOUT_EFFECT and value not in (None, False, "", [], {}):
                self.refuse(key, "no such setting (unknown to this importer)", value)
        init = self.raw.get("init_lora_weights", True)
        if init is not None and not _is_one_of(init, _PLAIN_INITS):
            self.refuse("init_lora_weights", "an initialisation that leaves the base as it is", init)
        task = self.raw.get("task_type")
        if task not in (None, "CAUSAL_LM"):
            self.refuse("task_type", "'CAUSAL_LM'", task)

    def number(self, key: str, value: Any, kind: type) -> Any:
        """A positive rank (int) or a finite alpha (float)."""
        sound = isinstance(value, int if kind is int else (int, float)) and not isinstance(value, bool)
        if not sound or not abs(value) <= _MOST or (kind is int and value < 1):
            self.refuse(key, "a rank of at least 1" if kind is int else "a number that float32 can hold", value)
            return kind(1)
        return value

    def flag(self, key: str) -> bool:
        value = self.raw.get(key, False)
        if not isinstance(value, bool):
            self.refuse(key, "true or false", value)
        return bool(value)

    def patterns(self, key: str, kind: type) -> dict[str, Any]:
        value = self.raw.get(key) or {}
        if not isinstance(value, Mapping):
            self.refuse(key, "an object of module patterns and numbers", value)
            return {}
        within = r"(.*\.)?({})$"  # as peft uses it
        return {p: self.number(f"{key}[{p!r}]", v, kind) for p, v in value.items() if self.is_regex(key, p, within)}

    def modules(self, key: str) -> str | tuple[str, ...] | None:
        value = self.raw.get(key)
        if isinstance(value, str):
            return value if self.is_regex(key, value) else None
        if value is None or (isinstance(value, list) and all(isinstance(v, str) for v in value)):
            return None if value is None else tuple(value)
        self.refuse(key, "a list of module names or a regex", value)
        return None

    def layers(self) -> tuple[int, ...] | None:
        value = self.raw.get("layers_to_transform")
        values = [value] if isinstance(value, int) else value
        if values is None or values == []:
            return None
        if not isinstance(values, list) or any(isinstance(v, bool) or not isinstance(v, int) for v in values):
            self.refuse("layers_to_transform", "layer indices", value)
            return None
        return tuple(values)

    def layers_pattern(self) -> tuple[str, ...]:
        value = self.raw.get("layers_pattern") or []
        values = [value] if isinstance(value, str) else value
        if not isinstance(values, list) or not all(isinstance(v, str) for v in values):
            self.refuse("layers_pattern", "names of layer lists", value)
            return ()
        return tuple(v for v in values if self.is_regex("layers_pattern", v, r"(?:^|.*?\.){}\."))

    def is_regex(self, key: str, pattern: str, within: str = "{}") -> bool:
        try:
            re.compile(within.replace("{}", pattern))
        except (re.error, RecursionError, OverflowError) as e:
            self.refuse(key, f"a regex ({e})", pattern)
            return False
        return True


def _is_one_of(value: Any, options: Iterable[Any]) -> bool:
    """Membership that keeps 0 and 1 apart from False and True."""
    return any(type(value) is type(option) and value == option for option in options)
