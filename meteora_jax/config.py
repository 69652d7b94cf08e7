"""The configurations that files own: the base (`LlamaConfig`) and the bank. No value that a checkpoint owns
has a default, but where Hugging Face's format itself documents one for an absent key (`io.hf_config`).
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from meteora_jax.quantization import ITEM_BYTES, STORED_TYPES, Quantization, Stored


class InputError(Exception):
    """Input that is refused: one line naming file, key, expected and found. The CLI exits with 1.

    `problems` holds every single failure; the message joins them.
    """

    def __init__(self, problems: str | Iterable[str]):
        self.problems = (problems,) if isinstance(problems, str) else tuple(problems)
        shown = [" ".join(p.split()) for p in self.problems[:12]]
        rest = len(self.problems) - len(shown)
        super().__init__("; ".join(shown) + (f"; and {rest} more problems" if rest else ""))


def is_name(name: str) -> bool:
    """Whether an adapter may be called so; otherwise `NAME` is what was expected."""
    return bool(name) and name == name.strip() and name.isprintable() and not any(c in name for c in "/\\=")


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
NAME = "a printable name without '/', '\\' or '='"  # of an adapter
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
    quantization: Quantization | None = None  # of the stored weights; None: floating point

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
        n, d, v, packed = self.num_layers, self.hidden_size, self.vocab_size, self.quantized_tensors()
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
        return shapes | {path: shape for path, (shape, _) in packed.items()}

    def quantized_tensors(self) -> dict[str, Stored]:
        """{path: shape and type} of the tensors that quantised matrices are stored as; empty of a base without any."""
        if (q := self.quantization) is None:
            return {}
        kernels = {p: q.parts(*self.projection_shape(p)) for p in PROJECTIONS}
        found = {
            f"layers.{p}.{part}": ((self.num_layers, *shape), kind)
            for p, parts in kernels.items()
            for part, (shape, kind) in parts.items()
        }
        return found | q.vocab_parts(self.vocab_size, self.hidden_size)

    def stored_types(self) -> dict[str, str]:
        """{path: type of the file's tensor, as the format calls it} of the same."""
        return {path: STORED_TYPES[kind] for path, (_, kind) in self.quantized_tensors().items()}

    def weight_bytes(self, itemsize: int) -> int:
        """Bytes of the base where what is not quantised has values of `itemsize` bytes."""
        packed = self.quantized_tensors()
        return sum(
            math.prod(shape) * (ITEM_BYTES[packed[path][1]] if path in packed else itemsize)
            for path, shape in self.weight_shapes().items()
        )


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
    own_gate: bool = False  # whether it has a gate of its own at each of its projections, see `routing.by_score`


@dataclasses.dataclass(frozen=True)
class VocabAdapterConfig:
    """What a bank's adapters change at the embedding or at the head (`ENDS`)."""

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
    # "embed" and "head" -> what adapters change there; one that no adapter changes is absent
    vocab_adapters: dict[str, VocabAdapterConfig] = dataclasses.field(default_factory=dict)
    vocab_shape: tuple[int, int] | None = None  # (V, D) of the base; None where `vocab_adapters` is empty
    base: dict[str, Any] | None = None  # what the base's own record said (see io.provenance); None: there was none

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(a.name for a in self.adapters)

    @property
    def vocab_adapter_names(self) -> tuple[str, ...]:
        """The adapters that change the embedding or the head."""
        return tuple(a.name for a in self.adapters if set(a.targets) & {m.rpartition(".")[2] for m in ENDS.values()})

    @property
    def invoked(self) -> tuple[str, ...]:
        """The adapters that act from an invocation on."""
        return tuple(a.name for a in self.adapters if a.invocation)

    @property
    def own_gates(self) -> tuple[str, ...]:
        """The projections at which some adapter has a gate of its own."""
        gated = {target for a in self.adapters if a.own_gate for target in a.targets}
        return tuple(p for p in self.ranks if p in gated)

    @property
    def hidden_size(self) -> int:
        """D of the base."""
        return self.base_shapes["q_proj"][0]

    def projection_shape(self, projection: str) -> tuple[int, int]:
        """(I, O) of a projection of the base."""
        return self.base_shapes[projection]

    def take(self, at: Sequence[int], rank_of: Callable[[int, str], int]) -> BankConfig:
        """The bank of some of its adapters, stacked as an import of them alone stacks them.

        Args:
            at: their places, in the order that they shall have.
            rank_of: (an adapter's place, projection or end) -> its rank there; asked where its settings have a rank
                pattern, of which the description keeps the largest rank alone.
        """
        infos = [self.adapters[i] for i in at]
        held = [self._ranks(i, rank_of) for i in at]
        most = {place: max(ranks.get(place, 0) for ranks in held) for place in (*self.ranks, *self.vocab_adapters)}

        def kept(projections: tuple[str, ...], switch: str) -> tuple[str, ...]:
            return tuple(p for p in projections if any(a.peft_config.get(switch) and p in a.targets for a in infos))

        vocab = {
            end: VocabAdapterConfig(most[end], tuple(old.tokens[i] for i in at))
            for end, old in self.vocab_adapters.items()
        }
        vocab = {end: new for end, new in vocab.items() if new.rank or new.most}
        return dataclasses.replace(
            self, adapters=tuple(infos), ranks={p: most[p] for p in self.ranks if most[p]},
            dora=kept(self.dora, "use_dora"), lora_bias=kept(self.lora_bias, "lora_bias"),
            vocab_adapters=vocab, vocab_shape=self.vocab_shape if vocab else None,
        )  # fmt: skip

    def _ranks(self, i: int, rank_of: Callable[[int, str], int]) -> dict[str, int]:
        """{projection or end: rank of adapter i's LoRA there}. At an end it has a LoRA or rows, never both."""
        info = self.adapters[i]
        places = [p for p in self.ranks if p in info.targets]
        places += [
            end
            for end, held in self.vocab_adapters.items()
            if ENDS[end].rpartition(".")[2] in info.targets and not held.tokens[i]
        ]
        patterned = bool(info.peft_config.get("rank_pattern"))
        return {place: rank_of(i, place) if patterned else info.rank for place in places}

    def join(self, other: BankConfig) -> BankConfig:
        """This bank with the adapters of another one of the same base behind its own."""
        vocab = {}
        for end in self.vocab_adapters.keys() | other.vocab_adapters.keys():
            nothing = (VocabAdapterConfig(0, ((),) * len(bank.names)) for bank in (self, other))
            mine, theirs = (
                bank.vocab_adapters.get(end, none) for bank, none in zip((self, other), nothing, strict=True)
            )
            vocab[end] = VocabAdapterConfig(max(mine.rank, theirs.rank), mine.tokens + theirs.tokens)
        vocab = {end: vocab[end] for end in ENDS if end in vocab}
        ranks = {p: max(self.ranks.get(p, 0), other.ranks.get(p, 0)) for p in PROJECTIONS}
        return dataclasses.replace(
            self, adapters=(*self.adapters, *other.adapters), ranks={p: r for p, r in ranks.items() if r},
            dora=tuple(p for p in PROJECTIONS if p in self.dora + other.dora),
            lora_bias=tuple(p for p in PROJECTIONS if p in self.lora_bias + other.lora_bias),
            vocab_adapters=vocab, vocab_shape=self.vocab_shape or other.vocab_shape, base=self.base or other.base,
        )  # fmt: skip

    def rename(self, old: str, new: str) -> BankConfig:
        """The same with another name for one adapter."""
        named = (dataclasses.replace(a, name=new) if a.name == old else a for a in self.adapters)
        return dataclasses.replace(self, adapters=tuple(named))

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """{path: shape} of `BANK/weights.safetensors`.

        `p.a` [L, A, R, I], `p.b` [L, A, R, O], `p.scale` [L, A]; where an adapter has them `p.bias` [L, A, O],
        `p.magnitude` [L, A, O] (DoRA's own) and `p.dora` [L, A, O]: magnitude / norm of the adapted column - 1; and
        `p.own_gate` [L, A, I], zeros of adapters without one.
        At the embedding and the head `embed.a` [A, R, V], `embed.b` [A, R, D], `head.a` [A, R, D], `head.b` [A, R, V],
        `scale` [A], and `rows` [A, n, D].
        """
        shapes: dict[str, tuple[int, ...]] = {}
        n, a = self.num_layers, len(self.adapters)
        for p, r in self.ranks.items():
            i, o = self.base_shapes[p]
            shapes |= {f"{p}.a": (n, a, r, i), f"{p}.b": (n, a, r, o), f"{p}.scale": (n, a)}
            shapes |= {f"{p}.{part}": (n, a, o) for part in ("magnitude", "dora") if p in self.dora}
            shapes |= {f"{p}.bias": (n, a, o)} if p in self.lora_bias else {}
            shapes |= {f"{p}.own_gate": (n, a, i)} if p in self.own_gates else {}
        for end, held in self.vocab_adapters.items():
            assert self.vocab_shape is not None, "checked by from_json"
            i, o = self.vocab_shape if end == "embed" else self.vocab_shape[::-1]
            if held.rank:
                shapes |= {f"{end}.a": (a, held.rank, i), f"{end}.b": (a, held.rank, o), f"{end}.scale": (a,)}
            if held.most:
                shapes[f"{end}.rows"] = (a, held.most, self.vocab_shape[1])
        return shapes

    def to_json(self) -> dict[str, Any]:
        own = {"ends" if key == "vocab_adapters" else key: value for key, value in dataclasses.asdict(self).items()}
        for adapter in own["adapters"]:
            if not adapter["own_gate"]:
                del adapter["own_gate"]
        return {"format": "meteora-bank-1", **own}

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
            vocab_adapters = {
                end: VocabAdapterConfig(int(held["rank"]), tuple(tuple(map(int, ids)) for ids in held["tokens"]))
                for end, held in raw.get("ends", {}).items()
            }
            vocab = None if raw.get("vocab_shape") is None else (int(raw["vocab_shape"][0]), int(raw["vocab_shape"][1]))
            uneven = any(len(held.tokens) != len(adapters) for held in vocab_adapters.values())
            if uneven or not vocab_adapters.keys() <= ENDS.keys() or bool(vocab_adapters) != (vocab is not None):
                raise ValueError("ends, their tokens and vocab_shape")
            base = None if raw.get("base") is None else dict(raw["base"])
            return cls(
                adapters, ranks, int(raw["num_layers"]), shapes, dora=dora, lora_bias=bias,
                vocab_adapters=vocab_adapters, vocab_shape=vocab, base=base,
            )  # fmt: skip
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as e:
            raise InputError(f"{source}: expected a bank's description, found a malformed one ({e!r})") from e


def read_lines(path: str | os.PathLike[str]) -> list[tuple[str, bytes]]:
    """(FILE:NUMBER, line) of each line of a JSON lines file, whatever ends it; blank lines may stand at the end.

    Raises:
        InputError: the file cannot be read, or a line before the last is blank.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({e.strerror})") from None
    return numbered_lines(content, path)


def numbered_lines(content: bytes, path: str | os.PathLike[str]) -> list[tuple[str, bytes]]:
    """`read_lines` of what a file holds."""
    # by line ends alone: inside a JSON text other separators (U+2028) are legal
    lines = [line.strip() for line in content.split(b"\n")]
    while lines and not lines[-1]:
        lines.pop()
    if blank := [n for n, line in enumerate(lines, start=1) if not line]:
        raise InputError([f"{path}:{n}: expected a JSON object, found a blank line" for n in blank])
    return [(f"{path}:{n}", line) for n, line in enumerate(lines, start=1)]


def read_json(path: str | os.PathLike[str], made_of: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """Parses a JSON file, objects as `made_of` makes them of pairs; a bad one is an InputError that names it."""
    path = Path(path)
    try:
        if path.is_fifo():  # its reader would wait for ever
            raise InputError(f"{path}: expected a file, found a pipe")
        return json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=made_of)
    except FileNotFoundError:
        raise InputError(f"{path}: expected a file, found none") from None
    except (ValueError, RecursionError) as e:  # not UTF-8, not JSON, or beyond Python's own limits
        raise InputError(f"{path}: expected JSON, found something else ({e})") from None
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({e.strerror})") from None
