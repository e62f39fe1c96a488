"""Faults of masters and workers: every signal under load, deaths, and loads and loops that fail or hang."""

from __future__ import annotations

import concurrent.futures
import contextlib
import http.client
import json
import os
import re
import signal
import socket
from datetime import datetime
from pathlib import Path

import httpx
import psutil
import pytest

from tests.conftest import FAKE, GUNICORN, MAX_WAIT, Server, Start
from tests.faults.raw import busy, connect, listen, send
from tests.faults.traffic import Traffic, all_ready, until
from tests.http.test_metrics import folders

REFUSED = {"ConnectError", "ConnectionRefusedError"}
# The kernel resets connections that are not yet accepted when the last listener closes.
NOT_ACCEPTED = REFUSED | {"ConnectionResetError", "RemoteDisconnected"}
ENDED = (0, None)
"""No response, because the worker ended."""


def booted(server: Server) -> list[int]:
    """The process ids of all workers so far, oldest first."""
    return list(map(int, re.findall(r"Booting worker with pid: (\d+)", server.log)))


def times(server: Server, text: str) -> list[datetime]:
    """The times of the log lines with this text."""
    lines = [line for line in server.log.splitlines() if text in line]
    return [datetime.strptime(line[:23], "%Y-%m-%d %H:%M:%S.%f") for line in lines]


def gone(pid: int) -> bool:
    """Whether the process has ended; it may still be a zombie."""
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def post(server: Server, words: str = "red fish") -> httpx.Response:
    """Ask over a connection of its own."""
    body = {"query": "red fish", "documents": [words]}
    return httpx.post(f"{server.client.base_url}/v1/rerank", json=body, timeout=MAX_WAIT, trust_env=False)


def ask(connection: http.client.HTTPConnection, words: str) -> tuple[int, str | None]:
    """Send a request over a kept connection; return the status and the Connection header of the response."""
    body = json.dumps({"query": "red fish", "documents": [words]})
    try:
        connection.request("POST", "/v1/rerank", body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        answer.read()
    except (OSError, http.client.HTTPException):
        connection.close()
        return ENDED
    return answer.status, answer.getheader("connection")


def accepted(server: Server) -> int:
    """The open connections of the newest worker."""
    connections = psutil.Process(booted(server)[-1]).net_connections("tcp")
    return sum(connection.status == psutil.CONN_ESTABLISHED for connection in connections)


def listening(server: Server) -> bool:
    """Whether a new connection is possible."""
    with contextlib.suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", server.port)):
        return True
    return False


@pytest.mark.parametrize(
    ("sig", "workers"),
    [
        (signal.SIGTERM, 1),
        (signal.SIGTERM, 2),
        pytest.param(signal.SIGINT, 1, marks=pytest.mark.slow),
        (signal.SIGQUIT, 1),
        pytest.param(signal.SIGINT, 2, marks=pytest.mark.slow),
        pytest.param(signal.SIGQUIT, 2, marks=pytest.mark.slow),
    ],
)
def test_a_stop_under_load_answers_every_accepted_request(start: Start, sig: int, workers: int) -> None:
    server = start(command=FAKE, WORKERS=str(workers), MODEL_DEVICE="cpu", FAKE_SECONDS="0.05")
    all_ready(server, workers)
    with Traffic(server) as traffic:
        traffic.wait(50)
        assert server.stop(sig) == 0
        traffic.wait(10)
    assert set(traffic.kept) <= {200, *REFUSED}, traffic.kept
    assert set(traffic.fresh) <= {200, *NOT_ACCEPTED}, traffic.fresh
    answered = server.log.count("POST /v1/rerank 200")
    assert server.log.count("POST /v1/rerank") == answered == traffic.seen[200] + 1, "one before the traffic"


@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGINT])
def test_open_connections_are_closed_with_an_answer(start: Start, sig: int) -> None:
    """A request may be on its way when its connection is closed; not so behind an answer that says `close`."""
    server = start(command=FAKE)
    used, unused = (http.client.HTTPConnection("127.0.0.1", server.port, timeout=MAX_WAIT) for _ in range(2))
    used.request("GET", "/livez")
    assert used.getresponse().read() == b"ok"
    unused.connect()
    until(lambda: accepted(server) == 3, "both are accepted, beside the one of /health")
    server.process.send_signal(sig)
    until(lambda: not listening(server), "the port is closed")
    for connection in (used, unused):
        assert ask(connection, "red fish") == (200, "close")
    server.client.close()
    assert server.process.wait(MAX_WAIT) == 0


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_sighup_fails_no_request_but_new_connections_wait_for_the_load(start: Start, workers: int) -> None:
    server = start(command=FAKE, WORKERS=str(workers), MODEL_DEVICE="cpu", FAKE_LOAD_SECONDS="1")
    all_ready(server, workers)
    with Traffic(server) as traffic:
        traffic.wait(30)
        server.process.send_signal(signal.SIGHUP)
        until(lambda: server.log.count("ready after") == 2 * workers, "the new workers are ready")
        until(lambda: all(map(gone, booted(server)[:workers])), "the old workers have ended")
        traffic.wait(30)
    assert set(traffic.seen) == {200}, traffic.seen
    assert server.process.poll() is None


