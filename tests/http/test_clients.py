"""Request bodies of real clients, recorded or read in their source code; tests/clients runs the clients themselves."""

from __future__ import annotations

from typing import Any

import pytest

from reranker.engine.scores import sigmoid
from reranker.request.fields import FIELDS
from tests.conftest import Server
from tests.request.bodies import wear

QUERY = "red fish"
DOCUMENTS = ["a bird", "red fish", "a fish"]
RANKING = [(1, sigmoid(2)), (2, sigmoid(1)), (0, sigmoid(0))]
OBJECTS = [{"text": text} for text in DOCUMENTS]
BASE: dict[str, Any] = {"model": "some-reranker", "query": QUERY, "documents": DOCUMENTS}
TEI = {"query": QUERY, "texts": DOCUMENTS}
XINFERENCE = {"max_chunks_per_doc": None, "return_documents": None, "return_len": None, "kwargs": "{}"}

# name, path, body, whether texts come back
RESULTS: list[tuple[str, str, dict[str, Any], bool]] = [
    ("cohere Client", "/v1/rerank", BASE, False),
    ("cohere Client with options", "/v1/rerank", BASE | {"top_n": 3, "return_documents": True}, True),
    ("cohere ClientV2", "/v2/rerank", BASE | {"top_n": 3}, False),
    ("langchain-cohere", "/v2/rerank", BASE | {"top_n": 3, "max_tokens_per_doc": None}, False),
    ("llama-index cohere", "/v2/rerank", BASE | {"top_n": 3}, False),
    ("cohere-haystack", "/v2/rerank", BASE | {"top_n": 10, "max_tokens_per_doc": 4096}, False),
    ("llama-index jinaai", "/v1/rerank", BASE | {"top_n": 3}, False),
    ("langchain-community jina", "/v1/rerank", BASE | {"top_n": 3}, False),
    ("jina-haystack", "/v1/rerank", BASE | {"top_n": 3}, False),
    ("LightRAG", "/rerank", BASE | {"top_n": 3, "return_documents": False}, False),
    ("Open WebUI", "/v1/rerank", BASE | {"top_n": 3}, False),
    ("infinity_client", "/rerank", BASE | {"return_documents": False, "raw_scores": False}, False),
    ("xinference-client", "/v1/rerank", BASE | {"top_n": None, **XINFERENCE}, False),
    ("litellm cohere/", "/v1/rerank", BASE | {"top_n": 3, "return_documents": True}, True),
    ("litellm cohere/ to v2", "/v2/rerank", BASE | {"return_documents": True}, True),
    ("litellm jina_ai/", "/v1/rerank", BASE | {"top_n": 3, "return_documents": True}, True),
    ("litellm hosted_vllm/", "/rerank", BASE | {"top_n": 3, "return_documents": True}, True),
    ("rerankers, Cohere", "/v1/rerank", BASE | {"top_n": 3, "return_documents": True}, True),
    ("rerankers, Jina", "/v1/rerank", BASE | {"top_n": 3, "return_documents": True}, True),
    ("Dify OpenAI-compatible", "/v1/rerank", BASE | {"top_n": None, "return_documents": True}, True),
    ("Dify Jina", "/v1/rerank", BASE | {"top_n": None, "return_documents": False}, False),
    (
        "Dify Jina, newer models",
        "/v1/rerank",
        BASE | {"documents": [{"text": d} for d in DOCUMENTS], "top_n": None, "return_documents": False},
        False,
    ),
    ("Dify Cohere", "/v1/rerank", BASE | {"top_n": None, "return_documents": True, "max_chunks_per_doc": None}, True),
    ("RAGFlow Xinference", "/v1/rerank", BASE | {"return_documents": "true", "return_len": "true"}, True),
    ("RAGFlow LocalAI, VLLM, OpenAI", "/rerank", BASE | {"top_n": 3}, False),
    (
        "RAGFlow SiliconFlow",
        "/v1/rerank",
        BASE | {"top_n": 3, "return_documents": False, "max_chunks_per_doc": 1024, "overlap_tokens": 80},
        False,
    ),
    ("FastGPT", "/v1/rerank", BASE, False),
    ("vLLM's example", "/rerank", BASE, False),
    ("vLLM's published client of Qwen3-Reranker", "/rerank", {"model": "m"} | wear(QUERY, DOCUMENTS), False),
    ("vLLM's request type", "/rerank", BASE | {"top_n": 0, "priority": 0, "user": "u", "request_id": "r"}, False),
    (
        "new-api",
        "/v1/rerank",
        BASE | {"documents": OBJECTS, "top_n": 3, "max_chunk_per_doc": 0, "overlap_tokens": 0},
        False,
    ),
    ("bifrost", "/v1/rerank", BASE | {"documents": [o | {"id": "1", "meta": {}} for o in OBJECTS]}, False),
    ("a client in Go", "/v1/rerank", BASE | {"top_n": 0, "max_tokens_per_doc": 0, "max_chunks_per_doc": 0}, False),
    ("a form of a low-code client", "/v1/rerank", BASE | {"top_n": "3", "return_documents": "", "instruct": ""}, False),
    ("typed clients that write every field", "/rerank", dict.fromkeys(FIELDS) | {"return_len": None} | BASE, False),
    (
        "cohere-ai v1 with rankFields",
        "/v1/rerank",
        BASE | {"documents": OBJECTS, "rank_fields": ["text"], "max_chunks_per_doc": 10},
        False,
    ),
    ("Weaviate reranker-cohere", "/v1/rerank", BASE | {"return_documents": False}, False),
    ("Weaviate reranker-transformers", "/rerank", {"query": QUERY, "documents": DOCUMENTS, "property": ""}, False),
]


