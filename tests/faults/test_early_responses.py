"""Responses sent before the request was complete reach stock clients, which send all of it before they read."""

from __future__ import annotations

import concurrent.futures
import http.client
import json
import os
import shutil
import signal
import subprocess
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator

import httpx
import pytest
import requests

from tests.conftest import FAKE, MAX_WAIT, Server, Start
from tests.faults.raw import busy, connect, listen, send, workers
from tests.faults.traffic import until

TOKEN = "s3cret"
MAX_BODY_BYTES = 30_000_000
FITS, TOO_LARGE = b"x" * 24_000_000, b"x" * 40_000_000
TIMES = 4

Headers = dict[str, str]
Client = Callable[[Server, str, bytes, Headers], tuple[int, bytes]]
"""Posts a body with headers to a path; returns status and body of the response."""


def pieces(body: bytes) -> Iterator[bytes]:
    """Chunks as a generator gives them, so that the client cannot know the length."""
    for start in range(0, len(body), 1 << 16):
        yield body[start : start + (1 << 16)]


def by_urllib(server: Server, path: str, body: bytes, headers: Headers) -> tuple[int, bytes]:
    """Python's own, which always sends `Connection: close`."""
    request = urllib.request.Request(f"{server.client.base_url}{path}", body, headers)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=MAX_WAIT) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()


def by_http_client(server: Server, path: str, body: bytes | Iterator[bytes], headers: Headers) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=MAX_WAIT)
    try:
        connection.request("POST", path, body, {"Connection": "close", **headers})
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def by_http_client_in_chunks(server: Server, path: str, body: bytes, headers: Headers) -> tuple[int, bytes]:
    return by_http_client(server, path, pieces(body), headers)


def by_requests(server: Server, path: str, body: bytes, headers: Headers) -> tuple[int, bytes]:
    """Keeps its connection."""
    with requests.Session() as session:
        session.trust_env = False
        answer = session.post(f"{server.client.base_url}{path}", body, headers=headers, timeout=MAX_WAIT)
        return answer.status_code, answer.content


def by_requests_in_chunks(server: Server, path: str, body: bytes, headers: Headers) -> tuple[int, bytes]:
    with requests.Session() as session:
        session.trust_env = False
        headers = {"Connection": "close", **headers}
        answer = session.post(f"{server.client.base_url}{path}", pieces(body), headers=headers, timeout=MAX_WAIT)
        return answer.status_code, answer.content


def by_httpx(server: Server, path: str, body: bytes, headers: Headers) -> tuple[int, bytes]:
    headers = {"Connection": "close", **headers}
    answer = httpx.post(
        f"{server.client.base_url}{path}", content=body, headers=headers, timeout=MAX_WAIT, trust_env=False
    )
    return answer.status_code, answer.content


def by_curl(*options: str) -> Client:
    """The body comes from a pipe; the status is written behind the response."""

    def ask(server: Server, path: str, body: bytes, headers: Headers) -> tuple[int, bytes]:
        if shutil.which("curl") is None:
            pytest.skip("curl is not installed")
        command = ["curl", "-sS", "--noproxy", "*", "-w", "%{http_code}", "--data-binary", "@-", *options]
        with tempfile.NamedTemporaryFile("w") as file:  # an argument may not be as long as a header
            file.writelines(f"{name}: {text}\n" for name, text in headers.items())
            file.flush()
            command += ["-H", f"@{file.name}", f"{server.client.base_url}{path}"]
            ran = subprocess.run(command, input=body, capture_output=True, timeout=MAX_WAIT, check=False)
        assert ran.returncode == 0, ran.stderr
        return int(ran.stdout[-3:]), ran.stdout[:-3]

    return ask


CLIENTS: dict[str, Client] = {
    "urllib": by_urllib,
    "http.client": by_http_client,
    "http.client, chunked": by_http_client_in_chunks,
    "requests, kept": by_requests,
    "requests, chunked": by_requests_in_chunks,
    "httpx": by_httpx,
    "curl": by_curl("-H", "Connection: close"),
    "curl, no Expect": by_curl("-H", "Connection: close", "-H", "Expect:"),
    "curl, chunked": by_curl("-H", "Connection: close", "-H", "Expect:", "-H", "Transfer-Encoding: chunked"),
    "curl, 1.0": by_curl("--http1.0", "-H", "Expect:"),
    "curl, kept": by_curl("-H", "Expect:"),
}
every_client = pytest.mark.parametrize("client", CLIENTS.values(), ids=CLIENTS)
JSON = {"Content-Type": "application/json"}
ENTITLED = {"Authorization": f"Bearer {TOKEN}", **JSON}


@pytest.fixture(scope="module")
def guarded(start: Start) -> Server:
    return start(command=FAKE, ACCESS_TOKEN=TOKEN, token=TOKEN, MAX_BODY_BYTES=str(MAX_BODY_BYTES))


