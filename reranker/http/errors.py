"""From error to response: one table, one shape. `detail` is always a string and never echoes the input.

Clients read different keys of it: `detail` Jina's and Xinference's, `message` Cohere's and the AI SDK, `error.message`
OpenAI's and those of vLLM and llama.cpp.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from fastapi import FastAPI, Request
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from reranker import errors
from reranker.errors import MalformedBodyError, RerankError, UnauthorizedError
from reranker.http.state import context_of


class OpenAIError(BaseModel):
    """The same for OpenAI's clients."""

    message: str = Field(description="The same as detail")
    type: str = Field(description="The same as error_type")


class ErrorBody(BaseModel):
    """The body of every error response."""

    detail: str = Field(description="What was wrong, where, and how to fix it", examples=["no token was sent"])
    error_type: str = Field(description="The kind of error, for programs", examples=["unauthorized"])
    message: str = Field(description="The same as detail")
    error: OpenAIError


_DOCUMENTED = [
    errors.MalformedBodyError,
    errors.UnauthorizedError,
    errors.BodyTimeoutError,
    errors.BodyTooLargeError,
    errors.UnsupportedMediaTypeError,
    errors.InvalidRequestError,
    errors.QueueFullError,
    errors.HeadersTooLargeError,
    errors.ScoringError,
    errors.NotReadyError,
    errors.DeadlineError,
]
NOT_LOADED: dict[int | str, dict[str, object]] = {503: {"model": ErrorBody, "description": "The model is not loaded"}}
EXTENSIONS: dict[str, Callable[[ErrorResponse, str], dict[str, object]]] = {}
"""Of a path, the additional keys of its error bodies, from the response and the request's id."""


def responses(model: type[ErrorBody]) -> dict[int | str, dict[str, object]]:
    """Return OpenAPI's description of the error responses of a rerank route."""
    return {error.status: {"model": model, "description": str(error.__doc__).rstrip(".")} for error in _DOCUMENTED}


class ErrorResponse(JSONResponse):
    """An error response that reports its type to the access log and the metrics."""

    def __init__(
        self,
        detail: str,
        error_type: str,
        status: int,
        headers: Mapping[str, str] | None = None,
        logged: str | None = None,
    ) -> None:
        self.error_type = error_type
        self.logged = detail if logged is None else logged
        self.content: dict[str, Any] = {
            "detail": detail,
            "error_type": error_type,
            "message": detail,
            "error": {"message": detail, "type": error_type},
        }
        super().__init__(self.content, status, headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Record type and detail for the log, and send the response."""
        if "context" in scope.get("state", ()):  # absent in Ray's proxy
            context = context_of(scope)
            context.error_type, context.error_detail = self.error_type, self.logged
            if extension := EXTENSIONS.get(scope["path"]):
                self.body = self.render(self.content | extension(self, context.request_id))
                self.headers["content-length"] = str(len(self.body))
        await super().__call__(scope, receive, send)


def error_response(error: RerankError) -> ErrorResponse:
    """Return the response to one of the project's own errors."""
    headers: dict[str, str] = {}
    if error.retry_after is not None:
        headers["Retry-After"] = str(error.retry_after)
    if isinstance(error, UnauthorizedError):
        headers["WWW-Authenticate"] = "Bearer"
    if isinstance(error, errors.BodyTimeoutError):
        headers["Connection"] = "close"
    return ErrorResponse(str(error), error.error_type, error.status, headers, error.logged)


def install(app: FastAPI) -> None:
    """Register handlers for the project's errors, the framework's (404, 405), disconnects and unexpected errors."""
    app.add_exception_handler(RerankError, _own_error)  # type: ignore[arg-type]  # Starlette's type is of any error
    app.add_exception_handler(HTTPException, _framework_error)  # type: ignore[arg-type]
    app.add_exception_handler(ClientDisconnect, _disconnected)
    app.add_exception_handler(Exception, _unexpected_error)


async def _own_error(request: Request, error: RerankError) -> Response:
    return error_response(error)


async def _framework_error(request: Request, error: HTTPException) -> Response:
    kind = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "http_error")
    detail = str(error.detail)
    if kind == "method_not_allowed":
        method = "POST with a JSON body" if "POST" in (error.headers or {}).get("Allow", "") else "GET"
        detail = f"{request.method} is not served at this path: use {method}, see /docs"
    if kind == "not_found":
        slash = "remove the trailing slash, or " if request.scope["path"].endswith("/") else ""
        detail = f"there is no such path; {slash}see /docs for all paths"
    return ErrorResponse(detail, kind, error.status_code, error.headers)


async def _disconnected(request: Request, error: Exception) -> Response:
    context_of(request.scope).client_disconnected = True
    return Response(status_code=MalformedBodyError.status)  # never received


async def _unexpected_error(request: Request, error: Exception) -> Response:
    """Answer with a generic text. Starlette raises the error again, so the server logs its traceback."""
    text = "unexpected error; the operator finds the cause in the log under this request's x-request-id"
    # Starlette sends this response outside of all middleware, so the access log cannot add its headers.
    return ErrorResponse(text, RerankError.error_type, 500, context_of(request.scope).headers)
