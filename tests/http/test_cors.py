"""Cross-origin requests: preflights, the headers that let pages read responses, and a real browser."""

from __future__ import annotations

import asyncio
import http.server
import json
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from playwright.sync_api import Browser, Page

from app import create_app
from config import Settings
from reranker.http.state import service_of
from tests.conftest import FAKE, Server, Start
from tests.fake import FakeScorer
from tests.faults.traffic import BODY
from tests.http.test_metrics import once, samples, value

TOKEN = "s3cret-of-the-page"
APP, OTHER = "https://app.example", "https://other.example"
PREFLIGHT = {"Origin": APP, "Access-Control-Request-Method": "POST"}
HEADERS = "authorization,content-type,x-stainless-lang"


@pytest.fixture(scope="module")
def home() -> Iterator[str]:
    """Return the origin of an empty page."""

    class Empty(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Empty) as pages:
        thread = threading.Thread(target=pages.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{pages.server_port}"
        pages.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def guarded(start: Start, home: str) -> Server:
    """A server that requires a token and allows two origins."""
    return start(
        command=FAKE,
        ACCESS_TOKEN=TOKEN,
        token=TOKEN,
        CORS_ALLOW_ORIGINS=f"{APP},{home}",
        MAX_BODY_BYTES="10000",
        MAX_DOCUMENTS="10",
        BODY_TIMEOUT="1",
    )


@pytest.fixture(scope="module")
def loading(start: Start) -> Server:
    """A server that is never ready and allows one origin, not that of the empty page."""
    return start(command=FAKE, wait="loading", FAKE_LOAD_SECONDS="1000", CORS_ALLOW_ORIGINS=APP)


@pytest.fixture(scope="module")
def everybody(start: Start) -> Server:
    return start(command=FAKE, CORS_ALLOW_ORIGINS="*")


def bare(server: Server) -> httpx.Client:
    """Return a client without the token."""
    return httpx.Client(base_url=server.client.base_url, timeout=60, trust_env=False)


@pytest.mark.parametrize("path", ["/v1/rerank", "/rerank", "/health", "/info", "/", "/nothing"])
def test_a_preflight_is_answered_before_the_token_is_asked_for(guarded: Server, path: str) -> None:
    with bare(guarded) as client:
        answer = client.options(path, headers=PREFLIGHT | {"Access-Control-Request-Headers": HEADERS})
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == APP
    assert "POST" in answer.headers["access-control-allow-methods"]
    assert answer.headers["access-control-allow-headers"] == HEADERS
    assert "access-control-allow-credentials" not in answer.headers
    assert "Origin" in answer.headers["vary"]
    assert answer.headers["x-request-id"]


def test_a_page_in_the_internet_may_call_a_private_address(guarded: Server) -> None:
    answer = guarded.client.options(
        "/v1/rerank", headers=PREFLIGHT | {"Access-Control-Request-Private-Network": "true"}
    )
    assert (answer.status_code, answer.headers["access-control-allow-private-network"]) == (200, "true")


@pytest.mark.parametrize(
    ("header", "value"),
    [
        ("Origin", OTHER),
        ("Origin", APP + ".evil.example"),
        ("Origin", "http://app.example"),
        ("Origin", "null"),
        ("Access-Control-Request-Method", "DELETE"),
    ],
)
def test_other_preflights_are_refused(guarded: Server, header: str, value: str) -> None:
    answer = guarded.client.options("/v1/rerank", headers=PREFLIGHT | {header: value})
    assert (answer.status_code, answer.json()["error_type"]) == (400, "cors_refused")
    assert set(answer.json()) == {"detail", "error_type", "message", "error"}
    assert ("CORS_ALLOW_ORIGINS" in answer.json()["detail"]) == (header == "Origin")
    assert value not in answer.text
    assert answer.headers["content-type"] == "application/json"
    assert "Origin" in answer.headers["vary"]
    if header == "Origin":
        assert "access-control-allow-origin" not in answer.headers
        answer = guarded.client.post("/v1/rerank", json=BODY, headers={"Origin": value})
        assert answer.status_code == 200
        assert "access-control-allow-origin" not in answer.headers


def test_an_options_request_that_is_no_preflight_needs_the_token(guarded: Server) -> None:
    with bare(guarded) as client:
        assert client.options("/v1/rerank", headers={"Origin": APP}).status_code == 401
        assert client.options("/v1/rerank").status_code == 401


def test_every_response_can_be_read_errors_too(guarded: Server) -> None:
    post, json_type = guarded.client.post, {"Content-Type": "application/json"}
    origin = {"Origin": APP}

    def drip() -> Iterator[bytes]:
        yield b"{"
        threading.Event().wait(3)
        yield b"}"

    with bare(guarded) as client:
        answers = [
            post("/v1/rerank", json=BODY, headers=origin),
            post("/v1/rerank", content=b"{", headers=origin | json_type),
            client.post("/v1/rerank", json=BODY, headers=origin),
            post("/nothing", json=BODY, headers=origin),
            guarded.client.get("/v1/rerank", headers=origin),
            post("/v1/rerank", content=drip(), headers=origin | json_type),
            post("/v1/rerank", content=b" " * 10_001, headers=origin | json_type),
            post("/v1/rerank", content=b"{}", headers=origin | {"Content-Type": "text/plain"}),
            post("/v1/rerank", json={"query": "q", "documents": ["a"] * 11}, headers=origin),
            guarded.client.get("/livez", headers=origin | {"x-long": "a" * 40_000}),
            post("/v1/rerank", json={"query": "q", "documents": ["nan"]}, headers=origin),
        ]
    assert [answer.status_code for answer in answers] == [200, 400, 401, 404, 405, 408, 413, 415, 422, 431, 500]
    for answer in answers:
        assert answer.headers["access-control-allow-origin"] == APP, answer.status_code
        assert answer.headers["access-control-expose-headers"] == "*", answer.status_code
        assert answer.headers["vary"] == "Origin"
        assert answer.headers["x-request-id"]


def test_a_service_that_loads_can_be_read(loading: Server) -> None:
    answer = loading.client.post("/v1/rerank", json=BODY, headers={"Origin": APP})
    assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (503, APP)
    assert answer.headers["retry-after"]


def test_a_busy_service_and_an_unexpected_error_can_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    app = create_app(Settings(cors_allow_origins=APP, max_queue_tokens=1), FakeScorer)

    async def asked() -> list[httpx.Response]:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://h") as client,
        ):
            batcher = service_of(app).batcher
            await batcher.wait_until_loaded()
            batcher.admission.max_requests = 0
            busy = await client.post("/v1/rerank", json=BODY, headers={"Origin": APP})
            monkeypatch.setattr(batcher, "check_capacity", lambda seconds: 1 / 0)
            return [busy, await client.post("/v1/rerank", json=BODY, headers={"Origin": APP})]

    busy, unexpected = asyncio.run(asked())
    assert (busy.status_code, unexpected.status_code) == (429, 500)
    assert busy.headers["retry-after"]
    for answer in (busy, unexpected):
        assert answer.headers["access-control-allow-origin"] == APP
        assert answer.headers["x-request-id"]
        assert set(answer.json()) >= {"detail", "error_type"}


