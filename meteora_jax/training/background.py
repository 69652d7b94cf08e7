"""Text of none of the adapters' tasks, by which gates learn to choose none: from files, and by the base itself."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from meteora_jax.config import InputError, numbered_lines, read_lines
from meteora_jax.engine import Request, Sampling
from meteora_jax.examples import Example, as_text, of_messages, parse_example, record_of
from meteora_jax.generation import Engines
from meteora_jax.io.base import load_base, sample_digest
from meteora_jax.io.files import whole_file
from meteora_jax.io.model_state import assemble
from meteora_jax.prompts import is_messages, read_prompt, render_chat
from meteora_jax.retriever.wording import shared_frame
from meteora_jax.text import check_text, load_tokenizer, tokenizer_digest

NULL = "(no adapter)"  # the name of what is no adapter's task, where tasks are named
SELF = "self"  # the source that is the base itself
COUNT = 256  # examples that the base writes
TOKENS = 64  # of each of its prompts and responses, at most
ROWS = 64  # written at a time
ROUNDS = 4  # as many batches as the examples need, times this, before the base is said to write none
LOOKED_AT = 100  # prompts of a task, to know its frame by
HERE = "\ue000 what the user says \ue000"  # stands in a rendered chat where the user's words belong


def load_background(
    sources: Sequence[str | os.PathLike[str]],
    base: str | os.PathLike[str],
    *,
    dtype: str,
    seed: int = 0,
    mesh: Mesh | None = None,
    kept: Path | None = None,
    count: int = COUNT,
) -> list[Example]:
    """The examples of all sources, files or `SELF`, in their order.

    Args:
        kept: a file that gets what the base wrote. It stands for the base where the same one wrote it with the same
            arguments, or where there are checkpoints beside it: these say themselves which run may go on.

    Raises:
        InputError: files with bad lines or none, a base without a chat template for `SELF`.
    """
    tokenizer, found = load_tokenizer(base), []
    for source in sources:
        if str(source) != SELF:
            found += read_background(source, tokenizer)
        elif kept is None:
            found += write_background(base, count, dtype=dtype, seed=seed, mesh=mesh)
        else:
            config, weights = load_base(base, jnp.dtype(dtype))
            made = {
                "base": sample_digest(weights), "config": hashlib.sha256(repr(config).encode()).hexdigest()[:16],
                "tokenizer": tokenizer_digest(base), "dtype": dtype, "seed": seed, "count": count,
            }  # fmt: skip
            lines = _of_first(_kept(kept, made) if jax.process_index() == 0 else None)
            if lines is None:
                own = write_background(base, count, dtype=dtype, seed=seed, mesh=mesh)
                if jax.process_index() == 0:
                    _keep(kept, made, own)
                found += own
            else:
                found += _examples(numbered_lines(lines, kept), tokenizer)
    return found


def _keep(file: Path, made: Mapping[str, Any], examples: Sequence[Example]) -> None:
    """Writes examples, and into the first one's line what they were made of."""
    records = [record_of(example) for example in examples]
    records[0] |= {"made": made}
    file.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(file) as partial, partial.open("w", encoding="utf-8") as opened:
        opened.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def _kept(file: Path, made: Mapping[str, Any]) -> bytes | None:
    """What a file holds, if it was made of that or belongs to the checkpoints beside it."""
    if not file.is_file():
        return None
    content = file.read_bytes()
    if content and any(step.name.isdigit() for step in file.parent.glob("checkpoints/*")):
        return content
    try:
        first = json.loads(content.partition(b"\n")[0])
    except (ValueError, RecursionError):
        return None
    return content if isinstance(first, dict) and first.get("made") == made else None


def _of_first(content: bytes | None) -> bytes | None:
    """The first process' value, on all: they may have no disk in common."""
    if jax.process_count() == 1:
        return content
    from jax.experimental import multihost_utils

    size = int(multihost_utils.broadcast_one_to_all(np.int32(-1 if content is None else len(content))))
    if size < 0:
        return None
    own = np.zeros(size, np.uint8) if content is None else np.frombuffer(content, np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(own)).tobytes()


def read_background(path: str | os.PathLike[str], tokenizer: Any) -> list[Example]:
    """The examples of a file: JSON lines by the ending .jsonl, any other is plain text, a line an example.

    A JSON line has a "prompt", as it is, and a "response" if there is one; or "messages", which the base's chat
    template makes a prompt, the last an assistant's for a response. Half of a plain line stands for the prompt.
    """
    path = Path(path)
    if path.suffix == ".jsonl":
        examples = _examples(read_lines(path), tokenizer)
    else:
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as e:
            said = getattr(e, "strerror", None) or "not UTF-8"
            raise InputError(
                f"{path}: expected a file of background text, or {SELF!r}: cannot be read ({said})"
            ) from None
        examples = [_halves(line.strip()) for line in lines if line.strip()]
    if not examples:
        raise InputError(f"{path}: expected background text, found none")
    return examples


def _examples(lines: Sequence[tuple[str, bytes]], tokenizer: Any) -> list[Example]:
    examples = [_of_json(line, where) for where, line in lines]
    for example in examples:
        as_text(example, tokenizer)  # a chat template may refuse its messages
    return examples


