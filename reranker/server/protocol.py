"""HTTP/1.1 as the workers speak it: uvicorn's protocol, with an end to all that a client can hold open or make grow.

uvicorn collects a head without bound before the application sees any of it, closes a connection only when it idles
after an answer, waits for ever for a client that does not read, and answers 503 to everybody, probes included, once
too many connections are open. Here every wait for a client has a deadline, and every pile a height:

    says nothing                        closed after KEEP_ALIVE
    head not complete                   408 after BODY_TIMEOUT; 431 above MAX_HEADER_BYTES
    body not complete                   limits.py: 408, 413; after an early response: read and dropped until
                                        BODY_TIMEOUT, then closed
    answer not read                     cut off when nothing of it left within BODY_TIMEOUT
    more requests at once on one line   refused above MAX_PIPELINED
    too many connections                the one that made the service wait the longest makes room

What two parsers in a row could read in two ways is refused, and so is everything after it on that connection.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import sys
import termios
from collections.abc import Callable
from contextlib import suppress
from enum import Enum
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from reranker.errors import HeadersTooLargeError, HeadTimeoutError, MalformedRequestError, QueueFullError, RerankError
from reranker.http.access import new_id
from reranker.http.errors import error_response
from reranker.http.limits import MAX_HEADER_BYTES
from reranker.http.metrics import Metrics
from reranker.server.balance import Siblings

logger = logging.getLogger(__name__)

MAX_PIPELINED = 64
"""Requests that wait on one connection for the answers before theirs. No client that we know sends a second one."""


class Owed(Enum):
    """What the service waits for on a connection."""

    REQUEST = "a request"
    HEAD = "the rest of a head"
    BODY = "the rest of a body"
    UNWANTED = "the rest of a body whose answer was given"


class Connections:
    """The connections of a worker that wait for their clients, in the order in which they began to.

    Args:
        most: connections, whatever they do.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.waiting: dict[HttpProtocol, None] = {}
        self._told = float("-inf")

    def make_room(self, now: float) -> None:
        """Cut off the one that waits for the longest; without it a flood of idle ones would lock everybody out."""
        if now - self._told > 60:
            self._told = now
            logger.warning("more than %d connections: those that idle the longest are cut off", self.most)
        if self.waiting:
            next(iter(self.waiting)).cut()


class ResponseTransport:
    """The three methods of a transport that uvicorn's request cycle calls; `close` may linger.

    There is one per connection. It holds bound methods because every response calls them.
    """

    __slots__ = ("close", "is_closing", "write")

    def __init__(self, transport: asyncio.Transport, close: Callable[[], None]) -> None:
        self.write = transport.write
        self.is_closing = transport.is_closing
        self.close = close


