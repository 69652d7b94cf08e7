"""What tokens stand for within a text: their characters and bytes, and where they begin."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from meteora_jax.text import REPLACEMENT, WINDOW


@dataclasses.dataclass(frozen=True)
class Spelt:
    """A token. shown: as log probabilities name it. adds: to the text, which leaves special tokens out."""

    raw: bytes
    shown: str
    adds: str

    @property
    def special(self) -> bool:
        """Whether the token has a name, and no part in the text."""
        return bool(self.raw) and not self.adds


class Spelling:
    """A tokenizer's tokens, each asked for once. A decoder may leave out the space that a text begins with, so that a
    token is told from what it adds to another one's text."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self._before: list[int] = list(tokenizer("a", add_special_tokens=False)["input_ids"])
        self._known: dict[tuple[int, bool], Spelt] = {}

    def added(self, tokens: Sequence[int], begins: bool) -> str:
        """What tokens add to a text, or begin one with; parts of characters as REPLACEMENT."""
        before = [] if begins else self._before
        return self._decode([*before, *tokens])[len(self._decode(before)) :]

    def behind(self, tokens: Sequence[int]) -> str:
        """What tokens add to a text that they continue: its first space stays."""
        return self.added(tokens, begins=False)

    def of(self, token: int, begins: bool = False) -> Spelt:
        """One token; begins: the text."""
        if (known := self._known.get((token, begins))) is None:
            known = self._known[token, begins] = self._spell(token, begins)
        return known

    def _spell(self, token: int, begins: bool) -> Spelt:
        adds = self.added([token], begins)
        said = adds or self.tokenizer.decode([token], clean_up_tokenization_spaces=False)  # a special token's name
        raw = self._bytes(token, said)
        try:
            shown = raw.decode()
        except UnicodeDecodeError:  # as OpenAI writes them
            shown = "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
        return Spelt(raw, shown, adds)

    def _bytes(self, token: int, said: str) -> bytes:
        """Of a token that is part of a character only, what it is part of."""
        if REPLACEMENT not in said:
            return said.encode("utf-8", "replace")
        name = self.tokenizer.convert_ids_to_tokens(token)
        if len(name) == 6 and name.startswith("<0x"):
            return bytes([int(name[3:5], 16)])
        try:
            return bytes(BYTES[character] for character in name)
        except KeyError:
            return said.encode()

    def _decode(self, tokens: Sequence[int]) -> str:
        if not tokens:
            return ""
        return self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def _byte_characters() -> dict[str, int]:
    """The characters that stand for bytes in byte-level vocabularies: printable ones for themselves, others above."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(others)}


BYTES = _byte_characters()


class Place:
    """Where a text's next token begins, in characters; the tokens come one by one.

    A character's parts all begin where it does. text: what the tokens were made of, where it is known: special tokens
    that stand there have their names' length.
    """

    def __init__(self, spelling: Spelling, offset: int = 0, text: str | None = None, begins: bool = True):
        """offset: of the first token. begins: whether it is a text's first."""
        self.spelling, self.begins = spelling, begins
        self._text, self._whole, self._certain = text, offset, offset  # _whole: where the open tokens begin
        self._open: list[int] = []  # tokens since the last that ended with a whole character

    def take(self, token: int) -> tuple[Spelt, int]:
        """The next token, and where it begins."""
        spelt, at = self.spelling.of(token, self.begins), self._certain
        if self._text is not None and not self._text.startswith(spelt.adds, at):
            # tokenizers may put a space before what follows a special token, and take one from the beginning
            other = self.spelling.of(token, not self.begins)
            spelt = other if self._text.startswith(other.adds, at) else spelt
        if spelt.special:
            if self._text is not None and self._text.startswith(spelt.shown, at):
                self._whole, self._certain, self._open = at + len(spelt.shown), at + len(spelt.shown), []
            return spelt, at
        self.begins = False
        if not self._open and not spelt.adds.endswith(REPLACEMENT):
            self._whole = self._certain = at + len(spelt.adds)
            return spelt, at
        self._open.append(token)
        said = self.spelling.added(self._open, False)
        self._certain = self._whole + len(said.rstrip(REPLACEMENT))
        if not said.endswith(REPLACEMENT) or len(self._open) == WINDOW:  # so many are no character's parts
            self._whole = self._certain = self._whole + len(said)
            self._open = []
        return spelt, at
