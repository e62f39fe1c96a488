from __future__ import annotations

import itertools
import time
from typing import Any

import httpx
import pytest

from reranker.engine.scores import sigmoid
from reranker.request.pairs import SHAPES
from tests.conftest import FAKE, Server, Start
from tests.faults.traffic import until

PATHS = ("/score", "/v1/score")
QUERIES = ["red fish", "a bird", "red fish"]
DOCUMENTS = ["a fish", "a bird", "red fish"]


def post(server: Server, path: str = "/score", /, **body: Any) -> httpx.Response:
    return server.client.post(path, json=body, headers={"x-request-id": "id-7"})


def scores(response: httpx.Response) -> list[float]:
    assert response.status_code == 200, response.text
    data = response.json()["data"]
    assert [(row["index"], row["object"]) for row in data] == [(i, "score") for i in range(len(data))]
    return [row["score"] for row in data]


@pytest.mark.parametrize(("path", "shape"), list(itertools.product(PATHS, SHAPES)))
def test_every_shape_on_both_routes_in_the_order_of_the_documents(
    fake_server: Server, path: str, shape: tuple[str, str]
) -> None:
    queries, documents = shape
    for query, texts, logits in (
        ("red fish", "red fish", [2]),
        (["red fish"], ["red fish"], [2]),
        ("red fish", DOCUMENTS, [1, 0, 2]),
        (["red fish"], DOCUMENTS, [1, 0, 2]),
        (QUERIES, DOCUMENTS, [1, 2, 2]),
        (QUERIES, [{"text": text} for text in DOCUMENTS], [1, 2, 2]),
    ):
        response = post(fake_server, path, model="m", **{queries: query, documents: texts})
        assert scores(response) == list(map(sigmoid, logits))


def test_the_other_keys_are_those_of_vllm(fake_server: Server) -> None:
    before = int(time.time())
    content = post(fake_server, queries=QUERIES, documents=DOCUMENTS).json()
    assert before <= content.pop("created") <= time.time()
    del content["data"]
    usage = {"prompt_tokens": 36, "completion_tokens": 0, "total_tokens": 36}
    assert content == {"id": "id-7", "object": "list", "model": "fake", "usage": usage}


def test_logits_on_request(fake_server: Server) -> None:
    for more in ({"use_activation": False}, {"raw_scores": True}):
        assert scores(post(fake_server, queries=QUERIES, documents=DOCUMENTS, **more)) == [1, 2, 2]


@pytest.mark.parametrize(
    ("body", "detail"),
    [
        ({}, "queries: is required"),
        ({"query": "q", "documents": ["a"]}, 'queries: is required; "query" is not read, did you mean queries?'),
        ({"queries": "q"}, "documents: is required"),
        ({"queries": "q", "texts": ["a"]}, 'documents: is required; "texts" is not read, did you mean documents?'),
        ({"queries": "q", "docs": ["a"]}, 'documents: is required; "docs" is not read, did you mean documents?'),
        ({"text_1": "q", "text_2": None}, "text_2: is required"),
        ({"data_2": ["q"]}, "data_1: is required"),
        (
            {"queries": ["a", "b"], "documents": ["c"] * 3},
            "queries: 2 beside 3 documents; send one for all of them, or",
        ),
        ({"text_1": ["a"] * 3, "text_2": "c"}, "text_1: 3 beside 1 text_2; send one for all of them, or one for each"),
        ({"queries": [], "documents": ["c"]}, "queries: must hold at least one text"),
        ({"queries": "q", "items": []}, "items: must hold at least one text"),
        ({"queries": 5, "documents": ["c"]}, "queries: must be a text or a list of texts"),
        ({"queries": {"text": "q"}, "documents": ["c"]}, "queries: must be a text or a list of texts"),
        ({"queries": ["a", " "], "documents": ["c", "d"]}, "queries[1]: must not be empty"),
        ({"data_1": ["a", 1], "data_2": ["c", "d"]}, "data_1[1]: must be a string; got a number"),
        ({"text_1": "q", "text_2": ["a", 5]}, "text_2[1]: must be a string or an object"),
        ({"queries": "q", "documents": ["a"] * 2049}, "documents: at most 2048 in one request"),
        ({"queries": ["a"] * 2049, "items": ["a"] * 2049}, "items: at most 2048 in one request"),
        ({"queries": "q", "documents": ["a"], "max_tokens_per_doc": 0}, "max_tokens_per_doc: must be a whole number"),
        ({"queries": ["b", "too long"], "documents": ["a", "b"]}, "the query leaves no room for a document"),
    ],
)
def test_errors_have_the_names_of_the_request(fake_server: Server, body: dict[str, Any], detail: str) -> None:
    response = post(fake_server, **body)
    assert response.status_code == 422, response.text
    assert response.json()["detail"].startswith(detail)


