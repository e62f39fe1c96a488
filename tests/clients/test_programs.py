"""The HTTP clients of the JDK and of Go: short programs that print every response, checked here."""

from __future__ import annotations

import json
import shutil
import socket
import socketserver
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from conftest import BEST, DOCUMENTS, QUERY, TOKEN

HERE = Path(__file__).parent
PROGRAMS = {
    "javac": ("default-jdk-headless", ["java", str(HERE / "java" / "Rerank.java")]),
    "go": ("golang-go", ["go", "run", str(HERE / "go" / "rerank.go")]),
}
"""By the compiler that they need: its Debian package, and the command."""


class Relay(socketserver.ThreadingTCPServer):
    """A port that passes every connection on to the service, and counts them."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, port: int) -> None:
        super().__init__(("127.0.0.1", 0), Pipe)
        self.to, self.connections = port, 0

    def process_request(self, request: Any, client_address: Any) -> None:
        """Count the connection; called in one thread."""
        self.connections += 1
        super().process_request(request, client_address)


class Pipe(socketserver.BaseRequestHandler):
    """One connection: bytes in both directions until either side closes."""

    server: Relay

    def handle(self) -> None:
        """Copy the responses in this thread and the requests in another one."""
        with socket.create_connection(("127.0.0.1", self.server.to)) as service:
            threading.Thread(target=self._copy, args=(self.request, service), daemon=True).start()
            self._copy(service, self.request)

    def _copy(self, source: socket.socket, target: socket.socket) -> None:
        try:
            while data := source.recv(1 << 16):
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)
        except OSError:  # the other side is gone
            pass


@pytest.fixture
def relay(url: str) -> Iterator[Relay]:
    with Relay(int(url.rpartition(":")[2])) as relay:
        threading.Thread(target=relay.serve_forever, daemon=True).start()
        yield relay
        relay.shutdown()


@pytest.mark.parametrize("compiler", PROGRAMS)
def test_a_program(relay: Relay, compiler: str, tmp_path: Path) -> None:
    package, command = PROGRAMS[compiler]
    if shutil.which(compiler) is None:
        pytest.skip(f"no {compiler} here (Debian: package {package})")
    body = json.dumps({"query": QUERY, "documents": DOCUMENTS})
    url = f"http://127.0.0.1:{relay.server_address[1]}"
    command = [*command, url, TOKEN, body]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert ran.returncode == 0, ran.stderr
    responses = [line.partition(" ")[::2] for line in ran.stdout.splitlines()]
    ranking, no_documents, wrong_token, *at_once = [(int(status), json.loads(text)) for status, text in responses]
    assert len(at_once) == 4 * 64
    for status, results in (ranking, *at_once):
        assert (status, results[0]["index"], len(results)) == (200, BEST, len(DOCUMENTS))
        assert results[0]["score"] > 0.5 > results[1]["score"]
    assert (no_documents[0], no_documents[1]["error_type"]) == (422, "invalid_request")
    assert "documents" in no_documents[1]["detail"]
    assert (wrong_token[0], wrong_token[1]["error_type"]) == (401, "unauthorized")
    assert wrong_token[1]["detail"].startswith("the token is wrong; send the header 'Authorization: Bearer <token>'")
    # Kept connections serve all 259 requests; a few more open while the others still receive the end of a response.
    assert relay.connections < 2 * 64
