"""What counts as work of a server under load."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from benchmarks.servers import closed
from benchmarks.serving import Running

WORK = [{"query": "q", "documents": ["a", "b"]}, {"query": "q", "documents": ["a", "b", "c"]}]
Answer = Callable[[int], tuple[int, Any]]


@pytest.fixture
def peer(request: pytest.FixtureRequest) -> Iterator[str]:
    """Serve the answers of the parameter: number of documents -> status and body."""
    answer: Answer = request.param

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            status, found = answer(len(body["documents"]))
            content = json.dumps(found).encode()
            self.send_response(status)
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: Any) -> None:
            """Write nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/rerank"
    server.shutdown()
    thread.join()
    server.server_close()


def scores(count: int) -> dict[str, Any]:
    return {"results": [{"index": i, "relevance_score": 0.5} for i in range(count)]}


@pytest.mark.parametrize(
    ("peer", "documents", "failure"),
    [
        (lambda n: (200, scores(n)), 5, None),
        (lambda n: (500, {}) if n == 3 else (200, scores(n)), 2, "HTTPStatusError"),
        (lambda n: (200, {"scores": []}) if n == 3 else (200, scores(n)), 2, "KeyError: 'results'"),
        (lambda n: (200, None) if n == 3 else (200, scores(n)), 2, "TypeError"),
        (lambda n: (200, scores(n + 1)) if n == 3 else (200, scores(n)), 2, "IndexError"),
        (lambda n: (200, scores(n - 1)) if n == 3 else (200, scores(n)), 4, "not every document has a score"),
        (lambda n: (503, {}), 0, "HTTPStatusError"),
    ],
    indirect=["peer"],
)
@pytest.mark.parametrize("clients", [1, 3])
def test_only_documents_with_a_score_count(peer: str, documents: int, failure: str | None, clients: int) -> None:
    load = closed(Running("peer", peer), WORK, clients)
    repeats = 1 if clients == 1 else 2
    assert (load.documents, len(load.latencies)) == (documents, 2 * repeats)
    assert load.rate == pytest.approx(documents / load.seconds)
    assert all(failure and found.startswith(failure) for found in load.failures)
    assert bool(load.failures) == bool(failure)
