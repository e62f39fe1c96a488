"""Rolling restart of a running service: new code, settings and model, and no request fails.

    python reranker/server/restart.py <process id of gunicorn's master, or its pid file>

The signal SIGUSR2 does it all (see docs/operations.md); this waits and tells how it went. Exit code 0: the new
generation serves. 1: it could not start, and the old one goes on serving.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import psutil


def successor(old: psutil.Process) -> psutil.Process | None:
    """The new master: the child that gunicorn told so in its environment."""
    for child in old.children():
        try:
            if child.environ().get("GUNICORN_PID") == str(old.pid):
                return child
        except psutil.Error:  # it ended just now
            continue
    return None


def named(argument: str) -> int:
    """The process id that is meant; 0 where the file does not hold one."""
    try:
        return int(argument if argument.isdigit() else Path(argument).read_text())
    except (OSError, ValueError):
        return 0


def main(argument: str) -> str:
    """Restart, and say how it went: empty when all went well."""
    try:
        old = psutil.Process(named(argument) or -1)
    except (ValueError, psutil.NoSuchProcess):
        return f"error: {argument} names no running service"
    os.kill(old.pid, signal.SIGUSR2)
    new, deadline = None, time.monotonic() + 30
    while new is None and time.monotonic() < deadline:
        time.sleep(0.02)
        new = successor(old)
    if new is None:
        return f"error: {old.pid} started no new generation; its log says why"
    print(f"the new generation ({new.pid}) loads beside the old one ({old.pid})", flush=True)
    while alive(old):
        if not alive(new):
            return "error: the new generation ended, its log says why; the old one goes on serving"
        time.sleep(0.1)
    deadline = time.monotonic() + 10  # gunicorn looks once a second whether its parent is gone
    while not argument.isdigit() and named(argument) != new.pid and time.monotonic() < deadline:
        time.sleep(0.1)
    print("the new generation serves")
    return ""


def alive(process: psutil.Process) -> bool:
    """Whether it runs; a dead one that nobody has waited for does not."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    sys.exit(main(sys.argv[1]) or None)
