"""The routes."""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib import resources
from typing import Any

import numpy as np
from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.routing import Match
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from meteora_jax.prompts import read_messages, read_prompt, render_chat
from meteora_jax.retriever.encoder import TextEncoder
from meteora_jax.retriever.features import Encoder
from meteora_jax.serving import adapters, errors, models, replies
from meteora_jax.serving.completing import Chat, Text
from meteora_jax.serving.errors import ApiError, json_response
from meteora_jax.serving.limits import Gatekeeper
from meteora_jax.serving.metrics import CONTENT_TYPE
from meteora_jax.serving.schemas import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    LoadAdapterRequest,
    TokenizeRequest,
    UnloadAdapterRequest,
)
from meteora_jax.serving.server import Server, reply

CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; font-src 'self'; "
    "connect-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
)
REFUSALS: dict[int | str, dict[str, Any]] = {
    status: {"model": replies.Error} for status in (400, 401, 404, 405, 408, 413, 429, 499, 500, 503, 504)
}
ENCODER = "encoder"  # the name of the index' own, as a model


class Page:
    """ASGI: the folder `page` under a policy that lets it load nothing from elsewhere and run nothing inline."""

    def __init__(self) -> None:
        self._files = StaticFiles(directory=str(resources.files("meteora_jax.serving") / "page"), html=True)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves a file. What no route took comes here: an address that there is not is 404 by whatever method."""
        if scope["method"] not in ("GET", "HEAD"):
            taken = any(r.matches(scope)[0] is Match.PARTIAL for r in scope["app"].routes)
            raise HTTPException(405 if taken or scope["path"] == "/" else 404)

        async def with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                named = {"content-security-policy": CSP, "x-content-type-options": "nosniff",
                         "referrer-policy": "no-referrer", "cache-control": "no-cache"}  # fmt: skip
                message["headers"] = [*message["headers"], *((k.encode(), v.encode()) for k, v in named.items())]
            await send(message)

        await self._files(scope, receive, with_policy)


class Heads:
    """ASGI: HEAD, which monitors and balancers send, is answered as GET is, without the body."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on."""
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self.app(scope, receive, send)
            return

        async def without_body(message: Message) -> None:
            await send({**message, "body": b""} if message["type"] == "http.response.body" else message)

        await self.app({**scope, "method": "GET"}, receive, without_body)


def make_app(server: Server) -> FastAPI:
    """The routes of a server, which begins with the app and ends with it."""

    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        await server.start()
        try:
            yield
        finally:
            await server.stop()

    app = FastAPI(
        title="meteora", lifespan=life, docs_url=None, redoc_url=None, responses=REFUSALS,
        description="OpenAI's API over one model with many LoRA adapters inside.",
    )  # fmt: skip
    errors.install(app)
    _inference(app, server)
    _about(app, server)
    if server.settings.adapter_updates:
        _adapters(app, server)
    else:
        _no_adapters(app)
    app.mount("/", Page())
    app.add_middleware(Heads)
    app.add_middleware(Gatekeeper, settings=server.settings)
    if server.settings.origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=list(server.settings.origins), allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type"],
        )  # fmt: skip
    return app


def _inference(app: FastAPI, server: Server) -> None:
    @app.post("/v1/chat/completions", response_model=None, responses={200: {"model": replies.ChatCompletion}})
    async def chat_completions(request: Request, body: ChatRequest) -> Response:
        """Answers messages; with stream, as server-sent events."""
        return await reply(request, Chat(server, body).respond())

    @app.post("/v1/completions", response_model=None, responses={200: {"model": replies.TextCompletion}})
    async def completions(request: Request, body: CompletionRequest) -> Response:
        """Goes on with texts or token ids; with echo and logprobs, says how likely they are."""
        return await reply(request, Text(server, body).respond())

    if server.fleet.index is not None and server.fleet.index.encoder is not None:
        encoder = server.fleet.index.encoder

        @app.post("/v1/embeddings", response_model=None, responses={200: {"model": replies.EmbeddingList}})
        async def embeddings(body: EmbeddingRequest) -> Response:
            """Vectors of texts, by the index' encoder."""
            if body.model != ENCODER:
                raise errors.unknown_model(body.model, f"expected {ENCODER!r}, found another")
            texts = [body.input] if isinstance(body.input, str) else body.input
            for i, text in enumerate([*texts, body.instruction]):
                read_prompt(text, f"input {i}")
            async with server.admitted(1):
                vectors = await server.read(lambda: encoder.encode(texts, body.instruction))
                read = await server.read(lambda: _encoder_tokens(encoder, texts))
            data = [
                {"object": "embedding", "index": i, "embedding": _vector(vector, body.encoding_format)}
                for i, vector in enumerate(vectors)
            ]
            usage = {"prompt_tokens": read, "total_tokens": read}
            return json_response({"object": "list", "data": data, "model": body.model, "usage": usage})