def _of_json(line: bytes, where: str) -> Example:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict) or not record.keys() & {"prompt", "messages"}:
        found = line.decode(errors="replace")[:60]
        raise InputError(f'{where}: expected {{"prompt": ...}} or {{"messages": [...]}}, found {found!r}')
    if "messages" not in record:
        return parse_example(json.dumps({"response": "", **record}).encode(), where)
    messages: Any = read_prompt(record["messages"], f"{where}: messages")
    if not is_messages(messages):
        raise InputError(f"{where}: messages: expected a list of messages, found {record['messages']!r:.60}")
    response = ""
    if messages[-1]["role"] == "assistant":
        *messages, last = messages
        response = last["content"]
    if not messages:
        raise InputError(f"{where}: messages: expected some before the assistant's, found none")
    return of_messages(messages, response, f"{where}: messages", where)


def _halves(text: str) -> Example:
    middle = text.find(" ", len(text) // 2)
    middle = middle if middle > 0 else len(text)
    check_text(text, "background")
    return Example(text[:middle], text[middle:])


def write_background(
    base: str | os.PathLike[str], count: int, *, dtype: str, seed: int = 0, mesh: Mesh | None = None
) -> list[Example]:
    """Prompts and responses that the base writes by itself at temperature 1 (Magpie, arXiv 2406.08464).

    Its chat template up to where the user's words belong is all that it is given: what it goes on with is a prompt, and
    what it then answers the response. Prompts without an end within TOKENS are left out.

    Raises:
        InputError: the base has no chat template, or writes no prompts that end.
    """
    tokenizer, kind = load_tokenizer(base), jnp.dtype(dtype)
    config, weights = load_base(base, kind)
    graph, state = assemble(config, weights, None, None, kind, mesh)
    engines = Engines(graph, state, config, mesh, None)
    rendered = render_chat(tokenizer, [{"role": "user", "content": HERE}], f"{base}: background {SELF!r}")
    before, here, _ = rendered.partition(HERE)
    if not here:
        raise InputError(
            f"{base}: background {SELF!r}: expected a chat template that keeps the user's words, found none"
        )

    def go_on(prompts: list[str], number: int) -> tuple[list[str], list[bool]]:
        """What the base writes behind each text, and whether it ended by itself."""
        ids = tokenizer(prompts, add_special_tokens=False)["input_ids"]
        how = [Sampling(1.0, seed=1000 * seed + number, index=i) for i in range(len(ids))]
        asked = [Request(tuple(row), TOKENS, sampling=one) for row, one in zip(ids, how, strict=True)]
        engine = engines.holding(asked)
        handles = [engine.submit(request) for request in asked]
        engine.drain()
        rows = [handle.progress.tokens for handle in handles]
        texts = [tokenizer.decode(row, skip_special_tokens=True).strip() for row in rows]
        return texts, [len(row) < TOKENS for row in rows]

    found: list[Example] = []
    for number in range(0, 2 * ROUNDS * -(-count // ROWS), 2):
        if len(found) >= count:
            break
        said, ended = go_on([before] * ROWS, number)
        asked = [text for text, whole in zip(said, ended, strict=True) if whole and text]
        if not asked:
            continue
        chats = [[{"role": "user", "content": text}] for text in asked]
        whole = [render_chat(tokenizer, chat, str(base), add_generation_prompt=True) for chat in chats]
        padded = whole + whole[-1:] * (ROWS - len(whole))  # one program
        answers, _ = go_on(padded, number + 1)
        said_to = zip(chats, answers, strict=False)
        found += [of_messages(chat, answer, f"{base}: background {SELF!r}", str(base)) for chat, answer in said_to]
    if not found:
        raise InputError(
            f"{base}: background {SELF!r}: expected prompts of at most {TOKENS} tokens, found none that end"
        )
    return found[:count]


def in_frames(background: Sequence[Example], tasks: Mapping[str, Sequence[Example]], tokenizer: Any) -> list[Example]:
    """Background as it is and once more in the tasks' own frames, one after the other: gates would else tell a task by
    the "[INST] ... [/INST]" around it.

    A frame is what two tasks or more have around all that they ask, a chat template's with its system prompt among
    them; of a single task it cannot be told from the task's own wording.
    """
    texts = {n: [as_text(e, tokenizer).prompt for e in _spread(examples)] for n, examples in tasks.items()}
    ends: dict[tuple[str, str], list[list[str]]] = {}
    for own in texts.values():  # tasks that may have a frame in common: most of each begin and end with the same word
        words = [text.split() or [""] for text in own]
        first, last = (Counter(w[at] for w in words).most_common(1)[0][0] for at in (0, -1))
        ends.setdefault((first, last), []).append(own)
    frames = [frame for group in ends.values() if any(frame := shared_frame(group))]
    found = list(background)
    for i, example in enumerate(background if frames else ()):
        framed = frames[i % len(frames)].around(example.request)
        if framed != as_text(example, tokenizer).prompt:
            found.append(Example(framed, example.response))
    return found


def _spread(examples: Sequence[Example]) -> list[Example]:
    """At most `LOOKED_AT` of them, from the first to the last."""
    count = min(LOOKED_AT, len(examples))
    return [examples[i * len(examples) // count] for i in range(count)]


def with_background(lengths: Mapping[str, object], share: float) -> dict[str, float]:
    """{name: how often its sequences are drawn}: background so large a share, all others alike."""
    others = [name for name in lengths if name != NULL]
    return {**dict.fromkeys(others, (1 - share) / len(others)), NULL: share}