def test_one_worker_more_and_one_fewer_fail_no_request(start: Start) -> None:
    server = start(command=FAKE, FAKE_LOAD_SECONDS="1")
    with Traffic(server) as traffic:
        server.process.send_signal(signal.SIGTTIN)
        all_ready(server, 2)
        traffic.wait(30)
        server.process.send_signal(signal.SIGTTOU)
        until(lambda: gone(booted(server)[0]), "the older one has ended")
        traffic.wait(30)
    assert set(traffic.seen) == {200}, traffic.seen


def test_a_stop_while_it_loads_does_not_wait_for_the_load(start: Start) -> None:
    server = start(command=FAKE, wait="loading", FAKE_LOAD_SECONDS="100")
    assert server.stop() == 0


@pytest.mark.slow
def test_a_worker_that_drains_for_long_still_beats(start: Start) -> None:
    """gunicorn kills a worker without a heartbeat; a stopping worker may need longer for its last responses."""
    server = start(command=FAKE, WORKERS="2", MODEL_DEVICE="cpu", TIMEOUT="2", FAKE_SECONDS="6")
    all_ready(server, 2)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(post, server) for _ in range(8)]
        busy(server, 8)
        for pid in booted(server):
            os.kill(pid, signal.SIGTERM)
        assert [answer.result().status_code for answer in answers] == [200] * 8
    assert "WORKER TIMEOUT" not in server.log


def test_one_killed_worker_of_two_costs_only_what_it_had_in_progress(start: Start) -> None:
    server = start(command=FAKE, WORKERS="2", MODEL_DEVICE="cpu", FAKE_LOAD_SECONDS="1", FAKE_SECONDS="0.02")
    all_ready(server, 2)
    with Traffic(server) as traffic:
        traffic.wait(50)
        os.kill(booted(server)[0], signal.SIGKILL)
        until(lambda: server.log.count("ready after") == 3, "it was replaced")
        traffic.wait(50)
    failed = traffic.seen - type(traffic.seen)({200: traffic.seen[200]})
    assert all(isinstance(told, str) and told != "wrong" for told in failed), failed
    assert failed.total() <= 6, "at most one for each client"


def test_a_killed_master_takes_its_workers_along_and_its_folder_goes_at_the_next_start(start: Start) -> None:
    server = start(command=FAKE, WORKERS="2", MODEL_DEVICE="cpu", FAKE_SECONDS="4")
    all_ready(server, 2)
    [folder] = folders(server)
    start(command=FAKE)
    assert folder.exists(), "another service leaves alone what is in use"
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(post, server) for _ in range(4)]
        busy(server, 4)
        server.stop(signal.SIGKILL)
        assert [answer.result().status_code for answer in answers] == [200] * 4, "accepted, so answered"
    until(lambda: all(map(gone, booted(server))), "the workers have ended")
    start(command=FAKE)
    assert not folder.exists(), "nobody was there to remove it"


