"""How much may enter: bytes of headers and body, seconds for the body, bytes held by all requests together."""

from __future__ import annotations

import asyncio
import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from reranker.errors import BodyTimeoutError, BodyTooLargeError, HeadersTooLargeError, QueueFullError, RerankError
from reranker.http.errors import error_response

MAX_HEADER_BYTES = 32_768
# All bodies in memory together: so many of the largest size.
_BODIES_IN_MEMORY = 16


class Limits:
    """Pure ASGI middleware; a body is refused at the first byte too many, or at once by its Content-Length.

    Args:
        max_body_bytes: of one request.
        body_timeout: seconds from the head of the request to the last byte of its body.
    """

    def __init__(self, app: ASGIApp, *, max_body_bytes: int, body_timeout: float) -> None:
        self.app = app
        self.max_body_bytes = max_body_bytes
        self.max_held_bytes = max_body_bytes * _BODIES_IN_MEMORY
        self.body_timeout = body_timeout
        self.held_bytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on behind a receive channel that counts."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        refusal = self._refusal(scope)
        if refusal is not None:
            await error_response(refusal)(scope, receive, send)
            return
        deadline = time.monotonic() + self.body_timeout
        taken = 0
        more = True

        async def counted() -> Message:
            nonlocal taken, more
            if not more:  # only the disconnect is still to come, and that may take its time
                return await receive()
            try:
                async with asyncio.timeout(deadline - time.monotonic()):
                    message = await receive()
            except TimeoutError:
                raise BodyTimeoutError(f"the body did not arrive within {self.body_timeout:g} s") from None
            size = len(message.get("body", b""))
            more = bool(message.get("more_body", False))
            taken += size
            self.held_bytes += size
            if taken > self.max_body_bytes:
                raise self._too_large()
            if self.held_bytes > self.max_held_bytes:
                raise QueueFullError("too many large requests at once; try again in 1 s", retry_after=1)
            return message

        try:
            await self.app(scope, counted, send)
        finally:
            self.held_bytes -= taken

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
