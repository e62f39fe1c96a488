from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest
from starlette.testclient import TestClient

from app import create_app
from config import Settings
from reranker.http.access import printable, traceparent_of
from reranker.http.client_address import ClientAddress
from tests.fake import FakeScorer

FORWARDED = {"access_log_client": "forwarded"}


@pytest.mark.parametrize("token", ["plain", "a/b", "a?b", "a;b", "a&b", "a%b", "a+b=", "a\nb", "a,b"])
def test_a_token_that_became_a_part_of_the_path_is_not_printed(token: str) -> None:
    assert printable(f"/health&access_token={token}") == "/health&access_token=***"
    assert printable(f"/health/ACCESS_TOKEN={token}/more") == "/health/ACCESS_TOKEN=***"


def test_a_path_is_one_short_word() -> None:
    assert printable("/a\r\nGET /b \x1b[31m\u2028") == r"/a\r\nGET%20/b%20\x1b[31m\u2028"
    assert printable("/a 200 1.0 ms id=1 caller=ops\u3000") == r"/a%20200%201.0%20ms%20id=1%20caller=ops\u3000"
    assert len(printable("/" + "x" * 100_000)) == 200


TRACE = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


@pytest.mark.parametrize(
    ("sent", "accepted"),
    [
        ([TRACE], TRACE),
        ([f"cc{TRACE[2:]}"], TRACE),  # a later version, which may also append fields
        ([f"cc{TRACE[2:]}-more"], TRACE),
        ([], ""),
        ([TRACE, TRACE], ""),
        ([f"ff{TRACE[2:]}"], ""),
        ([f"{TRACE}-more"], ""),
        ([TRACE.upper()], ""),
        ([f"{TRACE} "], ""),
        ([f"{TRACE}\n"], ""),
        ([f"00-{'0' * 32}-00f067aa0ba902b7-01"], ""),
        ([f"00-4bf92f3577b34da6a3ce929d0e0e4736-{'0' * 16}-01"], ""),
        ([f"cc{TRACE[2:]}-{'x' * 300}"], ""),
        (["confidential"], ""),
    ],
)
def test_a_traceparent_is_accepted_only_as_the_standard_writes_it(sent: list[str], accepted: str) -> None:
    assert traceparent_of({"headers": [(b"traceparent", value.encode()) for value in sent]}) == accepted


def client(**settings: Any) -> TestClient:
    """Return a client of the application with a fake scorer, at the address 192.0.2.7."""
    app = create_app(Settings(**settings), FakeScorer)

    @app.get("/v1/bug")
    async def bug() -> None:
        raise RuntimeError("a bug")

    return TestClient(app, client=("192.0.2.7", 5000), raise_server_exceptions=False)


def access_lines(caplog: pytest.LogCaptureFixture) -> list[tuple[str, dict[str, Any]]]:
    """Return text and facts of each line."""
    records = [record for record in caplog.records if record.name == "reranker.http.access"]
    return [(record.getMessage(), vars(record)["facts"]) for record in records]


@pytest.fixture(autouse=True)
def _logging() -> Iterator[None]:
    """Restore what `create_app` configures."""
    root = logging.getLogger()
    handlers, level = root.handlers, root.level
    yield
    root.handlers, root.level = handlers, level


def test_a_trace_goes_into_the_line_and_into_every_response(caplog: pytest.LogCaptureFixture) -> None:
    with client() as service:
        logging.getLogger().addHandler(caplog.handler)
        for path, status in (("/nothing", 404), ("/v1/bug", 500), ("/docs", 200)):
            answer = service.get(path, headers={"traceparent": TRACE})
            assert answer.status_code == status
            assert answer.headers.get_list("traceparent") == [TRACE]
        assert "traceparent" not in service.get("/docs", headers={"traceparent": "confidential"}).headers
    traced, [(text, facts)] = access_lines(caplog)[:-1], access_lines(caplog)[-1:]
    assert len(traced) == 3
    for line, values in traced:
        assert values["trace_id"] == "4bf92f3577b34da6a3ce929d0e0e4736"
        assert f" trace_id={values['trace_id']}" in line
    assert "trace_id" not in facts
    assert "confidential" not in text


SECRET = "confidential"


