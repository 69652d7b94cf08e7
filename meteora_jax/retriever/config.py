"""`ENCODER/encoder.json`: the shape of a sentence encoder, and how its folder says that texts become vectors."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from meteora_jax.config import InputError

FORMAT = "meteora-encoder-1"
_NONE = dataclasses.MISSING


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """One encoder. bert: norms after the blocks (BERT, RoBERTa, MPNet); t5: RMS norms before them, no biases."""

    family: Literal["bert", "t5"]
    vocab_size: int  # V
    hidden_size: int  # D
    intermediate_size: int  # F
    num_layers: int  # L
    num_heads: int  # N
    head_dim: int  # H
    norm_eps: float
    activation: Literal["gelu", "gelu_tanh", "relu"]
    gated: bool  # t5 1.1: activation(x gate) * (x up)
    max_positions: int  # rows of the position table; 0: none
    position_offset: int  # the row of the first token: 0 for BERT, padding id + 1 for RoBERTa and MPNet
    type_vocab_size: int  # 0: no token types
    relative_buckets: int  # of the relative position bias; 0: none
    relative_max_distance: int
    pad_token_id: int
    max_length: int  # tokens, special ones included; longer texts are cut
    pooling: Literal["mean", "cls"]
    projection: int  # width of a linear map (no bias) after pooling; 0: none
    normalize: bool
    lower_case: bool
    pool_instruction: bool = True  # False (Instructor): the mean leaves out the tokens of the instruction before a text

    @property
    def width(self) -> int:
        """Of the vectors."""
        return self.projection or self.hidden_size

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """{path: shape} of `ENCODER/weights.safetensors`; layers are stacked, L first."""
        n, d, f, inner = self.num_layers, self.hidden_size, self.intermediate_size, self.num_heads * self.head_dim
        bias = self.family == "bert"
        shapes: dict[str, tuple[int, ...]] = {"words.embedding": (self.vocab_size, d)}
        if self.max_positions:
            shapes["positions.embedding"] = (self.max_positions, d)
        if self.type_vocab_size:
            shapes["types.embedding"] = (self.type_vocab_size, d)
        if self.relative_buckets:
            shapes["distances.embedding"] = (self.relative_buckets, self.num_heads)
        linear = dict.fromkeys(("query", "key", "value"), (d, inner))
        linear |= {"output": (inner, d), "up": (d, f), "down": (f, d)} | ({"gate": (d, f)} if self.gated else {})
        for name, (i, o) in linear.items():
            shapes[f"layers.{name}.kernel"] = (n, i, o)
            if bias:
                shapes[f"layers.{name}.bias"] = (n, o)
        norms = {"norm": (d,), "layers.attention_norm": (n, d), "layers.mlp_norm": (n, d)}
        for name, shape in norms.items():
            shapes[f"{name}.scale"] = shape
            if bias:
                shapes[f"{name}.bias"] = shape
        if self.projection:
            shapes["projection.kernel"] = (d, self.projection)
        return shapes

    def to_json(self) -> dict[str, Any]:
        return {"format": FORMAT, **dataclasses.asdict(self)}

    @classmethod
    def from_json(cls, raw: Any, source: str) -> EncoderConfig:
        try:
            if raw["format"] != FORMAT:
                raise InputError(f"{source}: format: expected {FORMAT!r}, found {raw['format']!r}")
            # pool_instruction came later: a folder without it pools every token
            return cls(**{f.name: raw[f.name] for f in dataclasses.fields(cls) if f.name in raw or f.default is _NONE})
        except (KeyError, TypeError) as e:
            raise InputError(f"{source}: expected an encoder's description, found a malformed one ({e!r})") from e
