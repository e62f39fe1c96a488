from __future__ import annotations

import pytest

from reranker.engine.scores import sigmoid
from tests.conftest import Server

BODY = {"query": "red fish", "documents": ["a bird", "red fish", "a fish"]}


def post(server: Server, path: str, **more: object) -> object:
    answer = server.client.post(path, json=BODY | more)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_the_native_array(fake_server: Server) -> None:
    assert post(fake_server, "/v1/rerank") == [
        {"index": 1, "score": sigmoid(2)},
        {"index": 2, "score": sigmoid(1)},
        {"index": 0, "score": sigmoid(0)},
    ]


def test_the_native_results_have_texts(fake_server: Server) -> None:
    assert post(fake_server, "/api/v1/rerank", top_k=2) == {
        "results": [
            {"index": 1, "relevance_score": sigmoid(2), "text": "red fish"},
            {"index": 2, "relevance_score": sigmoid(1), "text": "a fish"},
        ]
    }


def test_the_native_results_have_cohere_documents_beside_a_model_on_request(fake_server: Server) -> None:
    content = post(fake_server, "/api/v1/rerank", top_k=1, model="m", return_documents=True)
    assert isinstance(content, dict)
    assert content["results"] == [
        {"index": 1, "relevance_score": sigmoid(2), "text": "red fish", "document": {"text": "red fish"}}
    ]
    for more in ({"model": "m"}, {"return_documents": True}):
        assert "'document'" not in str(post(fake_server, "/api/v1/rerank", **more))


def test_texts_stand_in_the_array_when_they_are_asked_for(fake_server: Server) -> None:
    for flag in ("return_documents", "return_text"):
        assert post(fake_server, "/v1/rerank", top_k=1, **{flag: True}) == [
            {"index": 1, "score": sigmoid(2), "text": "red fish"}
        ]


@pytest.mark.parametrize("path", ["/v1/rerank", "/api/v1/rerank"])
def test_equal_scores_keep_the_order_of_the_documents(fake_server: Server, path: str) -> None:
    got = post(fake_server, path, documents=["a fish", "red fish", "one fish", "two fish", "no"])
    rows = got["results"] if isinstance(got, dict) else got
    assert isinstance(rows, list)
    assert [row["index"] for row in rows] == [1, 0, 2, 3, 4]


def test_every_answer_carries_counts_and_times(fake_server: Server) -> None:
    headers = fake_server.client.post("/v1/rerank", json=BODY, headers={"x-request-id": "mine"}).headers
    assert headers["x-request-id"] == "mine"
    assert headers["x-prompt-tokens"] == str(3 * 10 + 6)
    assert headers["x-truncated-documents"] == "0"
    for name in ("tokenization", "queue", "inference", "total"):
        assert float(headers[f"x-{name}-time"]) >= 0
