"""Browsers on pages of other origins: preflights are answered, and responses say who may read them."""

from __future__ import annotations

from collections.abc import Sequence
from inspect import isawaitable
from typing import Any

from fastapi import FastAPI, Request
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp


def install(app: FastAPI, origins: Sequence[str]) -> None:
    """Allow pages of these origins to call the service.

    Call it after the token guard is added, because a preflight never carries a token, and before the access log is.

    Args:
        app: has its handler of unexpected errors already.
        origins: as browsers send them, or `*` for all.
    """
    options: dict[str, Any] = {
        "allow_origins": origins,
        "allow_methods": ["GET", "HEAD", "POST"],
        "allow_headers": ["*"],  # clients written for Node send headers of their own
        "expose_headers": ["*"],  # to scripts: x-request-id, Retry-After and all others
        "allow_private_network": True,  # this service is usually in one
    }
    app.add_middleware(CORSMiddleware, **options)
    unexpected: Any = app.exception_handlers[Exception]

    async def readable(request: Request, error: Exception) -> ASGIApp:
        answer = unexpected(request, error)
        return CORSMiddleware(await answer if isawaitable(answer) else answer, **options)

    # Starlette sends the response to an unexpected error outside of all middleware.
    app.add_exception_handler(Exception, readable)  # type: ignore[arg-type]  # sent as an ASGI application
