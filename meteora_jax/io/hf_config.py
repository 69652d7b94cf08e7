"""Hugging Face's `config.json` of a base, read completely and written."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from meteora_jax.config import InputError, LlamaConfig, RopeScaling
from meteora_jax.quantization import WEIGHT_FORMATS, Quantization

MODEL_TYPES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
_REQUIRED = object()


def from_hf(raw: Mapping[str, Any], source: str = "config.json") -> LlamaConfig:
    """Reads a Hugging Face `config.json` of a model_type in MODEL_TYPES (transformers 4 and 5 spellings).

    Raises:
        InputError: keys that are missing, of the wrong type, or ask for what is not supported; all at once.
    """
    return _Reader(raw, source).read()


def to_hf(config: LlamaConfig) -> dict[str, Any]:
    """A base's configuration as a Hugging Face `config.json` (transformers 4 spelling, which 5 reads too)."""
    scaling = None
    if config.rope_scaling is not None:
        scaling = {k: v for k, v in dataclasses.asdict(config.rope_scaling).items() if v is not None}
    eos = list(config.eos_token_ids)
    return {
        "architectures": [MODEL_TYPES[config.model_type]],
        "model_type": config.model_type,
        **_window(config),
        "hidden_act": "silu",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling,
        "max_position_embeddings": config.max_position_embeddings,
        "tie_word_embeddings": config.tie_word_embeddings,
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": eos[0] if len(eos) == 1 else (eos or None),
    }


def _window(config: LlamaConfig) -> dict[str, Any]:
    if config.model_type == "llama":
        return {}
    if config.model_type == "mistral":
        return {"sliding_window": config.sliding_window}
    window, layers = config.sliding_window, config.num_layers if config.sliding_window is None else 0
    return {"use_sliding_window": window is not None, "sliding_window": window, "max_window_layers": layers}


