"""The real service for a benchmark: gunicorn with its own configuration, on a free port, in a process of its own."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, slots=True)
class Service:
    """A running service."""

    pid: int
    """Of gunicorn's master."""
    port: int
    log_path: Path


@contextmanager
def serve(app: str, **settings: object) -> Iterator[Service]:
    """Start `app` (as `module:name`) with these settings, wait until it is ready, and stop it in the end.

    Raises:
        RuntimeError: it did not get ready; the message is its log.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    given = {"HOST": "127.0.0.1", "PORT": port, "PYTHONPATH": ROOT, "OMP_NUM_THREADS": 1, "KEEP_ALIVE": 60}
    with tempfile.TemporaryDirectory() as folder:
        log_path = Path(folder) / "log"
        with log_path.open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "gunicorn", "-c", ROOT / "gunicorn.conf.py", app],
                cwd=folder,
                env=os.environ | {name: str(value) for name, value in (given | settings).items()},
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        try:
            _wait(port, process, log_path)
            yield Service(process.pid, port, log_path)
        finally:
            process.terminate()
            process.wait(60)


def _wait(port: int, process: subprocess.Popen[bytes], log_path: Path) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    raise RuntimeError(f"the service did not get ready:\n{log_path.read_text()}")
