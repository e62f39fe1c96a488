"""Reports of unread fields and changed texts: headers, `meta.warnings`, the log and errors."""

from __future__ import annotations

import itertools
import re
import socket
from typing import Any

import httpx
import pytest

from reranker.notes import MAX_NOTES
from reranker.request.fields import FIELDS
from tests.conftest import FAKE, Server, Start
from tests.http.test_rerank import ALL, ranked
from tests.request.bodies import wear

QUERY = "how to compress files"
DOCUMENTS = ["a game of chess for two players", "gzip compresses files with the deflate algorithm"]
# Each shape of an answer, and whether it has a meta.
SHAPES: list[tuple[str, dict[str, Any], bool]] = [
    ("/v1/rerank", {"documents": DOCUMENTS}, False),
    ("/api/v1/rerank", {"documents": DOCUMENTS}, False),
    ("/rerank", {"texts": DOCUMENTS}, False),
    ("/rerank", {"texts": DOCUMENTS, "model": "m"}, False),
    ("/v1/rerank", {"documents": DOCUMENTS, "model": "m"}, True),
    ("/api/v1/rerank", {"documents": DOCUMENTS, "model": "m"}, True),
    ("/rerank", {"documents": DOCUMENTS}, True),
    ("/v2/rerank", {"documents": DOCUMENTS}, True),
]


def post(server: Server, path: str, body: dict[str, Any]) -> httpx.Response:
    response = server.client.post(path, json={"query": QUERY} | body)
    assert response.status_code == 200, response.text
    return response


@pytest.mark.parametrize(("path", "body", "meta"), SHAPES)
def test_unread_fields_are_in_the_headers_of_every_shape_and_in_its_meta(
    fake_server: Server, path: str, body: dict[str, Any], meta: bool
) -> None:
    name = "texts" if "texts" in body else "documents"
    documents = [*DOCUMENTS[:1], {"text": DOCUMENTS[1], "title": "t", "id": 3}]
    response = post(fake_server, path, body | {"topk": 1, "user": "u", "instructions": "i", name: documents})
    assert len(ranked(response.json())) == 2
    assert response.headers["x-ignored-fields"] == f"topk, instructions, {name}.title"
    warnings = [
        "topk is not read; did you mean top_k?",
        "instructions is not read; did you mean instruction?",
        f"{name}: title is not read; to have it read, name it in rank_fields",
    ]
    assert response.headers["x-warnings"].split(" | ") == warnings
    if meta:
        assert response.json()["meta"]["warnings"] == warnings
    plain = post(fake_server, path, body)
    assert not {"x-ignored-fields", "x-warnings", "x-truncated-query"} & set(plain.headers)
    assert "warnings" not in plain.text


def test_every_header_is_described(fake_server: Server) -> None:
    document = fake_server.client.get("/openapi.json").json()
    for path in ALL:
        described = document["paths"][path]["post"]["responses"]["200"]["headers"]
        assert {"x-ignored-fields", "x-truncated-query", "x-warnings"} <= set(described)
    assert "HTTPValidationError" not in document["components"]["schemas"]


def test_the_log_has_a_line_for_each_name_and_an_end(start: Start) -> None:
    server = start(command=FAKE)
    secret = "s3cret text"
    for _ in range(3):
        post(server, "/v1/rerank", {"documents": DOCUMENTS, "topk": secret, "a\nb\u001b[31m": secret})
    lines = [line for line in server.log.splitlines() if "is not read" in line]
    assert len(lines) == 2
    assert " - WARNING - in a request (noted once): topk is not read; did you mean top_k?" in lines[0]
    assert lines[1].endswith("a_b__31m is not read")
    for i in range(MAX_NOTES + 20):
        post(server, "/v1/rerank", {"documents": DOCUMENTS, f"name{i:03}": secret})
    lines = [line for line in server.log.splitlines() if "is not read" in line]
    assert len(lines) == MAX_NOTES
    assert server.log.count(f"{MAX_NOTES} different notes were written; no more follow") == 1
    assert secret not in server.log


def test_no_header_grows_with_what_is_sent(fake_server: Server) -> None:
    many = {f"{i} " + "ü\r\n: x" * 5000: i for i in range(50)}
    response = post(fake_server, "/v2/rerank", {"documents": [{"text": "a"} | many]} | many)
    assert len(response.headers["x-ignored-fields"].split(", ")) == 10
    assert len(response.headers["x-ignored-fields"] + response.headers["x-warnings"]) < 2000
    assert len(response.json()["meta"]["warnings"]) == 11  # ten names, and how many more


FRAMEWORK = re.compile(
    "Input should|valid |at least 1 item|Field required|Extra inputs|Value error|not permitted|Unprocessable|"
    "Method Not Allowed|Not Found|Bad Request|Internal Server|validation|pydantic|starlette|type=|\\bstr\\b|\\bdict\\b"
)
VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2.5, 1e20, "", "a", "1", [], [None], [1], [[]], ["a"], {}, {"text": "a"}, {"text": 1}
]  # fmt: skip


