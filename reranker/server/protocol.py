"""uvicorn's HTTP/1.1 protocol with timeouts and size limits on every connection.

uvicorn collects a head without a limit before the application sees any of it, times out only a connection that is idle
after a response, waits forever for a client that does not read, and responds 503 to everything, probes included, above
its connection limit. Here every read and write has a timeout, and every buffer a size limit:

    idle                          closed after KEEP_ALIVE
    incomplete head               408 after BODY_TIMEOUT; 431 above MAX_HEADER_BYTES
    incomplete body               http/limits.py: 408, 413; after an early response discarded until BODY_TIMEOUT
    unread response               aborted if no byte leaves within BODY_TIMEOUT
    pipelined requests            refused above MAX_PIPELINED
    too many connections          the connection that has waited longest for its client is aborted

A head that two parsers in a row could read differently is refused, with everything after it on that connection.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import sys
import termios
from collections.abc import Callable
from contextlib import suppress
from enum import Enum, auto
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from reranker.errors import HeadersTooLargeError, HeadTimeoutError, MalformedRequestError, QueueFullError, RerankError
from reranker.http.access import new_id
from reranker.http.client_address import ClientAddress
from reranker.http.errors import error_response
from reranker.http.limits import MAX_HEADER_BYTES
from reranker.http.metrics import Metrics
from reranker.server.head import MALFORMED, TOO_LARGE, head_error
from reranker.server.siblings import Siblings

logger = logging.getLogger(__name__)

MAX_PIPELINED = 64  # pending requests on one connection; no known client pipelines


class ConnState(Enum):
    """Whose turn it is: in all states but RESPONDING and CLOSED the service waits for the client."""

    IDLE = auto()
    READING_HEAD = auto()
    READING_BODY = auto()
    RESPONDING = auto()
    DISCARDING_BODY = auto()  # of a request whose response was sent early
    CLOSED = auto()


class ConnectionPool:
    """The connections of a worker that wait for their clients, longest wait first; at most `max_connections`."""

    def __init__(self, max_connections: int) -> None:
        self.max_connections = max_connections
        self.waiting: dict[HttpProtocol, None] = {}
        self._warned_at = float("-inf")

    def evict(self, now: float) -> None:
        """Abort the connection that has waited longest, so that a flood of idle ones cannot lock out other clients."""
        if now - self._warned_at > 60:
            self._warned_at = now
            logger.warning("more than %d connections: the longest idle ones are aborted", self.max_connections)
        if self.waiting:
            next(iter(self.waiting)).abort()


class ResponseTransport:
    """The three methods of a transport that uvicorn's request cycle calls, bound for speed, with our `close`."""

    __slots__ = ("close", "is_closing", "write")

    def __init__(self, transport: asyncio.Transport, close: Callable[[], None]) -> None:
        self.write = transport.write
        self.is_closing = transport.is_closing
        self.close = close


