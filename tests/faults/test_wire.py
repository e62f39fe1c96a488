"""Hostile and broken bodies, heads and connections, sent to a real gunicorn."""

from __future__ import annotations

import contextlib
import json
import shlex
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import psutil
import pytest

from config import Settings
from reranker.server.protocol import MAX_PIPELINED
from tests.conftest import FAKE, MAX_WAIT, Server, Start
from tests.faults.raw import Answers, Peak, Spent, busy, connect, exchange, listen, once, post, send, workers

BODY = json.dumps({"query": "q", "documents": ["a"]}).encode()
RERANK = b"POST /v1/rerank HTTP/1.1\r\nHost: h\r\n"
LENGTH = b"Content-Length: %d\r\n" % len(BODY)
CHUNKED = b"Transfer-Encoding: chunked\r\n"
LIVEZ = b"GET /livez HTTP/1.1\r\nHost: h\r\n\r\n"
PATIENCE, KEEP_ALIVE = 2, 2
DEFAULT_PATIENCE = Settings.model_fields["body_timeout"].default
"""A connection that is closed later has not the timeout of `wire`."""


@pytest.fixture(scope="module")
def wire(start: Start) -> Server:
    """A service with a quick scorer and short timeouts."""
    return start(command=FAKE, BODY_TIMEOUT=str(PATIENCE), KEEP_ALIVE=str(KEEP_ALIVE))


@pytest.fixture(autouse=True)
def _unharmed(request: pytest.FixtureRequest) -> Iterator[None]:
    """After every test the same worker still serves, and nothing in it failed."""
    yield
    for name in {"wire", "server"} & set(request.fixturenames):
        server = request.getfixturevalue(name)
        assert len(workers(server)) == 1
        assert server.client.post("/v1/rerank", json=json.loads(BODY)).status_code == 200
        assert "Traceback" not in server.log


# Bodies


@pytest.mark.parametrize(
    "body",
    [
        b'{"query": "q", "documents": [' + b"{}," * 1_000_000 + b"{}]}",
        b'{"query": "q", "documents": [' + b"7," * 100_000 + b"7]}",
        b'{"query": "q", "documents": [' + b"7," * 2000 + b"7]}",
        b'{"query": [' + b"7," * 100_000 + b'7], "documents": ["a"]}',
        b'{"query": "q", "documents": ["a"], "junk": [' + b"[]," * 5_000_000 + b"[]]}",
    ],
    ids=[
        "a million objects",
        "a hundred thousand integers",
        "as many integers as allowed",
        "a query of integers",
        "millions of lists that nobody asked for",
    ],
)
def test_a_huge_wrong_body_is_refused_briefly_by_the_same_worker(server: Server, body: bytes) -> None:
    with Spent(server) as spent:
        response = server.client.post("/v1/rerank", content=body)
    assert (response.status_code, response.json()["error_type"]) == (422, "invalid_request")
    assert len(response.content) < 500
    assert spent.seconds < 5  # 0.3 s for the million, 35 s as FastAPI comes


def test_500_mb_that_are_announced_are_refused_before_they_are_sent(wire: Server) -> None:
    with Peak(wire) as peak:
        answers = exchange(wire, RERANK + b"Content-Length: 500000000\r\n\r\n", answers=1)
        assert answers.statuses == [413]
        assert answers.error["error_type"] == "body_too_large"
    assert peak.megabytes < 10


