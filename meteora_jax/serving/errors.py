"""What a client is told when a request is refused or fails: OpenAI's error object, without paths and tracebacks."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from meteora_jax.config import InputError

LOG = logging.getLogger(__name__)
KINDS = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}  # others by their hundred


class ApiError(Exception):
    """A refusal with its HTTP status."""

    def __init__(
        self, status: int, message: str, *, code: str | None = None, param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):  # fmt: skip
        super().__init__(message)
        self.status, self.message, self.code, self.param, self.headers = status, message, code, param, headers

    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        kind = KINDS.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        """The object as an HTTP response."""
        return json_response(self.body(), self.status, self.headers)


class EngineFailed(ApiError):
    """The engine's step raised an error while the request was under way."""

    def __init__(self) -> None:
        super().__init__(500, "the engine failed while it served this request", code="engine_failed")


class AdapterChanged(ApiError):
    """The request's adapter was loaded anew, or unloaded, between the reading of the request and its submission."""

    def __init__(self) -> None:
        super().__init__(503, "the request's adapter changed; try again", code="adapter_changed")


def refused(error: InputError) -> ApiError:
    """The project's own refusals of an input: status 400."""
    return ApiError(400, "; ".join(error.problems))


def unknown_model(name: str, said: str) -> ApiError:
    """No model has the name: never an answer of another one. said: what was expected, and what was found."""
    return ApiError(404, f"the model {name!r:.200} does not exist: {said}", code="model_not_found", param="model")


def dump(value: Any) -> bytes:
    """JSON, in UTF-8; half characters that only JSON can spell stay escaped."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    try:
        return text.encode()
    except UnicodeEncodeError:
        return json.dumps(value, separators=(",", ":")).encode()


def json_response(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A value as an HTTP response."""
    return Response(dump(value), status, dict(headers or {}), media_type="application/json")


def describe(error: RequestValidationError) -> ApiError:
    """What is wrong with a body, one part a field; no text of what was sent is repeated."""
    parts: list[str] = []
    param = None
    for problem in error.errors():
        if problem["type"] == "json_invalid":
            return ApiError(400, f"body: expected JSON, found none from character {problem['loc'][-1]} on")
        where = _place(error.body, problem)
        param = param or where or None
        said = problem["msg"] if where else "expected a JSON object (Content-Type: application/json)"
        if problem["type"] == "value_error":  # of our own checks, perhaps over several fields
            said = str(problem["ctx"]["error"])
        parts.append(f"{where or 'body'}: {said}")
    return ApiError(400, "; ".join(dict.fromkeys(parts))[:2000], param=param)


def _place(body: Any, problem: Mapping[str, Any]) -> str:
    """The field of the body that a problem is about; names of the kinds that it was tried as are no part of it."""
    found: list[str] = []
    parts = problem["loc"][1:]
    for i, part in enumerate(parts):
        if not (isinstance(body, dict) if isinstance(part, str) else isinstance(body, list)):
            continue
        if isinstance(body, dict) and part not in body:
            if problem["type"] == "missing" and i == len(parts) - 1:
                found.append(str(part))
            continue
        found.append(str(part))
        body = body[part]
    return ".".join(found)


def install(app: FastAPI) -> None:
    """Gives every refusal and failure of the app its error object."""

    async def api_error(_: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        return error.response()

    async def input_error(_: Request, error: Exception) -> Response:
        assert isinstance(error, InputError)
        return refused(error).response()

    async def invalid(_: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return describe(error).response()

    async def http_error(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return ApiError(error.status_code, str(error.detail), headers=error.headers).response()

    async def failure(request: Request, error: Exception) -> Response:
        LOG.error("%s %s failed", request.method, request.url.path, exc_info=error)
        return ApiError(500, "the server failed at this request").response()

    app.add_exception_handler(ApiError, api_error)
    app.add_exception_handler(InputError, input_error)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http_error)
    app.add_exception_handler(Exception, failure)
