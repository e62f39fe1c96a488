"""The gunicorn worker: uvicorn's own, with its limits set from gunicorn's settings and its signals mended."""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import signal
import socket
import sys
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING, Any, ClassVar

from gunicorn.arbiter import Arbiter
from uvicorn.config import Config
from uvicorn.server import Server
from uvicorn_worker import UvicornWorker

from reranker.http.state import service_of
from reranker.server.balance import Siblings
from reranker.server.handover import Handover
from reranker.server.protocol import Connections, HttpProtocol

if TYPE_CHECKING:
    from reranker.scheduler.batcher import Batcher

logger = logging.getLogger(__name__)

# Connections beyond WORKER_CONNECTIONS: gunicorn's backlog. As many can come at once, and whoever is cut off to make
# room for them has had a turn to be read.
_SPARE_CONNECTIONS = 2048
# Files that the process holds beside its connections: the model, the metrics, the listener, the libraries.
_OTHER_FILES = 256
# Seconds that a worker which was told to stop still answers on the connections that are open.
_LINGER = 5.0
_QUICK_LINGER = 1.0  # Ctrl-C
_CLOSE = (b"connection", b"close")


class RerankWorker(UvicornWorker):  # type: ignore[misc]  # neither package is typed
    """What stands behind both accepted names of WORKER_CLASS."""

    CONFIG_KWARGS: ClassVar[dict[str, Any]] = {
        "loop": "uvloop",
        "ws": "none",
        "access_log": False,
        "proxy_headers": False,  # nothing here asks whose request it is
        "server_header": False,
    }
    handover: Handover | None = None
    """Set by gunicorn.conf.py in the workers of a new generation."""
    place: tuple[str, int, str] | None = None
    """Folder, slot and generation; set by gunicorn.conf.py where there is a folder."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for name in ("uvicorn.error", "uvicorn.access"):  # back under the one handler of config.log_config
            logging.getLogger(name).handlers = []
            logging.getLogger(name).propagate = name == "uvicorn.error"
        # Below gunicorn's own deadline, so that uvicorn cancels (and we answer 503) before gunicorn kills.
        self.config.timeout_graceful_shutdown = max(1, int(self.cfg.graceful_timeout - _LINGER) - 3)
        self.config.callback_notify = None  # _beat does it, also while the worker loads and while it drains

    async def _serve(self) -> None:
        self.config.app = self.wsgi
        siblings = self._siblings()
        self.config.http = partial(
            HttpProtocol,
            among=Connections(room(self.cfg.worker_connections + _SPARE_CONNECTIONS)),
            metrics=service_of(self.wsgi).metrics,
            patience=service_of(self.wsgi).body_timeout,
            siblings=siblings,
        )
        server = DrainingServer(self.config, siblings, workers=self.cfg.workers)
        server.loop = asyncio.get_running_loop()
        # uvicorn's worker ignores SIGQUIT, which gunicorn sends on Ctrl-C, and is killed after the grace period.
        server.loop.add_signal_handler(signal.SIGQUIT, server.handle_exit, signal.SIGQUIT, None)
        beat = asyncio.create_task(self._beat(server))
        await server.serve(sockets=self.sockets)
        beat.cancel()
        if not server.started:
            sys.exit(Arbiter.WORKER_BOOT_ERROR)

    def _siblings(self) -> Siblings | None:
        if self.place is None or self.cfg.is_ssl:  # the keys of a TLS connection stay in the process that has them
            return None
        try:
            return Siblings(*self.place)
        except OSError as error:
            logger.warning("requests are not balanced between workers: %s", error)
            return None

    async def _beat(self, server: DrainingServer) -> None:
        """Once a second; and tell the other generation, if there is one, when this worker serves."""
        while True:
            await self.callback_notify()
            if server.siblings is not None:
                server.siblings.show()
            server.step_aside_if_unhealthy()  # again, because a sibling may be ready only now
            if server.started and not server.should_exit and self.handover is not None:
                self.handover.ready()
                self.handover = None
            await asyncio.sleep(1)

    async def callback_notify(self) -> None:
        """The heartbeat. A worker whose master was killed ends, instead of holding the GPU as an orphan."""
        if os.getppid() != self.ppid:
            os.kill(os.getpid(), signal.SIGTERM)
        self.notify()


class DrainingServer(Server):
    """Stops without cutting anything off, and tells the application when it takes nothing more.

    Args:
        siblings: the other workers; None if connections cannot be handed over.
        workers: the configured number of workers, this one included.
    """

    loop: asyncio.AbstractEventLoop
    linger = _LINGER

    def __init__(self, config: Config, siblings: Siblings | None, *, workers: int) -> None:
        super().__init__(config)
        self.siblings = siblings
        self.workers = workers
        self._sockets: list[socket.socket] = []

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, also for what siblings pass on."""
        await super().startup(sockets)
        self._sockets = sockets or []
        if self._batcher is not None:
            self._batcher.on_unhealthy = self.step_aside_if_unhealthy
        self.step_aside_if_unhealthy()
        if self.siblings is not None:
            make: Any = self.config.http_protocol_class
            connect = partial(make, self.config, self.server_state, self.lifespan.state)
            batcher = self._batcher  # looked up once: every request asks twice

            def is_open() -> bool:
                return not self.should_exit and batcher is not None and batcher.status == "ok"

            self.siblings.join(is_open, lambda first: connect(first=first))

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called for SIGTERM, SIGINT and SIGQUIT, which all mean: finish what was accepted, then end."""
        if sig != signal.SIGTERM:
            self.linger = _QUICK_LINGER
        if not self.started:  # nobody is served yet, and what is being loaded is not waited for
            # On the loop and not in the signal handler: draining touches metrics, whose locks the loop may hold.
            self.loop.call_soon_threadsafe(self._drain)
        # Ctrl-C reaches a worker twice, from the terminal and from gunicorn: a second SIGINT would cut answers off.
        super().handle_exit(signal.SIGTERM, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take no new connection, but answer a little longer on those that are open, each time with `close`.

        A client learns only from an answer that its connection will not stay. One that is closed without a word may
        carry the client's next request already, which would be lost.
        """
        self._stop_listening()
        if self.siblings is not None:
            await self.siblings.leave()
        self._close_after_responses()
        state, start = self.server_state, self.loop.time()
        while state.connections and self.loop.time() < start + self.linger:  # uvicorn has no event for it
            if self._batcher is None or self._batcher.status != "ok":  # what comes would be refused anyway
                break
            await asyncio.sleep(0.05)
        self._drain()
        await super().shutdown(sockets)

    def step_aside_if_unhealthy(self) -> None:
        """Close connections after their responses and stop listening once the scorer is lost.

        A client that retries immediately then reaches a sibling and gets no second 503. Without a sibling that serves,
        the worker keeps listening so that /health can tell the reason. Where workers cannot see each other, a worker
        of several steps aside all the same; if all are lost, new connections wait for the next load.
        """
        if self._batcher is None or self._batcher.status != "unhealthy" or not self.started:
            return
        self._close_after_responses()
        if self.siblings is not None:
            self.siblings.show()
        if self.workers > 1 if self.siblings is None else self.siblings.others_serve():
            self._stop_listening()

    def _stop_listening(self) -> None:
        for server in self.servers:
            server.close()
        for sock in self._sockets:
            sock.close()

    def _close_after_responses(self) -> None:
        state = self.server_state
        if _CLOSE not in self.config.encoded_headers:  # from which uvicorn makes the default headers once a second
            self.config.encoded_headers = [*self.config.encoded_headers, _CLOSE]
            state.default_headers = [*state.default_headers, _CLOSE]
        for connection in state.connections:  # requests that are being answered have taken their headers already
            cycle = getattr(connection, "cycle", None)
            if cycle is not None:
                cycle.keep_alive = False

    @property
    def _batcher(self) -> Batcher | None:
        service = getattr(getattr(self.config.app, "state", None), "service", None)
        return getattr(service, "batcher", None)

    def _drain(self) -> None:
        if self._batcher is not None:
            self._batcher.drain()


def room(connections: int) -> int:
    """So many connections, or as many as the system's limit on open files allows, which is raised where possible."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = connections + _OTHER_FILES
    if hard != resource.RLIM_INFINITY:
        files = min(files, hard)
    if soft != resource.RLIM_INFINITY and soft < files:
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, hard))
    return max(1, min(connections, files - _OTHER_FILES))
