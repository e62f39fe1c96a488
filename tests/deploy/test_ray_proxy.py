"""Ray's own error responses become the documented ones of the service; a replica's responses pass unchanged.

The real proxy, with replicas that die, is in tests/ray; here stand-ins answer as Ray's source does.
"""

from __future__ import annotations

import asyncio
import re

import httpx
import pytest
from starlette.types import ASGIApp, Receive, Scope, Send

from deploy.ray_proxy import middlewares

RAYS = [(b"content-type", b"text/plain"), (b"X-Request-ID", b"rays")]


def answering(status: int, headers: list[tuple[bytes, bytes]], body: bytes) -> ASGIApp:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body[:3], "more_body": True})
        await send({"type": "http.response.body", "body": body[3:]})

    return app


async def nothing(scope: Scope, receive: Receive, send: Send) -> None:
    """The response of Ray when the replica died: none."""


def ask(app: ASGIApp, path: str = "/v1/rerank", request_id: bytes = b"mine") -> httpx.Response:
    for middleware in middlewares():
        app = middleware.cls(app, *middleware.args, **middleware.kwargs)

    async def send() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://h") as client:
            return await client.post(path, headers=[(b"x-request-id", request_id)])

    return asyncio.run(send())


@pytest.mark.parametrize(
    ("app", "status", "kind", "retry_after"),
    [
        (nothing, 503, "not_ready", "1"),
        (answering(404, RAYS, b"Path '/' not found. Ping http://.../-/routes"), 503, "not_ready", "5"),
        (answering(503, RAYS, b"Request dropped due to backpressure"), 503, "not_ready", "5"),
        (answering(500, RAYS, b"Internal Server Error"), 503, "not_ready", "1"),
        (answering(408, RAYS, b"Request mine timed out after 1s."), 504, "deadline_exceeded", None),
    ],
)
def test_rays_own_answers(app: ASGIApp, status: int, kind: str, retry_after: str | None) -> None:
    answer = ask(app)
    assert answer.status_code == status
    assert set(answer.json()) == {"detail", "error_type", "message", "error"}
    assert answer.json()["error_type"] == kind
    assert answer.headers.get("retry-after") == retry_after
    assert answer.headers.get_list("x-request-id") == ["mine"]


@pytest.mark.parametrize("status", [200, 404, 408, 429, 500, 503])
def test_a_replicas_answers_pass(status: int) -> None:
    theirs = [(b"content-type", b"application/json"), (b"retry-after", b"7"), (b"x-request-id", b"mine"), RAYS[1]]
    answer = ask(answering(status, theirs, b'{"detail": "d"}'))
    assert (answer.status_code, answer.text) == (status, '{"detail": "d"}')
    assert answer.headers["retry-after"] == "7"
    assert answer.headers.get_list("x-request-id") == ["mine"]


def test_rays_own_routes_are_left_alone() -> None:
    answer = ask(answering(503, RAYS, b"This node is being drained."), "/-/healthz")
    assert (answer.status_code, answer.text) == (503, "This node is being drained.")


def test_ids_that_are_no_text_do_not_reach_ray() -> None:
    seen: list[bytes] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.extend(value for name, value in scope["headers"] if name == b"x-request-id")

    for bad in (b"\xff\xfe", b"a b", b"x" * 200):
        answer = ask(app, request_id=bad)
        assert re.fullmatch("[0-9a-f]{16}", answer.headers["x-request-id"])
        assert seen.pop() == answer.headers["x-request-id"].encode()
        assert not seen
