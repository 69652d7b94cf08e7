"""What a model is asked: text, messages, or token ids, distinguished and checked; messages by the chat template."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from meteora_jax.config import InputError
from meteora_jax.text import check_text

Message = dict[str, Any]  # {"role": ..., "content": ...}, both texts, and what else a chat template reads
Prompt = str | Sequence[Message]
Read = str | list[Message] | list[int]  # a prompt after its check


def read_prompts(prompts: Any) -> list[Read]:
    """A caller's list of prompts, each checked.

    Raises:
        InputError: no list (one text, one conversation, the ids of one prompt), or all that is wrong with its prompts.
    """
    rows = _read_list("prompts", prompts, "a list of prompts")
    if rows and all(isinstance(row, Mapping) for row in rows):
        raise InputError("prompts: expected a list of prompts, found the messages of one: put them into a list")
    read, problems = [], []
    for i, row in enumerate(rows):
        try:
            read.append(read_prompt(row, f"prompt {i}"))
        except InputError as e:
            problems += e.problems
    if problems:
        raise InputError(problems)
    return read


def read_prompt(prompt: Any, where: str) -> Read:
    """One prompt: text, messages with a role and a content each, or token ids.

    Raises:
        InputError: none of them, or text that UTF-8 cannot hold; lines that begin with `where`.
    """
    if isinstance(prompt, str):
        check_text(prompt, where)
        return prompt
    parts = _as_list(prompt)
    if parts is not None and parts and all(isinstance(part, Mapping) for part in parts):
        return read_messages(parts, where)
    if parts is None or not all(map(_is_token_id, parts)):
        raise InputError(f"{where}: expected a text, a list of messages or a list of token ids, found {prompt!r:.200}")
    return [int(token) for token in parts]


def is_messages(prompt: Read) -> bool:
    """Whether a prompt is messages, as `read_prompt` returns them; token ids and text are none."""
    return not isinstance(prompt, str) and any(isinstance(part, dict) for part in prompt[:1])


def read_token_ids(token_ids: Any) -> list[list[int]]:
    """Rows of token ids, [B, T] or lists of any lengths.

    Raises:
        InputError: no rows (the ids of one prompt alone), or rows of something else; all of them.
    """
    rows, problems = [], []
    for i, row in enumerate(_read_list("token_ids", token_ids, "rows of token ids")):
        ids = _as_list(row)
        if ids is None or not all(map(_is_token_id, ids)):
            problems.append(f"token_ids: row {i}: expected a list of token ids, found {row!r:.200}")
        else:
            rows.append([int(token) for token in ids])
    if problems:
        raise InputError(problems)
    return rows


def user_text(messages: Sequence[Message]) -> str:
    """What the user says in a conversation, all of it."""
    return "\n".join(message["content"] for message in messages if message["role"] == "user")


def user_texts(messages: Sequence[Message]) -> tuple[str, ...]:
    """What the user says in a conversation, message by message: what a retrieval chooses from. Blank messages say
    nothing and are left out."""
    said = (message["content"] for message in messages if message["role"] == "user")
    return tuple(text for text in said if text.strip())


def last_text(prompt: str, messages: Sequence[Message]) -> str:
    """What a retrieval reads of a request unless told otherwise: the text, or of messages what the user says last."""
    return prompt if not messages else (user_texts(messages) or ("",))[-1]


def render_chat(tokenizer: Any, messages: Sequence[Message], where: str, **options: Any) -> str:
    """The messages as one text, by the tokenizer's chat template; `options` are apply_chat_template's.

    Raises:
        InputError: there is no template, or it refuses the messages; one line that begins with `where`.
    """
    if not tokenizer.chat_template:
        raise InputError(f"{where}: expected a tokenizer with a chat template for messages, found one without")
    try:
        text = tokenizer.apply_chat_template(list(messages), tokenize=False, **options)
    except Exception as e:  # a template is a program that came with the checkpoint, and may raise anything
        said = str(e) or type(e).__name__
        raise InputError(f"{where}: expected messages that the chat template takes, found its refusal: {said}") from e
    check_text(text, f"{where}: by the chat template")
    return text


def encode(tokenizer: Any, prompt: Any, where: str) -> list[int]:
    """A prompt of `read_prompt` -> token ids: text as the tokenizer does by itself, messages by the chat template.

    Raises:
        InputError: as `render_chat`.
    """
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"])
    if not is_messages(prompt):
        return prompt
    rendered = render_chat(tokenizer, prompt, where, add_generation_prompt=True)
    return list(tokenizer(rendered, add_special_tokens=False)["input_ids"])


def _read_list(name: str, value: Any, expected: str) -> list[Any]:
    rows = _as_list(value)
    if isinstance(value, str):
        raise InputError(f"{name}: expected {expected}, found a single text")
    if rows is None:
        raise InputError(f"{name}: expected {expected}, found {value!r:.200}")
    if rows and all(map(_is_token_id, rows)):
        raise InputError(f"{name}: expected {expected}, found the token ids of one: put them into a list")
    return rows


def _as_list(value: Any) -> list[Any] | None:
    """The parts of a list, an array's first axis or another iterable; None for what is one thing: a text, an object."""
    if hasattr(value, "__array__"):  # numpy's, jax', torch's
        return np.asarray(value).tolist() if np.ndim(value) else None
    return None if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable) else list(value)


def _is_token_id(value: Any) -> bool:
    if isinstance(value, bool) or np.ndim(value):
        return False
    try:
        operator.index(value)
    except TypeError:
        return False
    return True


def read_messages(messages: Sequence[Any], where: str) -> list[Message]:
    """Messages, each with a role and a content.

    Raises:
        InputError: all that is wrong with them, in lines that begin with `where`.
    """
    problems = []
    for i, message in enumerate(messages):
        for key in ("role", "content"):
            found = message.get(key)
            if not isinstance(found, str):
                shown = f"{found!r:.200}" if key in message else "none"
                problems.append(f"{where}: message {i}: {key}: expected a text, found {shown}")
                continue
            try:
                check_text(found, f"{where}: message {i}: {key}")
            except InputError as e:
                problems += e.problems
    if problems:
        raise InputError(problems)
    return [dict(message) for message in messages]