class _Reader:
    """Collects every problem of a `config.json` before it raises once."""

    def __init__(self, raw: Mapping[str, Any], source: str):
        self.raw, self.source, self.problems = raw, source, []

    def get(
        self, key: str, kind: type, default: Any = _REQUIRED, raw: Mapping[str, Any] | None = None, low=None
    ) -> Any:
        raw = self.raw if raw is None else raw
        value = raw.get(key)
        if value is None:
            if default is _REQUIRED:
                self.problems.append(f"{self.source}: {key}: expected {kind.__name__}, found nothing")
                return None
            return default
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            self.problems.append(f"{self.source}: {key}: expected {kind.__name__}, found {value!r}")
            return None
        if low is not None and not (low <= value < math.inf):
            self.problems.append(f"{self.source}: {key}: expected a number of at least {low}, found {value!r}")
            return None
        return value

    def rope(self, max_positions: int | None) -> tuple[float | None, RopeScaling | None]:
        """Theta and scaling, from whichever of `rope_parameters` (transformers 5), `rope_scaling` and the top level has
        them; two that say different things are refused. 10000 is the format's documented default of theta."""
        said = self.rope_settings()
        # transformers' own names before it settled on one
        kind = next((said[key] for key in ("rope_type", "type") if key in said), "default")
        theta = self.get("rope_theta", float, default=10000.0, raw=said, low=1e-6)
        if said.get("partial_rotary_factor", 1) != 1:
            found = said["partial_rotary_factor"]
            self.problems.append(f"{self.source}: partial_rotary_factor: expected 1 (whole heads), found {found!r}")
        if kind == "default":
            return theta, None
        if kind not in ("linear", "dynamic", "llama3"):
            self.problems.append(
                f"{self.source}: rope_scaling.rope_type: expected default, linear, dynamic or llama3, found {kind!r}"
            )
            return theta, None
        before = len(self.problems)
        factor = self.get("factor", float, raw=said, low=1.0)
        low_freq = high_freq = None
        if kind == "llama3":
            low_freq = self.get("low_freq_factor", float, raw=said, low=1e-6)
            high_freq = self.get("high_freq_factor", float, raw=said, low=1e-6)
        original = self.get("original_max_position_embeddings", int, default=max_positions, raw=said, low=1)
        if kind == "dynamic" and original and max_positions and original != max_positions:
            self.problems.append(  # transformers grows theta from max_position_embeddings on, whatever the other says
                f"{self.source}: original_max_position_embeddings: expected max_position_embeddings, {max_positions}, "
                f"beside dynamic scaling, found {original}"
            )
        if len(self.problems) > before:
            return theta, None
        return theta, RopeScaling(kind, factor, original, low_freq, high_freq)

    def rope_settings(self) -> dict[str, Any]:
        """Every rotary setting that is not null, by its own name, from all the places that may hold one."""
        top = ("rope_theta", "original_max_position_embeddings", "partial_rotary_factor")
        places: dict[str, Mapping[str, Any]] = {"": {key: self.raw.get(key) for key in top}}
        for name in ("rope_parameters", "rope_scaling"):
            value = self.raw.get(name)
            if not value:
                continue
            if not isinstance(value, Mapping):
                self.problems.append(f"{self.source}: {name}: expected an object, found {value!r:.200}")
                continue
            # a dict of dicts has one for each kind of layer; the family's layers are all of one kind
            places |= {f"{name}.{key}.": inner for key, inner in value.items() if isinstance(inner, Mapping)}
            places[f"{name}."] = {key: inner for key, inner in value.items() if not isinstance(inner, Mapping)}
        said: dict[str, tuple[str, Any]] = {}
        for place, settings in places.items():
            for key, value in settings.items():
                name = "rope_type" if key == "type" else key
                first, known = said.setdefault(name, (f"{place}{key}", value)) if value is not None else (key, None)
                if value is not None and known != value:
                    self.problems.append(
                        f"{self.source}: {place}{key}: expected {known!r} as in {first}, found {value!r:.200}"
                    )
        return {name: value for name, (_, value) in said.items()}

    def window(self, model_type: str) -> int | None:
        """The sliding window that all layers share; 4096 is the format's documented default, and null is none."""
        kinds, layers = self.raw.get("layer_types"), self.raw.get("num_hidden_layers")
        if kinds is not None and kinds not in [[kind] * len(kinds) for kind in ("full_attention", "sliding_attention")]:
            wanted = "full_attention or sliding_attention, the same for every layer"
            self.problems.append(f"{self.source}: layer_types: expected {wanted}, found {kinds!r:.200}")
            return None
        if kinds is not None and isinstance(layers, int) and len(kinds) != layers:
            self.problems.append(f"{self.source}: layer_types: expected {layers} (the layers), found {len(kinds)}")
            return None
        slides = model_type == "mistral" or self.get("use_sliding_window", bool, default=False)
        slides = slides and self.raw.get("sliding_window", 4096) is not None
        if kinds and kinds[0] == "sliding_attention" and not slides:
            found = f"sliding_window {self.raw.get('sliding_window')!r:.200}"
            found += "" if model_type == "mistral" else f", use_sliding_window {self.raw.get('use_sliding_window')!r}"
            self.problems.append(
                f"{self.source}: layer_types: expected a window beside sliding_attention, found {found}"
            )
        if not slides:
            return None
        if model_type == "mistral":
            full = bool(kinds) and kinds[0] == "full_attention"
            return None if full else self.get("sliding_window", int, default=4096, low=1)
        first = self.get("max_window_layers", int, default=28)
        if kinds is None and first and isinstance(layers, int) and 0 < first < layers:
            self.problems.append(
                f"{self.source}: max_window_layers: expected 0 or at least {layers} (a window in every layer or in "
                f"none), found {first}"
            )
        full = kinds[0] == "full_attention" if kinds else bool(first)
        return None if full else self.get("sliding_window", int, default=4096, low=1)

    def quantization(self) -> Quantization | None:
        """How a BASE folder stores its matrices: "quantization" of its record, which no other config.json has."""
        meteora = self.raw.get("meteora")
        said = meteora.get("quantization") if isinstance(meteora, Mapping) else None
        found = None if said is None else Quantization.from_json(said)
        if said is not None and found is None:
            known = f"weights ({', '.join(WEIGHT_FORMATS)}), group_size, head and embedding"
            self.problems.append(f"{self.source}: meteora.quantization: expected {known}, found {said!r:.200}")
        return found

    def read(self) -> LlamaConfig:
        if not isinstance(self.raw, Mapping):
            raise InputError(f"{self.source}: expected an object, found {type(self.raw).__name__}")
        model_type = self.raw.get("model_type")
        if not isinstance(model_type, str) or model_type not in MODEL_TYPES:
            known = ", ".join(MODEL_TYPES)
            raise InputError(f"{self.source}: model_type: expected {known}, found {model_type!r:.200}")
        llama, biased = model_type == "llama", model_type in ("llama", "qwen3")  # Mistral's have none, whatever it says
        if self.raw.get("quantization_config") is not None:
            self.problems.append(f"{self.source}: quantization_config: expected none, found a quantized checkpoint")
        if not self.raw.get("is_causal", True):  # transformers lets every token see all others then
            self.problems.append(f"{self.source}: is_causal: expected true, found {self.raw['is_causal']!r:.200}")
        act = self.raw.get("hidden_act", "silu")
        if act != "silu":
            self.problems.append(f"{self.source}: hidden_act: expected 'silu', found {act!r}")
        heads = self.get("num_attention_heads", int, low=1)
        hidden = self.get("hidden_size", int, low=1)
        own = llama or "num_key_value_heads" in self.raw  # null means as many as there are heads
        kv_heads = self.get("num_key_value_heads", int, default=heads if own else _REQUIRED, low=1)
        if heads and kv_heads and heads % kv_heads:
            self.problems.append(
                f"{self.source}: num_key_value_heads: expected a divisor of {heads} heads, found {kv_heads}"
            )
        # 128 is Qwen3's documented default; the others divide the hidden size.
        default = 128 if model_type == "qwen3" else hidden // heads if heads and hidden else None
        head_dim = self.get("head_dim", int, default=default, low=1)
        if head_dim and head_dim % 2:
            self.problems.append(f"{self.source}: head_dim: expected an even number, found {head_dim}")
        max_positions = self.get("max_position_embeddings", int, default=2048 if llama else _REQUIRED, low=1)
        theta, scaling = self.rope(max_positions)
        documented = (1, 2) if model_type in ("llama", "mistral") else (None, None)  # where the keys are absent
        bos = self.raw.get("bos_token_id", documented[0])
        eos = self.raw.get("eos_token_id", documented[1])
        eos = () if eos is None else tuple(eos) if isinstance(eos, list) else (eos,)
        bos = bos[0] if isinstance(bos, list) and bos else bos
        for key, ids in (("bos_token_id", () if bos is None else (bos,)), ("eos_token_id", eos)):
            if any(not isinstance(i, int) for i in ids):
                self.problems.append(f"{self.source}: {key}: expected token ids, found {self.raw.get(key)!r}")
        fields = dict(
            vocab_size=self.get("vocab_size", int, low=1),
            hidden_size=hidden,
            intermediate_size=self.get("intermediate_size", int, low=1),
            num_layers=self.get("num_hidden_layers", int, low=1),
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            rms_norm_eps=self.get("rms_norm_eps", float, default=1e-6, low=0.0),
            rope_theta=theta,
            rope_scaling=scaling,
            max_position_embeddings=max_positions,
            tie_word_embeddings=self.get("tie_word_embeddings", bool, default=False),
            attention_bias=model_type == "qwen2" or (biased and self.get("attention_bias", bool, default=False)),
            mlp_bias=self.get("mlp_bias", bool, default=False) if llama else False,
            bos_token_id=bos,
            eos_token_ids=eos,
            model_type=model_type,
            sliding_window=None if llama else self.window(model_type),
            quantization=self.quantization(),
        )
        if self.problems:
            raise InputError(self.problems)
        return LlamaConfig(**fields)
