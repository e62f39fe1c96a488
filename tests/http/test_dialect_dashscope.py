from __future__ import annotations

from typing import Any

import httpx
import pytest

from reranker.engine.scores import sigmoid
from tests.conftest import FAKE, Server, Start

PATH = "/api/v1/services/rerank/text-rerank/text-rerank"
INPUT: dict[str, Any] = {"query": "red fish", "documents": ["a bird", "red fish", "a fish"]}
BODY: dict[str, Any] = {"model": "qwen3-rerank", "input": INPUT}


def post(server: Server, parameters: object = None, **more: Any) -> httpx.Response:
    body = BODY | {"parameters": parameters} | more
    return server.client.post(PATH, json=body, headers={"x-request-id": "id-7"})


def test_the_results_are_in_the_output(fake_server: Server) -> None:
    assert post(fake_server, {"top_n": 2, "return_documents": True, "instruct": "find"}).json() == {
        "output": {
            "results": [
                {"index": 1, "relevance_score": sigmoid(2), "document": {"text": "red fish"}},
                {"index": 2, "relevance_score": sigmoid(1), "document": {"text": "a fish"}},
            ]
        },
        "usage": {"prompt_tokens": 36, "completion_tokens": 0, "total_tokens": 36},
        "request_id": "id-7",
    }
    for parameters in (None, {}, {"top_n": 0}, {"return_documents": None}):
        response = post(fake_server, parameters)
        assert [row["index"] for row in response.json()["output"]["results"]] == [1, 2, 0]
        assert "document" not in response.text
        assert "x-ignored-fields" not in response.headers
    assert post(fake_server, {"top_n": "0"}, model=None).status_code == 200


@pytest.mark.parametrize(
    ("more", "detail"),
    [
        ({"input": None}, 'input: is required, an object with "query" and "documents"'),
        ({"input": {}}, 'input: is required, an object with "query" and "documents"'),
        ({"input": "q"}, "input: must be an object; got a string"),
        ({"input": {"query": "q"}}, "input.documents: is required"),
        (
            {"input": {"query": "q", "docs": ["a"]}},
            'input.documents: is required; "docs" is not read, did you mean input.documents?',
        ),
        ({"input": {"query": "q", "documents": ["a", 1]}}, "input.documents[1]: must be a string or an object"),
        ({"input": {"query": " ", "documents": ["a"]}}, "input.query: must not be empty"),
        ({"parameters": {"top_n": -1}}, "parameters.top_n: must be a whole number"),
        ({"parameters": []}, "parameters: must be an object; got a list"),
        ({"model": 5}, "model: must be a string"),
        ({"input": {"query": "too long", "documents": ["a"]}}, "the query leaves no room"),
    ],
)
def test_errors_have_dashscopes_names_and_keys(fake_server: Server, more: dict[str, Any], detail: str) -> None:
    response = fake_server.client.post(PATH, json=BODY | more, headers={"x-request-id": "id-7"})
    assert response.status_code == 422, response.text
    content = response.json()
    assert content["message"].startswith(detail)
    assert (content["code"], content["request_id"]) == ("invalid_request", "id-7")
    assert {"detail", "error_type", "error"} < set(content)
    assert len(response.content) == int(response.headers["content-length"])


def test_fields_in_the_wrong_place_are_reported_with_the_right_one(fake_server: Server) -> None:
    response = post(fake_server, {"query": "q", "topn": 1}, top_n=1, input=INPUT | {"instruct": "i", "texts": ["a"]})
    assert len(response.json()["output"]["results"]) == 3
    assert response.headers["x-ignored-fields"] == "topn, top_n, input.instruct, input.texts, parameters.query"
    assert response.headers["x-warnings"].split(" | ") == [
        "topn is not read; did you mean parameters.top_n?",
        "top_n is not read; send parameters.top_n",
        "input.instruct is not read; send parameters.instruct",
        "input.texts is not read",
        "parameters.query is not read; send input.query",
    ]


def test_every_error_of_the_route_has_the_keys_and_no_other_route_has(start: Start) -> None:
    server = start(command=FAKE, ACCESS_TOKEN="t0k3n", token="t0k3n", MAX_BODY_BYTES="1024")
    bare = {"Authorization": "Bearer wrong"}
    responses = [
        server.client.post(PATH, json=BODY, headers=bare),
        server.client.get(PATH),
        server.client.post(PATH, content=b"x" * 2000),
        server.client.post(PATH, content=b"x", headers={"Content-Type": "text/plain"}),
        server.client.post(PATH, content=b"x", headers={"Content-Type": "application/json"}),
    ]
    assert [response.status_code for response in responses] == [401, 405, 413, 415, 400]
    for response in responses:
        content = response.json()
        assert content["code"] == content["error_type"]
        assert content["request_id"] == response.headers["x-request-id"]
        assert content["message"] == content["detail"]
    assert "code" not in server.client.post("/v1/rerank", json=BODY, headers=bare).json()
