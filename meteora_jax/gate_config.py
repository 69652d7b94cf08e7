"""The configuration of gates, which `GATES/gates.json` owns: whose they are, and which of the two forms they have."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from meteora_jax.config import InputError

HEAD = 32  # width of a head of the token router
SHIFTS = 3  # tokens before its own that a token's first layer and second hop read beside it
HOPS = 2  # look-ups of the token router, the second by what the first found
SEGMENTS = 16  # of a block that the token router tells apart by their number

FormName = Literal["token-router", "meteora"]


@dataclasses.dataclass(frozen=True)
class TokenRouterForm:
    """In what one token router may differ from another: the width of its stream, a multiple of 32, and its layers."""

    width: int
    depth: int

    def __post_init__(self):
        if type(self.width) is not int or self.width not in range(HEAD, 4096, HEAD):
            raise ValueError(f"width: expected a multiple of {HEAD} from 32 to 4064, found {self.width!r}")
        if type(self.depth) is not int or self.depth not in range(HOPS, 257):
            raise ValueError(f"depth: expected {HOPS} to 256, found {self.depth!r}")


@dataclasses.dataclass(frozen=True)
class GateConfig:
    """`GATES/gates.json`: which adapters the columns stand for, and how they were trained to be read.

    form: of a token router; None: MeteoRA's own gates, one at every projection of every layer.
    null: whether a column behind the adapters' stands for none of them, the base alone.
    """

    names: tuple[str, ...]  # adapter of each column
    top_k: int  # C that training used
    temperature: float
    form: TokenRouterForm | None = None
    null: bool = False
    former: bool = False  # whether the tensors beside it have the names of format "meteora-gates-2"

    @property
    def columns(self) -> int:
        """Of the gates: one an adapter, and the null choice's."""
        return len(self.names) + self.null

    def without(self, name: str) -> tuple[GateConfig | None, list[int]]:
        """The same less one adapter's column, if it has one, None where no other is left; and the columns that stay."""
        left = tuple(n for n in self.names if n != name)
        columns = [i for i in range(self.columns) if self.names[i : i + 1] != (name,)]
        return dataclasses.replace(self, names=left, top_k=min(self.top_k, len(left))) if left else None, columns

    @property
    def form_name(self) -> FormName:
        return "meteora" if self.form is None else "token-router"

    def to_json(self) -> dict[str, Any]:
        own: dict[str, Any] = {"names": self.names, "top_k": self.top_k, "temperature": self.temperature}
        if self.null:
            own["null"] = True
        if self.form is None:
            return {"format": "meteora-gates-1", **own}
        return {"format": "meteora-gates-3", **own, "form": self.form_name, **dataclasses.asdict(self.form)}

    @classmethod
    def from_json(cls, raw: Any, source: str) -> GateConfig:
        """Raises InputError: a malformed description, or a form of gates that is gone."""
        try:
            if raw["format"] not in ("meteora-gates-1", "meteora-gates-2", "meteora-gates-3"):
                raise InputError(f"{source}: format: expected 'meteora-gates-1' or '-3', found {raw['format']!r}")
            form = None
            if gone := _gone(raw):
                raise InputError(
                    f"{source}: form: expected a token router or MeteoRA's own gates, found {gone}, which no longer "
                    "exist: train the gates again with `meteora train gates`"
                )
            if raw["format"] == "meteora-gates-2":
                form = TokenRouterForm(raw["form"]["stream"], raw["form"]["depth"])
            elif raw["format"] == "meteora-gates-3":
                if raw["form"] != "token-router":
                    raise ValueError(f"form {raw['form']!r}")
                form = TokenRouterForm(raw["width"], raw["depth"])
            former, null = raw["format"] == "meteora-gates-2", raw.get("null", False)
            if not isinstance(null, bool):
                raise InputError(f"{source}: null: expected true or false, found {null!r:.60}")
            return cls(tuple(raw["names"]), int(raw["top_k"]), float(raw["temperature"]), form, null, former)
        except (KeyError, TypeError, ValueError, AttributeError) as e:
            raise InputError(f"{source}: expected a description of gates, found a malformed one ({e!r})") from e


def _gone(raw: Any) -> str | None:
    """What gates of an earlier release are, in words, where they have a form that no longer exists."""
    if raw.get("background") is not None:
        return "independent columns"
    if raw["format"] != "meteora-gates-2":
        return None
    form = raw["form"]
    if form.get("input") == "embedding":
        if form.get("rounds", 1) != HOPS:
            return "a token router of one hop"
        return None if form.get("turns") == SEGMENTS else f"a token router that does not count {SEGMENTS} segments"
    parts = {
        "gates that read the sequence's mean (prefix-mean)": form.get("input") == "prefix-mean",
        "gates that read a stream alone": form.get("input") == "stream",
        "gates with a stream beside the layers": form.get("input") != "stream" and form.get("stream"),
        "carried logits": form.get("carry"),
        "gates shared in a group": form.get("shared"),
        "biases": form.get("bias"),
    }
    return " with ".join(part for part, has in parts.items() if has) or None
