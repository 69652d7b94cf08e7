"""The configuration of gates, which `GATES/gates.json` owns: whose they are and what they read."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from meteora_jax.config import InputError

IMPOSSIBLE = (
    "gate_input: expected for stream a gate_stream and no shared gates, for embedding a gate_stream (a multiple of 32) "
    "and a gate_depth, neither shared gates, biases nor carried logits, one gate_rounds or (gate_depth 2 or more) two, "
    "gate_turns of 0 to 4,095, "
    "and no gate_depth, gate_rounds or gate_turns for another"
)
HEAD = 32  # width of a head of gates that read the embeddings
MOST_TURNS = 4096
SHIFTS = 3  # tokens before its own that these read beside it


@dataclasses.dataclass(frozen=True)
class GateForm:
    """What gates read and share; the defaults are MeteoRA's. docs/words.md has the formula of each."""

    # beside a token's own input the sequence's mean so far; the stream alone; the embeddings, before the first layer
    input: Literal["token", "prefix-mean", "stream", "embedding"] = "token"
    carry: bool = False  # the logits of the layer before are added
    shared: bool = False  # one gate serves all projections of a group
    bias: bool = False  # each adapter's logit has one
    stream: int = 0  # width of the gates' own residual stream, which looks back over the sequence; 0: none
    depth: int = 0  # layers of that stream where it reads the embeddings; else it passes through the model's own
    rounds: int = 1  # 2: such a stream points twice, its last layer knows what the first time found
    turns: int = 0  # so many turns of a block it counts, beside whose it was before

    @property
    def remembers(self) -> bool:
        """Whether a token's logits need more than its own input at its own layer."""
        return self.input == "prefix-mean" or self.carry or self.stream > 0

    @property
    def is_served(self) -> bool:
        """Whether slim matrices and decoding steps know it: what it remembers, if anything, is a stream."""
        return self.input != "prefix-mean" and not self.carry

    @property
    def is_ahead(self) -> bool:
        """Whether one choice, made before the model's first layer, serves all of a token's projections."""
        return self.input == "embedding"

    @property
    def kept(self) -> int:
        """Layers of the cache that gates before the model's first layer fill: their own layers' keys and values, what
        tokens have read, what they say, and with two rounds the second's and what the first has found."""
        return self.depth + 2 * self.rounds

    @property
    def alone(self) -> bool:
        """Whether no gate has a product with its projection's input."""
        return self.input in ("stream", "embedding")

    @property
    def is_possible(self) -> bool:
        """Whether there are such gates: without a product there is none to share, and a stream is needed."""
        if self.is_ahead:
            return (
                self.stream > 0
                and self.stream % HEAD == 0
                and self.rounds in (1, 2)
                and self.depth >= self.rounds
                and self.turns in range(MOST_TURNS)
                and not (self.shared or self.carry or self.bias)
            )
        stream = self.input == "stream" and self.stream > 0 and not self.shared
        return (self.depth, self.rounds, self.turns) == (0, 1, 0) and (self.input in ("token", "prefix-mean") or stream)

    @property
    def changes(self) -> dict[str, Any]:
        """The fields that are not MeteoRA's."""
        return {k: v for k, v in dataclasses.asdict(self).items() if v != getattr(GateForm, k)}


METEORA_FORM = GateForm()


@dataclasses.dataclass(frozen=True)
class GateConfig:
    """`GATES/gates.json`: which adapters the gate columns stand for, and how they were trained to be read."""

    names: tuple[str, ...]  # adapter of each gate column
    top_k: int  # C that training used
    temperature: float
    form: GateForm = METEORA_FORM
    background: str | None = None  # SHA-256 of the tokens that independent columns were trained against

    def to_json(self) -> dict[str, Any]:
        own: dict[str, Any] = {"names": self.names, "top_k": self.top_k, "temperature": self.temperature}
        own |= {"background": self.background} if self.background is not None else {}
        own |= {"form": self.form.changes} if self.form.changes else {}
        # another format for another form: what reads MeteoRA's gates alone must refuse it
        return {"format": f"meteora-gates-{2 if self.form.changes else 1}", **own}

    @classmethod
    def from_json(cls, raw: Any, source: str) -> GateConfig:
        try:
            if raw["format"] not in ("meteora-gates-1", "meteora-gates-2"):
                raise InputError(f"{source}: format: expected 'meteora-gates-1' or '-2', found {raw['format']!r}")
            form = GateForm(**raw["form"]) if raw["format"] == "meteora-gates-2" else GateForm()
            flags, mark = all(isinstance(x, bool) for x in (form.carry, form.shared, form.bias)), raw.get("background")
            numbers = form.stream, form.depth, form.rounds, form.turns
            width = all(type(n) is int for n in numbers) and form.stream in range(0, 4096, 8)
            width = width and form.depth in range(0, 257) and form.is_possible
            if not (flags and width) or not isinstance(mark, str | None):
                raise ValueError(f"{form}, background {mark!r}")
            return cls(tuple(raw["names"]), int(raw["top_k"]), float(raw["temperature"]), form, mark)
        except (KeyError, TypeError, ValueError) as e:
            raise InputError(f"{source}: expected a description of gates, found a malformed one ({e!r})") from e
