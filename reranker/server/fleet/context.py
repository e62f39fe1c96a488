"""Everything that a worker learns from its master, and how it exits without a usable model."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field

import psutil

from reranker.errors import ModelLoadError, NotReadyError

logger = logging.getLogger(__name__)

FOLDER_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"
"""Set by an operator, or in each worker for prometheus_client, which reads it."""
BOOT_FAILURE = 3
"""gunicorn's WORKER_BOOT_ERROR: a worker that exits with this code stops the whole service."""
_BACK_OFF_SECONDS = 10.0
_FLUSH_SECONDS = 2.0
"""Time for pending error responses to leave the process before it exits."""


@dataclass(frozen=True)
class WorkerContext:
    """Everything that a worker learns from its master. The defaults describe `uvicorn app:app`."""

    folder: str | None = field(default_factory=lambda: os.environ.get(FOLDER_VARIABLE))
    """Shared by all workers: metrics, and the sockets of `Siblings`; None if there is none."""
    slot: int | None = None
    """Unique among the living workers of a generation, counted from 0; None outside gunicorn."""
    generation: str = ""
    """Suffix of the names of shared files."""
    siblings_serve: bool = False
    """Others accept requests, so this worker loads before it listens. Otherwise it listens and responds "loading"."""
    respawned: bool = False
    """Started after the first boot: its failure must not stop the service."""
    listeners: tuple[str, ...] = ()
    """Addresses in gunicorn's notation, for example http://127.0.0.1:6006; empty if unknown."""
    boot_pipe: int | None = None
    """Holds one byte, for the one worker whose failed first load stops the service."""
    old_master: int | None = None
    """Process id of the master that this generation replaces."""
    ready_pipe: int | None = None
    """Holds one byte for every worker of this generation except the last."""

    @property
    def metrics_key(self) -> str:
        """Suffix of the names of this worker's metric files; without slots, workers differ by process id."""
        return str(os.getpid()) if self.slot is None else f"{self.slot}{self.generation}"

    def report_ready(self) -> None:
        """End the old generation if this is the last worker of the new one to serve."""
        if self.old_master is None or self.ready_pipe is None or os.read(self.ready_pipe, 1):
            return
        with suppress(psutil.NoSuchProcess, ProcessLookupError):  # one of the two masters has ended
            # If the old master has ended, its process id may belong to another program.
            if psutil.Process(os.getppid()).ppid() == self.old_master:
                logger.info("the new generation serves; the old one (%d) finishes its requests", self.old_master)
                os.kill(self.old_master, signal.SIGTERM)


current = WorkerContext()
"""The context of this process; set after a fork."""


def end_process(error: Exception) -> None:
    """Log why the model cannot be loaded or used any more, and exit soon after.

    A failed first load stops the whole service, with exit code BOOT_FAILURE. Only one worker exits with it, because a
    second one would crash gunicorn. Respawned workers and workers that have served exit with code 1: healthy siblings
    continue, and gunicorn starts a replacement; after a failed load only after a pause.
    """
    if isinstance(error, (ModelLoadError, TimeoutError, NotReadyError)):
        logger.critical("cannot serve: %s", error)
    else:
        logger.critical("cannot serve", exc_info=error)
    had_scorer = isinstance(error, NotReadyError)

    def leave() -> None:
        time.sleep(_BACK_OFF_SECONDS if current.respawned and not had_scorer else _FLUSH_SECONDS)
        logging.shutdown()
        stops = not current.respawned and not had_scorer
        if stops and current.boot_pipe is not None:
            stops = bool(os.read(current.boot_pipe, 1))
        os._exit(BOOT_FAILURE if stops else 1)

    threading.Thread(target=leave, daemon=True).start()
