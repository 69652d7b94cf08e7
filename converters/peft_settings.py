"""`adapter_config.json`: what peft's `LoraConfig` says about the computation, or a refusal by name.

Every setting is read, known to leave a trained adapter's output as it is, or refused where it is not "off"; an
unknown one is refused unless its value is one that means "off" everywhere (null, false, empty).
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from meteora_jax.config import ENDS, InputError

# Settings that say how an adapter is computed, and are read below.
_READ = (
    "peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules",
    "exclude_modules", "layers_to_transform", "layers_pattern", "init_lora_weights", "task_type",
    "use_dora", "lora_bias", "fan_in_fan_out", "modules_to_save", "trainable_token_indices", "alora_invocation_tokens",
)  # fmt: skip
# Settings that leave a trained adapter's output as it is: notes, training, initialisation (`init_lora_weights` says
# whether the base changed), and details of features that have a switch of their own.
_WITHOUT_EFFECT = (
    "auto_mapping", "base_model_name_or_path", "revision", "peft_version", "inference_mode", "lora_dropout",
    "runtime_config", "eva_config", "corda_config", "lora_ga_config", "megatron_core", "qalora_group_size",
    "ensure_weight_tying",  # in training; the tensors say what came of it
)  # fmt: skip
# Settings that change the output, with the values that mean "off" (null does everywhere), and the reason for a refusal.
_REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "bias": (("none",), "trained biases of the base are not supported"),
    "target_parameters": ((None, []), "adapters on bare parameters are not supported"),
    "layer_replication": ((None, []), "a base with replicated layers is another base"),
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
    dora: bool
    lora_bias: bool
    saved: tuple[str, ...]  # model.embed_tokens, lm_head: modules that were trained whole, apart from the base's
    tokens: Mapping[str, tuple[int, ...]]  # embed, head: ids of the rows that were retrained there
    invocation: tuple[int, ...]  # token ids from which on the adapter acts; empty: everywhere

    def rank_of(self, module: str) -> int:
        return _look_up(self.rank_pattern, module, self.rank)

    def scale_of(self, module: str) -> float:
        rank, alpha = self.rank_of(module), _look_up(self.alpha_pattern, module, self.alpha)
        return alpha / (math.sqrt(rank) if self.rslora else rank)

    def selects(self, module: str) -> bool:
        """Whether peft would put an adapter on this module (`check_target_module_exists`)."""
        if _names(self.exclude, module) or module in self.saved:
            return False
        if self.target == "all-linear":
            return True
        if not _names(self.target, module):
            return False
        # the layers do not choose among modules that are listed by their whole names, nor among a pattern's
        whole = isinstance(self.target, str) or module in self.target
        return whole or self.layers is None or self._layer_of(module) in self.layers

    def adapts(self, matrix: str) -> bool:
        """Whether peft would put LoRA on the embedding or the head; all-linear leaves both out."""
        return self.target != "all-linear" and self.selects(ENDS[matrix])

    def _layer_of(self, module: str) -> int | None:
        patterns = [rf"(?:^|.*?\.){p}\.([0-9]+)\." for p in self.layers_pattern] or [r".*?\.[^.]*\.([0-9]+)\."]
        found = next((m for p in patterns if (m := re.match(p, module))), None)
        return int(found[1]) if found else None


def _names(setting: str | Sequence[str], module: str) -> bool:
    """peft's matching: a string is a regex for the whole name; a list holds names or their dotted suffixes."""
    if isinstance(setting, str):
        return re.fullmatch(setting, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in setting)


