"""The results object that Cohere, Jina, vLLM, Infinity and Xinference share, and that their clients read.

No key is called "object": infinity_client and Voyage require different values of it.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field

from reranker.http.ranking import Ranking

_DOCUMENTS_PER_UNIT = 100
"""Cohere bills a query with at most 100 documents as one search unit."""
SCORE: Any = Field(description="Probability that the document meets the query; the logit with raw_scores")


class Document(BaseModel):
    """The text of a document."""

    text: str


class BestChunk(BaseModel):
    """The chunk of a split document that determined its score."""

    index: int = Field(ge=0, description="Position among the chunks of the document, from 0")
    text: str


class Result(BaseModel):
    """The rank of one document."""

    index: int = Field(ge=0, description="Position in `documents`, from 0")
    relevance_score: float = SCORE
    document: Document | None = Field(None, description="If return_documents is true")
    best_chunk: BestChunk | None = Field(None, description="If return_documents is true and the document was split")


class Usage(BaseModel):
    """Tokens of all prompts, as the model reads them."""

    prompt_tokens: int = Field(ge=0)
    completion_tokens: Literal[0] = Field(description="Required by the AI SDK's Together provider")
    total_tokens: int = Field(ge=0)


class ApiVersion(BaseModel):
    """The version, in Cohere's format."""

    version: str


class BilledUnits(BaseModel):
    """Cohere's unit: one for every 100 documents or part of them."""

    search_units: int = Field(ge=1)


class Tokens(BaseModel):
    """The tokens of `usage` under Cohere's names."""

    input_tokens: int = Field(ge=0)
    output_tokens: int = Field(ge=0)


class Meta(BaseModel):
    """The additional data that Cohere's clients read."""

    api_version: ApiVersion
    billed_units: BilledUnits
    tokens: Tokens
    warnings: list[str] | None = Field(
        None, description="One sentence for each field or text that was not read as it was sent"
    )


class Results(BaseModel):
    """All results, best first, and their cost."""

    id: str = Field(description="The x-request-id of the response")
    model: str = Field(description="The served model, whatever name the request has")
    usage: Usage
    meta: Meta
    results: list[Result]


REQUEST = {"query": "what is a cat?", "documents": ["a bread", "a small animal"], "model": "any", "top_n": 1}
"""Examples for the OpenAPI document, here and below."""
META_RESPONSE: dict[str, Any] = {
    "id": "5f2c9a1b7d3e4c60",
    "model": "Qwen/Qwen3-Reranker-0.6B",
    "usage": {"prompt_tokens": 171, "completion_tokens": 0, "total_tokens": 171},
    "meta": {
        "api_version": {"version": "2"},
        "billed_units": {"search_units": 1},
        "tokens": {"input_tokens": 171, "output_tokens": 0},
    },
}
RESPONSE: dict[str, Any] = {"results": [{"index": 1, "relevance_score": 0.97}], **META_RESPONSE}


def results(ranking: Ranking) -> dict[str, object]:
    """Render `{"results": [{"index", "relevance_score"}], "id", "model", "usage", "meta"}`."""
    return {"results": rows(ranking), **usage_and_meta(ranking)}


def rows(ranking: Ranking) -> list[dict[str, object]]:
    """Render `[{"index", "relevance_score"}]`, with "document" on request."""
    return [_row(ranking, i, score) for i, score in ranking.best]


def usage_and_meta(ranking: Ranking) -> dict[str, object]:
    """Render all keys of the results object but the results."""
    tokens = ranking.result.prompt_tokens
    documents = len(ranking.parsed.request.documents)
    meta: dict[str, object] = {
        "api_version": {"version": "2"},
        "billed_units": {"search_units": -(-documents // _DOCUMENTS_PER_UNIT)},
        "tokens": {"input_tokens": tokens, "output_tokens": 0},
    }
    if warnings := ranking.warnings:
        meta["warnings"] = warnings
    return {"id": ranking.request_id, "model": ranking.model.name, "usage": usage(ranking), "meta": meta}


def usage(ranking: Ranking) -> dict[str, int]:
    """Render `{"prompt_tokens", "completion_tokens", "total_tokens"}`."""
    tokens = ranking.result.prompt_tokens
    return {"prompt_tokens": tokens, "completion_tokens": 0, "total_tokens": tokens}


def _row(ranking: Ranking, index: int, score: float) -> dict[str, object]:
    row: dict[str, object] = {"index": index, "relevance_score": score}
    if ranking.parsed.return_documents:
        row |= document(ranking, index)
    return row


def document(ranking: Ranking, index: int) -> dict[str, object]:
    """Render `{"document": {"text"}}`, with "best_chunk" if the document was split."""
    text = ranking.parsed.request.documents[index]
    chunk = ranking.result.best_chunks.get(index)
    best = {} if chunk is None else {"best_chunk": {"index": chunk.index, "text": text[chunk.start : chunk.stop]}}
    return {"document": {"text": text}, **best}
