"""Several workers on one host: a request goes to the worker that has the fewest in progress, its connection with it.

The workers share a listening socket, and the kernel spreads connections, not requests: the worker that wakes first
accepts all that wait, and clients that keep their connections stay with it while other GPUs idle. So a worker at which
a request arrives looks at what its siblings have in progress, and where one has less it sends that one the connection
(a file descriptor over a Unix socket) and the bytes that came. The client notices nothing.

    workers       a file that all of them map: a cell for each slot
    worker_3      the Unix socket of slot 3

They lie in the folder of the metrics. What cannot be passed on is answered where it is. Only a worker that dies, hangs
or has no more room for open files fails a request that was passed to it.
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

# Of each worker: when it was last able to take requests (CLOCK_MONOTONIC, which is one for all processes; -inf: it is
# not able, 0: there was never such a worker), requests in progress, and a count of the connections that it took over.
_CELL = struct.Struct("=dII")
_CELLS = 512
_FRESH = 3.0
"""Seconds; worker.py has every worker show itself once a second, unless its event loop hangs."""
_ON_ITS_WAY = 0.05
"""Seconds in which a connection that a sibling passed on arrives."""
_MOST_BYTES = 1 << 18
"""Of a request, with its connection; uvloop reads 256,000 at once."""


class Siblings:
    """The workers of one generation, as one of them sees them.

    Args:
        folder: shared by all of them.
        slot: of this one; no other living worker has it.
        generation: tells the two of a rolling restart apart.

    Raises:
        OSError: the folder cannot be used.
    """

    def __init__(self, folder: str, slot: int, generation: str = "") -> None:
        if slot >= _CELLS:
            raise OSError(f"more than {_CELLS} workers")
        self.slot = slot
        self.requests = 0
        """In progress here."""
        self._open: Callable[[], bool] = lambda: False
        self._take: Callable[[bytes], asyncio.Protocol]
        self._taken = secrets.randbits(32)  # anywhere: nobody takes it for its predecessor's
        self._sent: dict[int, int] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        size = _CELL.size * _CELLS
        file = os.open(Path(folder, f"workers{generation}"), os.O_RDWR | os.O_CREAT, 0o600)
        try:
            os.posix_fallocate(file, 0, size)  # as in metrics.py: what is mapped must be there, on a full disk too
            self._cells = mmap.mmap(file, size)
        finally:
            os.close(file)
        self._address = str(Path(folder, f"worker{generation}_"))
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 * _MOST_BYTES)
        Path(f"{self._address}{slot}").unlink(missing_ok=True)
        self._socket.bind(f"{self._address}{slot}")
        self.show()

    def join(self, is_open: Callable[[], bool], take: Callable[[bytes], asyncio.Protocol]) -> None:
        """Take over what the others pass on; called on the event loop.

        Args:
            is_open: whether this worker can take requests now.
            take: makes the protocol of a connection whose first bytes are given.
        """
        self._open, self._take = is_open, take
        asyncio.get_running_loop().add_reader(self._socket, self._read)
        self.show()

    async def leave(self) -> None:
        """Be passed nothing more, and take what is on its way."""
        self._open = lambda: False
        self.show()
        with suppress(OSError):  # nobody finds it any more
            os.unlink(f"{self._address}{self.slot}")
        await asyncio.sleep(_ON_ITS_WAY)
        self._read()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def count(self, requests: int) -> None:
        """So many more are in progress here."""
        self.requests += requests
        self.show()

    def show(self) -> None:
        """Let the others know."""
        seen = time.monotonic() if self._open() else -math.inf
        _CELL.pack_into(self._cells, self.slot * _CELL.size, seen, self.requests, self._taken)

    def pass_on(self, transport: asyncio.Transport, data: bytes) -> bool:
        """Whether the connection is another worker's now, with these first bytes of a request.

        Only a POST is worth it, and only behind answers that have left.
        """
        if not data.startswith(b"POST ") or len(data) > _MOST_BYTES or transport.get_write_buffer_size():
            return False
        found = self._least()
        if found is None:
            return False
        slot, taken = found
        try:
            rights = struct.pack("=i", transport.get_extra_info("socket").fileno())
            files = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)]  # socket.send_fds of Python 3.11 loses the address
            self._socket.sendmsg([data], files, 0, f"{self._address}{slot}")
        except OSError:  # it died, or has no room
            return False
        self._sent[slot] = taken
        transport.abort()  # closes this process's descriptor, not the connection
        return True

    def others_serve(self) -> bool:
        """Return whether a sibling accepts requests now."""
        now = time.monotonic()
        cells = enumerate(_CELL.iter_unpack(self._cells))
        return any(abs(now - seen) < _FRESH for slot, (seen, _, _) in cells if slot != self.slot)

    def _least(self) -> tuple[int, int] | None:
        """The slot of the sibling with the fewest requests, if that is fewer than here, and how many it has taken over.

        One that has not taken over yet what it was last sent from here is left alone: what it shows is old. So a worker
        that hangs costs each of its siblings one request at most.
        """
        least, found = (self.requests if self._open() else math.inf), None
        now = time.monotonic()
        for slot, (seen, requests, taken) in enumerate(_CELL.iter_unpack(self._cells)):
            if not seen:  # slots are given from 0 on
                break
            able = abs(now - seen) < _FRESH and self._sent.get(slot) != taken
            if able and requests < least and slot != self.slot:
                least, found = requests, (slot, taken)
        return found

    def _read(self) -> None:
        """Connections come."""
        while True:
            try:
                # socket.recv_fds of Python 3.11 forgets the flags.
                data, with_it, _, _ = self._socket.recvmsg(_MOST_BYTES, socket.CMSG_LEN(4), socket.MSG_CMSG_CLOEXEC)
            except BlockingIOError:
                return
            if not with_it:  # this process has no more room for open files, and the kernel has closed it
                logger.warning("a connection of another worker could not be taken over: too many open files")
                asyncio.get_running_loop().call_later(_FRESH, self._took)  # until then nobody sends another
            for _, _, rights in with_it:
                [file] = struct.unpack("=i", rights)
                task = asyncio.create_task(self._take_over(socket.socket(fileno=file), data))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

    async def _take_over(self, connection: socket.socket, data: bytes) -> None:
        try:
            loop = asyncio.get_running_loop()
            await loop.connect_accepted_socket(lambda: self._take(data), connection)
        except OSError:  # the client left
            connection.close()
        finally:
            self._took()

    def _took(self) -> None:
        self._taken = (self._taken + 1) & 0xFFFFFFFF
        self.show()
