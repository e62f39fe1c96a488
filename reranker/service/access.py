"""One line a request in the log, and an id that ties it to the answer: sizes and times, never a text or a token."""

from __future__ import annotations

import logging
import re
import secrets
import time
from typing import Any

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

logger = logging.getLogger(__name__)

_REQUEST_ID = re.compile(r"[\w.:/+=@-]{1,128}", re.ASCII)
_QUIET = frozenset({"/health", "/livez", "/readyz"})


class AccessLog:
    """Pure ASGI middleware, outermost: adds `x-request-id` (echoed where it is harmless, else made) and logs.

    Routes put what they know into `scope["state"]["access"]`, a dict.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on and log its end."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start = time.monotonic()
        sent = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"").decode("latin-1")
        request_id = sent if _REQUEST_ID.fullmatch(sent) else secrets.token_hex(8)
        facts: dict[str, Any] = {}
        scope.setdefault("state", {}).update(access=facts, request_id=request_id)
        status = 0

        async def stamped(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            await self.app(scope, receive, stamped)
        except Exception:
            status = status or 500
            raise
        finally:
            # Probes come every few seconds; only their failures are news.
            level = logging.DEBUG if scope["path"] in _QUIET and status < 400 else logging.INFO
            logger.log(
                level,
                "%s %s %d %.1f ms id=%s%s",
                scope["method"],
                printable(scope["path"]),
                status,
                (time.monotonic() - start) * 1000,
                request_id,
                "".join(f" {name}={value}" for name, value in facts.items()),
            )


def printable(path: str) -> str:
    """A path as it may stand in a log line: no line breaks, not endless."""
    return repr(path[:200])[1:-1]
