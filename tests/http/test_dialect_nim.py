from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.conftest import Server

BODY: dict[str, Any] = {
    "model": "nvidia/llama-nemotron-rerank-1b-v2",
    "query": {"text": "red fish"},
    "passages": [{"text": "a bird"}, {"text": "red fish"}, {"text": "a fish"}],
}
LONG = " ".join(f"word{i} of a long story" for i in range(60))


def post(server: Server, **more: Any) -> httpx.Response:
    return server.client.post("/v1/ranking", json=BODY | more)


def test_logits_best_first(fake_server: Server) -> None:
    for more in ({}, {"truncate": "END"}, {"truncate": "NONE"}, {"truncate": None}, {"query": "red fish"}):
        response = post(fake_server, **more)
        assert response.json() == {
            "rankings": [{"index": 1, "logit": 2.0}, {"index": 2, "logit": 1.0}, {"index": 0, "logit": 0.0}],
            "usage": {"prompt_tokens": 36, "completion_tokens": 0, "total_tokens": 36},
        }
        assert "x-ignored-fields" not in response.headers


def test_truncate_is_honoured(short: Server) -> None:
    for more in ({"passages": [{"text": "a"}, {"text": LONG}]}, {"query": {"text": LONG}}):
        for truncate in ("END", True):  # true: as the error of "NONE" advises
            truncated = post(short, truncate=truncate, **more)
            assert truncated.status_code == 200
            assert truncated.headers["x-truncated-documents"] == ("1" if "passages" in more else "0")
        refused = post(short, truncate="NONE", **more)
        assert refused.status_code == 422
        if "passages" in more:
            assert refused.json()["detail"].startswith("passages[1]: longer than the ")


@pytest.mark.parametrize(
    ("more", "detail"),
    [
        ({"passages": None}, "passages: is required"),
        (
            {"passages": None, "documents": ["a"]},
            'passages: is required; "documents" is not read, did you mean passages?',
        ),
        ({"passages": []}, "passages: must hold at least one text"),
        ({"passages": [{"text": "a"}, {"text": 1}]}, "passages[1]: must be a string or an object"),
        ({"passages": ["a"] * 2049}, "passages: at most 2048"),
        ({"query": None}, "query: is required"),
        ({"query": {}}, "query.text: must be a string; got null"),
        ({"query": {"text": " "}}, "query.text: must not be empty"),
        ({"query": 5}, "query: must be a string"),
        ({"truncate": "START"}, 'truncate: must be "END" or "NONE"'),
        ({"truncate": 1}, 'truncate: must be "END" or "NONE"'),
    ],
)
def test_errors_have_nims_names(fake_server: Server, more: dict[str, Any], detail: str) -> None:
    response = post(fake_server, **more)
    assert response.status_code == 422, response.text
    assert response.json()["detail"].startswith(detail)


def test_unread_fields_are_reported(fake_server: Server) -> None:
    passages = [{"text": "a", "image": "data:"}]
    query = {"image": "data:", "a b": 1, "text": "q", "id": None}
    response = post(fake_server, query=query, passages=passages, raw_scores=False, topk=1)
    assert response.headers["x-ignored-fields"] == "topk, passages.image, raw_scores, query.image, query.a_b"
    assert "did you mean top_k?" in response.headers["x-warnings"]
