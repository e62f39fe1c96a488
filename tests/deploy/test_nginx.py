"""deploy/nginx/reranker.conf in the real nginx, where it is installed: requests pass, tokens stay out of its logs."""

from __future__ import annotations

import os
import re
import shutil
import socket
import ssl
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from tests.conftest import FAKE, MAX_WAIT, ROOT, Server, Start, free_port
from tests.faults.traffic import until
from tests.http.test_metrics import samples, value

NGINX = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
TOKEN = "s3cr3t-of-the-proxy"
BODY = {"query": "q", "documents": ["a"]}
# The surroundings of our file in a package's own nginx.conf, with paths that need no rights.
AROUND = """
daemon off;
{user}
pid {folder}/pid;
error_log {folder}/main.log info;
events {{}}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    include {folder}/reranker.conf;
}}
"""


@dataclass
class Proxy:
    folder: Path
    port: int
    client: httpx.Client
    service: Server

    def connect(self) -> ssl.SSLSocket:
        trust = ssl.create_default_context(cafile=str(self.folder / "reranker.pem"))
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=MAX_WAIT)
        return trust.wrap_socket(connection, server_hostname="127.0.0.1")

    @property
    def logs(self) -> str:
        return "".join(path.read_text() for path in self.folder.glob("*.log"))


def configure(folder: Path, port: int, *services: int) -> list[str]:
    """The file with the operator's own lines filled in, and the command that runs it."""
    assert NGINX is not None
    text = (ROOT / "deploy" / "nginx" / "reranker.conf").read_text()
    for yours, here in [
        ("server 127.0.0.1:6006;", "".join(f"server 127.0.0.1:{service};" for service in services)),
        ("listen 443 ssl", f"listen 127.0.0.1:{port} ssl"),
        ("/etc/nginx/", f"{folder}/"),
        ("/var/log/nginx/", f"{folder}/"),
    ]:
        assert yours in text
        text = text.replace(yours, here)
    (folder / "reranker.conf").write_text(text)
    user = "user root;" if os.geteuid() == 0 else ""
    (folder / "nginx.conf").write_text(AROUND.format(folder=folder, user=user))
    command = (
        "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -addext subjectAltName=IP:127.0.0.1"
    )
    files = ["-keyout", str(folder / "reranker.key"), "-out", str(folder / "reranker.pem")]
    subprocess.run([*command.split(), *files], check=True, capture_output=True)
    return [NGINX, "-p", str(folder), "-c", str(folder / "nginx.conf"), "-e", str(folder / "main.log")]


