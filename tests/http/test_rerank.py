from __future__ import annotations

import json
from typing import Any

import pytest

from reranker.engine.scores import sigmoid
from tests.conftest import Server

ALIASES = ["/v1/reranks", "/reranks", "/reranking", "/v1/reranking"]
ALL = ["/v1/rerank", "/api/v1/rerank", "/rerank", "/v2/rerank", "/api/v2/rerank", *ALIASES]
"""The routes that read the common body."""
DOCUMENTS = ["a bird", "red fish", "a fish", "red red", "nothing", "a red fish swims", ""]


def ranked(answer: Any) -> list[tuple[int, float]]:
    """Return (index, score) pairs of a response in any dialect."""
    rows = answer["results"] if isinstance(answer, dict) else answer
    return [(row["index"], row.get("score", row.get("relevance_score"))) for row in rows]


@pytest.mark.parametrize(("top", "raw"), [(None, False), (3, False), (3, True), (99, False)])
def test_order_and_scores_never_change_by_dialect(server: Server, top: int | None, raw: bool) -> None:
    seen = []
    for path in ALL:
        for body in ({"documents": DOCUMENTS}, {"documents": DOCUMENTS, "model": "m"}, {"texts": DOCUMENTS}):
            answer = server.client.post(path, json={"query": "red fish", "top_n": top, "raw_scores": raw, **body})
            assert answer.status_code == 200, answer.text
            seen.append(ranked(answer.json()))
    assert len(seen[0]) == min(top or 99, len(DOCUMENTS))
    assert seen[0] == sorted(seen[0], key=lambda row: (-row[1], row[0]))
    for other in seen:
        assert [i for i, _ in other] == [i for i, _ in seen[0]]
        assert [s for _, s in other] == pytest.approx([s for _, s in seen[0]], abs=1e-5)


@pytest.mark.parametrize(
    ("path", "keys", "shape"),
    [
        ("/v1/rerank", {}, list),
        ("/v1/rerank", {"model": "m"}, {"id", "model", "results", "usage", "meta"}),
        ("/v1/rerank", {"model": None}, list),
        ("/v1/rerank", {"model": ""}, {"id", "model", "results", "usage", "meta"}),
        ("/v1/rerank", {"texts": None}, list),
        ("/v1/rerank", {"texts": None, "model": "m"}, {"id", "model", "results", "usage", "meta"}),
        ("/api/v1/rerank", {"model": None, "texts": None}, {"results"}),
        ("/api/v1/rerank", {}, {"results"}),
        ("/api/v1/rerank", {"model": "m"}, {"id", "model", "results", "usage", "meta"}),
        ("/rerank", {}, {"id", "model", "results", "usage", "meta"}),
        ("/v2/rerank", {}, {"id", "model", "results", "usage", "meta"}),
        ("/api/v2/rerank", {}, {"id", "model", "results", "usage", "meta"}),
        *((path, {}, {"id", "model", "results", "usage", "meta"}) for path in ALIASES),
    ],
)
def test_the_table_of_routes(fake_server: Server, path: str, keys: dict[str, object], shape: Any) -> None:
    content = fake_server.client.post(path, json={"query": "q", "documents": ["a"], **keys}).json()
    assert isinstance(content, list) if shape is list else set(content) == shape
    if path == "/api/v1/rerank":
        assert content["results"][0]["text"] == "a"
        assert "document" not in content["results"][0]


WRONG: list[tuple[dict[str, object], str]] = [
    ({}, "query: is required"),
    ({"query": "q"}, "documents: is required"),
    ({"query": " ", "documents": ["a"]}, "query: must not be empty"),
    ({"query": 5, "documents": ["a"]}, "query: must be a string"),
    ({"query": "q", "documents": []}, "documents: "),
    ({"query": "q", "documents": "a"}, "documents: "),
    ({"query": "q", "documents": ["a", {"image": "x"}]}, "documents[1]: must be a string or an object"),
    ({"query": "q", "documents": ["a"] * 2049}, "documents: at most 2048 in one request"),
    ({"query": "q", "documents": ["a"], "top_k": 0}, "top_k: must be a whole number of at least 1"),
    ({"query": "q", "documents": ["a"], "top_n": -1}, "top_n: must be a whole number of at least 1"),
    ({"query": "q", "documents": ["a"], "top_k": True}, "top_k: "),
    ({"query": "q", "documents": ["a"], "top_n": 1.5}, "top_n: "),
    ({"query": "q", "documents": ["a"], "top_n": "3.5"}, "top_n: must be a whole number of at least 1"),
    ({"query": "q", "documents": ["a"], "top_n": "0"}, "top_n: must be a whole number of at least 1"),
    ({"query": "q", "documents": ["a"], "model": 5}, "model: must be a string"),
    ({"query": "q", "documents": ["a"], "instruct": []}, "instruct: must be a string"),
    ({"query": "q", "documents": ["a"], "return_documents": "maybe"}, "return_documents: must be true or false"),
    ({"query": "q", "documents": ["a"], "raw_scores": []}, "raw_scores: must be true or false"),
    ({"query": "q", "documents": ["a"], "max_tokens_per_doc": 0}, "max_tokens_per_doc: must be a whole number"),
    ({"query": "q", "documents": ["a"], "max_chunks_per_doc": "five"}, "max_chunks_per_doc: must be a whole number"),
    ({"query": "too long", "documents": ["a"]}, "the query leaves no room for a document"),
]


