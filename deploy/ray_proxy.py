"""The service's words for what Ray Serve's HTTP proxy says by itself.

A replica that dies takes its requests along, and Ray answers them with "Internal Server Error" in plain text; a proxy
that has no replica yet says 404. Clients of this service read JSON, `Retry-After` and the documented statuses. Ray
calls `middlewares` in every proxy, if RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH names it (docs/ray.md).
"""

from __future__ import annotations

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from reranker.errors import DeadlineError, NotReadyError, RerankError
from reranker.http.access import id_of
from reranker.http.errors import error_response

# By these Ray would route, and fail on bytes that are no text: they are not the client's to set.
_RAYS_HEADERS = frozenset({b"x-request-id", b"serve_multiplexed_model_id"})


class Answers:
    """Pure ASGI middleware around Ray's proxy: one `x-request-id` a request, and no answer but the documented ones.

    Not sent again to another replica: a request that brought one down would go on to the next. Its client may send it
    again, for ranking changes nothing.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on; replace Ray's own answer, if it is one."""
        if scope["type"] != "http" or scope["path"].startswith("/-/"):  # Ray's own /-/healthz and /-/routes
            await self.app(scope, receive, send)
            return
        request_id = id_of(scope).encode()
        kept = [(name, value) for name, value in scope["headers"] if name not in _RAYS_HEADERS]
        scope["headers"] = [*kept, (b"x-request-id", request_id)]
        status = 500  # what Ray means when it sends nothing
        replicas = False

        async def send_on(message: Message) -> None:
            nonlocal status, replicas
            if message["type"] == "http.response.start":
                names = [name.lower() for name, _ in message["headers"]]
                # Ray adds the id to whatever passes, so an answer of the service, which has it already, bears two.
                status, replicas = message["status"], names.count(b"x-request-id") > 1
                message["headers"] = _with_id(message["headers"], request_id)
            if replicas:
                await send(message)

        await self.app(scope, receive, send_on)
        if not replicas:
            answer = error_response(_error(status))
            answer.raw_headers = _with_id(answer.raw_headers, request_id)
            await answer(scope, receive, send)


def middlewares() -> list[Middleware]:
    """What Ray puts around each of its proxies."""
    return [Middleware(Answers)]


def _with_id(headers: list[tuple[bytes, bytes]], request_id: bytes) -> list[tuple[bytes, bytes]]:
    rest = [(name, value) for name, value in headers if name.lower() != b"x-request-id"]
    return [*rest, (b"x-request-id", request_id)]


def _error(status: int) -> RerankError:
    """The documented error for a status of Ray's own."""
    if status == 408:  # http_options.request_timeout_s
        return DeadlineError("no replica answered in time; try again, or add replicas")
    if status == 404:  # no application on this path
        return NotReadyError("the service is loading; try again in 5 s", retry_after=5)
    if status == 503:  # max_queued_requests, or no replica that could be started
        return NotReadyError("no replica is free to take the request; try again in 5 s", retry_after=5)
    return NotReadyError("the replica that had the request ended; send it again", retry_after=1)