@pytest.mark.slow
def test_a_later_load_that_fails_waits_and_harms_no_sibling(start: Start, tmp_path: Path) -> None:
    fails = tmp_path / "fails"
    server = start(command=FAKE, WORKERS="2", MODEL_DEVICE="cpu", FAKE_LOAD_FAILS=str(fails))
    all_ready(server, 2)
    fails.touch()
    os.kill(booted(server)[0], signal.SIGKILL)
    until(lambda: "cannot serve: the test wants it so" in server.log, "its successor cannot load")
    with Traffic(server) as traffic:
        fails.unlink()
        until(lambda: server.log.count("ready after") == 3, "the next one could load")
        traffic.wait(30)
    failed, retried = (times(server, text) for text in ("cannot serve", "Booting worker with pid"))
    assert len(retried) == 4
    assert (retried[-1] - failed[-1]).total_seconds() > 9, "it waits before the next try"
    assert set(traffic.seen) == {200}, traffic.seen
    assert server.process.poll() is None


@pytest.mark.slow
def test_a_later_load_that_hangs_is_given_up_and_harms_no_sibling(start: Start, tmp_path: Path) -> None:
    hangs = tmp_path / "hangs"
    server = start(command=FAKE, WORKERS="2", MODEL_DEVICE="cpu", FAKE_LOAD_HANGS=str(hangs), LOAD_TIMEOUT="2")
    all_ready(server, 2)
    hangs.touch()
    os.kill(booted(server)[0], signal.SIGKILL)
    until(lambda: "cannot serve" in server.log, "its successor is given up")
    hangs.unlink()
    with Traffic(server) as traffic:
        all_ready(server, 3)
        traffic.wait(30)
    assert set(traffic.seen) == {200}, traffic.seen
    assert "LOAD_TIMEOUT" in server.log
    assert server.process.poll() is None


@pytest.mark.slow
def test_a_load_that_takes_longer_than_the_heartbeat_is_let_finish(start: Start) -> None:
    server = start(command=FAKE, TIMEOUT="2", FAKE_LOAD_SECONDS="6")
    assert post(server).status_code == 200
    assert len(booted(server)) == 1
    assert "WORKER TIMEOUT" not in server.log


@pytest.mark.slow
def test_work_that_outlives_the_grace_period_is_answered_with_503(start: Start) -> None:
    """Its body is still on its way: cancelled in time for an answer, before gunicorn kills."""
    server = start(command=FAKE, REQUEST_TIMEOUT="1", BODY_TIMEOUT="60")
    with concurrent.futures.ThreadPoolExecutor(1) as pool, connect(server) as half:
        send(half, b"POST /v1/rerank HTTP/1.1\r\nHost: h\r\nContent-Length: 100\r\n\r\n{")
        busy(server, 1)
        stopped = pool.submit(server.stop)
        answers = listen(half)
        assert answers.statuses == [503]
        assert "shutting down" in answers.error["detail"]
        assert stopped.result() == 0


def test_a_bug_in_the_batch_loop_is_told_to_who_waits_and_costs_no_sibling(start: Start) -> None:
    server = start(command=FAKE, WORKERS="2", MODEL_DEVICE="cpu", FAKE_BATCH_TOKENS="20")
    all_ready(server, 2)
    body = {"query": "q", "documents": ["bug", *["a b c"] * 50]}
    with Traffic(server) as traffic:
        traffic.wait(50)
        told = httpx.post(f"{server.client.base_url}/v1/rerank", json=body, timeout=MAX_WAIT, trust_env=False)
        assert (told.status_code, told.json()["error_type"]) == (503, "not_ready")
        assert "the batch loop failed" in told.json()["detail"]
        assert int(told.headers["retry-after"]) >= 1
        all_ready(server, 3)
        traffic.wait(30)
    assert "wrong" not in traffic.seen
    assert max(traffic.failed.values(), default=0) <= 1, f"{traffic.failed} of {traffic.seen}"
    assert server.process.poll() is None