@contextmanager
def running(folder: Path, *services: Server) -> Iterator[Proxy]:
    """nginx in front of these."""
    if NGINX is None or shutil.which("openssl") is None:
        pytest.skip("no nginx or no openssl here (Debian: packages nginx-light, openssl)")
    port = free_port()
    command = configure(folder, port, *(service.port for service in services))
    checked = subprocess.run([*command, "-t"], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr + (folder / "main.log").read_text()
    assert "warn" not in checked.stderr
    process = subprocess.Popen(command)
    trust = ssl.create_default_context(cafile=str(folder / "reranker.pem"))
    try:
        with httpx.Client(
            base_url=f"https://127.0.0.1:{port}", verify=trust, trust_env=False, timeout=MAX_WAIT
        ) as client:
            deadline = time.monotonic() + MAX_WAIT
            while True:
                try:
                    client.get("/livez")
                    break
                except httpx.TransportError:
                    assert process.poll() is None, (folder / "main.log").read_text()
                    assert time.monotonic() < deadline
                    time.sleep(0.05)
            yield Proxy(folder, port, client, services[0])
    finally:
        process.terminate()
        process.wait(MAX_WAIT)


@pytest.fixture(scope="module")
def proxy(start: Start, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    service = start(command=FAKE, token=TOKEN, ACCESS_TOKEN=TOKEN)
    with running(tmp_path_factory.mktemp("nginx"), service) as proxy:
        yield proxy


BEARER = {"Authorization": f"Bearer {TOKEN}"}
QUERY = {"access_token": TOKEN}


def test_requests_pass_with_a_token_of_either_kind(proxy: Proxy) -> None:
    by_header = proxy.client.post("/v1/rerank", json=BODY, headers={**BEARER, "X-Request-Id": "through-1"})
    by_query = proxy.client.post("/v1/rerank", json=BODY, params=QUERY)
    assert by_header.json() == by_query.json() == [{"index": 0, "score": 0.5}]
    assert by_header.headers["x-request-id"] == "through-1"
    assert by_header.headers["strict-transport-security"]
    assert len(by_query.headers["x-request-id"]) == 32  # nginx's own
    assert "id=through-1" in proxy.service.log
    assert proxy.client.post("/v1/rerank", json=BODY).status_code == 401


def test_of_two_hosts_the_one_with_fewer_requests_in_progress_is_asked(start: Start, tmp_path: Path) -> None:
    slow, quick = start(command=FAKE, FAKE_SECONDS="5"), start(command=FAKE)

    def rankings(server: Server) -> int:
        return server.log.count("POST /v1/rerank 200")

    with running(tmp_path, slow, quick) as proxy, ThreadPoolExecutor(1) as pool:
        answers = []
        while not value(samples(slow), "reranker_requests_in_progress") > 1:  # 1: the metrics
            answers.append(pool.submit(proxy.client.post, "/v1/rerank", json=BODY))
            until(
                lambda: answers[-1].done() or value(samples(slow), "reranker_requests_in_progress") > 1, "it is there"
            )
        before = rankings(quick)
        assert [proxy.client.post("/v1/rerank", json=BODY).status_code for _ in range(6)] == [200] * 6
        until(lambda: rankings(quick) == before + 6, "the quick one answered them")
        assert [answer.result().status_code for answer in answers] == [200] * len(answers)
        until(lambda: rankings(slow) == 1, "it had that one only")


def connections(port: int) -> int:
    """Ends of connections to a port of this machine, those included that were closed within the last minute."""
    with open("/proc/net/tcp") as file:
        return sum(f":{port:04X}" in line for line in file)


def test_connections_to_the_service_are_kept(proxy: Proxy) -> None:
    assert proxy.client.get("/livez").status_code == 200
    before = connections(proxy.service.port)
    for _ in range(20):
        assert proxy.client.get("/livez").status_code == 200
    assert connections(proxy.service.port) < before + 10


def test_refusals_have_the_services_shape(proxy: Proxy) -> None:
    large = proxy.client.post("/v1/rerank", content=b"x" * (17 << 20), params=QUERY)
    head = proxy.client.get("/health", headers={"X": "x" * 40_000}, params=QUERY)
    url = f"https://127.0.0.1:{proxy.port}"
    hidden = [proxy.client.get(url + path, params=QUERY) for path in ("/metrics", "/%6detrics", "//metrics")]
    assert [answer.status_code for answer in (large, head, *hidden)] == [413, 400, 404, 404, 404]
    kinds = [answer.json()["error_type"] for answer in (large, head, *hidden)]
    assert kinds == ["body_too_large", "headers_too_large", "not_found", "not_found", "not_found"]
    for answer in (large, head, *hidden):
        assert re.fullmatch(r"[0-9a-f]{32}", answer.headers["x-request-id"])
        assert answer.headers["strict-transport-security"] == "max-age=31536000"
    until(lambda: f"id={large.headers['x-request-id']}" in proxy.logs, "nginx has written its log")


def test_no_plain_http_and_no_second_request_in_the_first(proxy: Proxy) -> None:
    with socket.create_connection(("127.0.0.1", proxy.port), timeout=MAX_WAIT) as plain:
        plain.sendall(b"GET /livez HTTP/1.1\r\nHost: h\r\n\r\n")
        assert plain.recv(100).startswith(b"HTTP/1.1 400")
    smuggling = (
        b"POST /livez HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /x"
    )
    with proxy.connect() as connection:
        connection.sendall(smuggling)
        answer = connection.recv(65536)
        assert answer.startswith(b"HTTP/1.1 400")
        assert answer.count(b"HTTP/1.1 ") == 1


def test_too_many_and_down_say_when_to_come_back_and_no_log_holds_a_token(proxy: Proxy) -> None:
    with ThreadPoolExecutor(30) as pool:
        answers: list[httpx.Response] = []
        while not any(answer.status_code == 429 for answer in answers):  # a busy machine may send too few at first
            assert len(answers) < 3000
            answers += pool.map(lambda _: proxy.client.get("/health", params=QUERY), range(150))
    refused = [answer for answer in answers if answer.status_code == 429]
    assert {answer.status_code for answer in answers} == {200, 429}
    assert {(a.json()["error_type"], a.headers["retry-after"]) for a in refused} == {("queue_full", "1")}
    proxy.service.stop()
    time.sleep(2)
    down = proxy.client.post("/v1/rerank", json=BODY, params=QUERY)
    assert (down.status_code, down.json()["error_type"]) == (503, "not_ready")
    assert down.headers["retry-after"] == "5"
    for answer in (*refused, down):
        assert answer.headers["strict-transport-security"] == "max-age=31536000"
        assert re.fullmatch(r"[0-9a-f]{32}", answer.headers["x-request-id"])
    for path in ("/health", "/health%0A", "/a%22b"):
        proxy.client.get(f"{path}&access_token={TOKEN}/more")
    proxy.client.get("/nothing", params=QUERY, headers={**BEARER, "Referer": f"https://h/docs?access_token={TOKEN}"})
    with proxy.connect() as bad:
        bad.sendall(f"GET /?access_token={TOKEN} HTTP/9.9\r\n\r\n".encode())
        bad.recv(100)
    lines = (" GET /health 429 ", " POST /v1/rerank 503 ", " GET /health&access_token=*** ")
    until(lambda: all(line in proxy.logs for line in lines), "nginx has written its logs")
    assert TOKEN not in proxy.logs
    assert TOKEN not in proxy.service.log
