"""The native dialect: the smallest answers that say it all.

POST /v1/rerank      -> [{"index", "score"}], best first
POST /api/v1/rerank  -> {"results": [{"index", "relevance_score", "text"}]}, best first
"""

from __future__ import annotations

from pydantic import BaseModel, Field

from reranker.http.endpoint import Ranking


class Score(BaseModel):
    """One document's place."""

    index: int = Field(ge=0, description="Position among the documents of the request, from 0")
    score: float = Field(description="Probability that the document meets the query; the logit with raw_scores")
    text: str | None = Field(None, description="The document, when the request asks for it")


class TextResult(BaseModel):
    """One document's place, with its text."""

    index: int = Field(ge=0, description="Position in `documents`, from 0")
    relevance_score: float = Field(
        description="Probability that the document meets the query; the logit with raw_scores"
    )
    text: str = Field(description="The document")


class TextResults(BaseModel):
    """All results, best first."""

    results: list[TextResult]


def array(ranking: Ranking) -> list[dict[str, object]]:
    """`[{"index", "score"}]`, with "text" when the documents are asked for; TEI answers the same."""
    if ranking.asked.return_documents:
        documents = ranking.asked.request.documents
        return [{"index": i, "score": score, "text": documents[i]} for i, score in ranking.best]
    return [{"index": i, "score": score} for i, score in ranking.best]


def texts(ranking: Ranking) -> dict[str, object]:
    """`{"results": [{"index", "relevance_score", "text"}]}`"""
    documents = ranking.asked.request.documents
    return {"results": [{"index": i, "relevance_score": s, "text": documents[i]} for i, s in ranking.best]}
