"""Authorisation, and the secrecy of tokens: attempts over raw sockets against a real gunicorn."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.conftest import FAKE, Server, Start
from tests.faults.raw import Answers, connect, exchange, listen, post, send

OLD, NEW = b"old-S3cr3t", b"new-S3cr3t-of-a-caller"
TOKEN = NEW.decode()
ACCEPTED = f"{OLD.decode()}, caller={TOKEN}"
BODY = json.dumps({"query": "q", "documents": ["a"]}).encode()


def escaped(text: bytes) -> bytes:
    """Every byte as %XX."""
    return b"".join(b"%%%02x" % byte for byte in text)


# As it is, as a query could hold it, and as a Basic header would.
FORMS = [form for t in (OLD, NEW) for form in (t.decode(), escaped(t).decode(), base64.b64encode(t).decode())]


@pytest.fixture(scope="module")
def guarded(start: Start) -> Server:
    return start(command=FAKE, token=TOKEN, ACCESS_TOKEN=ACCEPTED, LOG_LEVEL="DEBUG")


def ask(method: bytes = b"POST", target: bytes = b"/v1/rerank", *headers: bytes, host: bytes = b"h") -> bytes:
    lines = [b"%s %s HTTP/1.1" % (method, target), b"Host: " + host, b"Connection: close", *headers]
    if method == b"POST":
        return b"\r\n".join([*lines, b"Content-Length: %d" % len(BODY), b"", BODY])
    return b"\r\n".join([*lines, b"", b""])


def bearer(token: bytes, scheme: bytes = b"Bearer ") -> bytes:
    return b"Authorization: " + scheme + token


def query(value: bytes, name: bytes = b"access_token") -> bytes:
    return ask(b"POST", b"/v1/rerank?%s=%s" % (name, value))


ENTITLED = {
    "the old token": ask(b"POST", b"/v1/rerank", bearer(OLD)),
    "the new token": ask(b"POST", b"/v1/rerank", bearer(NEW)),
    "bearer": ask(b"POST", b"/v1/rerank", bearer(NEW, b"bearer ")),
    "BEARER": ask(b"POST", b"/v1/rerank", bearer(NEW, b"BEARER ")),
    "blanks around it": ask(b"POST", b"/v1/rerank", bearer(NEW + b"  ", b"Bearer   ")),
    "a header in capitals": ask(b"POST", b"/v1/rerank", bearer(NEW).upper().replace(NEW.upper(), NEW)),
    "the old one as a parameter": query(OLD),
    "the new one as a parameter": query(NEW),
    "the whole entry of the new one": ask(b"POST", b"/v1/rerank", bearer(b"caller=" + NEW)),
    "the whole entry as a parameter": query(b"caller=" + NEW),
    "behind another parameter": ask(b"POST", b"/v1/rerank?x=1&access_token=" + NEW),
    "an escaped name": query(NEW, b"access%5Ftoken"),
    "an escaped value": query(escaped(NEW)),
    "an absolute address": ask(b"POST", b"http://elsewhere/v1/rerank?access_token=" + NEW),
    "an escaped path": ask(b"POST", b"/%761/rerank", bearer(NEW)),
}
REFUSED = {
    "nothing": ask(),
    "a wrong token": ask(b"POST", b"/v1/rerank", bearer(b"wrong")),
    "an empty token": ask(b"POST", b"/v1/rerank", bearer(b"")),
    "no token": ask(b"POST", b"/v1/rerank", b"Authorization: Bearer"),
    "an empty header": ask(b"POST", b"/v1/rerank", b"Authorization:"),
    "no scheme": ask(b"POST", b"/v1/rerank", bearer(NEW, b"")),
    "Basic": ask(b"POST", b"/v1/rerank", bearer(NEW, b"Basic ")),
    "Basic in base64": ask(b"POST", b"/v1/rerank", bearer(base64.b64encode(b":" + NEW), b"Basic ")),
    "Token": ask(b"POST", b"/v1/rerank", bearer(NEW, b"Token ")),
    "a tab": ask(b"POST", b"/v1/rerank", bearer(NEW, b"Bearer\t")),
    "a colon": ask(b"POST", b"/v1/rerank", bearer(NEW, b"Bearer: ")),
    "both tokens": ask(b"POST", b"/v1/rerank", bearer(OLD + b"," + NEW)),
    "a word more": ask(b"POST", b"/v1/rerank", bearer(NEW + b" x")),
    "quotes": ask(b"POST", b"/v1/rerank", bearer(b'"' + NEW + b'"')),
    "capitals": ask(b"POST", b"/v1/rerank", bearer(NEW.upper())),
    "all but the last letter": ask(b"POST", b"/v1/rerank", bearer(NEW[:-1])),
    "a letter more": ask(b"POST", b"/v1/rerank", bearer(NEW + b"x")),
    "a million letters more": ask(b"POST", b"/v1/rerank", bearer(NEW + b"x" * 30_000)),
    "the name": ask(b"POST", b"/v1/rerank", bearer(b"caller")),
    "the name of the other": ask(b"POST", b"/v1/rerank", bearer(b"caller=" + OLD)),
    "the label of tokens without a name": ask(b"POST", b"/v1/rerank", bearer(b"unnamed=" + NEW)),
    "UTF-8": ask(b"POST", b"/v1/rerank", bearer("schlüssel".encode())),
    "Latin-1": ask(b"POST", b"/v1/rerank", bearer("schlüssel".encode("latin-1"))),
    "no text at all": ask(b"POST", b"/v1/rerank", bearer(b"\xff\xfe")),
    "the same twice": ask(b"POST", b"/v1/rerank", bearer(NEW), bearer(NEW)),
    "both, each in a header": ask(b"POST", b"/v1/rerank", bearer(OLD), bearer(NEW)),
    "wrong, then right": ask(b"POST", b"/v1/rerank", bearer(b"wrong"), bearer(NEW)),
    "right, then wrong": ask(b"POST", b"/v1/rerank", bearer(NEW), bearer(b"wrong")),
    "a wrong parameter": query(b"wrong"),
    "an empty parameter": query(b""),
    "a parameter without a value": ask(b"POST", b"/v1/rerank?access_token"),
    "a parameter of no text": query(b"%E5%AF%86%FF"),
    "a NUL behind it": query(NEW + b"%00"),
    "a blank behind it": query(NEW + b"+"),
    "a line break behind it": query(NEW + b"%0d%0a"),
    "escaped twice": query(escaped(NEW).replace(b"%", b"%25")),
    "parameters twice": ask(b"POST", b"/v1/rerank?access_token=%s&access_token=%s" % (NEW, NEW)),
    "parameters wrong, then right": ask(b"POST", b"/v1/rerank?access_token=wrong&access_token=" + NEW),
    "a parameter behind a semicolon": ask(b"POST", b"/v1/rerank?x=1;access_token=" + NEW),
    "wrong header, right parameter": ask(b"POST", b"/v1/rerank?access_token=" + NEW, bearer(b"wrong")),
    "empty header, right parameter": ask(b"POST", b"/v1/rerank?access_token=" + NEW, b"Authorization:"),
    "right header, wrong parameter": ask(b"POST", b"/v1/rerank?access_token=wrong", bearer(NEW)),
    "right header, right parameter": ask(b"POST", b"/v1/rerank?access_token=" + NEW, bearer(NEW)),
    "ACCESS_TOKEN": query(NEW, b"ACCESS_TOKEN"),
    "token": query(NEW, b"token"),
    "access_token[]": query(NEW, b"access_token[]"),
    "X-Api-Key": ask(b"POST", b"/v1/rerank", b"X-Api-Key: " + NEW),
    "a cookie": ask(b"POST", b"/v1/rerank", b"Cookie: access_token=" + NEW),
    "the proxy's header": ask(b"POST", b"/v1/rerank", b"Proxy-" + bearer(NEW)),
    "an underscore": ask(b"POST", b"/v1/rerank", b"X_" + bearer(NEW)),
    "in the path": ask(b"POST", b"/v1/rerank&access_token=" + NEW),
    "in a matrix parameter": ask(b"POST", b"/v1/rerank;access_token=" + NEW),
    "in the body": post(b'{"query": "q", "documents": ["a"], "access_token": "%s"}' % NEW, b"Connection: close\r\n"),
    "as a user of the address": ask(b"POST", b"http://x:%s@h/v1/rerank" % NEW),
    "in the trailer": b"POST /v1/rerank HTTP/1.1\r\nHost: h\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
    b"%x\r\n%s\r\n0\r\n%s\r\n\r\n" % (len(BODY), BODY, bearer(NEW)),
} | {
    f"{method} {target}": ask(method.encode(), target.encode())
    for method, target in (
        *(("POST", target) for target in "//v1/rerank /v1/rerank/ /v1//rerank /%761/rerank /v1%2Frerank".split()),
        *(("POST", target) for target in "/livez/../v1/rerank /livez;x /livez/v1/rerank /v1/rerank/livez".split()),
        *(("GET", target) for target in "/health /metrics /docs /openapi.json /info /v1/models /nothing".split()),
        *(("GET", target) for target in "/livez/ /livez/x //livez /LIVEZ /./livez /livez/. /livez%00".split()),
        *(("GET", target) for target in "/livez%20 /livez%3f /livez%2f..%2fhealth /livez%0d%0ax *".split()),
        *(("GET", target) for target in "/livez\\..\\health /readyz/../metrics /x/../livez http://h/livez/../x".split()),
        *((method, "/v1/rerank") for method in "GET HEAD OPTIONS TRACE PUT PATCH DELETE PROPFIND".split()),
        *((method, "/health") for method in "HEAD OPTIONS TRACE POST".split()),
    )
} | {
    f"Host: {host.decode()}": ask(b"GET", b"/health", host=host)
    for host in (b"a/livez?x=", b"h/livez#", b"h\\livez", b"livez", b"", b"h:80/livez?")
} | {
    header.decode(): ask(b"GET", b"/health", header)
    for header in (
        b"X-Original-URL: /livez",
        b"X-Rewrite-URL: /livez",
        b"X-Forwarded-Prefix: /livez",
        b"X-Forwarded-Host: h/livez?",
        b"X-Forwarded-For: 127.0.0.1",
        b"Forwarded: for=127.0.0.1;host=livez",
        b"X-Http-Method-Override: HEAD",
        b"Connection: Upgrade\r\nUpgrade: websocket",
    )
}  # fmt: skip
BROKEN = {
    "a NUL in the header": ask(b"POST", b"/v1/rerank", bearer(NEW + b"\x00")),
    "a folded header": ask(b"POST", b"/v1/rerank", b"Authorization:\r\n Bearer " + NEW),
    "a fragment": ask(b"GET", b"/livez#/health"),
    "a header in two lines": ask(b"POST", b"/v1/rerank", b"Authorization: Bearer\n" + NEW),
    "CONNECT": ask(b"CONNECT", b"/livez"),
}


def harmless(answers: Answers) -> None:
    for form in FORMS:
        assert form.encode() not in answers.data


@pytest.mark.parametrize("attempt", ENTITLED.values(), ids=ENTITLED.keys())
def test_the_entitled_enter(guarded: Server, attempt: bytes) -> None:
    answers = exchange(guarded, attempt)
    assert answers.statuses == [200]
    assert b'"score":0.5' in answers.data
    harmless(answers)


@pytest.mark.parametrize("attempt", REFUSED.values(), ids=REFUSED.keys())
def test_nobody_else_does(guarded: Server, attempt: bytes) -> None:
    answers = exchange(guarded, attempt)
    assert answers.statuses == [401]
    assert b"\r\nwww-authenticate: Bearer\r\n" in answers.data
    assert b"score" not in answers.data
    harmless(answers)
    if not attempt.startswith(b"HEAD"):
        assert answers.error["error_type"] == "unauthorized"


@pytest.mark.parametrize("attempt", BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_request_gets_nowhere(guarded: Server, attempt: bytes) -> None:
    answers = exchange(guarded, attempt)
    assert answers.statuses == [400]
    assert answers.error["error_type"] == "malformed_request"
    harmless(answers)


@pytest.mark.parametrize(
    ("attempt", "status"),
    [
        (ask(b"GET", b"/livez"), 200),
        (ask(b"HEAD", b"/readyz"), 200),
        (ask(b"GET", b"/readyz", bearer(b"wrong")), 200),
        (ask(b"GET", b"/livez?access_token=wrong"), 200),
        (ask(b"GET", b"/?/v1/rerank"), 200),
        (ask(b"POST", b"/"), 405),
        (ask(b"TRACE", b"/livez", b"X-Secret: " + NEW), 405),
    ],
)
def test_what_is_open_tells_nothing(guarded: Server, attempt: bytes, status: int) -> None:
    answers = exchange(guarded, attempt)
    assert answers.statuses == [status]
    harmless(answers)


def test_a_token_is_good_for_its_own_request_only(guarded: Server) -> None:
    entitled = ask(b"POST", b"/v1/rerank", bearer(NEW)).replace(b"Connection: close\r\n", b"")
    with connect(guarded) as connection:
        send(connection, entitled + ask(b"POST", b"/v1/rerank"))
        assert listen(connection).statuses == [200, 401]


def test_the_attempts_left_no_token_in_the_log(guarded: Server) -> None:
    """Behind all of the above, which it needs no more than itself."""
    for attempt in (ENTITLED | REFUSED | BROKEN).values():
        exchange(guarded, attempt)
    assert guarded.log.count(" 401 ") >= len(REFUSED)
    for form in FORMS:
        assert form not in guarded.log
    assert "/v1/rerank&access_token=***" in guarded.log


# Every status, at every level


def tour(server: Server, headers: bytes, parameter: bytes) -> dict[str, list[int]]:
    """Send requests with the token that end in every status; return the statuses by name."""

    def to(path: bytes) -> bytes:
        return path + (b"?" + parameter if parameter else b"")

    def body(documents: list[str], **more: object) -> bytes:
        return json.dumps({"query": "q", "documents": documents, **more}).encode()

    def rerank(content: bytes, more: bytes = b"", path: bytes = b"/v1/rerank") -> Callable[[], Answers]:
        return lambda: exchange(server, post(content, b"Connection: close\r\n" + headers + more, to(path)))

    def get(path: bytes, more: bytes = b"", method: bytes = b"GET") -> Callable[[], Answers]:
        head = b"%s %s HTTP/1.1\r\nHost: h\r\nConnection: close\r\n%s%s\r\n" % (method, to(path), headers, more)
        return lambda: exchange(server, head)

    def late(rest: bytes) -> Callable[[], Answers]:
        return lambda: exchange(server, b"POST %s HTTP/1.1\r\nHost: h\r\n%s%s" % (to(b"/v1/rerank"), headers, rest))

    def leave() -> Answers:
        with connect(server) as connection:
            send(connection, post(body(["a b c"] * 4), headers, to(b"/v1/rerank")))
            time.sleep(0.2)
        return Answers(b"", True, 0)

    ways: dict[str, Callable[[], Answers]] = {
        "ranked": rerank(body(["a"])),
        "with texts": rerank(body(["a"]), path=b"/api/v1/rerank"),
        "health": get(b"/health"),
        "metrics": get(b"/metrics"),
        "docs": get(b"/docs"),
        "openapi": get(b"/openapi.json"),
        "slash": rerank(body(["a"]), path=b"/v1/rerank/"),
        "not JSON": rerank(b"{"),
        "not HTTP": get(b"/health", b"X\x00: y\r\n"),
        "wrong token": get(b"/health", b"Authorization: Bearer %s-wrong\r\n" % NEW),
        "nothing there": get(b"/nothing"),
        "misplaced": get(b"/health&access_token=" + NEW),
        "wrong method": get(b"/v1/rerank", method=b"DELETE"),
        "slow body": late(b"Content-Length: 9\r\n\r\n{"),
        "slow head": late(b"X: "),
        "large body": late(b"Content-Length: 99999999\r\n\r\n"),
        "wrong type": rerank(body(["a"]), b"Content-Type: text/plain\r\n"),
        "wrong field": rerank(body(["a"], top_k=0)),
        "too many": rerank(body(["a"] * 51)),
        "large head": get(b"/health", b"X: %s\r\n" % (b"x" * 33_000)),
        "endless head": late(b"X: " + b"x" * 300_000),
        "failed": rerank(body(["poison"])),
        "left": leave,
    }
    answers = {name: way() for name, way in ways.items()}
    with ThreadPoolExecutor(8) as pool:
        # 2.8 s of work each, within a deadline of 2 s, and a queue that holds about two of them.
        busy = list(pool.map(lambda _: rerank(body(["a b c d"] * 14))(), range(8)))
    answers |= {f"busy {i}": answer for i, answer in enumerate(busy)}
    time.sleep(1)
    answers["lost"] = rerank(body(["lost"]))()
    for answer in answers.values():
        harmless(answer)
    return {name: answer.statuses for name, answer in answers.items()}


@pytest.mark.slow
def test_no_log_level_answer_or_metric_holds_a_token_whatever_the_status(start: Start) -> None:
    limits = {"BODY_TIMEOUT": "1", "MAX_BODY_BYTES": "50000", "MAX_DOCUMENTS": "50", "REQUEST_TIMEOUT": "2"}
    scorer = {"FAKE_SECONDS": "0.2", "FAKE_BATCH_TOKENS": "14", "MAX_QUEUE_TOKENS": "100"}
    options = {"command": FAKE, "token": TOKEN, "ACCESS_TOKEN": ACCEPTED} | limits | scorer

    def use(level: str) -> None:
        server = servers[level]
        for headers, parameter in ((bearer(NEW) + b"\r\n", b""), (b"", b"access_token=" + NEW)):
            seen = tour(server, headers, parameter)
            server.wait_for("ok")
            statuses = {status for found in seen.values() for status in found}
            assert statuses == {200, 400, 401, 404, 405, 408, 413, 415, 422, 429, 431, 500, 503, 504}, seen
            metrics = server.client.get("/metrics").text
            assert 'reranker_requests_total{route="/v1/rerank",status="200"}' in metrics
            assert not any(form in metrics for form in FORMS)
        server.stop()
        assert not any(form in server.log for form in FORMS)
        assert ("a kernel failed" in server.log) == (level != "CRITICAL")  # the log is there, with its tracebacks
        assert (" 504 " in server.log) == (level in ("DEBUG", "INFO"))

    servers = {level: start(**options, LOG_LEVEL=level) for level in ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")}
    with ThreadPoolExecutor(5) as pool:
        list(pool.map(use, servers))
