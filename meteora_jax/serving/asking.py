"""From a client's request to what the engine is asked. Runs in a thread of its own: it tokenizes and retrieves."""

from __future__ import annotations

import contextlib
import dataclasses
import secrets
from collections.abc import Iterator, Sequence
from typing import Any

from meteora_jax.api import Meteora
from meteora_jax.config import InputError
from meteora_jax.engine import Request, Sampling
from meteora_jax.engine.request import check_prompts
from meteora_jax.prompts import read_messages, read_prompt, render_chat, user_texts
from meteora_jax.routing import RouterArgument
from meteora_jax.routing.retrieval import Found, Said
from meteora_jax.serving.errors import ApiError
from meteora_jax.serving.guides import Grammars
from meteora_jax.serving.models import Fleet, mixture
from meteora_jax.serving.schemas import MOST_TOP, Asked, ChatRequest, CompletionRequest
from meteora_jax.serving.spelling import Spelling

LIKELY = (1, 5, MOST_TOP)  # of likeliest tokens in programs: each number is a program of its own


@dataclasses.dataclass(frozen=True)
class Work:
    """What the engine is asked of a model: n requests for each prompt, one after the other.

    routers: after their look-up, one a prompt. found: what was retrieved for each prompt. most: the longest response.
    """

    model: Meteora
    prompts: list[list[int]]
    requests: list[Request]
    routers: list[RouterArgument]
    found: list[Found]
    top: int | None

    def owner(self, index: int) -> int:
        """Whose prompt a response is."""
        return index * len(self.prompts) // len(self.requests)


def chat_work(fleet: Fleet, grammars: Grammars, positions: int, body: ChatRequest) -> Work:
    """Of `/v1/chat/completions`. positions: how many the engine has for one request."""
    model = fleet.model
    options: dict[str, Any] = {}
    if body.tools and body.tool_choice != "none":
        options["tools"] = [tool.model_dump(exclude_none=True) for tool in body.tools]
    with _about("messages"):
        messages = read_messages([message.plain() for message in body.messages], "messages")
        rendered = render_chat(model.tokenizer, messages, "messages", add_generation_prompt=True, **options)
        ids = list(model.tokenizer(rendered, add_special_tokens=False)["input_ids"])
        longest = _room(model, positions, [ids], body.most)
    top = (body.top_logprobs or 0) if body.logprobs else None
    return _work(fleet, grammars, longest, body, [ids], [user_texts(messages)], body.most, top)


def text_work(fleet: Fleet, grammars: Grammars, positions: int, spelling: Spelling, body: CompletionRequest) -> Work:
    """Of `/v1/completions`, whose texts continue the prompts'."""
    model, most = fleet.model, 16 if body.max_tokens is None else body.max_tokens
    one = isinstance(body.prompt, str) or isinstance(body.prompt[0], int)
    given: Sequence[Any] = [body.prompt] if one else body.prompt
    with _about("prompt"):
        read: list[Any] = [read_prompt(prompt, f"prompt {i}") for i, prompt in enumerate(given)]
        prompts = [list(model.tokenizer(text)["input_ids"]) if isinstance(text, str) else text for text in read]
        longest = _room(model, positions, prompts, most)
    said: list[Said] = [text if isinstance(text, str) else model.decode_tokens(text) for text in read]
    work = _work(fleet, grammars, longest, body, prompts, said, most, body.logprobs)
    for i, request in enumerate(work.requests):
        if said[work.owner(i)]:
            work.requests[i] = dataclasses.replace(request, decode=spelling.behind)
    return work


@contextlib.contextmanager
def _about(field: str) -> Iterator[None]:
    """Refusals within are of a field of the request."""
    try:
        yield
    except InputError as e:
        raise ApiError(400, "; ".join(e.problems), param=field) from None
    except ApiError as e:
        e.param = field
        raise


def _room(model: Meteora, positions: int, prompts: list[list[int]], most: int | None) -> int:
    """How many tokens prompt and response may have together.

    Raises:
        ApiError: they have more.
        InputError: a prompt without a token, or with unknown ones.
    """
    longest = min(positions, model.config.max_position_embeddings)
    response = "1 of the response at least" if most is None else f"{most} of the response"
    for i, ids in enumerate(prompts):
        if len(ids) + (1 if most is None else most) > longest:
            found = f"{len(ids)} of the prompt" + ("" if most == 0 else f" and {response}")
            message = f"prompt {i}: expected at most {longest} tokens (the context), found {found}"
            raise ApiError(400, message, code="context_length_exceeded")
    check_prompts(prompts, model.config, 0)
    return longest


def _work(
    fleet: Fleet, grammars: Grammars, longest: int, body: Asked, prompts: list[list[int]], said: list[Said],
    most: int | None, top: int | None,
) -> Work:  # fmt: skip
    model = fleet.model
    router: Any = mixture(fleet, body.model, body.router)
    routers, found = model.look_up([router] * len(prompts), len(prompts), lambda: said)
    grammar = grammars.read(body.response_format)
    sampling = _sampling(body)
    requests: list[Request] = []
    for ids, own in zip(prompts, routers, strict=True):  # pyright: ignore[reportArgumentType]
        if most == 0:
            continue
        asked = model.request(
            ids, own, longest - len(ids) if most is None else most, sampling, body.stops(),
            None if top is None else next(n for n in LIKELY if n >= top), trace=body.routing is not False,
        )  # fmt: skip
        for i in range(body.n):
            guide = None if grammar is None else grammars.guide(grammar)
            own_draws = dataclasses.replace(sampling, index=i)
            requests.append(dataclasses.replace(asked, sampling=own_draws, guide=guide))
    return Work(model, prompts, requests, list(routers), found, top)  # pyright: ignore[reportArgumentType]


def _sampling(body: Asked) -> Sampling:
    """OpenAI's own defaults: temperature 1, and other draws at every call unless there is a seed."""
    seed = secrets.randbits(31) if body.seed is None else (body.seed + 2**31) % 2**32 - 2**31
    temperature = 1.0 if body.temperature is None else body.temperature
    top_p = None if body.top_p in (None, 1.0) else max(body.top_p, 1e-6)
    top_k = None if body.top_k in (None, -1, 0) else body.top_k
    try:
        return Sampling(temperature, top_k, top_p, seed)
    except InputError as e:
        raise ApiError(400, "; ".join(e.problems)) from None
