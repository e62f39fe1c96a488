"""A rolling restart: SIGUSR2 makes gunicorn start a new master beside the old one, on the same listening socket.

The workers of the new generation load before they listen. The last of them to be ready ends the old generation, which
answers what it has accepted. Until then nothing has changed for any client; and where the new generation cannot load,
it ends and the old one goes on.
"""

from __future__ import annotations

import logging
import os
import signal
from contextlib import suppress

import psutil

logger = logging.getLogger(__name__)


class Handover:
    """Made in the new master, used in each of its workers.

    Args:
        old: process id of the old master, whose child the new one is.
        workers: how many have to be ready.
    """

    def __init__(self, old: int, workers: int) -> None:
        self.old = old
        # All but the last worker find a byte in the pipe; the last one finds its end.
        self._others, fill = os.pipe()
        os.write(fill, b"." * (workers - 1))
        os.close(fill)

    def ready(self) -> None:
        """This worker serves."""
        if os.read(self._others, 1):
            return
        with suppress(psutil.NoSuchProcess, ProcessLookupError):  # one of the two masters ended meanwhile
            if psutil.Process(os.getppid()).ppid() != self.old:  # it ended before; its number may be another's by now
                return
            logger.info("the new generation serves; the old one (%d) finishes what it accepted and ends", self.old)
            os.kill(self.old, signal.SIGTERM)