@pytest.mark.parametrize("origin", [APP, OTHER, "null", "chrome-extension://abc"])
def test_a_star_allows_all(everybody: Server, origin: str) -> None:
    preflight = everybody.client.options("/v1/rerank", headers=PREFLIGHT | {"Origin": origin})
    answer = everybody.client.post("/v1/rerank", json=BODY, headers={"Origin": origin})
    assert (preflight.status_code, answer.status_code) == (200, 200)
    for response in (preflight, answer):
        assert response.headers["access-control-allow-origin"] == "*"


@pytest.mark.parametrize(("token", "status"), [("", 405), (TOKEN, 401)])
def test_by_default_nothing_is_allowed(start: Start, fake_server: Server, token: str, status: int) -> None:
    server = start(command=FAKE, ACCESS_TOKEN=token, token=token) if token else fake_server
    with bare(server) as client:
        answers = [
            client.options("/v1/rerank", headers=PREFLIGHT),
            server.client.post("/v1/rerank", json=BODY, headers={"Origin": APP}),
        ]
    assert [answer.status_code for answer in answers] == [status, 200]
    for answer in answers:
        assert not [name for name in answer.headers if name.startswith("access-control") or name == "vary"]


@pytest.mark.parametrize("path", ["/v1/rerank", "/rerank", "/v2/rerank"])
@pytest.mark.parametrize("origin", [APP, OTHER, "null"])
def test_a_page_s_request_without_a_content_type_is_refused(guarded: Server, path: str, origin: str) -> None:
    """A browser sends such a request without a preflight."""
    content = json.dumps(BODY).encode()
    answer = guarded.client.post(path, content=content, headers={"Origin": origin})
    assert (answer.status_code, answer.json()["error_type"]) == (415, "unsupported_media_type")
    assert "send the header 'Content-Type: application/json'" in answer.json()["detail"]
    for headers in ({}, {"Origin": origin, "Content-Type": "application/json"}):
        assert guarded.client.post(path, content=content, headers=headers).status_code == 200