@pytest.mark.parametrize(
    ("body", "logged"),
    [
        ({"docs": [SECRET], "query": SECRET}, 'documents: is required; "docs" is not read, did you mean documents?'),
        ({SECRET: SECRET}, "query: is required"),
        ({"query": SECRET, "documents": SECRET}, "documents: must be a list of texts"),
        ({"query": SECRET, "documents": [{SECRET: SECRET}]}, "documents[0]: "),
        ({"query": SECRET, "documents": [SECRET], "top_k": SECRET}, "top_k: "),
        ({"query": SECRET, "documents": [SECRET], "instruction": [SECRET]}, "instruction: "),
        ({"query": SECRET, "documents": [{SECRET: "x"}], "rank_fields": [SECRET, "a"]}, "documents[0]: "),
        ({"query": SECRET, "documents": [SECRET], "model": {SECRET: SECRET}}, ""),
        (f'{{"{SECRET}": 1, "{SECRET}": 2}}', "a name is in one JSON object twice; send it once"),
        (f'{{"query": "{SECRET}', "the body is not JSON: Unterminated string starting at line 1 column 11"),
        (f'{{"query": {SECRET}}}', "the body is not JSON: Expecting value at line 1 column 11"),
        (f'"{SECRET}"', "the body must be a JSON object"),
    ],
)
@pytest.mark.parametrize("route", ["/v1/rerank", "/v2/rerank", "/rerank", "/score"])
def test_a_line_has_the_errors_detail_and_no_word_of_the_client(
    caplog: pytest.LogCaptureFixture, route: str, body: object, logged: str
) -> None:
    with client() as service:
        while service.get("/readyz").status_code != 200:
            pass
        logging.getLogger().addHandler(caplog.handler)
        content = body if isinstance(body, str) else json.dumps(body)
        answer = service.post(route, content=content, headers={"Content-Type": "application/json"})
    assert SECRET not in caplog.text
    [(text, facts)] = access_lines(caplog)
    if answer.status_code == 200:
        assert (logged, "detail" in facts) == ("", False)
        return
    assert answer.status_code in (400, 422)
    assert text.endswith(f" detail={json.dumps(facts['detail'])}")
    if route == "/v1/rerank":
        assert facts["detail"].startswith(logged)
    if SECRET not in answer.text:
        assert facts["detail"] == answer.json()["detail"][:300]


@pytest.mark.parametrize(
    ("settings", "forwarded", "address"),
    [
        ({}, ["203.0.113.1"], None),
        ({"access_log_client": "peer"}, ["203.0.113.1"], "192.0.2.7"),
        (FORWARDED | {"trusted_proxies": "192.0.2.0/24"}, ["198.51.100.1, 203.0.113.1"], "203.0.113.1"),
        (FORWARDED | {"trusted_proxies": "192.0.2.0/24"}, [], "192.0.2.7"),
        (FORWARDED | {"trusted_proxies": "192.0.2.8"}, ["203.0.113.1"], "192.0.2.7"),  # a client that pretends
        (FORWARDED | {"trusted_proxies": "192.0.2.7,10.0.0.0/8"}, ["6.6.6.6, 203.0.113.1, 10.1.2.3"], "203.0.113.1"),
        (FORWARDED | {"trusted_proxies": "192.0.2.7,10.0.0.0/8"}, ["203.0.113.1", "10.1.2.3"], "203.0.113.1"),
        (FORWARDED | {"trusted_proxies": "192.0.2.7"}, ["203.0.113.1, confidential text"], "192.0.2.7"),
        (FORWARDED | {"trusted_proxies": "192.0.2.7"}, ["fe80::1%confidential"], "fe80::1"),
        (FORWARDED | {"trusted_proxies": "192.0.2.7"}, ["203.0.113.1:4711"], "203.0.113.1"),
        (FORWARDED | {"trusted_proxies": "192.0.2.7"}, ["[2001:db8::1]:4711"], "2001:db8::1"),
        (FORWARDED | {"trusted_proxies": "192.0.2.7"}, ["::ffff:203.0.113.1"], "203.0.113.1"),
        (FORWARDED | {"trusted_proxies": "::ffff:192.0.2.0/120"}, ["203.0.113.1"], "203.0.113.1"),
        (FORWARDED | {"trusted_proxies": "192.0.2.7,10.0.0.0/8"}, ["203.0.113.1" + ", 10.0.0.1" * 1000], "10.0.0.1"),
    ],
)
def test_the_address_of_a_client(
    caplog: pytest.LogCaptureFixture, settings: dict[str, str], forwarded: list[str], address: str | None
) -> None:
    with client(**settings) as service:
        logging.getLogger().addHandler(caplog.handler)
        service.get("/nothing", headers=[("X-Forwarded-For", value) for value in forwarded])
    [(text, facts)] = access_lines(caplog)
    assert facts.get("client_address") == address
    assert (f" client_address={address} " in text) == (address is not None)
    assert "confidential" not in text


def test_a_unix_socket_has_no_address() -> None:
    assert ClientAddress("peer").of({"client": None, "headers": []}) is None