@pytest.mark.slow
@pytest.mark.parametrize(
    ("head", "piece"),
    [
        (b"Content-Length: 500000000\r\n\r\n", b"x" * (1 << 20)),
        (CHUNKED + b"\r\n", b"100000\r\n" + b"x" * (1 << 20) + b"\r\n"),
        (b"Connection: close\r\nContent-Length: 500000000\r\n\r\n", b"x" * (1 << 20)),
        (b"Connection: close\r\n" + CHUNKED + b"\r\n", b"100000\r\n" + b"x" * (1 << 20) + b"\r\n"),
        (CHUNKED + b"\r\nno length\r\n", b"x" * (1 << 20)),
    ],
    ids=["announced", "chunked", "announced, last", "chunked, last", "wrong chunks"],
)
def test_500_mb_that_are_sent_all_the_same_fill_no_memory_and_delay_nobody(
    wire: Server, head: bytes, piece: bytes
) -> None:
    probed, over = 0, threading.Event()

    def probe() -> None:
        nonlocal probed
        while not over.wait(0.05):  # rarely enough that the worker spends its time on the body
            assert wire.client.get("/health").status_code == 200
            probed += 1

    with Peak(wire) as peak, Spent(wire) as spent, connect(wire) as connection, ThreadPoolExecutor(1) as pool:
        probing = pool.submit(probe)
        send(connection, RERANK + head)
        # The service reads and drops for a while, so that the answer is not lost in a reset, and then closes.
        sent = next((i for i in range(476) if not send(connection, piece)), 476)  # no more than was announced
        answers = listen(connection)
        over.set()
        probing.result()
    assert answers.closed
    if answers.data:  # it is lost when a reset overtakes it
        assert answers.statuses == [400 if b"no length" in head else 413]
    else:
        assert sent < 476
    assert probed
    assert spent.seconds < 5  # as uvicorn and FastAPI come: 9.3 s, and 1.5 GB
    assert peak.megabytes < 60  # MAX_BODY_BYTES is 16 MB


@pytest.mark.parametrize("size", [1_000_000, 10_000_000])
def test_an_endless_document_is_cut_before_it_is_read(server: Server, size: int) -> None:
    words = "how to compress files with gzip, and 压缩文件。 "
    document = (words * (size // len(words) + 1))[:size]
    body = json.dumps({"query": "q", "documents": [document]}, ensure_ascii=False).encode()
    with Spent(server) as spent:
        response = server.client.post("/v1/rerank", content=body)
    assert response.status_code == 200
    assert response.headers["x-truncated-documents"] == "1"
    assert spent.seconds < 20  # as transformers comes: 59.5 s for the larger one


def test_a_body_that_drips(wire: Server) -> None:
    with connect(wire) as connection:
        send(connection, RERANK + b"Content-Length: 1000\r\n\r\n")
        start = time.monotonic()
        while send(connection, b"x") and time.monotonic() - start < MAX_WAIT:
            connection.settimeout(0.1)
            with contextlib.suppress(TimeoutError):
                assert connection.recv(12) == b"HTTP/1.1 408"
                break
        assert PATIENCE - 1 < time.monotonic() - start < DEFAULT_PATIENCE
        assert listen(connection).closed


@pytest.mark.parametrize("half", [RERANK + LENGTH + b"\r\n" + BODY[:5], RERANK + CHUNKED + b"\r\n5\r\nabc"])
def test_a_client_that_leaves_in_the_middle_of_its_body_is_no_error(wire: Server, half: bytes) -> None:
    before = wire.log.count(" 499 ")
    with connect(wire) as connection:
        send(connection, half)
    wait_until(lambda: wire.log.count(" 499 ") > before)
    assert " 500 " not in wire.log


def test_a_client_that_closes_its_half_counts_as_gone(wire: Server) -> None:
    with connect(wire) as connection:
        send(connection, RERANK + LENGTH + b"\r\n" + BODY[:5])
        connection.shutdown(socket.SHUT_WR)
        answers = listen(connection)
    assert (answers.closed, answers.data) == (True, b"")


def wait_until(true: Callable[[], bool], seconds: float = MAX_WAIT) -> None:
    deadline = time.monotonic() + seconds
    while not true() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert true()


# Heads and connections that take their time


def drip(server: Server, first: bytes, noise: bytes) -> tuple[bytes, float]:
    """Send `first`, then `noise` repeatedly; return the response and the seconds until the service closed."""
    answer = b""
    with connect(server) as connection:
        send(connection, first)
        start = time.monotonic()
        connection.settimeout(0.1)
        while time.monotonic() - start < MAX_WAIT:
            try:
                piece = connection.recv(65536)
                if not piece:
                    break
                answer += piece
            except TimeoutError:
                if noise and not send(connection, noise):
                    break
            except OSError:
                break
    return answer, time.monotonic() - start


def test_heads_that_do_not_arrive_in_time(wire: Server) -> None:
    halves = {
        "one byte": (b"G", b""),
        "half sent": (b"GET /livez HTTP/1.1\r\nHost: h\r\n", b""),
        "a slow address": (b"GET /", b"a"),
        "slow headers": (b"GET /livez HTTP/1.1\r\nHost: h\r\n", b"x: y\r\n"),
        "a second request": (LIVEZ + b"GET /livez HT", b""),
    }
    with ThreadPoolExecutor(len(halves)) as pool:
        ends = pool.map(lambda half: drip(wire, *half), halves.values())
    for name, (answer, seconds) in zip(halves, ends, strict=True):
        assert PATIENCE - 1 < seconds < DEFAULT_PATIENCE, name
        assert b"HTTP/1.1 408 Request Timeout\r\n" in answer, name
        error = json.loads(answer[answer.index(b"{") :])
        assert error["detail"] == "the head of the request did not arrive within 2 s", name
        assert error["error_type"] == "head_timeout", name


def test_idle_connections_are_closed(wire: Server) -> None:
    kinds = [(first, noise) for first in (b"", LIVEZ) for noise in (b"", b"\r\n")]
    with ThreadPoolExecutor(len(kinds)) as pool:
        ends = pool.map(lambda kind: drip(wire, *kind), kinds)
    for (first, noise), (answer, seconds) in zip(kinds, ends, strict=True):
        assert KEEP_ALIVE - 1 < seconds < MAX_WAIT, (first, noise)
        assert answer.count(b"HTTP/1.1 200") == bool(first)
        assert answer.count(b"HTTP/1.1") == bool(first)


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"", 404),
        (b"Connection: close\r\n", 404),
        (b"Host: another\r\n", 400),
        (b"Expect: 100-continue\r\nConnection: close\r\n", 404),
    ],
    ids=["kept", "last", "no request", "expects to be told to go on"],
)
def test_the_rest_of_a_body_that_nobody_wants_is_not_waited_for(wire: Server, head: bytes, status: int) -> None:
    """The answer is given at once; the body drips on."""
    with connect(wire) as connection:
        send(connection, RERANK.replace(b"/v1/rerank", b"/nothing") + head + b"Content-Length: 1000\r\n\r\n")
        assert listen(connection, answers=1).statuses == [status]
        start = time.monotonic()
        while send(connection, b"x") and time.monotonic() - start < MAX_WAIT:
            time.sleep(0.1)
    assert PATIENCE - 1 < time.monotonic() - start < DEFAULT_PATIENCE


