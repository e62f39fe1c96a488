"""Limits of a request: bytes of headers and body, seconds for the body, bytes of all bodies in memory."""

from __future__ import annotations

import asyncio
import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from reranker.errors import BodyTimeoutError, BodyTooLargeError, HeadersTooLargeError, QueueFullError, RerankError
from reranker.http.errors import error_response

MAX_HEADER_BYTES = 32_768
_MAX_BODIES = 16
"""Bodies of the maximum size that fit into memory together."""


class Limits:
    """ASGI middleware that refuses a body by its Content-Length, or at the first byte above the limit.

    Args:
        max_body_bytes: of one request.
        body_timeout: seconds from the head of a request to the last byte of its body.
    """

    def __init__(self, app: ASGIApp, *, max_body_bytes: int, body_timeout: float) -> None:
        self.app = app
        self.max_body_bytes = max_body_bytes
        self.max_held_bytes = max_body_bytes * _MAX_BODIES
        self.body_timeout = body_timeout
        self.held_bytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on with a receive channel that counts bytes and has a deadline."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if refusal := self._refusal(scope):
            await error_response(refusal)(scope, receive, send)
            return
        deadline = time.monotonic() + self.body_timeout
        body_bytes, more = 0, True

        async def receive_within_limits() -> Message:
            nonlocal body_bytes, more
            if not more:  # only the disconnect remains, which has no deadline
                return await receive()
            try:
                async with asyncio.timeout(deadline - time.monotonic()):
                    message = await receive()
            except TimeoutError:
                raise BodyTimeoutError(f"the body did not arrive within {self.body_timeout:g} s") from None
            size = len(message.get("body", b""))
            more = bool(message.get("more_body", False))
            body_bytes += size
            self.held_bytes += size
            if body_bytes > self.max_body_bytes:
                raise self._too_large()
            if self.held_bytes > self.max_held_bytes:
                raise QueueFullError("too many large requests at the same time; try again in 1 s", retry_after=1)
            return message

        try:
            await self.app(scope, receive_within_limits, send)
        finally:
            self.held_bytes -= body_bytes

    def _refusal(self, scope: Scope) -> RerankError | None:
        target = len(scope["path"]) + len(scope["query_string"])
        if target + sum(len(name) + len(value) + 4 for name, value in scope["headers"]) > MAX_HEADER_BYTES:
            return HeadersTooLargeError(f"the address and headers are larger than {MAX_HEADER_BYTES} bytes")
        length = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        if int(length) > self.max_body_bytes:
            return self._too_large()
        return None

    def _too_large(self) -> BodyTooLargeError:
        return BodyTooLargeError(
            f"the body is larger than {self.max_body_bytes} bytes; send fewer documents, or raise MAX_BODY_BYTES"
        )
