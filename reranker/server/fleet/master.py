"""The state of gunicorn's master: slots, generations and the folder that the workers share."""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Collection
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from reranker.server.fleet import context
from reranker.server.fleet.context import FOLDER_VARIABLE, WorkerContext

logger = logging.getLogger(__name__)

_NEXT_MASTER = "RERANKER_GENERATION"
_SECOND = "b"
"""Suffix of every second generation's files: two generations share a folder during a rolling restart."""
_FOLDER_PREFIX = "reranker-metrics-"


class Master:
    """Assigns slots and opens what the workers share. A reload (SIGHUP) keeps it."""

    def __init__(self) -> None:
        self.shared = WorkerContext()
        """What all workers of this generation have in common."""
        self._lock: int | None = None
        """Held on a folder of our own; None for an operator's."""
        self._slots: dict[int, int] = {}
        """By gunicorn's serial number of a worker, its age."""

    def start(self, old_master: int, workers: int, parent: str | None) -> None:
        """Open the pipes and the shared folder.

        Args:
            old_master: process id of the master that this one replaces, or 0.
            workers: size of this generation.
            parent: for a new folder; None: the system's folder for temporary files.
        """
        generation, _, inherited = os.environ.get(_NEXT_MASTER, "").partition(":")
        folder = os.environ.get(FOLDER_VARIABLE)
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
            folder=folder or None,
            generation=generation,
            boot_pipe=_filled_pipe(1),
            old_master=old_master or None,
            ready_pipe=_filled_pipe(workers - 1),
        )

    def next_environment(self) -> dict[str, str]:
        """Return the environment variable for the next master."""
        return {_NEXT_MASTER: f"{'' if self.shared.generation else _SECOND}:{self.shared.folder or ''}"}

    def assign_slot(self, age: int, living: Collection[int], gpus: int) -> None:
        """Give a new worker the lowest free slot on the GPU with the fewest workers. `living`: ages of the others."""
        self._slots = {other: slot for other, slot in self._slots.items() if other in living}
        used = set(self._slots.values())
        load = Counter(slot % gpus for slot in used)
        free = set(range(len(used) + gpus)) - used  # includes the lowest free slot of the least loaded GPUs
        self._slots[age] = min(free, key=lambda slot: (load[slot % gpus], slot))

    def enter_worker(self, age: int, *, siblings_serve: bool, respawned: bool, listeners: tuple[str, ...]) -> int:
        """Set the `WorkerContext` of a forked worker and return its slot."""
        slot = self._slots[age]
        context.current = replace(
            self.shared, slot=slot, siblings_serve=siblings_serve, respawned=respawned, listeners=listeners
        )
        if self.shared.folder:
            os.environ[FOLDER_VARIABLE] = self.shared.folder
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


current = Master()


def _filled_pipe(count: int) -> int:
    """Return the reading end of a pipe: `count` reads of one byte succeed, later ones return its end."""
    reader, writer = os.pipe()
    os.write(writer, b"." * count)
    os.close(writer)
    return reader


# Every user of a shared folder holds a lock on it. The kernel releases the lock when the last of them has ended, for
# whatever reason, so an unlocked folder is the remainder of a killed service.


def make_folder(parent: str | None) -> tuple[str, int]:
    """Make a folder in `parent`, return it with its lock, and remove the folders that are no longer in use.

    Raises:
        OSError: it cannot be made.
    """
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
    """Return the descriptor of a lock that holds until this process and all its forks have ended.

    Raises:
        OSError: the folder does not exist.
    """
    lock = _open_folder(folder)
    fcntl.flock(lock, fcntl.LOCK_SH)
    return lock


def remove_folder(folder: str) -> None:
    """Remove a folder unless it is in use or belongs to another user."""
    with suppress(OSError):
        lock = _open_folder(folder)
        with suppress(OSError):  # locked
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _open_folder(folder: str) -> int:
    return os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
