"""The native dialect: the smallest bodies that say it all.

POST /v1/rerank      -> [{"index", "score"}], best first
POST /api/v1/rerank  -> {"results": [{"index", "relevance_score", "text"}]}, best first
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from pydantic import AliasChoices, BaseModel, ConfigDict, Field
from starlette.responses import Response

from reranker.engine.scores import sigmoid
from reranker.service.api.body import Count, Documents, Query, Text, parse, read_json
from reranker.service.api.endpoint import HEADERS, answer, order, rank, refuse_too_many
from reranker.service.api.errors import RESPONSES
from reranker.types import RerankRequest

router = APIRouter(tags=["native"])


class NativeBody(BaseModel):
    """Rank `documents` by relevance to `query`. Unknown keys are ignored."""

    model_config = ConfigDict(extra="ignore")

    query: Query = Field(description="What is searched for", examples=["what is a cat?"])
    documents: Documents = Field(
        description='Strings, or objects {"text": string}', examples=[["a small animal", "a bread"]]
    )
    top_k: Count = Field(
        None, validation_alias=AliasChoices("top_k", "top_n"), description="How many results; null: all. Also: top_n"
    )
    instruction: Text | None = Field(
        None,
        validation_alias=AliasChoices("instruction", "instruct"),
        description="Replaces the default instruction. Also: instruct",
    )

    def request(self) -> RerankRequest:
        """The request in the engine's words."""
        return RerankRequest(self.query, self.documents, self.instruction)


class Score(BaseModel):
    """One document's place."""

    index: int = Field(description="Position in `documents`, from 0")
    score: float = Field(ge=0, le=1, description="Probability that the document meets the query")


class Result(BaseModel):
    """One document's place, with its text."""

    index: int = Field(description="Position in `documents`, from 0")
    relevance_score: float = Field(ge=0, le=1, description="Probability that the document meets the query")
    text: str = Field(description="The document")


class Results(BaseModel):
    """All results, best first."""

    results: list[Result]


_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": NativeBody.model_json_schema(by_alias=False)}},
    }
}


async def _read(request: Request) -> NativeBody:
    request.app.state.batcher.check_ready()
    body = await read_json(request)
    refuse_too_many(request, body.get("documents"))
    return parse(NativeBody, body)


@router.post(
    "/v1/rerank",
    summary="Rank documents, answer indices and scores",
    responses={**RESPONSES, 200: {"model": list[Score], "headers": HEADERS}},
    openapi_extra=_BODY,
)
async def rerank(request: Request) -> Response:
    """The native array: `[{"index", "score"}]`, best first."""
    body = await _read(request)
    result = await rank(request, body.request())
    best = order(result.logits, body.top_k)
    return answer([{"index": i, "score": sigmoid(result.logits[i])} for i in best], result)


@router.post(
    "/api/v1/rerank",
    summary="Rank documents, answer indices, scores and texts",
    responses={**RESPONSES, 200: {"model": Results, "headers": HEADERS}},
    openapi_extra=_BODY,
)
async def rerank_with_text(request: Request) -> Response:
    """The results with their texts: `{"results": [{"index", "relevance_score", "text"}]}`, best first."""
    body = await _read(request)
    result = await rank(request, body.request())
    best = order(result.logits, body.top_k)
    rows = [{"index": i, "relevance_score": sigmoid(result.logits[i]), "text": body.documents[i]} for i in best]
    return answer({"results": rows}, result)
