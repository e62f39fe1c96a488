"""A new generation beside the old one, under load: no request fails, whatever becomes of the new one."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from tests.conftest import FAKE, GUNICORN, ROOT, Server, Start
from tests.faults.traffic import BODY, Traffic, all_ready
from tests.http.test_metrics import once, value

RESTART = [sys.executable, str(ROOT / "reranker" / "server" / "restart.py")]
PID = ["--pid", "master.pid"]


def masters(server: Server) -> list[int]:
    """The process ids of all masters so far, oldest first."""
    return list(map(int, re.findall(r"Listening at: .* \((\d+)\)", server.log)))


def end(server: Server) -> None:
    """End every master of a server: the last one may not be the process that the test started."""
    server.client.close()
    for pid in masters(server):
        try:
            master = psutil.Process(pid)
            master.terminate()
            master.wait(30)
        except psutil.NoSuchProcess:
            continue


@pytest.fixture
def ended() -> Iterator[list[Server]]:
    """Servers that are ended behind the test."""
    servers: list[Server] = []
    yield servers
    for server in servers:
        end(server)


def restart(server: Server, code: int = 0) -> str:
    """Run what `make restart` runs, to its end."""
    pid = str(server.log_path.with_name("master.pid"))
    done = subprocess.run([*RESTART, pid], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def setting(server: Server, line: str) -> None:
    """What the next generation reads."""
    server.log_path.with_name(".env").write_text(line)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_rolling_restart_fails_no_request(start: Start, ended: list[Server], workers: int) -> None:
    # The demo model for one; for two a scorer without one, because loading it four times takes long.
    server = start(
        command=[*(GUNICORN if workers == 1 else FAKE), *PID],
        WORKERS=str(workers),
        MODEL_DEVICE="cpu",
        FAKE_LOAD_SECONDS="2",
    )
    ended.append(server)
    all_ready(server, workers)
    with Traffic(server) as traffic:
        traffic.wait(30)
        setting(server, "MAX_DOCUMENTS=3")
        assert "the new generation serves" in restart(server)
        traffic.wait(30)
    assert set(traffic.seen) == {200}, traffic.seen
    assert server.process.wait(30) == 0
    refused = httpx.post(f"{server.client.base_url}/v1/rerank", json=BODY | {"documents": ["a"] * 4}, trust_env=False)
    assert refused.status_code == 422, "the new generation has the new settings"


def test_a_generation_that_cannot_load_changes_nothing_and_counts_go_on(
    start: Start, ended: list[Server], tmp_path: Path
) -> None:
    fails = tmp_path / "fails"
    options = {"WORKERS": "2", "MODEL_DEVICE": "cpu", "FAKE_LOAD_SECONDS": "1", "FAKE_LOAD_FAILS": str(fails)}
    server = start(command=[*FAKE, *PID], **options)
    ended.append(server)
    all_ready(server, 2)
    with Traffic(server) as traffic:
        fails.touch()
        assert "the old one goes on serving" in restart(server, 1)
        traffic.wait(20)
        setting(server, "PORT=many")
        assert "its log says why" in restart(server, 1)
        setting(server, "")
        fails.unlink()
        for _ in range(2):  # back to the files of the first generation
            restart(server)
            traffic.wait(20)
    assert set(traffic.seen) == {200}, traffic.seen
    assert server.process.wait(30) == 0
    assert "Traceback" not in server.log
    total = traffic.seen[200] + 1  # one before the traffic
    found = once(server, lambda s: value(s, "reranker_requests_total", route="/v1/rerank", status="200") >= total)
    assert value(found, "reranker_requests_total", route="/v1/rerank", status="200") == total
    assert value(found, "reranker_ready_workers") == 2


def test_a_service_that_was_started_as_a_module_restarts_too(start: Start, ended: list[Server]) -> None:
    server = start(command=[sys.executable, "-m", "gunicorn", *FAKE[1:], *PID])
    ended.append(server)
    restart(server)
    server.process.wait(30)
    assert httpx.get(f"{server.client.base_url}/health", trust_env=False).json() == {"status": "ok"}


def test_process_1_of_a_container_refuses_and_goes_on(start: Start) -> None:
    inside = ["unshare", "-rpf", "--kill-child", "--mount-proc"]
    if subprocess.run([*inside, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no right to make a process namespace here (unshare -rpf)")
    server = start(command=[*inside, *FAKE])
    [master] = psutil.Process(server.process.pid).children()
    os.kill(master.pid, signal.SIGUSR2)
    deadline = time.monotonic() + 30
    while "SIGUSR2 is refused" not in server.log and time.monotonic() < deadline:
        time.sleep(0.05)
    assert "SIGUSR2 is refused: this is process 1 of a container" in server.log
    assert server.client.post("/v1/rerank", json=BODY).status_code == 200
    assert len(masters(server)) == 1
    master.terminate()
    server.process.wait(30)