class HttpProtocol(HttpToolsProtocol):
    """One connection. uvicorn makes it; the worker binds the keyword arguments.

    Args:
        pool: all connections of the worker.
        metrics: counts refusals.
        address: finds the client's address for the log.
        io_timeout: seconds in which a head must arrive, and in which part of a response must leave.
        siblings: the workers that a request may be handed off to; None if there are none.
        first: bytes that a sibling has read from a connection that it handed off.
    """

    def __init__(
        self,
        *args: Any,
        pool: ConnectionPool,
        metrics: Metrics,
        address: ClientAddress,
        io_timeout: float,
        siblings: Siblings | None = None,
        first: bytes = b"",
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.pool = pool
        self.metrics = metrics
        self.address = address
        self.io_timeout = io_timeout
        self.siblings = siblings
        self.first = first
        self.state = ConnState.CLOSED
        self.in_progress = False  # in the count that siblings see
        self.read_timer: asyncio.TimerHandle | None = None
        self.write_timer: asyncio.TimerHandle | None = None
        self.in_head = False
        self.head_bytes = 0  # since the last complete head or body chunk: of a head, trailer or chunk extension
        self.refusal: RerankError | None = None  # of the last request; all data after it is dropped
        self.responses: ResponseTransport
        self.lingering = False  # the last response was sent before its request was complete, which is discarded

    # Called by the transport

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the timeout, and read what a sibling has received."""
        super().connection_made(transport)
        self.responses = ResponseTransport(transport, self._close)
        if len(self.connections) > self.pool.max_connections:
            self.pool.evict(self.loop.time())
        self._update_state()
        if self.first:  # not handed off a second time
            self._receive(self.first)

    def connection_lost(self, exc: Exception | None) -> None:
        """Release everything that refers to the connection."""
        self.pool.waiting.pop(self, None)
        for timer in (self.read_timer, self.write_timer):
            if timer is not None:
                timer.cancel()
        self._count(False)
        super().connection_lost(exc)
        self.responses.close = self.transport.close  # breaks the reference cycle with this protocol

    def data_received(self, data: bytes) -> None:
        """Read, unless a new request is handed off to a sibling."""
        idle = self.state is ConnState.IDLE
        if not (idle and self.siblings is not None and self.siblings.hand_off(self.transport, data)):
            self._receive(data)

    def pause_writing(self) -> None:
        """The write buffer is full: the client must read."""
        super().pause_writing()
        self._watch_writes()

    def resume_writing(self) -> None:
        """The client has read."""
        super().resume_writing()
        self._watch_writes()

    # Called by the parser

    def on_message_begin(self) -> None:
        """Start to read a head."""
        self.in_head = True
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        """Drop the trailers of a chunked body, which would pass for headers that a proxy has checked."""
        if self.in_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Start the request, or raise an error, which stops the parser, to refuse it."""
        self.in_head = False
        self.head_bytes = 0
        if self.lingering:  # a pipelined request after the last response
            raise MalformedRequestError(MALFORMED)
        version, method = self.parser.get_http_version(), self.parser.get_method()
        self.refusal = head_error(version, method, self.url, self.headers)
        if self.refusal is None and len(self.pipeline) >= MAX_PIPELINED:
            self.refusal = QueueFullError(
                f"more than {MAX_PIPELINED} requests pending on one connection", retry_after=1
            )
        if self.refusal is not None:
            raise self.refusal
        if not self.parser.should_upgrade():  # otherwise see _feed
            super().on_headers_complete()
            self.cycle.transport = self.responses  # type: ignore[assignment]  # has all that a cycle uses

    def on_body(self, body: bytes) -> None:
        """Pass on a part of a body."""
        self.head_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """End a request; after an early response the connection may close now."""
        self.head_bytes = 0
        if not self.parser.should_upgrade():
            self.cycle.more_body = False  # after an early response uvicorn does not set it
            super().on_message_complete()
            if self.lingering:  # the client sends no more, so no reset can destroy the response
                self.transport.close()

    # Called by uvicorn

    def on_response_complete(self) -> None:
        """Go on with the next request."""
        super().on_response_complete()
        self._unset_keepalive_if_required()  # our read timer distinguishes an incomplete head from an idle client
        self._update_state()

    def shutdown(self) -> None:
        """Close once the current response has left."""
        super().shutdown()
        if self.transport.is_closing():
            self._watch_writes()

    # Reading

    def _receive(self, data: bytes) -> None:
        """Parse data. At most one read (256 kB) is not in `head_bytes`, because its start may complete a head."""
        if self.refusal is not None:
            return
        self.head_bytes += len(data)
        self._feed(data)
        if self.refusal is None and self.head_bytes > MAX_HEADER_BYTES:
            self._refuse(HeadersTooLargeError(TOO_LARGE))
        self._update_state()

    def _feed(self, data: bytes) -> None:
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            # Java's client sends this header (h2c) with every request. No other protocol is offered, so the request is
            # served as if the header were absent: the head passes through another parser without it, because this one
            # would skip the body and read it as the next request.
            version = self.parser.get_http_version().encode()
            head = [b"%s %s HTTP/%s\r\n" % (self.parser.get_method(), self.url, version)]
            head += [b"%s: %s\r\n" % pair for pair in self.headers if pair[0] != b"upgrade"]
            self.parser = httptools.HttpRequestParser(self)
            self._feed(b"".join([*head, b"\r\n", data[upgrade.args[0] :]]))
        except httptools.HttpParserError:
            self._refuse(self.refusal or MalformedRequestError(MALFORMED))

    def _refuse(self, error: RerankError) -> None:
        """Respond to data that is no request, after the responses to the requests before it, and read no more."""
        self.refusal = error
        if self.lingering or self.transport.is_closing():
            return
        response = error_response(error)
        request_id = new_id()
        self.metrics.refused(response.status_code, error.error_type)
        found = self.address.of({"client": self.client, "headers": []})
        facts = {"status": response.status_code, "id": request_id, **({"client_address": found} if found else {})}
        facts |= {"error_type": error.error_type, "detail": str(error)}
        text = "refused %d id=%s" + " client_address=%s" * bool(found) + ' error_type=%s detail="%s"'
        logger.info(text, *facts.values(), extra={"facts": facts})
        cycle = self.cycle
        if self.pipeline or self._current_state() is ConnState.RESPONDING:
            cycle.keep_alive = False  # the newest cycle, so the connection closes after its response
            return
        if cycle is None or cycle.response_complete or not cycle.response_started:
            headers = dict(response.raw_headers) | {b"x-request-id": request_id.encode(), b"connection": b"close"}
            head = b"".join(b"%s: %s\r\n" % pair for pair in headers.items())
            self.transport.write(STATUS_LINE[response.status_code] + head + b"\r\n" + bytes(response.body))
        self._close()

    # State and timeouts

    def _current_state(self) -> ConnState:
        cycle = self.cycle
        if self.transport.is_closing():
            return ConnState.CLOSED
        if self.lingering:
            return ConnState.DISCARDING_BODY
        if cycle is not None and not cycle.response_complete:
            return ConnState.READING_BODY if cycle.more_body else ConnState.RESPONDING
        if self.in_head:
            return ConnState.READING_HEAD
        return ConnState.DISCARDING_BODY if cycle is not None and cycle.more_body else ConnState.IDLE

    def _update_state(self) -> None:
        """Start the timeout of the current state, unless it runs already."""
        state = self._current_state()
        self._count(state is ConnState.RESPONDING or state is ConnState.READING_BODY)
        if state is self.state:
            return
        self.state = state
        self.pool.waiting.pop(self, None)
        if self.read_timer is not None:
            self.read_timer.cancel()
        if state is ConnState.RESPONDING or state is ConnState.CLOSED:
            return
        self.pool.waiting[self] = None
        if state is not ConnState.READING_BODY:  # that timeout is in http/limits.py
            seconds = self.timeout_keep_alive if state is ConnState.IDLE else self.io_timeout
            self.read_timer = self.loop.call_later(seconds, self._on_read_timeout)

    def _count(self, in_progress: bool) -> None:
        """Publish the start or end of a request to the siblings."""
        if in_progress is not self.in_progress and self.siblings is not None:
            self.in_progress = in_progress
            self.siblings.count(1 if in_progress else -1)

    def _on_read_timeout(self) -> None:
        if self.state is ConnState.READING_HEAD:
            self._refuse(HeadTimeoutError(f"the head of the request did not arrive within {self.io_timeout:g} s"))
        else:
            self.transport.close()
            self._watch_writes()

    def _close(self) -> None:
        """Close the connection after the last response, immediately if its request is complete.

        Otherwise close only the sending half. Many clients send the whole request before they read, and the reset of a
        closed socket would destroy the response. The other half closes at the end of the request or at its deadline.
        """
        incomplete = self.cycle is not None and self.cycle.more_body
        if self.refusal is None and not incomplete:
            self.transport.close()
        elif not self.lingering:
            self.lingering = True
            self.pipeline.clear()
            if self.cycle is not None and not self.cycle.response_complete:
                self.cycle.disconnected = True
                self.cycle.message_event.set()
            if self.transport.can_write_eof():  # not over TLS, where Content-Length alone ends the response
                self.transport.write_eof()
        self._update_state()
        self._watch_writes()

    def _watch_writes(self) -> None:
        """While data is unsent, abort the connection if none of it leaves within the timeout."""
        if self.write_timer is not None:
            self.write_timer.cancel()
        if self.transport.get_write_buffer_size() > 0:
            self.write_timer = self.loop.call_later(self.io_timeout, self._on_write_timeout, self._unsent_bytes())

    def _unsent_bytes(self) -> int:
        """Count unacknowledged bytes, including the kernel's, which takes data from the buffer 1 MB at a time."""
        unsent: int = self.transport.get_write_buffer_size()
        with suppress(OSError):  # not supported by every system
            file = self.transport.get_extra_info("socket").fileno()
            unsent += int.from_bytes(fcntl.ioctl(file, termios.TIOCOUTQ, bytes(4)), sys.byteorder)
        return unsent

    def _on_write_timeout(self, unsent_before: int) -> None:
        if self._unsent_bytes() < unsent_before:
            self._watch_writes()
        else:
            self.abort()

    def abort(self) -> None:
        """Close the connection immediately and drop unsent data."""
        self.pool.waiting.pop(self, None)
        self.transport.abort()
