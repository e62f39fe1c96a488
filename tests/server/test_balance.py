"""A request goes to the worker with the fewest in progress, and nothing that happens to workers costs one."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import re
import resource
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import cast

import httpx
import psutil
import pytest
import requests
import uvloop

from reranker.server.siblings import _CELL, Siblings
from tests.conftest import FAKE, GUNICORN, Server, Start
from tests.faults.test_process import booted, gone, post
from tests.faults.test_restart import PID, end, restart
from tests.faults.traffic import BODY, Traffic, all_ready, until
from tests.http.test_metrics import folders

HEAD = b"POST /v1/rerank HTTP/1.1\r\n"


class Protocol(asyncio.Protocol):
    """What a worker has of a connection."""

    def __init__(self, first: bytes = b"") -> None:
        self.received = bytearray(first)
        self.transport: asyncio.Transport
        self.lost = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost = True

    def data_received(self, data: bytes) -> None:
        self.received.extend(data)


class Worker:
    """One that takes connections as the real one does."""

    def __init__(self, folder: Path, slot: int, generation: str = "") -> None:
        self.siblings = Siblings(str(folder), slot, generation)
        self.open = True
        self.taken: list[Protocol] = []
        self.siblings.join(lambda: self.open, self._take)

    def _take(self, first: bytes) -> Protocol:
        self.taken.append(Protocol(first))
        return self.taken[-1]

    def die(self) -> None:
        """Leave everything as it is, as SIGKILL does."""
        if self.siblings._socket.fileno() >= 0:
            asyncio.get_running_loop().remove_reader(self.siblings._socket)
            self.siblings._socket.close()


class Host:
    """Workers, and clients that have connected to one of them; all ends with the test."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.workers: list[Worker] = []
        self.clients: list[socket.socket] = []
        self.accepted: list[Protocol] = []

    def worker(self, slot: int, requests: int = 0, generation: str = "") -> Worker:
        """One more, with so many requests in progress."""
        self.workers.append(Worker(self.folder, slot, generation))
        self.workers[-1].siblings.count(requests)
        return self.workers[-1]

    async def connect(self) -> tuple[socket.socket, asyncio.Transport]:
        """A client, and what a worker has accepted of it."""
        loop = asyncio.get_running_loop()
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.clients.append(socket.create_connection(listener.getsockname()))
            self.clients[-1].setblocking(False)
            _, protocol = await loop.connect_accepted_socket(Protocol, listener.accept()[0])
        self.accepted.append(protocol)
        return self.clients[-1], protocol.transport

    async def soon(self, condition: Callable[[], bool]) -> None:
        """Until something is so."""
        async with asyncio.timeout(30):
            while not condition():
                await asyncio.sleep(0.001)

    async def end(self) -> None:
        """Close everything; uvloop would wait for ever for what is not, with warnings as errors."""
        for worker in self.workers:
            worker.die()
            await asyncio.gather(*worker.siblings._tasks)
        protocols = [*self.accepted, *(taken for worker in self.workers for taken in worker.taken)]
        for protocol in protocols:
            protocol.transport.abort()
        for client in self.clients:
            client.close()
        await self.soon(lambda: all(protocol.lost for protocol in protocols))


def on_host(test: Callable[[Host], Coroutine[None, None, None]]) -> Callable[[Path], None]:
    """Run a test on the event loop of the real worker."""

    async def main(folder: Path) -> None:
        host = Host(folder)
        try:
            await asyncio.wait_for(test(host), 60)
        finally:
            await host.end()

    def run(tmp_path: Path) -> None:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(main(tmp_path))

    return run


@on_host
async def test_a_connection_goes_on_at_the_other_worker_where_it_was(host: Host) -> None:
    here, there = host.worker(0, requests=1), host.worker(1)
    client, transport = await host.connect()
    assert here.siblings.hand_off(transport, HEAD)
    loop = asyncio.get_running_loop()
    await loop.sock_sendall(client, b"Host: here\r\n\r\n")
    await host.soon(lambda: bool(there.taken) and there.taken[0].received == HEAD + b"Host: here\r\n\r\n")
    there.taken[0].transport.write(b"answer")
    assert await loop.sock_recv(client, 100) == b"answer"
    there.taken[0].transport.close()
    assert await loop.sock_recv(client, 100) == b"", "nobody else holds it"
    assert host.accepted[0].received == b""


