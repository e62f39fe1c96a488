"""Servers for a benchmark, each in a process of its own: this service under gunicorn, or any other command.

Processor seconds, memory and pauses are those of all processes of a server.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, slots=True)
class Service:
    """A running server."""

    pid: int
    """Of gunicorn's master."""
    port: int
    log_path: Path
    ready_after: float
    """Seconds from the start of the process until it was ready."""

    @property
    def processes(self) -> list[psutil.Process]:
        """The first process and its descendants."""
        parent = psutil.Process(self.pid)
        return [parent, *parent.children(recursive=True)]

    def processor_seconds(self) -> float:
        """Processor seconds of all processes since their start."""
        return sum(sum(p.cpu_times()[:2]) for p in self.processes)

    def memory(self) -> int:
        """Resident bytes of all processes."""
        return sum(p.memory_info().rss for p in self.processes)

    def peak_memory(self) -> int:
        """Peak resident bytes of every process since its start, added up (Linux)."""
        peaks = 0
        for process in self.processes:
            lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
            peaks += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
        return peaks

    def pause(self, paused: bool) -> None:
        """Stop or continue all processes, because an idle server may use processor time too."""
        for process in self.processes:
            process.send_signal(signal.SIGSTOP if paused else signal.SIGCONT)


@contextmanager
def serve(app: str, **settings: object) -> Iterator[Service]:
    """Run `app` (as `module:name`) under gunicorn with these settings, from readiness to the end of the block.

    Raises:
        RuntimeError: it did not become ready; the message is its log.
    """
    port = free_port()
    given = {"HOST": "127.0.0.1", "PORT": port, "PYTHONPATH": ROOT, "OMP_NUM_THREADS": 1, "KEEP_ALIVE": 60}
    command = [sys.executable, "-m", "gunicorn", "-c", str(ROOT / "gunicorn.conf.py"), app]
    env = {name: str(value) for name, value in (given | settings).items()}
    with run(command, port, env, lambda: _get(f"http://127.0.0.1:{port}/readyz")) as service:
        yield service


@contextmanager
def run(
    command: list[str], port: int, env: dict[str, str], ready: Callable[[], bool], seconds: float = 120
) -> Iterator[Service]:
    """Run a server from the first true result of `ready` to the end of the block.

    Raises:
        RuntimeError: it exited, or was not ready after `seconds`; the message is its log.
    """
    with tempfile.TemporaryDirectory() as folder:
        log_path = Path(folder) / "log"
        start = time.monotonic()
        with log_path.open("wb") as log:
            process = subprocess.Popen(command, cwd=folder, env=os.environ | env, stdout=log, stderr=subprocess.STDOUT)
        try:
            while not ready():
                if process.poll() is not None or time.monotonic() > start + seconds:
                    raise RuntimeError(f"{command[0]} did not become ready:\n{log_path.read_text()}")
                time.sleep(0.1)
            yield Service(process.pid, port, log_path, time.monotonic() - start)
        finally:
            _stop(process)


def free_port() -> int:
    """A free port of 127.0.0.1."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        process.terminate()
        _, alive = psutil.wait_procs(family, timeout=60)
        for survivor in alive:
            survivor.kill()
    process.wait()


def _get(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except (urllib.error.URLError, OSError):
        return False
