"""The shared folder, the state that crosses forks and exec, and the end of an old generation."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from reranker.server import fleet
from reranker.server.fleet import Master, WorkerContext, make_folder, remove_folder


@pytest.fixture(autouse=True)
def _restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(fleet, "context", fleet.context)
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    yield
    os.environ.pop("PROMETHEUS_MULTIPROC_DIR", None)


def test_a_used_folder_stays_and_an_abandoned_one_goes(tmp_path: Path) -> None:
    used, lock = make_folder(str(tmp_path))
    abandoned, other = make_folder(str(tmp_path))
    os.close(other)  # as its last process ends
    newest, third = make_folder(str(tmp_path))
    assert sorted(map(str, tmp_path.iterdir())) == sorted([used, newest])
    assert abandoned not in (used, newest)
    os.close(lock)
    remove_folder(used)
    remove_folder(newest)
    assert list(map(str, tmp_path.iterdir())) == [newest]
    os.close(third)


@pytest.mark.parametrize("locked", [False, True])
def test_a_folder_that_another_service_removes_immediately_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, locked: bool
) -> None:
    """The other one looks for unused folders while this one has made its folder and does not hold the lock yet."""
    mkdtemp, lock_folder, thieves = tempfile.mkdtemp, fleet.lock_folder, [1]

    def stolen(**options: str) -> str:
        folder = mkdtemp(**options)
        if thieves and not locked:
            thieves.pop()
            shutil.rmtree(folder)
        return folder

    def late(folder: str) -> int:
        lock = lock_folder(folder)
        if thieves and locked:  # between its opening and its lock
            thieves.pop()
            shutil.rmtree(folder)
        return lock

    monkeypatch.setattr(tempfile, "mkdtemp", stolen)
    monkeypatch.setattr(fleet, "lock_folder", late)
    folder, lock = make_folder(str(tmp_path))
    assert list(map(str, tmp_path.iterdir())) == [folder]
    os.close(lock)


def test_a_place_where_no_folder_stays_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stolen(folder: str) -> int:
        shutil.rmtree(folder)
        raise FileNotFoundError(folder)

    monkeypatch.setattr(fleet, "lock_folder", stolen)
    with pytest.raises(OSError, match="vanish"):
        make_folder(str(tmp_path))


def test_generations_share_a_folder_and_differ_in_their_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = Master()
    first.start(0, 2, str(tmp_path))
    [folder] = tmp_path.iterdir()
    (folder / "gauge_livesum_0.db").touch()  # of a worker that serves
    monkeypatch.setenv("RERANKER_GENERATION", first.next_environment()["RERANKER_GENERATION"])
    second = Master()
    second.start(os.getpid(), 2, str(tmp_path))
    assert second.shared.folder == first.shared.folder == str(folder)
    assert (folder / "gauge_livesum_0.db").exists()
    keys = []
    for each in (first, second):
        each.assign_slot(1, [], 1)
        each.enter_worker(
            1, workers=2, gpus=None, siblings_serve=each is second, respawned=False, listeners=("http://127.0.0.1:1",)
        )
        keys.append(fleet.context.metrics_key)
        assert os.environ["PROMETHEUS_MULTIPROC_DIR"] == fleet.context.folder == str(folder)
        assert fleet.context.siblings_serve == (each is second)
    assert keys == ["0", "0b"]
    assert second.next_environment()["RERANKER_GENERATION"] == f":{folder}", "the third has the names of the first"
    first.close()
    assert folder.exists()
    second.close()
    assert not folder.exists()


def test_an_ended_worker_leaves_its_counters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    operators = Master()
    operators.start(0, 2, None)
    for age, slot in ((1, 0), (2, 1)):
        operators.assign_slot(age, [1], 1)
        (tmp_path / f"gauge_livesum_{slot}.db").touch()
        (tmp_path / f"counter_{slot}.db").touch()
    operators.worker_ended(2)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["counter_0.db", "counter_1.db", "gauge_livesum_0.db"]
    operators.close()
    assert tmp_path.exists(), "an operator's folder stays"
    assert operators.next_environment()["RERANKER_GENERATION"] == "b:", "the next master does not take it for its own"


def test_outside_gunicorn_workers_differ_by_process_id(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", "/of/an/operator")
    alone = WorkerContext()
    assert (alone.folder, alone.metrics_key) == ("/of/an/operator", str(os.getpid()))
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", "/of/the/env/file")  # exported after the import of fleet
    assert alone.folder == "/of/the/env/file"
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", "")
    assert alone.folder is None
    assert not alone.siblings_serve
    assert not alone.respawned


def ended() -> int:
    """The process id of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def generation(old_master: int, workers: int) -> WorkerContext:
    """The context of a worker in a generation that replaces another."""
    new = Master()
    new.start(old_master, workers, None)
    new.close()
    return new.shared


def test_the_last_worker_that_is_ready_ends_the_old_generation(monkeypatch: pytest.MonkeyPatch) -> None:
    old = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    monkeypatch.setattr(psutil, "Process", lambda _: SimpleNamespace(ppid=lambda: old.pid))
    worker = generation(old.pid, 2)
    worker.report_ready()
    assert old.poll() is None
    worker.report_ready()
    assert old.wait(30) == -signal.SIGTERM


def test_an_old_master_that_has_ended_is_no_fault(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    old = ended()
    monkeypatch.setattr(psutil, "Process", lambda _: SimpleNamespace(ppid=lambda: old))
    with caplog.at_level("INFO"):
        generation(old, 1).report_ready()
    assert f"the old one ({old}) finishes" in caplog.text, "so it was tried"


def test_a_new_master_that_has_ended_is_no_fault(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(os, "getppid", ended)
    with caplog.at_level("INFO"):
        generation(os.getpid(), 1).report_ready()
    assert not caplog.messages, "no process gets a signal"


def test_only_a_worker_in_place_of_one_that_ended_unasked_is_a_restart() -> None:
    master = Master()
    master.start(0, 2, None)

    def fork(wanted: int, living: int) -> tuple[bool, int]:
        master.before_fork(wanted, living)
        return master.shared.replaces, master.shared.wanted_workers

    assert [fork(2, 0), fork(2, 1)] == [(False, 2)] * 2  # the first boot
    assert fork(2, 1) == (True, 2)  # one has died
    assert [fork(2, 2), fork(2, 3)] == [(False, 2)] * 2  # SIGHUP: beside the old ones
    assert fork(3, 2) == (False, 3)  # SIGTTIN
    master.set_wanted(2)  # SIGTTOU, when the worker has ended
    assert master.shared.wanted_workers == 2
    assert fork(3, 2) == (False, 3)
    assert fork(3, 2) == (True, 3)
    master.close()
    assert WorkerContext().wanted_workers == 1
