from __future__ import annotations

import asyncio
import hmac
from typing import Any
from urllib.parse import quote, unquote

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry import trace
from starlette.types import Receive, Scope, Send

from app import create_app
from config import Settings
from reranker.http.auth import TokenAuth, redact
from reranker.http.callers import entries
from reranker.http.state import RequestContext, context_of
from tests.fake import FakeScorer

TOKENS = "old-token,new-token"
CRAWLER = "0123456789abcdef=="
NAMED = f"crawler={CRAWLER},crawler=rotated-to-this-one,search-2=fedcba9876543210,unnamed=a=b,plain=="
seen: dict[str, Any] = {}


async def behind(scope: Scope, receive: Receive, send: Send) -> None:
    """An application that records the parts of a request that pass the token check."""
    seen.clear()
    seen.update(query=scope["query_string"], headers=dict(scope["headers"]))
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"in"})


def get(
    path: str = "/health",
    headers: list[tuple[bytes, bytes]] | None = None,
    tokens: str = TOKENS,
    method: str = "GET",
) -> httpx.Response:
    """Send a request through the check; `seen["caller"]` is what the access log would read."""
    auth = TokenAuth(behind, entries(tokens))

    async def logged(scope: Scope, receive: Receive, send: Send) -> None:
        scope.setdefault("state", {})["context"] = RequestContext("id")
        await auth(scope, receive, send)
        seen["caller"] = context_of(scope).caller

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(logged)
        async with httpx.AsyncClient(transport=transport, base_url="http://h") as client:
            return await client.request(method, path, headers=headers or [])

    return asyncio.run(ask())


def bearer(token: bytes, scheme: bytes = b"Bearer") -> tuple[bytes, bytes]:
    return (b"Authorization", scheme + b" " + token)


@pytest.mark.parametrize(
    ("path", "headers"),
    [
        ("/health", [bearer(b"old-token")]),
        ("/health", [bearer(b"new-token")]),
        ("/health", [bearer(b"new-token", b"bearer")]),
        ("/health", [bearer(b"new-token", b"BEARER")]),
        ("/health", [bearer(b"  new-token ")]),
        ("/health?access_token=new-token", []),
        ("/health?x=1&access_token=old-token", []),
        ("/health?access%5Ftoken=new%2Dtoken", []),
    ],
)
def test_the_entitled_enter(path: str, headers: list[tuple[bytes, bytes]]) -> None:
    response = get(path, headers)
    assert response.status_code == 200
    assert b"token" not in seen["query"].replace(b"access_token=***", b"")
    assert b"authorization" not in seen["headers"]


@pytest.mark.parametrize(
    ("path", "headers"),
    [
        ("/health", []),
        ("/health", [bearer(b"wrong")]),
        ("/health", [bearer(b"")]),
        ("/health", [(b"Authorization", b"Bearer")]),
        ("/health", [(b"Authorization", b"new-token")]),
        ("/health", [bearer(b"new-token", b"Basic")]),
        ("/health", [bearer(b"new-token", b"Token")]),
        ("/health", [bearer(b"old-token,new-token")]),
        ("/health", [bearer(b"new-token extra")]),
        ("/health", [bearer(b"NEW-TOKEN")]),
        ("/health", [bearer("schlüssel".encode())]),
        ("/health", [bearer("schlüssel".encode("latin-1"))]),
        ("/health", [bearer(b"\xff\xfe")]),
        ("/health", [bearer(b"new-token"), bearer(b"new-token")]),
        ("/health", [bearer(b"new-token"), bearer(b"wrong")]),
        ("/health?access_token=wrong", []),
        ("/health?access_token=", []),
        ("/health?access_token", []),
        ("/health?access_token=%E5%AF%86%FF", []),
        ("/health?access_token=new-token&access_token=new-token", []),
        ("/health?access_token=wrong&access_token=new-token", []),
        ("/health?access_token=new-token", [bearer(b"wrong")]),
        ("/health?access_token=new-token", [bearer(b"new-token")]),
        ("/health?ACCESS_TOKEN=new-token", []),
        ("/health?token=new-token", []),
        ("/health", [(b"X-Api-Key", b"new-token")]),
        ("/health", [(b"Cookie", b"access_token=new-token")]),
        ("/livez/", []),
        ("/livez/x", []),
        ("http://h//livez", []),
        ("/LIVEZ", []),
        ("/health%3f/livez", []),
        ("/v1/rerank", []),
        ("/docs", []),
        ("/openapi.json", []),
        ("/metrics", []),
        ("/nothing", []),
        ("/health", [(b"Host", b"a/livez?x=")]),
        ("/health", [(b"X-Original-URL", b"/livez")]),
        ("/health", [(b"X-Forwarded-Prefix", b"/livez")]),
    ],
)
def test_nobody_else_does(path: str, headers: list[tuple[bytes, bytes]]) -> None:
    response = get(path, headers)
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    body = response.json()
    assert body["error_type"] == "unauthorized"
    assert isinstance(body["detail"], str)
    for secret in ("new-token", "old-token", "wrong", "schl"):
        assert secret not in response.text.replace("the token is wrong", "")


