"""The configurations that files own: the base (`LlamaConfig`) and the bank. No value that a checkpoint owns
has a default, but where Hugging Face's format itself documents one for an absent key (`LlamaConfig.from_hf`).
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal


class InputError(Exception):
    """Input that is refused: one line naming file, key, expected and found. The CLI exits with 1.

    `problems` holds every single failure; the message joins them.
    """

    def __init__(self, problems: str | Iterable[str]):
        self.problems = (problems,) if isinstance(problems, str) else tuple(problems)
        shown = [" ".join(p.split()) for p in self.problems[:12]]
        rest = len(self.problems) - len(shown)
        super().__init__("; ".join(shown) + (f"; and {rest} more problems" if rest else ""))


class Preempted(Exception):
    """SIGTERM came: the run saved its state after `step` in `folder` and ended. The CLI exits with `status`."""

    status = 75  # EX_TEMPFAIL of sysexits.h

    def __init__(self, step: int, folder: Path):
        self.step = step
        super().__init__(f"preempted: step {step} is saved in {folder}; the same command goes on from there")


# Projections that read one input form a group: one matmul serves it. The order inside a group is the
# order of the columns of its kernel.
GROUPS: dict[str, tuple[str, ...]] = {
    "qkv": ("q_proj", "k_proj", "v_proj"),
    "o": ("o_proj",),
    "gate_up": ("gate_proj", "up_proj"),
    "down": ("down_proj",),
}
PROJECTIONS: tuple[str, ...] = tuple(p for group in GROUPS.values() for p in group)
# Where token ids become vectors and vectors logits; adapters may act there too.
ENDS: dict[str, str] = {"embed": "model.embed_tokens", "head": "lm_head"}


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Rotary scaling as `config.json` writes it (`rope_scaling`, or transformers 5 `rope_parameters`).

    linear: positions divided by `factor`. dynamic (NTK): theta grows once the sequence is longer than
    `original_max_position_embeddings`. llama3: low frequencies divided by `factor`, high ones kept,
    a smooth blend between (Llama 3.1 model card).
    """

    rope_type: Literal["linear", "dynamic", "llama3"]
    factor: float
    original_max_position_embeddings: int
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Shape and constants of one LLaMA-family base."""

    vocab_size: int  # V
    hidden_size: int  # D
    intermediate_size: int  # F
    num_layers: int  # L
    num_heads: int  # N
    num_kv_heads: int  # K
    head_dim: int  # H
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    max_position_embeddings: int
    tie_word_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    # What the near family does otherwise; the defaults are LLaMA's.
    model_type: Literal["llama", "mistral", "qwen2", "qwen3"] = "llama"
    sliding_window: int | None = None  # keys a token sees, itself included; None: all

    @property
    def qk_norm(self) -> bool:
        """Whether each head of q and k is normalised before it is rotated (Qwen3)."""
        return self.model_type == "qwen3"

    def projection_shape(self, projection: str) -> tuple[int, int]:
        """(I, O) of a projection's kernel: `y = x @ W`, x [.., I]."""
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        d, f = self.hidden_size, self.intermediate_size
        return {
            "q_proj": (d, q), "k_proj": (d, kv), "v_proj": (d, kv), "o_proj": (q, d),
            "gate_proj": (d, f), "up_proj": (d, f), "down_proj": (f, d),
        }[projection]  # fmt: skip

    def projection_bias(self, projection: str) -> bool:
        """Whether the projection has a bias (attention_bias covers q k v o, as in transformers; q k v in Qwen2)."""
        attention = projection in ("q_proj", "k_proj", "v_proj", "o_proj")
        if self.model_type == "qwen2" and projection == "o_proj":
            return False
        return self.attention_bias if attention else self.mlp_bias

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """{path: shape} of every tensor of `BASE/weights.safetensors`; layers are stacked, L first."""
        n, d, v = self.num_layers, self.hidden_size, self.vocab_size
        shapes: dict[str, tuple[int, ...]] = {"embed.embedding": (v, d)}
        for p in PROJECTIONS:
            shapes[f"layers.{p}.kernel"] = (n, *self.projection_shape(p))
            if self.projection_bias(p):
                shapes[f"layers.{p}.bias"] = (n, self.projection_shape(p)[1])
        if self.qk_norm:
            shapes |= {f"layers.{x}_norm.scale": (n, self.head_dim) for x in "qk"}
        shapes["layers.attention_norm.scale"] = (n, d)
        shapes["layers.mlp_norm.scale"] = (n, d)
        shapes["norm.scale"] = (d,)
        if not self.tie_word_embeddings:
            shapes["lm_head.kernel"] = (d, v)
        return shapes

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any], source: str = "config.json") -> LlamaConfig:
        """Reads a Hugging Face `config.json` of a model_type in MODEL_TYPES (transformers 4 and 5 spellings).

        Raises:
            InputError: keys that are missing, of the wrong type, or ask for what is not supported; all at once.
        """
        return _HfReader(raw, source).read()

    def to_hf(self) -> dict[str, Any]:
        """The same as a Hugging Face `config.json` (transformers 4 spelling, which 5 reads too)."""
        scaling = None
        if self.rope_scaling is not None:
            scaling = {k: v for k, v in dataclasses.asdict(self.rope_scaling).items() if v is not None}
        eos = list(self.eos_token_ids)
        return {
            "architectures": [MODEL_TYPES[self.model_type]],
            "model_type": self.model_type,
            **self._window_to_hf(),
            "hidden_act": "silu",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope_theta,
            "rope_scaling": scaling,
            "max_position_embeddings": self.max_position_embeddings,
            "tie_word_embeddings": self.tie_word_embeddings,
            "attention_bias": self.attention_bias,
            "mlp_bias": self.mlp_bias,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": eos[0] if len(eos) == 1 else (eos or None),
        }

    def _window_to_hf(self) -> dict[str, Any]:
        if self.model_type == "llama":
            return {}
        if self.model_type == "mistral":
            return {"sliding_window": self.sliding_window}
        window, layers = self.sliding_window, self.num_layers if self.sliding_window is None else 0
        return {"use_sliding_window": window is not None, "sliding_window": window, "max_window_layers": layers}


