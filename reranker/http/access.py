"""One log line and one count per request, and the ids that connect them with the response and with other services.

Sizes, times and the error's detail, never a text or a token. ACCESS_LOG_CLIENT adds the client's address.
"""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Set
from random import getrandbits

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from reranker.errors import RerankError
from reranker.http.callers import NONE, UNNAMED
from reranker.http.client_address import ClientAddress
from reranker.http.metrics import OTHER, Metrics
from reranker.http.state import RequestContext

logger = logging.getLogger(__name__)

# W3C Trace Context, level 1: version, trace id, parent id, flags; later versions may append fields.
_TRACEPARENT = re.compile(r"(?!ff)([0-9a-f]{2})-((?!0{32})[0-9a-f]{32})-((?!0{16})[0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_MAX_TRACEPARENT = 256
_MAX_DETAIL = 300
_REQUEST_ID = re.compile(r"[\w.:/+=@-]{1,128}", re.ASCII)
# A path with "&access_token=" in place of "?access_token=". The token may contain any delimiter.
_MISPLACED = re.compile(r"(access_token=).*", re.IGNORECASE | re.DOTALL)
_QUIET = frozenset({"/health", "/livez", "/readyz", "/metrics"})

CLIENT_DISCONNECTED = 499
"""nginx's status for a client that closed its connection before the response; for logs and metrics only."""


class AccessLog:
    """Outermost ASGI middleware: attaches the `RequestContext`, adds `x-request-id`, logs and counts.

    Args:
        metrics: counts the requests.
        routes: the fixed paths of the service; all other paths are counted together.
        address: finds the client's address.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, routes: Set[str], address: ClientAddress | None = None) -> None:
        self.app = app
        self.metrics = metrics
        self.routes = routes
        self.address = address or ClientAddress()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on; log and count its end."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start = time.monotonic()
        context = RequestContext(id_of(scope), traceparent=traceparent_of(scope))
        scope.setdefault("state", {})["context"] = context
        status = 0

        async def send_with_ids(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                ids = [(name.encode(), text.encode()) for name, text in context.headers.items()]
                message["headers"] = [*message.get("headers", ()), *ids]
            await send(message)

        self.metrics.request_began()
        try:
            await self.app(scope, receive, send_with_ids)
        except BaseException:  # a panic in a Rust library is not an Exception
            status = status or 500
            context.error_type = RerankError.error_type
            raise
        finally:
            if context.client_disconnected:  # not an error of the service
                context.error_type = None
                status = CLIENT_DISCONNECTED
            self._finish(scope, context, status, time.monotonic() - start)

    def _finish(self, scope: Scope, context: RequestContext, status: int, seconds: float) -> None:
        path, method = scope["path"], scope["method"]
        route = path if path in self.routes else OTHER
        self.metrics.request_ended(route, status, seconds, context.error_type)
        self.metrics.caller_served(context.caller, status, context.prompt_tokens)
        named = context.caller not in (NONE, UNNAMED)
        fields = ({"caller": context.caller} if named else {}) | context.log_fields
        if (address := self.address.of(scope)) is not None:
            fields["client_address"] = address
        if context.traceparent:
            fields["trace_id"] = context.traceparent.split("-")[1]
        if context.client_disconnected:
            fields["client"] = "disconnected"
        if context.error_type:
            fields["error_type"] = context.error_type
        detail = {"detail": context.error_detail[:_MAX_DETAIL]} if context.error_type and context.error_detail else {}
        json_fields = {"id": context.request_id, "method": method, "route": route, "status": status}
        if route == OTHER:
            json_fields["path"] = path = printable(path)
        logger.log(
            # Probes and scrapes arrive every few seconds: only their failures are logged.
            logging.DEBUG if path in _QUIET and status < 400 else logging.INFO,
            "%s %s %d %.1f ms id=%s%s",
            method,
            path,
            status,
            seconds * 1000,
            context.request_id,
            "".join(f" {name}={value}" for name, value in fields.items())
            + "".join(f" {name}={json.dumps(text)}" for name, text in detail.items()),
            # for JsonFormatter
            extra={"facts": {**json_fields, "duration_ms": round(seconds * 1000, 1), **fields, **detail}},
        )


def id_of(scope: Scope) -> str:
    """Return the `x-request-id` of a request if it has an accepted form, otherwise a new one."""
    value = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"").decode("latin-1")
    return value if _REQUEST_ID.fullmatch(value) else new_id()


def traceparent_of(scope: Scope) -> str:
    """Return the one valid `traceparent` of a request as version 00 writes it, or ""."""
    values = [value for name, value in scope["headers"] if name == b"traceparent"]
    if len(values) != 1 or len(values[0]) > _MAX_TRACEPARENT:
        return ""
    match = _TRACEPARENT.fullmatch(values[0].decode("latin-1"))
    if match is None or (match[1] == "00" and match[5]):
        return ""
    return f"00-{match[2]}-{match[3]}-{match[4]}"


def new_id() -> str:
    """Return a request id: 16 hexadecimal digits."""
    return f"{getrandbits(64):016x}"


def printable(path: str) -> str:
    """Return a path for a log line: one word, so that it cannot pose as fields; of limited length, without a token."""
    return repr(_MISPLACED.sub(r"\1***", path)[:200])[1:-1].replace(" ", "%20")
