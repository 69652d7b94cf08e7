"""Chat and text completions: whole, or as a stream of events."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

from starlette.responses import Response

from meteora_jax.config import InputError
from meteora_jax.likelihood import prompt_logprobs
from meteora_jax.serving.answers import Answer, chat_logprobs, pieces, text_logprobs
from meteora_jax.serving.asking import LIKELY, Work, chat_work, text_work
from meteora_jax.serving.driver import Piece, Stream
from meteora_jax.serving.errors import AdapterChanged, ApiError, json_response
from meteora_jax.serving.schemas import Asked, ChatRequest, CompletionRequest
from meteora_jax.serving.server import DONE, EventStream, Server, event, reply_id, usage_of
from meteora_jax.serving.spelling import Place
from meteora_jax.serving.tools import Notation, notation_of, read_calls

READINGS = 3  # of a request whose adapter changes while it is read


class Completing:
    """What chat and text completions share; the two below say what a choice and a chunk look like."""

    route, kind, whole, part = "", "", "", ""

    def __init__(self, server: Server, body: Asked):
        self.server, self.body = server, body
        self.began = time.perf_counter()
        self.head = {"id": reply_id(self.kind), "object": self.whole, "created": int(time.time()), "model": body.model}
        self.answers: list[Answer] = []
        self.noted = False

    async def respond(self) -> Response:
        """The reply, or the beginning of its stream: refusals before the first token have their own status.

        A request whose adapter changes while it is read is read again: it gets the new version, or a 404.
        """
        for left in reversed(range(READINGS)):
            try:
                return await self._respond()
            except AdapterChanged as e:
                if not left:
                    self._note(e.status)
                    raise
        raise AssertionError

    async def _respond(self) -> Response:
        try:
            work, streams, news = await self._submit()
            self.answers = self.server.answers(work, streams, self.began)
            deadline = asyncio.get_running_loop().time() + self.server.settings.timeout
            coming = pieces(streams, news, deadline)
            if self.body.stream:
                try:
                    first = await anext(coming)
                except BaseException:
                    await coming.aclose()
                    raise
                return EventStream(self.server, self._events(work, first, coming))
            async with contextlib.aclosing(coming) as all_pieces:
                traced: list[list[Any]] = [[] for _ in self.answers]
                async for i, piece in all_pieces:
                    self.answers[i].take(piece)
                    traced[i] += self.answers[i].routing
            choices = await self._choices(work, traced)
            self._note(200)
            return json_response({**self.head, "choices": choices, "usage": usage_of(work, self.answers)})
        except AdapterChanged:
            raise
        except ApiError as e:
            self._note(e.status)
            raise
        except InputError:
            self._note(400)
            raise
        except BaseException as e:
            self._note(500 if isinstance(e, Exception) else 499)
            raise

    async def _submit(self) -> tuple[Work, list[Stream], asyncio.Event]:
        raise NotImplementedError

    async def _choices(self, work: Work, traced: list[list[Any]]) -> list[dict[str, Any]]:
        raise NotImplementedError

    def _chunk(self, i: int, text: str, piece: Piece, first: bool) -> list[dict[str, Any]]:
        raise NotImplementedError

    def _meteora(self, answer: Answer, tokens: list[Any]) -> dict[str, Any]:
        """`meteora` of a choice, if it was asked for."""
        if self.body.routing is False:
            return {}
        return {"meteora": answer.meteora(tokens, self.body.routing == "full")}

    async def _events(
        self, work: Work, first: tuple[int, Piece], coming: AsyncGenerator[tuple[int, Piece], None]
    ) -> AsyncIterator[bytes]:
        with_usage = self.body.stream_options is not None and self.body.stream_options.include_usage
        head = {**self.head, "object": self.part} | ({"usage": None} if with_usage else {})
        begun: set[int] = set()
        status = 499
        try:
            async with contextlib.aclosing(_chain(first, coming)) as all_pieces:
                async for i, piece in all_pieces:
                    text = self.answers[i].take(piece)
                    for choice in self._chunk(i, text, piece, i not in begun):
                        yield event({**head, "choices": [choice]})
                    begun.add(i)
            if with_usage:
                yield event({**head, "choices": [], "usage": usage_of(work, self.answers)})
            status = 200
            yield DONE
        except ApiError as e:
            status = e.status
            yield event(e.body())
        except Exception:
            status = 500
            raise
        finally:
            self._note(status)

    def _note(self, status: int) -> None:
        if not self.noted:
            self.noted = True
            asked = self.body.messages if isinstance(self.body, ChatRequest) else getattr(self.body, "prompt", None)
            self.server.note(self.route, self.body, status, self.began, self.answers, asked)


async def _chain(
    first: tuple[int, Piece], coming: AsyncGenerator[tuple[int, Piece], None]
) -> AsyncGenerator[tuple[int, Piece], None]:
    try:
        yield first
        async for one in coming:
            yield one
    finally:
        await coming.aclose()


class Chat(Completing):
    """`/v1/chat/completions`."""

    route, kind, whole, part = "/v1/chat/completions", "chatcmpl", "chat.completion", "chat.completion.chunk"
    body: ChatRequest

    def __init__(self, server: Server, body: ChatRequest):
        super().__init__(server, body)
        self.notation: Notation | None = None
        self.names = {tool.function.name for tool in body.tools or []}

    async def _submit(self) -> tuple[Work, list[Stream], asyncio.Event]:
        server = self.server
        if self.body.tools and self.body.tool_choice != "none":
            self.notation = notation_of(server.fleet.model.tokenizer.chat_template)

        def make() -> Work:
            return chat_work(server.fleet, server.grammars, server.positions, self.body)

        return await server.work(self.body.n, make)

    def _logprobs(self, answer: Answer, tokens: list[int], likely: list[Any]) -> dict[str, Any] | None:
        if not self.body.logprobs:
            return None
        return chat_logprobs(answer.place, tokens, likely, self.body.top_logprobs or 0)

    def _calls(self, answer: Answer, notation: Notation) -> tuple[str, list[dict[str, Any]]]:
        """The text and the tool calls of a response, one at most where the client wants no parallel ones."""
        text, calls = read_calls(answer.text.text, notation, self.names)
        return text, calls[:1] if self.body.parallel_tool_calls is False else calls

    async def _choices(self, work: Work, traced: list[list[Any]]) -> list[dict[str, Any]]:
        found = []
        for i, answer in enumerate(self.answers):
            message: dict[str, Any] = {"role": "assistant", "content": answer.text.text, "refusal": None}
            reason = answer.finish_reason
            if self.notation is not None:
                text, calls = self._calls(answer, self.notation)
                if calls:
                    message |= {"content": text or None, "tool_calls": calls}
                    reason = "tool_calls"
            own = {"index": i, "message": message, "finish_reason": reason}
            own["logprobs"] = self._logprobs(answer, answer.tokens, answer.logprobs)
            found.append({**own, **self._meteora(answer, traced[i])})
        return found

    def _chunk(self, i: int, text: str, piece: Piece, first: bool) -> list[dict[str, Any]]:
        answer = self.answers[i]
        base = {"index": i, "finish_reason": None, "logprobs": None}
        chunks = [{**base, "delta": {"role": "assistant", "content": "", "refusal": None}}] if first else []
        reason: str | None = answer.finish_reason
        delta: dict[str, Any] = {"content": text}
        if self.notation is not None:  # a call is known as one at its end: nothing is sent before
            delta = {}
            if reason is not None:
                said, calls = self._calls(answer, self.notation)
                delta = {"content": said} if said or not calls else {}
                if calls:
                    delta["tool_calls"] = [{"index": n, **call} for n, call in enumerate(calls)]
                    reason = "tool_calls"
        more = {"delta": delta, "logprobs": self._logprobs(answer, piece.tokens, piece.logprobs)}
        chunks.append({**base, **more, **self._meteora(answer, answer.routing)})
        if reason is not None:
            chunks[-1]["finish_reason"] = reason
        return chunks


class Text(Completing):
    """`/v1/completions`."""

    route, kind, whole, part = "/v1/completions", "cmpl", "text_completion", "text_completion"
    body: CompletionRequest

    async def _submit(self) -> tuple[Work, list[Stream], asyncio.Event]:
        server, body = self.server, self.body
        one = isinstance(body.prompt, str) or isinstance(body.prompt[0], int)
        count = (1 if one else len(body.prompt)) * body.n
        return await server.work(
            count, lambda: text_work(server.fleet, server.grammars, server.positions, server.spelling, body)
        )

    async def _choices(self, work: Work, traced: list[list[Any]]) -> list[dict[str, Any]]:
        model, body, found, spelling = work.model, self.body, [], self.server.spelling
        for p, prompt in enumerate(work.prompts):
            echoed, before = "", []
            if body.echo:
                given = body.prompt if isinstance(body.prompt, str) else body.prompt[p]
                echoed = given if isinstance(given, str) else model.decode_tokens(prompt)
                if body.logprobs is not None:
                    top = next(n for n in LIKELY if n >= body.logprobs)
                    scored = functools.partial(prompt_logprobs, model, prompt, work.routers[p], top)
                    before = [None, *await self.server.score(scored)]
            read = text_logprobs(Place(spelling, 0, echoed), prompt, before, body.logprobs or 0)
            for i in range(p * body.n, (p + 1) * body.n):
                answer = self.answers[i] if work.requests else None
                logprobs = None if body.logprobs is None else read
                if body.logprobs is not None and answer is not None:
                    place = Place(spelling, len(echoed), begins=answer.begins)
                    written = text_logprobs(place, answer.tokens, answer.logprobs, body.logprobs)
                    logprobs = {key: said + written[key] for key, said in read.items()}
                choice = {
                    "index": i, "text": echoed + ("" if answer is None else answer.text.text), "logprobs": logprobs,
                    "finish_reason": "length" if answer is None else answer.finish_reason,
                }  # fmt: skip
                found.append(choice | ({} if answer is None else self._meteora(answer, traced[i])))
        return found

    def _chunk(self, i: int, text: str, piece: Piece, first: bool) -> list[dict[str, Any]]:
        answer, logprobs = self.answers[i], None
        if self.body.logprobs is not None:
            logprobs = text_logprobs(answer.place, piece.tokens, piece.logprobs, self.body.logprobs)
        more = self._meteora(answer, answer.routing)
        return [{"index": i, "text": text, "logprobs": logprobs, "finish_reason": answer.finish_reason, **more}]