def test_a_connection_whose_early_answered_body_came_is_used_again_and_closed_when_idle(wire: Server) -> None:
    with connect(wire) as connection:
        send(connection, RERANK.replace(b"/v1/rerank", b"/nothing") + LENGTH + b"\r\n")
        assert listen(connection, answers=1).statuses == [404]
        send(connection, BODY + LIVEZ)
        assert listen(connection, answers=1).statuses == [200]
        send(connection, RERANK.replace(b"/v1/rerank", b"/nothing") + LENGTH + b"\r\n")
        assert listen(connection, answers=1).statuses == [404]
        send(connection, BODY)
        answers = listen(connection)
    assert (answers.data, answers.closed) == (b"", True)


BIG = post(json.dumps({"query": "q", "documents": ["x" * 8_000_000]}).encode(), path=b"/api/v1/rerank")


def test_a_client_that_does_not_read_is_cut_off(wire: Server) -> None:
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        connection.settimeout(MAX_WAIT)
        connection.connect(("127.0.0.1", wire.port))
        send(connection, BIG)
        time.sleep(2.5 * PATIENCE)
        answers = listen(connection)
    assert answers.statuses == [200]
    assert answers.closed
    assert len(answers.data) < 8_000_000


@pytest.mark.slow
def test_the_short_end_of_a_last_answer_that_nobody_reads_holds_no_connection(wire: Server) -> None:
    """The system takes some megabytes; of one of these sizes, less than the transport minds is left over."""
    with contextlib.ExitStack() as unread:
        for size in range(200_000, 7_000_000, 48_000):
            body = json.dumps({"query": "q", "documents": ["x" * size]}).encode()
            connection = unread.enter_context(socket.socket())
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.settimeout(MAX_WAIT)
            connection.connect(("127.0.0.1", wire.port))
            send(connection, post(body, b"Connection: close\r\n", path=b"/api/v1/rerank"))
        [worker] = map(psutil.Process, workers(wire))
        deadline = time.monotonic() + MAX_WAIT + PATIENCE
        while established(worker) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert established(worker) == 0


