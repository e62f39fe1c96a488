"""From error to answer: one table, one shape. `detail` is always a string, and nothing a client sent is echoed."""

from __future__ import annotations

from collections.abc import Mapping

from fastapi import FastAPI, Request
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from reranker import errors
from reranker.errors import MalformedBodyError, RerankError, UnauthorizedError


class ErrorBody(BaseModel):
    """What every error answers."""

    detail: str = Field(description="What was wrong, where, and how to mend it", examples=["no token was sent"])
    error_type: str = Field(description="The kind of error, for programs", examples=["unauthorized"])


_ANSWERS = [
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
RESPONSES: dict[int | str, dict[str, object]] = {
    error.status: {"model": ErrorBody, "description": str(error.__doc__).rstrip(".")} for error in _ANSWERS
}
"""OpenAPI's description of what a rerank route answers besides 200."""


class ErrorResponse(JSONResponse):
    """An answer that tells the access log and the metrics its error type, whoever sends it."""

    def __init__(self, detail: str, error_type: str, status: int, headers: Mapping[str, str] | None = None) -> None:
        self.error_type = error_type
        super().__init__({"detail": detail, "error_type": error_type}, status, headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Note the type and send the answer."""
        scope.get("state", {}).get("access", {})["error_type"] = self.error_type
        await super().__call__(scope, receive, send)


def error_response(error: RerankError) -> ErrorResponse:
    """The answer to an error of ours."""
    headers: dict[str, str] = {}
    if error.retry_after is not None:
        headers["Retry-After"] = str(error.retry_after)
    if isinstance(error, UnauthorizedError):
        headers["WWW-Authenticate"] = "Bearer"
    if isinstance(error, errors.BodyTimeoutError):
        headers["Connection"] = "close"
    return ErrorResponse(str(error), error.error_type, error.status, headers)


def install(app: FastAPI) -> None:
    """Register the handlers: ours, the framework's own (404, 405), and everything unexpected."""

    async def ours(request: Request, error: Exception) -> Response:
        assert isinstance(error, RerankError)
        return error_response(error)

    async def framework(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        kind = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "http_error")
        detail = str(error.detail)
        if kind == "method_not_allowed":
            posts = "POST" in (error.headers or {}).get("Allow", "")
            way = "POST with a JSON body" if posts else "GET"
            detail = f"{request.method} is not served at this path: use {way}, see /docs"
        if kind == "not_found":
            slash = "leave out the slash at its end, or see" if request.scope["path"].endswith("/") else "see"
            detail = f"there is nothing at this path; {slash} /docs for all there are"
        return ErrorResponse(detail, kind, error.status_code, error.headers)

    async def gone(request: Request, error: Exception) -> Response:
        # The client left in the middle of its body: no error of ours, and nobody reads the answer.
        request.scope["state"]["access"]["client"] = "left"
        return Response(status_code=MalformedBodyError.status)

    async def unexpected(request: Request, error: Exception) -> Response:
        # The traceback goes to the log: the server logs what is raised again behind this answer.
        text = "unexpected error; the operator finds the cause in the log under this request's x-request-id"
        # This answer is given outside of the access log's middleware.
        headers = {"x-request-id": request.scope["state"]["request_id"]}
        return ErrorResponse(text, RerankError.error_type, 500, headers)

    app.add_exception_handler(RerankError, ours)
    app.add_exception_handler(HTTPException, framework)
    app.add_exception_handler(ClientDisconnect, gone)
    app.add_exception_handler(Exception, unexpected)