def _look_up(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """The first pattern, in the file's order, that matches the module or a dotted suffix (peft's `get_pattern_key`)."""
    return next((v for p, v in patterns.items() if re.match(rf"(.*\.)?({p})$", module)), default)


def read_settings(raw: Any, file: str) -> LoraSettings:
    """Reads `adapter_config.json`.

    Raises:
        InputError: another method than LoRA, settings that are not supported, unknown or malformed; all of them.
    """
    if not isinstance(raw, Mapping):
        raise InputError(f"{file}: expected an object, found {type(raw).__name__}")
    return _SettingsReader(raw, file).read()


def is_lora(raw: Mapping[str, Any]) -> bool:
    """Whether the method is LoRA, by what the file says."""
    return raw.get("peft_type") == "LORA"


class _SettingsReader:
    """Collects every problem of an `adapter_config.json` before it raises once."""

    def __init__(self, raw: Mapping[str, Any], file: str):
        self.raw, self.file, self.problems = raw, file, []

    def refuse(self, key: str, expected: str, found: object) -> None:
        self.problems.append(f"{self.file}: {key}: expected {expected}, found {found!r:.200}")

    def read(self) -> LoraSettings:
        if not is_lora(self.raw):
            raise InputError(f"{self.file}: peft_type: expected 'LORA', found {self.raw.get('peft_type')!r:.200}")
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
            dora=self.flag("use_dora"),
            lora_bias=self.flag("lora_bias"),
            saved=self.saved(),
            tokens=self.tokens(),
            invocation=self.invocation(),
        )
        self.flag("fan_in_fan_out")  # without effect: peft itself turns it off for every nn.Linear
        for matrix, module in ENDS.items():
            if settings.adapts(matrix) and (settings.dora or settings.lora_bias):
                switch = "use_dora" if settings.dora else "lora_bias"
                self.refuse(switch, f"false with an adapter on {module} (not supported there)", True)
            if settings.adapts(matrix) and matrix in settings.tokens:
                self.refuse("trainable_token_indices", f"none of {module} with a LoRA on it", settings.tokens[matrix])
        if settings.invocation:
            changed = [
                module for matrix, module in ENDS.items() if settings.adapts(matrix) or matrix in settings.tokens
            ]
            if changed or settings.dora:
                others = " and ".join([*(["use_dora"] if settings.dora else []), *changed])
                self.refuse("alora_invocation_tokens", f"none with {others}", list(settings.invocation))
        if settings.dora and settings.lora_bias:
            self.refuse("lora_bias", "false with use_dora, as in peft", True)
        if isinstance(target, str) and (settings.layers is not None or settings.layers_pattern):
            self.refuse("layers_to_transform", "none with a target_modules that is a string", settings.layers)
        if settings.layers_pattern and settings.layers is None:
            self.refuse("layers_pattern", "layers_to_transform with it", list(settings.layers_pattern))
        if self.problems:
            raise InputError(self.problems)
        return settings

    def check_features(self) -> None:
        for key, value in self.raw.items():
            if key in _REFUSED:
                off, reason = _REFUSED[key]
                if value is not None and not _is_one_of(value, off):
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
        value = self.raw.get(key)
        if not isinstance(value, bool | None):
            self.refuse(key, "true or false", value)
        return bool(value)

    def patterns(self, key: str, kind: type) -> dict[str, Any]:
        value = self.raw.get(key)
        value = {} if value is None else value
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

    def saved(self) -> tuple[str, ...]:
        value = self.raw.get("modules_to_save") or []
        names = [value] if isinstance(value, str) else value
        matrices = tuple(ENDS.values())
        if not isinstance(names, list) or not all(isinstance(n, str) and n and _is_suffix(n, matrices) for n in names):
            self.refuse("modules_to_save", "embed_tokens or lm_head", value)
            return ()
        return tuple(module for module in matrices if any(_is_suffix(name, (module,)) for name in names))

    def tokens(self) -> dict[str, tuple[int, ...]]:
        """Of a list (the embedding's) or an object by module."""
        value = self.raw.get("trainable_token_indices")
        by_module = {} if value is None else value if isinstance(value, Mapping) else {"embed_tokens": value}
        places = {name: matrix for matrix, module in ENDS.items() for name in (module, module.rpartition(".")[2])}
        tokens: dict[str, tuple[int, ...]] = {}
        for module, ids in by_module.items():
            sound = isinstance(ids, list) and all(isinstance(i, int) and not isinstance(i, bool) for i in ids)
            if not sound or len(set(ids)) != len(ids) or not ids or min(ids) < 0:
                self.refuse("trainable_token_indices", "different token ids", ids)
            elif module not in places or places[module] in tokens:
                self.refuse("trainable_token_indices", "ids by embed_tokens, lm_head, each once", module)
            else:
                tokens[places[module]] = tuple(ids)
        return tokens

    def invocation(self) -> tuple[int, ...]:
        value = self.raw.get("alora_invocation_tokens") or []
        if not isinstance(value, list) or any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in value):
            self.refuse("alora_invocation_tokens", "token ids", value)
            return ()
        return tuple(value)

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


def _is_suffix(name: str, modules: Iterable[str]) -> bool:
    """peft's matching of `modules_to_save`."""
    return any(module.endswith(name) for module in modules)


def _is_one_of(value: object, options: Iterable[object]) -> bool:
    """Membership that keeps 0 and 1 apart from False and True."""
    return any(type(value) is type(option) and value == option for option in options)
