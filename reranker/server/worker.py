"""The gunicorn worker: uvicorn's, with our protocol, heartbeats while it loads and drains, and a graceful end."""

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
from typing import Any, ClassVar

from gunicorn.arbiter import Arbiter
from uvicorn.config import Config
from uvicorn.server import Server
from uvicorn_worker import UvicornWorker

from reranker.http.state import Service, service_of
from reranker.server import fleet
from reranker.server.protocol import ConnectionPool, HttpProtocol
from reranker.server.siblings import Siblings

logger = logging.getLogger(__name__)

# Above WORKER_CONNECTIONS: gunicorn's backlog. A burst of that size evicts no connection before its first read.
_SPARE_CONNECTIONS = 2048
_OTHER_FILES = 256  # file descriptors besides those of connections: model, metrics, listener, libraries
_LINGER_SECONDS = 5.0  # in which a stopping worker still responds on open connections
_CTRL_C_LINGER_SECONDS = 1.0
_CLOSE = (b"connection", b"close")


class RerankWorker(UvicornWorker):  # type: ignore[misc]  # neither package is typed
    """The worker class behind both accepted values of WORKER_CLASS."""

    CONFIG_KWARGS: ClassVar[dict[str, Any]] = {
        "loop": "uvloop",
        "ws": "none",
        "access_log": False,
        "proxy_headers": False,  # http/client_address.py reads the client's address
        "server_header": False,
    }

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for name in ("uvicorn.error", "uvicorn.access"):  # return them to the one handler of config.log_config
            logging.getLogger(name).handlers = []
            logging.getLogger(name).propagate = name == "uvicorn.error"
        # Below gunicorn's own deadline: uvicorn cancels requests, with a 503, before gunicorn kills the process.
        self.config.timeout_graceful_shutdown = max(1, int(self.cfg.graceful_timeout - _LINGER_SECONDS) - 3)
        self.config.callback_notify = None  # _beat replaces it, because uvicorn's stops while a worker loads or drains

    async def _serve(self) -> None:
        service, siblings = service_of(self.wsgi), self._siblings()
        self.config.app = self.wsgi
        self.config.http = partial(
            HttpProtocol,
            pool=ConnectionPool(raise_fd_limit(self.cfg.worker_connections + _SPARE_CONNECTIONS)),
            metrics=service.metrics,
            address=service.client_address,
            io_timeout=service.body_timeout,
            siblings=siblings,
        )
        server = DrainingServer(self.config, service, siblings, workers=self.cfg.workers)
        # gunicorn sends SIGQUIT on Ctrl-C; uvicorn's worker ignores it and is killed after the grace period.
        server.loop.add_signal_handler(signal.SIGQUIT, server.handle_exit, signal.SIGQUIT, None)
        beat = asyncio.create_task(self._beat(server))
        await server.serve(sockets=self.sockets)
        beat.cancel()
        if not server.started:
            sys.exit(Arbiter.WORKER_BOOT_ERROR)

    def _siblings(self) -> Siblings | None:
        shared = fleet.context
        if shared.folder is None or shared.slot is None or self.cfg.is_ssl:  # a TLS session cannot leave its process
            return None
        try:
            return Siblings(shared.folder, shared.slot, shared.generation)
        except OSError as error:
            logger.warning("requests are not balanced between workers: %s", error)
            return None

    async def _beat(self, server: DrainingServer) -> None:
        """Tell gunicorn and the siblings once a second that this worker is alive."""
        while True:
            if os.getppid() != self.ppid:  # the master was killed: an orphan must not hold the GPU
                os.kill(os.getpid(), signal.SIGTERM)
            self.notify()
            if server.siblings is not None:
                server.siblings.publish()
            server.step_aside_if_unhealthy()  # again, because a sibling may be ready only now
            await asyncio.sleep(1)


class DrainingServer(Server):
    """uvicorn's server with a shutdown that loses no request.

    `siblings` is None if connections cannot be handed off; `workers` counts this one too.
    """

    def __init__(self, config: Config, service: Service, siblings: Siblings | None, *, workers: int) -> None:
        super().__init__(config)
        self.batcher = service.batcher
        self.siblings = siblings
        self.workers = workers
        self.loop = asyncio.get_running_loop()
        self.linger = _LINGER_SECONDS
        self._sockets: list[socket.socket] = []

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, accept connections that siblings hand off, and end an old generation."""
        await super().startup(sockets)
        self._sockets = sockets or []
        self.batcher.on_unhealthy = self.step_aside_if_unhealthy
        self.step_aside_if_unhealthy()
        if self.siblings is not None:
            make: Any = self.config.http_protocol_class
            connect = partial(make, self.config, self.server_state, self.lifespan.state)
            self.siblings.join(
                lambda: not self.should_exit and self.batcher.status == "ok", lambda first: connect(first=first)
            )
        if self.started and not self.should_exit:
            fleet.context.report_ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """On SIGTERM, SIGINT or SIGQUIT, finish the accepted requests and end."""
        if sig != signal.SIGTERM:
            self.linger = _CTRL_C_LINGER_SECONDS
        if not self.started:  # still loading, so there are no requests to finish
            # On the loop, not in the signal handler: draining updates metrics, whose locks the loop may hold.
            self.loop.call_soon_threadsafe(self.batcher.drain)
        # A worker gets Ctrl-C twice, from the terminal and from gunicorn, and uvicorn aborts on a second SIGINT.
        super().handle_exit(signal.SIGTERM, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop listening, and respond on open connections for a while, with `Connection: close`.

        A client learns only from a response that its connection will be closed. If a connection is closed without
        one, the client's next request may be in flight and is lost.
        """
        self._stop_listening()
        self._close_after_responses()
        if self.siblings is not None:
            await self.siblings.leave()
        end = self.loop.time() + self.linger
        while self.server_state.connections and self.loop.time() < end:  # uvicorn has no event for it
            if self.batcher.status != "ok":  # it would refuse new requests
                break
            await asyncio.sleep(0.05)
        self.batcher.drain()
        await super().shutdown(sockets)

    def step_aside_if_unhealthy(self) -> None:
        """Close connections after their responses and stop listening once the scorer is lost.

        A client that retries immediately then reaches a sibling and gets no second 503. Without a sibling that serves,
        the worker keeps listening so that /health can tell the reason. Where workers cannot see each other, a worker
        of several steps aside anyway; if all are lost, new connections wait for the next load.
        """
        if self.batcher.status != "unhealthy" or not self.started:
            return
        self._close_after_responses()
        if self.siblings is not None:
            self.siblings.publish()
        if self.workers > 1 if self.siblings is None else self.siblings.others_serve():
            self.batcher.unhealthy_retry_after = 1
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
        for connection in state.connections:  # a request in progress has its headers already
            cycle = getattr(connection, "cycle", None)
            if cycle is not None:
                cycle.keep_alive = False


def raise_fd_limit(connections: int) -> int:
    """Raise the limit on open files for `connections`; return how many connections the limit allows, at least 1."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = connections + _OTHER_FILES
    if hard != resource.RLIM_INFINITY:
        files = min(files, hard)
    if soft != resource.RLIM_INFINITY and soft < files:
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, hard))
    return max(1, min(connections, files - _OTHER_FILES))