# In a browser

FETCH = """
async ([url, body, headers]) => {
  try {
    const response = await fetch(url, {method: "POST", body, headers});
    const seen = Object.fromEntries(response.headers);
    return {status: response.status, headers: seen, body: await response.json()};
  } catch (error) {
    return {failed: error.name};
  }
}
"""


@pytest.fixture
def page(browser: Browser, home: str) -> Iterator[Page]:
    """An empty page whose origin is not that of the services."""
    page = browser.new_page()
    page.goto(home)
    yield page
    page.close()


def fetch(page: Page, server: Server, body: object = BODY, **headers: str) -> dict[str, Any]:
    """Return the response as a script on the page reads it."""
    names = {"Content-Type": "application/json"} | {name.replace("_", "-"): text for name, text in headers.items()}
    url = f"http://127.0.0.1:{server.port}/v1/rerank"
    seen: dict[str, Any] = page.evaluate(FETCH, [url, json.dumps(body), names])
    return seen


def test_a_script_gets_its_ranking_and_reads_the_headers(guarded: Server, page: Page) -> None:
    seen = fetch(page, guarded, Authorization=f"Bearer {TOKEN}", x_request_id="of-the-page")
    assert seen["status"] == 200
    assert [row["index"] for row in seen["body"]] == [0, 2, 1]
    assert seen["headers"]["x-request-id"] == "of-the-page"
    sent = guarded.client.post("/v1/rerank", json=BODY).headers
    assert {name for name in sent if name.startswith("x-")} <= set(seen["headers"])


def test_a_script_reads_errors(guarded: Server, page: Page) -> None:
    seen = fetch(page, guarded, Authorization="Bearer wrong")
    assert (seen["status"], seen["body"]["error_type"]) == (401, "unauthorized")
    assert seen["headers"]["www-authenticate"] == "Bearer"
    seen = fetch(page, guarded, {"query": "q", "documents": ["x" * 10_000]}, Authorization=f"Bearer {TOKEN}")
    assert (seen["status"], seen["body"]["error_type"]) == (413, "body_too_large")
    seen = fetch(page, guarded, {"query": "q"}, Authorization=f"Bearer {TOKEN}")
    assert (seen["status"], seen["body"]["error_type"]) == (422, "invalid_request")


def test_a_script_of_another_origin_gets_nothing(
    fake_server: Server, loading: Server, everybody: Server, page: Page
) -> None:
    assert fetch(page, fake_server) == {"failed": "TypeError"}
    assert fetch(page, loading) == {"failed": "TypeError"}
    assert fetch(page, everybody)["status"] == 200


SEND = """
async ([url, body, type]) => {
  const blob = new Blob([body], type ? {type} : {});
  try {
    await fetch(url, {method: "POST", mode: "no-cors", body: blob});
  } catch (error) {}
}
"""


def test_a_script_of_another_origin_makes_the_service_compute_nothing(fake_server: Server, page: Page) -> None:
    """Without a token only the content type protects the model from such a page."""
    url = f"http://127.0.0.1:{fake_server.port}/v1/rerank"
    labels = {"name": "reranker_requests_total", "route": "/v1/rerank"}
    before = samples(fake_server)
    refusals = value(before, **labels, status="415")
    for kind in ("", "text/plain", "application/json"):
        page.evaluate(SEND, [url, json.dumps(BODY), kind])
    after = once(fake_server, lambda now: value(now, **labels, status="415") == refusals + 3)
    assert value(after, **labels, status="200") == value(before, **labels, status="200")
    assert value(after, "reranker_batch_documents_sum") == value(before, "reranker_batch_documents_sum")
