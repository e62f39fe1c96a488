"""POST /score and /v1/score of vLLM: scores of pairs, in the order of the request.

Source: `ScoreRequest` and `ScoreResponse` in vLLM's vllm/entrypoints/pooling/scoring/protocol.py.
"""

from __future__ import annotations

import time
from typing import Any, Literal

from pydantic import BaseModel, Field

import reranker.http.dialects.cohere as cohere
from reranker.http.dialects.route import Route
from reranker.http.ranking import Ranking
from reranker.request.fields import DOCUMENT, FIELDS
from reranker.request.pairs import NOT_READ, SHAPES, parse_pairs
from reranker.request.schema import RANK_FIELDS, no_zero, options


class PairScore(BaseModel):
    """The score of one pair."""

    index: int = Field(ge=0, description="Position in the list of documents, from 0")
    object: Literal["score"]
    score: float = cohere.SCORE


class Scores(BaseModel):
    """The scores of all pairs, in the order of the documents."""

    id: str = Field(description="The x-request-id of the response")
    object: Literal["list"]
    created: int = Field(ge=0, description="Seconds since 1970")
    model: str = Field(description="The served model, whatever name the request has")
    data: list[PairScore]
    usage: cohere.Usage


REQUESTS: dict[str, object] = {
    "one query": {"model": "any", "queries": "what is a cat?", "documents": ["a bread", "a small animal"]},
    "a query for each document": {"text_1": ["what is a cat?", "what is a loaf?"], "text_2": ["an animal", "a bread"]},
}
"""Examples for the OpenAPI document, here and below."""
RESPONSE: dict[str, Any] = {
    "id": "5f2c9a1b7d3e4c60",
    "object": "list",
    "created": 1767225600,
    "model": "Qwen/Qwen3-Reranker-0.6B",
    "data": [{"index": 0, "object": "score", "score": 0.02}, {"index": 1, "object": "score", "score": 0.97}],
    "usage": {"prompt_tokens": 171, "completion_tokens": 0, "total_tokens": 171},
}


def scores(ranking: Ranking) -> dict[str, object]:
    """Render `{"id", "object", "created", "model", "data": [{"index", "object", "score"}], "usage"}`."""
    return {
        "id": ranking.request_id,
        "object": "list",
        "created": int(time.time()),
        "model": ranking.model.name,
        "data": [{"index": i, "object": "score", "score": score} for i, score in sorted(ranking.best)],
        "usage": cohere.usage(ranking),
    }


def _shape_schema(queries: str, documents: str) -> dict[str, Any]:
    query = FIELDS["query"].schema
    texts = {"type": "array", "minItems": 1}
    plain = {"anyOf": [DOCUMENT, {**texts, "items": DOCUMENT}]}
    any_document = {"anyOf": [{"type": "string"}, {"type": "object"}]}
    return {
        "required": [queries, documents],
        "properties": {
            queries: {"anyOf": [query, {**texts, "items": query}]},
            documents: {"anyOf": [any_document, {**texts, "items": any_document}]},
        },
        "if": RANK_FIELDS,
        "else": {"properties": {documents: plain}},
    }


SCHEMA: dict[str, Any] = {
    "title": "ScoreBody",
    "description": "Score pairs of queries and documents: one query for all documents, or as many queries as documents "
    "(a rule that this schema cannot express).",
    "type": "object",
    "properties": options(*NOT_READ),
    "anyOf": [_shape_schema(*shape) for shape in SHAPES],
    "allOf": [no_zero(*NOT_READ)],
}
"""JSON Schema of a request body."""
ROUTE = Route(
    "/score",
    scores,
    "score",
    "Score pairs of queries and documents: vLLM",
    "One query for all documents, or one for each; the scores are in the order of the documents, unsorted.",
    Scores,
    REQUESTS,
    {"one query": RESPONSE},
    parse=parse_pairs,
    schema=SCHEMA,
)
