"""Replace the error responses of Ray Serve's HTTP proxy by those of the service.

If a replica dies, Ray responds to its requests with "Internal Server Error" in plain text; a proxy without a replica
responds with 404. Clients of this service expect JSON, `Retry-After` and the documented statuses. Ray calls
`middlewares` in every proxy if RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH names it (docs/ray.md).
"""

from __future__ import annotations

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from reranker.errors import DeadlineError, NotReadyError, RerankError
from reranker.http.access import id_of
from reranker.http.errors import error_response

# Ray routes by these, and fails on bytes that are not text; clients may not set them.
_RAYS_HEADERS = frozenset({b"x-request-id", b"serve_multiplexed_model_id"})


class DocumentedErrors:
    """Pure ASGI middleware around Ray's proxy: one `x-request-id` per request, and only documented responses.

    It does not retry on another replica: a request that killed one would kill the next. Clients may retry, because
    ranking has no side effects.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on; replace a response of Ray's own."""
        if scope["type"] != "http" or scope["path"].startswith("/-/"):  # Ray's own /-/healthz and /-/routes
            await self.app(scope, receive, send)
            return
        request_id = id_of(scope)
        headers = [(name, value) for name, value in scope["headers"] if name not in _RAYS_HEADERS]
        scope["headers"] = [*headers, (b"x-request-id", request_id.encode())]
        status = 500  # the meaning of no response at all
        from_replica = False

        async def send_on(message: Message) -> None:
            nonlocal status, from_replica
            if message["type"] == "http.response.start":
                headers = [(name, value) for name, value in message["headers"] if name.lower() != b"x-request-id"]
                # Ray adds the id to every response; those of the service already have it, so they have two.
                status, from_replica = message["status"], len(message["headers"]) - len(headers) > 1
                message["headers"] = [*headers, (b"x-request-id", request_id.encode())]
            if from_replica:
                await send(message)

        await self.app(scope, receive, send_on)
        if not from_replica:
            response = error_response(_error(status))
            response.headers["x-request-id"] = request_id
            await response(scope, receive, send)


def middlewares() -> list[Middleware]:
    """Return the middlewares of each of Ray's proxies."""
    return [Middleware(DocumentedErrors)]


def _error(status: int) -> RerankError:
    """Return the documented error for a status of Ray's own."""
    if status == 408:  # http_options.request_timeout_s
        return DeadlineError("no replica responded in time; try again, or add replicas")
    if status == 404:  # no application on this path
        return NotReadyError("the service is loading; try again in 5 s", retry_after=5)
    if status == 503:  # max_queued_requests, or no replica could start
        return NotReadyError("no replica can take the request; try again in 5 s", retry_after=5)
    return NotReadyError("the replica of the request ended; send it again", retry_after=1)
