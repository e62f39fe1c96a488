"""GET /v1/models and /v1/models/{name}, for OpenAI's clients and user interfaces built on them.

xinference-client requests the model by name before its first rerank, and reads `model_type`.
"""

from __future__ import annotations

from typing import Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel

from reranker.http.errors import NOT_LOADED, ErrorBody
from reranker.http.state import service_of

router = APIRouter(tags=["models"])


class ServedModel(BaseModel):
    """A served model."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    model_type: Literal["rerank"]


class ModelList(BaseModel):
    """All served models: one."""

    object: Literal["list"]
    data: list[ServedModel]


@router.get("/v1/models", summary="The served model, as OpenAI lists it", responses=NOT_LOADED)
async def models(request: Request) -> ModelList:
    """A list of one model."""
    return ModelList(object="list", data=[_served(request)])


@router.get(
    "/v1/models/{name:path}",
    summary="The served model, for any name",
    # Without 4XX FastAPI describes a 422 for the name, but any text is valid.
    responses={**NOT_LOADED, "4XX": {"model": ErrorBody, "description": "Not served"}},
)
async def model(request: Request, name: str) -> ServedModel:
    """The same for every name, because a rerank request accepts every `model`."""
    return _served(request)


def _served(request: Request) -> ServedModel:
    name = service_of(request.app).batcher.require_ready().info.name
    # The age of a checkpoint is unknown, and the format requires `created`.
    return ServedModel(id=name, object="model", created=0, owned_by="reranker", model_type="rerank")