@pytest.mark.parametrize(("path", "body", "texts"), [row[1:] for row in RESULTS], ids=[row[0] for row in RESULTS])
def test_clients_of_the_results_object(fake_server: Server, path: str, body: dict[str, Any], texts: bool) -> None:
    answer = fake_server.client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    content = answer.json()
    assert [(row["index"], row["relevance_score"]) for row in content["results"]] == RANKING
    assert [row.get("document") for row in content["results"]] == [
        {"text": DOCUMENTS[i]} if texts else None for i, _ in RANKING
    ]
    assert content["model"] == "fake"
    assert content["usage"]["total_tokens"] == content["meta"]["tokens"]["input_tokens"] == 36
    assert "object" not in content
    assert "x-ignored-fields" not in answer.headers


ARRAY: list[tuple[str, str, dict[str, Any], bool]] = [
    ("native", "/v1/rerank", {"query": QUERY, "documents": DOCUMENTS}, False),
    ("native with top_k", "/v1/rerank", {"query": QUERY, "documents": DOCUMENTS, "top_k": 3}, False),
    ("llama-index tei", "/rerank", TEI, False),
    ("haystack tei", "/rerank", TEI | {"raw_scores": False, "truncate": True, "truncation_direction": "Right"}, False),
    ("rerankers, TEI", "/rerank", TEI | {"model": "m", "top_n": 3, "return_text": True}, True),
    ("Dify TEI", "/rerank", TEI | {"return_text": True}, True),
    (
        "litellm huggingface/",
        "/rerank",
        TEI
        | {"top_n": 3, "raw_scores": False, "truncate": False, "truncation_direction": "Right", "return_text": True},
        True,
    ),
    ("Continue", "/rerank", TEI | {"return_text": False, "raw_scores": False, "truncation_direction": "Right"}, False),
    ("R2R", "/rerank", TEI | {"model-id": "m"}, False),
    ("kotaemon", "/rerank", TEI | {"is_truncated": True}, False),
]


@pytest.mark.parametrize(("path", "body", "texts"), [row[1:] for row in ARRAY], ids=[row[0] for row in ARRAY])
def test_clients_of_the_array(fake_server: Server, path: str, body: dict[str, Any], texts: bool) -> None:
    answer = fake_server.client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    assert [(row["index"], row["score"]) for row in answer.json()] == RANKING
    assert [row.get("text") for row in answer.json()] == [DOCUMENTS[i] if texts else None for i, _ in RANKING]
    assert "x-ignored-fields" not in answer.headers


def test_clients_of_the_native_results(fake_server: Server) -> None:
    rows = fake_server.client.post("/api/v1/rerank", json={"query": QUERY, "documents": DOCUMENTS}).json()["results"]
    assert [(row["index"], row["relevance_score"], row["text"]) for row in rows] == [
        (i, score, DOCUMENTS[i]) for i, score in RANKING
    ]
