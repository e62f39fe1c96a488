"""Bytes over a socket, as no well-behaved client sends them, and a look at the worker that gets them."""

from __future__ import annotations

import json
import re
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from tests.conftest import MAX_WAIT, Server
from tests.http import test_metrics as metrics


@dataclass
class Answers:
    """The bytes received on one connection."""

    data: bytes
    closed: bool
    """By the service, before the deadline."""
    seconds: float

    @property
    def statuses(self) -> list[int]:
        return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3}) ", self.data)]

    @property
    def error(self) -> dict[str, Any]:
        """The one error in it, which has the shape that every error has."""
        head, _, body = self.data.partition(b"\r\n\r\n")
        assert b"content-type: application/json" in head
        assert re.search(rb"\r\nx-request-id: [\w.-]+", head)
        error: dict[str, Any] = json.loads(body)
        assert set(error) == {"detail", "error_type", "message", "error"}
        assert error["message"] == error["error"]["message"] == error["detail"]
        assert error["error"]["type"] == error["error_type"]
        assert len(body) < 1000
        return error


def connect(server: Server, wait: float = MAX_WAIT) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), timeout=wait)


def listen(connection: socket.socket, wait: float = MAX_WAIT, answers: int | None = None) -> Answers:
    """Receive until the service closes, `answers` responses are complete, or the deadline has passed."""
    start = time.monotonic()
    data, closed = b"", False
    try:
        while (answers is None or whole(data) < answers) and time.monotonic() - start < wait:
            connection.settimeout(max(0.01, start + wait - time.monotonic()))
            piece = connection.recv(1 << 20)
            if not piece:
                closed = True
                break
            data += piece
    except TimeoutError:
        pass
    except OSError:  # reset: the service closed while bytes of ours were on their way
        closed = True
    return Answers(data, closed, time.monotonic() - start)


def whole(data: bytes) -> int:
    """The number of complete responses with a length."""
    count = 0
    while b"\r\n\r\n" in data:
        head, _, data = data.partition(b"\r\n\r\n")
        length = re.search(rb"\r\ncontent-length: (\d+)", head)
        if length is None or len(data) < int(length[1]):
            break
        data = data[int(length[1]) :]
        count += 1
    return count


def send(connection: socket.socket, data: bytes) -> bool:
    """False when the service closed meanwhile."""
    try:
        connection.sendall(data)
    except OSError:
        return False
    return True


def exchange(server: Server, data: bytes, wait: float = MAX_WAIT, answers: int | None = None) -> Answers:
    with connect(server, wait) as connection:
        send(connection, data)
        return listen(connection, wait, answers)


def once(server: Server, data: bytes) -> Answers:
    """The response to a last request, sent with `Connection: close`."""
    return exchange(server, data.replace(b"Host: h\r\n", b"Host: h\r\nConnection: close\r\n", 1))


def post(body: bytes, headers: bytes = b"", path: bytes = b"/v1/rerank") -> bytes:
    """A request with its length."""
    return b"POST %s HTTP/1.1\r\nHost: h\r\n%sContent-Length: %d\r\n\r\n%s" % (path, headers, len(body), body)


def workers(server: Server) -> list[int]:
    """Process ids of all workers that were ever started."""
    return [int(pid) for pid in re.findall(r"Booting worker with pid: (\d+)", server.log)]


def busy(server: Server, requests: int) -> None:
    """Wait until `requests` requests are in progress, besides the one for the metrics."""
    metrics.once(server, lambda found: metrics.value(found, "reranker_requests_in_progress") == requests + 1)


class Spent:
    """Processor time of the worker, which a busy machine does not stretch: `with Spent(server) as spent`."""

    def __init__(self, server: Server) -> None:
        self.worker = psutil.Process(workers(server)[-1])
        self.seconds = -1.0

    def __enter__(self) -> Spent:
        self.before = self._read()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = self._read() - self.before

    def _read(self) -> float:
        times = self.worker.cpu_times()
        return float(times.user + times.system)


class Peak:
    """How far the worker's resident memory rose at most: `with Peak(server) as peak: ...; peak.megabytes`."""

    def __init__(self, server: Server) -> None:
        [pid] = workers(server)
        self.folder = Path(f"/proc/{pid}")
        self.megabytes = -1.0

    def __enter__(self) -> Peak:
        (self.folder / "clear_refs").write_text("5")  # forgets the peak until now
        self.before = self._read("VmRSS")
        return self

    def __exit__(self, *_: object) -> None:
        self.megabytes = (self._read("VmHWM") - self.before) / 1024

    def _read(self, name: str) -> int:
        found = re.search(rf"{name}:\s+(\d+) kB", (self.folder / "status").read_text())
        assert found is not None
        return int(found[1])
