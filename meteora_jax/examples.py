"""Examples: what a model reads, and the answer that it should write. A line of a task's file is one.

A line is `{"prompt": text, "response": text}`, or a conversation `{"messages": [...]}` whose last message, the
assistant's, is the response. A prompt may be messages, too: `{"prompt": [...], "response": text}`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from meteora_jax.config import InputError, LlamaConfig
from meteora_jax.prompts import Message, last_text, read_messages, render_chat, user_text
from meteora_jax.text import check_text

ANSWERS = "assistant"  # the role whose message is the response


@dataclass(frozen=True)
class Example:
    """One problem of a task.

    prompt: the text that the model reads; of messages, what the user says in them.
    messages: what the chat template makes the model's text of; none where the prompt is that text. where: FILE:LINE.
    """

    prompt: str
    response: str
    messages: tuple[Message, ...] = field(default=(), hash=False, kw_only=True)
    where: str = field(default="", compare=False, kw_only=True)

    @property
    def key(self) -> str:
        """What the model reads, as one text that is another's only if that one reads the same."""
        return json.dumps(self.messages) if self.messages else self.prompt

    @property
    def request(self) -> str:
        """What a retrieval reads of it: the text, or what the user says last."""
        return last_text(self.prompt, self.messages)

    @property
    def asked(self) -> str | list[Message]:
        """The prompt as a model takes it: text or messages."""
        return list(self.messages) or self.prompt


def parse_example(line: bytes, where: str) -> Example:
    """The example of one line of a task's file; `where` begins the message of a refusal.

    Raises:
        InputError: it is no example, or a conversation in which nothing is to be answered.
    """
    record = parse_record(line, where)
    if "messages" in record:
        if both := [key for key in ("prompt", "response") if key in record]:
            raise InputError(f"{where}: expected messages alone, found {' and '.join(both)} beside them")
        *asked, last = read_conversation(record["messages"], f"{where}: messages")
        if last["role"] != ANSWERS:
            found = f"the {last['role']}'s message"
            raise InputError(f"{where}: messages: expected the assistant's answer at the end, found {found}")
        return of_messages(asked, last["content"], f"{where}: messages", where)
    for key in ("prompt", "response"):
        if key not in record:
            raise InputError(f"{where}: {key}: expected a string, found only the keys {sorted(record)}")
    prompt, response = record["prompt"], record["response"]
    if not isinstance(prompt, list):
        prompt = _text(prompt, f"{where}: prompt")
    response = _text(response, f"{where}: response")
    if isinstance(prompt, list):
        return of_messages(read_conversation(prompt, f"{where}: prompt"), response, f"{where}: prompt", where)
    return Example(prompt, response, where=where)


def parse_record(line: bytes, where: str) -> dict[str, Any]:
    """The JSON object of a line."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, or beyond Python's own limits
        found = _shortened(line.decode(errors="replace"))
        raise InputError(f"{where}: expected a JSON object, found {found} ({error})") from None
    if not isinstance(record, dict):
        raise InputError(f"{where}: expected a JSON object, found {_shortened(record)}")
    return record


def read_conversation(value: Any, where: str) -> list[Message]:
    """A list of messages, each with a role and a content."""
    if not isinstance(value, list) or not value or not all(isinstance(part, dict) for part in value):
        raise InputError(f"{where}: expected a list of messages, found {_shortened(value)}")
    return read_messages(value, where)


def record_of(example: Example) -> dict[str, Any]:
    """An example as a line of a task's file holds it."""
    if example.messages:
        return {"messages": [*example.messages, {"role": ANSWERS, "content": example.response}]}
    return {"prompt": example.prompt, "response": example.response}


def prompt_text(example: Example, tokenizer: Any) -> str:
    """What the model reads: the prompt, or the messages by the tokenizer's chat template, up to where the assistant's
    message begins.

    Raises:
        InputError: there is no template, or it refuses the messages.
    """
    if not example.messages:
        return example.prompt
    return render_chat(tokenizer, example.messages, example.where or "messages", add_generation_prompt=True)


def prompt_ids(examples: Sequence[Example], tokenizer: Any) -> list[list[int]]:
    """The token ids of what the model reads; a chat template writes special tokens itself, for text the tokenizer
    adds them."""
    texts = [prompt_text(example, tokenizer) for example in examples]
    ids: list[list[int]] = [[] for _ in texts]
    for chat in (False, True):
        places = [i for i, example in enumerate(examples) if bool(example.messages) is chat]
        if places:
            own = [texts[i] for i in places]
            found = tokenizer(own, return_attention_mask=False, add_special_tokens=not chat)["input_ids"]
            for i, row in zip(places, found, strict=True):
                ids[i] = list(row)
    return ids


def end_token(base: str | os.PathLike[str], config: LlamaConfig, tokenizer: Any) -> int:
    """What a response ends with: the tokenizer's own end token if generation stops at it, else the first at which it
    does. Of a model that talks the former ends a turn, and the latter may end a text.

    Raises:
        InputError: the base has no end token.
    """
    if not config.eos_token_ids:
        raise InputError(f"{base}: eos_token_id: expected an end token, found none")
    own = tokenizer.eos_token_id
    return own if own in config.eos_token_ids else config.eos_token_ids[0]


def as_text(example: Example, tokenizer: Any) -> Example:
    """The example as plain text: of messages what `prompt_text` gives, without the token that the tokenizer puts before
    every text itself. Texts that stand in one prompt then have that token once."""
    if not example.messages:
        return example
    text, first = prompt_text(example, tokenizer), tokenizer.bos_token
    if first and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]:
        text = text.removeprefix(first)
    return replace(example, prompt=text, messages=())


def turn_messages(example: Example) -> list[Message]:
    """An example's messages inside a conversation; its system messages begin the user's first."""
    if not example.messages:
        return [{"role": "user", "content": example.prompt.strip()}]
    system = [m["content"] for m in example.messages if m["role"] == "system"]
    rest = [dict(m) for m in example.messages if m["role"] != "system"]
    first = next((m for m in rest if m["role"] == "user"), None)
    if first is None:
        raise InputError(f"{example.where}: expected a message of the user's in a conversation, found none")
    first["content"] = "\n".join([*system, first["content"]])
    return rest


def of_messages(asked: list[Message], response: str, place: str, where: str) -> Example:
    """The example of a conversation and its answer; `place` begins the message of a refusal.

    Raises:
        InputError: nothing is asked, or it is answered already.
    """
    if not asked:
        raise InputError(f"{place}: expected a message before the assistant's answer, found none")
    if asked[-1]["role"] == ANSWERS:
        raise InputError(f"{place}: expected a conversation that awaits the assistant, found one that it has answered")
    return Example(user_text(asked), response, messages=tuple(asked), where=where)


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise InputError(f"{where}: expected a string, found {_shortened(value)}")
    check_text(value, where)
    return value


def _shortened(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