class HttpProtocol(HttpToolsProtocol):
    """One connection. Made by uvicorn; what is not uvicorn's own is bound by the worker.

    Args:
        among: all of them.
        metrics: where refusals are counted.
        patience: seconds for a head to arrive, and between two signs that an answer is being read.
        siblings: the workers that a request may be passed on to; None: there are none.
        first: bytes that another worker has read of a connection that it passed on.
    """

    def __init__(
        self,
        *args: Any,
        among: Connections,
        metrics: Metrics,
        patience: float,
        siblings: Siblings | None = None,
        first: bytes = b"",
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.among = among
        self.metrics = metrics
        self.patience = patience
        self.siblings = siblings
        self.first = first
        self.counted = False
        """Among the requests in progress that the siblings see."""
        self.owed: Owed | None = None
        self.deadline: asyncio.TimerHandle | None = None
        self.unread: asyncio.TimerHandle | None = None
        self.in_head = False
        self.bytes_in_vain = 0
        """That came since a head or a piece of a body was complete: a head, a trailer, the extension of a chunk."""
        self.refusal: RerankError | None = None
        """Given or about to be; all data received from then on is dropped."""
        self.responses: ResponseTransport
        self.lingering = False
        """The last response was sent before its request was complete; the rest is read and dropped."""

    # What uvicorn calls

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client is here."""
        super().connection_made(transport)
        self.responses = ResponseTransport(transport, self._close)
        if len(self.connections) > self.among.most:
            self.among.make_room(self.loop.time())
        self._watch()
        if self.first:  # passed on once is enough
            self._receive(self.first)

    def connection_lost(self, exc: Exception | None) -> None:
        """The client left, or was cut off."""
        self.among.waiting.pop(self, None)
        for timer in (self.deadline, self.unread):
            if timer is not None:
                timer.cancel()
        self._count(False)
        super().connection_lost(exc)
        self.responses.close = self.transport.close  # breaks the reference cycle with this protocol

    def data_received(self, data: bytes) -> None:
        """Bytes came."""
        begins = self.owed is Owed.REQUEST
        if not (begins and self.siblings is not None and self.siblings.pass_on(self.transport, data)):
            self._receive(data)

    def on_message_begin(self) -> None:
        """The first byte of a head."""
        self.in_head = True
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header. Those behind a chunked body are left out: they would stand among those that a proxy checked."""
        if self.in_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """A head is complete."""
        self.in_head = False
        self.bytes_in_vain = 0
        method = self.parser.get_method()
        if self.lingering:  # a pipelined request after the last response
            raise _malformed()
        refusal = check(self.parser.get_http_version(), method, self.url, self.headers)
        if refusal is None and len(self.pipeline) >= MAX_PIPELINED:
            refusal = QueueFullError(f"more than {MAX_PIPELINED} requests at once on one connection", retry_after=1)
        if refusal is not None:
            self.refusal = refusal
            raise refusal  # makes the parser stop
        if not self.parser.should_upgrade():  # else see _feed
            super().on_headers_complete()
            self.cycle.transport = self.responses  # type: ignore[assignment]  # has all that a cycle uses

    def on_body(self, body: bytes) -> None:
        """A piece of a body."""
        self.bytes_in_vain = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """A request is complete."""
        self.bytes_in_vain = 0
        if not self.parser.should_upgrade():
            # uvicorn leaves it out when the answer was given already, and takes the body for incomplete for ever.
            self.cycle.more_body = False
            super().on_message_complete()
            if self.lingering:  # the client sends no more, so no reset can destroy the response
                self.transport.close()

    def on_response_complete(self) -> None:
        """An answer is complete."""
        super().on_response_complete()
        self._unset_keepalive_if_required()  # our own clock tells a head that began from silence
        self._watch()

    def shutdown(self) -> None:
        """The worker ends."""
        super().shutdown()
        if self.transport.is_closing():
            self._watch_reader()

    def pause_writing(self) -> None:
        """More of an answer waits than the system takes."""
        super().pause_writing()
        self._watch_reader()

    def resume_writing(self) -> None:
        """The client reads."""
        super().resume_writing()
        self._watch_reader()

    # Reading

    def _receive(self, data: bytes) -> None:
        """Read on. What the first bytes complete is not told apart: at most one read (256 kB) is not counted."""
        if self.refusal is not None:
            return
        self.bytes_in_vain += len(data)
        self._unset_keepalive_if_required()
        self._feed(data)
        if self.refusal is None and self.bytes_in_vain > MAX_HEADER_BYTES:
            self._refuse(_too_large())
        self._watch()

    def _feed(self, data: bytes) -> None:
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            # No other protocol is offered, so the header is as good as absent, and Java's client, which sends it with
            # every request (h2c), is served. The parser would skip the body and read it as the next request, so the
            # head goes through another parser, without the header.
            version = self.parser.get_http_version().encode()
            head = [b"%s %s HTTP/%s\r\n" % (self.parser.get_method(), self.url, version)]
            head += [b"%s: %s\r\n" % pair for pair in self.headers if pair[0] != b"upgrade"]
            self.parser = httptools.HttpRequestParser(self)
            self._feed(b"".join([*head, b"\r\n", data[upgrade.args[0] :]]))
        except httptools.HttpParserError:
            self._refuse(self.refusal or _malformed())

    def _refuse(self, error: RerankError) -> None:
        """Answer what cannot become a request, and read no more. What was asked before is answered first."""
        self.refusal = error
        if self.lingering or self.transport.is_closing():
            return
        answer = error_response(error)
        request_id = new_id()
        self.metrics.refused(answer.status_code, error.error_type)
        facts = {"status": answer.status_code, "id": request_id, "error_type": error.error_type}
        logger.info("refused %d id=%s error_type=%s", *facts.values(), extra={"facts": facts})
        cycle = self.cycle
        if self.pipeline or (cycle is not None and not cycle.response_complete and not cycle.more_body):
            cycle.keep_alive = False  # of the newest: the connection ends behind its answer
            return
        if cycle is None or cycle.response_complete or not cycle.response_started:
            headers = dict(answer.raw_headers) | {b"x-request-id": request_id.encode(), b"connection": b"close"}
            head = b"".join(b"%s: %s\r\n" % pair for pair in headers.items())
            self.transport.write(STATUS_LINE[answer.status_code] + head + b"\r\n" + bytes(answer.body))
        self._close()

    # Waiting

    def _watch(self) -> None:
        """Start the clock of what the client owes now, unless it runs already."""
        closing = self.transport.is_closing()
        owed = None if closing else self._owed()
        self._count(not closing and owed in (None, Owed.BODY))
        if owed is self.owed:
            return
        self.owed = owed
        self.among.waiting.pop(self, None)
        if self.deadline is not None:
            self.deadline.cancel()
        if owed is not None:
            self.among.waiting[self] = None
        if owed not in (None, Owed.BODY):  # that one is limits.py's
            seconds = self.timeout_keep_alive if owed is Owed.REQUEST else self.patience
            self.deadline = self.loop.call_later(seconds, self._too_late)

    def _count(self, in_progress: bool) -> None:
        """Let the siblings know of a request that began or ended here."""
        if in_progress is not self.counted and self.siblings is not None:
            self.counted = in_progress
            self.siblings.count(1 if in_progress else -1)

    def _owed(self) -> Owed | None:
        """None: it is the service's turn."""
        if self.lingering:
            return Owed.UNWANTED
        if self.cycle is not None and not self.cycle.response_complete:
            return Owed.BODY if self.cycle.more_body else None
        if self.in_head:
            return Owed.HEAD
        return Owed.UNWANTED if self.cycle is not None and self.cycle.more_body else Owed.REQUEST

    def _too_late(self) -> None:
        if self.owed is Owed.HEAD:
            self._refuse(HeadTimeoutError(f"the head of the request did not arrive within {self.patience:g} s"))
        else:
            self.transport.close()
            self._watch_reader()

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
        self._watch()
        self._watch_reader()

    def _watch_reader(self) -> None:
        """As long as something is to be sent, some of it must leave."""
        if self.unread is not None:
            self.unread.cancel()
        waits = self.transport.get_write_buffer_size() > 0
        self.unread = self.loop.call_later(self.patience, self._stalled, self._left()) if waits else None

    def _left(self) -> int:
        """Bytes that did not arrive yet: ours and the kernel's, which takes the next ones in leaps of a megabyte."""
        left: int = self.transport.get_write_buffer_size()
        with suppress(OSError):  # a system that does not tell
            file = self.transport.get_extra_info("socket").fileno()
            left += int.from_bytes(fcntl.ioctl(file, termios.TIOCOUTQ, bytes(4)), sys.byteorder)
        return left

    def _stalled(self, before: int) -> None:
        if self._left() < before:
            self._watch_reader()
        else:
            self.cut()

    def cut(self) -> None:
        """End the connection now."""
        self.among.waiting.pop(self, None)
        self.transport.abort()


# New ones each time: an exception object that is raised again keeps the frames of every time before.
def _too_large() -> HeadersTooLargeError:
    return HeadersTooLargeError(f"the address and headers are larger than {MAX_HEADER_BYTES} bytes")


def _malformed() -> MalformedRequestError:
    return MalformedRequestError("the request is not valid HTTP")


def check(version: str, method: bytes, url: bytes, headers: list[tuple[bytes, bytes]]) -> RerankError | None:
    """Why a head is refused that the parser let through, or None. Sections are those of RFC 9112."""
    codings = [value.lower() for name, value in headers if name == b"transfer-encoding"]
    hosts = sum(name == b"host" for name, _ in headers)
    if len(url) > MAX_HEADER_BYTES:
        return _too_large()
    if version not in ("1.0", "1.1"):
        return MalformedRequestError("only versions 1.0 and 1.1 of HTTP are spoken here")
    if method == b"CONNECT":
        return MalformedRequestError("this is not a proxy")
    if b"#" in url:  # 3.2: no target has a fragment
        return MalformedRequestError("the address holds a #")
    if codings and (version == "1.0" or codings != [b"chunked"]):  # 6.1
        return MalformedRequestError("Transfer-Encoding may only be chunked, and only in version 1.1")
    if hosts > 1 or (hosts == 0 and version == "1.1"):  # 3.2
        return MalformedRequestError("one Host header is needed")
    return None
