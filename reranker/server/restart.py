"""Rolling restart of a running service: new code, settings and model without a failed request.

    python -m reranker.server.restart <process id of gunicorn's master, or its pid file>

It sends SIGUSR2 (docs/operations.md), waits and reports. Exit code 0: the new generation serves. 1: it could not start,
and the old one goes on serving.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import psutil

_START_SECONDS = 30.0
_PID_FILE_SECONDS = 10.0  # gunicorn renames its pid file up to a second after the end of its parent


def main(argument: str) -> str:
    """Restart the service; return an error message, or an empty one."""
    try:
        old = psutil.Process(_process_id(argument) or -1)
    except (ValueError, psutil.NoSuchProcess):
        return f"error: {argument} names no running service"
    os.kill(old.pid, signal.SIGUSR2)
    new, deadline = None, time.monotonic() + _START_SECONDS
    while new is None and time.monotonic() < deadline:
        time.sleep(0.02)
        new = _next_master(old)
    if new is None:
        return f"error: {old.pid} started no new generation; its log says why"
    print(f"the new generation ({new.pid}) loads beside the old one ({old.pid})", flush=True)
    while _is_alive(old):
        if not _is_alive(new):
            return "error: the new generation ended, its log says why; the old one goes on serving"
        time.sleep(0.1)
    deadline = time.monotonic() + _PID_FILE_SECONDS
    while not argument.isdigit() and _process_id(argument) != new.pid and time.monotonic() < deadline:
        time.sleep(0.1)
    print("the new generation serves")
    return ""


def _process_id(argument: str) -> int:
    """Return the process id in an argument or in the file it names; 0 if there is none."""
    try:
        return int(argument if argument.isdigit() else Path(argument).read_text())
    except (OSError, ValueError):
        return 0


def _next_master(old: psutil.Process) -> psutil.Process | None:
    """Return the child that gunicorn has started as the next master."""
    for child in old.children():
        try:
            if child.environ().get("GUNICORN_PID") == str(old.pid):
                return child
        except psutil.Error:  # it has just ended
            continue
    return None


def _is_alive(process: psutil.Process) -> bool:
    """Return whether a process runs; a zombie does not."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    sys.exit(main(sys.argv[1]) or None)