MODEL_TYPES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
_REQUIRED = object()


class _HfReader:
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
        """The sliding window that all layers share; 4096 is the format's documented default."""
        if model_type == "mistral":
            present = self.raw.get("sliding_window", 4096) is not None
            return self.get("sliding_window", int, default=4096, low=1) if present else None
        kinds = self.raw.get("layer_types")
        if kinds is not None and (not isinstance(kinds, list) or len(set(map(str, kinds))) > 1):
            self.problems.append(f"{self.source}: layer_types: expected the same for every layer, found {kinds!r:.200}")
        if not self.get("use_sliding_window", bool, default=False):
            return None
        first, layers = self.get("max_window_layers", int, default=28), self.get("num_hidden_layers", int)
        if kinds is None and first and layers and 0 < first < layers:
            self.problems.append(
                f"{self.source}: max_window_layers: expected 0 or at least {layers} (a window in every layer or in "
                f"none), found {first}"
            )
        full = kinds[0] == "full_attention" if isinstance(kinds, list) and kinds else bool(first)
        return None if full else self.get("sliding_window", int, default=4096, low=1)

    def read(self) -> LlamaConfig:
        if not isinstance(self.raw, Mapping):
            raise InputError(f"{self.source}: expected an object, found {type(self.raw).__name__}")
        model_type = self.raw.get("model_type")
        if not isinstance(model_type, str) or model_type not in MODEL_TYPES:
            known = ", ".join(MODEL_TYPES)
            raise InputError(f"{self.source}: model_type: expected {known}, found {model_type!r:.200}")
        llama = model_type == "llama"
        if self.raw.get("quantization_config") is not None:
            self.problems.append(f"{self.source}: quantization_config: expected none, found a quantized checkpoint")
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
        bos = self.raw.get("bos_token_id")
        eos = self.raw.get("eos_token_id")
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
            attention_bias=model_type == "qwen2" or self.get("attention_bias", bool, default=False),
            mlp_bias=self.get("mlp_bias", bool, default=False) if llama else False,
            bos_token_id=bos,
            eos_token_ids=eos,
            model_type=model_type,
            sliding_window=None if llama else self.window(model_type),
        )
        if self.problems:
            raise InputError(self.problems)
        return LlamaConfig(**fields)


