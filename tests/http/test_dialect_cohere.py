from __future__ import annotations

from typing import Any

import pytest

from reranker.engine.scores import sigmoid
from tests.conftest import Server
from tests.http.test_rerank import ALIASES

BODY = {"model": "rerank-v3.5", "query": "red fish", "documents": ["a bird", {"text": "red fish"}, "a fish"]}
PATHS = ["/v1/rerank", "/rerank", "/v2/rerank", "/api/v2/rerank", *ALIASES]


def post(server: Server, path: str, **more: object) -> dict[str, Any]:
    answer = server.client.post(path, json=BODY | more, headers={"x-request-id": "id-7"})
    assert answer.status_code == 200, answer.text
    content = answer.json()
    assert isinstance(content, dict)
    return content


@pytest.mark.parametrize("path", PATHS)
def test_the_results_object(fake_server: Server, path: str) -> None:
    assert post(fake_server, path, top_n=2) == {
        "id": "id-7",
        "model": "fake",
        "results": [{"index": 1, "relevance_score": sigmoid(2)}, {"index": 2, "relevance_score": sigmoid(1)}],
        "usage": {"prompt_tokens": 36, "completion_tokens": 0, "total_tokens": 36},
        "meta": {
            "api_version": {"version": "2"},
            "billed_units": {"search_units": 1},
            "tokens": {"input_tokens": 36, "output_tokens": 0},
        },
    }


def test_documents_are_answered_as_objects_with_a_text(fake_server: Server) -> None:
    got = post(fake_server, "/v2/rerank", return_documents=True)
    assert [row["document"] for row in got["results"]] == [{"text": "red fish"}, {"text": "a fish"}, {"text": "a bird"}]


@pytest.mark.parametrize(("documents", "units"), [(1, 1), (100, 1), (101, 2), (250, 3)])
def test_a_search_unit_is_a_hundred_documents_begun(fake_server: Server, documents: int, units: int) -> None:
    got = post(fake_server, "/v2/rerank", documents=["x"] * documents, top_n=1)
    assert got["meta"]["billed_units"] == {"search_units": units}


LONG = " ".join(f"word{i} of a long story" for i in range(60))
# Words that are one token in any English vocabulary, so that a chunk of 40 tokens begins at "gzip".
FINDABLE = " ".join(["the of and a in to by at"] * 15 + ["gzip compresses files on Linux"] + ["the of and a"] * 20)


def test_what_was_cut_is_said(short: Server) -> None:
    body = {"model": "m", "query": "how to compress files", "documents": [LONG, "gzip compresses files", LONG]}
    answer = short.client.post("/rerank", json=body)
    [warning] = answer.json()["meta"]["warnings"]
    assert warning.startswith("2 of 3 documents did not fit and were truncated")
    assert answer.headers["x-truncated-documents"] == "2"
    whole = short.client.post("/rerank", json=body | {"documents": ["gzip compresses files"]})
    assert "warnings" not in whole.json()["meta"]
    cut = short.client.post("/rerank", json=body | {"documents": ["gzip compresses files"], "max_tokens_per_doc": 2})
    assert cut.headers["x-truncated-documents"] == "1"
    assert int(cut.headers["x-prompt-tokens"]) < int(whole.headers["x-prompt-tokens"])


def test_a_split_document_has_the_score_of_its_best_chunk(short: Server) -> None:
    body = {"model": "m", "query": "how to compress files", "documents": ["a game of chess", FINDABLE]}
    more = {"max_chunks_per_doc": 50, "max_tokens_per_doc": 40, "return_documents": True, "raw_scores": True}
    got = short.client.post("/rerank", json=body | more).json()
    assert "warnings" not in got["meta"]
    rows = {row["index"]: row for row in got["results"]}
    assert "best_chunk" not in rows[0]
    assert rows[1]["document"] == {"text": FINDABLE}
    chunk = rows[1]["best_chunk"]["text"]
    assert rows[1]["best_chunk"]["index"] == 3
    assert chunk.strip().startswith("gzip compresses files")
    assert chunk in FINDABLE
    # The chunk as a separate document gets the same logit.
    alone = short.client.post(
        "/v1/rerank", json={"query": body["query"], "documents": [chunk.strip()], "raw_scores": True}
    ).json()
    assert rows[1]["relevance_score"] == pytest.approx(alone[0]["score"], abs=1e-3)
    # With fewer chunks the document is truncated before this chunk, so its score is lower.
    fewer = short.client.post("/rerank", json=body | more | {"max_chunks_per_doc": 3}).json()
    assert fewer["meta"]["warnings"]
    assert {row["index"]: row for row in fewer["results"]}[1]["relevance_score"] < rows[1]["relevance_score"]


@pytest.mark.parametrize("path", ["/v1/rerank", "/v2/rerank", "/api/v1/rerank"])
def test_a_document_that_may_not_be_cut_is_named(short: Server, path: str) -> None:
    body = {"query": "how to compress files", "documents": ["short", "x", LONG], "truncate": False}
    answer = short.client.post(path, json=body)
    assert answer.status_code == 422
    assert answer.json()["error_type"] == "invalid_request"
    assert answer.json()["detail"].startswith("documents[2]: longer than the ")
    assert "story" not in answer.text
    enough = short.client.post(path, json=body | {"max_chunks_per_doc": 64})
    assert enough.status_code == 200


def test_tei_cuts_whatever_truncate_says(short: Server) -> None:
    answer = short.client.post("/rerank", json={"query": "files", "texts": [LONG, "gzip"], "truncate": False})
    assert answer.status_code == 200
    assert answer.headers["x-truncated-documents"] == "1"
    assert len(answer.json()) == 2