@pytest.mark.parametrize("path", ALL)
def test_what_is_wrong_is_named_in_the_same_words_everywhere(fake_server: Server, path: str) -> None:
    for body, detail in WRONG:
        answer = fake_server.client.post(path, json=body)
        assert answer.status_code == 422, body
        assert set(answer.json()) == {"detail", "error_type", "message", "error"}
        assert answer.json()["error_type"] == "invalid_request"
        assert answer.json()["detail"].startswith(detail)
        error = {"message": answer.json()["detail"], "type": "invalid_request"}
        assert (answer.json()["message"], answer.json()["error"]) == (error["message"], error)


@pytest.mark.parametrize("path", ALL)
def test_bodies_that_are_not_json(fake_server: Server, path: str) -> None:
    json_type = {"Content-Type": "application/json"}
    for content, headers, status in (
        (b"{", json_type, 400),
        (b"\xff\xfe", json_type, 400),
        (b"[" * 100_000, json_type, 400),
        (b"[]", json_type, 422),
        (b"{}", {"Content-Type": "text/plain"}, 415),
    ):
        answer = fake_server.client.post(path, content=content, headers=headers)
        assert answer.status_code == status
        assert isinstance(answer.json()["detail"], str)


@pytest.mark.parametrize("yes", [True, "true", "True", 1, "1"])
@pytest.mark.parametrize("path", ["/v1/rerank", "/v2/rerank"])
def test_booleans_are_lenient(fake_server: Server, path: str, yes: object) -> None:
    body = {"query": "q", "documents": ["a"], "return_documents": yes, "return_text": None}
    content = fake_server.client.post(path, json=body).json()
    row = content["results"][0] if isinstance(content, dict) else content[0]
    assert row.get("document", row.get("text")) in ({"text": "a"}, "a")


def test_nulls_and_unknown_keys_are_ignored_and_the_other_name_counts(fake_server: Server) -> None:
    nulls = dict.fromkeys(
        "top_k instruction return_documents max_tokens_per_doc max_chunks_per_doc raw_scores truncate".split()
    )
    body = {"query": "red fish", "documents": ["a", "fish"], **nulls, "top_n": 1, "user": "me", "rank_fields": None}
    assert ranked(fake_server.client.post("/v1/rerank", json=body).json()) == [(1, sigmoid(1))]


def test_the_instruction_reaches_the_model_under_both_names(server: Server) -> None:
    body = {"query": "red fish", "documents": ["a fish that is red"], "raw_scores": True}
    scores = [
        server.client.post("/v1/rerank", json=body | more).json()[0]["score"]
        for more in ({}, {"instruction": "Find the bug"}, {"instruct": "Find the bug"})
    ]
    assert scores[0] != pytest.approx(scores[1], abs=1e-4)
    assert scores[1] == pytest.approx(scores[2], abs=1e-6)


def test_openapi_describes_both_answers_of_every_route(fake_server: Server) -> None:
    document = fake_server.client.get("/openapi.json").json()
    for path in ALL:
        post = document["paths"][path]["post"]
        [content] = [post["requestBody"]["content"]["application/json"]]
        assert len(content["schema"]["oneOf"]) == 2
        for example in content["examples"].values():
            assert fake_server.client.post(path, json=example["value"]).status_code == 200
        answer = post["responses"]["200"]["content"]["application/json"]
        name = answer["schema"]["$ref"].rpartition("/")[2]
        assert len(document["components"]["schemas"][name]["oneOf"]) == 2
        assert answer["examples"]
        assert {"400", "401", "408", "413", "415", "422", "429", "431", "500", "503", "504"} <= set(post["responses"])
    assert '"object"' not in json.dumps(document["components"]["schemas"]["Results"]["properties"])