@dataclasses.dataclass(frozen=True)
class AdapterInfo:
    """One adapter of a bank, as `bank.json` lists it."""

    name: str
    rank: int  # largest rank over its projections; the stacked tensors are zero-padded to the bank's
    targets: tuple[str, ...]  # projections it touches, in PROJECTIONS order, then embed_tokens, lm_head
    source: str  # the PEFT folder's own name
    sha256: str  # of the adapter's weight file
    peft_config: dict[str, Any]  # adapter_config.json as found: what an export needs; {} where there was none
    dtype: str | None = None  # of its own tensors (F32, F16, BF16); None: the bank's, which may be wider
    invocation: tuple[int, ...] = ()  # token ids from whose last occurrence in a prompt on it acts; empty: everywhere


@dataclasses.dataclass(frozen=True)
class EndConfig:
    """What a bank's adapters change at one of `ENDS`."""

    rank: int  # R of the stacked LoRA tensors; 0: none
    tokens: tuple[tuple[int, ...], ...]  # for each adapter the ids of the rows that it retrained

    @property
    def most(self) -> int:
        """n of the stacked rows."""
        return max(map(len, self.tokens), default=0)


@dataclasses.dataclass(frozen=True)
class BankConfig:
    """`BANK/bank.json`: the adapters in stacking order and the base they fit."""

    adapters: tuple[AdapterInfo, ...]
    ranks: dict[str, int]  # projection -> R of its stacked tensors; a projection no adapter touches is absent
    num_layers: int
    base_shapes: dict[str, tuple[int, int]]  # projection -> (I, O) of the base it was imported for
    dora: tuple[str, ...] = ()  # projections at which some adapter has DoRA magnitudes
    lora_bias: tuple[str, ...] = ()  # projections at which some adapter's B has a bias
    ends: dict[str, EndConfig] = dataclasses.field(default_factory=dict)  # of those that some adapter changes
    vocab_shape: tuple[int, int] | None = None  # (V, D) of the base; None where no adapter changes an end
    base: dict[str, Any] | None = None  # what the base's own record said (see origin.py); None: there was none

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(a.name for a in self.adapters)

    @property
    def at_ends(self) -> tuple[str, ...]:
        """The adapters that change an end."""
        return tuple(a.name for a in self.adapters if set(a.targets) & {m.rpartition(".")[2] for m in ENDS.values()})

    @property
    def invoked(self) -> tuple[str, ...]:
        """The adapters that act from an invocation on."""
        return tuple(a.name for a in self.adapters if a.invocation)

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """{path: shape} of `BANK/weights.safetensors`.

        `p.a` [L, A, R, I], `p.b` [L, A, R, O], `p.scale` [L, A]; where an adapter has them `p.bias` [L, A, O],
        `p.magnitude` [L, A, O] (DoRA's own) and `p.dora` [L, A, O]: magnitude / norm of the adapted column - 1.
        At an end `embed.a` [A, R, V], `embed.b` [A, R, D], `head.a` [A, R, D], `head.b` [A, R, V], `scale` [A], and
        `rows` [A, n, D].
        """
        shapes: dict[str, tuple[int, ...]] = {}
        n, a = self.num_layers, len(self.adapters)
        for p, r in self.ranks.items():
            i, o = self.base_shapes[p]
            shapes |= {f"{p}.a": (n, a, r, i), f"{p}.b": (n, a, r, o), f"{p}.scale": (n, a)}
            shapes |= {f"{p}.{part}": (n, a, o) for part in ("magnitude", "dora") if p in self.dora}
            shapes |= {f"{p}.bias": (n, a, o)} if p in self.lora_bias else {}
        for end, held in self.ends.items():
            assert self.vocab_shape is not None, "checked by from_json"
            i, o = self.vocab_shape if end == "embed" else self.vocab_shape[::-1]
            if held.rank:
                shapes |= {f"{end}.a": (a, held.rank, i), f"{end}.b": (a, held.rank, o), f"{end}.scale": (a,)}
            if held.most:
                shapes[f"{end}.rows"] = (a, held.most, self.vocab_shape[1])
        return shapes

    def to_json(self) -> dict[str, Any]:
        return {"format": "meteora-bank-1", **dataclasses.asdict(self)}

    @classmethod
    def from_json(cls, raw: Any, source: str) -> BankConfig:
        try:
            if raw["format"] != "meteora-bank-1":
                raise InputError(f"{source}: format: expected 'meteora-bank-1', found {raw['format']!r}")

            # older banks have none
            def invoked(a):
                return tuple(map(int, a.get("invocation", ())))

            own = ({**a, "targets": tuple(a["targets"]), "invocation": invoked(a)} for a in raw["adapters"])
            adapters = tuple(AdapterInfo(**a) for a in own)
            shapes = {p: (int(i), int(o)) for p, (i, o) in raw["base_shapes"].items()}
            ranks = {p: int(r) for p, r in raw["ranks"].items()}
            dora, bias = tuple(raw.get("dora", ())), tuple(raw.get("lora_bias", ()))
            ends = {
                end: EndConfig(int(held["rank"]), tuple(tuple(map(int, ids)) for ids in held["tokens"]))
                for end, held in raw.get("ends", {}).items()
            }
            vocab = None if raw.get("vocab_shape") is None else (int(raw["vocab_shape"][0]), int(raw["vocab_shape"][1]))
            uneven = any(len(held.tokens) != len(adapters) for held in ends.values())
            if uneven or not ends.keys() <= ENDS.keys() or bool(ends) != (vocab is not None):
                raise ValueError("ends, their tokens and vocab_shape")
            base = None if raw.get("base") is None else dict(raw["base"])
            return cls(adapters, ranks, int(raw["num_layers"]), shapes, dora, bias, ends, vocab, base)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as e:
            raise InputError(f"{source}: expected a bank's description, found a malformed one ({e!r})") from e


