"""The native dialect, with the smallest responses.

POST /v1/rerank      -> [{"index", "score"}], best first
POST /api/v1/rerank  -> {"results": [{"index", "relevance_score", "text"}]}, best first
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field

import reranker.http.dialects.cohere as cohere
from reranker.http.ranking import Ranking


class Score(BaseModel):
    """The rank of one document."""

    index: int = Field(ge=0, description="Position among the documents of the request, from 0")
    score: float = cohere.SCORE
    text: str | None = Field(None, description="The document, if the request asks for it")


class TextResult(BaseModel):
    """The rank of one document, with its text."""

    index: int = Field(ge=0, description="Position in `documents`, from 0")
    relevance_score: float = cohere.SCORE
    text: str = Field(description="The document")
    document: cohere.Document | None = Field(None, description="If there are a model and return_documents")
    best_chunk: cohere.BestChunk | None = Field(None, description="The same, if the document was split")


class TextResults(BaseModel):
    """All results, best first; the other keys are present if the request has a `model`."""

    results: list[TextResult]
    id: str | None = Field(None, description="The x-request-id of the response")
    model: str | None = Field(None, description="The served model, whatever name the request has")
    usage: cohere.Usage | None = None
    meta: cohere.Meta | None = None


REQUEST = {"query": "what is a cat?", "documents": ["a bread", "a small animal"]}
"""Examples for the OpenAPI document, here and below."""
ARRAY_RESPONSE = [{"index": 1, "score": 0.97}, {"index": 0, "score": 0.02}]
TEXTS_RESPONSE = {"results": [{"index": 1, "relevance_score": 0.97, "text": "a small animal"}]}


def array(ranking: Ranking) -> list[dict[str, object]]:
    """Render `[{"index", "score"}]`, with "text" on request. TEI's array is the same."""
    if ranking.parsed.return_documents:
        documents = ranking.parsed.request.documents
        return [{"index": i, "score": score, "text": documents[i]} for i, score in ranking.best]
    return [{"index": i, "score": score} for i, score in ranking.best]


def texts(ranking: Ranking) -> dict[str, Any]:
    """Render `{"results": [{"index", "relevance_score", "text"}]}`."""
    documents = ranking.parsed.request.documents
    return {"results": [{"index": i, "relevance_score": s, "text": documents[i]} for i, s in ranking.best]}


def texts_with_meta(ranking: Ranking) -> dict[str, object]:
    """Render the same with the additional keys of the results object and, on request, of its results."""
    content = texts(ranking)
    if ranking.parsed.return_documents:  # the cohere v1 client at http://host/api
        content["results"] = [row | cohere.document(ranking, row["index"]) for row in content["results"]]
    return content | cohere.usage_and_meta(ranking)