@every_client
@pytest.mark.parametrize(
    ("path", "body", "headers", "status", "kind"),
    [
        ("/v1/rerank", TOO_LARGE, ENTITLED, 413, "body_too_large"),
        ("/v1/rerank", FITS, JSON, 401, "unauthorized"),
        ("/v1/rerank", FITS, ENTITLED | {"Content-Type": "text/plain"}, 415, "unsupported_media_type"),
        ("/v1/rerank", FITS, ENTITLED | {"x-long": "a" * 40_000}, 431, "headers_too_large"),
        ("/v1/rerank", FITS, ENTITLED | {"x-long": "a" * 600_000}, 431, "headers_too_large"),
        ("/nothing", FITS, ENTITLED, 404, "not_found"),
        ("/health", FITS, ENTITLED, 405, "method_not_allowed"),
    ],
    ids=["413", "401", "415", "431", "431 of an endless head", "404", "405"],
)
def test_an_early_refusal_arrives(
    guarded: Server, client: Client, path: str, body: bytes, headers: Headers, status: int, kind: str
) -> None:
    for _ in range(TIMES):
        told, text = client(guarded, path, body, headers)
        assert (told, json.loads(text)["error_type"]) == (status, kind)


def test_a_400_for_a_head_that_can_be_read_in_two_ways_arrives(guarded: Server) -> None:
    for _ in range(TIMES):
        told, text = by_http_client(guarded, "/v1/rerank", FITS, ENTITLED | {"Transfer-Encoding": "gzip"})
        assert (told, json.loads(text)["error_type"]) == (400, "malformed_request")


def test_a_400_for_a_wrong_chunk_arrives(guarded: Server) -> None:
    head = b"POST /v1/rerank HTTP/1.1\r\nHost: h\r\nAuthorization: Bearer %s\r\n" % TOKEN.encode()
    for _ in range(TIMES):
        with connect(guarded) as connection:
            assert send(connection, head + b"Transfer-Encoding: chunked\r\n\r\nno length\r\n" + FITS)
            answers = listen(connection)
        assert (answers.statuses, answers.error["error_type"]) == ([400], "malformed_request")


@every_client
def test_a_503_arrives(loading: Server, client: Client) -> None:
    for _ in range(TIMES):
        told, text = client(loading, "/v1/rerank", b"x" * 15_000_000, JSON)
        assert (told, json.loads(text)["error_type"]) == (503, "not_ready")


@pytest.fixture(scope="module")
def loading(start: Start) -> Server:
    return start(command=FAKE, wait="loading", FAKE_LOAD_SECONDS="1000")


@every_client
def test_a_429_arrives(full: Server, client: Client) -> None:
    for _ in range(TIMES):
        told, text = client(full, "/v1/rerank", b"x" * 15_000_000, JSON)
        assert (told, json.loads(text)["error_type"]) == (429, "queue_full")


@pytest.fixture(scope="module")
def full(start: Start) -> Iterator[Server]:
    """One request is in progress until its worker is killed, and no more are allowed."""
    server = start(command=FAKE, WORKER_CONNECTIONS="1", REQUEST_TIMEOUT="600")

    def hang() -> None:
        with pytest.raises(httpx.TransportError):
            server.client.post("/v1/rerank", json={"query": "q", "documents": ["hang"]}, timeout=None)

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        hanging = pool.submit(hang)
        busy(server, 1)
        yield server
        server.stop(signal.SIGKILL)
        os.kill(workers(server)[0], signal.SIGKILL)
        hanging.result()


def test_a_408_arrives(start: Start) -> None:
    """A client that is late sends the rest when its time is up already."""
    server = start(command=FAKE, BODY_TIMEOUT="5")
    parts = [FITS[: 1 << 20], FITS]

    def late() -> Iterator[bytes]:
        yield parts[0]
        until(lambda: " 408 " in server.log, "the time is up")
        yield from pieces(parts[1])

    told, text = by_http_client(server, "/v1/rerank", late(), JSON)
    assert (told, json.loads(text)["error_type"]) == (408, "body_timeout")


def test_a_request_behind_an_early_last_response_is_not_answered(guarded: Server) -> None:
    head = b"POST /nothing HTTP/1.1\r\nHost: h\r\nConnection: close\r\nAuthorization: Bearer %s\r\n" % TOKEN.encode()
    with connect(guarded) as connection:
        send(connection, head + b"Content-Length: 10\r\n\r\n12345")
        assert listen(connection, answers=1).statuses == [404]
        send(connection, b"67890GET /livez HTTP/1.1\r\nHost: h\r\n\r\n")
        answers = listen(connection)
    assert (answers.data, answers.closed) == (b"", True)
    assert "GET /livez 200" not in guarded.log
