from __future__ import annotations

import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import psutil
import pytest

from reranker.server.handover import Handover


def ended() -> int:
    """The number of a process that is no more."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_the_last_worker_that_is_ready_ends_the_old_generation(monkeypatch: pytest.MonkeyPatch) -> None:
    old = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    monkeypatch.setattr(psutil, "Process", lambda _: SimpleNamespace(ppid=lambda: old.pid))
    handover = Handover(old.pid, 2)
    handover.ready()
    assert old.poll() is None
    handover.ready()
    assert old.wait(30) == -signal.SIGTERM


def test_an_old_master_that_is_gone_already_is_no_fault(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    old = ended()
    monkeypatch.setattr(psutil, "Process", lambda _: SimpleNamespace(ppid=lambda: old))
    with caplog.at_level("INFO"):
        Handover(old, 1).ready()
    assert f"the old one ({old}) finishes" in caplog.text, "so it was tried"


def test_a_new_master_that_is_gone_already_is_no_fault(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(os, "getppid", ended)
    with caplog.at_level("INFO"):
        Handover(os.getpid(), 1).ready()
    assert not caplog.messages, "nobody is told to end"
