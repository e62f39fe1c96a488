"""Several workers on one host: slots, generations, the shared folder and the exit policy.

gunicorn's master keeps its state in `master`. A forked worker inherits the memory of the master, and the hook
`post_fork` sets `context` there. SIGUSR2 starts the next master through exec, which only the environment survives: one
internal variable, RERANKER_GENERATION, holds "<generation>:<folder>" for it.
"""

from __future__ import annotations

import fcntl
import logging
import mmap
import os
import shutil
import signal
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import psutil

from reranker.errors import ModelLoadError, NotReadyError

logger = logging.getLogger(__name__)

BOOT_FAILURE = 3  # gunicorn's WORKER_BOOT_ERROR: a worker that exits with this code stops the whole service
_BACK_OFF_SECONDS = 10.0
_FLUSH_SECONDS = 2.0  # for pending error responses, before the process exits
_FOLDER_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"  # an operator's; set in each worker, because prometheus_client reads it
_NEXT_MASTER = "RERANKER_GENERATION"
_SECOND = "b"  # suffix of every second generation's files: two generations share a folder during a rolling restart
_FOLDER_PREFIX = "reranker-metrics-"


@dataclass(frozen=True)
class WorkerContext:
    """Everything that a worker learns from its master. The defaults describe `uvicorn app:app`."""

    shared_folder: str | None = None  # None outside gunicorn, or if none can be made
    slot: int | None = None  # counted from 0, unique among the living workers of a generation; None outside gunicorn
    generation: str = ""  # suffix of the names of files in the folder
    siblings_serve: bool = False  # then load before listening; otherwise listen and respond "loading"
    respawned: bool = False  # started after the first boot: a failure must not stop the service
    gpu_workers: int = 1  # workers of this generation on this worker's GPU, itself included
    listeners: tuple[str, ...] = ()  # in gunicorn's notation, for example http://127.0.0.1:6006; empty if unknown
    boot_pipe: int | None = None  # one byte, for the one worker whose failed first load stops the service
    ready_pipe: int | None = None  # one byte for every worker of this generation except the last
    old_master: int | None = None  # process id of the master that this generation replaces
    wanted: mmap.mmap | None = None  # the number of workers that the master keeps; it writes, its workers read
    replaces: bool = False  # started in place of a worker that had ended unasked

    @property
    def folder(self) -> str | None:
        """The folder for files of several workers. Read when used, because `.env` may set the variable."""
        return self.shared_folder or os.environ.get(_FOLDER_VARIABLE) or None

    @property
    def metrics_key(self) -> str:
        """Suffix of the names of this worker's metric files; without slots, workers differ by process id."""
        return str(os.getpid()) if self.slot is None else f"{self.slot}{self.generation}"

    @property
    def wanted_workers(self) -> int:
        """The number of workers that the master keeps now; 1 outside gunicorn."""
        return 1 if self.wanted is None else int.from_bytes(self.wanted[:], "little")

    def report_ready(self) -> None:
        """End the old generation if this is the last worker of the new one to serve."""
        if self.old_master is None or self.ready_pipe is None or os.read(self.ready_pipe, 1):
            return
        with suppress(psutil.NoSuchProcess, ProcessLookupError):  # one of the two masters has ended
            # If the old master has ended, its process id may belong to another program.
            if psutil.Process(os.getppid()).ppid() == self.old_master:
                logger.info("the new generation serves; the old one (%d) finishes its requests", self.old_master)
                os.kill(self.old_master, signal.SIGTERM)