@pytest.mark.parametrize("name", FIELDS)
def test_no_word_of_the_framework_reaches_a_client(fake_server: Server, name: str) -> None:
    """Send every field with every JSON type in each dialect."""
    shapes: list[dict[str, Any]] = [
        {"documents": DOCUMENTS},
        {"documents": DOCUMENTS, "model": "m"},
        {"texts": DOCUMENTS},
    ]
    for shape, value in itertools.product(shapes, VALUES):
        response = fake_server.client.post("/v1/rerank", json={"query": QUERY} | shape | {name: value})
        assert response.status_code in (200, 422)
        if response.status_code == 422:
            detail = response.json()["detail"]
            assert re.match(r"[a-z_]+(\[\d\])*: (must|is|has|at most|the field)", detail), detail
            assert not FRAMEWORK.search(detail), detail


def test_other_errors_say_what_to_send_in_our_words(fake_server: Server) -> None:
    for path in ALL:
        for method in ("GET", "PUT", "DELETE", "PATCH"):
            response = fake_server.client.request(method, path)
            assert (response.status_code, response.headers["allow"]) == (405, "POST")
            assert response.json()["detail"] == (
                f"{method} is not served at this path: use POST with a JSON body, see /docs"
            )
    for path in ("/health", "/", "/docs", "/openapi.json", "/v1/models", "/v1/models/m", "/info", "/metrics", "/livez"):
        response = fake_server.client.post(path)
        assert response.status_code == 405, path
        assert response.json()["detail"].startswith("POST is not served at this path: use GET"), path
    for path in ("/nothing", "/v1/rerank/", "//v1/rerank", "/v1/models/", "/score"):
        response = fake_server.client.post(path, json={})
        assert not FRAMEWORK.search(response.json()["detail"]), path


@pytest.mark.parametrize("encoding", ["gbk", "utf-16-le", "utf-16", "cp1252"])
def test_a_body_in_another_encoding_is_told_the_way_out(fake_server: Server, encoding: str) -> None:
    text = "é" if encoding == "cp1252" else "如何压缩文件"
    content = f'{{"query": "{text}", "documents": ["a"]}}'.encode(encoding)
    response = fake_server.client.post("/v1/rerank", content=content, headers={"Content-Type": "application/json"})
    assert response.status_code == 400
    if encoding == "utf-16-le":  # its bytes are UTF-8 as well, up to the first Chinese character
        assert response.json()["detail"].startswith(("the body is not UTF-8 at byte", "the body is not JSON"))
        return
    assert re.fullmatch(
        r"the body is not UTF-8 at byte \d+: send UTF-8 \(on Windows: chcp 65001, or --data-binary @file saved as "
        r"UTF-8\)",
        response.json()["detail"],
    )


def test_a_body_that_is_no_object_is_shown_one(fake_server: Server) -> None:
    for content, kind in ((b"[]", "a list"), (b'"a"', "a string"), (b"3", "a number"), (b"null", "null")):
        response = fake_server.client.post("/v1/rerank", content=content)
        assert response.json()["detail"] == (
            f'the body must be a JSON object, such as {{"query": "a", "documents": ["b", "c"]}}; got {kind}'
        )


def logits(server: Server, body: dict[str, Any]) -> dict[int, float]:
    return dict(ranked(post(server, "/v1/rerank", body | {"raw_scores": True}).json()))


@pytest.mark.parametrize(
    "instruction", ["Given a web search query, retrieve relevant passages that answer the query", "x"]
)
def test_texts_in_the_published_template_score_as_the_bare_texts(server: Server, instruction: str) -> None:
    bare = {"query": QUERY, "documents": DOCUMENTS, "instruction": instruction}
    worn = wear(QUERY, DOCUMENTS, instruction)
    assert logits(server, worn) == pytest.approx(logits(server, bare), abs=1e-5)
    for path, more in (("/v1/rerank", {"model": "m"}), ("/api/v1/rerank", {})):
        response = post(server, path, worn | more | {"return_documents": True})
        row = response.json()["results"][0]
        assert row.get("text", row.get("document")) in (DOCUMENTS[1], {"text": DOCUMENTS[1]})
        assert response.headers["x-warnings"].startswith("query: Qwen's prompt template was taken off")
    # Text, once anything differs: then the scores are others, and a warning says why.
    broken = worn | {"query": worn["query"] + " "}
    assert logits(server, broken) != pytest.approx(logits(server, bare), abs=1e-2)
    assert "read as text" in post(server, "/v1/rerank", broken).headers["x-warnings"]


def test_rank_fields_score_as_the_joined_text(server: Server) -> None:
    objects = [{"title": "t", "snippet": DOCUMENTS[0]}, {"title": "u", "snippet": DOCUMENTS[1]}]
    texts = [f"title: {o['title']}\nsnippet: {o['snippet']}" for o in objects]
    body = {"documents": objects, "rank_fields": ["title", "snippet"]}
    assert logits(server, body) == pytest.approx(logits(server, {"documents": texts}), abs=1e-5)
    response = post(server, "/v2/rerank", body | {"model": "m", "return_documents": True})
    assert response.json()["results"][0]["document"] == {"text": texts[1]}
    assert "x-warnings" not in response.headers