def test_a_document_that_may_not_be_truncated_is_named_as_in_the_request(short: Server) -> None:
    long = " ".join(f"word{i} of a long story" for i in range(60))
    for queries in ("files", ["files", "files", "chess"], ["files", "games", "chess"]):
        response = post(short, text_1=queries, text_2=["a", "b", long], truncate=False)
        assert response.status_code == 422
        assert response.json()["detail"].startswith("text_2[2]: longer than the ")


def test_a_query_that_leaves_no_room_is_named_as_in_the_request(short: Server) -> None:
    long = " ".join(f"word{i} of a long story" for i in range(60))
    for queries, start in (
        (["files", "files", long], "text_1[2]: the query and instruction leave no room"),
        ([long] * 3, "the query and instruction leave no room"),
        (long, "the query and instruction leave no room"),
    ):
        response = post(short, text_1=queries, text_2=["a", "b", "c"])
        assert response.status_code == 422
        assert response.json()["detail"].startswith(start)


def test_unread_fields_are_reported_and_vllms_defaults_are_not(fake_server: Server) -> None:
    defaults = {
        "truncate_prompt_tokens": -1,
        "truncation_side": "right",
        "priority": 0,
        "user": "u",
        "request_id": "r",
        "cache_salt": "s",
        "max_tokens_per_query": 0,
        "max_tokens_per_doc": 0,
        "chat_template_kwargs": {"instruction": "find"},
        "mm_processor_kwargs": None,
        "padding": "do_not_pad",
    }
    response = post(fake_server, model="m", queries="q", documents=["a"], **defaults)
    assert response.status_code == 200
    assert not {"x-ignored-fields", "x-warnings"} & set(response.headers)
    more = {"truncate_prompt_tokens": 100, "top_n": 1, "return_documents": True, "items": ["b"], "text_1": "c"}
    response = post(fake_server, queries="q", documents=[{"text": "a", "title": "t"}, "b"], **more)
    assert len(scores(response)) == 2
    assert response.headers["x-ignored-fields"].split(", ") == [
        "truncate_prompt_tokens", "items", "text_1", "documents.title", "top_n", "return_documents"
    ]  # fmt: skip
    assert "truncate_prompt_tokens is not read; did you mean truncate?" in response.headers["x-warnings"]


@pytest.mark.parametrize("queries", ["how to compress files", ["how to compress files", "a board game", "the weather"]])
def test_a_pair_scores_as_its_documents_in_a_rerank_request(server: Server, queries: str | list[str]) -> None:
    documents = ["gzip compresses files", "chess is a game for two", "it rains in the north"]
    got = scores(post(server, queries=queries, documents=documents, instruction="find", use_activation=False))
    expected = []
    for i, document in enumerate(documents):
        query = queries if isinstance(queries, str) else queries[i]
        body = {"query": query, "documents": [document], "instruction": "find", "raw_scores": True}
        expected.append(server.client.post("/v1/rerank", json=body).json()[0]["score"])
    assert got == pytest.approx(expected, abs=1e-4)


def test_one_line_in_the_log_and_one_request_in_the_metrics(start: Start) -> None:
    server = start(command=FAKE)
    post(server, "/v1/score", queries=QUERIES, documents=DOCUMENTS)
    until(lambda: "/score" in server.log, "the access line of the request")  # written after the response
    lines = [line for line in server.log.splitlines() if "/score" in line]
    assert len(lines) == 1
    assert "POST /v1/score 200" in lines[0]
    assert "documents=3 queries=2 tokens=36" in lines[0]
    metrics = server.client.get("/metrics").text
    assert 'reranker_requests_total{route="/v1/score",status="200"} 1.0' in metrics
    assert "reranker_prompt_tokens_total 36.0" in metrics
    assert "reranker_queue_wait_seconds_count 1.0" in metrics