@pytest.mark.parametrize("path", ["/livez", "/readyz", "/livez?access_token=wrong"])
def test_the_probes_are_open(path: str) -> None:
    assert get(path).status_code == 200


@pytest.mark.parametrize(
    ("token", "caller"),
    [
        (CRAWLER, "crawler"),
        (f"crawler={CRAWLER}", "crawler"),
        ("rotated-to-this-one", "crawler"),
        ("fedcba9876543210", "search-2"),
        ("a=b", "unnamed"),
        ("unnamed=a=b", "unnamed"),
        ("plain==", "unnamed"),
    ],
)
def test_an_accepted_token_has_its_caller(token: str, caller: str) -> None:
    assert get(headers=[bearer(token.encode())], tokens=NAMED).status_code == 200
    assert seen["caller"] == caller
    assert get(f"/health?access_token={quote(token)}", tokens=NAMED).status_code == 200
    assert seen["caller"] == caller
    assert get("/livez", [bearer(token.encode())], NAMED).status_code == 200
    assert seen["caller"] == "none"


@pytest.mark.parametrize(
    "token",
    ["crawler", "crawler=", "crawler=wrong", "search-2=0123456789abcdef==", f"={CRAWLER}", "b", "unnamed", "plain"],
)
def test_a_wrong_token_has_no_caller_and_learns_no_name(token: str) -> None:
    response = get(headers=[bearer(token.encode())], tokens=NAMED)
    assert response.status_code == 401
    assert seen["caller"] == "none"
    assert not any(name in response.text for name in ("crawler", "search-2"))


def test_all_tokens_are_compared_wherever_the_right_one_is(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[bytes] = []
    compare = hmac.compare_digest

    def recorded(a: bytes, b: bytes) -> bool:
        compared.append(b)
        return compare(a, b)

    monkeypatch.setattr(hmac, "compare_digest", recorded)
    for token in (CRAWLER, "fedcba9876543210", "plain==", "wrong"):
        compared.clear()
        get(headers=[bearer(token.encode())], tokens=NAMED)
        assert len(compared) == len(set(compared)) == 9  # five tokens, four of them also as whole entries


def test_without_tokens_everybody_enters_and_nothing_leaks_all_the_same() -> None:
    assert get("/v1/rerank?access_token=mine", tokens="", method="POST").status_code == 200
    assert seen["query"] == b"access_token=***"


NAMES = ["access_token", "access%5Ftoken", "q", "", "Access_token"]


@given(st.lists(st.tuples(st.sampled_from(NAMES), st.text(max_size=5))))
def test_redaction_hides_the_token_and_keeps_the_rest(pairs: list[tuple[str, str]]) -> None:
    query = "&".join(f"{name}={quote('S' + value)}" for name, value in pairs).encode()
    parts = redact(query).split(b"&") if query else []
    assert len(parts) == len(pairs)
    for (name, value), part in zip(pairs, parts, strict=True):
        hidden = unquote(name) == "access_token"
        assert part == (b"access_token=***" if hidden else f"{name}={quote('S' + value)}".encode())


def test_no_telemetry_of_the_framework_sees_the_token(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []

    class Tracer(trace.NoOpTracer):
        def start_span(self, *args: Any, **options: Any) -> trace.Span:
            told.append((args, options))
            return trace.INVALID_SPAN

    class Provider(trace.TracerProvider):
        def get_tracer(self, *args: Any, **options: Any) -> trace.Tracer:
            return Tracer()

    monkeypatch.setattr(trace, "get_tracer_provider", Provider)

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(create_app(Settings(access_token="secret"), FakeScorer))
        async with httpx.AsyncClient(transport=transport, base_url="http://h") as client:
            return await client.get("/?access_token=secret")

    assert asyncio.run(ask()).status_code == 200
    assert told == []


def test_the_openapi_document_says_what_wants_a_token() -> None:
    document = create_app(Settings(access_token="t"), FakeScorer).openapi()
    assert document["components"]["securitySchemes"]["header"] == {"type": "http", "scheme": "bearer"}
    wanting = {path for path, operations in document["paths"].items() for o in operations.values() if o["security"]}
    assert wanting == set(document["paths"]) - {"/livez", "/readyz"}
    assert "securitySchemes" not in create_app(Settings(access_token=""), FakeScorer).openapi()["components"]