def read_lines(path: str | os.PathLike[str]) -> list[tuple[str, bytes]]:
    """(FILE:NUMBER, line) of each line of a JSON lines file, whatever ends it; blank lines may stand at the end.

    Raises:
        InputError: the file cannot be read, or a line before the last is blank.
    """
    try:
        # by line ends alone: inside a JSON text other separators (U+2028) are legal
        lines = [line.strip() for line in Path(path).read_bytes().split(b"\n")]
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({e.strerror})") from None
    while lines and not lines[-1]:
        lines.pop()
    if blank := [n for n, line in enumerate(lines, start=1) if not line]:
        raise InputError([f"{path}:{n}: expected a JSON object, found a blank line" for n in blank])
    return [(f"{path}:{n}", line) for n, line in enumerate(lines, start=1)]


def read_json(path: str | os.PathLike[str]) -> Any:
    """Parses a JSON file; a missing or malformed one is an InputError that names it."""
    path = Path(path)
    try:
        if path.is_fifo():  # its reader would wait for ever
            raise InputError(f"{path}: expected a file, found a pipe")
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: expected a file, found none") from None
    except (ValueError, RecursionError) as e:  # not UTF-8, not JSON, or beyond Python's own limits
        raise InputError(f"{path}: expected JSON, found something else ({e})") from None
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({e.strerror})") from None
