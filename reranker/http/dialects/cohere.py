"""The results object that Cohere, Jina, vLLM, Infinity and Xinference share, and their clients read.

No key is called "object": infinity_client and Voyage disagree about its value.
"""

from __future__ import annotations

from pydantic import BaseModel, Field

from reranker.http.endpoint import Ranking

# One search unit of Cohere's is a query with up to so many documents.
_DOCUMENTS_PER_UNIT = 100


class Document(BaseModel):
    """The text of a document."""

    text: str


class BestChunk(BaseModel):
    """The chunk that a split document got its score from."""

    index: int = Field(ge=0, description="Place among the chunks of the document, from 0")
    text: str


class Result(BaseModel):
    """One document's place."""

    index: int = Field(ge=0, description="Position in `documents`, from 0")
    relevance_score: float = Field(
        description="Probability that the document meets the query; the logit with raw_scores"
    )
    document: Document | None = Field(None, description="When return_documents is true")
    best_chunk: BestChunk | None = Field(None, description="When return_documents is true and the document was split")


class Usage(BaseModel):
    """Tokens of all prompts, as the model reads them."""

    prompt_tokens: int = Field(ge=0)
    total_tokens: int = Field(ge=0)


class ApiVersion(BaseModel):
    """As Cohere answers it."""

    version: str


class BilledUnits(BaseModel):
    """As Cohere counts: one for every started 100 documents."""

    search_units: int = Field(ge=1)


class Tokens(BaseModel):
    """The same tokens under Cohere's names."""

    input_tokens: int = Field(ge=0)
    output_tokens: int = Field(ge=0)


class Meta(BaseModel):
    """What Cohere's clients read beside the results."""

    api_version: ApiVersion
    billed_units: BilledUnits
    tokens: Tokens
    warnings: list[str] | None = Field(
        None, description="One sentence for each field or text that was not read as it was sent"
    )


class About(BaseModel):
    """What an answer says beside its results."""

    id: str = Field(description="The x-request-id of the answer")
    model: str = Field(description="The model that is served, whatever name was asked for")
    usage: Usage
    meta: Meta


class Results(About):
    """All results, best first, and what they cost."""

    results: list[Result]


def envelope(ranking: Ranking) -> dict[str, object]:
    """`{"results": [{"index", "relevance_score"}], "id", "model", "usage", "meta"}`"""
    return {"results": [_row(ranking, i, score) for i, score in ranking.best], **about(ranking)}


def about(ranking: Ranking) -> dict[str, object]:
    """Everything of the envelope but the results."""
    result = ranking.result
    documents = len(ranking.asked.request.documents)
    meta: dict[str, object] = {
        "api_version": {"version": "2"},
        "billed_units": {"search_units": -(-documents // _DOCUMENTS_PER_UNIT)},
        "tokens": {"input_tokens": result.prompt_tokens, "output_tokens": 0},
    }
    if warnings := ranking.warnings:
        meta["warnings"] = warnings
    usage = {"prompt_tokens": result.prompt_tokens, "total_tokens": result.prompt_tokens}
    return {"id": ranking.request_id, "model": ranking.model, "usage": usage, "meta": meta}


def _row(ranking: Ranking, index: int, score: float) -> dict[str, object]:
    row: dict[str, object] = {"index": index, "relevance_score": score}
    if ranking.asked.return_documents:
        text = ranking.asked.request.documents[index]
        row["document"] = {"text": text}
        chunk = ranking.result.best_chunks.get(index)
        if chunk is not None:
            row["best_chunk"] = {"index": chunk.index, "text": text[chunk.start : chunk.stop]}
    return row