def test_use_activation_false_answers_logits(server: Server) -> None:
    body = {"documents": DOCUMENTS}
    assert dict(ranked(post(server, "/v1/rerank", body | {"use_activation": False}).json())) == pytest.approx(
        logits(server, body), abs=1e-5
    )


def test_top_n_zero_is_all_beside_a_model(fake_server: Server) -> None:
    for path in ALL:
        for zero in (0, "0", 0.0):
            body = {"documents": DOCUMENTS, "model": "m", "top_n": zero, "top_k": zero, "max_chunks_per_doc": zero}
            assert len(ranked(post(fake_server, path, body).json())) == 2
            refused = fake_server.client.post(path, json={"query": QUERY, "documents": DOCUMENTS, "top_n": zero})
            assert refused.status_code == 422
        assert len(ranked(post(fake_server, path, {"documents": DOCUMENTS, "top_n": "1"}).json())) == 1


LONG = "how to compress files on Linux " * 40


def test_a_query_that_does_not_fit_is_refused_or_truncated_as_asked(short: Server) -> None:
    body = {"query": LONG, "documents": DOCUMENTS}
    refused = short.client.post("/v1/rerank", json=body)
    assert refused.status_code == 422
    assert "send truncate: true to have it truncated" in refused.json()["detail"]
    assert short.client.post("/v1/rerank", json=body | {"truncate": False}).status_code == 422
    hint = "a larger MAX_SEQ_LENGTH, where the model allows it, reads more of it"
    says = f"the query did not fit and was truncated; {hint}"
    for path, more in (
        ("/v1/rerank", {"documents": DOCUMENTS, "truncate": True}),
        ("/rerank", {"texts": DOCUMENTS}),
        ("/rerank", {"texts": DOCUMENTS, "truncate": False}),  # litellm
        ("/v2/rerank", {"documents": DOCUMENTS, "truncate": "true", "model": "m"}),
    ) * 2:  # the second time from the cache
        response = post(short, path, {"query": LONG} | more)
        assert len(ranked(response.json())) == 2
        assert response.headers["x-truncated-query"] == "true"
        assert says in response.headers["x-warnings"]
        if path == "/v2/rerank":
            assert says in response.json()["meta"]["warnings"]
    assert "query_truncated=1" in short.log
    assert "compress files" not in short.log.replace("try it: curl", "").partition("POST /v1")[2]
    fits = post(short, "/v1/rerank", {"documents": DOCUMENTS, "truncate": True})
    assert "x-truncated-query" not in fits.headers
    assert short.client.post("/rerank", json={"query": LONG, "texts": ["a"], "instruction": LONG}).status_code == 422


def test_a_truncated_query_scores_as_its_start(short: Server) -> None:
    got = dict(ranked(post(short, "/v1/rerank", {"query": LONG, "documents": DOCUMENTS, "truncate": True}).json()))
    starts = [LONG[:end] for end in range(30, 400)]
    scores = [
        dict(ranked(post(short, "/v1/rerank", {"query": start, "documents": DOCUMENTS}).json()))
        for start in starts
        if not LONG[len(start)].isalpha() or not start[-1].isalpha()
    ]
    assert any(got == pytest.approx(score, abs=1e-5) for score in scores)


def test_a_connection_takes_all_of_it_at_once(fake_server: Server) -> None:
    """A client's parser must accept the header, whatever the name of a field."""
    body = b'{"query": "q", "documents": ["a"], "t\\u00f6pk\\r\\nx-evil: 1": 1}'
    with socket.create_connection(("127.0.0.1", fake_server.port)) as s:
        s.sendall(
            b"POST /v1/rerank HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(body) + body
        )
        raw = b"".join(iter(lambda: s.recv(65536), b""))
    head = raw.partition(b"\r\n\r\n")[0].split(b"\r\n")
    assert b"x-ignored-fields: t_pk__x-evil__1" in head
    assert not any(line.startswith(b"x-evil") for line in head)


def test_parameters_of_the_address_are_said_and_none_that_may_hold_a_token(fake_server: Server) -> None:
    address = "/v2/rerank?top_k=1&model=m&access_token=s3cret&s3cret&s3cret%20x=1&access_token;s3cret=1&top_k=2"
    response = fake_server.client.post(address, json={"query": "red", "documents": ["red", "blue"]})
    assert response.headers["x-ignored-fields"] == "top_k, model"
    assert response.json()["meta"]["warnings"][0] == "top_k in the address is not read: send it in the body"
    assert len(response.json()["results"]) == 2
    assert "s3cret" not in str(response.headers) + response.text
    many = "&".join(f"p{i}=1" for i in range(500))
    response = fake_server.client.post(f"/v1/rerank?{many}", json={"query": "red", "documents": ["red"], "topk": 1})
    assert response.headers["x-ignored-fields"].split(", ") == ["topk", *(f"p{i}" for i in range(9))]
    plain = fake_server.client.post("/v1/rerank?access_token=x", json={"query": "red", "documents": ["red"]})
    assert "x-ignored-fields" not in plain.headers
