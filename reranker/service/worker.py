"""The gunicorn worker: uvicorn's own, with its limits set from gunicorn's settings and its signals mended."""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import signal
import sys
from functools import partial
from types import FrameType
from typing import Any, ClassVar

from gunicorn.arbiter import Arbiter
from uvicorn.server import Server
from uvicorn_worker import UvicornWorker

from reranker.service.protocol import Connections, HttpProtocol

# Connections beyond WORKER_CONNECTIONS: gunicorn's backlog. As many can come at once, and whoever is cut off to make
# room for them has had a turn to be read.
_SPARE_CONNECTIONS = 2048
# Files that the process holds beside its connections: the model, the metrics, the listener, the libraries.
_OTHER_FILES = 256


class RerankWorker(UvicornWorker):  # type: ignore[misc]  # neither package is typed
    """What stands behind both accepted names of WORKER_CLASS."""

    CONFIG_KWARGS: ClassVar[dict[str, Any]] = {
        "loop": "uvloop",
        "ws": "none",
        "access_log": False,
        "server_header": False,
    }

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for name in ("uvicorn.error", "uvicorn.access"):  # back under the one handler of config.log_config
            logging.getLogger(name).handlers = []
            logging.getLogger(name).propagate = name == "uvicorn.error"
        # Below gunicorn's own deadline, so that uvicorn cancels (and we answer 503) before gunicorn kills.
        self.config.timeout_graceful_shutdown = max(1, self.cfg.graceful_timeout - 5)
        self.config.timeout_notify = 1

    async def _serve(self) -> None:
        self.config.app = self.wsgi
        self.config.http = partial(
            HttpProtocol,
            among=Connections(room(self.cfg.worker_connections + _SPARE_CONNECTIONS)),
            metrics=self.wsgi.state.metrics,
            patience=self.wsgi.state.body_timeout,
        )
        server = DrainingServer(self.config)
        server.loop = asyncio.get_running_loop()
        # uvicorn's worker ignores SIGQUIT, which gunicorn sends on Ctrl-C, and is killed after the grace period.
        server.loop.add_signal_handler(signal.SIGQUIT, server.handle_exit, signal.SIGTERM, None)
        beat = asyncio.create_task(self._beat_until_started(server))
        await server.serve(sockets=self.sockets)
        beat.cancel()
        if not server.started:
            sys.exit(Arbiter.WORKER_BOOT_ERROR)

    async def _beat_until_started(self, server: Server) -> None:
        """A worker that loads before it listens is alive all the same; uvicorn beats only from then on."""
        while not server.started:
            await self.callback_notify()
            await asyncio.sleep(1)

    async def callback_notify(self) -> None:
        """The heartbeat. A worker whose master was killed ends, instead of holding the GPU as an orphan."""
        if os.getppid() != self.ppid:
            os.kill(os.getpid(), signal.SIGTERM)
        self.notify()


class DrainingServer(Server):
    """Tells the application that it is draining when a signal comes."""

    loop: asyncio.AbstractEventLoop

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called for SIGINT, SIGTERM and SIGQUIT, which all mean: finish what was accepted, then end."""
        # On the loop and not in the signal handler: draining touches metrics, whose locks the loop may hold just now.
        self.loop.call_soon_threadsafe(self._drain)
        # Ctrl-C reaches a worker twice, from the terminal and from gunicorn: a second SIGINT would cut answers off.
        super().handle_exit(signal.SIGTERM, frame)

    def _drain(self) -> None:
        batcher = getattr(getattr(self.config.app, "state", None), "batcher", None)
        if batcher is not None:
            batcher.drain()


def room(connections: int) -> int:
    """So many connections, or as many as the system's limit on open files allows, which is raised where possible."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = connections + _OTHER_FILES
    if hard != resource.RLIM_INFINITY:
        files = min(files, hard)
    if soft != resource.RLIM_INFINITY and soft < files:
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, hard))
    return max(1, min(connections, files - _OTHER_FILES))