@on_host
async def test_a_large_body_arrives_whole(host: Host) -> None:
    here, there = host.worker(0, requests=1), host.worker(1)
    client, transport = await host.connect()
    first, rest = HEAD + os.urandom(256_000 - len(HEAD)), os.urandom(5_000_000)  # as much as uvloop reads, and more
    assert here.siblings.hand_off(transport, first)
    await asyncio.get_running_loop().sock_sendall(client, rest)
    await host.soon(lambda: bool(there.taken) and len(there.taken[0].received) >= len(first + rest))
    assert there.taken[0].received == first + rest


@on_host
async def test_it_goes_to_the_one_with_the_fewest(host: Host) -> None:
    here, *others = (host.worker(slot, requests=n) for slot, n in enumerate((3, 2, 1, 2)))
    assert here.siblings.hand_off((await host.connect())[1], HEAD)
    await host.soon(lambda: [len(worker.taken) for worker in others] == [0, 1, 0])


@on_host
async def test_what_is_better_answered_here_stays(host: Host) -> None:
    here, there = host.worker(0), host.worker(1)
    _, transport = await host.connect()
    assert not here.siblings.hand_off(transport, HEAD), "nobody has less than nothing"
    here.siblings.count(1)
    there.siblings.count(1)
    assert not here.siblings.hand_off(transport, HEAD)
    here.siblings.count(1)
    assert not here.siblings.hand_off(transport, b"GET /livez HTTP/1.1\r\n")
    assert not here.siblings.hand_off(transport, HEAD * 20_000), "more than another worker reads"
    there.open = False
    there.siblings.publish()
    assert not here.siblings.hand_off(transport, HEAD)
    there.open = True
    there.siblings.publish()
    transport.write(b"x" * 50_000_000)
    assert not here.siblings.hand_off(transport, HEAD), "part of an answer has not left"
    assert here.siblings.hand_off((await host.connect())[1], HEAD), "as it would otherwise"
    await host.soon(lambda: len(there.taken) == 1)


@on_host
async def test_a_worker_that_takes_nothing_passes_everything_on(host: Host) -> None:
    here, there = host.worker(0), host.worker(1, requests=9)
    await here.siblings.leave()
    assert here.siblings.hand_off((await host.connect())[1], HEAD)
    await host.soon(lambda: len(there.taken) == 1)


@on_host
async def test_a_worker_that_leaves_takes_what_is_on_its_way(host: Host) -> None:
    here, leaving = host.worker(0, requests=1), host.worker(1)
    asyncio.get_running_loop().remove_reader(leaving.siblings._socket)  # it is busy with something else
    assert here.siblings.hand_off((await host.connect())[1], HEAD)
    await leaving.siblings.leave()
    assert [protocol.received for protocol in leaving.taken] == [HEAD]


@on_host
async def test_a_connection_that_there_is_no_room_for_does_not_shut_its_worker_out(host: Host) -> None:
    here, there = host.worker(0, requests=1), host.worker(1)
    # What is left of a message whose file could not be opened here.
    here.siblings._sent[1] = there.siblings._accepted
    here.siblings._socket.sendto(HEAD, f"{host.folder}/worker_1")
    await host.soon(lambda: here.siblings._sent[1] != there.siblings._accepted)
    assert there.taken == []
    assert here.siblings.hand_off((await host.connect())[1], HEAD)
    await host.soon(lambda: len(there.taken) == 1)


@on_host
async def test_a_worker_that_does_not_take_over_is_not_sent_another(host: Host) -> None:
    here, hangs = host.worker(0, requests=5), host.worker(1)
    transports = [(await host.connect())[1] for _ in range(3)]
    # Nothing runs between these, so it hangs.
    assert [here.siblings.hand_off(transport, HEAD) for transport in transports] == [True, False, False]
    await host.soon(lambda: here.siblings.hand_off(transports[2], HEAD))
    await host.soon(lambda: len(hangs.taken) == 2)