def _encoder_tokens(encoder: Encoder, texts: list[str]) -> int:
    return sum(map(len, encoder.tokenize(texts))) if isinstance(encoder, TextEncoder) else 0


def _vector(vector: np.ndarray, form: str) -> list[float] | str:
    if form == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    return vector.tolist()


def _about(app: FastAPI, server: Server) -> None:
    @app.get("/v1/models", response_model=None, responses={200: {"model": replies.ModelList}})
    async def list_models() -> Response:
        """The base, its adapters, and the routers that are loaded."""
        return json_response({"object": "list", "data": [_card(server, *one) for one in models.names(server.fleet)]})

    @app.get("/v1/models/{name:path}", response_model=None, responses={200: {"model": replies.ModelCard}})
    async def one_model(name: str) -> Response:
        """One of them."""
        models.resolve(server.fleet, name)
        return json_response(_card(server, name, None if name == server.fleet.base else server.fleet.base))

    @app.post("/tokenize", response_model=None, responses={200: {"model": replies.Tokens}})
    async def tokenize(body: TokenizeRequest) -> Response:
        """Token ids of a text, or of messages through the chat template."""
        if body.model is not None:
            models.resolve(server.fleet, body.model)
        ids = await server.read(lambda: _tokens(server, body))
        most = server.fleet.model.config.max_position_embeddings
        return json_response({"tokens": ids, "count": len(ids), "max_model_len": most})

    @app.post("/detokenize", response_model=None, responses={200: {"model": replies.Text}})
    async def detokenize(body: DetokenizeRequest) -> Response:
        """The text of token ids, special tokens included."""
        if body.model is not None:
            models.resolve(server.fleet, body.model)
        vocabulary = server.fleet.model.config.vocab_size
        if strange := [token for token in body.tokens if token >= vocabulary]:
            raise ApiError(400, f"tokens: expected ids below {vocabulary}, found {strange[0]}", param="tokens")
        tokenizer = server.fleet.model.tokenizer
        text = await server.read(lambda: tokenizer.decode(body.tokens, clean_up_tokenization_spaces=False))
        return json_response({"prompt": text})

    @app.get("/tokenizer_info", response_model=None)
    async def tokenizer_info() -> dict[str, Any]:
        """What clients that tokenize by this server ask first (lm_eval)."""
        tokenizer = server.fleet.model.tokenizer
        special = {key: getattr(tokenizer, key) for key in ("bos_token", "eos_token", "pad_token", "unk_token")}
        return {**special, "chat_template": tokenizer.chat_template, "tokenizer_class": type(tokenizer).__name__}

    @app.get("/health", response_model=None)
    async def health() -> Response:
        """200 while requests are served; 503 once the engine has failed for good or the server ends."""
        well = not (server.driver.dead or server.draining)
        state = "ok" if well else "failed" if server.driver.dead else "ending"
        return json_response({"status": state}, 200 if well else 503)

    @app.get("/metrics", response_model=None, include_in_schema=False)
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(server.metrics.text(), headers={"content-type": CONTENT_TYPE})


def _tokens(server: Server, body: TokenizeRequest) -> list[int]:
    tokenizer = server.fleet.model.tokenizer
    if body.messages is None:
        text: Any = read_prompt(body.prompt, "prompt")
        return list(tokenizer(text, add_special_tokens=body.add_special_tokens)["input_ids"])
    messages = read_messages([message.plain() for message in body.messages], "messages")
    text = render_chat(tokenizer, messages, "messages", add_generation_prompt=body.add_generation_prompt)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _card(server: Server, name: str, parent: str | None) -> dict[str, Any]:
    """`replies.ModelCard`."""
    return {
        "id": name, "object": "model", "created": server.created, "owned_by": "meteora", "root": server.fleet.base,
        "parent": parent, "max_model_len": server.fleet.model.config.max_position_embeddings,
        "kind": models.kind(server.fleet, name), "most_k": models.most_k(server.fleet, name),
    }  # fmt: skip


def _adapters(app: FastAPI, server: Server) -> None:
    @app.post("/v1/load_lora_adapter", response_model=None)
    async def load_lora_adapter(body: LoadAdapterRequest) -> Response:
        """Adds an adapter, or loads one of its name anew."""
        return json_response(await adapters.add(server, body))

    @app.post("/v1/unload_lora_adapter", response_model=None)
    async def unload_lora_adapter(body: UnloadAdapterRequest) -> Response:
        """Takes an adapter away."""
        return json_response(await adapters.remove(server, body.lora_name))


def _no_adapters(app: FastAPI) -> None:
    async def refuse(request: Request) -> Response:
        option = "a server started with --allow-adapter-updates"
        raise ApiError(405, f"{request.url.path}: expected {option}, found one without", code="adapter_updates_off")

    for path in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter"):
        app.add_api_route(path, refuse, methods=["POST"], response_model=None, include_in_schema=False)
