"""Hand-off of connections: the worker with the fewest requests in progress responds.

The workers share a listening socket, and the kernel spreads connections over them, not requests. The worker that wakes
first accepts all pending connections, and clients with keep-alive stay with it while other GPUs idle. A worker that
receives a request therefore compares the requests in progress, and hands the connection (a file descriptor over a Unix
socket) with the received bytes to a sibling that has fewer. The client notices nothing.

    workers       a memory-mapped file in the shared folder, with one cell for each slot
    worker_3      the Unix socket of slot 3

If a hand-off is impossible, the worker responds itself. A handed-off request fails only if its new worker dies, hangs
or has no free file descriptor.
"""

from __future__ import annotations

import asyncio
import logging
import math
import mmap
import os
import secrets
import socket
import struct
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

logger = logging.getLogger(__name__)

# Time of the last sign of life (CLOCK_MONOTONIC, the same for all processes; -inf: accepts no requests, 0: never used),
# requests in progress, count of accepted hand-offs.
_CELL = struct.Struct("=dII")
_MAX_WORKERS = 512
_MAX_AGE = 3.0  # seconds until a cell is stale; worker.py publishes every second, unless its event loop hangs
_IN_FLIGHT_SECONDS = 0.05  # in which a sent connection reaches its new worker
_MAX_BYTES = 1 << 18  # of a handed-off first read; uvloop reads up to 256,000


class Siblings:
    """The workers of one generation, as seen by the one in `slot`.

    Raises:
        OSError: the folder cannot be used.
    """

    def __init__(self, folder: str, slot: int, generation: str = "") -> None:
        if slot >= _MAX_WORKERS:
            raise OSError(f"more than {_MAX_WORKERS} workers")
        self.slot = slot
        self.requests = 0  # in progress here
        self._is_open: Callable[[], bool] = lambda: False
        self._make_protocol: Callable[[bytes], asyncio.Protocol]
        self._accepted = secrets.randbits(32)  # a random start differs from the predecessor's count
        self._sent: dict[int, int] = {}  # by slot: its count of accepted hand-offs when the last one was sent
        self._tasks: set[asyncio.Task[None]] = set()
        size = _CELL.size * _MAX_WORKERS
        file = os.open(Path(folder, f"workers{generation}"), os.O_RDWR | os.O_CREAT, 0o600)
        try:
            os.posix_fallocate(file, 0, size)  # a hole in a mapped file is a SIGBUS on a full disk
            self._cells = mmap.mmap(file, size)
        finally:
            os.close(file)
        self._address = str(Path(folder, f"worker{generation}_"))
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 * _MAX_BYTES)
        Path(f"{self._address}{slot}").unlink(missing_ok=True)
        self._socket.bind(f"{self._address}{slot}")
        self.publish()

    def join(self, is_open: Callable[[], bool], make_protocol: Callable[[bytes], asyncio.Protocol]) -> None:
        """Accept connections of siblings from now on, while `is_open`.

        `make_protocol` returns the protocol of a connection, given its first bytes.
        """
        self._is_open, self._make_protocol = is_open, make_protocol
        asyncio.get_running_loop().add_reader(self._socket, self._receive)
        self.publish()

    async def leave(self) -> None:
        """Stop accepting handed-off connections and drain those in flight."""
        self._is_open = lambda: False
        self.publish()
        with suppress(OSError):  # further sends fail
            os.unlink(f"{self._address}{self.slot}")
        await asyncio.sleep(_IN_FLIGHT_SECONDS)
        self._receive()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def count(self, requests: int) -> None:
        """Add to the requests in progress here."""
        self.requests += requests
        self.publish()

    def publish(self) -> None:
        """Write this worker's cell."""
        seen = time.monotonic() if self._is_open() else -math.inf
        _CELL.pack_into(self._cells, self.slot * _CELL.size, seen, self.requests, self._accepted)

    def hand_off(self, transport: asyncio.Transport, data: bytes) -> bool:
        """Give a connection with the first bytes of a request to the least busy sibling; False: it stays here.

        Only a POST is worth it, and only after all responses have left this process.
        """
        if not data.startswith(b"POST ") or len(data) > _MAX_BYTES or transport.get_write_buffer_size():
            return False
        sibling = self._least_busy()
        if sibling is None:
            return False
        slot, accepted = sibling
        try:
            rights = struct.pack("=i", transport.get_extra_info("socket").fileno())
            files = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)]  # send_fds of Python 3.11 ignores the address
            self._socket.sendmsg([data], files, 0, f"{self._address}{slot}")
        except OSError:  # it has ended, or its buffer is full
            return False
        self._sent[slot] = accepted
        transport.abort()  # closes this process's descriptor, not the connection
        return True

    def others_serve(self) -> bool:
        """Return whether a sibling accepts requests now."""
        now = time.monotonic()
        cells = enumerate(_CELL.iter_unpack(self._cells))
        return any(abs(now - seen) < _MAX_AGE for slot, (seen, _, _) in cells if slot != self.slot)

    def _least_busy(self) -> tuple[int, int] | None:
        """Return slot and accepted count of the sibling with the fewest requests, if it has fewer than this worker.

        A sibling that has not accepted the last connection from here is skipped, because its cell is out of date. A
        worker that hangs therefore costs each of its siblings at most one request.
        """
        least, sibling = (self.requests if self._is_open() else math.inf), None
        now = time.monotonic()
        for slot, (seen, requests, accepted) in enumerate(_CELL.iter_unpack(self._cells)):
            if not seen:  # slots are assigned from 0 on
                break
            available = abs(now - seen) < _MAX_AGE and self._sent.get(slot) != accepted
            if available and requests < least and slot != self.slot:
                least, sibling = requests, (slot, accepted)
        return sibling

    def _receive(self) -> None:
        while True:
            try:
                # recv_fds of Python 3.11 ignores the flags.
                data, messages, _, _ = self._socket.recvmsg(_MAX_BYTES, socket.CMSG_LEN(4), socket.MSG_CMSG_CLOEXEC)
            except BlockingIOError:
                return
            if not messages:  # the kernel closed the descriptor, because this process has too many
                logger.warning("a connection from another worker is lost: too many open files")
                asyncio.get_running_loop().call_later(_MAX_AGE, self._count_accepted)  # pauses the senders
            for _, _, rights in messages:
                [file] = struct.unpack("=i", rights)
                task = asyncio.create_task(self._accept(socket.socket(fileno=file), data))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

    async def _accept(self, connection: socket.socket, data: bytes) -> None:
        try:
            loop = asyncio.get_running_loop()
            await loop.connect_accepted_socket(lambda: self._make_protocol(data), connection)
        except OSError:  # client disconnected
            connection.close()
        finally:
            self._count_accepted()

    def _count_accepted(self) -> None:
        self._accepted = (self._accepted + 1) & 0xFFFFFFFF
        self.publish()
