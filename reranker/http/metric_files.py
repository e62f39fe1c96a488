"""The files in which a worker shares its metrics with the others, allocated before they are used."""

from __future__ import annotations

import logging
import os
from contextlib import suppress
from pathlib import Path

logger = logging.getLogger(__name__)

SIZES = {
    "counter": 1 << 19,
    "histogram": 1 << 18,
    "gauge_livesum": 1 << 16,
    "gauge_livemostrecent": 1 << 14,
    "gauge_livemin": 1 << 16,
}
"""Bytes of each file: enough for every route, caller and status (tests/http/test_metrics.py fills them)."""


def reserve(folder: Path, worker: str) -> bool:
    """Allocate a worker's files; return False if that is not possible.

    The library creates sparse files and writes through a memory map, so a disk that fills up later would end the
    process with SIGBUS. Allocated blocks prevent that. Siblings read every `*.db`, so a file gets that name when it is
    complete.
    """
    new = folder / f"{worker}.new"
    try:
        for name, size in SIZES.items():
            path = folder / f"{name}_{worker}.db"
            target = path if path.exists() else new
            with target.open("ab") as file:
                os.posix_fallocate(file.fileno(), 0, size)
            target.rename(path)
    except OSError as error:
        with suppress(OSError):
            new.unlink()
        logger.warning("no shared metrics, /metrics shows one worker's own: %s", error)
        return False
    return True
