"""What clients get: OpenAI's objects, and `meteora`, which says who acted. They document the replies; the server writes
them as plain JSON."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict


class Led(BaseModel):
    """The share of a response's tokens that an adapter led; adapter null: the base alone."""

    adapter: str | None
    share: float


class Retrieved(BaseModel):
    """An adapter that the request's text found."""

    adapter: str
    similarity: float


class TokenRouting(BaseModel):
    """Who wrote one token.

    adapter: the one with the largest share of the weights, over all layers and projections, in the pass that drew the
    token; null where the base's share (what the null choice took, or all of it) is larger. weights: the up to four
    largest shares above 0, [adapter, share], largest first, in four digits; with the base's they add up to 1 at most.
    """

    text: str
    adapter: str | None
    weights: list[tuple[str, float]]


class Meteora(BaseModel):
    """`meteora` of a choice, with `"routing": true` in the request.

    In a stream every chunk has `tokens`: those drawn since the chunk before, whether or not their text was released
    with it (an incomplete character waits). The chunk with the finish_reason has `led` and `retrieved`, too; a reply
    that is no stream has all of them. trace: with `"routing": "full"`, of prompt and response as they were read:
    tokens, prompt_length, adapters, projections, and indices and weights [T][L][P][C].
    """

    tokens: list[TokenRouting] | None = None
    led: list[Led] | None = None
    retrieved: list[Retrieved] | None = None
    trace: dict[str, Any] | None = None


class Usage(BaseModel):
    """Tokens read and written."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: dict[str, int] | None = None


class ChatMessage(BaseModel):
    """What the model said."""

    role: str
    content: str | None
    refusal: str | None = None
    tool_calls: list[dict[str, Any]] | None = None


class ChatChoice(BaseModel):
    """One of n responses."""

    index: int
    message: ChatMessage
    logprobs: dict[str, Any] | None
    finish_reason: Literal["stop", "length", "tool_calls"]
    meteora: Meteora | None = None


class ChatCompletion(BaseModel):
    """Of `/v1/chat/completions`."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class TextChoice(BaseModel):
    """One of n responses to one of the prompts."""

    index: int
    text: str
    logprobs: dict[str, Any] | None
    finish_reason: Literal["stop", "length"]
    meteora: Meteora | None = None


class TextCompletion(BaseModel):
    """Of `/v1/completions`."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage


class ModelCard(BaseModel):
    """Something that can be asked for. root: what it runs on. most_k: the largest K of ":K" behind the name of a router
    that finds adapters."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None
    max_model_len: int
    kind: Literal["base", "adapter", "router"]
    most_k: int | None


class ModelList(BaseModel):
    """Of `/v1/models`."""

    object: Literal["list"]
    data: list[ModelCard]


class EmbeddingList(BaseModel):
    """Of `/v1/embeddings`."""

    object: Literal["list"]
    data: list[dict[str, Any]]
    model: str
    usage: dict[str, int]


class Tokens(BaseModel):
    """Of `/tokenize`."""

    tokens: list[int]
    count: int
    max_model_len: int


class Text(BaseModel):
    """Of `/detokenize`."""

    prompt: str


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class Error(BaseModel):
    """Of every refusal and failure."""

    model_config = ConfigDict(extra="forbid")

    error: ErrorDetail