class Master:
    """Assigns slots and opens what the workers share. A reload (SIGHUP) keeps it."""

    def __init__(self) -> None:
        self._wanted = mmap.mmap(-1, 4)  # shared with the forks
        self.shared = WorkerContext(wanted=self._wanted)  # the part that all workers of this generation have in common
        self._environment = dict(os.environ)  # without the exports of `.env`, which gunicorn's has after a SIGHUP
        self._lock: int | None = None  # on a folder of our own; None for an operator's
        self._slots: dict[int, int] = {}  # by gunicorn's serial number of a worker, its age
        self._planned = 0  # workers that are still to be started because more are wanted, not because one has ended

    def start(self, old_master: int, workers: int, parent: str | None) -> None:
        """Open the pipes and the shared folder, in `parent` if it is new.

        `old_master`: process id of the master that this one replaces, or 0. `workers`: size of this generation.
        """
        generation, _, inherited = os.environ.get(_NEXT_MASTER, "").partition(":")
        folder = os.environ.get(_FOLDER_VARIABLE)
        try:
            if not folder and os.path.isdir(inherited):
                folder, self._lock = inherited, lock_folder(inherited)
            elif not folder:
                folder, self._lock = make_folder(parent)
            for file in Path(folder).glob("gauge_live*.db"):  # of workers that have ended
                if not old_master or file.stem.endswith(_SECOND) == bool(generation):
                    file.unlink()
        except OSError as error:
            logger.warning("no folder for shared metrics: %s", error)
        self.shared = WorkerContext(
            shared_folder=folder or None,
            generation=generation,
            boot_pipe=_filled_pipe(1),
            ready_pipe=_filled_pipe(workers - 1),
            old_master=old_master or None,
            wanted=self._wanted,
        )
        self.set_wanted(workers)

    def set_wanted(self, workers: int) -> None:
        """Tell all workers how many there are to be: SIGTTIN and SIGTTOU change it."""
        self._planned += max(0, workers - self.shared.wanted_workers)
        self._wanted[:] = workers.to_bytes(4, "little")

    def before_fork(self, wanted: int, living: int) -> None:
        """Note whether the next worker replaces one that has ended unasked; a reload starts workers beside `living`."""
        self.set_wanted(wanted)
        missing = living < wanted
        self.shared = replace(self.shared, replaces=missing and not self._planned)
        self._planned -= missing and self._planned > 0

    def next_environment(self) -> dict[str, str]:
        """Return the environment of the next master, which reads `.env` again and removes our own folder at its end."""
        generation = "" if self.shared.generation else _SECOND
        folder = "" if self._lock is None else self.shared.folder
        return self._environment | {_NEXT_MASTER: f"{generation}:{folder}"}

    def assign_slot(self, age: int, living: Collection[int], gpus: int) -> None:
        """Give a new worker the lowest free slot on the GPU with the fewest workers. `living`: ages of the others."""
        self._slots = {other: slot for other, slot in self._slots.items() if other in living}
        used = set(self._slots.values())
        load = Counter(slot % gpus for slot in used)
        free = set(range(len(used) + gpus)) - used  # includes the lowest free slot of the least loaded GPUs
        self._slots[age] = min(free, key=lambda slot: (load[slot % gpus], slot))

    def enter_worker(
        self,
        age: int,
        *,
        workers: int,
        gpus: int | None,
        siblings_serve: bool,
        respawned: bool,
        listeners: tuple[str, ...],
    ) -> int:
        """Set `context` in a forked worker and return its slot; `gpus`: None on a CPU."""
        global context
        slot = self._slots[age]
        context = replace(
            self.shared,
            slot=slot,
            siblings_serve=siblings_serve,
            respawned=respawned,
            gpu_workers=max(1, len(range(slot % gpus, workers, gpus))) if gpus else 1,
            listeners=listeners,
        )
        if self.shared.folder:
            os.environ[_FOLDER_VARIABLE] = self.shared.folder
        return slot

    def worker_ended(self, age: int) -> None:
        """Delete the live gauges of an ended worker; its counters remain."""
        if self.shared.folder and age in self._slots:
            key = replace(self.shared, slot=self._slots[age]).metrics_key
            for file in Path(self.shared.folder).glob(f"gauge_live*_{key}.db"):
                file.unlink(missing_ok=True)

    def close(self) -> None:
        """Remove a folder of our own, unless the next generation uses it."""
        if self.shared.folder and self._lock is not None:
            os.close(self._lock)
            remove_folder(self.shared.folder)


context = WorkerContext()
master = Master()


def end_process(error: Exception) -> None:
    """Log why the model cannot be loaded or used any more, and exit soon after.

    A failed first load stops the whole service, with exit code BOOT_FAILURE. Only one worker exits with it, because a
    second one would crash gunicorn. Respawned workers and workers that have served exit with code 1: healthy siblings
    continue, and gunicorn starts a replacement; after a failed load only after a pause.
    """
    expected = isinstance(error, (ModelLoadError, TimeoutError, NotReadyError))
    logger.critical("cannot serve%s", f": {error}" if expected else "", exc_info=None if expected else error)
    load_failed = not isinstance(error, NotReadyError)

    def leave() -> None:
        time.sleep(_BACK_OFF_SECONDS if load_failed and context.respawned else _FLUSH_SECONDS)
        logging.shutdown()
        first_boot = load_failed and not context.respawned
        stops = first_boot and (context.boot_pipe is None or os.read(context.boot_pipe, 1))
        os._exit(BOOT_FAILURE if stops else 1)

    threading.Thread(target=leave, daemon=True).start()


def _filled_pipe(count: int) -> int:
    """Return the reading end of a pipe: `count` reads of one byte succeed, later ones return its end."""
    reader, writer = os.pipe()
    os.write(writer, b"." * count)
    os.close(writer)
    return reader


# Every user of a shared folder holds a lock on it. The kernel releases the lock when the last of them has ended, even
# if it was killed, so an unlocked folder is the remainder of a killed service.


def make_folder(parent: str | None) -> tuple[str, int]:
    """Make a folder in `parent` and return it with its lock, or raise OSError; remove unused ones first."""
    parent = parent or tempfile.gettempdir()
    for unused in Path(parent).glob(f"{_FOLDER_PREFIX}*"):
        remove_folder(str(unused))
    for _ in range(10):
        folder = tempfile.mkdtemp(prefix=_FOLDER_PREFIX, dir=parent)
        with suppress(FileNotFoundError):  # removed by another starting service before it was locked
            lock = lock_folder(folder)
            if os.path.exists(folder):
                return folder, lock
            os.close(lock)
    raise OSError(f"new folders in {parent} vanish immediately")


def lock_folder(folder: str) -> int:
    """Return the descriptor of a lock that holds until this process and all its forks have ended, or raise OSError."""
    lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    fcntl.flock(lock, fcntl.LOCK_SH)
    return lock


def remove_folder(folder: str) -> None:
    """Remove a folder unless it is in use or belongs to another user."""
    with suppress(OSError):
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        with suppress(OSError):  # locked
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)
