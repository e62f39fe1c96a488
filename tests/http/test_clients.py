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
    ("OpenAI to Alibaba's compatible API", "/v1/reranks", BASE | {"top_n": 3, "instruct": "find"}, False),
    ("litellm dashscope/", "/v1/reranks", BASE | {"top_n": 3, "return_documents": True}, True),
    ("LocalAI's and llama.cpp's names", "/v1/reranking", BASE | {"top_n": 3}, False),
    ("llama.cpp without a model", "/reranking", {"query": QUERY, "documents": DOCUMENTS, "top_n": 3}, False),
    ("AI SDK, Together", "/v1/rerank", BASE | {"top_n": 3, "return_documents": False}, False),
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
    assert content["usage"] == {"prompt_tokens": 36, "completion_tokens": 0, "total_tokens": 36}
    assert content["meta"]["tokens"]["input_tokens"] == 36
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


def test_the_cohere_v1_client_at_api_has_its_keys(fake_server: Server) -> None:
    body = BASE | {"return_documents": True, "max_chunks_per_doc": 10}
    rows = fake_server.client.post("/api/v1/rerank", json=body).json()["results"]
    assert [(row["index"], row["relevance_score"], row["document"]) for row in rows] == [
        (i, score, {"text": DOCUMENTS[i]}) for i, score in RANKING
    ]


SCORE: list[tuple[str, str, dict[str, Any]]] = [
    ("vLLM's present example", "/score", {"model": "m", "queries": [QUERY] * 3, "documents": DOCUMENTS}),
    ("vLLM's tests, one query", "/v1/score", {"model": "m", "queries": QUERY, "documents": DOCUMENTS}),
    (
        "vLLM's older names",
        "/v1/score",
        {"model": "m", "encoding_format": "float", "text_1": QUERY, "text_2": DOCUMENTS},
    ),
    ("vLLM's data names", "/score", {"model": "m", "data_1": QUERY, "data_2": DOCUMENTS, "truncate_prompt_tokens": -1}),
    ("SGLang's names", "/v1/score", {"model": "m", "queries": QUERY, "items": DOCUMENTS}),
    (
        "vLLM's example with the template in its texts",
        "/score",
        {"model": "m", "queries": [wear(QUERY, [])["query"]] * 3, "documents": wear(QUERY, DOCUMENTS)["documents"]},
    ),
]


@pytest.mark.parametrize(("path", "body"), [row[1:] for row in SCORE], ids=[row[0] for row in SCORE])
def test_clients_of_scores(fake_server: Server, path: str, body: dict[str, Any]) -> None:
    answer = fake_server.client.post(path, json=body)
    assert [row["score"] for row in answer.json()["data"]] == [score for _, score in sorted(RANKING)]
    assert "x-ignored-fields" not in answer.headers


def test_clients_of_the_template_with_several_queries(fake_server: Server) -> None:
    queries = [wear(query, [], query)["query"] for query in (QUERY, "a bird", QUERY)]
    body = {"queries": queries, "documents": wear("", DOCUMENTS)["documents"]}
    answer = fake_server.client.post("/score", json=body)
    assert [row["score"] for row in answer.json()["data"]] == [sigmoid(0), sigmoid(0), sigmoid(1)]
    assert answer.headers["x-warnings"].startswith("queries: Qwen's prompt template was taken off query and documents")


PASSAGES = {"query": {"text": QUERY}, "passages": OBJECTS}


@pytest.mark.parametrize(
    "body",
    [
        {"model": "m"} | PASSAGES,  # langchain, llama-index
        {"model": "m", "truncate": "END"} | PASSAGES,
        {"model": "m", "truncate": "NONE"} | PASSAGES,  # litellm nvidia_nim/ranking/
    ],
)
def test_clients_of_nvidias_rankings(fake_server: Server, body: dict[str, Any]) -> None:
    answer = fake_server.client.post("/v1/ranking", json=body)
    assert [(row["index"], sigmoid(row["logit"])) for row in answer.json()["rankings"]] == RANKING
    assert answer.json()["usage"]["total_tokens"] == 36  # litellm
    assert "x-ignored-fields" not in answer.headers


@pytest.mark.parametrize(
    "parameters",
    [
        {},
        {"top_n": 3},  # llama-index
        {"top_n": 3, "return_documents": False},  # LightRAG
        {"top_n": 3, "return_documents": True, "instruct": "find"},  # the SDK with all options
    ],
)
def test_clients_of_dashscope(fake_server: Server, parameters: dict[str, Any]) -> None:
    body = {"model": "gte-rerank", "parameters": parameters, "input": {"query": QUERY, "documents": DOCUMENTS}}
    answer = fake_server.client.post("/api/v1/services/rerank/text-rerank/text-rerank", json=body)
    rows = answer.json()["output"]["results"]
    assert [(row["index"], row["relevance_score"]) for row in rows] == RANKING
    assert [row.get("document") for row in rows] == [
        {"text": DOCUMENTS[i]} if parameters.get("return_documents") else None for i, _ in RANKING
    ]
    assert "x-ignored-fields" not in answer.headers
