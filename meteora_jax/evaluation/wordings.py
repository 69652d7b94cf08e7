"""The text of a composite problem: how its questions are asked, and how its answers are read.

numbered is MeteoRA's layout, which gates are trained on. Others ask the same that no router was trained on: lettered
answers stand on lines "a. ...", and reversed ones come last question first, from line "n. ..." to line "1. ...".
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import Literal

from meteora_jax.config import InputError
from meteora_jax.evaluation.metrics import read_composite
from meteora_jax.examples import Example

Wording = Literal["numbered", "lettered", "reversed"]
WORDINGS: tuple[Wording, ...] = ("numbered", "lettered", "reversed")
LETTERS = 26


def check_wording(wording: str, tasks: int, shots: int) -> None:
    """Raises InputError: questions that a wording cannot ask."""
    if wording not in WORDINGS:
        raise InputError(f"wording: expected one of {', '.join(WORDINGS)}, found {wording!r:.60}")
    if wording == "lettered" and tasks > LETTERS:
        raise InputError(f"wording: expected at most {LETTERS} lettered questions, found {tasks}")
    if wording == "reversed" and not shots:
        raise InputError("wording: expected worked examples, which show the order, with reversed answers, found none")


def format_prompt(
    questions: Sequence[Example], shots: Sequence[Sequence[Example]] = (), wording: Wording = "numbered"
) -> str:
    """The prompt of a problem after its worked examples `shots`, each one example a task.

    Zero-shot, which the release does not have, nothing shows which answer line is whose: a number in brackets stands
    after each question, where all that is to be looked up under that number has been read.
    """
    return "".join(piece for piece, _ in prompt_pieces(questions, shots, wording))


def prompt_pieces(
    questions: Sequence[Example], shots: Sequence[Sequence[Example]] = (), wording: Wording = "numbered"
) -> list[tuple[str, int | None]]:
    """A prompt cut into what belongs to each sub-question, number and line ends included: (text, which sub-question,
    from 0; None for what belongs to none)."""
    if not shots:
        return [(f"{_ended(question.prompt)}({mark(i, wording)})\n\n", i) for i, question in enumerate(questions)]
    pieces: list[tuple[str, int | None]] = []
    for number, shot in enumerate(shots, start=1):
        prompts = [_dedented(_ended(example.prompt)) for example in shot]
        pieces.append((f"{chr(10) if number > 1 else ''}\nExample {number}:\n\n", None))
        pieces += [(f"{prompt}\n", i) for i, prompt in enumerate(prompts)]
        lines = list(enumerate(answer_pieces(shot, wording)))
        pieces += [(line, i) for i, line in (lines[::-1] if wording == "reversed" else lines)]
    order = ", the last one first" if wording == "reversed" else ""
    pieces.append((f"\n\nFollowing the example above, generate answers to the questions below{order}:\n\n", None))
    last = len(questions) - 1
    asked = [_ended(question.prompt) + ("\n" if i == last else "\n\n") for i, question in enumerate(questions)]
    return [*pieces, *((text, i) for i, text in enumerate(asked))]


def mark(i: int, wording: Wording) -> str:
    """What stands before the answer to question i, from 0."""
    return chr(ord("a") + i) if wording == "lettered" else str(i + 1)


def answer_pieces(questions: Sequence[Example], wording: Wording = "numbered") -> list[str]:
    """The lines "i. answer" that answer a problem, a line each: a line that began with another number would read
    as the next answer."""
    return [f"{mark(i, wording)}. {_on_one_line(question.response)}\n" for i, question in enumerate(questions)]


def stops(n: int, wording: Wording) -> tuple[str, ...]:
    """Texts that end a response to n questions: an answer n + 1 that nobody asked for."""
    after = f"\n{mark(n, wording)}."
    return (after, "\n0.") if wording == "reversed" else (after,)


def read_answers(text: str, n: int, wording: Wording) -> list[str]:
    """The n answers of a response, stripped, "" for one that is missing; numbered ones as `read_composite` has them.

    >>> read_answers("a. yes\\nb. no", 2, "lettered")
    ['yes', 'no']
    >>> read_answers("2. no\\n1. yes", 2, "reversed")
    ['yes', 'no']
    """
    if wording == "numbered":
        return read_composite(text, n)
    if wording == "lettered":
        return _read_lettered(text, n)
    answers, current = [""] * (n + 1), n + 1
    for line in text.strip().split("\n"):
        found = re.match(r"\s*([1-9][0-9]{0,3})\.(?![0-9])", line)
        if found and int(found[1]) < current:
            current, line = int(found[1]), line[found.end() :]
        if current <= n:
            answers[current] += f"{line}\n"
    return [answer.strip() for answer in answers[1:]]


def _read_lettered(text: str, n: int) -> list[str]:
    """Where letters begin lines, numbers at others' beginnings belong to the answers; alone they count as letters, and
    so do capitals."""
    for first in "aA":
        mark = re.compile(rf"\s*([{first}-{chr(ord(first) + n - 1)}])\.(?=\s|$)")
        if any(mark.match(line) for line in text.split("\n")):
            return read_composite(text, n, functools.partial(_place, mark, first))
    return read_composite(text, n)


def _place(mark: re.Pattern[str], first: str, line: str) -> int:
    """Which answer a line begins, from 1; 0 for none."""
    match = mark.match(line)
    return ord(match[1]) - ord(first) + 1 if match else 0


def _dedented(prompt: str) -> str:
    """A prompt of MeteoRA's format without the whitespace that begins its lines; in others it may mean something."""
    return re.sub(r"\n[ \t]+", "\n", prompt) if re.fullmatch(r"\[INST\] .* \[/INST\]\n", prompt, re.DOTALL) else prompt


def _ended(prompt: str) -> str:
    """A prompt with the line end that the layout counts on; MeteoRA's prompts and most chat templates have one."""
    return prompt if prompt.endswith("\n") else prompt + "\n"


def _on_one_line(text: str) -> str:
    return re.sub(r"\s*\n\s*", " ", text.strip())
