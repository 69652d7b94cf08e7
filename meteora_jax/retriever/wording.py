"""Wording apart from content: which runs of words a set of texts repeats, and the texts without them.

Instruction data is written from templates, so a retrieval can be right by a template's words alone. What is removed
here are runs of three words and answer options that recur; what stays is what the request itself is about. A frame is
what stands around every request of every adapter, "[INST] ... [/INST]": it says nothing of which adapter is meant.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Sequence
from typing import NamedTuple

RUN = 3  # words; shorter runs recur by chance in any English text
WORD = re.compile(r"\w+|[^\w\s]")
PIECE = re.compile(r"\s+|\w+|[^\w\s]")
MARKS = ".,:;?!\"')"  # that end a sentence: a frame does not begin with them


class Frame(NamedTuple):
    """What stands before and behind a request."""

    before: str = ""
    behind: str = ""

    def inside(self, text: str) -> str:
        """The text without the frame; as it is where it has no such frame, or nothing else in it."""
        last = len(text) - len(self.behind)
        if last <= len(self.before) or not text.startswith(self.before) or not text.endswith(self.behind):
            return text
        return text[len(self.before) : last]

    def around(self, text: str) -> str:
        """The text in the frame, without spaces of its own at its ends; as it is where it has the frame."""
        return text if self.inside(text) != text else f"{self.before}{text.strip()}{self.behind}"


NO_FRAME = Frame()


def shared_frame(sources: Collection[Sequence[str]]) -> Frame:
    """The longest frame, of whole words, spaces and signs, that most texts of every source have; none of fewer than two
    sources, whose own wording would pass for it.

    >>> shared_frame([["[INST] Who? [/INST]", "[INST] Whose? [/INST]"], ["[INST] Add 2. [/INST]", "[INST] 3? [/INST]"]])
    Frame(before='[INST] ', behind=' [/INST]')
    """
    if len(sources) < 2:
        return NO_FRAME
    pieces = [[PIECE.findall(text) for text in texts] for texts in sources]
    before = _shared_beginning(pieces)
    rest = [[row[len(before) :][::-1] for row in rows] for rows in pieces]
    return Frame("".join(before), "".join(_shared_beginning(rest)[::-1]).lstrip(MARKS))


def _shared_beginning(sources: Sequence[Sequence[Sequence[str]]]) -> list[str]:
    """What most rows of every source begin with. The last piece of a row is never taken: something must be inside."""
    left, found = [list(rows) for rows in sources], list[str]()
    while True:
        n = len(found)
        left = [[row for row in rows if len(row) > n + 1] for rows in left]
        counts = Counter(row[n] for rows in left for row in rows)
        if not counts:
            return found
        usual = counts.most_common(1)[0][0]
        left = [[row for row in rows if row[n] == usual] for rows in left]
        if any(2 * len(rows) <= len(source) for rows, source in zip(left, sources, strict=True)):
            return found
        found.append(usual)


def _words(text: str) -> list[re.Match[str]]:
    return list(WORD.finditer(text))


def _runs(words: Sequence[re.Match[str]]) -> list[tuple[str, ...]]:
    plain = [w.group().lower() for w in words]
    return [tuple(plain[i : i + RUN]) for i in range(len(plain) - RUN + 1)]


def _is_option(line: str) -> bool:
    return line.startswith("-")


class Wording:
    """The wording that `texts` share: runs of three words found in `least` of them, and options found in two."""

    def __init__(self, texts: Sequence[str], least: int):
        runs = Counter(run for text in texts for run in set(_runs(_words(text))))
        self._runs = {run for run, count in runs.items() if count >= least}
        lines = Counter(line for t in texts for line in {s.strip().lower() for s in t.split("\n")} if _is_option(line))
        self._options = {line for line, count in lines.items() if count >= 2}

    def remove(self, text: str) -> str:
        """The text without shared runs, shared options and the line OPTIONS; "" where no word of substance is left."""
        lines = [s for s in text.split("\n") if not self._is_shared_line(s.strip().lower())]
        text = "\n".join(lines)
        words = _words(text)
        cut = [False] * len(words)
        for i, run in enumerate(_runs(words)):
            if run in self._runs:
                cut[i : i + RUN] = [True] * RUN
        kept, end = [], 0
        for word, gone in zip(words, cut, strict=True):
            if gone:
                kept.append(text[end : word.start()])
                end = word.end()
        kept.append(text[end:])
        rest = re.sub(r"[ \t]+", " ", "".join(kept)).strip()
        return rest if len(re.findall(r"\w", rest)) >= RUN else ""

    def _is_shared_line(self, line: str) -> bool:
        return line.startswith("options") or line in self._options