def established(worker: psutil.Process) -> int:
    return sum(connection.status == psutil.CONN_ESTABLISHED for connection in worker.net_connections("tcp"))


@pytest.mark.parametrize(
    "most",
    [1 << 18, pytest.param(1 << 15, marks=pytest.mark.slow)],
    ids=["megabytes a second", "less than the system's buffer"],
)
def test_a_client_that_reads_slowly_gets_everything(wire: Server, most: int) -> None:
    data = b""
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        connection.settimeout(MAX_WAIT)
        connection.connect(("127.0.0.1", wire.port))
        send(connection, BIG)
        start = time.monotonic()
        while len(data) < 8_000_000:
            # For longer than all deadlines, never for longer than one.
            slow = time.monotonic() - start < 3 * PATIENCE
            piece = connection.recv(most if slow else 1 << 18)
            assert piece
            data += piece
            if slow:
                time.sleep(0.05)
    assert b'"text":"xxx' in data


@pytest.fixture(scope="module")
def crowded(start: Start) -> Server:
    """Room for 100 connections, because the system allows no more files; 256 are kept for other things."""
    limited = ["bash", "-c", f"ulimit -n 356; exec {shlex.join(FAKE)}"]
    return start(command=limited, KEEP_ALIVE="600", BODY_TIMEOUT="600", FAKE_SECONDS="3", LOG_LEVEL="DEBUG")


@pytest.mark.parametrize(
    "opening",
    [b"", b"GET /livez HT", RERANK + b"Content-Length: 10\r\n\r\n{", LIVEZ],
    ids=["idle", "half heads", "half bodies", "kept alive"],
)
def test_a_crowd_of_connections_locks_nobody_out(crowded: Server, opening: bytes) -> None:
    """The connections that the service has waited for the longest are closed; a pending request is not."""
    with ThreadPoolExecutor(1) as pool, contextlib.ExitStack() as crowd:
        working = pool.submit(httpx.post, f"{crowded.client.base_url}/v1/rerank", content=BODY, timeout=MAX_WAIT)
        busy(crowded, 1)
        sockets = []
        for _ in range(300):
            sockets.append(crowd.enter_context(connect(crowded)))
            send(sockets[-1], opening)
        for path in ("/livez", "/health", "/metrics"):
            assert httpx.get(f"{crowded.client.base_url}{path}", timeout=MAX_WAIT).status_code == 200
        assert working.result().status_code == 200
        first, last = listen(sockets[0]), listen(sockets[-1], 0.2)
        assert first.closed
        assert not last.closed
    assert crowded.log.count("more than 100 connections") == 1
    assert len(workers(crowded)) == 1


# Heads


