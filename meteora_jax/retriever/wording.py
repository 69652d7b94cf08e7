"""Wording apart from content: which runs of words a set of texts repeats, and the texts without them.

Instruction data is written from templates, so a retrieval can be right by a template's words alone. What is removed
here are runs of three words and answer options that recur; what stays is what the request itself is about.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

RUN = 3  # words; shorter runs recur by chance in any English text
WORD = re.compile(r"\w+|[^\w\s]")


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
