"""One training sequence: the tokens of examples, which of them carry loss, and the adapter that each belongs to."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from meteora_jax.config import InputError
from meteora_jax.evaluation.wordings import answer_pieces, prompt_pieces
from meteora_jax.examples import ANSWERS, Example, prompt_ids, turn_messages
from meteora_jax.prompts import Message, render_chat

NO_TASK = -1  # a token that no gate is judged on
CUT = 90, 50  # characters kept at an example's beginning and end
TURNS = 6  # of a conversation, at most; one is a task as the user's only message
# Some conversations begin with one of these, most with what the template writes itself; the evaluation has others.
SYSTEM_PROMPTS = (
    "You are an assistant.",
    "You answer questions in as few words as they need.",
    "Follow the user's instructions to the letter.",
    "You work for a library, and its readers write to you.",
)


@dataclasses.dataclass(frozen=True)
class Tokenized:
    """One training sequence: tokens int32 [T], loss bool [T] (is this token predicted?), tasks int32 [T]."""

    tokens: np.ndarray
    loss: np.ndarray
    tasks: np.ndarray


def encode(example: Example, task: int, tokenizer: Any, end: int, *, prompt_loss: bool) -> Tokenized:
    """prompt + response + end token; prompt and response are tokenized apart, as generation will see them. Of messages
    the response follows what the chat template writes before an answer."""
    return encode_all([example], task, tokenizer, end, prompt_loss=prompt_loss)[0]


def encode_all(
    examples: Sequence[Example], task: int, tokenizer: Any, end: int, *, prompt_loss: bool
) -> list[Tokenized]:
    """`encode` of each; one call to the tokenizer, which spreads it over the cores."""
    prompts = prompt_ids(examples, tokenizer)
    responses = tokenizer([e.response for e in examples], return_attention_mask=False, add_special_tokens=False)
    sequences = []
    for prompt, response in zip(prompts, responses["input_ids"], strict=True):
        tokens = np.asarray([*prompt, *response, end], np.int32)
        loss = np.full(len(tokens), prompt_loss)
        loss[len(prompt) :] = True
        loss[0] = False  # nothing predicts the first token
        sequences.append(Tokenized(tokens, loss, np.full(len(tokens), task, np.int32)))
    return sequences


def compose(
    parts: Sequence[tuple[Example, int]],
    tokenizer: Any,
    end: int,
    *,
    prompt_loss: bool,
    shots: Sequence[Sequence[Example]] = (),
) -> Tokenized:
    """Several tasks in one sequence, a composite problem: worked examples (`shots`, each one example a part), if any,
    all prompts, then "1. answer" lines. All are plain text (`as_text`).

    Every token is labelled with the task of the part that it belongs to, so gates learn to switch inside one
    sequence; headings, the end token and what the tokenizer adds belong to none.
    """
    examples = [example for example, _ in parts]
    pieces = prompt_pieces(examples, shots)
    text = "".join(piece for piece, _ in pieces)
    prompt = tokenizer(text, return_offsets_mapping=True)  # as one text: generation sees these tokens
    tokens = list(prompt["input_ids"])
    at = np.searchsorted(
        np.cumsum([len(p) for p, _ in pieces]), [start for start, _ in prompt["offset_mapping"]], "right"
    )
    owners = [NO_TASK if i is None else parts[i][1] for _, i in pieces]
    tasks = [
        owners[i] if stop > start else NO_TASK for i, (start, stop) in zip(at, prompt["offset_mapping"], strict=True)
    ]
    loss = [prompt_loss] * len(tokens)
    answers = tokenizer(answer_pieces(examples), add_special_tokens=False)["input_ids"]
    for ids, (_, task) in zip(answers, parts, strict=True):
        tokens.extend(ids)
        tasks.extend([task] * len(ids))
        loss.extend([True] * len(ids))
    tokens.append(end)
    tasks.append(NO_TASK)
    loss.append(True)
    loss[0] = False
    return Tokenized(np.asarray(tokens, np.int32), np.asarray(loss), np.asarray(tasks, np.int32))


@functools.lru_cache(maxsize=8)
def takes(tokenizer: Any, *roles: str) -> bool:
    """Whether there is a chat template that takes messages of these roles and writes down what they say."""
    try:
        text = render_chat(tokenizer, [{"role": role, "content": "Yes."} for role in roles], "messages")
    except InputError:
        return False
    return text.count("Yes.") >= len(roles)


def converse(
    parts: Sequence[tuple[Example, int]], tokenizer: Any, end: int, *, prompt_loss: bool, system: str | None = None
) -> Tokenized:
    """A conversation that asks and answers each part's example in turn, by the tokenizer's chat template.

    A router of tokens cannot route what it never read: of tasks as plain text alone it learns nothing of the same tasks
    inside a template, and, where background comes as messages, that the template is nobody's. Every token of a turn's
    messages is labelled with its task, and so is what the template writes before the answer, at whose end the answer's
    first token is chosen; all else that the template and `system` write belongs to none. The end token is the last
    turn's, whose adapter ends the answer.

    Raises:
        InputError: the tokenizer has no chat template, or it refuses the messages.
    """
    messages: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    owners = [NO_TASK] * len(messages)
    for example, task in parts:
        own = [*turn_messages(example), {"role": ANSWERS, "content": example.response.strip()}]
        messages, owners = messages + own, owners + [task] * len(own)
    text = render_chat(tokenizer, messages, parts[0][0].where or "messages")
    spans: list[tuple[int, int, bool]] = []  # of the messages: where each ends, its task, and whether it is an answer
    starts, place = [], 0
    for message, owner, at in zip(messages, owners, _places(tokenizer, messages, text), strict=True):
        if at is not None:
            starts.append(at[0])
            place = at[1]
            spans.append((place, owner, message["role"] == ANSWERS))
    # without what the template writes behind the last answer: the end token stands for it
    read = tokenizer(text[:place], return_offsets_mapping=True, add_special_tokens=False)
    tasks, loss = [], []
    for first, last in read["offset_mapping"]:
        at = int(np.searchsorted(starts, last - 1, "right")) - 1  # a token may begin with the space before a message
        inside = last > first and at >= 0 and last <= spans[at][0]
        following = spans[at + 1] if at + 1 < len(spans) else None
        before_answer = following is not None and following[2] and last <= starts[at + 1]
        tasks.append(spans[at][1] if inside else following[1] if before_answer and following else NO_TASK)
        loss.append(prompt_loss or (inside and spans[at][2]))
    loss[0] = False
    ids = np.asarray([*read["input_ids"], end], np.int32)
    return Tokenized(ids, np.asarray([*loss, True]), np.asarray([*tasks, parts[-1][1]], np.int32))


def _places(tokenizer: Any, messages: Sequence[Message], text: str) -> list[tuple[int, int] | None]:
    """Where each message stands in the rendered text, from its first character that is no space to its last."""
    own = [message["content"].strip() for message in messages]  # as many templates have it
    frame = _frame(tokenizer, tuple(message["role"] for message in messages))
    for contents in (own, [message["content"] for message in messages]):
        places, built = [], frame[0] if frame else ""
        for content, stripped, after in zip(contents, own, frame[1:], strict=False):
            start = len(built) + content.find(stripped)
            places.append((start, start + len(stripped)))
            built += content + after
        if frame and built == text:
            return places
    # a template that writes messages otherwise: each is looked for behind the one before
    found: list[tuple[int, int] | None] = []
    place = 0
    for said in own:
        start = text.find(said, place)
        found.append(None if start < 0 else (start, place := start + len(said)))
    return found


@functools.lru_cache(maxsize=256)
def _frame(tokenizer: Any, roles: tuple[str, ...]) -> tuple[str, ...]:
    """What the chat template writes before, between and behind messages of these roles; empty: no such text."""
    marks = [f"\ue000{i}\ue000" for i in range(len(roles))]
    try:
        rest = render_chat(tokenizer, [{"role": r, "content": m} for r, m in zip(roles, marks, strict=True)], "frame")
    except InputError:
        return ()
    pieces = []
    for mark in marks:
        before, found, rest = rest.partition(mark)
        if not found or mark in rest:
            return ()
        pieces.append(before)
    return (*pieces, rest)


def shortened(example: Example) -> Example:
    """The beginning and end of a question and the beginning of its answer, enough to know their task: shorter examples
    give more segments in as many tokens."""
    messages = tuple({**message, "content": _ends(message["content"])} for message in example.messages)
    prompt, response = _ends(example.prompt), example.response[: CUT[1]]
    return dataclasses.replace(example, prompt=prompt, response=response, messages=messages)


def _ends(text: str) -> str:
    first, last = CUT
    return text if len(text) <= first + last else text[:first] + text[-last:]