def flood(server: Server, begin: bytes, piece: bytes) -> Answers:
    """Send 64 MB, or less if the service closes meanwhile."""
    with connect(server) as connection:
        send(connection, begin)
        for _ in range((64 << 20) // len(piece)):
            if not send(connection, piece):
                break
        return listen(connection)


@pytest.mark.parametrize(
    ("begin", "piece"),
    [
        (b"GET /", b"a" * 65536),
        (b"GET /livez HTTP/1.1\r\nHost: h\r\nX: ", b"a" * 65536),
        (b"GET /livez HTTP/1.1\r\nHost: h\r\n", b"a" * 65536),
        (b"GET /livez HTTP/1.1\r\nHost: h\r\n", b"a: b\r\n" * 10_000),
        (RERANK + CHUNKED + b"\r\n" + b"%x\r\n%s\r\n0\r\n" % (len(BODY), BODY), b"a: b\r\n" * 10_000),
        (RERANK + CHUNKED + b"\r\n" + b"%x\r\n%s\r\n0\r\nX: " % (len(BODY), BODY), b"a" * 65536),
        (RERANK + CHUNKED + b"\r\n1;", b"a" * 65536),
        (RERANK + CHUNKED + b"\r\n", b"0" * 65536),
    ],
    ids="address header name headers trailers trailer extension chunk-size".split(),
)
def test_a_head_without_end_is_refused(wire: Server, begin: bytes, piece: bytes) -> None:
    before = wire.log.count("headers_too_large") + wire.log.count("malformed_request")
    with Peak(wire) as peak:
        answers = flood(wire, begin, piece)
    assert answers.closed
    if answers.data:  # lost if it takes longer than BODY_TIMEOUT to send all of it
        assert answers.statuses == [431]
        assert answers.error["error_type"] == "headers_too_large"
    assert peak.megabytes < 40
    assert wire.log.count("headers_too_large") + wire.log.count("malformed_request") == before + 1


@pytest.mark.parametrize(
    "head",
    [
        b"GET /%s HTTP/1.1\r\nHost: h\r\n\r\n" % (b"a" * 70_000),
        b"GET /livez?%s HTTP/1.1\r\nHost: h\r\n\r\n" % (b"a" * 40_000),
        b"GET /livez HTTP/1.1\r\nHost: h\r\nX: %s\r\n\r\n" % (b"a" * 40_000),
        b"GET /livez HTTP/1.1\r\nHost: h\r\n%s\r\n" % (b"a: b\r\n" * 8000),
        b"GET /livez HTTP/1.1\r\nHost: h\r\nX: %s\r\n\r\n" % (b"a" * 1_000_000),
    ],
    ids=["address", "query", "header", "headers", "a megabyte"],
)
def test_a_head_that_is_too_large_is_a_431(wire: Server, head: bytes) -> None:
    before = wire.log.count("headers_too_large")
    with connect(wire) as connection:
        send(connection, head)
        answers = listen(connection)
    assert answers.closed
    assert answers.statuses == [431]
    assert answers.error["error_type"] == "headers_too_large"
    wait_until(lambda: wire.log.count("headers_too_large") == before + 1)


def test_as_much_of_a_head_as_allowed_is_accepted_in_any_pieces(wire: Server) -> None:
    small = b"GET /livez HTTP/1.1\r\nHost: h\r\nConnection: close\r\nX: %s\r\n\r\n" % (b"y" * 32_000)
    with connect(wire) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for i in range(0, len(small), 1000):
            send(connection, small[i : i + 1000])
            time.sleep(0.002)
        assert listen(connection).statuses == [200]


# Requests that two parsers could read in two ways

TWO_WAYS = {
    "length and chunks": RERANK + LENGTH + CHUNKED + b"\r\n0\r\n\r\n",
    "chunks and length": RERANK + CHUNKED + LENGTH + b"\r\n0\r\n\r\n",
    "one length twice": RERANK + LENGTH + LENGTH + b"\r\n" + BODY,
    "two lengths": RERANK + LENGTH + b"Content-Length: 0\r\n\r\n" + BODY,
    "a list of lengths": RERANK + b"Content-Length: 3, 3\r\n\r\nabc",
    "a negative length": RERANK + b"Content-Length: -1\r\n\r\n",
    "a signed length": RERANK + b"Content-Length: +3\r\n\r\nabc",
    "a hexadecimal length": RERANK + b"Content-Length: 0x3\r\n\r\nabc",
    "a length with a gap": RERANK + b"Content-Length: 3 0\r\n\r\nabc",
    "an empty length": RERANK + b"Content-Length: \r\n\r\n",
    "a length beyond 64 bits": RERANK + b"Content-Length: 99999999999999999999\r\n\r\n",
    "bare line feeds": (RERANK + LENGTH).replace(b"\r\n", b"\n") + b"\n" + BODY,
    "one bare line feed": RERANK + b"X: y\n" + LENGTH + b"\r\n" + BODY,
    "a bare carriage return": RERANK + b"X: y\r" + LENGTH + b"\r\n" + BODY,
    "a folded header": RERANK + b"X: y\r\n z\r\n" + LENGTH + b"\r\n" + BODY,
    "folded chunks": RERANK + b"Transfer-Encoding:\r\n chunked\r\n\r\n0\r\n\r\n",
    "a blank before the colon": RERANK + b"Content-Length : 2\r\n\r\n{}",
    "chunks before a blank": RERANK + LENGTH + b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n",
    "a blank before the first header": b"POST /v1/rerank HTTP/1.1\r\n Host: h\r\n" + LENGTH + b"\r\n" + BODY,
    "xchunked": RERANK + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    "x, chunked": RERANK + b"Transfer-Encoding: x, chunked\r\n\r\n0\r\n\r\n",
    "chunked, x": RERANK + b"Transfer-Encoding: chunked, x\r\n\r\n0\r\n\r\n",
    "chunked;x": RERANK + b"Transfer-Encoding: chunked;x\r\n\r\n0\r\n\r\n",
    "identity": RERANK + b"Transfer-Encoding: identity\r\n" + LENGTH + b"\r\n" + BODY,
    "chunked twice": RERANK + CHUNKED + CHUNKED + b"\r\n0\r\n\r\n",
    "chunked behind a vertical tab": RERANK + b"Transfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n",
    "chunked before a tab": RERANK + b"Transfer-Encoding: chunked\t\r\n\r\n0\r\n\r\n",
    "chunks in 1.0": (RERANK + CHUNKED).replace(b"1.1", b"1.0") + b"\r\n0\r\n\r\n",
    "a signed chunk": RERANK + CHUNKED + b"\r\n+1\r\nx\r\n0\r\n\r\n",
    "a chunk in 0x": RERANK + CHUNKED + b"\r\n0x1\r\nx\r\n0\r\n\r\n",
    "a chunk beyond 64 bits": RERANK + CHUNKED + b"\r\nfffffffffffffffff\r\nx",
    "a chunk's bare line feed": RERANK + CHUNKED + b"\r\n1\nx\r\n0\r\n\r\n",
    "a line feed in an extension": RERANK + CHUNKED + b"\r\n1;a\nb\r\nx\r\n0\r\n\r\n",
    "a blank behind a chunk's size": RERANK + CHUNKED + b"\r\n1 \r\nx\r\n0\r\n\r\n",
    "a chunk longer than it says": RERANK + CHUNKED + b"\r\n1\r\nxy\r\n0\r\n\r\n",
    "a NUL in a header": RERANK + b"X: \x00\r\n\r\n",
    "a NUL in a name": RERANK + b"X\x00: y\r\n\r\n",
    "a NUL in the address": b"GET /liv\x00ez HTTP/1.1\r\nHost: h\r\n\r\n",
    "a line without a colon": RERANK + b"X\r\n\r\n",
    "a header without a name": RERANK + b": y\r\n\r\n",
    "no Host": b"GET /livez HTTP/1.1\r\n\r\n",
    "two Hosts": b"GET /livez HTTP/1.1\r\nHost: h\r\nHost: i\r\n\r\n",
    "a fragment": b"GET /livez#/health HTTP/1.1\r\nHost: h\r\n\r\n",
    "UTF-8 in the address": "GET /livéz HTTP/1.1\r\nHost: h\r\n\r\n".encode(),
    "no path": b"GET http://h HTTP/1.1\r\nHost: h\r\n\r\n",
    "CONNECT": b"CONNECT h:443 HTTP/1.1\r\nHost: h:443\r\n\r\n",
    "CONNECT to a path": b"CONNECT /livez HTTP/1.1\r\nHost: h\r\n\r\n",
    "version 0.9": b"GET /livez\r\n\r\n",
    "version 1.2": b"GET /livez HTTP/1.2\r\nHost: h\r\n\r\n",
    "version 2.0": b"GET /livez HTTP/2.0\r\nHost: h\r\n\r\n",
    "HTTP/2's preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "a TLS hello": bytes.fromhex("16030100ca010000c60303") + b"x" * 200,
    "an unknown method": b"FOO /livez HTTP/1.1\r\nHost: h\r\n\r\n",
    "a tab for a blank": b"GET\t/livez\tHTTP/1.1\r\nHost: h\r\n\r\n",
    "noise": b"\x00\x01\x02\xff\r\n\r\n",
}


@pytest.mark.parametrize("request_", TWO_WAYS.values(), ids=TWO_WAYS.keys())
def test_what_can_be_read_in_two_ways_is_refused_with_all_behind_it(wire: Server, request_: bytes) -> None:
    answers = exchange(wire, request_ + LIVEZ)
    assert answers.statuses == [400]
    assert answers.error["error_type"] == "malformed_request"
    assert b"connection: close" in answers.data
    assert answers.closed


@pytest.mark.parametrize(
    "request_",
    [
        RERANK + CHUNKED + b"\r\n%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY),
        RERANK + CHUNKED + b"\r\n%x;a=b\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY),
        RERANK + b"transfer-encoding:\tChunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY),
        RERANK + CHUNKED + b"\r\n%x\r\n%s\r\n0\r\nX-Request-Id: of-the-trailer\r\n\r\n" % (len(BODY), BODY),
        RERANK + b"Expect: 100-continue\r\n" + LENGTH + b"\r\n" + BODY,
        b"\r\n" + RERANK + LENGTH + b"\r\n" + BODY,
        RERANK.replace(b" /", b" http://elsewhere/") + LENGTH + b"\r\n" + BODY,
        (RERANK + LENGTH + b"\r\n" + BODY).replace(b"1.1", b"1.0"),
    ],
    ids="chunks extension tabs trailer expect empty-line absolute 1.0".split(),
)
def test_what_is_odd_but_clear_is_answered(wire: Server, request_: bytes) -> None:
    answers = once(wire, request_)
    assert answers.statuses in ([200], [100, 200])
    assert b'[{"index":0,"score":0.5}]' in answers.data
    assert b"of-the-trailer" not in answers.data


def test_a_request_inside_a_body_is_a_body(wire: Server) -> None:
    for path in (b"/livez", b"/nothing", b"/v1/rerank"):
        answers = once(wire, post(LIVEZ, path=path))
        assert len(answers.statuses) == 1


UPGRADE = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA\r\n"
WEBSOCKET = (
    b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
)


@pytest.mark.parametrize("header", [UPGRADE, WEBSOCKET], ids=["h2c, as Java's client sends", "websocket"])
@pytest.mark.parametrize("split", [False, True], ids=["in one piece", "head first"])
def test_an_upgrade_is_not_made_and_hides_no_request(wire: Server, header: bytes, split: bool) -> None:
    """Stock uvicorn loses the body, and reads it as the next request when it arrives separately."""
    request = post(b'{"query":"q","documents":["' + LIVEZ.replace(b"\r\n", b" ") + b'"]}', header)
    smuggling = post(LIVEZ, header)
    with connect(wire) as connection:
        for data, answers in [(request, [200]), (smuggling, [400]), (LIVEZ, [200])]:
            head, _, body = data.partition(b"\r\n\r\n")
            for piece in [head + b"\r\n\r\n", body] if split else [data]:
                send(connection, piece)
                time.sleep(0.2 if split else 0)
            assert listen(connection, answers=1).statuses == answers
    for _ in range(2):
        assert once(wire, b"GET /livez HTTP/1.1\r\nHost: h\r\n" + header + b"\r\n" + LIVEZ).statuses[0] == 200
    assert "WebSocket" not in wire.log  # no advice to install something


# Several requests at once, and odd methods


def test_requests_at_once_are_answered_in_order(wire: Server) -> None:
    mixed = LIVEZ + post(BODY) + LIVEZ.replace(b"/livez", b"/nothing") + post(b"{") + LIVEZ
    answers = exchange(wire, mixed)
    assert answers.statuses == [200, 200, 404, 400, 200]


def test_noise_behind_a_request_takes_nothing_from_it(wire: Server) -> None:
    answers = exchange(wire, post(BODY) + b"NOISE\r\n\r\n" + LIVEZ)
    assert answers.statuses == [200]
    assert answers.closed


def test_thousands_of_requests_at_once_are_too_many(wire: Server) -> None:
    with Peak(wire) as peak:
        answers = exchange(wire, LIVEZ * 100_000)
    assert answers.closed
    assert set(answers.statuses) == {200}
    assert len(answers.statuses) <= MAX_PIPELINED + 1
    assert peak.megabytes < 40


@pytest.mark.parametrize("path", ["/", "/health", "/livez", "/readyz"])
def test_head_answers_as_get_without_the_body(wire: Server, path: str) -> None:
    get, head = wire.client.get(path), wire.client.head(path)
    assert (head.status_code, head.content) == (200, b"")
    for name in ("content-length", "content-type"):
        assert head.headers[name] == get.headers[name]


def test_refusals_are_counted_and_logged(wire: Server) -> None:
    def count(status: int) -> float:
        line = f'reranker_requests_total{{route="other",status="{status}"}} '
        lines = wire.client.get("/metrics").text.splitlines()
        return sum(float(text.removeprefix(line)) for text in lines if text.startswith(line))

    before = count(400), wire.log.count("refused 400 id=")
    exchange(wire, b"NOISE\r\n\r\n")
    assert (count(400), wire.log.count("refused 400 id=")) == (before[0] + 1, before[1] + 1)
    assert 'error_type=malformed_request detail="the request is not valid HTTP"' in wire.log
