"""The folder through which the workers of one service share their metrics; made and removed by gunicorn's master.

Whoever uses it holds a lock on it. The kernel lets go of the lock when the last such process ends, however it ends, so
what a killed service left behind is known from what another one still uses.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

_PREFIX = "reranker-metrics-"


def make(parent: str | None) -> tuple[str, int]:
    """A new folder in `parent` (None: where temporary files go), and the lock of `hold`; those that nobody uses any
    more are removed.

    Raises:
        OSError: it cannot be made.
    """
    for left in Path(parent or tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        remove(str(left))
    for _ in range(10):
        made = tempfile.mkdtemp(prefix=_PREFIX, dir=parent)
        with suppress(FileNotFoundError):  # another service that starts has removed it before it was locked
            lock = hold(made)
            if os.path.exists(made):
                return made, lock
            os.close(lock)
    raise OSError(f"folders in {parent or tempfile.gettempdir()} vanish as soon as they are made")


def hold(folder: str) -> int:
    """Use a folder: the file descriptor of a lock that holds until this process and all that it forks have ended.

    Raises:
        OSError: it is not there.
    """
    lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    fcntl.flock(lock, fcntl.LOCK_SH)
    return lock


def remove(folder: str) -> None:
    """Remove a folder, unless a process uses it or it is somebody else's."""
    try:
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
    except OSError:  # in use
        pass
    finally:
        os.close(lock)