@on_host
async def test_a_worker_that_shows_no_sign_of_life_gets_nothing(host: Host) -> None:
    here, _ = host.worker(0, requests=1), host.worker(1)
    _, transport = await host.connect()
    now = time.monotonic()
    for late in (4, -4):  # or one from before the machine was started again
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(time, "monotonic", lambda late=late: now + late)
            assert not here.siblings.hand_off(transport, HEAD)


@on_host
async def test_a_dead_worker_gets_nothing_and_its_successor_does(host: Host) -> None:
    here, dead = host.worker(0, requests=1), host.worker(1)
    _, transport = await host.connect()
    dead.die()
    assert not here.siblings.hand_off(transport, HEAD), "though its cell is as it was"
    successor = host.worker(1)
    assert here.siblings.hand_off(transport, HEAD)
    await host.soon(lambda: len(successor.taken) == 1)


@on_host
async def test_the_generations_of_a_rolling_restart_do_not_meet(host: Host) -> None:
    here, _ = host.worker(0, requests=1), host.worker(1, generation="b")
    assert not here.siblings.hand_off((await host.connect())[1], HEAD)


@contextmanager
def no_room() -> Iterator[None]:
    """Files cannot grow, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_folder_that_cannot_be_used_is_told_before_anything_is_mapped(tmp_path: Path) -> None:
    with no_room(), pytest.raises(OSError, match="too large"):
        Siblings(str(tmp_path), 0)
    for folder in ("/nonexistent/metrics", "/dev/null/metrics", f"{tmp_path}/{'long' * 60}"):
        with pytest.raises(OSError):  # noqa: PT011  # whichever it is
            Siblings(folder, 0)
    with pytest.raises(OSError, match="workers"):
        Siblings(str(tmp_path), 512)


# The real gunicorn

BY_PROCESS = {"MODEL_DEVICE": "cpu", "LOG_FORMAT": "[%(process)d] %(message)s"}


def answered(server: Server) -> Counter[int]:
    """Rankings by the worker that gave them."""
    return Counter(map(int, re.findall(r"\[(\d+)\] POST /v1/rerank 200", server.log)))


def in_progress(server: Server) -> list[int]:
    """Requests in progress at each worker that the others see, which may be a second after it is ready."""
    files = [folder / "workers" for folder in folders(server)]
    cells = [cell for file in files if file.exists() for cell in _CELL.iter_unpack(file.read_bytes())]
    return [requests for seen, requests, _ in cells if seen > 0]


def test_each_of_three_slow_requests_has_a_worker_of_its_own(start: Start, tmp_path: Path) -> None:
    gate = tmp_path / "gate"  # a forward pass waits for a byte from it
    os.mkfifo(gate)
    stepped = [*GUNICORN[:-1], "tests.faults.stepped_app:app"]
    server = start(command=stepped, WORKERS="3", GATE=str(gate), JOURNAL=str(tmp_path / "journal"), **BY_PROCESS)
    until(lambda: in_progress(server) == [0, 0, 0], "all of them can take requests")
    with ThreadPoolExecutor(3) as pool, gate.open("wb") as release:
        answers: list[Future[httpx.Response]] = []
        for i in range(3):
            answers.append(pool.submit(post, server))
            until(partial(lambda i: sum(in_progress(server)) == i + 1, i), "it has a worker")
        assert in_progress(server) == [1, 1, 1]
        release.write(b"..." * 100)
        release.flush()
        assert [answer.result().status_code for answer in answers] == [200] * 3
    until(lambda: answered(server).total() == 3, "all are in the log")
    assert len(answered(server)) == 3


@pytest.fixture(scope="module")
def two_workers(start: Start) -> Server:
    server = start(command=FAKE, WORKERS="2", FAKE_SECONDS="0.05", **BY_PROCESS)
    until(lambda: in_progress(server) == [0, 0], "both can take requests")
    return server


@pytest.mark.parametrize("kind", ["httpx", "requests", "http.client"])
def test_clients_that_keep_their_connections_are_shared_out(two_workers: Server, kind: str) -> None:
    """The first worker has all of their connections: the other one was asleep when they came."""
    server = two_workers
    before = answered(server)
    asleep = psutil.Process(booted(server)[1])
    asleep.suspend()
    together = threading.Barrier(16, asleep.resume)

    def client(_: int) -> list[int]:
        url = f"{server.client.base_url}/livez"
        if kind == "httpx":
            with httpx.Client(trust_env=False, timeout=60) as session:
                session.get(url)
                together.wait(30)
                return [session.post(f"{server.client.base_url}/v1/rerank", json=BODY).status_code for _ in range(12)]
        if kind == "requests":
            with requests.Session() as session:
                session.trust_env = False
                session.get(url, timeout=60)
                together.wait(30)
                url = f"{server.client.base_url}/v1/rerank"
                return [session.post(url, json=BODY, timeout=60).status_code for _ in range(12)]
        with closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)) as connection:
            connection.request("GET", "/livez")
            connection.getresponse().read()
            own, statuses = connection.sock, []
            together.wait(30)
            for _ in range(12):
                connection.request("POST", "/v1/rerank", json.dumps(BODY), {"Content-Type": "application/json"})
                answer = connection.getresponse()
                answer.read()
                statuses.append(answer.status)
            assert connection.sock is own, "its one connection was enough"
            return statuses

    try:
        with ThreadPoolExecutor(16) as pool:
            statuses = Counter(status for seen in pool.map(client, range(16)) for status in seen)
    finally:
        asleep.resume()
    assert statuses == {200: 192}
    until(lambda: (answered(server) - before).total() == 192, "all are in the log")
    assert max((answered(server) - before).values()) <= 0.65 * 192, answered(server)


def test_a_successor_gets_its_share_of_connections_that_were_there_before(start: Start) -> None:
    server = start(command=FAKE, WORKERS="2", FAKE_SECONDS="0.02", **BY_PROCESS)
    all_ready(server, 2)
    with Traffic(server, keep_alive=8, fresh=0, pause=0.001) as traffic:
        traffic.wait(30)
        os.kill(booted(server)[0], signal.SIGTERM)
        all_ready(server, 3)
        until(lambda: gone(booted(server)[0]), "the first worker has ended")
        successor = booted(server)[2]
        until(lambda: answered(server)[successor] > 50, "the successor answers")
    assert set(traffic.seen) == {200}, traffic.seen


@pytest.mark.slow
def test_a_rolling_restart_and_the_end_of_each_worker_in_turn_fail_no_request(start: Start) -> None:
    server = start(command=[*FAKE, *PID], WORKERS="2", FAKE_SECONDS="0.02", **BY_PROCESS)
    all_ready(server, 2)
    try:
        with Traffic(server, keep_alive=8, fresh=2, pause=0.001) as traffic:
            for i in range(3):
                os.kill(booted(server)[-2], signal.SIGTERM)
                all_ready(server, 3 + i)
            restart(server)
            second = booted(server)[-2:]
            until(lambda: all(answered(server)[pid] > 50 for pid in second), "both of the new generation answer")
        assert set(traffic.seen) == {200}, traffic.seen
    finally:
        end(server)


def test_a_worker_that_hangs_takes_at_most_one_request_of_its_sibling(start: Start) -> None:
    server = start(command=FAKE, WORKERS="2", TIMEOUT="4", FAKE_SECONDS="0.02", **BY_PROCESS)
    all_ready(server, 2)
    hangs, _ = booted(server)
    os.kill(hangs, signal.SIGSTOP)
    until(lambda: psutil.Process(hangs).status() == psutil.STATUS_STOPPED, "it hangs")

    def asked(_: int) -> object:
        try:
            return post(server).status_code
        except httpx.TransportError as error:
            return type(error)

    with ThreadPoolExecutor(4) as pool:
        seen = Counter(pool.map(asked, range(100)))
    assert seen[200] >= 99, seen
    assert not answered(server)[hangs]
    until(lambda: server.log.count("ready after") == 3, "it was replaced")


@pytest.mark.parametrize("folder", ["/dev/null/metrics", "/nonexistent/metrics"])
def test_without_a_folder_every_worker_answers_what_it_gets(start: Start, folder: str) -> None:
    server = start(command=FAKE, WORKERS="2", PROMETHEUS_MULTIPROC_DIR=folder, **BY_PROCESS)
    all_ready(server, 2)
    with Traffic(server) as traffic:
        traffic.wait(50)
    assert set(traffic.seen) == {200}, traffic.seen
    assert "requests are not balanced between workers" in server.log
