"""One line a request in the log and one count in the metrics, and an id that ties them to the answer.

Sizes and times, never a text or a token.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Set
from random import getrandbits
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from reranker.errors import RerankError
from reranker.http.metrics import OTHER, Metrics

logger = logging.getLogger(__name__)

_REQUEST_ID = re.compile(r"[\w.:/+=@-]{1,128}", re.ASCII)
# "&access_token=" in place of "?access_token=": no parameter to anybody but the one who sent it. A token may hold any
# character that could end it.
_MISPLACED = re.compile(r"(access_token=).*", re.IGNORECASE | re.DOTALL)
_QUIET = frozenset({"/health", "/livez", "/readyz", "/metrics"})

CLIENT_LEFT = 499
"""nginx's status for a client that did not wait for its answer; it stands in logs and metrics only."""


class AccessLog:
    """Pure ASGI middleware, outermost: adds `x-request-id` (echoed where it is harmless, else made), logs and counts.

    Routes put what they know into `scope["state"]["access"]`, a dict.

    Args:
        metrics: where requests are counted.
        routes: the fixed paths that the service has; what else is asked for counts as one.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, routes: Set[str]) -> None:
        self.app = app
        self.metrics = metrics
        self.routes = routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on; log and count its end."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start = time.monotonic()
        request_id = id_of(scope)
        facts: dict[str, Any] = {}
        scope.setdefault("state", {}).update(access=facts, request_id=request_id)
        status = 0

        async def stamped(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id.encode())]
            await send(message)

        self.metrics.request_began()
        try:
            await self.app(scope, receive, stamped)
        except BaseException:  # a panic of a library in Rust is no Exception
            status = status or 500
            facts["error_type"] = RerankError.error_type
            raise
        finally:
            seconds = time.monotonic() - start
            if facts.get("client") == "left":  # nobody was refused anything, and nothing is wrong here
                facts.pop("error_type", None)
                status = CLIENT_LEFT
            path, method = scope["path"], scope["method"]
            route = path if path in self.routes else OTHER
            self.metrics.request_ended(route, status, seconds, facts.get("error_type"))
            fields = {"id": request_id, "method": method, "route": route, "status": status}
            if route == OTHER:
                fields["path"] = printable(path)
            logger.log(
                # Probes and scrapes come every few seconds; only their failures are news.
                logging.DEBUG if path in _QUIET and status < 400 else logging.INFO,
                "%s %s %d %.1f ms id=%s%s",
                method,
                path if route == path else printable(path),
                status,
                seconds * 1000,
                request_id,
                "".join(f" {name}={value}" for name, value in facts.items()),
                extra={"facts": {**fields, "duration_ms": round(seconds * 1000, 1), **facts}},  # for logs.JsonFormatter
            )


def id_of(scope: Scope) -> str:
    """The `x-request-id` that a request brings, where it is harmless; else a new one."""
    sent = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"").decode("latin-1")
    return sent if _REQUEST_ID.fullmatch(sent) else new_id()


def new_id() -> str:
    """A request id: 16 hexadecimal digits."""
    return f"{getrandbits(64):016x}"


def printable(path: str) -> str:
    """A path as it may stand in a log line: no line breaks, not endless, no token."""
    return repr(_MISPLACED.sub(r"\1***", path)[:200])[1:-1]
