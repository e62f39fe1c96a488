"""Cross-origin requests of browsers: preflights, and the headers that let pages read responses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp

from reranker.http.errors import ErrorResponse

_METHODS = ("GET", "HEAD", "POST")


class Cors(CORSMiddleware):
    """Starlette's middleware, with refusals in the error format of this service."""

    def preflight_response(self, request_headers: Headers) -> Response:
        """Answer a preflight; a refusal names the setting, or the allowed methods."""
        response = super().preflight_response(request_headers)
        if response.status_code < 400:
            return response
        detail = f"pages of other origins may use {', '.join(_METHODS)} only"
        if not self.is_allowed_origin(request_headers["origin"]):
            detail = "pages of this origin may not call the service: the operator can add it to CORS_ALLOW_ORIGINS"
        headers = {name: text for name, text in response.headers.items() if not name.startswith("content-")}
        return ErrorResponse(detail, "cors_refused", response.status_code, headers)


def install(app: FastAPI, origins: Sequence[str]) -> None:
    """Allow pages of these origins, as browsers send them or `*` for all, to call the service.

    Call it after `errors.install` and after the token guard is added, because a preflight never carries a token, and
    before the access log is.
    """
    options: dict[str, Any] = {
        "allow_origins": origins,
        "allow_methods": _METHODS,
        "allow_headers": ["*"],  # SDKs for Node send headers of their own
        "expose_headers": ["*"],  # x-request-id, Retry-After and all others
        "allow_private_network": True,  # the service is usually in one
    }
    app.add_middleware(Cors, **options)
    unexpected: Any = app.exception_handlers[Exception]

    async def readable(request: Request, error: Exception) -> ASGIApp:
        return Cors(await unexpected(request, error), **options)

    # Starlette sends the response to an unexpected error outside of all middleware.
    app.add_exception_handler(Exception, readable)  # type: ignore[arg-type]  # sent as an ASGI application