@pytest.mark.parametrize("shared", [{}, {"PROMETHEUS_MULTIPROC_DIR": "/dev/null/metrics"}], ids=["folder", "none"])
@pytest.mark.parametrize("harm", ["lost", pytest.param("hang", marks=pytest.mark.slow), "bug"])
def test_an_unhealthy_worker_leaves_new_requests_to_its_sibling(
    start: Start, harm: str, shared: dict[str, str]
) -> None:
    """A client that retries immediately gets no second 503. Without a folder no connection can be handed over."""
    timeout = {"REQUEST_TIMEOUT": "2"} if harm == "hang" else {}
    server = start(command=FAKE, WORKERS="2", MODEL_DEVICE="cpu", **shared, **timeout)
    all_ready(server, 2)
    with contextlib.ExitStack() as stack:
        clients = [http.client.HTTPConnection("127.0.0.1", server.port, timeout=MAX_WAIT) for _ in range(12)]
        kept = [stack.enter_context(contextlib.closing(client)) for client in clients]
        assert {ask(connection, "red fish")[0] for connection in kept} == {200}
        first = ask(kept[0], harm)
        status = {"lost": 503, "hang": 504, "bug": 200}[harm]
        assert first[0] == status
        assert first[1] == "close" or harm != "lost"
        until(lambda: "cannot serve" in server.log, "the worker is unhealthy")
        told = [ask(connection, "red fish") for connection in kept]
        assert set(told) <= {(200, None), (503, "close"), ENDED}, told
        if harm == "hang" and shared:
            assert told[0] != (200, None), "it was not handed over"
        assert [ask(connection, "red fish") for connection in kept] == [(200, None)] * 12

    def ended() -> bool:
        if any(map(gone, booted(server)[:2])):
            return True
        health = httpx.get(f"{server.client.base_url}/health", timeout=MAX_WAIT, trust_env=False)
        assert (health.status_code, post(server).status_code) == (200, 200)
        return False

    until(ended, "the unhealthy worker has ended")
    all_ready(server, 3)


@pytest.mark.slow
def test_a_single_unhealthy_worker_keeps_listening(start: Start, tmp_path: Path) -> None:
    fails = tmp_path / "fails"
    server = start(command=FAKE, FAKE_LOAD_FAILS=str(fails))
    fails.touch()
    os.kill(booted(server)[0], signal.SIGKILL)
    server.client.close()
    server.client = httpx.Client(base_url=server.client.base_url, timeout=MAX_WAIT, trust_env=False)
    server.wait_for("unhealthy")
    fails.unlink()
    server.wait_for("ok")
    assert post(server).status_code == 200


def test_a_panic_of_the_tokenizer_fails_its_request_alone(start: Start) -> None:
    server = start(command=FAKE)
    body = {"query": "panic", "documents": ["a"]}
    told = server.client.post("/v1/rerank", json=body)
    assert (told.status_code, told.json()["error_type"]) == (500, "internal_error")
    assert post(server).status_code == 200
    assert len(booted(server)) == 1


def test_a_first_load_that_fails_in_every_worker_stops_the_service_once(start: Start, tmp_path: Path) -> None:
    (tmp_path / "fails").touch()
    server = start(command=FAKE, wait=None, WORKERS="3", MODEL_DEVICE="cpu", FAKE_LOAD_FAILS=str(tmp_path / "fails"))
    assert server.process.wait(MAX_WAIT) == 3
    assert "Traceback" not in server.log


def test_an_event_loop_that_hangs_costs_its_worker_and_no_sibling(start: Start) -> None:
    server = start(command=FAKE, WORKERS="2", MODEL_DEVICE="cpu", TIMEOUT="2")
    all_ready(server, 2)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        blocked = pool.submit(httpx.get, f"{server.client.base_url}/block", timeout=MAX_WAIT, trust_env=False)
        until(lambda: "WORKER TIMEOUT" in server.log, "gunicorn notices")
        assert isinstance(blocked.exception(MAX_WAIT), httpx.TransportError)
    until(lambda: server.log.count("ready after") == 3, "it was replaced")
    assert [post(server).status_code for _ in range(10)] == [200] * 10
    assert server.log.count("WORKER TIMEOUT") == 1


@pytest.mark.parametrize("name", ["asgi", "sync", "uvicorn_worker.UvicornWorker"])
def test_another_worker_class_on_the_command_line_is_refused(start: Start, name: str) -> None:
    server = start(command=[*GUNICORN[:-1], "-k", name, "app:app"], wait=None)
    assert server.process.wait(MAX_WAIT) == 1
    lines = [line for line in server.log.splitlines() if line.startswith("error")]
    assert lines == [f"error: the worker class {name} cannot serve this; leave out -k"]
