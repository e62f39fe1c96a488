"""A lean HTTP client for load: a general one costs as much per request as the service does, and quadratically in open
connections, so it would measure itself.
"""

from __future__ import annotations

import asyncio
import json
import time
from contextlib import suppress
from dataclasses import dataclass

Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@dataclass(frozen=True, slots=True)
class Answer:
    """A response, and the seconds since the first byte of its request."""

    status: int
    headers: dict[str, str]
    body: bytes
    seconds: float

    def json(self) -> object:
        """The body's value."""
        return json.loads(self.body)


class Wire:
    """As many connections to one server as there are requests at once; kept alive between them, and closed in the end.

    The server's KEEP_ALIVE must be longer than a connection is idle: nothing is sent twice.

    Args:
        port: on 127.0.0.1.
        token: for the Authorization header.
    """

    def __init__(self, port: int, token: str = "") -> None:
        self.port = port
        self._token = f"Authorization: Bearer {token}\r\n" if token else ""
        self._idle: list[Connection] = []
        self._writers: set[asyncio.StreamWriter] = set()

    async def __aenter__(self) -> Wire:
        """Nothing is opened before it is needed."""
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close everything."""
        self._idle.clear()
        await asyncio.gather(*map(self._drop, list(self._writers)))

    async def ask(self, path: str, content: bytes | None = None, *, method: str = "", head: str = "") -> Answer:
        """One request: a POST of JSON, or a GET where there is no content.

        Args:
            head: header lines of one's own, each with its line end.

        Raises:
            OSError, EOFError: no connection, or it broke.
        """
        start = time.perf_counter()
        reader, writer = await self._connect()
        try:
            writer.write(self._head(method or ("GET" if content is None else "POST"), path, content, head))
            status, headers = await _read_head(reader)
            body = await reader.readexactly(int(headers.get("content-length", "0")))
        except BaseException:  # a cancellation too: half a response is of no use
            writer.transport.abort()
            raise
        if headers.get("connection") == "close":
            await self._drop(writer)
        else:
            self._idle.append((reader, writer))
        return Answer(status, headers, body, time.perf_counter() - start)

    async def leave(self, path: str, content: bytes, seconds: float, part: float = 1.0) -> None:
        """Send that part of a request, wait and hang up."""
        _, writer = await self._open()
        data = self._head("POST", path, content, "")
        writer.write(data[: int(len(data) * part)])
        await asyncio.sleep(seconds)
        writer.transport.abort()
        await self._drop(writer)

    def _head(self, method: str, path: str, content: bytes | None, head: str) -> bytes:
        if content is not None:
            head += f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n"
        return f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n{self._token}{head}\r\n".encode() + (content or b"")

    async def _connect(self) -> Connection:
        while self._idle:
            reader, writer = self._idle.pop()
            if not reader.at_eof():
                return reader, writer
            await self._drop(writer)
        return await self._open()

    async def _open(self) -> Connection:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        self._writers.add(writer)
        return reader, writer

    async def _drop(self, writer: asyncio.StreamWriter) -> None:
        self._writers.discard(writer)
        writer.close()
        with suppress(OSError):  # it broke before
            await writer.wait_closed()


async def _read_head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")[:-2]
    pairs = (line.partition(":") for line in lines)
    return int(first.split(" ")[1]), {name.lower(): value.strip() for name, _, value in pairs}
