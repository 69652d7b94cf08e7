"""What clients send: OpenAI's requests as far as they are served, and what this server knows beside them.

A field that would change an answer and is not served is refused, never passed over; those that only label a request are
read and dropped (`Labels`).
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

MOST_CHOICES, MOST_TOP, MOST_STOPS = 128, 20, 16
Finite = Annotated[float, Field(allow_inf_nan=False)]
Name = Annotated[str, Field(min_length=1, max_length=512)]
TokenIds = Annotated[list[Annotated[int, Field(ge=0, le=2**31 - 1)]], Field(min_length=1)]


def _not_served(value: Any) -> Any:
    """Lets through what asks for nothing: 0, or an empty text or object."""
    if not value:
        return value
    if isinstance(value, float):
        nothing, found = "0", f"{value:g}"
    else:
        nothing, found = "''" if isinstance(value, str) else "{}", f"one of length {len(value)}"
    raise ValueError(f"expected {nothing} (not supported by this server), found {found}")


def _can_stop(value: str | list[str] | None) -> str | list[str] | None:
    if value == "" or (isinstance(value, list) and "" in value):
        raise ValueError("expected texts, found an empty one")
    return value


NotServed = AfterValidator(_not_served)
Nothing = Annotated[Finite | None, NotServed, Field(description="not served: 0 or absent")]


class Given(BaseModel):
    """An object of which a null field is one that is absent, as OpenAI's API and its clients have it."""

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, given: Any) -> Any:
        return {k: v for k, v in given.items() if v is not None} if isinstance(given, dict) else given


class Labels(Given):
    """Fields of OpenAI's that change no answer."""

    model_config = ConfigDict(extra="forbid")

    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None


class StreamOptions(Given):
    """What a stream says beside its text. include_usage: a last chunk with the usage and no choice."""

    include_usage: bool = False
    include_obfuscation: bool | None = None


class Asked(Labels):
    """What chat and text completions share.

    router: {adapter: weight}, a mixture, beside the base's name as the model. routing: true adds `meteora` to the reply
    (`replies.Meteora`), "full" the choices of every layer as well.
    """

    model: Name
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] = 1
    stop: Annotated[str | Annotated[list[str], Field(max_length=MOST_STOPS)] | None, AfterValidator(_can_stop)] = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**64 - 1)] | None = None
    temperature: Annotated[Finite, Field(ge=0, le=100)] | None = None
    top_p: Annotated[Finite, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = None
    presence_penalty: Nothing = None
    frequency_penalty: Nothing = None
    logit_bias: Annotated[dict[str, float] | None, NotServed, Field(description="not served: empty or absent")] = None
    response_format: dict[str, Any] | None = None
    router: Annotated[dict[str, Finite], Field(min_length=1, max_length=64)] | None = None
    routing: bool | Literal["full"] = False

    def stops(self) -> tuple[str, ...]:
        """The texts that end a response."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class CompletionRequest(Asked):
    """`POST /v1/completions`. max_tokens may be 0 with `echo`: the prompt is scored and nothing is written."""

    prompt: Annotated[
        str | TokenIds | Annotated[list[str | TokenIds], Field(min_length=1, max_length=MOST_CHOICES)], Field()
    ]
    max_tokens: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = 16
    echo: bool = False
    logprobs: Annotated[int, Field(ge=0, le=MOST_TOP)] | None = None
    best_of: int | None = None
    suffix: Annotated[str | None, NotServed, Field(description="not served: empty or absent")] = None

    @model_validator(mode="after")
    def _served(self) -> CompletionRequest:
        if self.best_of not in (None, self.n):
            raise ValueError(f"best_of: expected n ({self.n}) or none, found {self.best_of}")
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens: expected at least 1 without echo, found 0")
        if self.echo and self.stream:
            raise ValueError("echo: expected stream false beside it, found true")
        return self


class TextPart(BaseModel):
    """A part of a message's content; others than text are not read."""

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One message; `content` as a text or as parts of text. Assistants' messages may have none beside tool calls."""

    model_config = ConfigDict(extra="allow")

    role: Annotated[str, Field(min_length=1, max_length=64)]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None

    def plain(self) -> dict[str, Any]:
        """As chat templates read it: a text, and tools' fields where there are any."""
        content = self.content
        if isinstance(content, list):
            content = "".join(part.text for part in content)
        message: dict[str, Any] = {"role": self.role, "content": content or ""}
        for key in ("name", "tool_calls", "tool_call_id"):
            if (value := getattr(self, key)) is not None:
                message[key] = value
        if self.tool_calls is not None:
            message["tool_calls"] = [_with_arguments(call) for call in self.tool_calls]
        return message


def _with_arguments(call: dict[str, Any]) -> dict[str, Any]:
    """A tool call with its arguments as an object, as templates write them; clients send its JSON as a text."""
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"])
    except (ValueError, RecursionError):
        return call
    return call | {"function": function | {"arguments": arguments}} if isinstance(arguments, dict) else call


class ToolFunction(BaseModel):
    """A function that the model may call; parameters: their JSON schema."""

    model_config = ConfigDict(extra="allow")

    name: Annotated[str, Field(min_length=1, max_length=256)]
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(BaseModel):
    """A tool of a chat request."""

    type: Literal["function"]
    function: ToolFunction


class ChatRequest(Asked):
    """`POST /v1/chat/completions`; without a limit the response may fill the context."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    modalities: list[Literal["text"]] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_TOP)] | None = None
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    tool_choice: Literal["auto", "none"] | None = None
    parallel_tool_calls: bool | None = None

    @model_validator(mode="after")
    def _served(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs: expected logprobs true beside it")
        return self

    @property
    def most(self) -> int | None:
        """The longest response in tokens."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class EmbeddingRequest(Labels):
    """`POST /v1/embeddings`. instruction: stands before every text, as the index' own does."""

    model: Name
    input: str | Annotated[list[str], Field(min_length=1, max_length=2048)]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: None = None
    instruction: str = ""


class TokenizeRequest(BaseModel):
    """`POST /tokenize`: a text, or messages through the chat template."""

    model_config = ConfigDict(extra="forbid")

    model: Name | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True

    @model_validator(mode="after")
    def _one(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("expected a prompt or messages, and not both")
        return self


class DetokenizeRequest(BaseModel):
    """`POST /detokenize`."""

    model_config = ConfigDict(extra="forbid")

    model: Name | None = None
    tokens: list[Annotated[int, Field(ge=0, le=2**31 - 1)]]


class LoadAdapterRequest(BaseModel):
    """`POST /v1/load_lora_adapter`. lora_path: a PEFT folder below --adapter-root. profiles: inputs that the adapter is
    for, by which the index finds it."""

    model_config = ConfigDict(extra="forbid")

    lora_name: Annotated[str, Field(min_length=1, max_length=256)]
    lora_path: Annotated[str, Field(min_length=1, max_length=4096)]
    profiles: Annotated[list[str], Field(min_length=1, max_length=20)] | None = None


class UnloadAdapterRequest(BaseModel):
    """`POST /v1/unload_lora_adapter`."""

    model_config = ConfigDict(extra="forbid")

    lora_name: Annotated[str, Field(min_length=1, max_length=256)]
    lora_int_id: int | None = None
